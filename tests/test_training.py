"""Training, its resumption, and distillation; on a model of a few thousand parameters."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lucid_jax.decode import generate
from lucid_jax.models.checkpoint import load_model
from lucid_jax.models.evaluate import Document, pack
from tests.helpers import TINY_CONFIG

pytest.importorskip("lucid_jax.training", reason="only a checkout has training")
from lucid_jax.training import distill as distillation
from lucid_jax.training.corpus import split
from lucid_jax.training.recipe import Recipe, batch_at
from lucid_jax.training.train import sample, train

CORPUS = split(
    [
        Document("module", f"m{i}", " ".join(f"item{i * j % 7} is {j % 5}." for j in range(40)))
        for i in range(40)
    ],
    0.2,
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
    return train(out, recipe, corpus=CORPUS, config=TINY_CONFIG, quiet=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run(out)


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


def test_sampling_is_seeded(finished):
    model, tokenizer = load_model(finished[0] / "model")
    first = sample(model, tokenizer, "item", num_tokens=5)
    assert first == sample(model, tokenizer, "item", num_tokens=5)
    assert first.startswith("item")


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
