"""The kinds of decoder caches that make a layer when it is first written, named by their layout."""

from __future__ import annotations

from typing import Any

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.codecs import PLAIN, Codec, check_codec
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.layouts.contiguous import Dynamic, Static
from lucid_jax.cache.layouts.ring import Sliding
from lucid_jax.nn.cache import KVCache


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

    def __init__(self, codec: Codec | None = None) -> None:
        """Allocates nothing yet.

        Raises:
            TypeError: if `codec` is no codec.
        """
        super().__init__(_as_codec(codec))

    def _spec(self, codec: Codec) -> LayerSpec:
        return Dynamic(codec=codec)

    def get_max_cache_shape(self) -> None:
        """None: there is no bound."""
        return None


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

    def __init__(self, max_cache_len: int, num_layers: int, codec: Codec | None = None) -> None:
        """Allocates nothing yet.

        Raises:
            ValueError: if either number is less than 1.
            TypeError: if `codec` is no codec.
        """
        self.max_cache_len = check_count(max_cache_len, "max_cache_len", 1)
        super().__init__(_as_codec(codec), check_count(num_layers, "num_layers", 1))

    def _checked(self, key: Any, value: Any, layer_idx: int, cache_position: Any) -> Any:
        checked = super()._checked(key, value, layer_idx, cache_position)
        if checked[1].shape[-2] == 0:
            raise ValueError("a static cache cannot append an empty key: its seq axis is 0")
        return checked

    def _spec(self, codec: Codec) -> LayerSpec:
        return Static(self.max_cache_len, codec=codec)

    def get_max_cache_shape(self) -> int:
        """`max_cache_len`."""
        return self.max_cache_len


class SlidingKVCache(KVCache):
    """A cache of the first `sinks` tokens and the latest `window`: memory that never grows.

    `update` returns what is stored, oldest first, at most `sinks + window` tokens; older ones are
    gone. For attention to a chunk of several tokens use `extend`, as `MultiHeadAttention` does: after
    `update` or `store` a chunk's first queries may have lost what they should see. Layers appear on
    first use. See `lucid_jax.Sliding`.

    Example:
        >>> import lucid_jax as lucid
        >>> import lucid_jax.nn as nn
        >>> cache = nn.SlidingKVCache(window=4, sinks=1)
        >>> k_all, v_all = cache.update(lucid.randn(1, 2, 9, 8), lucid.randn(1, 2, 9, 8), 0)
        >>> k_all.shape, cache.get_max_cache_shape(), cache.positions(1).tolist()
        ((1, 2, 5, 8), 5, [9])
    """

    def __init__(
        self, window: int, sinks: int = 0, slack: int = 0, codec: Codec | None = None
    ) -> None:
        """Allocates nothing yet.

        Args:
            window: latest tokens kept.
            sinks: first tokens kept for ever.
            slack: how many tokens `rollback` can undo once the window is full.
            codec: how tokens are stored.

        Raises:
            ValueError: if a number is too small.
            TypeError: if `codec` is no codec.
        """
        spec = Sliding(window, sinks, slack, PLAIN if codec is None else codec)
        self.window, self.sinks, self.slack = spec.window, spec.sinks, spec.slack
        super().__init__(codec)

    def _spec(self, codec: Codec) -> LayerSpec:
        return Sliding(self.window, self.sinks, self.slack, codec=codec)

    def get_max_cache_shape(self) -> int:
        """The most tokens that are kept, `sinks + window`."""
        return self.sinks + self.window


def _as_codec(codec: Codec | None) -> Codec | None:
    return None if codec is None else check_codec(codec)
