"""From prompts to a filled cache: `open_cache` makes room, `prefill` feeds them in bucketed chunks.

Sizes that are left to us are powers of two, so that prompts of other lengths find their programs
compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache import verbs
from lucid_jax.cache.allocation import INT32_MAX, check_memory
from lucid_jax.cache.growth import enlarged
from lucid_jax.cache.mesh_programs import in_auto_axes
from lucid_jax.cache.sharding import divided_as_rows
from lucid_jax.cache.state import CacheState
from lucid_jax.decode.language_model import LanguageModel, ModelStructure
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prompts import power_of_two
from lucid_jax.decode.storage import empty_cache

MIN_CHUNK = 16
FULL = 256  # tokens from which on a call takes longer the more there are; of fewer it reads weights
MIN_CAPACITY = 256  # of a cache whose size is left to us


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


def better_apart(lengths: np.ndarray, largest: int) -> bool:
    """Whether prompts one by one take clearly less time than together, padded to the longest.

    Example:
        >>> better_apart(np.array([64, 400, 1000]), 512), better_apart(np.array([3, 9, 30]), 512)
        (True, False)
    """
    padded = [sum(size for _, size in prefill_chunks(int(n), largest)) for n in lengths]
    return 5 * sum(max(n, FULL) for n in padded) < 4 * len(padded) * max(padded)


def room_for(need: int) -> int:
    """The default capacity for `need` tokens: few sizes, as each is a program.

    Example:
        >>> room_for(3), room_for(256), room_for(257)
        (256, 256, 512)
    """
    return max(MIN_CAPACITY, min(power_of_two(need), INT32_MAX))


def sized(spec: Any, capacity: int) -> Any:
    """A spec, or one per layer, its static layers with a capacity of `capacity`."""
    if not isinstance(spec, Sequence):
        return spec.sized(capacity)
    return [sized(one, capacity) for one in spec]


def open_cache(
    model: LanguageModel,
    options: DecodeOptions,
    lengths: np.ndarray,
    *,
    spare: int = 0,
    slack: int = 0,
) -> tuple[CacheState, int]:
    """An empty ragged cache for prompts of these lengths and the new tokens.

    Args:
        model: whose cache it is.
        options: `max_new_tokens`, of which the last is never fed back and needs no slot, `cache`,
            `prefill_chunk` and `sharding`.
        lengths: int [B], tokens of each row's prompt.
        spare: slots needed beyond those, as by the branches of a tree of drafts.
        slack: tokens that may be taken back, which the model's own windows then leave room for.

    Returns:
        The cache, and the capacity that its static layers must have for the new tokens. By default
        they only have room for the prompts yet, and `prefill` enlarges them when those are in: so
        the programs of prefill, which take longest to compile, don't depend on `max_new_tokens`.
        Where prompts are fed one by one it has that room at once: to make it a second time takes longer
        on CPU than to copy what it holds.

    Raises:
        ValueError: if they do not fit the cache.
    """
    new, cache = options.max_new_tokens, options.cache
    batch_size, longest = len(lengths), int(lengths.max())
    need = longest + new - 1 + spare
    if need > INT32_MAX:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones are more than positions of "
            "int32 can count; lower max_new_tokens"
        )
    # Asked for in any case: it refuses what the model cannot read.
    own = model.cache_spec(need - spare, slack=slack)
    if cache is None:
        apart = better_apart(lengths, options.prefill_chunk)
        room = room_for(need if apart else longest)
        state = empty_cache(model, sized(own, room), batch_size, sharding=options.sharding)
        _check_room(state, room_for(need))
        return state, room_for(need)
    state = empty_cache(model, cache, batch_size, sharding=options.sharding)
    try:
        # What can grow grows as far as the prompt now, and later as tokens come.
        state = verbs.grow(state, longest)
        for layer in state.layers:
            if need > layer.capacity and layer.bounded and not layer.spec.growable:
                raise ValueError(
                    f"they need {need} slots, but the capacity is {layer.capacity}; "
                    "shorten the prompt, lower max_new_tokens, or give the cache more capacity"
                )
    except ValueError as error:
        drafts = f" (with {spare} slots for drafts)" if spare else ""
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones{drafts} do not fit the cache: {error}"
        ) from None
    return state, 1


def prefill(
    structure: ModelStructure,
    params: Any,
    state: CacheState,
    tokens: np.ndarray,
    lengths: np.ndarray,
    largest: int,
    slots: int = 1,
) -> tuple[jax.Array, CacheState]:
    """Feeds padded prompts, int32 (B, T), in chunks to a ragged cache, which is donated.

    Then gives static layers of a capacity below `slots` so much.

    Returns:
        The hidden state of each row's last token, (B, E), and the cache.
    """
    last = None
    for start, size in prefill_chunks(tokens.shape[1], largest):
        chunk = np.zeros((len(tokens), size), np.int32)
        part = tokens[:, start : start + size]
        chunk[:, : part.shape[1]] = part
        counts = np.clip(lengths - start, 0, size).astype(np.int32)
        # Where every row goes on, what came before is not asked for: a program less.
        before = None if counts.all() else last
        chunk, counts = divided_as_rows(state, (chunk, counts))
        last, state = _prefill(structure, params, state, chunk, counts, before)
    assert last is not None
    return last, with_slots(state, slots)


def _check_room(state: CacheState, slots: int) -> None:
    """Raises, before prefill, if static layers of `slots` slots could not be on the device."""
    static = [layer for layer in state.layers if layer.spec.sized(slots) is not layer.spec]
    nbytes = sum(
        leaf.nbytes * slots // layer.capacity for layer in static for leaf in jax.tree.leaves(layer)
    )
    devices = jax.tree.leaves(state)[0].devices()
    check_memory(nbytes // len(devices), next(iter(devices)), f"a cache of {slots} slots")


def with_slots(state: CacheState, slots: int) -> CacheState:
    """A cache whose static layers have at least `slots` slots; the one given is used up."""
    layers = []
    for layer in state.layers:
        large = enlarged(layer, slots)
        if large is not layer:
            for leaf in jax.tree.leaves(layer):  # now, and not when the last layer is done
                leaf.delete()
        layers.append(large)
    return state.with_layers(layers)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@partial(in_auto_axes, by_heads=False)
def _prefill(
    structure: ModelStructure,
    params: Any,
    state: CacheState,
    chunk: jax.Array,
    counts: jax.Array,
    last: jax.Array | None,
) -> tuple[jax.Array, CacheState]:
    """Feeds a chunk; returns each row's latest hidden state so far, (B, E), and the cache."""
    hidden, state = structure.merge(params).hidden(chunk, state, lengths=counts)
    newest = hidden_at(hidden, counts)
    return newest if last is None else jnp.where((counts > 0)[:, None], newest, last), state


def hidden_at(hidden: jax.Array, counts: jax.Array) -> jax.Array:
    """The hidden state of each row's `counts`-th token, (B, E)."""
    index = jnp.maximum(counts - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, index, axis=1)[:, 0]
