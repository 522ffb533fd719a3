"""How far back keys are from queries, along a text or a tree, and T5's buckets of such distances."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache.slots import span
from lucid_jax.cache.tokens import TokenLayer


def relative_buckets(
    distance: np.ndarray, num_buckets: int, max_distance: int, *, both_sides: bool
) -> np.ndarray:
    """The bucket of each distance (the key's position less the query's): int32 of the same shape.

    Half of the buckets are for one distance each, the others for ranges that grow logarithmically up to
    `max_distance`, beyond which all share the last.

    Args:
      distance: integers.
      num_buckets: how many there are.
      max_distance: where the last begins.
      both_sides: whether keys after the query have half of the buckets, or, as in a decoder, none.

    Example:
      >>> relative_buckets(np.array([0, -1, -3, -9, 5]), 8, 16, both_sides=True).tolist()
      [0, 1, 2, 3, 6]
    """
    first = np.zeros(distance.shape, np.int32)
    if both_sides:
        num_buckets //= 2
        first = np.where(distance > 0, num_buckets, 0)
        back = np.abs(distance)
    else:
        back = np.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = np.log(np.maximum(back, exact) / exact) / math.log(max_distance / exact)
    # Some ranges begin where this is whole (16, 32 and 64 of 128): rounding must not decide there.
    ratio = ratio * (num_buckets - exact) + 1e-9
    further = np.minimum(exact + ratio.astype(np.int32), num_buckets - 1)
    return (first + np.where(back < exact, back, further)).astype(np.int32)


def distances_back(tokens: int, layer: TokenLayer | None, tree: jax.Array | None) -> jax.Array:
    """How many tokens back each key is from each of T new tokens: int32 (B|1, N|1, T, C).

    Keys are counted as masks count them: what a cache of bounded layout will hold, or what it holds and
    then the new tokens. In a tree, a key's distance is how many of the tokens seen come after it.
    """
    if layer is None:
        stored, keys = jnp.int32(0), tokens
    else:
        stored = layer.length
        keys = layer.capacity + (0 if layer.bounded else tokens)
    own = span(stored, tokens)  # index of the new tokens, [T] or [B, T]
    if tree is not None:
        batch = max(tree.shape[0], 1 if own.ndim == 1 else own.shape[0])
        seen = jnp.broadcast_to(tree, (batch, tree.shape[1], tokens, keys))
        rank = jnp.cumsum(seen.astype(jnp.int32), axis=-1)
        latest = jnp.take_along_axis(rank, jnp.atleast_2d(own)[:, None, :, None], axis=-1)
        return latest - rank
    index = span(jnp.zeros_like(stored), keys)
    key_position, position = index, own
    if layer is not None:
        position = span(layer.position, tokens)
        key_position = _with_new(layer, index)
    if key_position.ndim < 3:
        key_position = jnp.atleast_2d(key_position)[:, None]
    return jnp.atleast_2d(position)[:, None, :, None] - key_position[:, :, None]


def _with_new(layer: TokenLayer, index: jax.Array) -> jax.Array:
    """Absolute positions of what an index of `get` will be when new tokens have come, alike in shape.

    [C], [B, C], or (B, H, C) once heads may have evicted different tokens.
    """
    fill = index.shape[-1] - layer.capacity
    old = layer.stored_positions()
    old = jnp.pad(old, [(0, 0)] * (old.ndim - 1) + [(0, fill)])
    length, position = layer.length, layer.position
    coming = position[..., None] + index - length[..., None]
    is_old = index < length[..., None]
    if old.ndim == 3:
        is_old, coming = (x.reshape(-1, 1, index.shape[-1]) for x in (is_old, coming))
    return jnp.where(is_old, old, coming)
