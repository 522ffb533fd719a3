"""Filters and draws of `decode.sampling`, against slow plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_jax.decode.sampling import Sampling, filtered, sample


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kept(logits, **options):
    """Which tokens survive, one list per row."""
    out = np.asarray(filtered(jnp.asarray(logits, jnp.float32), Sampling(1.0, **options)))
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in out]


def test_greedy_takes_the_likeliest():
    """Temperature 0 ignores the key and every filter but the penalty."""
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    for seed in range(3):
        assert sample(logits, jax.random.key(seed), Sampling()).tolist() == [1, 0]


def test_top_k_keeps_k():
    """Exactly the k largest logits survive; a k beyond the vocabulary keeps all."""
    logits = [[0.0, 3.0, 1.0, 2.0]]
    assert kept(logits, top_k=2) == [[1, 3]]
    assert kept(logits, top_k=9) == [[0, 1, 2, 3]]


@given(st.integers(0, 10_000), st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_sufficient_set(seed, p):
    """The nucleus reaches p, and without its least likely member it does not."""
    logits = np.random.default_rng(seed).standard_normal((1, 16)).astype(np.float32) * 3
    (nucleus,) = kept(logits, top_p=p)
    likely = softmax(logits[0].astype(np.float64))
    mass = likely[nucleus].sum()
    assert len(nucleus) >= 1
    assert mass >= p - 1e-5
    assert mass - likely[nucleus].min() < p + 1e-5
    assert set(nucleus) == set(np.argsort(-likely, kind="stable")[: len(nucleus)])


def test_min_p_is_relative_to_the_likeliest():
    """A token stays if it is at least min_p times as likely as the likeliest."""
    logits = np.log([[0.5, 0.3, 0.1, 0.1]])
    assert kept(logits, min_p=0.5) == [[0, 1]]
    assert kept(logits, min_p=1.0) == [[0]]


def test_repetition_penalty_pushes_both_signs_down():
    """Positive logits are divided, negative ones multiplied, unseen ones left alone."""
    logits = jnp.array([[2.0, -2.0, 2.0]])
    seen = jnp.array([[True, True, False]])
    out = filtered(logits, Sampling(0.0, repetition_penalty=2.0), seen)
    np.testing.assert_allclose(out, [[1.0, -4.0, 2.0]])
    with pytest.raises(ValueError, match="seen"):
        filtered(logits, Sampling(repetition_penalty=2.0))


def test_draws_follow_the_distribution():
    """Frequencies of 4000 draws stay within 5 standard deviations of the probabilities."""
    logits = jnp.array([[0.0, 1.0, 2.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens = np.asarray(jax.vmap(lambda k: sample(logits, k, Sampling(1.0)))(keys)).ravel()
    likely = softmax(np.asarray(logits[0], np.float64))
    counts = np.bincount(tokens, minlength=4)
    deviation = np.sqrt(4000 * likely * (1 - likely))
    assert (np.abs(counts - 4000 * likely) < 5 * deviation).all()


def test_temperature_sharpens():
    """A low temperature draws the likeliest token nearly always."""
    keys = jax.random.split(jax.random.key(1), 200)
    draw = jax.vmap(lambda k: sample(jnp.array([[0.0, 1.0]]), k, Sampling(0.05)))
    assert np.asarray(draw(keys)).mean() > 0.99


def test_a_row_draws_the_same_whoever_shares_the_batch():
    """Row i of a batch draws what it draws in a smaller batch."""
    logits = jax.random.normal(jax.random.key(2), (4, 50))
    key = jax.random.key(3)
    whole = sample(logits, key, Sampling(1.0))
    assert whole[:2].tolist() == sample(logits[:2], key, Sampling(1.0)).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_nonsense_is_refused(options):
    """A value out of range raises and names the field and what it expects."""
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        Sampling(**options)
