"""`lucid-jax inspect`: what a target's compiler makes of the decode steps of a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from lucid_jax.cache.state import CacheState
from lucid_jax.decode.language_model import ModelStructure, split
from lucid_jax.decode.storage import empty_cache
from lucid_jax.decode.token_loop import LoopSetup, decode_tokens, start_loop
from lucid_jax.models.checkpoint import embedded_model_path, load_pretrained
from lucid_jax.models.transformer import Transformer
from lucid_jax.tools.cache_options import check_words, sampling_of, spec_of
from lucid_jax.tools.inspection import inspect
from lucid_jax.tools.inspection_report import Inspection
from lucid_jax.tools.targets import open_target

_CHUNK = 512  # tokens of a prompt that `generate` takes at once


def inspect_command(options: argparse.Namespace) -> None:
    """Prints a report of a token of `generate`, and one of a chunk of its prompt."""
    check_words(options)
    setting = "jax_platforms"
    if getattr(jax.config, setting) is None:  # all that is needed of a GPU is its compiler
        jax.config.update(setting, "cpu")
    open_target(options.target)  # what is missing should not wait for a model
    model, _ = load_pretrained(
        options.checkpoint or embedded_model_path(),
        jnp.dtype(options.dtype),
        rope_by_place=options.rope_by_place,
    )
    if not isinstance(model, Transformer):
        raise ValueError(
            "inspect reads models that continue a text, and this is an encoder-decoder"
        )
    length = options.length or model.config.max_position_embeddings
    spec = spec_of(options, model, length, length)

    def cache() -> CacheState:
        if options.target == "cpu":
            return empty_cache(model, spec, options.batch)
        return model.init_cache(spec, options.batch, ragged=True)

    state = jax.eval_shape(cache)
    structure, params = split(model)
    setup = LoopSetup(structure, sampling_of(options), model.config.eos_token_ids)
    print(_prompt(structure, params, state, min(_CHUNK, length), options.target))
    print(_token(setup, params, state, options.target))


def _prompt(
    structure: ModelStructure, params: Any, state: CacheState, size: int, target: str
) -> Inspection:
    """A chunk of a prompt, as `generate` feeds it."""

    def prompt(params: Any, state: Any, chunk: Any, counts: Any) -> Any:
        return structure.merge(params).hidden(chunk, state, lengths=counts)

    counts = jax.ShapeDtypeStruct((state.batch_size,), jnp.int32)
    chunk = jax.ShapeDtypeStruct((state.batch_size, size), jnp.int32)
    return inspect(prompt, params, state, chunk, counts, donate=1, target=target)


def _token(setup: LoopSetup, params: Any, state: CacheState, target: str) -> Inspection:
    """The loop of `generate`; what the compiler cannot know the turns of is counted once: a token."""
    model = setup.structure.merge(params)
    last = jax.eval_shape(
        lambda: model.hidden(jnp.zeros((state.batch_size, 1), jnp.int32))[0][:, 0]
    )
    seen = None
    if setup.sampling.remembers:
        seen = jax.ShapeDtypeStruct((state.batch_size, model.config.vocab_size), jnp.bool_)
    loop = jax.eval_shape(
        lambda cache, last, seen: start_loop(
            setup, params, cache, last, seen, jax.random.key(0), _CHUNK
        ),
        state,
        last,
        seen,
    )

    def token(params: Any, loop: Any, limit: Any) -> Any:
        return decode_tokens(setup, params, loop, limit)

    return inspect(
        token, params, loop, jax.ShapeDtypeStruct((), jnp.int32), donate=1, target=target
    )
