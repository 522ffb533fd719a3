"""A compact Llama: RMSNorm, rotary grouped-query attention, SwiGLU, optionally tied embeddings.

Shapes: tokens int32 (B, T) in, logits float32 (B, T, V) out. Attribute names are those of Hugging
Face's Llama, so that a checkpoint's tensor names are module paths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lucid_jax.cache.layer import LayerSpec
from lucid_jax.cache.state import CacheState, init_cache
from lucid_jax.models.config import ModelConfig
from lucid_jax.nn.cache import Cache
from lucid_jax.nn.mha import MultiHeadAttention


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        """Builds the three projections."""

        def linear(inputs: int, outputs: int, std: float) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=nnx.initializers.normal(std),
                rngs=rngs,
            )

        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(hidden, wide, _INIT_STD)
        self.up_proj = linear(hidden, wide, _INIT_STD)
        self.down_proj = linear(wide, hidden, _residual_std(config))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(B, T, hidden_size) to the same shape."""
        return self.down_proj(nnx.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        rope_by_place: bool = False,
    ):
        """Builds the block's norms, attention and MLP."""
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = _norm(config, dtypes, rngs)
        self.self_attn = MultiHeadAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.dim_per_head,
            rope_theta=config.rope_theta,
            rope_by_place=rope_by_place,
            kernel_init=nnx.initializers.normal(_INIT_STD),
            out_init=nnx.initializers.normal(_residual_std(config)),
            rngs=rngs,
            **dtypes,
        )
        self.post_attention_layernorm = _norm(config, dtypes, rngs)
        self.mlp = MLP(config, rngs=rngs, **dtypes)

    def __call__(
        self, hidden: jax.Array, cache: Any, layer_idx: int, **options: Any
    ) -> tuple[jax.Array, Any]:
        """(B, T, hidden_size) to the same shape, and the cache; options as `MultiHeadAttention`'s."""
        attended = self.self_attn(
            self.input_layernorm(hidden), cache=cache, layer_idx=layer_idx, **options
        )
        if isinstance(cache, CacheState):
            attended, cache = attended
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache


class Transformer(nnx.Module):
    """A decoder-only language model.

    Example:
      >>> config = ModelConfig(vocab_size=64, hidden_size=32, num_attention_heads=2)
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 3), jnp.int32)).shape
      (1, 3, 64)
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rope_by_place: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds a model with random weights.

        Args:
          config: its sizes.
          dtype: dtype to compute in; by default `param_dtype`.
          param_dtype: dtype the parameters are kept in.
          rope_by_place: see `MultiHeadAttention`: with a sliding cache, text of any length keeps
            to the positions that were trained.
          rngs: source of the parameters.
        """
        dtype = param_dtype if dtype is None else dtype
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.rope_by_place = rope_by_place
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(_INIT_STD),
            rngs=rngs,
            **dtypes,
        )
        self.layers = nnx.List(
            [
                Block(config, rngs=rngs, rope_by_place=rope_by_place, **dtypes)
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.norm = _norm(config, dtypes, rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=nnx.initializers.normal(_INIT_STD),
                rngs=rngs,
                **dtypes,
            )
        )

    def __call__(
        self,
        tokens: jax.Array,
        cache: Cache | CacheState | None = None,
        *,
        lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> Any:
        """Predicts, after each token, the next one.

        Args:
          tokens: int32 (B, T): with a cache, the tokens that follow what it holds.
          cache: a stateful cache, changed in place, or a pure `CacheState`, returned changed.
          lengths: int32 [B], ragged pure caches: how many of each row's tokens are real.
          positions: int32 [T] or [B, T], the tokens' positions in their text, where those are not
            the order in which the cache stores them (the branches of a tree of tokens).
          mask: bool, broadcastable to (B, N, T, C): which stored tokens each token sees, of those
            before it in the cache; see `lucid_jax.extend`.

        Returns:
          Logits, float32 (B, T, V); with a pure `CacheState`, those and the new state.

        Raises:
          ValueError: if tokens are not 2-D.
          TypeError: if tokens are not integers.
        """
        hidden, cache = self.hidden(tokens, cache, lengths=lengths, positions=positions, mask=mask)
        logits = self.logits(hidden)
        return (logits, cache) if isinstance(cache, CacheState) else logits

    def hidden(
        self,
        tokens: jax.Array,
        cache: Any = None,
        *,
        lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The last hidden states, (B, T, hidden_size), and the cache; arguments as `__call__`'s."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be (batch, seq), got shape {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, got {tokens.dtype}")
        hidden = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            hidden, cache = layer(
                hidden, cache, index, lengths=lengths, positions=positions, mask=mask
            )
        return self.norm(hidden), cache

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many positions back a token sees (itself included); None for all."""
        return (None,) * self.config.num_hidden_layers

    def init_cache(
        self, spec: LayerSpec | Sequence[LayerSpec], batch_size: int, *, ragged: bool = False
    ) -> CacheState:
        """An empty cache of the right sizes for this model, in its compute dtype."""
        return init_cache(
            spec,
            num_layers=self.config.num_hidden_layers,
            batch_size=batch_size,
            num_kv_heads=self.config.kv_heads,
            head_dim=self.config.dim_per_head,
            dtype=self.dtype,
            ragged=ragged,
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (B, T, hidden_size) to logits, float32 (B, T, V)."""
        if self.lm_head is None:
            table = self.embed_tokens.embedding[...].astype(hidden.dtype)
            return jnp.einsum("btc,vc->btv", hidden, table, preferred_element_type=jnp.float32)
        kernel = self.lm_head.kernel[...].astype(hidden.dtype)
        return jnp.einsum("btc,cv->btv", hidden, kernel, preferred_element_type=jnp.float32)


_INIT_STD = 0.02


def _residual_std(config: ModelConfig) -> float:
    # GPT-2's: keeps the variance of the residual stream independent of depth.
    return _INIT_STD / math.sqrt(2 * config.num_hidden_layers)


def _norm(config: ModelConfig, dtypes: dict, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs, **dtypes)
