"""`--cache`, `--codec` and those of sampling, of the command line: what they name, and their names."""

from __future__ import annotations

import argparse

from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.decode.prefill import sized
from lucid_jax.decode.sampling import Sampling
from lucid_jax.models.transformer import Transformer
from lucid_jax.tools.specs import parse_codec, parse_spec, spec_word


def check_words(options: argparse.Namespace) -> None:
    """Refuses words that name no cache, before a model is loaded."""
    layout = "static" if options.cache == "auto" else options.cache
    parse_spec(layout, options.codec, capacity=1)


def spec_of(
    options: argparse.Namespace, model: Transformer, length: int, slots: int
) -> LayerSpec | list[LayerSpec]:
    """The cache that the options name, for texts of `length` tokens; static layers have `slots`."""
    if options.cache != "auto":
        return parse_spec(options.cache, options.codec, capacity=slots)
    specs = sized(model.cache_spec(length, parse_codec(options.codec)), slots)
    return specs[0] if len(set(specs)) == 1 else specs


def name_of(options: argparse.Namespace, spec: LayerSpec | list[LayerSpec]) -> str:
    """A spec in words."""
    if options.cache != "auto":
        return options.cache
    specs = spec if isinstance(spec, list) else [spec]
    words = [spec_word(one) for one in sorted(specs, key=lambda one: not one.bounded)]
    return " and ".join(dict.fromkeys(words))


def slides(spec: LayerSpec | list[LayerSpec]) -> bool:
    """Whether a cache keeps the latest tokens only, all its layers alike."""
    return isinstance(spec, LayerSpec) and not spec.bounded


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How the options say that tokens are chosen."""
    # Models that were taught to answer are surer of what comes next.
    temperature, penalty = (0.2, 1.0) if options.chat else (0.7, 1.1)
    return Sampling(
        temperature=temperature if options.temperature is None else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=(
            penalty if options.repetition_penalty is None else options.repetition_penalty
        ),
    )
