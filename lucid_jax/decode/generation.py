"""`generate` and `stream`: prefill in bucketed chunks, then one compiled loop on a donated cache.

Rows of a batch may have prompts of different lengths: the cache is ragged, and a row that has met a
stop token sits out. The host only steps in to hand over tokens or to grow a dynamic cache.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from lucid_jax.cache import state as core
from lucid_jax.cache.checks import check_count
from lucid_jax.cache.contiguous import Static
from lucid_jax.cache.layer import LayerSpec
from lucid_jax.decode.graph import Graph, split
from lucid_jax.decode.sampling import Sampling, sample

if TYPE_CHECKING:
    from lucid_jax.decode.prompt_cache import PromptCache

MIN_CHUNK = 16


class LanguageModel(Protocol):
    """What `generate` asks of a model: an nnx module with these methods.

    Attributes:
        config: has `vocab_size`.
        rope_by_place: whether it counts positions in the cache, and so takes no `positions=`.
    """

    config: Any
    rope_by_place: bool

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many positions back a token sees; None for all."""

    def hidden(
        self,
        tokens: jax.Array,
        cache: Any = None,
        *,
        lengths: Any = None,
        positions: Any = None,
        mask: Any = None,
    ) -> Any:
        """Tokens (B, T) to hidden states (B, T, E) and the cache; see `Transformer.hidden`."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (B, T, E) to logits (B, T, V)."""

    def cache_spec(self, max_length: int, *, slack: int = 0) -> LayerSpec | Sequence[LayerSpec]:
        """What to keep of texts of up to `max_length` tokens; raises for a length it cannot read.

        With `slack`, windows of which so many tokens can be taken back.
        """

    def init_cache(self, spec: Any, batch_size: int, *, ragged: bool = False) -> core.CacheState:
        """An empty cache for this model."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: int32 (B, max_new_tokens), 0 past a row's end.
        lengths: int32 (B,), new tokens of each row, its stop token included.
        cache: the cache, holding all but each row's last token; None where nothing was cached.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    cache: core.CacheState | None

    def rows(self) -> list[list[int]]:
        """The new tokens of each row as a list."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


@struct.dataclass
class _Loop:
    """What the compiled loop carries from token to token."""

    cache: Any  # a CacheState; without a cache, the tokens so far, int32 (B, C)
    token: jax.Array  # int32 (B,): chosen, and not yet in the cache
    done: jax.Array  # bool (B,)
    produced: jax.Array  # int32 (B,): tokens chosen so far
    step: jax.Array  # int32 []: tokens the longest row has
    out: jax.Array  # int32 (B, N)
    seen: jax.Array | None  # bool (B, V), for the repetition penalty
    key: jax.Array

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""


def generate(
    model: Any,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    cache: LayerSpec | Sequence[LayerSpec] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 512,
    prompt_cache: PromptCache | None = None,
) -> Generation:
    """Continues each prompt until a stop token or `max_new_tokens`.

    Args:
        model: an nnx module such as `lucid_jax.models.Transformer`; see `LanguageModel`.
        prompts: token ids, one list per row, of any lengths; or an int array (B, T).
        max_new_tokens: the most tokens to add to a row.
        cache: spec of the cache, `Static(...)`, `Dynamic()` or `Sliding(...)`, or one per layer. By
            default what `model.cache_spec` asks for: rings where the model has windows, elsewhere
            static with exactly the room needed.
        sampling: how to choose tokens; greedy by default.
        seed: of the random choices. A row's draws depend on (seed, row, step) alone.
        stop_tokens: ids that end a row.
        prefill_chunk: the most prompt tokens per call; shorter chunks are padded to a power of two,
            so that few shapes are compiled.
        prompt_cache: takes the place of `cache` and `prefill_chunk`: prompts are prefilled into a
            cache of its spec, and what earlier ones left there is not computed again.

    Returns:
        The new tokens, how many each row has, and the cache.

    Raises:
        ValueError: for an empty prompt, an id outside the vocabulary, a prompt that with
            `max_new_tokens` does not fit the cache or the model, or a prompt cache of another model.
        TypeError: for ids, of prompts or stop tokens, that are not integers.
    """
    last = _run(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        cache=cache,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
        prompt_cache=prompt_cache,
        tokens_per_call=max_new_tokens,
    )
    loop = deque(last, maxlen=1).pop()
    return _result(loop, max_new_tokens, loop.cache)


