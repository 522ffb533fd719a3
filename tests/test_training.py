"""Training, its resumption, and checkpoints; on a model of a few thousand parameters."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lucid_jax.decode import generate
from lucid_jax.models import distill as distillation
from lucid_jax.models.checkpoint import CheckpointError, load_model, save_model
from lucid_jax.models.config import ModelConfig
from lucid_jax.models.corpus import Document, split
from lucid_jax.models.evaluate import bits_per_byte, pack
from lucid_jax.models.tokenizer import Tokenizer
from lucid_jax.models.train import Recipe, batch_at, sample, train
from lucid_jax.models.transformer import Transformer

CORPUS = split(
    [
        Document("module", f"m{i}", " ".join(f"item{i * j % 7} is {j % 5}." for j in range(40)))
        for i in range(40)
    ],
    0.2,
)
CONFIG = ModelConfig(
    vocab_size=280,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
RECIPE = Recipe(
    steps=8,
    batch_size=2,
    short_context=16,
    long_context=32,
    long_fraction=0.25,
    learning_rate=1e-2,
    eval_every=3,
)


@pytest.fixture(scope="module", autouse=True)
def lenient_promotion():
    """Optax raises a Python float to an integer count; the suite at large forbids such mixing."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(out, recipe=RECIPE, **options):
    return train(out, recipe, corpus=CORPUS, config=CONFIG, quiet=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run(out)


@pytest.fixture
def model_dir(finished, tmp_path):
    model, tokenizer = load_model(finished[0] / "model")
    save_model(tmp_path / "model", model, tokenizer)
    return tmp_path / "model"


def test_a_run_writes_what_it_promises(finished):
    out, progress = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert [step for step, _ in progress.bits] == [3, 6, 8]
    assert metrics["bits"] == [list(point) for point in progress.bits]
    assert metrics["exported_bits_per_byte"] == pytest.approx(progress.best_bits, rel=1e-2)
    assert metrics["sample"].startswith("Return a new")
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.rglob(".*")]  # no temporary file stays


def test_training_learns(finished, tmp_path):
    progress = run(tmp_path, dataclasses.replace(RECIPE, steps=60, eval_every=30))
    assert progress.losses[-1][1] < 0.6 * progress.losses[0][1]


@pytest.mark.parametrize("stop_after", [2, 7])
def test_a_resumed_run_ends_like_an_uninterrupted_one(finished, tmp_path, stop_after):
    run(tmp_path, stop_after=stop_after)
    resumed = run(tmp_path, resume=True)
    out, whole = finished
    assert resumed.losses == whole.losses
    assert resumed.bits == whole.bits
    for name in ("state.safetensors", "model/model.safetensors"):
        a = safetensors.numpy.load_file(out / name)
        b = safetensors.numpy.load_file(tmp_path / name)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)


def test_a_run_is_neither_overwritten_nor_mixed_with_another(finished):
    with pytest.raises(ValueError, match="already holds a run"):
        run(finished[0])
    with pytest.raises(ValueError, match="belongs to another run: its recipe"):
        run(finished[0], dataclasses.replace(RECIPE, seed=1), resume=True)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch_size": 0}, {"long_fraction": 1.5}], ids=lambda c: next(iter(c))
)
def test_recipe_errors(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(RECIPE, **change)


def test_an_epoch_shows_every_window_once():
    recipe = dataclasses.replace(RECIPE, steps=100, long_fraction=0.0, batch_size=3)
    stream = np.arange(16 * 13 + 1, dtype=np.int32)  # 12 windows and room for the offset
    epoch = np.concatenate([batch_at(stream, recipe, step) for step in range(4)])
    assert epoch.shape == (12, 17)
    assert np.all(np.diff(epoch, axis=1) == 1)
    starts = np.sort(epoch[:, 0])
    assert np.all(np.diff(starts) == 16)
    later = np.concatenate([batch_at(stream, recipe, step) for step in range(4, 8)])
    assert not np.array_equal(np.sort(later[:, 0]), starts)
    with pytest.raises(ValueError, match="needs 33"):
        batch_at(stream[:20], recipe, 0)


def test_bits_per_byte_of_a_uniform_model_is_known():
    tokenizer = Tokenizer.train(["a"], vocab_size=257)
    config = dataclasses.replace(CONFIG, vocab_size=257)
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.embed_tokens.embedding.set_value(jnp.zeros((257, 16)))  # tied: all logits are zero
    documents = [Document("module", "m", "x" * 45)]
    stream = pack(tokenizer, documents)
    assert len(stream) == 47
    for context in (16, 64):  # a ragged last window, and one that is longer than the text
        bits = bits_per_byte(model, stream, 45, context)
        assert bits == pytest.approx(math.log2(257) * 46 / 45, rel=1e-5)


def test_sampling_is_seeded(finished):
    model, tokenizer = load_model(finished[0] / "model")
    first = sample(model, tokenizer, "item", num_tokens=5)
    assert first == sample(model, tokenizer, "item", num_tokens=5)
    assert first.startswith("item")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [None, jnp.bfloat16, jnp.float16])
