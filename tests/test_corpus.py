"""The corpus and its split."""

import pytest

from lucid_jax.models.evaluate import Document, num_bytes

corpus = pytest.importorskip("lucid_jax.training.corpus", reason="only a checkout has training")
paragraph_keys, split = corpus.paragraph_keys, corpus.split


@pytest.fixture(scope="module")
def python():
    return corpus.python_corpus()


@pytest.mark.exhaustive
@pytest.mark.drawn
def test_corpus_is_deterministic(python):
    assert corpus.python_corpus().fingerprint == python.fingerprint


@pytest.mark.exhaustive
def test_corpus_has_every_source_and_plausible_sizes(python):
    assert {d.kind for d in python.train} == {"topic", "module", "builtin", "comments"}
    assert {d.kind for d in python.held_out} == {"topic", "module", "builtin"}
    held_out, train = num_bytes(python.held_out), num_bytes(python.train)
    assert train > 2_000_000
    assert 0.02 < held_out / train < 0.1
    names = [d.name for d in python.train + python.held_out]
    assert len(names) == len(set(names))


def test_no_held_out_paragraph_or_subject_is_trained_on(python):
    hidden = set().union(*(paragraph_keys(d.text) for d in python.held_out))
    seen = set().union(*(paragraph_keys(d.text) for d in python.train))
    assert not hidden & seen
    subjects = {d.subject.lstrip("_") for d in python.held_out}
    assert not subjects & {d.subject.lstrip("_") for d in python.train}


def test_a_document_is_split_the_same_way_in_any_company():
    documents = [Document("module", f"m{i}", f"text {i}") for i in range(200)]
    everything, half = split(documents, 0.3), split(documents[::2], 0.3)
    assert set(half.held_out) == set(everything.held_out) & set(documents[::2])


def test_paragraphs_shared_across_the_split_are_cut_from_training():
    shared = "This paragraph is quoted, word for word, by every one of the documents."
    documents = [
        Document(
            "topic", str(i), f"{shared}\n\nOwn text number {i}, which is long enough to count."
        )
        for i in range(40)
    ]
    result = split(documents, 0.2)
    assert result.held_out and all(shared in d.text for d in result.held_out)
    assert result.train and not any(shared in d.text for d in result.train)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_split_rejects_a_fraction_that_leaves_nothing(fraction: float):
    with pytest.raises(ValueError, match="held_out_fraction must be between 0 and 1"):
        split([Document("module", "a", "text")], fraction)


def test_split_rejects_an_empty_half():
    with pytest.raises(ValueError, match="give more documents"):
        split([Document("module", "a", "text")], 0.5)