def stream(
    model: Any,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_call: int = 8,
    cache: LayerSpec | Sequence[LayerSpec] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 512,
    prompt_cache: PromptCache | None = None,
) -> Iterator[list[list[int]]]:
    """`generate` for people: yields each row's new tokens as they come, a few per device call.

    Args:
        model: as for `generate`.
        prompts: as for `generate`.
        max_new_tokens: as for `generate`.
        tokens_per_call: tokens per device call: enough that printing does not stall the loop.
        cache: as for `generate`.
        sampling: as for `generate`.
        seed: as for `generate`.
        stop_tokens: as for `generate`.
        prefill_chunk: as for `generate`.
        prompt_cache: as for `generate`.

    Yields:
        One list per row with the tokens new since the last time; the first has one token each.
    """
    check_count(tokens_per_call, "tokens_per_call", 1)
    runs = _run(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        cache=cache,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
        prompt_cache=prompt_cache,
        tokens_per_call=tokens_per_call,
    )
    yield from _news(runs)


def generate_uncached(
    model: Any,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
) -> Generation:
    """`generate` without a cache: every token recomputes all before it. To see what a cache saves.

    Chooses the same tokens. The tokens so far are padded to a power of two, as a dynamic cache is.
    """
    last = _run_uncached(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        tokens_per_call=max_new_tokens,
    )
    return _result(deque(last, maxlen=1).pop(), max_new_tokens, None)


def stream_uncached(
    model: Any,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_call: int = 8,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
) -> Iterator[list[list[int]]]:
    """`stream` without a cache; see `generate_uncached`."""
    runs = _run_uncached(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        tokens_per_call=tokens_per_call,
    )
    yield from _news(runs)


# --- the host's part -------------------------------------------------------------------------------


def _run(
    model: Any,
    prompts: Any,
    *,
    max_new_tokens: int,
    cache: Any,
    sampling: Sampling | None,
    seed: int,
    stop_tokens: Sequence[int],
    prefill_chunk: int,
    prompt_cache: PromptCache | None,
    tokens_per_call: int,
) -> Iterator[_Loop]:
    """Yields the loop's state after prefill (one token chosen) and after each device call."""
    check_count(max_new_tokens, "max_new_tokens", 1)
    check_count(prefill_chunk, "prefill_chunk", 1)
    sampling = Sampling() if sampling is None else sampling
    stops = as_stops(stop_tokens)
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    graph, params = split(model)
    if prompt_cache is None:
        state = open_cache(model, cache, len(tokens), tokens.shape[1], max_new_tokens)
        last, state = prefill(graph, params, state, tokens, lengths, prefill_chunk)
    else:
        if cache is not None:
            raise ValueError(
                f"a prompt cache brings its own spec, {prompt_cache.spec}; leave out cache="
            )
        start = prompt_cache.prefill(prompts, max_new_tokens=max_new_tokens, model=model)
        last, state = start.hidden, start.cache
    loop = _start(
        graph, params, state, last, seen_tokens(tokens, lengths, model, sampling),
        jax.random.key(seed), _out_size(max_new_tokens), sampling, stops,
    )  # fmt: skip
    yield loop

    step = 1
    while step < max_new_tokens and not bool(np.all(loop.done)):
        call = min(tokens_per_call, max_new_tokens - step)
        room = core.room(loop.cache)
        if room == 0:
            loop = loop.replace(cache=core.ensure_capacity(loop.cache, 1))
            room = core.room(loop.cache)
        limit = step + (call if room is None else min(call, room))
        loop = _decode(graph, params, loop, np.int32(limit), sampling, stops)
        core.check_overflow(loop.cache)
        step = limit
        yield loop


