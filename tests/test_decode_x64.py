"""Decoding with `jax_enable_x64`, which is of a process, so in another: the same tokens as without."""

import json
import os
import subprocess
import sys

import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.models import ModelConfig, Transformer

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 4, 5, 6]]
SAMPLED = lj.Sampling(0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
NEW = 12
KIVI = lj.codecs.KIVI(group=4, residual=4)


def small(seed):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = ModelConfig(vocab_size=32, num_hidden_layers=1, **sizes)
    return Transformer(config, rngs=nnx.Rngs(seed))


def with_prompt_cache(model):
    cache = lj.PromptCache(model, lj.Static(32), max_bytes=1 << 20, chunk=4)
    return [
        lj.generate(model, prompts, max_new_tokens=NEW, prompt_cache=cache).rows()
        for prompts in (PROMPTS[1:], PROMPTS)
    ]


def decoded():
    """What every decoder makes of the prompts, by name."""
    model, draft = small(0), small(1)

    def beams(history):
        result = lj.beam_search(
            model, PROMPTS, num_beams=3, max_new_tokens=NEW, history=history, stop_tokens=[5],
            repetition_penalty=1.1,
        )  # fmt: skip
        return result.rows()

    def speculated(draft, cache=None, sampling=None):
        options = {"max_new_tokens": NEW, "cache": cache, "sampling": sampling}
        return lj.speculate(model, PROMPTS, draft=draft, **options).rows()

    sampling = {"max_new_tokens": NEW, "sampling": SAMPLED}
    penalty = lj.Sampling(repetition_penalty=1.3)
    return {
        "greedy": lj.generate(model, PROMPTS, max_new_tokens=NEW).rows(),
        "sampled": list(lj.stream(model, PROMPTS, **sampling)),
        "on a ring": lj.generate(model, PROMPTS, cache=lj.Sliding(5, sinks=1), **sampling).rows(),
        "dynamic": lj.generate(model, PROMPTS, cache=lj.Dynamic(KIVI), **sampling).rows(),
        "beams in a tree": beams("tree"),
        "beams in rows": beams("reorder"),
        "n-grams": speculated(lj.NGram(), sampling=SAMPLED),
        "drafts": speculated(draft),
        "drafts, sampled, on a ring": speculated(draft, lj.Sliding(5, slack=4), SAMPLED),
        "a tree of drafts": speculated(lj.Tree(draft, (2, 1)), sampling=penalty),
        "prompt cache": with_prompt_cache(model),
    }


@pytest.fixture(scope="module")
def wide():
    """`decoded()` of a process with x64, as strict about dtypes and ranks as the suite."""
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    code = f"import json; from {__name__} import decoded; print(json.dumps(decoded()))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | strict | {"JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(run.stdout)


@pytest.mark.exhaustive
def test_the_same_tokens(wide):
    """Of every decoder, greedy and sampled."""
    narrow = json.loads(json.dumps(decoded()))
    for name, tokens in narrow.items():
        assert wide[name] == tokens, name
