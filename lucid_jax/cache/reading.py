"""What attention and `get` read: `SlotRun`, slots walked block by block, and `Sight`, who sees what.

A layer is one run, or several: quantized slots and a full-precision tail, what was stored before a
chunk and the chunk itself. All is arrays and static facts, nothing a closure: a kernel can take it,
and a backward pass can read it again. Stored positions are int32 [S], [B, S] or [B, H, S].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lucid_jax.cache import derive, tail
from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.codecs import Codec
from lucid_jax.cache.codecs.base import Form, Stored
from lucid_jax.cache.packing import Packed, Tokens, decoded, flushed
from lucid_jax.cache.slots import span
from lucid_jax.cache.tokens import POSITIONS, TokenLayer

if TYPE_CHECKING:
    from lucid_jax.cache.layouts.base import Runs


@struct.dataclass
class SlotMap:
    """Which position each slot holds; live are those in [low, high).

    Slot s holds `held[s]`, or what the layout says came to it last. Where tokens were evicted, those
    positions are counted without the gaps, and `evicted` has the true ones.
    """

    low: jax.Array  # int32 [] or [B]: the first live position
    high: jax.Array  # int32 [] or [B]: one past the last
    start: jax.Array  # int32 [] or [B]: what the layout counts from
    reach: jax.Array  # int32 [] or [B]: positions that ever came
    held: jax.Array | None = None  # int32 [S] or [B, S]; -1 if dead
    evicted: jax.Array | None = None  # int32 (B, H, S)
    layout: Any = struct.field(pytree_node=False, default=None)

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> SlotMap:
            """A copy with some fields changed; flax adds it."""

    @property
    def in_order(self) -> bool:
        """Whether each slot holds the position after that of the slot before."""
        plain = self.held is None and self.evicted is None
        return plain and bool(self.layout.dense)

    def counted(self, begin: jax.Array, size: int) -> jax.Array:
        """Positions of slots [begin, begin + size) without gaps, int32 [S] or [B, S]; live or not."""
        if self.held is not None:
            return lax.dynamic_slice_in_dim(self.held, begin, size, axis=-1)
        return self.at(span(jnp.broadcast_to(begin, self.reach.shape), size))

    def at(self, slot: jax.Array) -> jax.Array:
        """Positions of any slots, int32 [S] or [B, S], without gaps; live or not."""
        return derive.counted(self.layout, slot, self.start, self.reach)

    def is_live(self, counted: jax.Array) -> jax.Array:
        """Whether a token is stored at positions [S] or [B, S]."""
        return (counted >= self.low[..., None]) & (counted < self.high[..., None])

    def positions(self, begin: jax.Array, size: int) -> jax.Array:
        """Absolute positions of slots [begin, begin + size), -1 if dead: [S], [B, S] or [B, H, S]."""
        counted = self.counted(begin, size)
        live = self.is_live(counted)
        if self.evicted is None:
            return jnp.where(live, counted, -1)
        position = lax.dynamic_slice_in_dim(self.evicted, begin, size, axis=2)
        return jnp.where(live.reshape(-1, 1, size), position, -1)


@struct.dataclass
class IndexMap:
    """Where in `get` positions stand."""

    start: jax.Array  # int32 [] or [B]
    position: jax.Array  # int32 [] or [B]
    layout: Any = struct.field(pytree_node=False)

    def of(self, position: jax.Array) -> jax.Array:
        """Index of positions [...] or [B, ...]."""
        return derive.index_of(self.layout, position, self.start, self.position)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Which of a token's two copies a run holds, where the latest are kept in full precision too.

    Attributes:
        tail: tokens that every query reads in full precision.
        group: tokens that are packed together.
        packed: whether the run holds the packed copy.
    """

    tail: int
    group: int
    packed: bool

    def of_run(
        self, query: jax.Array, first: jax.Array, stop: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of positions [first, stop) those that queries read this copy of.

        What was packed when a query was the newest it reads packed.
        """
        packed = flushed(query + 1, self.tail, self.group)
        if self.packed:
            return first, jnp.minimum(stop, packed)
        return jnp.maximum(first, packed), stop


def copy_of(codec: Codec, packed: bool) -> Copy | None:
    """Which of a token's two copies a run holds; None if there is one."""
    return Copy(codec.tail, codec.unit, packed) if codec.tail else None


@struct.dataclass
class SlotRun:
    """Slots that attention walks through."""

    leaves: Packed | None  # by name, (B, H, S, ...)
    buffer: Rows  # where they lie in the leaves
    slots: SlotMap
    index: IndexMap  # which entry of a mask's last axis a token is
    start: jax.Array  # int32 []: the first slot to read
    stop: jax.Array  # int32 []: one past the last
    forms: tuple[tuple[str, Form], ...] = struct.field(pytree_node=False)
    mixed: str = struct.field(pytree_node=False)  # the leaf that values are read from
    size: int = struct.field(pytree_node=False)  # S
    stride: int = struct.field(pytree_node=False)  # tokens that share an entry of the coarsest leaf
    copy: Copy | None = struct.field(pytree_node=False, default=None)
    # Whether slot s is index s.
    in_order: bool = struct.field(pytree_node=False, default=False)

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> SlotRun:
            """A copy with some fields changed; flax adds it."""

    @property
    def key(self) -> Stored:
        """The keys as stored, leaves (B, H, S, ...)."""
        return self._leaf("key")

    @property
    def value(self) -> Stored:
        """What attention mixes, as stored."""
        return self._leaf(self.mixed)

    @property
    def key_form(self) -> Form:
        """How keys are stored."""
        return self.form("key")

    @property
    def value_form(self) -> Form:
        """How what attention mixes is stored."""
        return self.form(self.mixed)

    def _leaf(self, name: str) -> Stored:
        assert self.leaves is not None
        return self.leaves[name]

    def form(self, name: str) -> Form:
        """How a leaf is stored."""
        return dict(self.forms)[name]

    def only(self, names: Collection[str]) -> Packed:
        """Some of its leaves."""
        return {name: self._leaf(name) for name in names}

    def cut(self, leaves: Packed, begin: jax.Array, size: int) -> Packed:
        """Slots [begin, begin + size), whole groups, of leaves like `leaves`."""

        def cut(leaf: jax.Array) -> jax.Array:
            stride = self.size // self.buffer.slots(leaf)
            return self.buffer.read(leaf, begin // stride, size // stride)

        window: Packed = jax.tree.map(cut, leaves)
        return window

    def ends(self) -> jax.Array:
        """Bounds below which all live slots of a row are, int32 [] or [B]."""
        slots = self.slots
        if slots.held is not None:
            return jnp.broadcast_to(self.stop, slots.high.shape)
        used = derive.used(slots.layout, slots.start, slots.high, slots.reach)
        return jnp.minimum(self.stop, used)

    def positions(self, begin: jax.Array, size: int) -> jax.Array:
        """Absolute positions of slots [begin, begin + size); see `SlotMap.positions`."""
        return self.slots.positions(begin, size)

    def index_of_slots(self, begin: jax.Array, size: int) -> jax.Array:
        """Index in `get` of slots [begin, begin + size), int32 [S] or [B, S]."""
        return self.index.of(self.slots.counted(begin, size))


@struct.dataclass
class Sight:
    """Stored tokens that queries may see, and where both stand in the cache, for RoPE by index."""

    query_index: jax.Array  # int32 [T] or [B, T]: indices of the queries
    key_from: jax.Array  # int32 [] or [B]: a stored token's index is its position less this
    layout: Any = struct.field(pytree_node=False)
    run: int | None = struct.field(pytree_node=False, default=None)  # of `kept`; None: all of them
    # Only the first so many slots of the layer can hold such tokens; None if any can.
    slots: int | None = struct.field(pytree_node=False, default=None)

    def runs_seen(self, query: jax.Array) -> Runs:
        """Runs of positions [first, stop) that queries see of what is stored."""
        return derive.runs_seen(self.layout, query, self.run)

    def key_index(self, counted: jax.Array) -> jax.Array:
        """Indices of stored tokens, from their positions without gaps, int32 [S] or [B, S]."""
        return counted - self.key_from[..., None]


def sights(layer: TokenLayer, query: jax.Array, by_index: bool) -> list[Sight]:
    """What queries at absolute positions [T] or [B, T] see; run by run where RoPE goes by index."""
    layout = layer.layout
    if not by_index:
        return [Sight(query, jnp.zeros_like(layer.start), layout)]
    start = derive.along(layer.start, query)
    runs = layout.kept(start, query + 1)
    counts = [jnp.maximum(stop - first, 0) for first, stop in runs]
    index = sum(counts[1:], counts[0]) - 1  # of the query, in what the cache was with it
    found, before = [], jnp.zeros_like(query)
    for i, ((first, _), count) in enumerate(zip(runs, counts, strict=True)):
        last = i == len(runs) - 1
        # Angles are of distances: counted from the oldest query's own they stay small.
        base = jnp.broadcast_to(first, query.shape).min(axis=-1 if layer.ragged else None)
        at = index - before + first - derive.along(base, query)
        run = None if len(runs) == 1 else i
        found.append(Sight(at, base, layout, run, None if last else layout.pinned))
        before = before + count
    return found[::-1]


def slot_runs(layer: TokenLayer) -> list[SlotRun]:
    """What is stored, for attention to walk through."""
    packing, codec = layer.packing, layer.packing.codec
    packed = slot_run_of(
        layer,
        layer.stored,
        packing.forms,
        slot_map(layer),
        layer.slots_in_use(),
        copy=copy_of(codec, packed=True),
        in_order=layer.in_order,
    )
    if layer.tail is None:
        return [packed]
    size = layer.buffer.slots(next(iter(layer.tail.values())))
    around = SlotMap(
        layer.start, layer.position, layer.start, layer.reach, layout=tail.Around(size)
    )
    latest = slot_run_of(
        layer,
        layer.tail,
        packing.raw_forms,
        around,
        jnp.minimum(jnp.max(layer.reach), size),
        copy=copy_of(codec, packed=False),
    )
    return [packed, latest]


def slot_map(layer: TokenLayer) -> SlotMap:
    """Which positions the slots hold; of tokens that a tail has too, those that are packed."""
    return SlotMap(
        layer.start,
        layer.packing.flushed(layer.position),
        layer.start,
        layer.packed_reach(),
        evicted=layer.buffer.own(layer.leaves[POSITIONS]) if layer.tracked else None,
        layout=layer.layout,
    )


def index_map(layer: TokenLayer) -> IndexMap:
    """Where in `get` positions stand."""
    return IndexMap(layer.start, layer.position, layer.layout)


def slot_run_of(
    layer: TokenLayer,
    leaves: Packed,
    forms: dict[str, Form],
    slots: SlotMap,
    stop: jax.Array,
    buffer: Rows | None = None,
    **facts: Any,
) -> SlotRun:
    """Some tokens of a layer as a run that is read from its first slot on."""
    buffer = layer.buffer if buffer is None else buffer
    sizes = [buffer.slots(leaf) for leaf in jax.tree.leaves(leaves)]
    return SlotRun(
        leaves,
        buffer=buffer,
        slots=slots,
        index=index_map(layer),
        start=jnp.int32(0),
        stop=stop,
        forms=tuple(forms.items()),
        mixed=layer.packing.mixed,
        size=max(sizes),
        stride=max(sizes) // min(sizes),
        **facts,
    )


def tokens(layer: TokenLayer) -> Tokens:
    """Each leaf decoded, oldest first, (B, H, C, D); what is not live may be anything."""
    packing, buffer = layer.packing, layer.buffer
    if layer.in_order:

        def own(leaf: jax.Array) -> jax.Array:
            return buffer.own(leaf)[:, :, : layer.capacity]

        return decoded(packing.forms, jax.tree.map(own, layer.stored))
    position = layer.position_of(span(jnp.zeros_like(layer.position), layer.capacity))
    slot = layer.slot_of(position)
    found = {
        name: Rows().take(form.decode(jax.tree.map(buffer.own, layer.leaves[name])), slot)
        for name, form in packing.forms.items()
    }
    if layer.tail is None:
        return found
    size = buffer.slots(next(iter(layer.tail.values())))
    fresh = position >= packing.flushed(layer.position)[..., None]
    fresh = fresh.reshape(-1, 1, layer.capacity, 1)
    return {
        name: jnp.where(
            fresh, form.decode(buffer.take(layer.tail[name], position % size)), found[name]
        )
        for name, form in packing.raw_forms.items()
    }
