"""A T5's tensors in a Hugging Face folder: which of the model's parameters each of them is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lucid_jax.models.t5 import T5
from lucid_jax.models.t5_config import T5Config
from lucid_jax.models.weights import Tensor, fill_weights, stored_names

_HEAD = "lm_head.weight"
# Some writers store the embeddings once for each that uses them.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def load_t5(folder: Path, config: T5Config, dtype: DTypeLike) -> T5:
    """Reads the weights of a T5.

    The head is tied to the embeddings unless the folder stores one: transformers 5 writes that all are
    tied, also of version 1.1, whose head is its own.

    Raises:
      CheckpointError: see `load_pretrained`.
    """
    if _HEAD in stored_names(folder):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    param_dtype = jnp.dtype(dtype)
    model = nnx.eval_shape(lambda: T5(config, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
    fill_weights(t5_tensors(model), folder, dtype, lambda name: None if name in _COPIES else name)
    return model


def t5_tensors(model: T5) -> dict[str, Tensor]:
    """The tensors a file of this model holds, by name."""
    tensors = {}
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            *modules, leaf = (str(part) for part in path)
            tensors[f"{_in_file(modules)}.weight"] = Tensor((variable,), leaf == "kernel")
    return tensors


def _in_file(modules: list[str]) -> str:
    """`decoder.block.1.cross_attn.q_proj` as `decoder.block.1.layer.1.EncDecAttention.q`."""
    stack, *rest = modules
    if rest == ["relative_attention_bias"]:
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
    if not rest or rest[0] != "block":
        return ".".join(modules)
    _, index, part, *inner = rest
    sublayer = {"self_attn": 0, "cross_attn": 1, "mlp": 2 if stack == "decoder" else 1}
    prefix = f"{stack}.block.{index}.layer.{sublayer[part.removesuffix('_norm')]}"
    if part.endswith("_norm"):
        return f"{prefix}.layer_norm"
    if part == "mlp":
        return f"{prefix}.DenseReluDense.{inner[0]}"
    name = "SelfAttention" if part == "self_attn" else "EncDecAttention"
    return f"{prefix}.{name}.{inner[0].removesuffix('_proj')}"
