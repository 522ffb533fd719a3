"""`lucid-jax eval`: bits per byte of a text under a given cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from lucid_jax.cache.introspection import nbytes
from lucid_jax.cache.verbs import grow
from lucid_jax.decode.storage import empty_cache
from lucid_jax.models.checkpoint import load_model
from lucid_jax.models.evaluate import Document, bits_per_byte, first_bytes, num_bytes, pack
from lucid_jax.tools.cache_options import check_words, name_of, spec_of


def eval_command(options: argparse.Namespace) -> None:
    """Scores a text with a cache and without one, and prints both."""
    check_words(options)
    model, tokenizer = load_model(
        options.checkpoint, jnp.dtype(options.dtype), rope_by_place=options.rope_by_place
    )
    documents: Sequence[Document]
    if options.text is None:
        documents = _held_out()
    else:
        documents = [Document("file", options.text, Path(options.text).read_text("utf-8"))]
    if options.bytes is not None:
        documents = first_bytes(documents, options.bytes)
    stream, size = pack(tokenizer, documents), num_bytes(documents)
    if not size:
        raise ValueError("there is no text to score")
    context = model.config.max_position_embeddings
    if options.context is not None:  # a window of more than the text would be of nothing
        context = min(options.context, len(stream) - 1)
    spec = spec_of(options, model, context, context)
    plain = bits_per_byte(model, stream, size, context)
    cached = bits_per_byte(model, stream, size, context, cache=spec)
    cache = grow(empty_cache(model, spec, 1), context)
    print(f"text:    {size:,} bytes, {len(stream) - 1:,} tokens in windows of {context}")
    print(f"plain:   {plain:.4f} bits per byte, attention without a cache")
    shown = name_of(options, spec) if isinstance(spec, list) else spec
    print(f"cache:   {cached:.4f} bits per byte ({100 * (cached / plain - 1):+.2f}%), {shown}")
    print(f"memory:  {nbytes(cache):,} bytes a sequence")


def _held_out() -> Sequence[Document]:
    """The documentation held out of the shipped model; collected by what a checkout alone has."""
    try:
        from lucid_jax.training.corpus import python_corpus
    except ModuleNotFoundError:
        raise ValueError(
            "the held-out documentation is collected by lucid_jax.training, which is in a checkout "
            "and not in the installed package; name a text with --text FILE"
        ) from None
    return python_corpus().held_out
