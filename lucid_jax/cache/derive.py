"""All that follows from a layout, written once: lengths, indices, what is live, seen, and still there.

`start` is the position of the oldest token not cropped, `position` how many tokens came, `reach` the
most there ever were: int32 [] or [B]. Positions, indices and slots are int32 [...] or [B, ...].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from lucid_jax.cache.layouts.base import Layout, Runs


def along(counter: jax.Array, like: jax.Array) -> jax.Array:
    """A counter [] or [B], to combine with [...] or [B, ...]."""
    return counter.reshape(*counter.shape, *(1,) * (like.ndim - counter.ndim))


def length(layout: Layout, start: jax.Array, position: jax.Array) -> jax.Array:
    """Tokens stored, int32 [] or [B]; NumPy's where counters are."""
    if layout.dense:
        return position - start
    return _before(layout.kept(start, position))[-1]


def _before(runs: Runs) -> list[jax.Array]:
    """How many tokens come before each run, and after the last."""
    counts = [jnp.zeros_like(runs[-1][1])]
    for first, stop in runs:
        counts.append(counts[-1] + jnp.maximum(stop - first, 0))
    return counts


def index_of(
    layout: Layout, absolute: jax.Array, start: jax.Array, position: jax.Array
) -> jax.Array:
    """Index in `get` of positions; those to come stand right after what is stored."""
    if layout.dense:
        return absolute - along(start, absolute)
    runs = layout.kept(start, position)
    before = _before(runs)
    index = absolute - along(position - before[-1], absolute)
    for (first, stop), count in list(zip(runs, before, strict=False))[-2::-1]:
        index = jnp.where(
            absolute < along(stop, absolute), absolute - along(first - count, absolute), index
        )
    return index


def position_of(
    layout: Layout, index: jax.Array, start: jax.Array, position: jax.Array
) -> jax.Array:
    """Position of indices in `get`; those past the end are positions to come."""
    if layout.dense:
        return index + along(start, index)
    runs = layout.kept(start, position)
    before = _before(runs)
    absolute = index + along(position - before[-1], index)
    for i in range(len(runs) - 2, -1, -1):
        first, count = runs[i][0], before[i]
        absolute = jnp.where(
            index < along(before[i + 1], index), index + along(first - count, index), absolute
        )
    return absolute


def counted(layout: Layout, slot: jax.Array, start: jax.Array, reach: jax.Array) -> jax.Array:
    """The position last written to slots; -1, or one that is not live, if none came."""
    absolute = layout.latest(slot, along(start, slot), along(reach, slot))
    if layout.dense:
        return absolute
    return jnp.where(layout.slot(absolute, along(start, slot)) == slot, absolute, -1)


def lasting(layout: Layout, absolute: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Of positions below `stop`, whether each is still in its slot once all of them are in."""
    if layout.dense:
        return jnp.ones(absolute.shape, bool)
    start = along(start, absolute)
    return layout.latest(layout.slot(absolute, start), start, along(stop, absolute)) == absolute


def retained(
    layout: Layout,
    start: jax.Array,
    position: jax.Array,
    packed: jax.Array,
    reach: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Whether all slots are still there that were seen when `position` tokens had come.

    Args:
        layout: of a layer that overwrites.
        start: see above.
        position: an earlier one.
        packed: how many of its tokens were in slots.
        reach: how many positions ever came to slots.
        window: of what was seen, only the latest so many positions matter.
    """
    ok = jnp.ones(position.shape, bool)
    for first, stop in layout.kept(start, position):
        # Of a run the oldest goes first, except what stays for ever.
        oldest = jnp.maximum(first, layout.pinned)
        if window is not None:
            oldest = jnp.maximum(oldest, position - window)
        there = layout.latest(layout.slot(oldest, start), start, reach) == oldest
        ok = ok & (there | (oldest >= jnp.minimum(stop, packed)))
    return ok


def used(layout: Layout, start: jax.Array, position: jax.Array, reach: jax.Array) -> jax.Array:
    """Bounds below which all live slots are, [] or [B]: they follow lengths, not the capacity."""
    if layout.dense:
        return layout.slot(position - 1, start) + 1
    return jnp.minimum(reach, layout.slots)


def oldest_kept(
    layout: Layout, start: jax.Array, position: jax.Array, most: jax.Array
) -> jax.Array:
    """The `start` that leaves the latest `most` tokens (int32 [], at least 0)."""
    count = length(layout, start, position)
    kept = jnp.minimum(count, most)
    first = position_of(layout, count - kept, start, position)
    return jnp.where(kept < count, jnp.where(kept > 0, first, position), start)


def runs_seen(layout: Layout, query: jax.Array, run: int | None = None) -> Runs:
    """Runs of positions that queries [...] or [B, ...] see, or one of them, of what is stored.

    What is live and causal is not asked.
    """
    if layout.slack is None:
        return ((jnp.zeros_like(query), jnp.full_like(query, jnp.iinfo(query.dtype).max)),)
    runs = layout.kept(jnp.int32(0), query + 1)
    return runs if run is None else (runs[run],)
