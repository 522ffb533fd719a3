"""Bits per byte of text under a given cache: what a window, a codec or an eviction costs.

A text is a stream of token ids, cut into windows of `context` tokens that do not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.introspection import check_overflow
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.verbs import with_room
from lucid_jax.decode.storage import empty_cache
from lucid_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from lucid_jax.models.tokenizer import Tokenizer  # needs the text extra

Evict = Callable[[CacheState], CacheState]


@dataclass(frozen=True)
class Document:
    """What one source says on one subject; its kind is "file", or one of the corpus's."""

    kind: str
    subject: str
    text: str

    @property
    def name(self) -> str:
        """`kind:subject`, unique in a corpus and stable across runs."""
        return f"{self.kind}:{self.subject}"


def num_bytes(documents: Sequence[Document]) -> int:
    """The UTF-8 size of the texts."""
    return sum(len(d.text.encode()) for d in documents)


def first_bytes(documents: Sequence[Document], limit: int) -> list[Document]:
    """Documents up to a number of UTF-8 bytes, the last one cut short."""
    kept = []
    for document in documents:
        text = document.text.encode()[: max(limit, 0)].decode(errors="ignore")
        limit -= len(document.text.encode())
        if text:
            kept.append(replace(document, text=text))
    return kept


def pack(tokenizer: Tokenizer, documents: Sequence[Document]) -> np.ndarray:
    """One int32 stream: each document after what starts a text (`<|endoftext|>`), that at the end."""
    start = tokenizer.start or [tokenizer.end_of_text_id]
    stream = list(start)
    for ids in tokenizer.encode_batch([document.text for document in documents]):
        stream.extend(ids)
        stream.extend(start)
    return np.asarray(stream, np.int32)


def bits_per_byte(
    model: Transformer,
    stream: np.ndarray,
    size: int,
    context: int,
    *,
    cache: LayerSpec | Sequence[LayerSpec] | None = None,
    chunk: int | None = None,
    evict: Evict | None = None,
    rows: int = 8,
) -> float:
    """Scores a stream in windows of `context` tokens, none seeing the one before it.

    Args:
        model: what to score.
        stream: packed documents, int32 [n]; every token but the first is predicted once, the
            separators too.
        size: UTF-8 bytes of the documents.
        context: tokens of a window: the most a prediction may see.
        cache: spec of the cache that the tokens go through; None for plain attention without one.
        chunk: tokens per call on the cache; by default a window. It changes the cost, and nothing
            else unless tokens are evicted.
        evict: called on the state after each chunk, under jit; for example to `compact` it.
        rows: windows scored at a time.

    Returns:
        Bits of all predictions, divided by `size`.
    """
    check_count(context, "context", 1)
    chunk = (
        context if chunk is None or cache is None else min(check_count(chunk, "chunk", 1), context)
    )
    structure, params = nnx.split(model)
    targets = len(stream) - 1
    windows = -(-targets // context)
    rows = min(rows, windows)
    windows_padded = -(-windows // rows) * rows
    padded = np.zeros(windows_padded * context + 1, np.int32)
    padded[: len(stream)] = stream
    nats = 0.0
    for first in range(0, windows_padded, rows):
        starts = np.arange(first, first + rows)[:, None] * context
        state = (
            None
            if cache is None
            else _roomy(empty_cache(model, cache, rows, ragged=False), context)
        )
        for begin in range(0, context, chunk):
            indices = starts + np.arange(begin, min(begin + chunk, context) + 1)
            mask = indices[:, 1:] <= targets
            inputs = padded[np.minimum(indices, len(padded) - 1)]
            if state is None:
                total = _plain_nats(structure, params, inputs, mask)
            else:
                total, state = _cached_nats(structure, params, state, inputs, mask, evict)
            nats += float(total)
        if state is not None:
            check_overflow(state)
    return nats / math.log(2) / size


def _roomy(state: CacheState, length: int) -> CacheState:
    """Room for a window of text in the layers that can grow; the others are as they were asked for."""
    return with_room(state, [length if x.spec.growable else 0 for x in state.layers])


def _nats(logits: jax.Array, tokens: Any, mask: Any) -> jax.Array:
    logs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logs, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(chosen, where=jnp.asarray(mask))


@partial(jax.jit, static_argnums=0)
def _plain_nats(structure: nnx.GraphDef, params: nnx.State, tokens: Any, mask: Any) -> jax.Array:
    return _nats(nnx.merge(structure, params)(tokens[:, :-1]), tokens, mask)


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def _cached_nats(
    structure: nnx.GraphDef,
    params: nnx.State,
    state: CacheState,
    tokens: Any,
    mask: Any,
    evict: Evict | None,
) -> tuple[jax.Array, CacheState]:
    logits, state = nnx.merge(structure, params)(tokens[:, :-1], state)
    return _nats(logits, tokens, mask), state if evict is None else evict(state)
