"""The residual: the latest tokens in full precision, beside a codec that quantizes whole groups.

A ring of R slots of raw storage (B, H, R, D); the token of absolute position p lives in slot p % R.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from lucid_jax.cache import slots

Pair = tuple[jax.Array, jax.Array]


@struct.dataclass
class Recent:
    """The latest tokens in full precision."""

    key: jax.Array  # (B, H, R, D), raw
    value: jax.Array  # (B, H, R, Dv), raw

    @property
    def size(self) -> int:
        """R, the slots of the ring."""
        return self.key.shape[2]


def newest(slot: jax.Array, reach: jax.Array, size: int) -> jax.Array:
    """The largest position below `reach` ([] or [B]) that lives in each slot ([S] or [B, S])."""
    last = reach[..., None] - 1
    return last - (last - slot) % size


def window(recent: Recent, first: jax.Array, position: jax.Array, new: Pair) -> Pair:
    """Raw tokens of positions `first`, `first + 1`, ...: those of the ring, then T new ones.

    Args:
        recent: the ring, which holds positions [first, position).
        first: int32 [] or [B].
        position: int32 [] or [B]: where the new tokens begin.
        new: raw keys and values (B, H, T, ...).
    """
    size = recent.size
    slot = slots.span(first, size) % size
    index = slots.span(jnp.zeros_like(first), size + new[0].shape[2])
    held = (position - first)[..., None]
    source = jnp.where(index < held, index, size + index - held)

    def join(leaf: jax.Array, tokens: jax.Array) -> jax.Array:
        both = jnp.concatenate([slots.take(leaf, slot), tokens], axis=2)
        return slots.take(both, source)

    return join(recent.key, new[0]), join(recent.value, new[1])


def whole_groups(raw: Pair, first: jax.Array, start: jax.Array, group: int, tokens: int) -> Pair:
    """The part of a window that `tokens` new ones may complete: whole groups of raw tokens.

    A token that was cropped (before position `start`) may be anything; it is replaced by the last of
    its group, so that it has no say in a scale they share.
    """
    size = -(-tokens // group) * group
    index = slots.span(jnp.zeros_like(first), size)
    last = index // group * group + group - 1
    source = jnp.where(first[..., None] + index >= start[..., None], index, last)
    return slots.take(raw[0], source), slots.take(raw[1], source)


def put(
    recent: Recent, raw: Pair, first: jax.Array, position: jax.Array, count: jax.Array
) -> Recent:
    """Writes the tokens at positions [position, position + count) of a raw window from `first`."""
    size = recent.size
    tokens = min(size, raw[0].shape[2] - size)  # of a longer chunk only the latest stay
    begin = position + jnp.maximum(count - tokens, 0)
    at = slots.span(begin, tokens)
    slot = jnp.where(at < (position + count)[..., None], at % size, size)
    source = at - first[..., None]

    def write(leaf: jax.Array, window: jax.Array) -> jax.Array:
        return slots.write_at(leaf, slots.take(window, source), slot)

    return Recent(write(recent.key, raw[0]), write(recent.value, raw[1]))
