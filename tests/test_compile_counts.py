"""Decoding compiles few programs for all prompts and budgets of up to 512 tokens."""

import itertools
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.models import ModelConfig, Transformer

from .helpers import SEED

MOST = 40  # of a decoder and a model, small programs included
LONGEST = 512
VOCAB = 50
WINDOW = 100
DRAFT = "the draft itself"


def edges():
    """Lengths of prompt and new text on both sides of wherever a power of two may matter."""
    near = {2**n + d for n in range(10) for d in (-1, 0, 1)}
    pairs = {(length, 1) for length in near if 1 <= length <= LONGEST}
    pairs |= set(itertools.product((1, 256, 257, LONGEST), (2, 60, 120, 250, LONGEST)))
    pairs |= {(255, 2), (256, 256), (256, 257), (LONGEST, LONGEST - 1)}
    # A window that holds the whole text, and one that does not, after the same prompt.
    pairs |= {(length, WINDOW + 2 - length) for length, _ in pairs if length <= WINDOW}
    return sorted(pairs)


def model(name, **sizes):
    """A model of a width of its own: it shares no program with the others."""
    width = 20 + 4 * [*ALL, DRAFT].index(name)
    given = {"hidden_size": width, "num_hidden_layers": 1, "intermediate_size": 8}
    config = ModelConfig(vocab_size=VOCAB, num_attention_heads=2, **(given | sizes))
    return Transformer(config, rngs=nnx.Rngs(0))


def generate(one, prompt, new):
    sampling = lj.Sampling(temperature=0.9, top_k=5, repetition_penalty=1.1)
    return lj.generate(one, [prompt], max_new_tokens=new, sampling=sampling).rows()


def stream(one, prompt, new):
    pieces = lj.stream(one, [prompt], max_new_tokens=new, tokens_per_call=100)
    return [[token for (row,) in pieces for token in row]]


def search(history):
    def run(one, prompt, new):
        result = lj.beam_search(
            one, [prompt], num_beams=3, max_new_tokens=new, history=history, repetition_penalty=1.1
        )
        assert result.history == history
        return result.rows()[0]

    return run


def speculate(draft_of):
    def run(one, prompt, new):
        result = lj.speculate(one, [prompt], draft=draft_of(), max_new_tokens=new, draft_tokens=2)
        return result.rows()

    return run


@cache
def draft():
    return model(DRAFT)


LEARNED = {"model_type": "gpt2", "max_position_embeddings": 2 * LONGEST - 1}
CASES = {
    "generate": (generate, {}),
    "stream": (stream, {}),
    "beams in a tree": (search("tree"), {}),
    "drafts": (speculate(draft), {}),
}
MORE = {
    "windows": (generate, {"model_type": "mistral", "sliding_window": WINDOW}),
    "learned positions": (generate, LEARNED),
    "beams in rows": (search("reorder"), {}),
    "n-grams": (speculate(lj.NGram), {}),
    "trees of drafts": (speculate(lambda: lj.Tree(draft(), (2, 1))), {}),
}
ALL = CASES | MORE


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)]
)
def test_few_programs_serve_all_lengths(name, compilations):
    """At most 40, counted over the edges of all sizes; lengths drawn anywhere need no other."""
    decode, sizes = ALL[name]
    one = model(name, **sizes)
    draft()  # what drawing its weights compiles is not counted
    rng = np.random.default_rng(SEED)

    def run(length, new):
        prompt = rng.integers(0, VOCAB, length).tolist()
        (row,) = decode(one, prompt, new)
        assert len(row) == new

    before = compilations()
    for length, new in edges():
        run(length, new)
    programs = compilations() - before
    assert programs <= MOST
    for length, new in rng.integers(1, LONGEST + 1, (4, 2)).tolist():
        run(length, new)
        assert compilations() - before == programs, (length, new)


def test_prompts_in_an_array_compile_nothing_more(compilations):
    """Of every length: XLA would take an array apart by a program for each shape."""
    one = model("generate")

    def run(prompts):
        return lj.generate(one, prompts, max_new_tokens=2).tokens.tolist()

    prompts = np.random.default_rng(SEED).integers(0, VOCAB, (2, 13))
    expected = run(prompts.tolist())
    before = compilations()
    assert run(jax.device_put(prompts)) == run(prompts) == expected
    assert compilations() == before
