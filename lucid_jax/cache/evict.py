"""Eviction: chosen tokens go, the others move together and remember where they came from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.cache.reading import slot_map
from lucid_jax.cache.slots import span
from lucid_jax.cache.stacked import ask
from lucid_jax.cache.tokens import POSITIONS, TokenLayer


def can_evict(layer: TokenLayer) -> bool:
    """Whether single tokens can leave: they lie side by side, each by itself, whatever came before."""
    return layer.in_order and not layer.packing.codec.tail


def tracked(layer: TokenLayer) -> TokenLayer:
    """This layer, or stack of layers, with the position of every token beside it."""
    if layer.tracked:
        return layer
    shape = (layer.batch_size, layer.num_kv_heads, layer.num_slots)

    def positions(one: TokenLayer) -> jax.Array:
        position = slot_map(one).positions(jnp.int32(0), shape[2]).reshape(-1, 1, shape[2])
        own: jax.Array = jnp.broadcast_to(position, shape) + jnp.int32(0)
        return own

    position = ask(layer, positions)
    position = position if layer.stacked else position[0]
    return layer.replace(
        leaves=layer.leaves | {POSITIONS: position}, floor=jnp.zeros_like(layer.position)
    )


def compact(layer: TokenLayer, keep: jax.Array, count: jax.Array, ok: jax.Array) -> TokenLayer:
    """Keeps the tokens at indices `keep`, int32 (B, H, C) ascending, the first `count` of them.

    `count` is int32 [] or [B], at most the length; where not `ok`, that is everything. Positions are
    remembered.
    """
    layer = tracked(layer)
    assert layer.floor is not None
    most = jnp.max(count)
    return layer.replace(
        leaves=jax.tree.map(lambda leaf: layer.buffer.pull(leaf, keep, most), layer.leaves),
        floor=jnp.where(ok, layer.position, layer.floor),
        start=layer.position - count,
    )


def keep_path(
    layer: TokenLayer, n: jax.Array, path: jax.Array, count: jax.Array, ok: jax.Array
) -> TokenLayer:
    """Of the latest `n` tokens keeps those at offsets `path`, the first `count` of them.

    n, count and ok are [B], path is [B, P]; where not `ok`, count is 0 and nothing changes.
    """
    first = layer.slot_of(layer.position - n)[:, None]
    kept = span(jnp.zeros_like(count), path.shape[1])
    # Read before anything is written: a later node's slot may be an earlier one's target.
    target = jnp.where(kept < count[:, None], first + kept, layer.num_slots)

    def move(leaf: jax.Array) -> jax.Array:
        return layer.buffer.write_at(leaf, layer.buffer.take(leaf, first + path), target)

    leaves = jax.tree.map(move, layer.leaves)
    if layer.tracked:  # the kept ones stand where a text without the others would have them
        position = ((layer.position - n)[:, None] + kept)[:, None]
        shape = (layer.batch_size, layer.num_kv_heads, path.shape[1])
        new = jnp.broadcast_to(position, shape)
        leaves[POSITIONS] = layer.buffer.write_at(layer.leaves[POSITIONS], new, target)
    return layer.replace(leaves=leaves).advanced(
        count - n, ok, "keep_path of what is no path; nothing was dropped"
    )
