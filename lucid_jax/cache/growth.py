"""More slots, or fewer, for a layer: on the host, as another capacity is another shape."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.cache.allocation import check_dims, refusing
from lucid_jax.cache.mesh_programs import in_auto_axes
from lucid_jax.cache.tiles import in_tiles
from lucid_jax.cache.tokens import TokenLayer

if TYPE_CHECKING:
    from lucid_jax.cache.layouts.base import Layout


def with_room(layer: TokenLayer, need: int) -> TokenLayer | None:
    """A copy with at least `need` slots; None where the spec cannot grow."""
    layout = layer.spec.with_room(need)
    return None if layout is None else _with_layout(layer, layout)


def enlarged(layer: TokenLayer, capacity: int) -> TokenLayer:
    """This layer with `capacity` slots where its spec names their number, if it has fewer.

    Tokens are copied.
    """
    spec = layer.spec.sized(capacity)
    if spec == layer.spec or capacity <= layer.capacity:
        return layer
    return _with_layout(layer, spec.layout()).replace(spec=spec)


def in_whole_tiles(layer: TokenLayer) -> TokenLayer:
    """This layer with the slots that a new one has, if it is of a version that gave it fewer."""
    whole = layer.num_slots == _slots_for(layer, layer.layout)
    return layer if whole else _with_layout(layer, layer.layout)


def _slots_for(layer: TokenLayer, layout: Layout) -> int:
    """How many slots a row of the layer has with a layout."""
    return in_tiles(layout.slots, layer.packing.codec.unit)


def _with_layout(layer: TokenLayer, layout: Layout) -> TokenLayer:
    slots = _slots_for(layer, layout)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(layer)) // layer.num_slots * slots
    check_dims(layer.spec, slots)
    with refusing(f"room for {layout.capacity} tokens in each row of {layer.spec}", nbytes):
        wider: TokenLayer = _widened(layer, layout)
        return wider


@partial(jax.jit, static_argnums=1)
@in_auto_axes
def _widened(layer: TokenLayer, layout: Layout) -> TokenLayer:
    """The layer with more slots. All is copied: the result may be donated while `layer` lives on."""
    added = _slots_for(layer, layout) - layer.num_slots

    def pad(leaf: jax.Array) -> jax.Array:
        widen = [(0, 0, 0)] * leaf.ndim
        widen[layer.buffer.lead + 2] = (0, added // layer.stride(leaf), 0)
        return lax.pad(leaf, jnp.zeros((), leaf.dtype), widen)

    wider: TokenLayer = jax.tree.map(jnp.copy, layer)
    return wider.replace(leaves=jax.tree.map(pad, layer.leaves), layout=layout)


def shortened(layer: TokenLayer, layout: Layout) -> TokenLayer:
    """The first slots alone, as many as `layout` has, for reading where no more are stored."""

    def cut(leaf: jax.Array) -> jax.Array:
        slots = layout.slots // layer.stride(leaf)
        return lax.slice_in_dim(leaf, 0, slots, axis=layer.buffer.lead + 2)

    return layer.replace(leaves=jax.tree.map(cut, layer.stored), floor=None, layout=layout)
