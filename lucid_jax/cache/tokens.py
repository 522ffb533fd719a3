"""`TokenLayer`: the layer state of tokens, and the verbs that a layer of any kind answers.

A dict of leaves as the codec stores them, each (B, H, S, ...), and counters that are [] while all rows
advance together and [B] when ragged. Where in S a token lives is the layout's to say, where in an
array a row's slots lie the buffer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import checkify

from lucid_jax.cache import derive
from lucid_jax.cache.allocation import INT32_MAX
from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.packing import Packed, Packing
from lucid_jax.cache.shown import layer_text
from lucid_jax.cache.slots import last_wins, span

if TYPE_CHECKING:
    from lucid_jax.cache.layouts.base import LayerSpec, Layout

POSITIONS = "positions"  # the leaf, int32 (B, H, S), that says where evicted tokens left gaps
_COUNTERS = ("start", "position", "reach", "overflowed", "floor")


@struct.dataclass(repr=False)
class TokenLayer:
    """State of one layer's cache: a frozen pytree.

    `position - start` tokens came since the oldest that crop left; a window or an eviction may have
    dropped some, so the length is the layout's to say. Crop raises `start`; append and rollback move
    `position` alone. Where tokens were evicted, positions are counted without the gaps; the leaf
    `positions` has the true ones.
    """

    leaves: Packed  # by name, (B, H, S, ...): as the codec stores tokens; see `Packing.dims`
    tail: dict[str, jax.Array] | None  # the latest tokens in full precision; see tail.py
    start: jax.Array  # int32 [] or [B]: absolute position of the oldest token not cropped
    position: jax.Array  # int32 [] or [B]: tokens ever seen, the next absolute position
    reach: jax.Array  # int32 [] or [B]: largest position ever; what rollback left lies below
    overflowed: jax.Array  # bool [] or [B]: sticky, a traced operation asked for the impossible
    floor: jax.Array | None  # int32 [] or [B], if tracked: position at the latest eviction
    buffer: Rows  # where rows' slots lie in the leaves
    spec: LayerSpec = struct.field(pytree_node=False)  # what it was made from
    layout: Layout = struct.field(pytree_node=False)  # where in a row tokens lie
    packing: Packing = struct.field(pytree_node=False)
    # Whether operations tell checkify what did not fit; see `lucid_jax.checked`.
    checked: bool = struct.field(pytree_node=False, kw_only=True, default=False)

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""

    def __repr__(self) -> str:
        return layer_text(self)

    # --- facts ---------------------------------------------------------------------------------

    @property
    def key(self) -> Any:
        """The keys as stored, leaves (B, H, S, ...)."""
        return self.leaves["key"]

    @property
    def value(self) -> Any:
        """The values as stored, leaves (B, H, S, ...)."""
        return self.leaves["value"]

    @property
    def stored(self) -> Packed:
        """The leaves that the codec stores: all but what the layer keeps beside them."""
        return {name: self.leaves[name] for name in self.packing.names}

    @property
    def ragged(self) -> bool:
        """Whether each row has its own length."""
        return self.position.ndim > self.buffer.counter_lead

    @property
    def stacked(self) -> bool:
        """Whether this is a stack of several layers; see stacked.py."""
        return self.buffer.counter_lead > 0

    @property
    def has_shapes(self) -> bool:
        """Whether leaves are arrays, or at least their shapes."""
        leaves = jax.tree.leaves(self.leaves)
        return bool(leaves) and all(getattr(leaf, "ndim", 0) >= 3 for leaf in leaves)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.buffer.sizes(jax.tree.leaves(self.leaves[self.packing.mixed])[0])

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self._sizes[0]

    @property
    def num_kv_heads(self) -> int:
        """H, the number of key/value heads."""
        return self._sizes[1]

    @property
    def num_slots(self) -> int:
        """Physical token slots; some layouts need more than the tokens they promise to hold."""
        return self._sizes[2]

    def stride(self, leaf: jax.Array) -> int:
        """Tokens that share an entry of a leaf."""
        return self.num_slots // self.buffer.slots(leaf)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the tokens that go in and come out."""
        return jnp.dtype(self.packing.dtype)

    @property
    def capacity(self) -> int:
        """C, the most tokens a row holds: the seq axis of `get`."""
        return self.layout.capacity

    @property
    def length(self) -> jax.Array:
        """Tokens stored now, int32 [] or [B]."""
        return derive.length(self.layout, self.start, self.position)

    @property
    def bounded(self) -> bool:
        """Whether appending past the capacity is refused."""
        return self.layout.slack is None

    @property
    def lookback(self) -> int | None:
        """Tokens that can be rolled back whatever came before; None if every stored one can.

        A chunk of `lookback + 1` tokens leaves all that its own queries may see.
        """
        bounds = [x for x in (self.layout.slack, self.packing.codec.tail or None) if x is not None]
        return min(bounds, default=None)

    @property
    def in_order(self) -> bool:
        """Whether slot i is index i of `get`."""
        return self.layout.dense and self.packing.codec.unit == 1

    @property
    def tracked(self) -> bool:
        """Whether each token's position is kept beside it."""
        return POSITIONS in self.leaves

    def counters(self) -> dict[str, jax.Array]:
        """All that is not tokens, by name: what lengths, positions and flags follow from."""
        each = {name: getattr(self, name) for name in _COUNTERS}
        return {name: counter for name, counter in each.items() if counter is not None}

    def length_on_host(self) -> np.ndarray:
        """`length` of a concrete layer, int32 [] or [B], also while something else is traced."""
        if self.layout.dense:  # by NumPy, in a tenth of the time
            length: np.ndarray = np.asarray(self.position) - np.asarray(self.start)
            return length
        with jax.ensure_compile_time_eval():
            return np.asarray(self.length)

    def positions_left(self) -> np.ndarray:
        """How many more positions int32 can count, of a concrete layer: int32 [] or [B]."""
        return INT32_MAX - np.asarray(self.position)

    # --- where tokens are ----------------------------------------------------------------------

    def slot_of(self, position: jax.Array) -> jax.Array:
        """The slot of an absolute position, int32 of the same shape, [...] or [B, ...]."""
        return self.layout.slot(position, derive.along(self.start, position))

    def position_of(self, index: jax.Array) -> jax.Array:
        """Position of an index in `get`, int32 [...] or [B, ...]; counted without gaps."""
        return derive.position_of(self.layout, index, self.start, self.position)

    def packed_reach(self) -> jax.Array:
        """How many positions ever came to slots, int32 [] or [B]."""
        return self.packing.flushed(self.reach)

    def slots_in_use(self) -> jax.Array:
        """A bound below which all live slots are, int32 []: it follows length, not capacity."""
        return jnp.max(derive.used(self.layout, self.start, self.position, self.reach))

    def first_slot(self, oldest: jax.Array) -> jax.Array:
        """The first slot, int32 [], that may hold a token at position `oldest` ([] or [B]) or later.

        Where some were evicted, the others only moved further down.
        """
        if not self.layout.dense:
            first: jax.Array = jnp.int32(0)
            return first
        return jnp.clip(jnp.min(self.slot_of(oldest)), 0, self.slots_in_use())

    def valid(self) -> jax.Array:
        """Which indices of `get` hold a live token: bool [C] or [B, C]."""
        index = span(jnp.zeros_like(self.position), self.capacity)
        return index < self.length[..., None]

    def stored_positions(self) -> jax.Array:
        """Absolute positions of the tokens of `get`, -1 where none is: [C], [B, C] or [B, H, C]."""
        if self.tracked:
            live = self.valid().reshape(-1, 1, self.capacity)
            own = self.buffer.own(self.leaves[POSITIONS])
            return jnp.where(live, own[:, :, : self.capacity], -1)
        index = span(jnp.zeros_like(self.position), self.capacity)
        return jnp.where(self.valid(), self.position_of(index), -1)

    # --- counting ------------------------------------------------------------------------------

    def flag(self, ok: jax.Array, what: str) -> jax.Array:
        """The sticky flag after an operation that was possible where `ok` (bool [] or [B])."""
        if self.checked:
            checkify.debug_check(jnp.all(ok), what)
        return self.overflowed | ~ok

    def countable(self, count: jax.Array) -> jax.Array:
        """Whether int32 can count the positions of `count` (int32 [] or [B]) more tokens."""
        return count <= INT32_MAX - self.position

    def fits(self, count: jax.Array) -> jax.Array:
        """Whether `count` (int32 [] or [B]) more tokens can be appended."""
        ok = self.countable(count)
        return (count <= self.capacity - self.length) & ok if self.bounded else ok

    def advanced(self, by: jax.Array, ok: jax.Array, what: str) -> Self:
        """Counters after `by` more tokens came where `ok`."""
        position = self.position + jnp.where(ok, by, 0)
        reach = jnp.maximum(self.reach, position)
        # What always holds makes a chain of all three: XLA for GPUs computes scalars in one kernel
        # only if each is an operand of the next.
        overflowed = self.flag(ok, what) & (reach >= position)
        return self.replace(position=position, reach=reach, overflowed=overflowed)

    # --- what every layer state answers --------------------------------------------------------

    def can_rollback(self, n: jax.Array) -> jax.Array:
        """Whether the latest `n` tokens (int32 [] or [B]) can be dropped as if they never came."""
        position = self.position - n
        return (n >= 0) & (position >= self.start) & self.intact(position)

    def intact(self, position: jax.Array, window: int | None = None) -> jax.Array:
        """Whether all is still there that was seen when `position` tokens had come.

        Or, of that, the latest `window` positions.
        """
        packed = self.packing.flushed(position)
        if self.layout.slack is None:
            ok = self.overflowed | True  # of its shape and sharding
        else:
            reach = self.packed_reach()
            ok = derive.retained(self.layout, self.start, position, packed, reach, window)
        if self.floor is not None:
            ok = ok & (position >= self.floor)
        if self.tail is None:
            return ok
        oldest = jnp.maximum(packed, self.start)
        size = self.buffer.slots(next(iter(self.tail.values())))
        return ok & ((oldest >= self.reach - size) | (position <= self.start))

    def answers(self, queries: jax.Array, window: int | None = None) -> jax.Array:
        """Whether the latest `queries` tokens, int32 [] or [B], can all still see what they should.

        That is what the layer keeps, or of that the latest `window` positions.
        """
        return (queries <= 1) | self.intact(self.position - queries + 1, window)

    def rollback(self, n: jax.Array) -> Self:
        """Drops the latest `n` tokens (int32 [] or [B]) where that can be done exactly."""
        ok = self.can_rollback(n)
        layer = self.advanced(
            -n, ok, "rollback of more tokens than this layer can bring back; nothing was dropped"
        )
        # What was overwritten no longer matters, and slots are told apart by the new tokens only.
        afresh = ok & layer.empty_at(layer.position)
        return layer.replace(reach=jnp.where(afresh, layer.position, layer.reach))

    def empty_at(self, position: jax.Array) -> jax.Array:
        """Whether a layer at an earlier `position` would have nothing in its rings."""
        nothing = position <= self.start
        # Pinned tokens are in no ring, but their tail is.
        if self.tail is not None or not self.layout.pinned:
            return nothing
        return nothing | (position <= self.layout.pinned)

    def crop(self, max_length: jax.Array) -> Self:
        """Keeps the latest `max_length` tokens (int32 []); a negative number crops nothing."""
        ok = jnp.broadcast_to(max_length >= 0, self.overflowed.shape)
        everything = jnp.int32(jnp.iinfo(jnp.int32).max)
        most = jnp.where(max_length >= 0, max_length, everything)
        start = derive.oldest_kept(self.layout, self.start, self.position, most)
        flag = self.flag(ok, "crop to a negative length; nothing was dropped")
        return self._from(start).replace(overflowed=flag)

    def _from(self, start: jax.Array) -> Self:
        """This layer without what is before `start`; where slots are dense the rest moves down."""
        if not self.layout.dense:
            return self.replace(start=start)
        slot = self.layout.slot
        shift = slot(start, self.start) - slot(start, start)
        kept = jnp.where(start < self.position, slot(self.position - 1, start) + 1, 0)

        def pull(leaf: jax.Array) -> jax.Array:
            stride = self.stride(leaf)
            return self.buffer.shift_left(leaf, shift // stride, -(-kept // stride))

        return self.replace(leaves=jax.tree.map(pull, self.leaves), start=start)

    def select(self, rows: jax.Array, since: jax.Array | None = None) -> Self:
        """Gathers batch rows, int32 [B']; a row out of range is clamped and flagged.

        With `since`, int32 [] or [B], row i and row `rows[i]` hold the same tokens before that
        absolute position, and those need not move.
        """
        ok = (rows >= 0) & (rows < self.batch_size)
        chosen = self._gathered(jnp.clip(rows, 0, self.batch_size - 1), since)
        ok = ok if self.ragged else jnp.all(ok)
        return chosen.replace(
            overflowed=chosen.flag(ok, "selection of a row that is not in the batch")
        )

    def _gathered(self, rows: jax.Array, since: jax.Array | None) -> Self:
        """Gathers batch rows, int32 [B'], each in [0, B). Only slots in use move; see `select`."""
        used = self.slots_in_use()
        first: jax.Array | None = None
        if since is not None:
            # Of two rows with a tail the shorter may not have packed yet what they share.
            since = jnp.minimum(since, self.packing.flushed(jnp.min(self.position)))
            since = jnp.broadcast_to(since, rows.shape) if self.ragged else jnp.min(since)
            # A group of tokens is one: what came after `since` has a say in all its numbers.
            first = self.first_slot(since) // self.packing.codec.unit * self.packing.codec.unit

        def gather(leaf: jax.Array) -> jax.Array:
            stride = self.stride(leaf)
            start = None if first is None else first // stride
            return self.buffer.select(leaf, rows, -(-used // stride), start)

        def gather_whole(leaf: jax.Array) -> jax.Array:  # a ring may be in use up to its end
            return self.buffer.select(leaf, rows, jnp.int32(self.buffer.slots(leaf)))

        counters = self.counters()
        if self.ragged:
            counters = {n: jnp.take(x, rows, mode="clip") for n, x in counters.items()}
        return self.replace(
            leaves=jax.tree.map(gather, self.leaves),
            tail=jax.tree.map(gather_whole, self.tail),
            **counters,
        )

    def put_rows(self, rows: jax.Array, other: TokenLayer) -> Self:
        """This layer with rows `rows`, int32 [B'], replaced by those of a layer with like leaves.

        Only slots in use move. A row out of range, or one that does not fit, stays as it was and is
        flagged. The other layer may have fewer or more slots, or be aligned.
        """
        inside = (rows >= 0) & (rows < self.batch_size)
        taken = inside & (other.length <= self.capacity)
        # Of rows that are named twice, as a traced caller may, the last wins in every leaf.
        target = last_wins(jnp.where(taken, rows, self.batch_size), dropped=self.batch_size)
        used = jnp.minimum(other.slots_in_use(), self.num_slots)

        def move(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return self.buffer.put(leaf, new, target, -(-used // self.stride(leaf)))

        def move_whole(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return self.buffer.put(leaf, new, target, jnp.int32(self.buffer.slots(leaf)))

        changes: dict[str, Any] = {
            "leaves": jax.tree.map(move, self.leaves, other.leaves),
            "tail": jax.tree.map(move_whole, self.tail, other.tail),
        }
        theirs = other.counters()
        for name, counter in self.counters().items():
            new = jnp.broadcast_to(theirs[name], rows.shape)
            changes[name] = counter.at[target].set(new, mode="drop")
        refused = jnp.zeros(self.batch_size, bool)
        refused = refused.at[jnp.where(inside & ~taken, rows, self.batch_size)].set(
            True, mode="drop"
        )
        # A row that does not exist is nobody's: every row says so.
        ok = ~refused & jnp.all(inside)
        layer = self.replace(**changes)
        return layer.replace(overflowed=layer.flag(ok, "insertion of rows that do not fit"))

    def free(self, gone: jax.Array) -> Self:
        """Empties the rows where `gone`, bool [B]."""
        empty, own = self.reset().counters(), self.counters()
        return self.replace(**{name: jnp.where(gone, empty[name], own[name]) for name in own})

    def reset(self) -> Self:
        """Empties the layer; buffers are kept and what they hold is never seen again."""
        # Chosen rather than made: zeros by themselves would not lie where divided counters do.
        counters = self.counters().items()
        return self.replace(**{n: jnp.where(True, jnp.zeros_like(x), x) for n, x in counters})
