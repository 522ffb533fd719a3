"""The blocks of a T5's encoder and decoder, and the bias of relative positions that they share.

Shapes: hidden states (B, T, d_model).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lucid_jax.cache.encoder_decoder import EncoderDecoderState
from lucid_jax.models.t5_config import T5Config
from lucid_jax.nn.mha import MultiHeadAttention
from lucid_jax.nn.norm import Norm


class T5MLP(nnx.Module):
    """wo(relu(wi(x))), or, gated, wo(gelu(wi_0(x)) * wi_1(x)) (Shazeer, 2020)."""

    def __init__(self, config: T5Config, *, dtypes: dict[str, Any], rngs: nnx.Rngs):
        """Builds the projections."""

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs, **dtypes)

        self.gated = config.gated
        if config.gated:
            self.wi_0 = linear(config.d_model, config.d_ff)
            self.wi_1 = linear(config.d_model, config.d_ff)
        else:
            self.wi = linear(config.d_model, config.d_ff)
        self.wo = linear(config.d_ff, config.d_model)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(B, T, d_model) to the same shape."""
        if self.gated:  # by tanh, the approximation that version 1.1 was trained with
            wide = nnx.gelu(self.wi_0(hidden), approximate=True) * self.wi_1(hidden)
        else:
            wide = nnx.relu(self.wi(hidden))
        return self.wo(wide)


class T5Block(nnx.Module):
    """Pre-norm self-attention, in the decoder cross-attention, and MLP, each added to the stream."""

    def __init__(self, config: T5Config, *, decoder: bool, dtypes: dict[str, Any], rngs: nnx.Rngs):
        """Builds them."""

        def attention() -> MultiHeadAttention:
            # The scale of the scores is in the weights: T5 does not divide by sqrt(d_kv).
            return MultiHeadAttention(
                config.d_model,
                config.num_heads,
                head_dim=config.d_kv,
                scale=1.0,
                rngs=rngs,
                **dtypes,
            )

        self.self_attn_norm = _norm(config, dtypes)
        self.self_attn = attention()
        self.cross_attn_norm = _norm(config, dtypes) if decoder else None
        self.cross_attn = attention() if decoder else None
        self.mlp_norm = _norm(config, dtypes)
        self.mlp = T5MLP(config, dtypes=dtypes, rngs=rngs)

    def encode(self, hidden: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        """(B, S, d_model) to the same shape: every token sees every real token."""
        normed = self.self_attn_norm(hidden)
        hidden = hidden + self.self_attn(
            normed, encoder_hidden=normed, is_cross_attention=True, mask=mask, bias=bias
        )
        return hidden + self.mlp(self.mlp_norm(hidden))

    def decode(
        self, hidden: jax.Array, state: EncoderDecoderState, layer_idx: int, **options: Any
    ) -> tuple[jax.Array, EncoderDecoderState]:
        """(B * W, T, d_model) to the same shape, and the state; options as self-attention's."""
        assert self.cross_attn is not None and self.cross_attn_norm is not None
        normed = self.self_attn_norm(hidden)
        options["layer_idx"] = layer_idx
        if state.decoder is None:
            attended = self.self_attn(normed, **options)
        else:
            attended, cache = self.self_attn(normed, cache=state.decoder, **options)
            state = state.replace(decoder=cache)
        hidden = hidden + attended
        asking = state.by_source(self.cross_attn_norm(hidden))
        told, _ = self.cross_attn(
            asking, cache=state.encoder, layer_idx=layer_idx, is_cross_attention=True
        )
        hidden = hidden + told.reshape(hidden.shape)
        return hidden + self.mlp(self.mlp_norm(hidden)), state


class T5Stack(nnx.Module):
    """The blocks of the encoder or the decoder, and what they share: the relative positions' bias."""

    def __init__(self, config: T5Config, *, decoder: bool, dtypes: dict[str, Any], rngs: nnx.Rngs):
        """Builds them."""
        count = config.decoder_layers if decoder else config.num_layers
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets, config.num_heads, rngs=rngs, **dtypes
        )
        self.block = nnx.List(
            [T5Block(config, decoder=decoder, dtypes=dtypes, rngs=rngs) for _ in range(count)]
        )
        self.final_layer_norm = _norm(config, dtypes)

    def bias_of(self, buckets: np.ndarray) -> jax.Array:
        """The bias of buckets [...] known at trace time: (N, ...)."""
        return jnp.moveaxis(self.relative_attention_bias.embedding[...][buckets], -1, 0)


def _norm(config: T5Config, dtypes: dict[str, Any]) -> Norm:
    epsilon, dtype = config.layer_norm_epsilon, dtypes["param_dtype"]
    return Norm(config.d_model, kind="rms", epsilon=epsilon, param_dtype=dtype)
