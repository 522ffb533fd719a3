"""`generate` and `stream`: prefill in bucketed chunks, then one compiled loop on a donated cache.

Rows of a batch may have prompts of different lengths: the cache is ragged, and a row that has met a
stop token sits out. The host only steps in to hand over tokens or to grow a dynamic cache.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lucid_jax.cache import introspection, verbs
from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.state import CacheState
from lucid_jax.decode.language_model import LanguageModel, split
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prefill import open_cache
from lucid_jax.decode.prefill_apart import prefill_prompts
from lucid_jax.decode.prompt_cache import PromptCache
from lucid_jax.decode.prompts import Prompts, pad_prompts, seen_tokens
from lucid_jax.decode.sampling import Sampling
from lucid_jax.decode.token_loop import (
    LoopSetup,
    TokenLoop,
    decode_tokens,
    out_size,
    start_loop,
)


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
    cache: CacheState | None

    def rows(self) -> list[list[int]]:
        """The new tokens of each row as a list."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


def generate(
    model: LanguageModel,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    cache: LayerSpec | Sequence[LayerSpec] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 512,
    prompt_cache: PromptCache | None = None,
    sharding: PartitionSpec | NamedSharding | None = None,
) -> Generation:
    """Continues each prompt until a stop token or `max_new_tokens`.

    The first token of a process waits for XLA: a program for prefill, by the prompt's length up to a
    power of two (from 16 to `prefill_chunk`), and one for the loop, by the capacity. All prompts and
    budgets of up to 512 tokens share some twenty programs. JAX keeps them for later processes where
    `jax_compilation_cache_dir` is set.

    Args:
        model: an nnx module such as `lucid_jax.models.Transformer`; see `LanguageModel`.
        prompts: token ids, one list per row, of any lengths; or an int array (B, T).
        max_new_tokens: the most tokens to add to a row.
        cache: spec of the cache, `Static(...)`, `Dynamic()` or `Sliding(...)`, or one per layer. By
            default what `model.cache_spec` asks for: rings where the model has windows, elsewhere
            static with the room needed, rounded up to a power of two and at least 256, so that
            prompts of other lengths find their programs compiled.
        sampling: how to choose tokens; greedy by default.
        seed: of the random choices. A row's draws depend on (seed, row, step) alone.
        stop_tokens: ids that end a row.
        prefill_chunk: the most prompt tokens per call; shorter chunks are padded to a power of two,
            so that few shapes are compiled.
        prompt_cache: takes the place of `cache` and `prefill_chunk`: prompts are prefilled into a
            cache of its spec, and what earlier ones left there is not computed again.
        sharding: divides rows and key/value heads over a mesh, as for `init_cache`; the model's
            parameters lie where they were put. Its `Explicit` axes look `Auto` to the model.

    Returns:
        The new tokens, how many each row has, and the cache.

    Raises:
        ValueError: for an empty prompt, an id outside the vocabulary, a prompt that with
            `max_new_tokens` does not fit the cache or the model, or a prompt cache of another model.
        TypeError: for ids, of prompts or stop tokens, that are not integers.
    """
    options = DecodeOptions.of(
        max_new_tokens=max_new_tokens,
        cache=cache,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
        sharding=sharding,
    )
    loops = _decoded(model, prompts, options, prompt_cache, tokens_per_call=max_new_tokens)
    loop = deque(loops, maxlen=1).pop()
    return result_of(loop, max_new_tokens, loop.cache)


def stream(
    model: LanguageModel,
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
    sharding: PartitionSpec | NamedSharding | None = None,
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
        sharding: as for `generate`.

    Yields:
        One list per row with the tokens new since the last time; the first has one token each.
    """
    check_count(tokens_per_call, "tokens_per_call", 1)
    options = DecodeOptions.of(
        max_new_tokens=max_new_tokens,
        cache=cache,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
        sharding=sharding,
    )
    yield from news(_decoded(model, prompts, options, prompt_cache, tokens_per_call))


def _decoded(
    model: LanguageModel,
    prompts: Prompts,
    options: DecodeOptions,
    prompt_cache: PromptCache | None,
    tokens_per_call: int,
) -> Iterator[TokenLoop]:
    """Yields the loop's state after prefill (one token chosen) and after each device call."""
    new = options.max_new_tokens
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    structure, params = split(model)
    if prompt_cache is None:
        state, slots = open_cache(model, options, lengths)
        last, state = prefill_prompts(
            structure, params, state, tokens, lengths, options.prefill_chunk, slots
        )
    else:
        if options.cache is not None:
            raise ValueError(
                f"a prompt cache brings its own spec, {prompt_cache.spec}; leave out cache="
            )
        start = prompt_cache.prefill_for(structure, params, prompts, new, options.sharding)
        last, state = start.hidden, start.cache
    setup = LoopSetup(structure, options.sampling, options.stops)
    seen = seen_tokens(tokens, lengths, model, options.sampling)
    size = out_size(min(tokens_per_call, new))
    loop = start_loop(setup, params, state, last, seen, jax.random.key(options.seed), size)
    yield from go_on(setup, params, loop, new, tokens_per_call)


def go_on(
    setup: LoopSetup, params: Any, loop: TokenLoop, new: int, tokens_per_call: int
) -> Iterator[TokenLoop]:
    """Yields a loop that has chosen one token, and then as it is after each device call."""
    yield loop
    step = 1
    while step < new and not bool(np.all(loop.done)):
        call = min(tokens_per_call, new - step)
        room = introspection.room(loop.cache)
        if room == 0:
            loop = loop.replace(cache=verbs.ensure_capacity(loop.cache, 1))
            room = introspection.room(loop.cache)
        limit = step + (call if room is None else min(call, room))
        loop = decode_tokens(setup, params, loop, np.int32(limit))
        introspection.check_overflow(loop.cache)
        step = limit
        yield loop


def news(loops: Iterator[TokenLoop]) -> Iterator[list[list[int]]]:
    """Of each row, the tokens that are new since the loop before."""
    given: np.ndarray | None = None
    for loop in loops:
        produced, out = np.array(loop.produced), np.array(loop.out)
        given = np.zeros_like(produced) if given is None else given
        columns = out.shape[1]
        yield [
            row[np.arange(a, b) % columns].tolist()
            for row, a, b in zip(out, given, produced, strict=True)
        ]
        given = produced


def result_of(loop: TokenLoop, max_new_tokens: int, cache: CacheState | None) -> Generation:
    """What a loop has chosen."""
    # Cut on the host: on the device each length would be a program.
    out = np.asarray(loop.out)[:, :max_new_tokens].copy()
    return Generation(out, np.array(loop.produced), cache)
