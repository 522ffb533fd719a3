"""Slot numbers and masks of them, int32 and bool: [...] for all rows alike, or [B, ...] per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def span(begin: jax.Array, size: int) -> jax.Array:
    """Slot numbers `begin ... begin + size - 1`: int32 [size], or [B, size] for begin [B]."""
    shape = (*begin.shape, size)
    return begin[..., None] + lax.broadcasted_iota(jnp.int32, shape, begin.ndim)


def whole(count: int, group: int) -> int:
    """`count` slots rounded up to whole groups.

    Example:
        >>> whole(9, 4)
        12
    """
    return -(-count // group) * group


def along_slots(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    """Shapes a mask [W] or [B, W] to broadcast against a (B, H, W, ...) leaf."""
    batch = mask.shape[0] if mask.ndim == 2 else 1
    return mask.reshape(batch, 1, mask.shape[-1], *(1,) * (leaf.ndim - 3))


def last_wins(slots: jax.Array, dropped: int) -> jax.Array:
    """Replaces all but the last occurrence of each slot by `dropped`, along the last axis.

    Scatter leaves the order of duplicate writes to the backend, so duplicates must not reach it.

    Example:
        >>> last_wins(jnp.array([3, 1, 3]), dropped=8)
        Array([8, 1, 3], dtype=int32)
    """
    if slots.shape[-1] == 1:
        return slots
    order = jnp.argsort(slots, axis=-1, stable=True)
    ordered = jnp.take_along_axis(slots, order, axis=-1)
    repeated = ordered[..., 1:] == ordered[..., :-1]
    repeated = jnp.concatenate([repeated, jnp.zeros_like(ordered[..., :1], bool)], axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(repeated, rank, axis=-1), dropped, slots)
