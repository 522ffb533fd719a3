"""Bits per byte of the shipped model under caches: what codecs, windows and eviction cost."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.models import ModelConfig, Transformer
from lucid_jax.models.evaluate import Document, bits_per_byte, pack

pytest.importorskip("tokenizers")

CODECS = lj.codecs


@pytest.fixture(scope="module")
def shipped():
    """The embedded model and a stretch of held-out text: model, stream, bytes."""
    from lucid_jax.models import load_model

    model, tokenizer = load_model()
    text = (
        "Return a new list containing the items of the sequence, sorted in ascending order. If the "
        "key argument is given, it is called on each item, and the results are compared. "
    )
    documents = [Document("topic", str(i), f"{i}. {text * 3}") for i in range(8)]
    return model, pack(tokenizer, documents), sum(len(d.text.encode()) for d in documents)


@pytest.fixture(scope="module")
def plain(shipped):
    """Its score by attention without a cache."""
    return bits_per_byte(*shipped, 256)


@pytest.mark.parametrize(
    ("codec", "percent"),
    [
        (CODECS.Identity(), 1e-3), (CODECS.Int8(), 0.1), (CODECS.Float8(), 0.3),
        (CODECS.Int4(), 1.5), (CODECS.KIVI(), 1),
    ],
    ids=str,
)  # fmt: skip
def test_codecs_cost_little(shipped, plain, codec, percent):
    """int8 at most 0.1% of bits per byte, the best int4 at most 1%."""
    bits = bits_per_byte(*shipped, 256, cache=lj.Static(256, codec))
    assert abs(bits / plain - 1) <= percent / 100


@pytest.mark.exhaustive
@pytest.mark.drawn
def test_chunks_change_nothing_unless_tokens_are_evicted(shipped):
    """The cache sees the same tokens."""
    spec = lj.Sliding(40, sinks=2, codec=CODECS.Int8())
    whole = bits_per_byte(*shipped, 128, cache=spec)
    assert bits_per_byte(*shipped, 128, cache=spec, chunk=24) == pytest.approx(whole, rel=1e-5)


@pytest.mark.exhaustive
def test_eviction_by_age_is_a_window(shipped):
    """Compacting to the latest 40 before each chunk costs what forgetting them costs."""

    def evict(state):
        for i in range(state.num_layers):
            scores = lj.scoring.sinks_and_recent(*lj.get(state, i), sinks=0)
            state = lj.compact(state, lj.scoring.keep_best(scores, 40), i)
        return state

    spec = lj.Static(72, track=True)
    one = bits_per_byte(*shipped, 128, cache=spec, chunk=1, evict=evict)
    ring = bits_per_byte(*shipped, 128, cache=lj.Sliding(41))
    assert one == pytest.approx(ring, rel=1e-4)


def test_too_small_a_cache_is_an_error_and_not_a_score(shipped):
    """A traced overflow is not lost."""
    with pytest.raises(OverflowError, match="more room"):
        bits_per_byte(*shipped, 128, cache=lj.Static(100), chunk=64)


@pytest.mark.exhaustive
@pytest.mark.drawn
def test_places_keep_far_text_sound(shipped):
    """Past the trained 512 positions, sinks and a window by place still predict."""
    model, stream, size = shipped
    by_place = nnx.clone(model)
    for layer in by_place.layers:
        layer.self_attn.rope_by_place = True
    near = bits_per_byte(model, stream, size, 256)
    far = bits_per_byte(
        by_place, stream, size, len(stream), cache=lj.Sliding(128, sinks=4), chunk=256
    )
    assert len(stream) > 1024
    assert far < 1.15 * near


def test_a_uniform_model_needs_log2_of_its_vocabulary():
    """Whatever the cache, windows and rows."""
    config = ModelConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.embed_tokens.embedding.set_value(jnp.zeros_like(model.embed_tokens.embedding[...]))
    stream = np.asarray(jax.random.randint(jax.random.key(0), (45,), 0, 32))
    for options in ({}, {"cache": lj.Sliding(3)}, {"cache": lj.Static(10), "chunk": 4, "rows": 2}):
        bits = bits_per_byte(model, stream, 44, 10, **options)
        assert bits == pytest.approx(math.log2(32), rel=1e-6)
