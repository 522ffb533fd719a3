"""GGUF files for tests, written by the `gguf` package."""

import json

import gguf
import numpy as np
import safetensors.numpy

# Hugging Face's modules of a Llama, and llama.cpp's.
MODULES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(path, metadata, tensors):
    """Writes a file; a tensor is an array, or bytes of blocks and the name of their kind."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    if "general.alignment" in metadata:
        writer.data_alignment = metadata["general.alignment"]
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # which the writer has written
        kinds = (
            (bool, "bool"), (int, "uint32"), (float, "float32"), (str, "string"), (list, "array"),
        )  # fmt: skip
        add = next(name for kind, name in kinds if isinstance(value, kind))
        getattr(writer, f"add_{add}")(key, value)
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        raw = None if kind is None else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(folder, kind="F32"):
    """Metadata and tensors of a Llama's Hugging Face folder, as llama.cpp's converter writes them."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, value in safetensors.numpy.load_file(folder / "model.safetensors").items():
        *path, leaf = name.removeprefix("model.").split(".")
        layer = f"blk.{path[1]}." if path[0] == "layers" else ""
        module = ".".join(path[2:] if layer else path)
        if path[-1] in heads:
            apart = value.reshape(heads[path[-1]], 2, -1, *value.shape[1:])
            value = np.ascontiguousarray(apart.swapaxes(1, 2).reshape(value.shape))
        tensors[f"{layer}{MODULES[module]}.{leaf}"] = stored(value, kind)
    return described(config), tensors


def stored(value, kind):
    """A matrix as blocks of a kind; vectors and rows that fill no blocks stay as they are."""
    kinds = gguf.GGMLQuantizationType
    if kind == "F32" or value.ndim < 2 or value.shape[-1] % gguf.GGML_QUANT_SIZES[kinds[kind]][0]:
        return value
    return gguf.quantize(value, kinds[kind]).view(np.uint8), kind


def described(config):
    """The metadata that a config.json becomes."""
    rope = config["rope_parameters"]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.freq_base": float(rope["rope_theta"]),
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"][0],
        "tokenizer.ggml.eot_token_id": config["eos_token_id"][1],
    }
    if rope["rope_type"] == "linear":
        metadata |= {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": float(rope["factor"]),
        }
    return metadata


def rope_factors(config):
    """What llama.cpp's converter makes of Llama 3's stretched positions: a factor a frequency."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    factors = []
    for index in range(0, dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (index / dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)