def _run_uncached(
    model: Any,
    prompts: Any,
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    seed: int,
    stop_tokens: Sequence[int],
    tokens_per_call: int,
) -> Iterator[_Loop]:
    check_count(max_new_tokens, "max_new_tokens", 1)
    check_count(tokens_per_call, "tokens_per_call", 1)
    sampling = Sampling() if sampling is None else sampling
    stops = as_stops(stop_tokens)
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    model.cache_spec(tokens.shape[1] + max_new_tokens - 1)  # refuses what the model cannot read
    graph, params = split(model)
    capacity = power_of_two(tokens.shape[1])
    history = np.pad(tokens, ((0, 0), (0, capacity - tokens.shape[1])))
    last = _last_hidden(graph, params, history, lengths)
    loop = _start(
        graph, params, (jnp.asarray(history), jnp.asarray(lengths)), last,
        seen_tokens(tokens, lengths, model, sampling),
        jax.random.key(seed), _out_size(max_new_tokens), sampling, stops,
    )  # fmt: skip
    yield loop
    step = 1
    while step < max_new_tokens and not bool(np.all(loop.done)):
        history, filled = loop.cache
        room = history.shape[1] - int(np.max(filled))
        if room == 0:
            history = np.pad(np.asarray(history), ((0, 0), (0, history.shape[1])))
            loop = loop.replace(cache=(jnp.asarray(history), filled))
            room = history.shape[1] // 2
        limit = step + min(tokens_per_call, max_new_tokens - step, room)
        loop = _recompute(graph, params, loop, np.int32(limit), sampling, stops)
        step = limit
        yield loop


def as_stops(stop_tokens: Any) -> tuple[int, ...]:
    """Checks the ids that end a row; sorted, so that naming them in another order compiles nothing."""
    if not isinstance(stop_tokens, Iterable):
        raise TypeError(
            f"stop_tokens must be a list of token ids, got {stop_tokens!r}; write [...]"
        )
    return tuple(sorted({check_count(token, "a stop token") for token in stop_tokens}))


