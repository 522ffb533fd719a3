"""What `lucid-jax bench` measures of verbs and attention."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lucid_jax as lj
from lucid_jax import nn
from lucid_jax.tools.measure import Row, medians


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
        times = medians(repeats, partial(naive, buffers, 100, token), ours)
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
        times = medians(repeats, _carried(shift, buffers, token), ours)
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
        plain, *packed = medians(repeats, *runs)
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
            *naive, ours = medians(repeats, *runs)
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
    times = medians(repeats, partial(naive, buffers), ours)
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
    times = medians(repeats, partial(naive, buffers, jnp.int32(length)), ours)
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


GROUPS = (_append, _slide, _step, _codecs, _reorder, _crop, _eager)
