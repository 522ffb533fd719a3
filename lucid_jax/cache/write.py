"""Writing at given places: tokens that replace others, or come at an index past the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.cache import derive
from lucid_jax.cache.allocation import INT32_MAX
from lucid_jax.cache.packing import Tokens, encoded
from lucid_jax.cache.slots import last_wins, span
from lucid_jax.cache.tokens import TokenLayer


def write(
    layer: TokenLayer, tokens: Tokens, index: jax.Array, counts: jax.Array | None
) -> TokenLayer:
    """Writes T tokens at stored index [T] or [B, T] (0 is the oldest stored token).

    Slots skipped between the old end and the new one become zeros. Where a layout drops tokens,
    indices past the end move it on.
    """
    index, real, ok = _asked(layer, index, counts)
    row = -1 if layer.ragged else None  # what shares one length: a row, or the whole batch
    most = jnp.int32(layer.capacity) if layer.bounded else INT32_MAX - layer.position
    inside = (index >= 0) & (index < derive.along(most, index))
    end = jnp.max(jnp.where(real & inside, index + 1, 0), axis=row)
    added = jnp.maximum(end - layer.length, 0)
    ok = ok & jnp.all(~real | inside, axis=row) & layer.countable(added)
    added = jnp.where(ok, added, 0)
    stop = layer.position + added

    position = layer.position_of(jnp.where(inside, index, 0))
    real = (
        real & derive.along(ok, index) & derive.lasting(layer.layout, position, layer.start, stop)
    )
    target = jnp.where(real, layer.slot_of(position), layer.num_slots)
    target = last_wins(target, dropped=layer.num_slots)

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return layer.buffer.write_at(_cleared(layer, leaf, stop), new, target)

    new = encoded(layer.packing.forms, layer.packing.admit(tokens))
    what = f"outside the capacity of {layer.capacity}"
    what = what if layer.bounded else "outside of what int32 can count"
    return layer.replace(leaves=layer.leaves | jax.tree.map(put, layer.stored, new)).advanced(
        added, ok, f"write {what}; nothing was written"
    )


def _asked(
    layer: TokenLayer, index: jax.Array, counts: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The indices, [B, T] if rows are independent; which are of real tokens; if counts make sense."""
    new = index.shape[-1]
    if layer.ragged and index.ndim == 1:
        index = jnp.broadcast_to(index, (layer.batch_size, new))
    real, ok = jnp.ones(index.shape, bool), jnp.ones_like(layer.overflowed)
    if counts is not None:
        real = span(jnp.zeros_like(counts), new) < counts[:, None]
        ok = (counts >= 0) & (counts <= new)
    return index, real, ok


def _cleared(layer: TokenLayer, leaf: jax.Array, stop: jax.Array) -> jax.Array:
    """A leaf with zeros for positions that are skipped, from the old end up to `stop`."""
    layout, buffer = layer.layout, layer.buffer
    if layout.dense:
        return buffer.clear(leaf, layer.slot_of(layer.position), layer.slot_of(stop))
    # Among the pinned, then in the ring, which may wrap.
    ring = layout.slots - layout.pinned
    if layout.pinned:
        leaf = buffer.clear(leaf, layer.position, jnp.minimum(stop, layout.pinned))
    low = jnp.maximum(layer.position, jnp.maximum(stop - ring, layout.pinned))
    begin = layer.slot_of(low)
    past = begin + jnp.maximum(stop - low, 0)
    leaf = buffer.clear(leaf, begin, jnp.minimum(past, layout.slots))
    return buffer.clear(leaf, jnp.full_like(begin, layout.pinned), past - ring)
