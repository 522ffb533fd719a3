"""`generate_uncached` and `stream_uncached`: decoding without a cache, to see what one saves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.decode.generation import Generation, news, result_of
from lucid_jax.decode.language_model import LanguageModel, ModelStructure, split
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prefill import hidden_at
from lucid_jax.decode.prompts import Prompts, pad_prompts, power_of_two, seen_tokens
from lucid_jax.decode.sampling import Sampling
from lucid_jax.decode.token_loop import (
    LoopSetup,
    TokenLoop,
    choose,
    loop_until,
    out_size,
    start_loop,
)


def generate_uncached(
    model: LanguageModel,
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
    options = DecodeOptions.of(
        max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_tokens=stop_tokens
    )
    loops = _recomputed(model, prompts, options, tokens_per_call=max_new_tokens)
    return result_of(deque(loops, maxlen=1).pop(), max_new_tokens, None)


def stream_uncached(
    model: LanguageModel,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_call: int = 8,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
) -> Iterator[list[list[int]]]:
    """`generate_uncached` for people: as `stream` yields them, a few tokens per device call."""
    options = DecodeOptions.of(
        max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_tokens=stop_tokens
    )
    yield from news(_recomputed(model, prompts, options, tokens_per_call))


def _recomputed(
    model: LanguageModel, prompts: Prompts, options: DecodeOptions, tokens_per_call: int
) -> Iterator[TokenLoop]:
    """Yields the loop's state as `generate`'s is, its `cache` the tokens so far and their number."""
    check_count(tokens_per_call, "tokens_per_call", 1)
    new = options.max_new_tokens
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    model.cache_spec(tokens.shape[1] + new - 1)  # refuses what the model cannot read
    structure, params = split(model)
    capacity = power_of_two(tokens.shape[1])
    text = np.pad(tokens, ((0, 0), (0, capacity - tokens.shape[1])))
    last = _last_hidden(structure, params, text, lengths)
    setup = LoopSetup(structure, options.sampling, options.stops)
    seen = seen_tokens(tokens, lengths, model, options.sampling)
    loop = start_loop(
        setup, params, (jnp.asarray(text), jnp.asarray(lengths)), last, seen,
        jax.random.key(options.seed), out_size(min(tokens_per_call, new)),
    )  # fmt: skip
    yield loop
    step = 1
    while step < new and not bool(np.all(loop.done)):
        text, filled = loop.cache
        room = text.shape[1] - int(np.max(filled))
        if room == 0:
            text = np.pad(np.asarray(text), ((0, 0), (0, text.shape[1])))
            loop = loop.replace(cache=(jnp.asarray(text), filled))
            room = text.shape[1] // 2
        limit = step + min(tokens_per_call, new - step, room)
        loop = _recompute(setup, params, loop, np.int32(limit))
        step = limit
        yield loop


@partial(jax.jit, static_argnums=0)
def _last_hidden(
    structure: ModelStructure, params: Any, history: jax.Array, lengths: jax.Array
) -> jax.Array:
    return hidden_at(structure.merge(params).hidden(history)[0], lengths)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _recompute(setup: LoopSetup, params: Any, loop: TokenLoop, limit: jax.Array) -> TokenLoop:
    """`decode_tokens` without a cache: `loop.cache` is (tokens so far, lengths)."""
    model = setup.structure.merge(params)

    def feed(loop: TokenLoop) -> TokenLoop:
        text, lengths = loop.cache
        rows = jnp.arange(text.shape[0])
        column = jnp.where(loop.done, text.shape[1], lengths)
        text = text.at[rows, column].set(loop.token, mode="drop")
        lengths = lengths + (~loop.done).astype(jnp.int32)
        hidden = hidden_at(model.hidden(text)[0], lengths)
        return choose(setup, model, loop.replace(cache=(text, lengths)), hidden)

    return loop_until(limit, feed, loop)
