"""Stateful caches: objects with the mutable API of `lucid.nn`, thin over the pure verbs.

Eagerly, buffers are updated in place and `update` returns exactly the stored tokens. Inside
`nnx.jit` the same objects are flax state, and mutations are visible to the caller afterwards. A
TRACED LENGTH CANNOT SHAPE AN ARRAY: there `update` and `get` return the whole capacity, zero past the
length. Use `cache.attend(query, layer_idx)`, or mask with `cache.valid(layer_idx)`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike

from lucid_jax.attention.attend import attend
from lucid_jax.cache import state as core
from lucid_jax.cache.checks import (
    as_array,
    as_integers,
    check_alive,
    check_count,
    check_indices,
    is_traced,
)
from lucid_jax.cache.contiguous import Dynamic, Static
from lucid_jax.cache.inputs import as_places
from lucid_jax.cache.layer import Layer, LayerSpec


class LayerState(nnx.Variable):
    """The flax variable that holds one layer's pure state."""


class Cache(nnx.Pytree, abc.ABC):
    """What every stateful cache can do; the type to annotate with."""

    @abc.abstractmethod
    def update(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Stores new tokens of a layer and returns all its keys and values."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    @abc.abstractmethod
    def batch_select_indices(self, indices: ArrayLike) -> None:
        """Keeps batch rows `indices`, in that order; rows may repeat or be dropped."""

    def reorder_cache(self, beam_idx: ArrayLike) -> None:
        """`batch_select_indices` by its beam-search name."""
        self.batch_select_indices(beam_idx)

    @abc.abstractmethod
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times: rows 0, 0, ..., 1, 1, ..."""

    @abc.abstractmethod
    def crop(self, max_length: int) -> None:
        """Keeps the latest `max_length` tokens of every layer."""

    @abc.abstractmethod
    def get_max_cache_shape(self) -> int | None:
        """The most tokens a row can hold, or None if there is no such bound."""


class KVCache(Cache):
    """A decoder cache: keys and values per layer. Use `DynamicKVCache` or `StaticKVCache`.

    Keys and values are (B, H, T, D); other leading axes, `(..., T, D)`, are accepted and returned.
    """

    def __init__(self) -> None:
        self._layers: Any = nnx.List([])
        # Per layer, the axes of (..., T, D) between batch and T; None if there is no batch axis.
        self._inner: tuple[tuple[int, ...] | None, ...] = ()

    @abc.abstractmethod
    def _spec(self) -> LayerSpec:
        """How a layer is built on its first update."""

    def _check_layer_idx(self, layer_idx: int) -> int:
        return check_count(layer_idx, "layer_idx")

    # --- the documented methods ----------------------------------------------------------------

    def update(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Stores tokens and returns everything the layer holds.

        Args:
            key: (B, H, T, D), or (..., T, D).
            value: the same shape and dtype.
            layer_idx: which layer, from 0.
            cache_position: None appends. 0-D places one token, 1-D `(T,)` each token, 2-D `(B, T)`
                each token of each row, counted from the oldest stored token. Skipped positions read
                as zeros; of duplicates the last wins.

        Returns:
            Keys and values of all stored tokens, (B, H, length, D). Traced: of the whole capacity.

        Raises:
            ValueError: for shapes that do not fit the layer or each other, a layer or position out
                of range, or tokens that do not fit. The cache is then as it was.
            TypeError: for positions that are not integers, or a dtype other than the layer's.
        """
        self.store(key, value, layer_idx, cache_position)
        # An empty append to a layer never written stores nothing, and returns that.
        return self.get(layer_idx) or (as_array(key), as_array(value))

    def store(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
    ) -> None:
        """`update` without reading back, for callers that `attend`: O(T), not O(length)."""
        index = self._check_layer_idx(layer_idx)
        key, value = as_array(key), as_array(value)
        if key.shape != value.shape:
            raise ValueError(
                f"key and value must have equal shapes, got {key.shape} and {value.shape}"
            )
        if key.ndim < 2:
            raise ValueError(
                f"key and value must have at least 2 axes (..., seq, head_dim), got {key.shape}"
            )
        inner = key.shape[1:-2] if key.ndim > 2 else None
        shape = _as_4d(key).shape
        places = as_places(cache_position, shape[0], shape[2])
        if inner is None and places is not None and places.ndim == 2:
            raise ValueError(
                "a 2-D cache_position needs keys with a batch axis, (batch, ..., seq, head_dim); "
                "these are (seq, head_dim)"
            )
        layer = self._layer(index)
        if layer is None:
            if shape[2] == 0 and self.get_max_cache_shape() is None:
                return
            fresh = core.init_cache(
                self._spec(),
                num_layers=1,
                batch_size=shape[0],
                num_kv_heads=shape[1],
                head_dim=shape[3],
                dtype=key.dtype,
            )
            layer = fresh.layers[0]
        elif inner != self._inner[index]:
            held = ", ".join(map(str, (*self._lead(layer, index), "seq", layer.packing.head_dim)))
            raise ValueError(
                f"layer {index} holds keys of shape ({held}), got {key.shape}; "
                "reset() the cache to change shapes"
            )
        else:
            _check_sound(layer, index)
        state = core.update(
            core.of_layers(layer),
            _as_4d(key),
            _as_4d(value),
            0,
            places,
            donate=True,
        )
        self._set(index, state.layers[0], inner)

    def get(self, layer_idx: int) -> tuple[jax.Array, jax.Array] | None:
        """Keys and values of the layer's stored tokens, or None if it was never written."""
        index = self._check_layer_idx(layer_idx)
        return None if self._layer(index) is None else self._read(index)

    def get_seq_length(self, layer_idx: int = 0) -> int | jax.Array:
        """Tokens stored in the layer: an int, 0 if never written; traced, an int32 []."""
        layer = self._layer(self._check_layer_idx(layer_idx))
        if layer is None:
            return 0
        check_alive(layer)
        return layer.length if is_traced(layer) else int(layer.length)

    def reset(self) -> None:
        """Forgets everything, batch size included."""
        self._layers = nnx.List([])
        self._inner = ()

    def batch_select_indices(self, indices: ArrayLike) -> None:
        """Keeps batch rows `indices` (1-D integers), in that order.

        Raises:
            IndexError: for an index out of range, negative ones included.
            ValueError: if they are not 1-D.
            TypeError: if they are not integers.
        """
        self._check_batched("batch_select_indices")
        written = list(self._written())
        rows = check_indices(indices, min((x.batch_size for _, x in written), default=2**31))
        for index, layer in written:
            self._replace(index, core.select(core.of_layers(layer), rows, donate=True))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times: rows 0, 0, ..., 1, 1, ...

        Raises:
            ValueError: if `repeats` is less than 1.
        """
        repeats = check_count(repeats, "repeats", 1)
        self._check_batched("batch_repeat_interleave")
        for index, layer in list(self._written()):
            self._replace(index, core.repeat_interleave(core.of_layers(layer), repeats))

    def crop(self, max_length: int) -> None:
        """Keeps the latest `max_length` tokens; `cache_position` then counts from the first kept.

        Raises:
            ValueError: if negative.
        """
        if not is_traced(max_length):
            max_length = check_count(max_length, "max_length")
        for index, layer in list(self._written()):
            self._replace(index, core.crop(core.of_layers(layer), max_length, donate=True))

    @property
    def key_cache(self) -> list[jax.Array | None]:
        """Stored keys per layer, None where nothing was written."""
        return [None if pair is None else pair[0] for pair in self._pairs()]

    @property
    def value_cache(self) -> list[jax.Array | None]:
        """Stored values per layer, None where nothing was written."""
        return [None if pair is None else pair[1] for pair in self._pairs()]

    # --- beyond the documented page: what jit-compiled code needs ---------------------------------

    def attend(self, query: ArrayLike, layer_idx: int, **options: Any) -> jax.Array:
        """Attention of the newest T queries (B, N, T, D) over the layer; see `lucid_jax.attend`."""
        layer = self._existing(layer_idx)[1]
        query = as_array(query)
        if query.ndim < 2:
            raise ValueError(f"query must be (..., seq, head_dim), got {query.shape}")
        out = attend(core.of_layers(layer), _as_4d(query), 0, **options)
        return out.reshape(*query.shape[:-1], out.shape[-1])

    def valid(self, layer_idx: int) -> jax.Array:
        """Which slots of the capacity hold a token: bool (C,)."""
        return self._existing(layer_idx)[1].valid()

    def positions(
        self, n: int, layer_idx: int = 0, cache_position: ArrayLike | None = None
    ) -> jax.Array:
        """Absolute positions of the layer's next `n` tokens, for RoPE; see `lucid_jax.positions`."""
        layer = self._layer(self._check_layer_idx(layer_idx))
        if layer is not None:
            check_alive(layer)
            return core.positions(core.of_layers(layer), n, 0, cache_position)
        if cache_position is not None:
            return jnp.atleast_1d(jnp.asarray(as_integers(cache_position, "cache_position")))
        return jnp.arange(n, dtype=jnp.int32)

    def rollback(self, n: int | jax.Array) -> None:
        """Drops the latest `n` tokens of every layer, as if they had never come.

        Raises:
            ValueError: if `n` is negative or more than a layer stores.
            TypeError: if it is not an integer.
        """
        written = list(self._written())
        drop = as_integers(n, "n")
        if not written and not is_traced(drop) and np.any(drop < 0):
            raise ValueError(f"rollback needs n of at least 0, got {n}")
        if written:
            layers = tuple(layer for _, layer in written)
            rolled = core.rollback(core.of_layers(*layers), drop, donate=True)
            for (index, _), layer in zip(written, rolled.layers, strict=True):
                self._layers[index].set_value(layer)

    # --- inside ----------------------------------------------------------------------------------

    def _layer(self, index: int) -> Layer | None:
        variable = self._layers[index] if index < len(self._layers) else None
        return None if variable is None else variable.get_value()

    def _existing(self, layer_idx: int) -> tuple[int, Layer]:
        index = self._check_layer_idx(layer_idx)
        layer = self._layer(index)
        if layer is None:
            raise ValueError(f"layer {index} holds nothing yet; update() it first")
        _check_sound(layer, index)
        return index, layer

    def _written(self) -> Iterator[tuple[int, Layer]]:
        for index in range(len(self._layers)):
            layer = self._layer(index)
            if layer is not None:
                yield index, layer

    def _pairs(self) -> list[tuple[jax.Array, jax.Array] | None]:
        return [self.get(index) for index in range(len(self._layers))]

    def _lead(self, layer: Layer, index: int) -> tuple[int, ...]:
        inner = self._inner[index]
        return () if inner is None else (layer.batch_size, *inner)

    def _set(self, index: int, layer: Layer, inner: tuple[int, ...] | None) -> None:
        while len(self._layers) <= index:
            self._layers.append(None)
            self._inner = (*self._inner, None)
        if self._layers[index] is None:
            self._layers[index] = nnx.data(LayerState(layer))
            self._inner = (*self._inner[:index], inner, *self._inner[index + 1 :])
        else:
            self._layers[index].set_value(layer)

    def _replace(self, index: int, state: core.CacheState) -> None:
        self._layers[index].set_value(state.layers[0])

    def _read(self, index: int) -> tuple[jax.Array, jax.Array]:
        layer = self._existing(index)[1]
        return stored_tokens(layer, self._lead(layer, index))

    def _check_batched(self, what: str) -> None:
        for index, _ in self._written():
            if self._inner[index] is None:
                raise ValueError(
                    f"{what} needs a batch axis, but layer {index} holds keys of shape "
                    "(seq, head_dim); store them as (batch, ..., seq, head_dim)"
                )


class DynamicKVCache(KVCache):
    """A cache that grows: layers appear on first use, capacity doubles as tokens come.

    Example:
        >>> import lucid_jax as lucid
        >>> import lucid_jax.nn as nn
        >>> cache = nn.DynamicKVCache()
        >>> for _ in range(2):
        ...     k_all, v_all = cache.update(lucid.randn(2, 8, 1, 64), lucid.randn(2, 8, 1, 64), 0)
        >>> k_all.shape, cache.get_seq_length(0)
        ((2, 8, 2, 64), 2)
    """

    def _spec(self) -> LayerSpec:
        return Dynamic()

    def get_max_cache_shape(self) -> None:
        """None: there is no bound."""
        return None

    def ensure_capacity(self, n: int) -> None:
        """Makes room for `n` more tokens in each written layer, before compiled steps.

        Inside `nnx.jit` a cache cannot grow: its capacity is a shape.
        """
        for index, layer in list(self._written()):
            self._replace(index, core.ensure_capacity(core.of_layers(layer), n))


class StaticKVCache(KVCache):
    """A cache of fixed capacity: `max_cache_len` tokens in each of `num_layers` layers.

    Buffers are allocated on a layer's first update. What does not fit raises.

    Example:
        >>> import lucid_jax as lucid
        >>> import lucid_jax.nn as nn
        >>> cache = nn.StaticKVCache(max_cache_len=4, num_layers=1)
        >>> k_all, v_all = cache.update(lucid.randn(1, 2, 3, 8), lucid.randn(1, 2, 3, 8), 0)
        >>> k_all.shape, cache.get_max_cache_shape()
        ((1, 2, 3, 8), 4)
    """

    def __init__(self, max_cache_len: int, num_layers: int) -> None:
        """Allocates nothing yet.

        Raises:
            ValueError: if either number is less than 1.
        """
        super().__init__()
        self.max_cache_len = check_count(max_cache_len, "max_cache_len", 1)
        self.num_layers = check_count(num_layers, "num_layers", 1)

    def store(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
    ) -> None:
        """See `KVCache.store`; an append of no tokens, too, is refused."""
        key = as_array(key)
        if key.ndim >= 2 and key.shape[-2] == 0:
            raise ValueError("a static cache cannot append an empty key: its seq axis is 0")
        super().store(key, value, layer_idx, cache_position)

    def _spec(self) -> LayerSpec:
        return Static(self.max_cache_len)

    def _check_layer_idx(self, layer_idx: int) -> int:
        index = super()._check_layer_idx(layer_idx)
        if index >= self.num_layers:
            raise ValueError(
                f"layer_idx must be in [0, {self.num_layers}), got {index}; this cache was made "
                f"with num_layers={self.num_layers}"
            )
        return index

    def _pairs(self) -> list[tuple[jax.Array, jax.Array] | None]:
        return [self.get(index) for index in range(self.num_layers)]

    def get_max_cache_shape(self) -> int:
        """`max_cache_len`."""
        return self.max_cache_len


class EncoderDecoderCache(Cache):
    """A self-attention cache and a cross-attention cache behind one interface.

    Batch operations and `crop` reach both; `rollback` reaches self-attention only, as drafted tokens
    never enter the encoder's keys.
    """

    def __init__(
        self,
        self_attention_cache: KVCache | None = None,
        cross_attention_cache: KVCache | None = None,
    ) -> None:
        """Either cache defaults to a fresh `DynamicKVCache`."""
        self.self_attention_cache = _or_dynamic(self_attention_cache, "self_attention_cache")
        self.cross_attention_cache = _or_dynamic(cross_attention_cache, "cross_attention_cache")
        if self.self_attention_cache is self.cross_attention_cache:
            raise ValueError("self- and cross-attention need two different caches, got one twice")

    @property
    def is_updated(self) -> dict[int, bool]:
        """Layers whose cross-attention keys are stored, so that they need not be computed again."""
        return {index: True for index, _ in self.cross_attention_cache._written()}

    def update(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
        is_cross_attention: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """`KVCache.update` of the self- or the cross-attention cache."""
        return self._part(is_cross_attention).update(key, value, layer_idx, cache_position)

    def get(
        self, layer_idx: int, is_cross_attention: bool = False
    ) -> tuple[jax.Array, jax.Array] | None:
        """`KVCache.get` of the self- or the cross-attention cache."""
        return self._part(is_cross_attention).get(layer_idx)

    def get_seq_length(
        self, layer_idx: int = 0, is_cross_attention: bool = False
    ) -> int | jax.Array:
        """`KVCache.get_seq_length` of the self- or the cross-attention cache."""
        return self._part(is_cross_attention).get_seq_length(layer_idx)

    def get_max_cache_shape(self) -> int | None:
        """That of the self-attention cache."""
        return self.self_attention_cache.get_max_cache_shape()

    def reset(self) -> None:
        """Forgets everything in both."""
        for cache in self._parts():
            cache.reset()

    def batch_select_indices(self, indices: ArrayLike) -> None:
        """See `KVCache.batch_select_indices`; refused by both or done in both."""
        for cache in self._parts():
            cache._check_batched("batch_select_indices")
        sizes = [layer.batch_size for cache in self._parts() for _, layer in cache._written()]
        rows = check_indices(indices, min(sizes, default=2**31))
        for cache in self._parts():
            cache.batch_select_indices(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `KVCache.batch_repeat_interleave`; refused by both or done in both."""
        for cache in self._parts():
            cache._check_batched("batch_repeat_interleave")
        for cache in self._parts():
            cache.batch_repeat_interleave(repeats)

    def crop(self, max_length: int) -> None:
        """Keeps the latest `max_length` tokens of both, the encoder's keys included."""
        for cache in self._parts():
            cache.crop(max_length)

    def rollback(self, n: int | jax.Array) -> None:
        """Drops the latest `n` self-attention tokens; the encoder's keys stay."""
        self.self_attention_cache.rollback(n)

    def _part(self, is_cross_attention: bool) -> KVCache:
        return self.cross_attention_cache if is_cross_attention else self.self_attention_cache

    def _parts(self) -> tuple[KVCache, KVCache]:
        return self.self_attention_cache, self.cross_attention_cache


def stored_tokens(layer: Layer, lead: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Exactly the stored keys and values of an aligned layer, `(*lead, length, D)`.

    Traced, the length is not known, so the whole capacity comes back, zero past the length. Eagerly
    the cut is made on the host: XLA would compile a slice, or a reshape, for every new length (73 ms
    each on CPU); here a NumPy view of the buffer costs nothing and only the stored tokens are copied.
    """

    def shaped(x: Any) -> Any:
        return x.reshape(*lead, *x.shape[2:])

    if is_traced(layer):
        keys, values, _ = core.get(core.of_layers(layer), 0)
        return shaped(keys), shaped(values)
    length = int(layer.length)

    def cut(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_addressable or len(leaf.devices()) > 1:
            return shaped(
                lax.bitcast_convert_type(leaf[:, :, :length], layer.dtype)
            )  # sharded: stay on the devices
        view = np.asarray(leaf)[:, :, :length].view(layer.dtype)
        # The buffer will be overwritten in place, so what the caller gets must be a copy. NumPy
        # makes it: device_put of a strided view takes 30 times as long.
        copy = np.array(view, order="C", copy=True)
        return jax.device_put(shaped(copy), *leaf.devices())

    return cut(layer.key), cut(layer.value)


def _check_sound(layer: Layer, index: int) -> None:
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


def _as_4d(x: jax.Array) -> jax.Array:
    """(..., T, D) to (B, H, T, D): no batch axis is a batch of 1, further axes become heads."""
    batch = x.shape[0] if x.ndim > 2 else 1
    return x if x.ndim == 4 else x.reshape(batch, math.prod(x.shape[1:-2]), *x.shape[-2:])


def _or_dynamic(cache: KVCache | None, name: str) -> KVCache:
    if cache is None:
        return DynamicKVCache()
    if not isinstance(cache, KVCache):
        raise TypeError(f"{name} must be a KVCache, got {type(cache).__name__}")
    return cache
