"""Weights of a GGUF file, read one tensor at a time into an abstract Llama.

llama.cpp rotates pairs of neighbours where Hugging Face's Llama rotates halves, so its files hold the
rows of queries and keys in another order: (D/2, 2) of each head, where here they are (2, D/2).
"""

from __future__ import annotations

import re

import numpy as np
from jax.typing import DTypeLike

from lucid_jax.models.gguf_config import ROPE_FREQS
from lucid_jax.models.gguf_file import GgufFile
from lucid_jax.models.transformer import Transformer
from lucid_jax.models.weights import CheckpointError, stored_tensors

_MODULES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAME = re.compile(r"(?:layers\.(?P<layer>\d+)\.)?(?P<module>.+)\.(?P<kind>weight|bias)")


def load_gguf_weights(model: Transformer, file: GgufFile, dtype: DTypeLike) -> None:
    """Gives an abstract model its weights; names and shapes must be the config's, exactly.

    Raises:
      CheckpointError: if they are not.
    """
    wanted = {_name_in_file(name): tensor for name, tensor in stored_tensors(model).items()}
    missing = sorted(set(wanted) - set(file.tensors))
    extra = sorted(set(file.tensors) - set(wanted) - {ROPE_FREQS})
    if missing or extra:
        raise CheckpointError(
            f"{file.path} does not hold the {len(wanted)} tensors that its metadata asks for: "
            f"{len(missing)} are missing {missing[:3]}, {len(extra)} are not known {extra[:3]}; it may "
            "be damaged, or of a variant of Llama that is not supported"
        )
    for name, tensor in wanted.items():
        stored = file.tensors[name].shape
        if stored != tensor.shape:
            raise CheckpointError(
                f"{file.path}: {name!r} should have shape {tensor.shape} by the metadata, got {stored}"
            )
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.kv_heads}
    for name, tensor in wanted.items():
        values = file.read(name)
        module = name.split(".")[-2]
        if module in heads:
            values = _in_halves(values, heads[module])
        tensor.fill(values, dtype)


def _name_in_file(name: str) -> str:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    module = f"{_MODULES[match['module']]}.{match['kind']}"
    return module if match["layer"] is None else f"blk.{match['layer']}.{module}"


def _in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (N D, ...) whose neighbours are rotated together, as those whose halves are."""
    apart = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return apart.swapaxes(1, 2).reshape(rows.shape)
