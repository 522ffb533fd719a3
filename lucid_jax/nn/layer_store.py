"""`LayerStore`: the layers that a stateful cache holds, and what callers give, checked against them.

Callers' tokens are (..., T, D); a layer stores (B, H, T, D). No batch axis is a batch of 1, and further
axes are heads.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from lucid_jax.cache.argument_checks import as_array, check_alive, check_count, is_traced
from lucid_jax.cache.codecs import Codec, default_codec
from lucid_jax.cache.creation import init_cache
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.sharding import of_tokens
from lucid_jax.cache.state import CacheState, of_layers
from lucid_jax.cache.token_arguments import as_places
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.nn.layer_variable import LayerVariable, owned

MAX_LAYERS = 4096  # of a cache made without num_layers; a larger layer_idx is a mistake


class LayerStore(nnx.Pytree, abc.ABC):
    """Layers by their index, made on first use.

    Attributes:
        codec: how tokens are stored; None: as they are, narrow floats on CPU as bits.
        num_layers: how many layers there are; None: as many as are used, up to `MAX_LAYERS`.
    """

    def __init__(self, codec: Codec | None = None, num_layers: int | None = None) -> None:
        self.codec = codec
        self.num_layers = num_layers
        # The layers written so far, by their index as text: a mistyped index costs nothing.
        self._layers: Any = nnx.Dict()

    @abc.abstractmethod
    def _spec(self, codec: Codec) -> LayerSpec:
        """How a layer is built on its first update."""

    def _check_layer_idx(self, layer_idx: int) -> int:
        index = check_count(layer_idx, "layer_idx")
        if index >= (self.num_layers or MAX_LAYERS):
            if self.num_layers is None:
                raise ValueError(
                    f"layer_idx must be less than {MAX_LAYERS}, more than any model has, got {index}"
                )
            raise ValueError(
                f"layer_idx must be in [0, {self.num_layers}), got {index}; this cache was made "
                f"with num_layers={self.num_layers}"
            )
        return index

    def _variable(self, index: int) -> LayerVariable | None:
        return vars(self._layers).get(str(index))

    def _layer(self, index: int) -> TokenLayer | None:
        variable = self._variable(index)
        return None if variable is None else variable.layer

    def _existing(self, layer_idx: int) -> TokenLayer:
        index = self._check_layer_idx(layer_idx)
        layer = self._layer(index)
        if layer is None:
            raise ValueError(f"layer {index} holds nothing yet; update() it first")
        check_sound(layer, index)
        return layer

    def _written(self) -> Iterator[tuple[int, LayerVariable]]:
        for name in sorted(self._layers, key=int):
            yield int(name), self._layers[name]

    def _count(self) -> int:
        """How many layers there are, or were used so far."""
        if self.num_layers is not None:
            return self.num_layers
        return max((index + 1 for index, _ in self._written()), default=0)

    def _checked(
        self, key: Any, value: Any, layer_idx: int, cache_position: Any
    ) -> tuple[int, jax.Array, jax.Array, tuple[int, ...] | None, Any]:
        """Layer, tokens, axes between batch and T, and cache indices, checked by themselves."""
        index = self._check_layer_idx(layer_idx)
        key, value = as_array(key), as_array(value)
        shape = key.shape
        if shape != value.shape and not self._widths_differ(index, shape, value.shape):
            raise ValueError(f"key and value must have equal shapes, got {shape} and {value.shape}")
        if len(shape) < 2:
            raise ValueError(
                f"key and value must have at least 2 axes (..., seq, head_dim), got {shape}"
            )
        inner = shape[1:-2] if len(shape) > 2 else None
        indices = as_places(cache_position, 1 if inner is None else shape[0], shape[-2])
        if inner is None and indices is not None and indices.ndim == 2:
            raise ValueError(
                "a 2-D cache_position needs keys with a batch axis, (batch, ..., seq, head_dim); "
                "these are (seq, head_dim)"
            )
        return index, key, value, inner, indices

    def _widths_differ(self, index: int, key: tuple[int, ...], value: tuple[int, ...]) -> bool:
        """Whether shapes that differ in width alone are those of a layer made that way."""
        layer = self._layer(index)
        return (
            layer is not None
            and key[:-1] == value[:-1]
            and layer.packing.head_dim != layer.packing.value_head_dim
        )

    def _for_update(
        self, index: int, key: jax.Array, inner: tuple[int, ...] | None
    ) -> tuple[TokenLayer | None, bool]:
        """The layer that new tokens go to, made now if need be, and whether it may be donated.

        None: nothing would be stored, nor is anything yet.
        """
        variable = self._variable(index)
        if variable is None:
            return (self._fresh(key) if key.shape[-2] else None), True
        layer = variable.layer
        if variable.inner != inner:
            held = ", ".join(map(str, (*leading_axes(variable), "seq", layer.packing.head_dim)))
            raise ValueError(
                f"layer {index} holds keys of shape ({held}), got {key.shape}; "
                "reset() the cache to change shapes"
            )
        if variable.stored is None:
            check_sound(layer, index)
        return layer, variable.alone

    def _fresh(self, key: jax.Array) -> TokenLayer:
        """An empty layer for keys like these."""
        key = as_4d(key)
        batch, heads, _, dim = key.shape
        state = init_cache(
            self._spec(default_codec(key.dtype) if self.codec is None else self.codec),
            num_layers=1,
            batch_size=batch,
            num_kv_heads=heads,
            head_dim=dim,
            dtype=key.dtype,
            sharding=of_tokens(key),
        )
        return state.layers[0]

    def _emptied(self, index: int, key: jax.Array) -> TokenLayer:
        """A layer for keys like these that holds nothing; what the cache has stays as it is."""
        return self._fresh(key)

    def _stored(self, index: int) -> int | None:
        """Tokens in a layer, if the host can know: what it need not wait for a device to say."""
        variable = self._variable(index)
        if variable is None:
            return 0
        layer = variable.layer
        if variable.stored is None and layer.bounded and not is_traced(layer):
            # Far from the last position that int32 can count: nobody asks again while it is known.
            return int(layer.length_on_host()) if layer.positions_left() > 1 << 30 else None
        return variable.stored

    def _keep(
        self,
        index: int,
        layer: TokenLayer,
        inner: tuple[int, ...] | None,
        stored: int | None = None,
    ) -> None:
        variable = self._variable(index)
        if variable is None or variable.inner != inner:
            self._layers[str(index)] = owned(layer, inner)
        elif variable.layer is not layer:
            variable.keep(layer, stored)

    def _change(self, variable: LayerVariable, verb: Callable[..., CacheState]) -> None:
        """Applies a verb of a whole state to one layer."""
        state = verb(of_layers(variable.layer), donate=variable.alone)
        variable.keep(state.layers[0])

    def _check_batched(self, what: str) -> None:
        for index, variable in self._written():
            if variable.inner is None:
                raise ValueError(
                    f"{what} needs a batch axis, but layer {index} holds keys of shape "
                    "(seq, head_dim); store them as (batch, ..., seq, head_dim)"
                )


def leading_axes(variable: LayerVariable) -> tuple[int, ...]:
    """The axes of (..., T, D) before T."""
    inner = variable.inner
    return () if inner is None else (variable.layer.batch_size, *inner)


def check_sound(layer: TokenLayer, index: int) -> None:
    """Raises if the layer's buffers are gone, or a compiled step has lost tokens."""
    if is_traced(layer):
        return
    check_alive(layer)
    if np.asarray(layer.overflowed).any():
        raise OverflowError(
            f"layer {index}: a compiled step asked for more than the cache could do (length "
            f"{int(layer.length)}, capacity {layer.capacity}); nothing was overwritten, but those "
            "tokens are missing. reset() the cache, and give it more room (max_cache_len, "
            "ensure_capacity) or check the positions and rows passed in"
        )


def as_4d(x: jax.Array) -> jax.Array:
    """(..., T, D) to (B, H, T, D): no batch axis is a batch of 1, further axes become heads."""
    batch = x.shape[0] if x.ndim > 2 else 1
    return x if x.ndim == 4 else x.reshape(batch, math.prod(x.shape[1:-2]), *x.shape[-2:])
