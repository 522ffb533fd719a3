"""`stored_tokens`: exactly what a layer stores, without a compile for every new length."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from lucid_jax.cache import introspection
from lucid_jax.cache.argument_checks import is_traced
from lucid_jax.cache.growth import shortened
from lucid_jax.cache.layouts.base import Layout
from lucid_jax.cache.layouts.contiguous import Contiguous, grown_capacity
from lucid_jax.cache.reading import tokens
from lucid_jax.cache.state import of_layers
from lucid_jax.cache.tokens import TokenLayer

_ALIGNMENT = 64


def stored_tokens(
    layer: TokenLayer, lead: tuple[int, ...], length: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Exactly the stored keys and values of an aligned layer, oldest first, `(*lead, length, D)`.

    Traced, the length is not known, so the whole capacity comes back, zero past the length. Eagerly
    the cut is made on the host: XLA would compile a slice, or a reshape, for every new length (73 ms
    each on CPU); here a NumPy view of the buffer costs nothing and only the stored tokens are copied.
    What a codec or a ring stores is first brought into order and decoded, up to the next power of two.

    Args:
        layer: concrete if `length` is given.
        lead: the axes before T.
        length: how many tokens there are, where the host knows.
    """

    def shaped(x: Any) -> Any:
        return x.reshape(*lead, *x.shape[2:])

    if length is None and is_traced(layer):
        keys, values, _ = introspection.get(of_layers(layer), 0)
        return shaped(keys), shaped(values)
    length = int(layer.length_on_host()) if length is None else length
    where = layer.position.sharding
    if len(where.device_set) > 1:  # sharded: stay on the devices
        keys, values, _ = introspection.get(of_layers(layer), 0)
        return shaped(keys[:, :, :length]), shaped(values[:, :, :length])
    plain = isinstance(layer.key, jax.Array) and layer.in_order
    pair = (layer.key, layer.value) if plain else _decoded(layer, _enough(layer, length))

    def cut(leaf: jax.Array) -> jax.Array:
        # The buffer will be overwritten in place, so what the caller gets must be a copy. NumPy makes
        # it: device_put of a strided view takes 30 times as long. (One leaf is the tokens' bits.)
        view = np.asarray(leaf)[:, :, :length].view(layer.dtype)
        copy = _copied(view).reshape(*lead, *view.shape[2:])
        # device_put by another name, which takes half the time on the host.
        return jax.make_array_from_callback(copy.shape, where, lambda index: copy)

    return cut(pair[0]), cut(pair[1])


def _copied(view: np.ndarray) -> np.ndarray:
    """A contiguous copy that JAX on CPU takes over as it is.

    It does if memory begins at a multiple of 64 bytes, as NumPy's seldom does: else it copies again.

    Example:
        >>> tokens = np.arange(2.0 * 300 * 32).reshape(2, 300, 32)[:, 1:]
        >>> copy = _copied(tokens)
        >>> copy.ctypes.data % 64, bool((copy == tokens).all()), copy.flags.c_contiguous
        (0, True, True)
    """
    if view.nbytes < 1 << 15:  # copied faster than aligned
        return np.array(view, order="C", copy=True)
    memory = np.empty(view.nbytes + _ALIGNMENT, np.uint8)
    first = -memory.__array_interface__["data"][0] % _ALIGNMENT
    copy: np.ndarray = np.ndarray(view.shape, view.dtype, memory, first)
    copy[...] = view
    return copy


def _enough(layer: TokenLayer, length: int) -> Layout:
    """A layout of slots that hold a dense layer's tokens, a power of two; else its own."""
    size = grown_capacity(max(length, 1))
    if not layer.layout.dense or size >= layer.capacity:
        return layer.layout
    return Contiguous.of(size, layer.packing.codec.unit)


@partial(jax.jit, static_argnums=1)
def _decoded(layer: TokenLayer, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Keys and values in order, (B, H, C, D) for the capacity of a layout."""
    found = tokens(layer if layout == layer.layout else shortened(layer, layout))
    return found["key"], found["value"]
