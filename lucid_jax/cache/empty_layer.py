"""`empty_layer`: a layer state of tokens that holds none, from its spec and sizes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lucid_jax.cache.allocation import check_dims
from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.codecs import Form, check_dtype
from lucid_jax.cache.packing import Packing
from lucid_jax.cache.tiles import in_tiles
from lucid_jax.cache.tokens import POSITIONS, TokenLayer

if TYPE_CHECKING:
    from lucid_jax.cache.layouts.base import LayerSpec, Layout


def empty_layer(
    spec: LayerSpec,
    *,
    batch_size: int,
    num_kv_heads: int,
    dims: tuple[tuple[str, int], ...],
    dtype: DTypeLike,
    ragged: bool,
) -> TokenLayer:
    """An empty layer: `LayerSpec.init`."""
    layout = spec.layout()
    slots = in_tiles(layout.slots, spec.codec.unit)
    check_dims(spec, slots, dict(dims), batch_size=batch_size, num_kv_heads=num_kv_heads)
    check_dtype(dtype, spec.codec)
    if spec.track and spec.codec.unit > 1:
        raise ValueError(
            f"track=True, and so compact, needs a codec that stores each token by itself; "
            f"{spec.codec} quantizes groups of tokens. Use Int4() or Int8()"
        )
    packing = Packing(spec.codec, jnp.dtype(dtype).name, dims)
    layer: TokenLayer = _empty(spec, layout, packing, slots, batch_size, num_kv_heads, ragged)
    return layer


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _empty(
    spec: LayerSpec,
    layout: Layout,
    packing: Packing,
    slots: int,
    batch_size: int,
    heads: int,
    ragged: bool,
) -> TokenLayer:
    counter = (batch_size,) if ragged else ()

    def zeros(forms: dict[str, Form], slots: int) -> dict[str, Any]:
        # Each leaf gets its own zeros: a buffer shared by two leaves could not be donated.
        return {name: form.empty(batch_size, heads, slots) for name, form in forms.items()}

    codec = packing.codec
    leaves, last = zeros(packing.forms, slots), None
    if codec.tail:
        last = zeros(packing.raw_forms, 2 * codec.tail + codec.unit)
    if spec.track:
        leaves[POSITIONS] = jnp.full((batch_size, heads, slots), -1, jnp.int32)
    return TokenLayer(
        leaves=leaves,
        tail=last,
        start=jnp.zeros(counter, jnp.int32),
        position=jnp.zeros(counter, jnp.int32),
        reach=jnp.zeros(counter, jnp.int32),
        overflowed=jnp.zeros(counter, bool),
        floor=jnp.zeros(counter, jnp.int32) if spec.track else None,
        buffer=Rows(),
        spec=spec,
        layout=layout,
        packing=packing,
    )
