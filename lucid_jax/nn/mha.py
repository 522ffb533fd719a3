"""Multi-head attention as a flax module that takes a cache, stateful or pure.

Shapes: hidden (B, T, hidden_size) outside; (B, N or H, T, D) inside, N query and H key heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from lucid_jax.attention.dense import dot_product
from lucid_jax.attention.rope import Rope, rope
from lucid_jax.cache.stacked import LayerIndex
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.update import update
from lucid_jax.nn.attention_call import (
    AttentionCall,
    KeysValues,
    attend_with_object,
    attend_with_state,
    has_encoder_keys,
    next_positions,
    reads_another,
)
from lucid_jax.nn.base import Cache


class _CallOptions(TypedDict, total=False):
    """The keyword arguments of a call, but for the cache, on which its result depends."""

    layer_idx: LayerIndex
    encoder_hidden: jax.Array | None
    is_cross_attention: bool
    positions: jax.Array | None
    cache_position: ArrayLike | None
    lengths: ArrayLike | None
    mask: jax.Array | None
    bias: jax.Array | None


class MultiHeadAttention(nnx.Module):
    """Grouped-query attention with the projections `q_proj`, `k_proj`, `v_proj`, `o_proj`.

    Rotary positions come from the cache's count of tokens ever seen, so they stay right after
    crop, rollback and in ragged batches.

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key/value heads H; each serves N / H query heads.
      head_dim: width D of one head.
      rope_theta: base of the rotary positions or a `Rope`, or None for none.
      rope_by_place: whether rotary positions are places in the cache, not absolute positions.

    Example:
      >>> import lucid_jax.nn as nn
      >>> attention = nn.MultiHeadAttention(16, num_heads=4, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> cache = nn.StaticKVCache(max_cache_len=8, num_layers=1)
      >>> attention(jnp.ones((1, 3, 16)), cache=cache).shape, cache.get_seq_length()
      ((1, 3, 16), 3)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        use_bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: Callable[[int], Callable[[jax.Array], jax.Array]] | None = None,
        kv_hidden_size: int | None = None,
        rope_theta: float | Rope | None = None,
        rope_by_place: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
        out_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds the projections.

        Args:
          hidden_size: width of the input and the output.
          num_heads: query heads.
          num_kv_heads: key/value heads; by default as many as query heads.
          head_dim: width of a head; by default `hidden_size // num_heads`.
          use_bias: whether the projections add a bias.
          out_bias: whether the output projection does; by default `use_bias`.
          qk_norm: makes, from `head_dim`, the module that normalizes each head's queries before they
            are rotated, and another for keys; by default they stay as they are.
          kv_hidden_size: width of what keys and values are made from in cross-attention; by default
            `hidden_size`.
          rope_theta: base of the rotary positions, or a `Rope`; None leaves queries and keys unrotated.
          rope_by_place: store keys unrotated and rotate them at attention by their place in the
            cache (StreamingLLM): with `Sliding`, positions then never exceed what was trained.
          scale: multiplies the scores; by default 1 / sqrt(head_dim).
          softcap: bounds the scores, see `lucid_jax.attend`.
          window: if given, a query sees itself and the `window - 1` positions before it.
          dtype: dtype to compute in; by default the inputs' and parameters' common dtype.
          param_dtype: dtype the parameters are kept in.
          kernel_init: initializer of the projections; by default LeCun normal.
          out_init: initializer of the output projection; by default `kernel_init`.
          rngs: source of the parameters.

        Raises:
          ValueError: if heads or widths are not positive, or do not divide.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = _checked_head_dim(hidden_size, num_heads, num_kv_heads, head_dim)
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {head_dim}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        if rope_by_place and rope_theta is None:
            raise ValueError("rope_by_place=True needs rope_theta, the base of the positions")
        self.rope_theta = rope_theta
        self.rope_by_place = rope_by_place
        self.scale, self.softcap, self.window = scale, softcap, window
        kernel_init = nnx.initializers.lecun_normal() if kernel_init is None else kernel_init
        kv_hidden_size = hidden_size if kv_hidden_size is None else kv_hidden_size

        def linear(inputs: int, outputs: int, init: nnx.Initializer, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=bias, kernel_init=init,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.q_proj = linear(hidden_size, num_heads * head_dim, kernel_init, use_bias)
        self.k_proj = linear(kv_hidden_size, num_kv_heads * head_dim, kernel_init, use_bias)
        self.v_proj = linear(kv_hidden_size, num_kv_heads * head_dim, kernel_init, use_bias)
        out_bias = use_bias if out_bias is None else out_bias
        self.o_proj = linear(num_heads * head_dim, hidden_size, out_init or kernel_init, out_bias)
        self.q_norm = None if qk_norm is None else qk_norm(head_dim)
        self.k_norm = None if qk_norm is None else qk_norm(head_dim)

    @overload
    def __call__(
        self, hidden: jax.Array, *, cache: CacheState, **options: Unpack[_CallOptions]
    ) -> tuple[jax.Array, CacheState]: ...

    @overload
    def __call__(
        self, hidden: jax.Array, *, cache: Cache | None = None, **options: Unpack[_CallOptions]
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        hidden: jax.Array,
        *,
        cache: Cache | CacheState | None,
        **options: Unpack[_CallOptions],
    ) -> jax.Array | tuple[jax.Array, CacheState]: ...

    def __call__(
        self,
        hidden: jax.Array,
        *,
        cache: Cache | CacheState | None = None,
        layer_idx: LayerIndex = 0,
        encoder_hidden: jax.Array | None = None,
        is_cross_attention: bool = False,
        positions: jax.Array | None = None,
        cache_position: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, CacheState]:
        """Attends to the tokens so far (causal), or to an encoder's output (cross-attention).

        Args:
          hidden: (B, T, hidden_size): the new tokens.
          cache: where keys and values are kept. A stateful cache is changed in place; a pure
            `CacheState` comes back changed beside the output. None: the T tokens are all there is.
          layer_idx: which layer of the cache; of a stacked pure one it may be traced.
          encoder_hidden: (B, S, kv_hidden_size), for cross-attention: what keys and values are made
            from. With a cache they are made once: an `EncoderDecoderCache` that has this layer's
            ignores it (set its `is_updated[layer_idx]` to False for another source); for other
            caches, leave it out after the first call.
          is_cross_attention: attend to the encoder, every query to every key, no rotary positions.
          positions: int32 [T] or [B, T] absolute positions for RoPE, where the cache's (or
            0 ... T-1) are not wanted.
          cache_position: where in the cache the tokens go, see `lucid_jax.update`.
          lengths: int32 [B], ragged pure caches: how many of each row's tokens are real.
          mask: bool, broadcastable to (B, N, T, keys): with a cache, keys are its capacity; with a
            sliding one, see `lucid_jax.extend`.
          bias: float, broadcastable likewise, added to the scores.

        Returns:
          (B, T, hidden_size); with a pure `CacheState`, that and the new state.

        Raises:
          ValueError: if cross-attention has nothing to attend to, or an option does not apply. A
            stateful cache is then as it was.
        """
        call = AttentionCall(
            cache, layer_idx, encoder_hidden, is_cross_attention, positions, cache_position, lengths
        )
        call.check(hidden)
        query, new = self._projected(hidden, call)
        options: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "mask": mask,
            "bias": bias,
            "causal": not is_cross_attention,
            "window": None if is_cross_attention else self.window,
        }
        if cache is None:
            if new is None:
                raise ValueError(
                    "cross-attention needs encoder_hidden=, or a cache that holds its keys"
                )
            return self._merge_heads(dot_product(query, *new, **options))
        if not is_cross_attention:
            options |= {"lengths": lengths, "cache_position": cache_position}
            options["rope_theta"] = self.rope_theta if self.rope_by_place else None
        if isinstance(cache, CacheState):
            out, state = attend_with_state(cache, query, new, call, options)
            return self._merge_heads(out), state
        return self._merge_heads(attend_with_object(cache, query, new, call, options))

    def _projected(
        self, hidden: jax.Array, call: AttentionCall
    ) -> tuple[jax.Array, KeysValues | None]:
        """Queries, and the keys and values to store, if any; rotated as their positions say."""
        query = self._split_heads(self.q_proj(hidden))
        query = query if self.q_norm is None else self.q_norm(query)
        cache, layer_idx = call.cache, call.layer_idx
        if call.is_cross_attention:
            source = call.encoder_hidden
            if source is None or has_encoder_keys(cache, layer_idx):
                return query, None
            return query, self._keys_values(source, None)
        positions = call.positions
        by_place = self.rope_by_place and cache is not None
        if by_place and positions is not None:
            raise ValueError(
                "positions= are absolute, but rope_by_place=True counts places in the cache; "
                "drop one of them"
            )
        if self.rope_theta is not None and positions is None and not by_place:
            tokens = hidden.shape[1]
            positions = next_positions(cache, tokens, layer_idx, call.cache_position, call.lengths)
        query = self._rotate(query, positions)
        if reads_another(cache, layer_idx):
            return query, None
        return query, self._keys_values(hidden, positions)

    def store(
        self,
        encoder_hidden: jax.Array,
        cache: CacheState,
        layer_idx: int,
        *,
        lengths: ArrayLike | None = None,
    ) -> CacheState:
        """Stores the keys and values of an encoder's output: the part of cross-attention done once.

        Args:
          encoder_hidden: (B, S, kv_hidden_size).
          cache: a pure cache, returned with them in it.
          layer_idx: which layer of the cache.
          lengths: int32 [B], ragged caches: how many of each row's S are real.
        """
        new = self._keys_values(encoder_hidden, None)
        stored = update(cache.replace(axes="BHTD"), *new, layer_idx, lengths=lengths)
        return stored.replace(axes=cache.axes)

    def _keys_values(
        self, source: jax.Array, positions: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        key = self._split_heads(self.k_proj(source))
        key = key if self.k_norm is None else self.k_norm(key)
        return self._rotate(key, positions), self._split_heads(self.v_proj(source))

    def _rotate(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        if self.rope_theta is None or positions is None:
            return x
        return rope(x, positions, self.rope_theta)

    def _split_heads(self, projected: jax.Array) -> jax.Array:
        batch, length, width = projected.shape
        heads = width // self.head_dim
        return projected.reshape(batch, length, heads, self.head_dim).swapaxes(1, 2)

    def _merge_heads(self, out: jax.Array) -> jax.Array:
        batch, heads, length, width = out.shape
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, heads * width))


def _checked_head_dim(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None
) -> int:
    """`head_dim` or its default, where the sizes go together."""
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})"
        )
    if head_dim is None:
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size ({hidden_size}) is not a multiple of num_heads ({num_heads}); "
                "give head_dim"
            )
        head_dim = hidden_size // num_heads
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    return head_dim
