"""What a layer state is: the fields every layout has, and the length/position arithmetic, written once.

A layer state holds keys and values as its codec stores them, leaves (B, H, C, ...), and counters that
are `[]` while all rows advance together and `[B]` when ragged. A layout (contiguous, ring, ...)
decides where in C a token lives; nothing outside its module knows.
"""

from __future__ import annotations

import abc
import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import checkify

from lucid_jax.cache import residual, slots
from lucid_jax.cache.checks import is_traced
from lucid_jax.cache.codec import Codec, Identity
from lucid_jax.cache.forms import Form, Raw, Stored
from lucid_jax.cache.part import Part, Region
from lucid_jax.cache.residual import Recent

_COUNTERS = ("start", "position", "reach", "overflowed")


@dataclasses.dataclass(frozen=True)
class Packing:
    """A codec bound to the tokens of one layer.

    Attributes:
        codec: what the user chose.
        dtype: name of the tokens' dtype.
        head_dim: D, of keys.
        value_head_dim: Dv, of values.
    """

    codec: Codec
    dtype: str
    head_dim: int
    value_head_dim: int

    @cached_property
    def forms(self) -> tuple[Form, Form]:
        """How keys and values are stored."""
        return self.codec.forms(self.dtype, self.head_dim, self.value_head_dim)

    @cached_property
    def raw_forms(self) -> tuple[Form, Form]:
        """How they are stored in full precision."""
        return Raw(self.dtype, self.head_dim), Raw(self.dtype, self.value_head_dim)

    def flushed(self, position: jax.Array) -> jax.Array:
        """Of the tokens before `position`, how many are in slots, and not only in the residual."""
        if not self.codec.residual:
            return position
        group = jnp.int32(self.codec.unit)
        return jnp.maximum((position - self.codec.residual) // group * group, 0)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens ready to be stored, as attention may read them and `Layer.put` takes them.

    Attributes:
        key: W encoded keys, of consecutive positions.
        value: W encoded values.
        first: absolute position of the first of them, int32 [] or [B].
        stored: how many of them go into slots now, int32 [] or [B].
        count: tokens this chunk appends, int32 [] or [B].
        ok: bool [] or [B]; where False nothing is stored.
        exact: whether all W go into slots wherever ok.
        raw: with a residual, the tokens (key, value) from `first` on in full precision.
    """

    key: Stored
    value: Stored
    first: jax.Array
    stored: jax.Array
    count: jax.Array
    ok: jax.Array
    exact: bool
    raw: tuple[jax.Array, jax.Array] | None


@struct.dataclass(repr=False)
class Layer(abc.ABC):
    """State of one layer's cache: a frozen pytree.

    `position - start` tokens came since the oldest that crop left; a window or an eviction may have
    dropped some, so the length is the layout's to say. Crop raises `start`; append and rollback move
    `position` alone.
    """

    key: Stored  # leaves (B, H, C, ...): as the codec stores keys of width D
    value: Stored  # leaves (B, H, C, ...): as the codec stores values of width Dv
    recent: Recent | None  # the latest tokens in full precision, if the codec has a residual
    start: jax.Array  # int32 [] or [B]: absolute position of the oldest token not cropped
    position: jax.Array  # int32 [] or [B]: tokens ever seen, the next absolute position
    reach: jax.Array  # int32 [] or [B]: largest position ever; what rollback left lies below
    overflowed: jax.Array  # bool [] or [B]: sticky, a traced operation asked for the impossible
    spec: Any = struct.field(pytree_node=False)  # the LayerSpec it was made from
    packing: Packing = struct.field(pytree_node=False)
    # Whether operations tell checkify what did not fit; see `lucid_jax.checked`.
    checked: bool = struct.field(pytree_node=False, kw_only=True, default=False)

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""

    def __repr__(self) -> str:
        """Sizes rather than megabytes of numbers."""
        sizes = f"B={self.batch_size}, H={self.num_kv_heads}, C={self.capacity}"
        length: Any = "traced"
        leaves = jax.tree.leaves(self)
        if all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves):
            if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
                length = "donated"
            elif not is_traced(leaves):
                length = self.length_on_host().tolist()
        dims = f"D={self.packing.head_dim}"
        return f"{type(self).__name__}({self.spec}, {sizes}, {dims}, {self.dtype}, length={length})"

    # --- facts ---------------------------------------------------------------------------------

    @property
    def ragged(self) -> bool:
        """Whether each row has its own length."""
        return self.position.ndim == 1

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return jax.tree.leaves(self.value)[0].shape[0]

    @property
    def num_kv_heads(self) -> int:
        """H, the number of key/value heads."""
        return jax.tree.leaves(self.value)[0].shape[1]

    @property
    def num_slots(self) -> int:
        """Physical token slots; some layouts need more than the tokens they promise to hold."""
        return jax.tree.leaves(self.value)[0].shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the tokens that go in and come out."""
        return jnp.dtype(self.packing.dtype)

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """C, the most tokens a row holds: the seq axis of `get`."""

    @property
    @abc.abstractmethod
    def length(self) -> jax.Array:
        """Tokens stored now, int32 [] or [B]."""

    @property
    def bounded(self) -> bool:
        """Whether appending past the capacity is refused."""
        return True

    @property
    def in_order(self) -> bool:
        """Whether slot i is index i of `get`."""
        return False

    @property
    def has_places(self) -> bool:
        """Whether an index of `get` is one absolute position, the same in all heads."""
        return True

    def length_on_host(self) -> np.ndarray:
        """`length` of a concrete layer, int32 [] or [B], also while something else is traced."""
        with jax.ensure_compile_time_eval():
            return np.asarray(self.length)

    @property
    @abc.abstractmethod
    def lookback(self) -> int | None:
        """Tokens that can be rolled back whatever came before; None if every stored one can.

        A chunk of `lookback + 1` tokens leaves all that its own queries may see.
        """

    # --- what a layout decides -----------------------------------------------------------------

    @abc.abstractmethod
    def fits(self, count: jax.Array) -> jax.Array:
        """Whether `count` (int32 [] or [B]) more tokens can be appended."""

    @abc.abstractmethod
    def put(self, chunk: Chunk) -> Self:
        """Stores a chunk's tokens and counts them."""

    @abc.abstractmethod
    def write(
        self, key: jax.Array, value: jax.Array, index: jax.Array, counts: jax.Array | None
    ) -> Self:
        """Writes T tokens at stored index [T] or [B, T] (0 is the oldest stored token)."""

    @abc.abstractmethod
    def keep_latest(self, max_length: jax.Array) -> Self:
        """Keeps the latest `max_length` tokens (int32 [], >= 0); positions stay as they are."""

    @abc.abstractmethod
    def slot_of(self, position: jax.Array) -> jax.Array:
        """The slot of an absolute position, int32 of the same shape, [...] or [B, ...]."""

    @abc.abstractmethod
    def index_of(self, position: jax.Array) -> jax.Array:
        """Index in `get` of an absolute position, int32 [...] or [B, ...]."""

    @abc.abstractmethod
    def position_of(self, index: jax.Array) -> jax.Array:
        """Absolute position of an index in `get`, int32 [...] or [B, ...]."""

    @abc.abstractmethod
    def slot_positions(self, begin: jax.Array, size: int) -> jax.Array:
        """Absolute positions of slots [begin, begin + size), -1 if dead: [S], [B, S] or [B, H, S].

        A slot is live that holds a token not cropped nor rolled back, if outside the window.
        """

    def stored_positions(self) -> jax.Array:
        """Absolute positions of the tokens of `get`, -1 where none is: [C], [B, C] or [B, H, C]."""
        index = slots.span(jnp.zeros_like(self.position), self.capacity)
        return jnp.where(self.valid(), self.position_of(index), -1)

    @abc.abstractmethod
    def slots_in_use(self) -> jax.Array:
        """A bound below which all live slots are, int32 []: it follows length, not capacity."""

    def first_slot(self, oldest: jax.Array) -> jax.Array:
        """The first slot, int32 [], that may hold a token at position `oldest` ([] or [B]) or later."""
        return jnp.int32(0)

    @abc.abstractmethod
    def regions(self, query: jax.Array, by_place: bool) -> list[Region]:
        """What queries at absolute positions [T] or [B, T] see; apart where RoPE by place differs."""

    @abc.abstractmethod
    def retained(self, position: jax.Array) -> jax.Array:
        """Whether all slots are still there that a layer at an earlier `position` would have."""

    def with_room(self, need: int) -> Self | None:
        """A copy with at least `need` slots, made on the host; None where the layout cannot grow."""
        return None

    # --- appending -----------------------------------------------------------------------------

    def append(self, key: jax.Array, value: jax.Array, counts: jax.Array | None) -> Self:
        """Appends T tokens, or the first `counts` int32 [B] of each row's T; all or nothing."""
        return self.put(self.take_in(key, value, counts))

    def take_in(self, key: jax.Array, value: jax.Array, counts: jax.Array | None) -> Chunk:
        """Encodes T new tokens to follow what is stored."""
        tokens = key.shape[2]
        count = jnp.full_like(self.position, tokens) if counts is None else counts
        ok = (count >= 0) & (count <= tokens) & self.fits(count)
        count = jnp.where(ok, count, 0)
        key_form, value_form = self.packing.forms
        if self.recent is None:
            return Chunk(
                key=key_form.encode(key),
                value=value_form.encode(value),
                first=self.position,
                stored=count,
                count=count,
                ok=ok,
                exact=counts is None,
                raw=None,
            )
        flushed = self.packing.flushed(self.position)
        raw = residual.window(self.recent, flushed, self.position, self._as_raw(key, value))
        window = residual.whole_groups(raw, flushed, self.start, self.packing.codec.unit, tokens)
        keys, values = (
            form.decode(x) for form, x in zip(self.packing.raw_forms, window, strict=True)
        )
        return Chunk(
            key=key_form.encode(keys),
            value=value_form.encode(values),
            first=flushed,
            stored=self.packing.flushed(self.position + count) - flushed,
            count=count,
            ok=ok,
            exact=False,
            raw=raw,
        )

    def named(
        self, index: jax.Array, counts: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `write` is asked for, with T places, int32 [T] or [B, T].

        Returns:
            The places, [B, T] if rows are independent; which of them are of real tokens, bool alike;
            and whether `counts` make sense, bool [] or [B].
        """
        tokens = index.shape[-1]
        if self.ragged and index.ndim == 1:
            index = jnp.broadcast_to(index, (self.batch_size, tokens))
        real, ok = jnp.ones(index.shape, bool), jnp.ones_like(self.overflowed)
        if counts is not None:
            real = slots.span(jnp.zeros_like(counts), tokens) < counts[:, None]
            ok = (counts >= 0) & (counts <= tokens)
        return index, real, ok

    def _as_raw(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_form, value_form = self.packing.raw_forms
        return key_form.encode(key), value_form.encode(value)

    def counted(self, chunk: Chunk) -> Self:
        """Counters and residual after a chunk; slots untouched."""
        recent = self.recent
        if recent is not None:
            assert chunk.raw is not None
            recent = residual.put(recent, chunk.raw, chunk.first, self.position, chunk.count)
        return self.replace(recent=recent).advanced(
            chunk.count,
            chunk.ok,
            f"append past the capacity of {self.capacity}; nothing was written",
        )

    def advanced(self, by: jax.Array, ok: jax.Array, what: str) -> Self:
        """Counters after `by` more tokens came where `ok`."""
        position = self.position + jnp.where(ok, by, 0)
        return self.replace(
            position=position,
            reach=jnp.maximum(self.reach, position),
            overflowed=self.flag(ok, what),
        )

    # --- reading -------------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """What is stored, for attention to walk through."""
        slots_part = self._slots_part()
        if self.recent is None:
            return [slots_part]
        recent = Part(
            *(self.recent.key, self.recent.value),
            *self.packing.raw_forms,
            size=self.recent.size,
            start=jnp.int32(0),
            stop=jnp.minimum(jnp.max(self.reach), self.recent.size),
            positions=self._recent_positions,
            index=lambda begin, size: self.index_of(self._recent_positions(begin, size)),
            visible=self._seen_raw,
        )
        return [slots_part, recent]

    def put_and_parts(self, chunk: Chunk) -> tuple[Self, list[Part]]:
        """`put`, and all that the chunk's queries may see, what is overwritten included.

        What is overwritten is read out first. Masks count slots of the old layer's `get`, and then
        the chunk's tokens.
        """
        lost = self.overwritten_by(chunk)
        layer = self.put(chunk)
        part = layer._slots_part()
        index = lambda begin, size: self.index_of(part.positions(begin, size))  # noqa: E731
        parts = [dataclasses.replace(part, index=index, in_order=False), *lost]
        if chunk.raw is not None:
            end = self.position + chunk.count
            raw = self.run(chunk.raw, self.packing.raw_forms, chunk.first, end)
            parts.append(dataclasses.replace(raw, visible=self._seen_raw))
        return layer, parts

    def overwritten_by(self, chunk: Chunk) -> list[Part]:
        """What `put` will leave no trace of, though queries of the chunk may see it."""
        return []

    def run(
        self, tokens: tuple[Stored, Stored], forms: tuple[Form, Form], first: jax.Array, stop: Any
    ) -> Part:
        """Tokens of consecutive positions from `first` on as a part; live are those before `stop`."""

        def positions(begin: jax.Array, size: int) -> jax.Array:
            position = slots.span(first + begin, size)
            live = (position < stop[..., None]) & (position >= self.start[..., None])
            return jnp.where(live, position, -1)

        return Part(
            *tokens,
            *forms,
            size=jax.tree.leaves(tokens[1])[0].shape[2],
            start=jnp.int32(0),
            stop=jnp.max(stop - first),
            positions=positions,
            index=lambda begin, size: self.index_of(slots.span(first + begin, size)),
        )

    def _slots_part(self) -> Part:
        def positions(begin: jax.Array, size: int) -> jax.Array:
            position = self.slot_positions(begin, size)
            if self.recent is None:
                return position
            flushed = self.packing.flushed(self.position)
            return jnp.where(position < flushed[..., None], position, -1)

        return Part(
            self.key,
            self.value,
            *self.packing.forms,
            size=self.num_slots,
            start=jnp.int32(0),
            stop=self.slots_in_use(),
            positions=positions,
            index=self.slot_index,
            visible=None if self.recent is None else self._seen_packed,
            in_order=self.in_order,
        )

    def _seen_packed(self, query: jax.Array, stored: jax.Array) -> jax.Array:
        """Whether a token was in a slot, quantized, when the query was the newest."""
        return stored < self.packing.flushed(query + 1)

    def _seen_raw(self, query: jax.Array, stored: jax.Array) -> jax.Array:
        return ~self._seen_packed(query, stored)

    def slot_index(self, begin: jax.Array, size: int) -> jax.Array:
        """Index in `get` of slots [begin, begin + size), int32 [S] or [B, S]."""
        return self.index_of(self.slot_positions(begin, size))

    def _recent_positions(self, begin: jax.Array, size: int) -> jax.Array:
        assert self.recent is not None
        slot = slots.span(jnp.broadcast_to(begin, self.position.shape), size)
        position = residual.newest(slot, self.reach, self.recent.size)
        live = (position < self.position[..., None]) & (position >= self.start[..., None])
        return jnp.where(live, position, -1)

    def tokens(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values decoded, oldest first, (B, H, C, ...); what is not live may be anything."""
        keys, values = (
            form.decode(x)
            for form, x in zip(self.packing.forms, (self.key, self.value), strict=True)
        )
        if self.in_order and self.num_slots == self.capacity:
            return keys, values
        position = self.position_of(slots.span(jnp.zeros_like(self.position), self.capacity))
        slot = self.slot_of(position)
        keys, values = slots.take(keys, slot), slots.take(values, slot)
        if self.recent is None:
            return keys, values
        fresh = position >= self.packing.flushed(self.position)[..., None]
        fresh = fresh.reshape(-1, 1, self.capacity, 1)
        recents = (
            form.decode(slots.take(leaf, position % self.recent.size))
            for form, leaf in zip(
                self.packing.raw_forms, (self.recent.key, self.recent.value), strict=True
            )
        )
        keys, values = (
            jnp.where(fresh, raw, x) for raw, x in zip(recents, (keys, values), strict=True)
        )
        return keys, values

    def valid(self) -> jax.Array:
        """Which indices of `tokens` hold a live token: bool [C] or [B, C]."""
        index = slots.span(jnp.zeros_like(self.position), self.capacity)
        return index < self.length[..., None]

    # --- arithmetic every layout shares --------------------------------------------------------

    def flag(self, ok: jax.Array, what: str) -> jax.Array:
        """The sticky flag after an operation that was possible where `ok` (bool [] or [B])."""
        if self.checked:
            checkify.debug_check(jnp.all(ok), what)
        return self.overflowed | ~ok

    def crop(self, max_length: jax.Array) -> Self:
        """Keeps the latest `max_length` tokens (int32 []); a negative number crops nothing."""
        ok = jnp.broadcast_to(max_length >= 0, self.overflowed.shape)
        everything = jnp.int32(jnp.iinfo(jnp.int32).max)
        cropped = self.keep_latest(jnp.where(max_length >= 0, max_length, everything))
        flag = self.flag(ok, "crop to a negative length; nothing was dropped")
        return cropped.replace(overflowed=flag)

    def select(self, rows: jax.Array, since: jax.Array | None = None) -> Self:
        """Gathers batch rows, int32 [B']; a row out of range is clamped and flagged.

        With `since`, int32 [] or [B], row i and row `rows[i]` hold the same tokens before that
        absolute position, and those need not move.
        """
        ok = (rows >= 0) & (rows < self.batch_size)
        chosen = self.gather_rows(jnp.clip(rows, 0, self.batch_size - 1), since)
        ok = ok if self.ragged else jnp.all(ok)
        return chosen.replace(
            overflowed=chosen.flag(ok, "selection of a row that is not in the batch")
        )

    def gather_rows(self, rows: jax.Array, since: jax.Array | None) -> Self:
        """Gathers batch rows, int32 [B'], each in [0, B). Only slots in use move; see `select`."""
        used = self.slots_in_use()
        first: jax.Array | None = None
        if since is not None:
            # Of two rows with a residual the shorter may not have packed yet what they share.
            since = jnp.minimum(since, self.packing.flushed(jnp.min(self.position)))
            since = jnp.broadcast_to(since, rows.shape) if self.ragged else jnp.min(since)
            # A group of tokens is one: what came after `since` has a say in all its numbers.
            first = self.first_slot(since) // self.packing.codec.unit * self.packing.codec.unit

        def gather(leaf: jax.Array) -> jax.Array:
            if leaf.ndim < 2:
                return jnp.take(leaf, rows, mode="clip") if leaf.ndim else leaf
            stride = max(1, self.num_slots // leaf.shape[2])
            start = None if first is None else first // stride
            return slots.select_rows(leaf, rows, -(-used // stride), start)

        chosen = jax.tree.map(gather, self.replace(recent=None))
        if self.recent is None:
            return chosen
        whole = jnp.int32(self.recent.size)  # a ring may be in use up to its end
        return chosen.replace(
            recent=jax.tree.map(lambda leaf: slots.select_rows(leaf, rows, whole), self.recent)
        )

    def put_rows(self, rows: jax.Array, other: Layer) -> Self:
        """This layer with rows `rows`, int32 [B'], replaced by those of a like layer.

        Only slots in use move. A row out of range, or one that does not fit, stays as it was and is
        flagged. The other layer may have fewer or more slots, or be aligned.
        """
        inside = (rows >= 0) & (rows < self.batch_size)
        taken = inside & (other.length <= self.capacity)
        target = self.row_targets(rows, other)
        used = jnp.minimum(other.slots_in_use(), self.num_slots)

        def move(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return slots.put_rows(leaf, new, target, -(-used // (self.num_slots // leaf.shape[2])))

        def move_whole(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return slots.put_rows(leaf, new, target, jnp.int32(leaf.shape[2]))

        changes: dict[str, Any] = {
            "key": jax.tree.map(move, self.key, other.key),
            "value": jax.tree.map(move, self.value, other.value),
            "recent": jax.tree.map(move_whole, self.recent, other.recent),
        }
        for name in _COUNTERS:
            new = jnp.broadcast_to(getattr(other, name), rows.shape)
            changes[name] = getattr(self, name).at[target].set(new, mode="drop")
        refused = jnp.zeros(self.batch_size, bool)
        refused = refused.at[jnp.where(inside & ~taken, rows, self.batch_size)].set(
            True, mode="drop"
        )
        # A row that does not exist is nobody's: every row says so.
        ok = ~refused & jnp.all(inside)
        layer = self.replace(**changes)
        return layer.replace(overflowed=layer.flag(ok, "insertion of rows that do not fit"))

    def row_targets(self, rows: jax.Array, other: Layer) -> jax.Array:
        """Where rows of another layer go, int32 [B'], distinct; B for one that does not fit."""
        taken = (rows >= 0) & (rows < self.batch_size) & (other.length <= self.capacity)
        # Of rows that are named twice, as a traced caller may, the last wins in every leaf.
        return slots.last_wins(jnp.where(taken, rows, self.batch_size), dropped=self.batch_size)

    def free(self, gone: jax.Array) -> Self:
        """Empties the rows where `gone`, bool [B]."""
        empty = self.reset()
        return self.replace(
            **{
                name: jnp.where(gone, getattr(empty, name), getattr(self, name))
                for name in _COUNTERS
            }
        )

    def can_rollback(self, n: jax.Array) -> jax.Array:
        """Whether the latest `n` tokens (int32 [] or [B]) can be dropped as if they never came."""
        position = self.position - n
        ok = (n >= 0) & (position >= self.start) & self.retained(position)
        if self.recent is None:
            return ok
        oldest = jnp.maximum(self.packing.flushed(position), self.start)
        return ok & ((oldest >= self.reach - self.recent.size) | self.empty_at(position))

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
        return position <= self.start

    def reset(self) -> Self:
        """Empties the layer; buffers are kept and what they hold is never seen again."""
        return self.replace(**{name: jnp.zeros_like(getattr(self, name)) for name in _COUNTERS})


class LayerSpec(Protocol):
    """What `init_cache` takes: a small, hashable description that builds empty layer states.

    Attributes:
        codec: how tokens are stored.
        growable: whether the host may add slots.
    """

    @property
    def codec(self) -> Codec:
        """How tokens are stored."""
        ...

    @property
    def growable(self) -> bool:
        """Whether the host may add slots."""
        ...

    def init(
        self,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        dtype: Any,
        ragged: bool,
    ) -> Layer:
        """An empty layer of this kind."""
        ...


def blank(
    spec: Any,
    slots: int,
    *,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    dtype: Any,
    ragged: bool,
) -> dict[str, Any]:
    """The fields of an empty layer with a number of physical slots, traced in the caller's jit."""
    if not isinstance(spec.codec, Identity) and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{spec.codec} quantizes floating-point tokens, got dtype {jnp.dtype(dtype)}; "
            "use a floating dtype, or no codec"
        )
    packing = Packing(spec.codec, jnp.dtype(dtype).name, head_dim, value_head_dim)
    counter = (batch_size,) if ragged else ()
    recent = None
    if spec.codec.residual:
        recent = Recent(
            *(
                form.empty(batch_size, num_kv_heads, 2 * spec.codec.residual + spec.codec.unit)
                for form in packing.raw_forms
            )
        )
    # Each leaf gets its own zeros: a buffer shared by two leaves could not be donated.
    key, value = (form.empty(batch_size, num_kv_heads, slots) for form in packing.forms)
    return {
        "key": key,
        "value": value,
        "recent": recent,
        "start": jnp.zeros(counter, jnp.int32),
        "position": jnp.zeros(counter, jnp.int32),
        "reach": jnp.zeros(counter, jnp.int32),
        "overflowed": jnp.zeros(counter, bool),
        "spec": spec,
        "packing": packing,
    }
