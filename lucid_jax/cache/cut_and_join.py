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

from lucid_jax.cache import tail
from lucid_jax.cache.append import Chunk, put
from lucid_jax.cache.mesh_programs import in_auto_axes
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.slots import span
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tail import Raw
from lucid_jax.cache.tokens import TokenLayer


@struct.dataclass
class Segment:
    """What `tokens` consecutive tokens added to one layer."""

    leaves: Packed  # by name, (B, H, n, ...): the slots they filled, whole groups of the codec
    tail: Raw | None  # with a tail, the latest of them in full precision
    tokens: int = struct.field(pytree_node=False)


@partial(jax.jit, static_argnums=1)
@in_auto_axes
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
    return tuple(_cut(state.layer(owner), tokens) for owner in state.owners)


@partial(jax.jit, donate_argnums=0)
@in_auto_axes
def join(state: CacheState, segments: tuple[Segment, ...]) -> CacheState:
    """Appends what `cut` gave to a state of the same layers that stands where the segments began.

    All or nothing, as `update` inside `jit`: what does not fit sets `overflowed`. The state is
    donated.
    """
    for owner, segment in zip(state.owners, segments, strict=True):
        state = state.with_layer(owner, _join(state.layer(owner), segment))
    return state


def _cut(layer: TokenLayer, tokens: int) -> Segment:
    # Of a codec with a tail these are the tokens that moved from it into slots meanwhile.
    first = layer.packing.flushed(layer.position - tokens)
    slot = layer.slot_of(span(first, _slots(layer, tokens)))

    def read(leaf: jax.Array) -> jax.Array:
        stride = layer.stride(leaf)
        return layer.buffer.take(leaf, slot[..., ::stride] // stride)

    last = layer.tail
    if last is not None:
        size = layer.buffer.slots(next(iter(last.values())))
        held = min(tokens, size)
        latest = span(layer.position - held, held) % size
        last = jax.tree.map(lambda leaf: layer.buffer.take(leaf, latest), last)
    return Segment(leaves=jax.tree.map(read, layer.stored), tail=last, tokens=tokens)


def _join(layer: TokenLayer, segment: Segment) -> TokenLayer:
    count = jnp.full_like(layer.position, segment.tokens)
    ok = layer.fits(count)
    count = jnp.where(ok, count, 0)
    first = layer.packing.flushed(layer.position)
    raw: Any = None
    if layer.tail is not None:
        assert segment.tail is not None
        # A tail keeps the latest tokens only: those before them may be anything.
        missing = segment.tokens - tail.size_of(segment.tail)
        widen = ((0, 0), (0, 0), (missing, 0), (0, 0))
        raw = {name: jnp.pad(x, widen) for name, x in segment.tail.items()}
    return put(
        layer,
        Chunk(
            leaves=segment.leaves,
            first=first,
            stored=layer.packing.flushed(layer.position + count) - first,
            count=count,
            ok=ok,
            exact=layer.tail is None,
            raw=raw,
        ),
    )


def _slots(layer: TokenLayer, tokens: int) -> int:
    """The most slots that `tokens` tokens can fill: whole groups."""
    unit = layer.packing.codec.unit
    return -(-tokens // unit) * unit
