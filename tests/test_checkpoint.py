"""Model folders: saved and loaded, damaged, of foreign making; of a few thousand parameters."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lucid_jax.models.checkpoint import CheckpointError, load_model, save_model
from lucid_jax.models.config import ModelConfig
from lucid_jax.models.evaluate import Document, bits_per_byte, pack
from lucid_jax.models.tokenizer import Tokenizer
from lucid_jax.models.transformer import Transformer
from tests.helpers import TINY_CONFIG


@pytest.fixture
def model_dir(tmp_path):
    model = Transformer(TINY_CONFIG, rngs=nnx.Rngs(0))
    save_model(tmp_path / "model", model, Tokenizer.train(["item is."], vocab_size=280))
    return tmp_path / "model"


def test_bits_per_byte_of_a_uniform_model_is_known():
    tokenizer = Tokenizer.train(["a"], vocab_size=257)
    config = dataclasses.replace(TINY_CONFIG, vocab_size=257)
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.embed_tokens.embedding.set_value(jnp.zeros((257, 16)))  # tied: all logits are zero
    documents = [Document("module", "m", "x" * 45)]
    stream = pack(tokenizer, documents)
    assert len(stream) == 47
    for context in (16, 64):  # a ragged last window, and one that is longer than the text
        bits = bits_per_byte(model, stream, 45, context)
        assert bits == pytest.approx(math.log2(257) * 46 / 45, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [None, jnp.bfloat16, jnp.float16])
def test_a_model_survives_saving(tmp_path, tied, stored):
    config = dataclasses.replace(TINY_CONFIG, tie_word_embeddings=tied)
    model = Transformer(config, rngs=nnx.Rngs(1))
    tokenizer = Tokenizer.train(["a"], vocab_size=257)
    save_model(tmp_path, model, tokenizer, stored)
    loaded, loaded_tokenizer = load_model(tmp_path)
    assert loaded.config == config
    assert loaded_tokenizer.to_json() == tokenizer.to_json()
    expected = jax.tree.map(
        lambda x: x if stored is None else x.astype(stored).astype(jnp.float32), nnx.state(model)
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), expected)
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    assert load_model(tmp_path, jnp.bfloat16)[0](tokens).dtype == jnp.float32
    if stored is None:
        np.testing.assert_array_equal(loaded(tokens), model(tokens))


def test_tensor_names_and_shapes_are_hugging_faces(model_dir):
    tensors = safetensors.numpy.load_file(model_dir / "model.safetensors")
    layer = "model.layers.1."
    assert {name: array.shape for name, array in tensors.items() if "layers.0" not in name} == {
        "model.embed_tokens.weight": (280, 16),
        layer + "input_layernorm.weight": (16,),
        layer + "self_attn.q_proj.weight": (16, 16),
        layer + "self_attn.k_proj.weight": (8, 16),
        layer + "self_attn.v_proj.weight": (8, 16),
        layer + "self_attn.o_proj.weight": (16, 16),
        layer + "post_attention_layernorm.weight": (16,),
        layer + "mlp.gate_proj.weight": (24, 16),
        layer + "mlp.up_proj.weight": (24, 16),
        layer + "mlp.down_proj.weight": (16, 24),
        "model.norm.weight": (16,),
    }
    config = json.loads((model_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        load_model(model_dir)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(model_dir, keep):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_model(model_dir)


def test_foreign_weights(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"PK\x03\x04" + b"pickle" * 1000)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_model(model_dir)


def _change(model_dir, change):
    path = model_dir / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_missing_unknown_misshapen_and_quantized_tensors(model_dir):
    norm = "model.norm.weight"
    _change(model_dir, lambda t: t.update({norm: np.ones(17, np.float32)}))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' should have shape \(16,\)"):
        load_model(model_dir)
    _change(model_dir, lambda t: t.update({norm: np.ones(16, np.int8)}))
    with pytest.raises(CheckpointError, match=r"should be floating point .* got I8"):
        load_model(model_dir)
    _change(model_dir, lambda t: t.pop(norm))
    with pytest.raises(CheckpointError, match=r"1 are missing \['model.norm.weight'\]"):
        load_model(model_dir)
    _change(model_dir, lambda t: t.update({norm: np.ones(16, np.float32)}))
    load_model(model_dir)
    _change(model_dir, lambda t: t.update({"lm_head.weight": np.ones((280, 16), np.float32)}))
    load_model(model_dir)  # a tied head stored twice is harmless
    name = "model.layers.0.self_attn.q_proj.bias"
    _change(model_dir, lambda t: t.update({name: np.ones(16, np.float32)}))
    with pytest.raises(CheckpointError, match="1 are not known"):
        load_model(model_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' model; supported are gemma2, gemma3_text, gpt2, llama"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type='longrope'; supported are default"),
        ({"attention_bias": True}, "8 are missing .*q_proj.bias|8 are missing .*k_proj.bias"),
        ({"hidden_size": "16"}, "hidden_size must be a positive integer"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"eos_token_id": 1000}, "eos_token_id"),
        ({"head_dim": 5}, "must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"vocab_size": 200}, "ids but config.json says vocab_size=200"),
    ],
)
def test_config_errors(model_dir, change, message):
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_model(model_dir)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_config_that_is_none(text):
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_json(text)


def test_config_reads_what_hugging_face_writes():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    old = ModelConfig.from_json(json.dumps({**sizes, "rope_theta": 5e5, "eos_token_id": [3, 5]}))
    new = ModelConfig.from_json(
        json.dumps({**sizes, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    )
    assert old.rope_theta == new.rope_theta == 5e5
    assert (old.eos_token_id, new.eos_token_id) == ((3, 5), None)
    assert (old.eos_token_ids, new.eos_token_ids) == ((3, 5), ())
    assert (old.num_key_value_heads, old.head_dim, old.tie_word_embeddings) == (4, 8, False)
    assert ModelConfig.from_json(old.to_json("bfloat16")) == old


def test_a_failed_write_leaves_the_old_file(model_dir, monkeypatch):
    before = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    model, tokenizer = load_model(model_dir)
    with pytest.raises(OSError, match="disk full"):
        save_model(model_dir, model, tokenizer)
    assert {path.name: path.read_bytes() for path in model_dir.iterdir()} == before
