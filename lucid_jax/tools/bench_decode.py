"""What `lucid-jax bench` measures of decoding: whole loops, beams, shared prompts, drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import LanguageModel, NGram, generate, generate_uncached, speculate
from lucid_jax.decode.beam import as_rules, prefilled
from lucid_jax.decode.beam_loop import History, search_from
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.models.checkpoint import embedded_draft_path, load_model
from lucid_jax.models.config import ModelConfig
from lucid_jax.models.transformer import Transformer
from lucid_jax.tools.measure import Row, medians


def _generation(repeats: int, quick: bool) -> Iterator[Row]:
    config = ModelConfig(vocab_size=2048, num_hidden_layers=4, num_key_value_heads=2)
    model = Transformer(config, rngs=nnx.Rngs(0))
    new = 8 if quick else 64
    for length in (32,) if quick else (64, 400):
        prompt = [list(range(1, length + 1))]
        naive, ours = medians(
            1 if quick else 3,
            partial(generate_uncached, model, prompt, max_new_tokens=new),
            partial(generate, model, prompt, max_new_tokens=new),
            burst=1,
        )
        case = f"per token, {new} after a prompt of {length}"
        yield Row("decode", case, "recompute everything", naive / new, ours / new)


def _beams(repeats: int, quick: bool) -> Iterator[Row]:
    """Four beams, prefill left out: nothing moves, what is not shared moves, everything moves."""
    layers = 1 if quick else 4
    config = ModelConfig(vocab_size=2048, num_hidden_layers=layers, num_key_value_heads=2)
    model = Transformer(config, rngs=nnx.Rngs(0))
    width = 4
    for length, new in ((32, 8),) if quick else ((2000, 64), (16, 400)):
        prompt = [[1 + i % 2000 for i in range(length)]]
        runs = []
        others: tuple[History, ...] = ("tree",) if quick else ("tree", "reorder")
        for history in ("gather", *others):
            # Just what is needed: a larger one would cost those that move all of it more.
            need = length + (new - 1) * (width if history == "tree" else 1)
            options = DecodeOptions.of(max_new_tokens=new, cache=lj.Static(need))
            rules = as_rules(options, 1.0, False, config.vocab_size)
            setup, params, state, prompts = prefilled(model, prompt, options, width, history)

            def run(setup: Any, params: Any, state: Any, prompts: Any, rules: Any) -> Any:
                return search_from(
                    setup, params, jax.tree.map(jnp.copy, state), prompts, rules
                ).step

            runs.append(partial(run, setup, params, state, prompts, rules))
        naive, *ours = medians(1 if quick else 3, *runs, burst=1)
        for history, milliseconds in zip(others, ours, strict=True):
            case = f"{history}, per token, {width} beams, {new} after a prompt of {length}"
            yield Row("beam search", case, "gather whole cache", naive / new, milliseconds / new)


def _prompts(repeats: int, quick: bool) -> Iterator[Row]:
    """Prefill of a prompt whose beginning an earlier one had."""
    config = ModelConfig(vocab_size=2048, num_hidden_layers=4, num_key_value_heads=2)
    model = Transformer(config, rngs=nnx.Rngs(0))
    length, shared = (80, 64) if quick else (400, 384)
    spec = lj.Static(length + 64)
    prompts = lj.PromptCache(model, spec, max_bytes=1 << 30)
    # What is shared is whole chunks, so the rest is computed every time.
    prompt = [list(range(1, length + 1))]
    one = partial(generate, model, prompt, max_new_tokens=1)
    naive, ours = medians(
        1 if quick else 5, partial(one, cache=spec), partial(one, prompt_cache=prompts), burst=1
    )
    yield Row("prefill", f"{length} tokens, {shared} seen before", "recompute", naive, ours)


def _speculation(repeats: int, quick: bool) -> Iterator[Row]:
    """Greedy texts of the embedded model, with drafts and without: the same tokens.

    Whole requests, one after the other, as texts differ in how well they are drafted.
    """
    if quick:
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1}
        config = ModelConfig(vocab_size=64, num_attention_heads=1, **sizes)
        model = draft = Transformer(config, rngs=nnx.Rngs(0))
        prompts, new, counts = [[1, 2, 3]], 8, [4]
    else:
        model, tokenizer = load_model()
        draft, _ = load_model(embedded_draft_path())
        prompts = [tokenizer.encode_prompt(text) for text in _BEGINNINGS]
        new, counts = 200, [2, 3, 4, 6]

    def each(decode: Callable[..., Any]) -> list[Any]:
        return [decode(model, [prompt], max_new_tokens=new) for prompt in prompts]

    drafters: dict[str, LanguageModel | NGram] = {"draft model": draft, "n-grams": NGram()}
    for name, one in drafters.items():
        for count in counts:
            drafted = partial(speculate, draft=one, draft_tokens=count)
            accepted = drafted(model, prompts, max_new_tokens=new).acceptance
            runs = partial(each, generate), partial(each, drafted)
            times = medians(1 if quick else 2 * repeats, *runs, burst=1)
            naive, ours = (time / new / len(prompts) for time in times)
            case = f"per token, {name}, {count} a round, {accepted:.0%} accepted"
            yield Row("speculate", case, "generate", naive, ours)


_BEGINNINGS = (
    "Return a new list containing",
    "The following example shows how to use the",
    "If the argument is not a string, a TypeError is raised",
    "Changed in version 3.9: Added the",
    "This module provides access to the",
    "A context manager that",
    "The default value is None, which means",
    "See also the documentation of",
)

GROUPS = (_generation, _beams, _prompts, _speculation)
