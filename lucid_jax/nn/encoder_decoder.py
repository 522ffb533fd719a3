"""`EncoderDecoderCache`: a self-attention and a cross-attention cache behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from lucid_jax.cache.argument_checks import check_count, check_indices, is_traced
from lucid_jax.cache.encoder_decoder import EncoderDecoderState
from lucid_jax.nn.base import Cache
from lucid_jax.nn.cache import KVCache
from lucid_jax.nn.kinds import DynamicKVCache


class EncoderDecoderCache(Cache):
    """A self-attention cache and a cross-attention cache behind one interface.

    Batch operations and `crop` reach both; `rollback` reaches self-attention only, as drafted tokens
    never enter the encoder's keys.

    Example:
        >>> import lucid_jax as lucid
        >>> import lucid_jax.nn as nn
        >>> cache = nn.EncoderDecoderCache()
        >>> tokens = lucid.randn(1, 2, 5, 8)
        >>> k_all, v_all = cache.update(tokens, tokens, 0, is_cross_attention=True)
        >>> cache.is_updated, cache.get_seq_length(0)
        ({0: True}, 0)
        >>> cache.is_updated[0] = False  # another source comes: `MultiHeadAttention` computes anew
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
        # is_updated, as static data of a pytree must be: hashable.
        self._updated: tuple[tuple[int, bool], ...] = tuple(
            (index, True) for index in _holding(self.cross_attention_cache)
        )

    @staticmethod
    def from_state(state: EncoderDecoderState) -> EncoderDecoderCache:
        """A stateful cache that goes on from a pure state, which stays valid.

        The encoder's keys count as stored, and a decoder of None becomes an empty `DynamicKVCache`.

        Raises:
            ValueError: if a part is ragged.
            TypeError: if it is no `EncoderDecoderState`.

        Example:
            >>> import lucid_jax as lj
            >>> import lucid_jax.nn as nn
            >>> sizes = {"num_layers": 1, "batch_size": 1, "num_kv_heads": 2, "head_dim": 4}
            >>> encoder = lj.init_cache(lj.Static(8), **sizes)
            >>> tokens = lj.randn(1, 2, 3, 4)
            >>> encoder = lj.update(encoder, tokens, tokens, 0)
            >>> state = lj.EncoderDecoderState(lj.init_cache(lj.Static(8), **sizes), encoder)
            >>> cache = nn.EncoderDecoderCache.from_state(state)
            >>> cache.is_updated, int(lj.seq_length(cache.to_state().encoder))
            ({0: True}, 3)
        """
        if not isinstance(state, EncoderDecoderState):
            raise TypeError(f"from_state takes an EncoderDecoderState, got {type(state).__name__}")
        decoder = None if state.decoder is None else KVCache.from_state(state.decoder)
        return EncoderDecoderCache(decoder, KVCache.from_state(state.encoder))

    def to_state(self) -> EncoderDecoderState:
        """The pure state of both; of a self-attention cache with no layer yet, a decoder of None.

        Raises:
            ValueError: if a layer was never written, so that its sizes are not known.
        """
        own = self.self_attention_cache
        return EncoderDecoderState(
            decoder=own.to_state() if own._count() else None,
            encoder=self.cross_attention_cache.to_state(),
        )

    @property
    def is_updated(self) -> dict[int, bool]:
        """For which layers the encoder's keys are stored, and need not be computed again.

        Set by a cross update, cleared by `reset`. Where it is set to False, `MultiHeadAttention`
        computes the keys anew, and they replace those stored.
        """
        return _Flags(self)

    @is_updated.setter
    def is_updated(self, flags: Mapping[int, bool]) -> None:
        self._updated = tuple(sorted(_checked_flags(flags).items()))

    def update(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
        is_cross_attention: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """`KVCache.update` of the self- or the cross-attention cache."""
        out = self._part(is_cross_attention).update(key, value, layer_idx, cache_position)
        if is_cross_attention:
            self.is_updated[layer_idx] = True
        return out

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
        self._updated = ()

    def batch_select_indices(self, indices: ArrayLike) -> None:
        """Keeps batch rows `indices` of both, in that order; refused by both or done in both."""
        for cache in self._parts():
            cache._check_batched("batch_select_indices")
        sizes = [layer.batch_size for cache in self._parts() for _, layer in cache._written()]
        rows = check_indices(indices, min(sizes, default=2**31))
        for cache in self._parts():
            cache.batch_select_indices(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row of both `repeats` times; refused by both or done in both."""
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


def _or_dynamic(cache: KVCache | None, name: str) -> KVCache:
    if cache is None:
        return DynamicKVCache()
    if not isinstance(cache, KVCache):
        raise TypeError(f"{name} must be a KVCache, got {type(cache).__name__}")
    return cache


def _holding(cache: KVCache) -> list[int]:
    """The layers that hold a token, or may: a traced length is not known."""
    return [
        index
        for index, variable in cache._written()
        if is_traced(variable.layer) or np.any(variable.layer.length_on_host())
    ]


def _checked_flags(flags: Mapping[int, bool]) -> dict[int, bool]:
    return {check_count(index, "layer_idx"): bool(flag) for index, flag in flags.items()}


class _Flags(dict[int, bool]):
    """`is_updated`: a dict whose changes reach the cache."""

    def __init__(self, cache: EncoderDecoderCache) -> None:
        super().__init__(cache._updated)
        self._cache = cache


def _written_through(name: str) -> Callable[..., Any]:
    change = getattr(dict, name)

    def method(self: _Flags, *args: Any, **kwargs: Any) -> Any:
        flags = dict(self._cache._updated)  # another view may have changed them since
        out = change(flags, *args, **kwargs)
        self._cache.is_updated = flags
        dict.clear(self)
        dict.update(self, flags)
        return self if out is flags else out

    return method


for _name in (
    *("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem"),
    *("setdefault", "update"),
):
    setattr(_Flags, _name, _written_through(_name))
