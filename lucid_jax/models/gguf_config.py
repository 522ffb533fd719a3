"""The `ModelConfig` that a GGUF file's metadata and tensors describe, of the llama architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lucid_jax.attention.rope import LinearScaling, Llama3Scaling, Scaling, YarnScaling
from lucid_jax.models.config import ModelConfig, one_or_several
from lucid_jax.models.gguf_file import GgufFile
from lucid_jax.models.rope_config import ROPE_THETA

# Factors of each frequency: how llama.cpp keeps the stretching of Llama 3.1.
ROPE_FREQS = "rope_freqs.weight"
_ARCHITECTURE = "llama"
# Keys of a count or size, by field.
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_MAY_LACK = ("num_key_value_heads", "head_dim")
# Further keys that are read below.
_READ = (
    "vocab_size", "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length",
)  # fmt: skip
# Keys that change nothing, or nothing with these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (0.0, 1.0),
}
_INERT = ("rope.scaling.finetuned", "tensor_data_layout")
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LONGEST_CONTEXT = 1 << 24


def read_config(file: GgufFile) -> ModelConfig:
    """The config of the model in a file.

    Raises:
      ValueError: if it is no llama, or one with something that the model here does not know.
    """
    _check_kind(file.metadata)
    prefix = _ARCHITECTURE + "."
    given = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    _check_known(given)
    fields = {name: given[key] for name, key in _FIELDS.items() if key in given}
    missing = [
        prefix + key
        for name, key in _FIELDS.items()
        if name not in fields and name not in _MAY_LACK
    ]
    if missing:
        raise ValueError(f"the metadata lacks {', '.join(missing)}")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if len(layers) != fields["num_hidden_layers"]:  # before making a list of them
        raise ValueError(
            f"the metadata has llama.block_count={fields['num_hidden_layers']!r}, but there are "
            f"tensors of {len(layers)} layers"
        )
    fields["vocab_size"] = given.get(
        "vocab_size", len(tokens) if isinstance(tokens, list) else None
    )
    if fields["vocab_size"] is None:
        raise ValueError("the metadata lacks llama.vocab_size, and there is no vocabulary to count")
    plain = ModelConfig(
        **fields,
        rope_theta=given.get("rope.freq_base", ROPE_THETA),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=_ends(file.metadata),
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, plain.head_dim) != plain.head_dim:
            raise ValueError(
                f"the metadata has {prefix + key}={given[key]!r} for heads of {plain.head_dim}; they "
                "must be equal"
            )
    return dataclasses.replace(plain, rope_scaling=_scaling(given, plain, file))


def _check_kind(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise ValueError(
            f"it holds a model of the architecture {architecture!r}; of GGUF files only "
            f"{_ARCHITECTURE!r} is supported: read other families from a Hugging Face folder"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"it holds the {kind!r} of a model, not a model")
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise ValueError(f"it is one of {parts!r} parts; join them with llama.cpp's gguf-split")


def _check_known(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key in _ONLY:
            if value not in _ONLY[key]:
                raise ValueError(
                    f"the metadata has llama.{key}={value!r}; only {_ONLY[key][-1]!r} is supported"
                )
        elif key not in (*_FIELDS.values(), *_READ, *_INERT):
            raise ValueError(f"the metadata has llama.{key}={value!r}, which is not supported")


def _ends(metadata: Mapping[str, Any]) -> Any:
    """The ids that end a text or a turn."""
    ids: list[Any] = []
    for name in _ENDS:
        token = metadata.get(f"tokenizer.ggml.{name}")
        if token is not None and token not in ids:
            ids.append(token)
    return one_or_several(ids)


def _scaling(given: Mapping[str, Any], config: ModelConfig, file: GgufFile) -> Scaling | None:
    """How rotary positions were stretched."""
    kind = given.get("rope.scaling.type", "linear" if "rope.scale_linear" in given else "none")
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear"))
    original = given.get("rope.scaling.original_context_length", config.max_position_embeddings)
    if ROPE_FREQS in file.tensors:
        if kind != "none":
            raise ValueError(f"it has both {ROPE_FREQS} and llama.rope.scaling.type={kind!r}")
        return _llama3(file, config)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"the metadata has llama.rope.scaling.type={kind!r}; supported are none, linear and yarn"
        )
    if factor is None:
        raise ValueError(f"the metadata lacks llama.rope.scaling.factor for {kind!r}")
    return LinearScaling(factor) if kind == "linear" else YarnScaling(factor, original)


def _llama3(file: GgufFile, config: ModelConfig) -> Scaling | None:
    """The `Llama3Scaling` that a file's factors come from.

    They name the factor itself, for the longest wavelengths, but not the context trained for before,
    which is a power of two; all Llamas have 1 and 4 as the factors of low and high frequencies.
    """
    factors = file.read(ROPE_FREQS)
    dim = config.dim_per_head
    if factors.shape == (dim // 2,) and np.all(factors == 1):
        return None
    length = 16
    while factors.shape == (dim // 2,) and factors[-1] > 1 and length <= _LONGEST_CONTEXT:
        scaling = Llama3Scaling(float(factors[-1]), 1.0, 4.0, length)
        plain = config.rope_theta ** (-np.arange(0, dim, 2) / dim)
        if np.allclose(plain / scaling.frequencies(plain, config.rope_theta), factors, rtol=1e-5):
            return scaling
        length *= 2
    raise ValueError(
        f"{ROPE_FREQS} holds factors that are not those of Llama 3 ({factors.shape}, from "
        f"{factors.min()} to {factors.max()}); no others are supported"
    )