def pad_prompts(prompts: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads prompts: int32 (B, longest) and lengths (B,).

    Raises:
        ValueError: for no prompts, an empty one, or an id outside the vocabulary.
        TypeError: for ids that are not integers.
    """
    rows = [np.asarray(row) for row in prompts]
    if not rows:
        raise ValueError("prompts must hold at least one row, got none")
    for index, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(
                f"each prompt must be a list of token ids, got shape {row.shape} for prompt {index}; "
                "for one prompt pass [ids]"
            )
        if row.size == 0:
            raise ValueError(
                f"prompt {index} is empty; give at least one token, such as the BOS id"
            )
        if not np.issubdtype(row.dtype, np.integer):
            raise TypeError(f"token ids must be integers, got {row.dtype} in prompt {index}")
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"token ids must be in [0, {vocab_size}), got {row.min()} ... {row.max()} in "
                f"prompt {index}; was it encoded with another tokenizer?"
            )
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, lengths


def unpad(tokens: ArrayLike, attention_mask: ArrayLike) -> list[list[int]]:
    """The rows of a padded batch, as `generate` takes them; padding may be left, right or both.

    Args:
        tokens: int (B, T).
        attention_mask: bool or 0 and 1, (B, T): which are real, as transformers' tokenizers give it.

    Raises:
        ValueError: if shapes differ, or real tokens of a row do not follow each other.

    Example:
        >>> unpad([[0, 0, 7], [5, 6, 0]], [[0, 0, 1], [1, 1, 0]])
        [[7], [5, 6]]
    """
    ids, real = np.asarray(tokens), np.asarray(attention_mask).astype(bool)
    if ids.ndim != 2 or ids.shape != real.shape:
        raise ValueError(
            f"tokens and attention_mask must both be (batch, seq), got {ids.shape} and {real.shape}"
        )
    edges = np.diff(np.pad(real, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    if np.any(np.sum(edges == 1, axis=1) > 1):
        row = int(np.argmax(np.sum(edges == 1, axis=1) > 1))
        raise ValueError(
            f"row {row} of attention_mask has padding between real tokens; move it to the ends"
        )
    return [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]


def prefill_chunks(length: int, largest: int) -> list[tuple[int, int]]:
    """Cuts a prompt into (start, size) chunks; the last is padded up to a power of two.

    Example:
        >>> prefill_chunks(1100, 512)
        [(0, 512), (512, 512), (1024, 128)]
        >>> prefill_chunks(3, 512)
        [(0, 16)]
    """
    chunks = []
    for start in range(0, length, largest):
        left = length - start
        chunks.append((start, min(largest, max(MIN_CHUNK, power_of_two(left)))))
    return chunks


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()


def _out_size(max_new_tokens: int) -> int:
    return max(64, power_of_two(max_new_tokens))


def open_cache(
    model: Any,
    cache: Any,
    batch_size: int,
    longest: int,
    max_new_tokens: int,
    *,
    spare: int = 0,
    slack: int = 0,
) -> core.CacheState:
    """An empty ragged cache for prompts of up to `longest` tokens and the new ones.

    Args:
        model: see `LanguageModel`.
        cache: a spec, or one per layer; None for what the model asks for, with exactly the room needed.
        batch_size: rows.
        longest: tokens of the longest prompt.
        max_new_tokens: the most tokens to add; the last is never fed back, so it needs no slot.
        spare: slots needed beyond those, as by the branches of a tree of drafts.
        slack: tokens that may be taken back, which the model's own windows then leave room for.

    Raises:
        ValueError: if they do not fit the cache.
    """
    need = longest + max_new_tokens - 1 + spare
    # Asked for in any case: it refuses what the model cannot read.
    own = model.cache_spec(need - spare, slack=slack)
    if spare:  # a tree of drafts: only where the model has no windows
        own = Static(need)
    state = model.init_cache(own if cache is None else cache, batch_size, ragged=True)
    try:
        # What can grow grows as far as the prompt now, and later as tokens come.
        state = core.grow(state, longest)
        for layer in state.layers:
            if need > layer.capacity and layer.bounded and not layer.spec.growable:
                raise ValueError(
                    f"they need {need} slots, but the capacity is {layer.capacity}; "
                    "shorten the prompt, lower max_new_tokens, or give the cache more capacity"
                )
    except ValueError as error:
        drafts = f" (with {spare} slots for drafts)" if spare else ""
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones{drafts} do not fit the "
            f"cache: {error}"
        ) from None
    return state


def prefill(
    graph: Graph,
    params: Any,
    state: core.CacheState,
    tokens: np.ndarray,
    lengths: np.ndarray,
    largest: int,
) -> tuple[jax.Array, core.CacheState]:
    """Feeds padded prompts, int32 (B, T), in chunks to a ragged cache, which is donated.

    Returns:
        The hidden state of each row's last token, (B, E), and the cache.
    """
    last = None
    for start, size in prefill_chunks(tokens.shape[1], largest):
        chunk = np.zeros((len(tokens), size), np.int32)
        part = tokens[:, start : start + size]
        chunk[:, : part.shape[1]] = part
        counts = np.clip(lengths - start, 0, size).astype(np.int32)
        last, state = _prefill(graph, params, state, chunk, counts, last)
    assert last is not None
    return last, state


def seen_tokens(
    tokens: np.ndarray, lengths: np.ndarray, model: Any, sampling: Sampling
) -> jax.Array | None:
    """Which tokens occur in each padded prompt, bool (B, V), if `sampling` wants to know."""
    if not sampling.remembers:
        return None
    seen = np.zeros((len(tokens), model.config.vocab_size), bool)
    for row, ids, length in zip(seen, tokens, lengths, strict=True):
        row[ids[:length]] = True
    return jnp.asarray(seen)


def _news(runs: Iterator[_Loop]) -> Iterator[list[list[int]]]:
    given: np.ndarray | None = None
    for loop in runs:
        produced, out = np.array(loop.produced), np.array(loop.out)
        given = np.zeros_like(produced) if given is None else given
        yield [row[a:b].tolist() for row, a, b in zip(out, given, produced, strict=True)]
        given = produced


def _result(loop: _Loop, max_new_tokens: int, cache: core.CacheState | None) -> Generation:
    return Generation(np.array(loop.out[:, :max_new_tokens]), np.array(loop.produced), cache)


# --- the device's part -----------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(
    graph: Graph,
    params: Any,
    state: core.CacheState,
    chunk: jax.Array,
    counts: jax.Array,
    last: jax.Array | None,
) -> tuple[jax.Array, core.CacheState]:
    """Feeds a chunk; returns each row's latest hidden state so far, (B, E), and the cache."""
    hidden, state = graph.merge(params).hidden(chunk, state, lengths=counts)
    newest = hidden_at(hidden, counts)
    return newest if last is None else jnp.where((counts > 0)[:, None], newest, last), state


@partial(jax.jit, static_argnums=0)
def _last_hidden(graph: Graph, params: Any, history: jax.Array, lengths: jax.Array) -> jax.Array:
    return hidden_at(graph.merge(params).hidden(history)[0], lengths)


def hidden_at(hidden: jax.Array, counts: jax.Array) -> jax.Array:
    """The hidden state of each row's `counts`-th token, (B, E)."""
    index = jnp.maximum(counts - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, index, axis=1)[:, 0]


@partial(jax.jit, static_argnums=(0, 6, 7, 8), donate_argnums=2)
def _start(
    graph: Graph,
    params: Any,
    cache: Any,
    last: jax.Array,
    seen: jax.Array | None,
    key: jax.Array,
    size: int,
    sampling: Sampling,
    stops: tuple[int, ...],
) -> _Loop:
    """Chooses the first token, from the prompt's last hidden state."""
    batch = last.shape[0]
    loop = _Loop(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        produced=jnp.zeros(batch, jnp.int32),
        step=jnp.int32(0),
        out=jnp.zeros((batch, size), jnp.int32),
        seen=seen,
        key=key,
    )
    return _choose(graph.merge(params), loop, last, sampling, stops)


def _choose(
    model: Any, loop: _Loop, hidden: jax.Array, sampling: Sampling, stops: tuple[int, ...]
) -> _Loop:
    """Chooses each row's next token from hidden states (B, E) and records it."""
    logits = model.logits(hidden[:, None])[:, 0]
    key = jax.random.fold_in(loop.key, loop.step)
    token = jnp.where(loop.done, 0, sample(logits, key, sampling, loop.seen))
    ended = jnp.isin(token, jnp.array(stops, jnp.int32)) if stops else jnp.zeros_like(loop.done)
    seen = loop.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    out = jax.lax.dynamic_update_slice(loop.out, token[:, None], (jnp.int32(0), loop.step))
    return loop.replace(
        token=token,
        done=loop.done | ended,
        produced=loop.produced + (~loop.done).astype(jnp.int32),
        step=loop.step + 1,
        out=out,
        seen=seen,
    )


def _loop_until(limit: jax.Array, feed: Callable[[_Loop], _Loop], loop: _Loop) -> _Loop:
    return jax.lax.while_loop(lambda loop: (loop.step < limit) & ~jnp.all(loop.done), feed, loop)


@partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
def _decode(
    graph: Graph,
    params: Any,
    loop: _Loop,
    limit: jax.Array,
    sampling: Sampling,
    stops: tuple[int, ...],
) -> _Loop:
    """Decodes until `limit` tokens are chosen or all rows are done."""
    model = graph.merge(params)

    def feed(loop: _Loop) -> _Loop:
        live = (~loop.done).astype(jnp.int32)
        hidden, cache = model.hidden(loop.token[:, None], loop.cache, lengths=live)
        return _choose(model, loop.replace(cache=cache), hidden[:, 0], sampling, stops)

    return _loop_until(limit, feed, loop)


@partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
def _recompute(
    graph: Graph,
    params: Any,
    loop: _Loop,
    limit: jax.Array,
    sampling: Sampling,
    stops: tuple[int, ...],
) -> _Loop:
    """`_decode` without a cache: `loop.cache` is (tokens so far, lengths)."""
    model = graph.merge(params)

    def feed(loop: _Loop) -> _Loop:
        history, lengths = loop.cache
        rows = jnp.arange(history.shape[0])
        history = history.at[rows, jnp.where(loop.done, history.shape[1], lengths)].set(
            loop.token, mode="drop"
        )
        lengths = lengths + (~loop.done).astype(jnp.int32)
        hidden = hidden_at(model.hidden(history)[0], lengths)
        return _choose(model, loop.replace(cache=(history, lengths)), hidden, sampling, stops)

    return _loop_until(limit, feed, loop)