def test_a_model_survives_saving(tmp_path, tied, stored):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
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


def test_a_failed_write_leaves_the_old_file(finished, model_dir, monkeypatch):
    before = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    model, tokenizer = load_model(finished[0] / "model")
    with pytest.raises(OSError, match="disk full"):
        save_model(model_dir, model, tokenizer)
    assert {path.name: path.read_bytes() for path in model_dir.iterdir()} == before


# --- distillation ----------------------------------------------------------------------------------


def test_what_the_target_writes_goes_on_greedily_from_the_corpus(finished):
    """Each row begins with a piece of the stream, and ends as `generate` ends it; seeded."""
    model, tokenizer = load_model(finished[0] / "model")
    stream = pack(tokenizer, CORPUS.train)
    texts = distillation.written_by(model, stream, 3, prompt=5, new=4)
    assert texts.shape == (3, 9) and texts.dtype == np.int32
    places = np.lib.stride_tricks.sliding_window_view(stream, 5)
    assert all((places == row[:5]).all(axis=1).any() for row in texts)
    np.testing.assert_array_equal(
        texts[:, 5:], generate(model, texts[:, :5], max_new_tokens=4).tokens
    )
    again, other = (
        distillation.written_by(model, stream, 3, prompt=5, new=4, seed=seed) for seed in (0, 1)
    )
    np.testing.assert_array_equal(texts, again)
    assert (texts != other).any()


def test_a_draft_learns_its_targets_text(finished, tmp_path, monkeypatch):
    """Half of each batch is the target's: what a draft of the same size loses falls."""
    monkeypatch.setattr(
        distillation, "load_model", lambda folder=finished[0] / "model": load_model(folder)
    )
    monkeypatch.setattr(distillation, "python_corpus", lambda: CORPUS)
    texts, batches = [], []

    def writing(*args, write=distillation.written_by, **options):
        texts.append(write(*args, **options))
        return texts[0]

    def watching(*args, make=distillation.make_train_step):
        step = make(*args)
        return lambda params, state, batch: batches.append(batch) or step(params, state, batch)

    monkeypatch.setattr(distillation, "written_by", writing)
    monkeypatch.setattr(distillation, "make_train_step", watching)
    recipe = dataclasses.replace(RECIPE, steps=12, short_context=16, long_fraction=0.0)
    losses = distillation.distill(finished[0] / "model", tmp_path, recipe, rows=4, prompt=8)
    assert len(losses) == len(batches) == 12 and np.mean(losses[-4:]) < np.mean(losses[:4])
    half = recipe.batch_size // 2
    stream = pack(load_model(tmp_path)[1], CORPUS.train)
    for step, batch in enumerate(batches):
        corpus = batch_at(stream, recipe, step)
        np.testing.assert_array_equal(batch[:half], corpus[:half])
        rows = (np.asarray(batch)[half:, None] == texts[0]).all(axis=2)
        assert rows.any(axis=1).all() and len(rows) == recipe.batch_size - half > 0
    before, after = (load_model(folder)[0] for folder in (finished[0] / "model", tmp_path))
    assert after.config == before.config
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), nnx.state(before), nnx.state(after))
    assert any(jax.tree.leaves(changed))
