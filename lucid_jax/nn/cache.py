"""Stateful caches: objects with the mutable API of `lucid.nn`, thin over the pure verbs.

Eagerly, buffers are updated in place and `update` returns exactly the stored tokens. Inside
`nnx.jit` the same objects are flax state, and mutations are visible to the caller afterwards. A
TRACED LENGTH CANNOT SHAPE AN ARRAY: there `update` and `get` return the whole capacity, zero past the
length. Use `cache.attend(query, layer_idx)`, or mask with `cache.valid(layer_idx)`.

Layers that appear on first use change a cache's structure: to start in `nnx.fori_loop`, `nnx.scan` or
`nnx.while_loop` with an empty cache, make it with `KVCache.from_spec`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from lucid_jax.cache import verbs
from lucid_jax.cache.argument_checks import (
    as_array,
    check_alive,
    check_count,
    check_indices,
    is_traced,
)
from lucid_jax.cache.codecs import PLAIN, Codec, default_codec
from lucid_jax.cache.creation import init_cache
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.stacking import unstack
from lucid_jax.cache.state import CacheState, Shared, of_layers
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.nn.attended_store import AttendedStore
from lucid_jax.nn.base import Cache
from lucid_jax.nn.layer_store import check_sound, leading_axes
from lucid_jax.nn.layer_variable import LayerVariable, owned
from lucid_jax.nn.stored_tokens import stored_tokens


class KVCache(AttendedStore, Cache):
    """A decoder cache: keys and values per layer. The type to annotate with; see its kinds below.

    Keys and values are (B, H, T, D); other leading axes, `(..., T, D)`, are accepted and returned.
    A TRACED LENGTH CANNOT SHAPE AN ARRAY: inside `jit`, `update` and `get` return the whole capacity,
    zero past the length; use `attend`, `extend` or `valid` there.

    A copy that shares buffers (`nnx.clone`, `jax.tree.map`, `to_state`) stays as it is when this cache
    is updated, and the other way round: the first eager update of either copies the layer once, and so
    does the first after a compiled step. Otherwise eager updates are in place.

    Attributes:
        codec: how tokens are stored, see `lucid_jax.codecs`; None: as they are, narrow floats on CPU as
            bits (`lucid_jax.codecs.Bits`), which carry no gradients.
        num_layers: how many layers there are; None: as many as are used, up to `MAX_LAYERS`.
    """

    @staticmethod
    def from_spec(
        spec: LayerSpec | Sequence[LayerSpec | Shared],
        *,
        batch_size: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        num_layers: int | None = None,
        value_head_dim: int | Sequence[int] | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> SpecKVCache:
        """A cache of any layout and codec, one for all layers or one each, allocated at once.

        Its structure never changes, so that a fresh one can be carried by `nnx.fori_loop`, `nnx.scan`
        and `nnx.while_loop`. The arguments are those of `lucid_jax.init_cache`, which says more; specs
        that name no codec get the one that other stateful caches have.

        Raises:
            ValueError: for a size below 1, or a list that disagrees with the number of layers.

        Example:
            >>> import jax.numpy as jnp, lucid_jax as lj
            >>> import lucid_jax.nn as nn
            >>> specs = [lj.Sliding(4, sinks=1), lj.Static(16, codec=lj.codecs.Int8()), lj.Shared(1)]
            >>> cache = nn.KVCache.from_spec(specs, batch_size=1, num_kv_heads=2, head_dim=8)
            >>> k_all, v_all = cache.update(jnp.ones((1, 2, 9, 8)), jnp.ones((1, 2, 9, 8)), 0)
            >>> k_all.shape, cache.get_seq_length(1)
            ((1, 2, 5, 8), 0)
        """
        return SpecKVCache._of(
            init_cache(
                _with_default_codec(spec, dtype),
                num_layers=num_layers,
                batch_size=batch_size,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                value_head_dim=value_head_dim,
                dtype=dtype,
            ),
            owned,
        )

    @staticmethod
    def from_state(state: CacheState) -> SpecKVCache:
        """A stateful cache that goes on from a pure state.

        The state stays valid: a layer is copied when it is first updated.

        Raises:
            ValueError: if the state is ragged, as `update` returns tokens of one length.
            TypeError: if it is no `CacheState`.

        Example:
            >>> import jax.numpy as jnp, lucid_jax as lj
            >>> import lucid_jax.nn as nn
            >>> state = lj.init_cache(
            ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=4
            ... )
            >>> cache = nn.KVCache.from_state(state)
            >>> k_all, v_all = cache.update(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3, 4)), 0)
            >>> int(lj.seq_length(cache.to_state())), int(lj.seq_length(state))
            (3, 0)
        """
        if not isinstance(state, CacheState):
            raise TypeError(f"from_state takes a CacheState, got {type(state).__name__}")
        if state.ragged:
            raise ValueError(
                "a stateful cache returns tokens of one length, but this state is ragged; go on with "
                "the pure verbs, or take rows of equal length out with extract"
            )
        return SpecKVCache._of(state, LayerVariable)

    def to_state(self) -> CacheState:
        """The pure state of all layers, for `lucid_jax`'s verbs; see `from_state`.

        It shares this cache's buffers and stays valid: a layer is copied when it is next updated.

        Raises:
            ValueError: if a layer was never written, so that its sizes are not known.
        """
        count = self._count()
        missing = [index for index in range(count) if self._layer(index) is None]
        if missing or not count:
            raise ValueError(
                f"layers {missing} of {count} were never written, so their sizes are not known; "
                "update() them first, or make the cache with KVCache.from_spec"
            )
        variables = [self._layers[str(index)] for index in range(count)]
        return of_layers(*(variable.get_value() for variable in variables))

    def update(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Stores tokens and returns everything the layer holds, oldest first.

        Args:
            key: (B, H, T, D), or (..., T, D).
            value: the same shape and dtype.
            layer_idx: which layer, from 0.
            cache_position: None appends. 0-D places one token, 1-D `(T,)` each token, 2-D `(B, T)`
                each token of each row, counted from the oldest stored token. Skipped positions read
                as zeros; of duplicates the last wins.

        Returns:
            Keys and values of all stored tokens, (B, H, length, D), decoded. TRACED, THE WHOLE
            CAPACITY, zero past the length, which is not known: mask with `valid`, or `attend`.

        Raises:
            ValueError: for shapes that do not fit the layer or each other, a layer or position out
                of range, or tokens that do not fit. The cache is then as it was.
            TypeError: for positions that are not integers, or a dtype other than the layer's.
        """
        self.store(key, value, layer_idx, cache_position)
        # An empty append to a layer never written stores nothing, and returns that.
        return self.get(layer_idx) or (as_array(key), as_array(value))

    def get(self, layer_idx: int) -> tuple[jax.Array, jax.Array] | None:
        """Keys and values of the layer's stored tokens, or None if it was never written.

        TRACED, the whole capacity, as `update` returns it.
        """
        index = self._check_layer_idx(layer_idx)
        variable = self._variable(index)
        if variable is None:
            return None
        if variable.stored is None:
            check_sound(variable.layer, index)
        return stored_tokens(variable.layer, leading_axes(variable), variable.stored)

    def get_seq_length(self, layer_idx: int = 0) -> int | jax.Array:
        """Tokens stored in the layer: an int, 0 if never written; traced, an int32 []."""
        layer = self._layer(self._check_layer_idx(layer_idx))
        if layer is None:
            return 0
        check_alive(layer)
        return layer.length if is_traced(layer) else int(layer.length_on_host())

    def reset(self) -> None:
        """Forgets everything, batch size included."""
        self._layers = nnx.Dict()

    def batch_select_indices(self, indices: ArrayLike) -> None:
        """Keeps batch rows `indices` (1-D integers), in that order.

        Raises:
            IndexError: for an index out of range, negative ones included.
            ValueError: if they are not 1-D.
            TypeError: if they are not integers.
        """
        self._check_batched("batch_select_indices")
        written = list(self._written())
        rows = check_indices(indices, min((x.layer.batch_size for _, x in written), default=2**31))
        for _, variable in written:
            self._change(variable, partial(verbs.select, indices=rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times: rows 0, 0, ..., 1, 1, ...

        Raises:
            ValueError: if `repeats` is less than 1.
        """
        repeats = check_count(repeats, "repeats", 1)
        self._check_batched("batch_repeat_interleave")
        for _, variable in list(self._written()):
            state = verbs.repeat_interleave(of_layers(variable.layer), repeats)
            variable.keep(state.layers[0])

    def crop(self, max_length: int) -> None:
        """Keeps the latest `max_length` tokens; `cache_position` then counts from the first kept.

        Raises:
            ValueError: if negative.
        """
        if not is_traced(max_length):
            max_length = check_count(max_length, "max_length")
        for _, variable in list(self._written()):
            self._change(variable, partial(verbs.crop, max_length=max_length))

    @property
    def key_cache(self) -> list[jax.Array | None]:
        """Stored keys per layer, None where nothing was written."""
        return [None if pair is None else pair[0] for pair in self._pairs()]

    @property
    def value_cache(self) -> list[jax.Array | None]:
        """Stored values per layer, None where nothing was written."""
        return [None if pair is None else pair[1] for pair in self._pairs()]

    def _pairs(self) -> list[tuple[jax.Array, jax.Array] | None]:
        return [self.get(index) for index in range(self._count())]


class SpecKVCache(KVCache):
    """A cache whose layers all exist from the start: see `KVCache.from_spec` and `from_state`.

    An empty layer gives arrays of no tokens where other caches give None, and `reset` keeps the
    buffers, and so the batch size.
    """

    _reads: tuple[int, ...]
    _owners: tuple[int, ...]
    _axes: str  # of the pure state; here tokens are (..., T, D) always

    @classmethod
    def _of(cls, state: CacheState, hold: Callable[..., LayerVariable]) -> SpecKVCache:
        cache = cls(num_layers=state.num_layers)
        state = unstack(state)  # here layers change one at a time
        cache._reads, cache._owners, cache._axes = state.reads, state.owners, state.axes
        for owner, layer in zip(state.owners, state.layers, strict=True):
            cache._layers[str(owner)] = hold(layer, inner=(layer.num_kv_heads,))
        return cache

    def to_state(self) -> CacheState:
        """The pure state of all layers, those that only read another included."""
        layers = tuple(self._layers[str(owner)].get_value() for owner in self._owners)
        return CacheState(layers, reads=self._reads, owners=self._owners, axes=self._axes)

    def reset(self) -> None:
        """Forgets all tokens."""
        for _, variable in self._written():
            self._change(variable, verbs.reset)

    def get_max_cache_shape(self) -> int | None:
        """The most tokens that a layer can hold, or None if one grows."""
        layers = [variable.layer for _, variable in self._written()]
        if any(layer.spec.growable for layer in layers):
            return None
        return max(layer.capacity for layer in layers)

    def owns(self, layer_idx: int) -> bool:
        """Whether the layer stores tokens, rather than read another's."""
        index = self._check_layer_idx(layer_idx)
        return self._owner(index) == index

    def _owner(self, index: int) -> int:
        return self._owners[self._reads[index]]

    def _variable(self, index: int) -> LayerVariable | None:
        return super()._variable(self._owner(index))

    def _checked(self, key: Any, value: Any, layer_idx: int, cache_position: Any) -> Any:
        if not self.owns(layer_idx):
            owner = self._owner(layer_idx)
            raise ValueError(
                f"layer {layer_idx} shares the tokens of layer {owner} and stores none itself; "
                f"update layer {owner} only"
            )
        return super()._checked(key, value, layer_idx, cache_position)

    def _emptied(self, index: int, key: jax.Array) -> TokenLayer:
        layer = self._layer(index)
        assert layer is not None
        return layer.reset()

    def _spec(self, codec: Codec) -> LayerSpec:
        raise AssertionError("every layer was made at the start")


def _with_default_codec(spec: Any, dtype: Any) -> Any:
    """A spec, or a list of them, where those that leave the codec open store in place."""
    if isinstance(spec, Sequence):
        return [_with_default_codec(one, dtype) for one in spec]
    if not dataclasses.is_dataclass(spec) or getattr(spec, "codec", None) != PLAIN:
        return spec
    return dataclasses.replace(spec, codec=default_codec(dtype))  # type: ignore[type-var]
