"""`lucid-jax bench`: each operation against the naive way of doing it, side by side in one run.

A row times both in turns, a burst of steps each, so that whatever else the machine does falls on
both, and compares medians. Milliseconds are this machine's; the ratios are what carries over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import lucid_jax as lj
from lucid_jax import nn
from lucid_jax.decode import NGram, generate, generate_uncached, speculate


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: milliseconds of the naive way and of this package."""

    operation: str
    case: str
    naive: str
    naive_ms: float
    lucid_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster this package is."""
        return self.naive_ms / self.lucid_ms


def run_bench(*, as_json: bool = False, quick: bool = False) -> list[Row]:
    """Runs every comparison and prints a table, or JSON for machines.

    Args:
        as_json: print one JSON object with the environment and the rows.
        quick: smaller sizes and fewer repeats: shows that it runs, not how fast.
    """
    repeats = 1 if quick else 4
    rows: list[Row] = []
    # Where nobody's terminal sets the width, let no cell be cut.
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    with Progress(console=console, transient=True) as progress:
        for group in progress.track(GROUPS, description="measuring"):
            rows.extend(group(repeats, quick))
    environment = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if as_json:
        records = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
        print(json.dumps({"environment": environment, "rows": records}, indent=2))
        return rows
    title = ", ".join(f"{name} {value}" for name, value in environment.items())
    table = Table(title=f"lucid-jax bench: {title}", title_justify="left")
    for heading in ("operation", "case", "against"):
        table.add_column(heading)
    for heading in ("naive ms", "lucid ms", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (f"{row.naive_ms:.3f}", f"{row.lucid_ms:.3f}")
        table.add_row(row.operation, row.case, row.naive, *times, f"{row.ratio:.1f}x")
    console.print(table)
    return rows


def _medians(repeats: int, *runs: Callable[[], Any], burst: int = 20) -> list[float]:
    """Median milliseconds of each run, taken in turns after one unmeasured round.

    A turn is a burst of steps, the first unmeasured: a decode loop runs one thing after itself, and
    not after something else has emptied the processor's caches.
    """
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, seconds in zip(runs, times, strict=True):
            for step in range(burst):
                started = time.perf_counter()
                jax.block_until_ready(jax.tree.leaves(run()))
                if turn and (step or burst == 1):
                    seconds.append(time.perf_counter() - started)
    return [1e3 * statistics.median(seconds) for seconds in times]


def _carried(step: Callable[..., Any], carry: Any, *args: Any) -> Callable[[], Any]:
    """A run that feeds a donating step its own result."""

    def run() -> Any:
        nonlocal carry
        carry, *rest = step(carry, *args)
        return carry, rest

    return run


def _random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _filled(capacity: int, length: int, batch: int, heads: int, dim: int) -> lj.CacheState:
    state = lj.init_cache(
        lj.Static(capacity), num_layers=1, batch_size=batch, num_kv_heads=heads, head_dim=dim
    )
    history = _random(1, batch, heads, length, dim)
    return lj.update(state, history, history, 0, donate=True)


def _append(repeats: int, quick: bool) -> Iterator[Row]:
    token = _random(0, 1, 8, 1, 64)

    def append(state: lj.CacheState, token: jax.Array) -> tuple[lj.CacheState]:
        return (lj.update(state, token, token, 0),)

    @jax.jit
    def naive(buffers: tuple[jax.Array, jax.Array], length: int, token: jax.Array) -> Any:
        return [jax.lax.dynamic_update_slice(b, token, (0, 0, length, 0)) for b in buffers]

    for capacity in (512, 4096) if quick else (512, 4096, 65536):
        state = _filled(capacity, 100, 1, 8, 64)
        buffers = (_random(2, 1, 8, capacity, 64), _random(3, 1, 8, capacity, 64))
        ours = _carried(jax.jit(append, donate_argnums=0), state, token)
        times = _medians(repeats, partial(naive, buffers, 100, token), ours)
        yield Row("append", f"1 token, capacity {capacity}", "new buffer each step", *times)


def _slide(repeats: int, quick: bool) -> Iterator[Row]:
    token = _random(0, 1, 8, 1, 64)

    def append(state: lj.CacheState, token: jax.Array) -> tuple[lj.CacheState]:
        return (lj.update(state, token, token, 0),)

    @partial(jax.jit, donate_argnums=0)
    def shift(buffers: Any, token: jax.Array) -> Any:
        return ([jnp.concatenate([b[:, :, 1:], token], axis=2) for b in buffers],)

    for window in (512,) if quick else (512, 65536):
        state = lj.init_cache(
            lj.Sliding(window, sinks=4), num_layers=1, batch_size=1, num_kv_heads=8, head_dim=64
        )
        history = _random(1, 1, 8, window + 100, 64)
        state = lj.update(state, history, history, 0, donate=True)  # wrapped
        buffers = [_random(2, 1, 8, window, 64), _random(3, 1, 8, window, 64)]
        ours = _carried(jax.jit(append, donate_argnums=0), state, token)
        times = _medians(repeats, _carried(shift, buffers, token), ours)
        yield Row("sliding append", f"1 token, window {window}", "shift the window", *times)


def _codecs(repeats: int, quick: bool) -> Iterator[Row]:
    """Attention over packed tokens against the same over float32 ones."""
    capacity, length = (512, 400) if quick else (4096, 4000)
    history = _random(1, 1, 8, length, 128)
    attend = jax.jit(lambda state, query: lj.attend(state, query, 0))
    codecs = {
        "float32": lj.codecs.Identity(),
        "int8": lj.codecs.Int8(),
        "fp8": lj.codecs.Float8(),
        "int4": lj.codecs.Int4(),
        "kivi": lj.codecs.KIVI(),
    }
    for groups in (1,) if quick else (1, 4):
        query = _random(4, 1, 8 * groups, 1, 128)
        runs = []
        for codec in codecs.values():
            state = lj.init_cache(
                lj.Static(capacity, codec), num_layers=1, batch_size=1, num_kv_heads=8, head_dim=128
            )
            state = lj.update(state, history, history, 0, donate=True)
            runs.append(partial(attend, state, query))
        plain, *packed = _medians(repeats, *runs)
        for name, milliseconds in zip(list(codecs)[1:], packed, strict=True):
            case = f"{name}, length {length} of {capacity}, G={groups}"
            yield Row("attend", case, "float32 cache", plain, milliseconds)


def _step(repeats: int, quick: bool) -> Iterator[Row]:
    heads, dim, capacity = 8, 128, 512 if quick else 4096
    token = _random(0, 1, heads, 1, dim)

    def lucid(state: lj.CacheState, token: jax.Array, query: jax.Array) -> Any:
        state = lj.update(state, token, token, 0)
        return state, lj.attend(state, query, 0)

    def by_hand(attention: Callable[..., jax.Array], carry: Any, token: Any, query: Any) -> Any:
        key, value, length = carry
        key = jax.lax.dynamic_update_slice(key, token, (0, 0, length, 0))
        value = jax.lax.dynamic_update_slice(value, token, (0, 0, length, 0))
        return (key, value, length + 1), attention(query, key, value, length + 1)

    def einsum(query: Any, key: Any, value: Any, length: Any) -> jax.Array:
        groups = query.shape[1] // heads
        grouped = query.reshape(1, heads, groups, dim)
        scores = jnp.einsum("bhgd,bhsd->bhgs", grouped, key) / math.sqrt(dim)
        scores = jnp.where(jnp.arange(capacity) < length, scores, -jnp.inf)
        return jnp.einsum("bhgs,bhsd->bhgd", jax.nn.softmax(scores), value)

    def library(query: Any, key: Any, value: Any, length: Any) -> jax.Array:
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        lengths = jnp.full((1,), length, jnp.int32)
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)

    against = {"masked einsum": einsum, "jax.nn.dot_product_attention": library}
    for groups in (1, 4):
        query = _random(4, 1, heads * groups, 1, dim)
        for length in (255,) if quick else (255, 1000, 4000):
            runs = []
            for attention in against.values():
                carry = (*(_random(s, 1, heads, capacity, dim) for s in (5, 6)), jnp.int32(length))
                donating = jax.jit(partial(by_hand, attention), donate_argnums=0)
                runs.append(_carried(donating, carry, token, query))
            state = _filled(capacity, length, 1, heads, dim)
            runs.append(_carried(jax.jit(lucid, donate_argnums=0), state, token, query))
            *naive, ours = _medians(repeats, *runs)
            for name, milliseconds in zip(against, naive, strict=True):
                case = f"length {length} of {capacity}, G={groups}"
                yield Row("append + attend", case, name, milliseconds, ours)


def _reorder(repeats: int, quick: bool) -> Iterator[Row]:
    capacity, length = (256, 100) if quick else (4096, 1000)
    beams = jnp.array([3, 1, 0, 0], jnp.int32)
    state = _filled(capacity, length, 4, 8, 64)
    buffers = (state.layers[0].key + 0, state.layers[0].value + 0)
    naive = jax.jit(lambda buffers: [jnp.take(b, beams, axis=0) for b in buffers])
    ours = _carried(lambda s: (lj.reorder(s, beams, donate=True),), state)
    times = _medians(repeats, partial(naive, buffers), ours)
    yield Row("reorder", f"4 beams, length {length} of {capacity}", "gather whole cache", *times)


def _crop(repeats: int, quick: bool) -> Iterator[Row]:
    capacity, length = (256, 100) if quick else (4096, 1000)
    kept = length // 2
    state = _filled(capacity, length, 1, 8, 64)
    buffers = (state.layers[0].key + 0, state.layers[0].value + 0)

    @jax.jit
    def naive(buffers: Any, length: Any) -> Any:
        slots = jnp.arange(capacity) + length - kept
        return [jnp.take(b, slots, axis=2, mode="clip") for b in buffers]

    def crop(state: lj.CacheState) -> tuple[lj.CacheState]:
        (layer,) = state.layers  # pretend that it is full again, so that every turn has work
        full = state.with_layers(
            [layer.replace(start=layer.start * 0, position=layer.position * 0 + length)]
        )
        return (lj.crop(full, kept),)

    ours = _carried(jax.jit(crop, donate_argnums=0), state)
    times = _medians(repeats, partial(naive, buffers, jnp.int32(length)), ours)
    yield Row("crop", f"{length} to {kept} of {capacity}", "gather whole cache", *times)


def _eager(repeats: int, quick: bool) -> Iterator[Row]:
    del repeats
    count = 20 if quick else 300
    tokens = [lj.randn(2, 8, 1, 64) for _ in range(2 * count)]
    started = time.perf_counter()
    cache = nn.DynamicKVCache()
    for i in range(count):
        stored = cache.update(tokens[2 * i], tokens[2 * i + 1], 0)
    jax.block_until_ready(stored)
    ours = 1e3 * (time.perf_counter() - started) / count

    # Every length is a new slice to compile; ten lengths show what each costs.
    naive_count = 10
    write = jax.jit(
        lambda buffer, token, i: jax.lax.dynamic_update_slice(buffer, token, (0, 0, i, 0)),
        donate_argnums=0,
    )
    keys, values = jnp.zeros((2, 8, count, 64)), jnp.zeros((2, 8, count, 64))
    started = time.perf_counter()
    for i in range(naive_count):
        keys, values = write(keys, tokens[2 * i], i), write(values, tokens[2 * i + 1], i)
        jax.block_until_ready((keys[:, :, : i + 1], values[:, :, : i + 1]))
    naive = 1e3 * (time.perf_counter() - started) / naive_count
    case = f"per update, {count} from empty, compiling included"
    yield Row("eager update", case, "slice to length", naive, ours)


def _generation(repeats: int, quick: bool) -> Iterator[Row]:
    from lucid_jax.models.config import ModelConfig
    from lucid_jax.models.transformer import Transformer

    config = ModelConfig(vocab_size=2048, num_hidden_layers=4, num_key_value_heads=2)
    model = Transformer(config, rngs=nnx.Rngs(0))
    new = 8 if quick else 64
    for length in (32,) if quick else (64, 400):
        prompt = [list(range(1, length + 1))]
        naive, ours = _medians(
            1 if quick else 3,
            partial(generate_uncached, model, prompt, max_new_tokens=new),
            partial(generate, model, prompt, max_new_tokens=new),
            burst=1,
        )
        case = f"per token, {new} after a prompt of {length}"
        yield Row("decode", case, "recompute everything", naive / new, ours / new)


def _beams(repeats: int, quick: bool) -> Iterator[Row]:
    """Four beams, prefill left out: nothing moves, what is not shared moves, everything moves."""
    from lucid_jax.decode import beam
    from lucid_jax.models.config import ModelConfig
    from lucid_jax.models.transformer import Transformer

    layers = 1 if quick else 4
    config = ModelConfig(vocab_size=2048, num_hidden_layers=layers, num_key_value_heads=2)
    model = Transformer(config, rngs=nnx.Rngs(0))
    width = 4
    for length, new in ((32, 8),) if quick else ((2000, 64), (16, 400)):
        prompt = [[1 + i % 2000 for i in range(length)]]
        rules = beam.as_rules(new, 1.0, False, 1.0, (), config.vocab_size)
        runs = []
        others: tuple[beam.History, ...] = ("tree",) if quick else ("tree", "reorder")
        for history in ("gather", *others):
            start = beam.prefilled(model, prompt, rules, width, None, 512, history)

            def run(start: tuple) -> Any:
                graph, params, state, *rest = start
                return beam.search_from(graph, params, jax.tree.map(jnp.copy, state), *rest).step

            runs.append(partial(run, start))
        naive, *ours = _medians(1 if quick else 3, *runs, burst=1)
        for history, milliseconds in zip(others, ours, strict=True):
            case = f"{history}, per token, {width} beams, {new} after a prompt of {length}"
            yield Row("beam search", case, "gather whole cache", naive / new, milliseconds / new)


def _prompts(repeats: int, quick: bool) -> Iterator[Row]:
    """Prefill of a prompt whose beginning an earlier one had."""
    from lucid_jax.models.config import ModelConfig
    from lucid_jax.models.transformer import Transformer

    config = ModelConfig(vocab_size=2048, num_hidden_layers=4, num_key_value_heads=2)
    model = Transformer(config, rngs=nnx.Rngs(0))
    length, shared = (80, 64) if quick else (400, 384)
    spec = lj.Static(length + 64)
    prompts = lj.PromptCache(model, spec, max_bytes=1 << 30)
    # What is shared is whole chunks, so the rest is computed every time.
    prompt = [list(range(1, length + 1))]
    one = partial(generate, model, prompt, max_new_tokens=1)
    naive, ours = _medians(
        1 if quick else 5, partial(one, cache=spec), partial(one, prompt_cache=prompts), burst=1
    )
    yield Row("prefill", f"{length} tokens, {shared} seen before", "recompute", naive, ours)


def _speculation(repeats: int, quick: bool) -> Iterator[Row]:
    """Greedy texts of the embedded model, with drafts and without: the same tokens.

    Whole requests, one after the other, as texts differ in how well they are drafted.
    """
    if quick:
        from lucid_jax.models.config import ModelConfig
        from lucid_jax.models.transformer import Transformer

        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1}
        config = ModelConfig(vocab_size=64, num_attention_heads=1, **sizes)
        model = draft = Transformer(config, rngs=nnx.Rngs(0))
        prompts, new, counts = [[1, 2, 3]], 8, [4]
    else:
        from lucid_jax.models.checkpoint import embedded_draft_path, load_model

        model, tokenizer = load_model()
        draft, _ = load_model(embedded_draft_path())
        prompts = [tokenizer.encode_prompt(text) for text in _BEGINNINGS]
        new, counts = 200, [2, 3, 4, 6]

    def each(decode: Callable[..., Any]) -> list[Any]:
        return [decode(model, [prompt], max_new_tokens=new) for prompt in prompts]

    for name, one in {"draft model": draft, "n-grams": NGram()}.items():
        for count in counts:
            drafted = partial(speculate, draft=one, draft_tokens=count)
            accepted = drafted(model, prompts, max_new_tokens=new).acceptance
            runs = partial(each, generate), partial(each, drafted)
            times = _medians(1 if quick else 2 * repeats, *runs, burst=1)
            naive, ours = (time / new / len(prompts) for time in times)
            case = f"per token, {name}, {count} a round, {accepted:.0%} accepted"
            yield Row("speculate", case, "generate", naive, ours)


_BEGINNINGS = (
    "Return a new list containing",
    "The following example shows how to use the",
    "If the argument is not a string, a TypeError is raised",
    "Changed in version 3.9: Added the",
    "This module provides access to the",
    "A context manager that",
    "The default value is None, which means",
    "See also the documentation of",
)

GROUPS = (
    _append,
    _slide,
    _step,
    _codecs,
    _reorder,
    _crop,
    _eager,
    _generation,
    _beams,
    _prompts,
    _speculation,
)
