"""The tail: the latest tokens in full precision, beside a codec that quantizes whole groups (KIVI).

Leaves are raw storage (B, H, R, D); the token of absolute position p lives in slot p % R.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.slots import span

Raw = dict[str, jax.Array]  # leaves (B, H, R, D) by name, as `Packing.raw_forms` stores them


@dataclasses.dataclass(frozen=True)
class Around:
    """The arithmetic of the tail's slots, as a layout has it."""

    slots: int
    dense = False

    def slot(self, position: jax.Array, start: jax.Array) -> jax.Array:
        """The slot of a position."""
        return position % self.slots

    def latest(self, slot: jax.Array, start: jax.Array, reach: jax.Array) -> jax.Array:
        """Of the first `reach` positions, the last that was written to a slot."""
        return reach - 1 - (reach - 1 - slot) % self.slots


def size_of(tail: Raw) -> int:
    """R, the slots of a tail."""
    return next(iter(tail.values())).shape[2]


def window(rows: Rows, tail: Raw, first: jax.Array, position: jax.Array, new: Raw) -> Raw:
    """Raw tokens of positions `first`, `first + 1`, ...: those of the tail, then T new ones.

    Args:
        rows: where the slots lie.
        tail: holds positions [first, position).
        first: int32 [] or [B].
        position: int32 [] or [B]: where the new tokens begin.
        new: raw tokens (B, H, T, ...).
    """
    size = rows.slots(next(iter(tail.values())))
    slot = span(first, size) % size
    index = span(jnp.zeros_like(first), size + size_of(new))
    held = (position - first)[..., None]
    source = jnp.where(index < held, index, size + index - held)

    def join(leaf: jax.Array, tokens: jax.Array) -> jax.Array:
        both = jnp.concatenate([rows.take(leaf, slot), tokens], axis=2)
        return Rows().take(both, source)

    joined: Raw = jax.tree.map(join, tail, new)
    return joined


def whole_groups(raw: Raw, first: jax.Array, start: jax.Array, group: int, tokens: int) -> Raw:
    """The part of a window that `tokens` new ones may complete: whole groups of raw tokens.

    A token that was cropped (before position `start`) may be anything; it is replaced by the last of
    its group, so that it has no say in a scale they share.
    """
    size = -(-tokens // group) * group
    index = span(jnp.zeros_like(first), size)
    last = index // group * group + group - 1
    source = jnp.where(first[..., None] + index >= start[..., None], index, last)
    return {name: Rows().take(x, source) for name, x in raw.items()}


def put(rows: Rows, tail: Raw, new: Raw, position: jax.Array, count: jax.Array) -> Raw:
    """Writes the first `count` of T new raw tokens, whose positions are from `position` on."""
    size = rows.slots(next(iter(tail.values())))
    tokens = min(size, size_of(new))  # of a longer chunk only the latest stay
    number = span(jnp.maximum(count - tokens, 0), tokens)  # of the new tokens
    slot = jnp.where(number < count[..., None], (position[..., None] + number) % size, size)
    if tokens < size_of(new):
        new = {name: Rows().take(x, number) for name, x in new.items()}
    written: Raw = jax.tree.map(lambda leaf, x: rows.write_at(leaf, x, slot), tail, new)
    return written
