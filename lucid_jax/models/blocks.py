"""The blocks of a decoder-only transformer: attention and MLP, (B, T, hidden_size) in and out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lucid_jax.cache.state import CacheState
from lucid_jax.models.config import ACTIVATIONS, ModelConfig
from lucid_jax.nn.mha import MultiHeadAttention
from lucid_jax.nn.norm import Norm

INIT_STD = 0.02

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020), or without a gate down(act(up(x)))."""

    def __init__(self, config: ModelConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        """Builds the projections."""

        def linear(inputs: int, outputs: int, std: float) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=config.mlp_bias or config.family.biases,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=nnx.initializers.normal(std),
                rngs=rngs,
            )

        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(hidden, wide, INIT_STD) if config.family.gated else None
        self.up_proj = linear(hidden, wide, INIT_STD)
        self.down_proj = linear(wide, hidden, _residual_std(config))
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(B, T, hidden_size) to the same shape."""
        activation = _ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(activation(self.up_proj(hidden)))
        return self.down_proj(activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nnx.Module):
    """Attention and MLP, each normalized before (Gemma: and after) and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        rope_by_place: bool = False,
    ):
        """Builds the block's norms, attention and MLP."""
        family = config.family
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        norm = functools.partial(model_norm, config, param_dtype)
        scalar = config.query_pre_attn_scalar
        self.input_layernorm = norm()
        self.self_attn = MultiHeadAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.dim_per_head,
            use_bias=config.attention_bias or family.biases or family.qkv_bias,
            out_bias=config.attention_bias or family.biases,
            qk_norm=norm if family.qk_norm else None,
            rope_theta=config.rope(layer_idx),
            rope_by_place=rope_by_place,
            scale=None if scalar is None else scalar**-0.5,
            softcap=config.attn_logit_softcapping,
            window=config.windows[layer_idx],
            kernel_init=nnx.initializers.normal(INIT_STD),
            out_init=nnx.initializers.normal(_residual_std(config)),
            rngs=rngs,
            **dtypes,
        )
        # Llama calls the norm before the MLP what Gemma calls the one after attention.
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm() if family.sandwich else None
        self.post_feedforward_layernorm = norm() if family.sandwich else None
        self.mlp = MLP(config, rngs=rngs, **dtypes)

    def __call__(
        self, hidden: jax.Array, cache: Any, layer_idx: Any, **options: Any
    ) -> tuple[jax.Array, Any]:
        """(B, T, hidden_size) to the same shape, and the cache; options as `MultiHeadAttention`'s."""
        attended = self.self_attn(
            self.input_layernorm(hidden), cache=cache, layer_idx=layer_idx, **options
        )
        if isinstance(cache, CacheState):
            attended, cache = attended
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            hidden = hidden + attended
            return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache
        hidden = hidden + self.post_attention_layernorm(attended)
        changed = self.mlp(self.pre_feedforward_layernorm(hidden))
        return hidden + self.post_feedforward_layernorm(changed), cache


def _residual_std(config: ModelConfig) -> float:
    # GPT-2's: keeps the variance of the residual stream independent of depth.
    return INIT_STD / math.sqrt(2 * config.num_hidden_layers)


def model_norm(config: ModelConfig, param_dtype: Any, width: int | None = None) -> Norm:
    """A norm of the model's kind, over `width` numbers or its hidden ones."""
    return Norm(
        config.hidden_size if width is None else width,
        kind=config.family.norm,
        epsilon=config.rms_norm_eps,
        param_dtype=param_dtype,
    )
