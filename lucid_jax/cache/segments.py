"""Stored tokens cut out of a cache and joined to another one, as they are, without decoding them.

A `Segment` is what some consecutive tokens added to a layer: leaves (B, H, n, ...), n slots as the
codec stores them. The segments of a text, joined in order to an empty cache, give the cache of that
text bit for bit, whatever the layout and the codec: `cut` reads slots by position, and `join` is an
append of tokens that are encoded already.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lucid_jax.cache import residual, slots
from lucid_jax.cache.forms import Stored
from lucid_jax.cache.layer import Chunk, Layer
from lucid_jax.cache.residual import Recent
from lucid_jax.cache.state import CacheState


@struct.dataclass
class Segment:
    """What `tokens` consecutive tokens added to one layer."""

    key: Stored  # leaves (B, H, n, ...): the slots they filled, whole groups of the codec
    value: Stored  # leaves (B, H, n, ...)
    recent: Recent | None  # with a residual, the latest of them in full precision
    tokens: int = struct.field(pytree_node=False)


@partial(jax.jit, static_argnums=1)
def cut(state: CacheState, tokens: int) -> tuple[Segment, ...]:
    """What the latest `tokens` tokens added to each layer of a state.

    They must be stored, except those that a window has dropped: neither evicted nor cropped. Reads
    O(tokens) slots; one program for all positions.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> empty = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=4
        ... )
        >>> one = lj.update(empty, jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3, 4)), 0)
        >>> two = lj.update(one, jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 3, 4)), 0)
        >>> lj.positions(join(one, cut(two, 3)), 1).tolist()
        [6]
    """
    return tuple(_cut(layer, tokens) for layer in state.layers)


@partial(jax.jit, donate_argnums=0)
def join(state: CacheState, segments: tuple[Segment, ...]) -> CacheState:
    """Appends what `cut` gave to a state of the same layers that stands where the segments began.

    All or nothing, as `update` inside `jit`: what does not fit sets `overflowed`. The state is
    donated.
    """
    return state.with_layers(
        _join(layer, segment) for layer, segment in zip(state.layers, segments, strict=True)
    )


def _cut(layer: Layer, tokens: int) -> Segment:
    # Of a codec with a residual these are the tokens that moved from it into slots meanwhile.
    first = layer.packing.flushed(layer.position - tokens)
    slot = layer.slot_of(slots.span(first, _slots(layer, tokens)))

    def read(leaf: jax.Array) -> jax.Array:
        stride = layer.num_slots // leaf.shape[2]
        return slots.take(leaf, slot[..., ::stride] // stride)

    recent = layer.recent
    if recent is not None:
        held = min(tokens, recent.size)
        place = slots.span(layer.position - held, held) % recent.size
        recent = Recent(slots.take(recent.key, place), slots.take(recent.value, place))
    return Segment(
        key=jax.tree.map(read, layer.key),
        value=jax.tree.map(read, layer.value),
        recent=recent,
        tokens=tokens,
    )


def _join(layer: Layer, segment: Segment) -> Layer:
    count = jnp.full_like(layer.position, segment.tokens)
    ok = layer.fits(count)
    count = jnp.where(ok, count, 0)
    first = layer.packing.flushed(layer.position)
    raw: Any = None
    if layer.recent is not None:
        assert segment.recent is not None
        # A residual keeps the latest tokens only: those before them may be anything.
        missing = segment.tokens - segment.recent.size
        widen = ((0, 0), (0, 0), (missing, 0), (0, 0))
        new = jnp.pad(segment.recent.key, widen), jnp.pad(segment.recent.value, widen)
        raw = residual.window(layer.recent, first, layer.position, new)
    return layer.put(
        Chunk(
            key=segment.key,
            value=segment.value,
            first=first,
            stored=layer.packing.flushed(layer.position + count) - first,
            count=count,
            ok=ok,
            exact=layer.recent is None,
            raw=raw,
        )
    )


def _slots(layer: Layer, tokens: int) -> int:
    """The most slots that `tokens` tokens can fill: whole groups."""
    unit = layer.packing.codec.unit
    return -(-tokens // unit) * unit
