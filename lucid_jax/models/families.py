"""What sets the families of decoder-only models apart: one table, by a config.json's `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lucid_jax.nn.norm import NormKind

# GPT-2's modules, by the names of Llama's; its layers are `h`.
_GPT2_MODULES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "layers.*.input_layernorm": "h.*.ln_1",
    "layers.*.self_attn.q_proj": "h.*.attn.c_attn",
    "layers.*.self_attn.k_proj": "h.*.attn.c_attn",
    "layers.*.self_attn.v_proj": "h.*.attn.c_attn",
    "layers.*.self_attn.o_proj": "h.*.attn.c_proj",
    "layers.*.post_attention_layernorm": "h.*.ln_2",
    "layers.*.mlp.up_proj": "h.*.mlp.c_fc",
    "layers.*.mlp.down_proj": "h.*.mlp.c_proj",
}


@dataclass(frozen=True)
class Family:
    """Facts that hold for every checkpoint of a `model_type`.

    Attributes:
      architecture: what config.json names as `architectures`.
      norm: kind of the norms.
      sandwich: whether attention and MLP are normalized after as well as before (Gemma).
      biases: whether all of attention and MLP have biases, even without `attention_bias`.
      qkv_bias: whether queries, keys and values have.
      qk_norm: whether each head's queries and keys are normalized.
      gated: whether the MLP has a gate.
      learned_positions: whether positions are learned, added to the embeddings; otherwise rotary.
      scaled_embeddings: whether embeddings are multiplied by sqrt(hidden_size).
      full_every: of layers with and without a window, every so-manyth has none; None: each has one.
      windows_from: where config.json switches windows on by `use_sliding_window`, the first layer that
        has one unless it says `max_window_layers`; None: where it has no such switch.
      reads: further fields of `ModelConfig` that config.json may set.
      keys: a field's key in config.json, where that differs.
      defaults: fields that config.json may leave out (transformers' defaults for the family).
      only: keys of config.json of which only these values are supported.
      modules: names of modules in the file, where they differ; several may share one, fused.
      kernels_as_used: whether the layers' kernels are stored (in, out) rather than (out, in).
    """

    architecture: str
    norm: NormKind = "rms"
    sandwich: bool = False
    biases: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    gated: bool = True
    learned_positions: bool = False
    scaled_embeddings: bool = False
    full_every: int | None = None
    windows_from: int | None = None
    reads: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    kernels_as_used: bool = False


_WINDOWS = ("sliding_window", "layer_types")
_SOFTCAPS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_GEMMA: dict[str, Any] = {
    "norm": "rms+1",
    "sandwich": True,
    "scaled_embeddings": True,
    "reads": ("attention_bias", *_WINDOWS, *_SOFTCAPS),
    "keys": {"hidden_act": "hidden_activation"},
    "only": {"use_bidirectional_attention": (None, False)},
}
_GEMMA_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", reads=("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        reads=_WINDOWS,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        windows_from=28,
        reads=_WINDOWS,
        defaults={"sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        windows_from=28,
        reads=("attention_bias", *_WINDOWS),
        defaults={"head_dim": 128, "sliding_window": 4096},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        full_every=2,
        defaults={
            **_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        **_GEMMA,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        qk_norm=True,
        full_every=6,
        defaults={
            **_GEMMA_DEFAULTS, "vocab_size": 262_208, "max_position_embeddings": 131_072,
            "rope_theta": 1e6, "rope_local_theta": 1e4,
        },
        **_GEMMA,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        norm="layer",
        biases=True,
        gated=False,
        learned_positions=True,
        keys={
            "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function",
        },
        defaults={
            "hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
        only={
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (None, False),
            "add_cross_attention": (None, False),
        },
        modules=_GPT2_MODULES,
        kernels_as_used=True,
    ),
}  # fmt: skip
