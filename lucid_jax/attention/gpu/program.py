"""What one program of the kernel does: the softmax of a KV head's rows over its share of the blocks.

Scores are 64 rows by the slots of a block, and what is mixed 64 rows by channels, both in registers and
both products of the tensor cores, which take 16-bit numbers from shared memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lucid_jax.attention.gpu.pieces import Cut, as_float, pairs, taken_apart, widened
from lucid_jax.attention.gpu.plan import AHEAD, SLOTS, TILE, Plan
from lucid_jax.attention.gpu.seen import Between, BySlot, Seen

_TILED = plgpu.Layout.WGMMA  # of (64, columns) registers
_ROW, _COL = _TILED.reduce(1), _TILED.reduce(0)  # of one number a row, and one a column


class Program:
    """The program of one KV head of a row, for its share of the blocks.

    If it has two warpgroups, each scores all keys and mixes half of the values' channels; the first
    has brought what both read.
    """

    def __init__(
        self, plan: Plan, scratch: dict[str, Any], outs: Any, queries: Any, sums: Any, key: Any,
        value: Any, seen: Seen, number: Any,
    ) -> None:  # fmt: skip
        self.plan, self.outs = plan, outs
        self.scratch: dict[str, Any] = {}
        for names, place in scratch.items():
            each = names.split(", ")
            self.scratch |= dict(zip(each, place if len(each) > 1 else [place], strict=True))
        self.half = lax.axis_index("half") if plan.threads > 1 else 0
        self.first = self.half == 0
        self.queries, self.sums, self.key, self.value = queries, sums, key, value
        self.seen = seen
        split, head, row = (lax.axis_index(name) for name in ("split", "head", "row"))
        self.split, self.head, self.row = split, head, row
        self.leaf = (number[0] * plan.batch + row) * plan.heads + head
        if isinstance(seen, Between):

            def own(x: Any) -> Any:
                return row if x.shape[0] > 1 else 0

            first, low, high = (x[own(x)] for x in seen[:3])
            self.slots_seen = low - first, high - first
            self.each = None
            if seen.each is not None:
                self.each = tuple(_load(x.at[own(x)], _ROW) - first for x in seen.each)
        else:
            batch, heads = seen.alive.shape[:2]
            self.mask_at = row if batch > 1 else 0, head if heads > 1 else 0

    def __call__(self) -> None:
        """Reads the program's blocks, some ahead, and writes its softmax."""
        plan, held = self.plan, self.scratch
        # TMA reads zeros past the end, to which JAX agrees only of a start that it does not know.
        all_rows = pl.ds(self.split * 0, plan.rows)

        @pl.when(self.first)
        def _() -> None:
            for part in range(plan.parts):
                for piece in range(plan.key.count):
                    plgpu.copy_gmem_to_smem(
                        self.queries.at[
                            self.row, self.head, part, all_rows, _channels(plan.key, piece)
                        ],
                        held["query"].at[part, piece, pl.ds(0, plan.rows)],
                        held["query_here"],
                    )

        for turn in range(0 if plan.between else AHEAD * plan.stages):
            self._look(jnp.int32(turn))
        for turn in range(plan.stages):
            self._fetch(jnp.int32(turn))
        plgpu.barrier_wait(held["query_here"])

        def step(turn: Any, carry: Any) -> Any:
            carry = lax.cond(self._seen(turn), partial(self._read, turn), lambda x: x, carry)
            plgpu.commit_smem()  # what was read may be written over
            self._meet()
            if not plan.between:
                self._look(turn + AHEAD * plan.stages)
            self._fetch(turn + plan.stages)
            return carry

        start = (
            plgpu.layout_cast(jnp.full((TILE,), -jnp.inf, jnp.float32), _ROW),
            plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), _ROW),
            (_zeros(plan.value.width),) * plan.own,
        )
        self._write(*lax.fori_loop(jnp.int32(0), jnp.int32(plan.turns), step, start))

    def _write(self, top: Any, total: Any, acc: Any) -> None:
        plan, held, at = self.plan, self.scratch, (self.row, self.head, self.split)
        top_out, total_out, mixed_out = self.outs
        buffer = held["mixed"].at[self.half]
        for i, mixed in enumerate(acc):
            buffer[...] = mixed
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                buffer.at[pl.ds(0, plan.rows)],
                mixed_out.at[(*at, slice(None), _channels(plan.value, self._piece(i)))],
            )
            plgpu.wait_smem_to_gmem(0)

        @pl.when(self.first)
        def _() -> None:
            for i, (out, stat) in enumerate(((top_out, top), (total_out, total))):
                held["stats"][i] = stat
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(held["stats"].at[i, pl.ds(0, plan.rows)], out.at[at])
            plgpu.wait_smem_to_gmem(0)

    # --- two warpgroups ----------------------------------------------------------------------------

    def _meet(self) -> None:
        """Neither goes on before both are here."""
        if self.plan.threads > 1:
            plgpu.barrier_arrive(self.scratch["both_here"])
            plgpu.barrier_wait(self.scratch["both_here"])

    def _piece(self, i: int) -> Any:
        """The warpgroup's i-th piece of the values."""
        return self.half * self.plan.own + i

    # --- what is read ------------------------------------------------------------------------------

    def _block(self, turn: Any) -> Any:
        """The program's blocks lie apart, so that what is seen is shared out evenly."""
        return self.split + turn * self.plan.splits

    def _slots(self, turn: Any) -> Any:
        return pl.ds(self._begin(turn), SLOTS)

    def _begin(self, turn: Any) -> Any:
        """The first slot that is read for a block; the last block ends with the last slot."""
        return jnp.minimum(self._block(turn) * SLOTS, self.plan.size - SLOTS)

    def _exists(self, turn: Any) -> Any:
        return self._block(turn) < self.plan.blocks

    def _seen(self, turn: Any) -> Any:
        """Whether a block, which has been looked at, is there and holds something seen."""
        if self.plan.between:
            low, high = self._new(turn)
            return self._exists(turn) & (low < high)
        return self._exists(turn) & (jnp.max(self._alive(turn, _COL)) > -jnp.inf)

    def _new(self, turn: Any) -> tuple[Any, Any]:
        """The slots of a block that are seen, but for those that the block before has too."""
        low, high = self.slots_seen
        return jnp.maximum(low, self._block(turn) * SLOTS), jnp.minimum(
            high, self._begin(turn) + SLOTS
        )

    def _dead(self, turn: Any, width: int, axis: int) -> Any:
        """Which slots of a block, along an axis of (64, width), no row sees."""
        if self.plan.between:
            low, high = self._new(turn)
            begin, shape = self._begin(turn), (TILE, width)
            slot = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_TILED)
            return (slot < low - begin) | (slot >= high - begin)
        alive = self._alive(turn, _COL if axis else _ROW)
        return (_down(alive) if axis else _across(alive, width)) == -jnp.inf

    def _hidden(self, turn: Any) -> Any:
        """Which slots of a block rows do not see, (64, slots)."""
        dead = self._dead(turn, SLOTS, 1)
        if self.each is None:
            return dead
        low, high = (_across(x - self._begin(turn), SLOTS) for x in self.each)
        slot = plgpu.broadcasted_iota(jnp.int32, (TILE, SLOTS), 1, layout=_TILED)
        return dead | (slot < low) | (slot >= high)

    def _has_dead(self, turn: Any) -> Any:
        """Whether some slot of a block is seen by no row."""
        if self.plan.between:
            low, high = self._new(turn)
            return high - low < SLOTS
        return jnp.min(self._alive(turn, _COL)) == -jnp.inf

    def _alive(self, turn: Any, layout: Any) -> Any:
        ring = self.scratch["alive"]
        at = ring.at[lax.rem(turn, jnp.int32(AHEAD * self.plan.stages))]
        return _load(at, layout)

    def _stage(self, turn: Any) -> Any:
        return lax.rem(turn, jnp.int32(self.plan.stages))

    def _look(self, turn: Any) -> None:
        """Has brought what is seen of a block."""
        held, ring = self.scratch, lax.rem(turn, jnp.int32(AHEAD * self.plan.stages))
        assert isinstance(self.seen, BySlot)
        alive = self.seen.alive

        @pl.when(self._exists(turn) & self.first)
        def _() -> None:
            plgpu.copy_gmem_to_smem(
                alive.at[(*self.mask_at, self._block(turn))],
                held["alive"].at[ring],
                held["alive_here"].at[ring],
            )

    def _wait_for_look(self, turn: Any) -> None:
        if self.plan.between:
            return

        @pl.when(self._exists(turn))
        def _() -> None:
            ring = lax.rem(turn, jnp.int32(AHEAD * self.plan.stages))
            plgpu.barrier_wait(self.scratch["alive_here"].at[ring])

    def _fetch(self, turn: Any) -> None:
        """Has a block brought, if something in it is seen."""
        plan, held, seen = self.plan, self.scratch, self.seen

        self._wait_for_look(turn)

        @pl.when(self._seen(turn) & self.first)
        def _() -> None:
            stage, slots = self._stage(turn), self._slots(turn)
            if plan.many:
                assert isinstance(seen, BySlot)
                plgpu.copy_gmem_to_smem(
                    seen.added.at[(*self.mask_at, self._block(turn))],
                    held["bias"].at[stage, pl.ds(0, plan.rows)],
                    held["key_here"].at[stage],
                )
            for name, cut, arrays in (
                ("key", plan.key, self.key), ("value", plan.value, self.value),
            ):  # fmt: skip
                read, here = held[f"{name}_read"].at[stage], held[f"{name}_here"].at[stage]
                numbers = arrays["numbers"].at[self.leaf, slots]
                if cut.staged:
                    plgpu.copy_gmem_to_smem(numbers, read, here)
                    continue
                for piece in range(cut.count):
                    plgpu.copy_gmem_to_smem(
                        numbers.at[:, _channels(cut, piece)], read.at[piece], here
                    )

    # --- what is done with it ----------------------------------------------------------------------

    def _read(self, turn: Any, carry: Any) -> Any:
        """Goes on with the softmax over a block."""
        plan, held, stage = self.plan, self.scratch, self._stage(turn)
        top, total, acc = carry
        plgpu.barrier_wait(held["key_here"].at[stage])
        score = self._scores(turn)
        if plan.softcap is not None:
            score = plan.softcap * _tanh(score / plan.softcap)
        if plan.between:
            score = jnp.where(self._hidden(turn), -jnp.inf, score)
        else:
            bias = held["bias"].at[stage] if plan.many else None
            added = _down(self._alive(turn, _COL)) if bias is None else _load(bias, _TILED)
            score = jnp.where(added == -jnp.inf, -jnp.inf, score + added)

        now = jnp.maximum(top, jnp.max(score, axis=1))
        shift = jnp.where(now == -jnp.inf, 0.0, now)
        decay = jnp.exp(top - shift)
        weights = jnp.exp(score - _across(shift, SLOTS))
        total = total * decay + jnp.sum(weights, axis=1)
        acc = tuple(x * _across(decay, plan.value.width) for x in acc)

        plgpu.barrier_wait(held["value_here"].at[stage])
        values = self._values(turn)
        mixed = list(acc)
        groups = max(1, plan.value.groups // plan.threads)  # of the warpgroup's own pieces
        for group in range(groups):
            first = self.half * groups if plan.value.groups > 1 else 0
            scaled, shifted = self._scaled(turn, first + group, weights)
            self._store_weights(scaled)
            for i in range(plan.own):
                if i * groups // plan.own == group:
                    mixed[i] = mixed[i] + self._mixed(partial(values, piece=self._piece(i)))
                    if shifted is not None:
                        mixed[i] = mixed[i] + _across(shifted, plan.value.width)
        return now, total, tuple(mixed)

    def _scores(self, turn: Any) -> Any:
        """Products of all rows and a block's keys, float32 (64, slots)."""
        plan, cut = self.plan, self.plan.key
        keys = self._keys(turn)
        query = self.scratch["query"]

        def product(group: int) -> Any:
            def run(acc: Any) -> Any:
                for piece in range(cut.count):
                    if cut.group_of(piece) == group:
                        for part, of_key in pairs(plan.parts, cut.parts):
                            turned = keys(of_key, piece).transpose((1, 0))
                            plgpu.wgmma(acc, query.at[part, piece], turned)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC((TILE, SLOTS), jnp.float32))

        score: Any = None
        for group in range(cut.groups):
            one = product(group)
            if cut.coded:
                one = one * _down(self._beside(self.key, "scale", turn, group))
            if "offset" in self.key:
                sums = _load(self.sums.at[self.row, self.head, group], _ROW)
                offset = self._beside(self.key, "offset", turn, group)
                one = one + _across(sums, SLOTS) * _down(offset)
            score = one if score is None else score + one
        return score * plan.scale

    def _scaled(self, turn: Any, group: Any, weights: Any) -> tuple[Any, Any]:
        """Weights times half of the values' scales, and the sum of those times half of the offsets."""
        if not self.plan.value.coded:
            return weights, None

        def times(name: str) -> Any:
            half = _down(self._beside(self.value, name, turn, group) * 0.5)
            return weights * jnp.where(self._dead(turn, SLOTS, 1), 0.0, half)

        shifted = jnp.sum(times("offset"), axis=1) if "offset" in self.value else None
        return times("scale"), shifted

    def _store_weights(self, weights: Any) -> None:
        """Weights as two numbers of 16 bits each, for the tensor cores."""
        held, dtype = self.scratch["weights"].at[self.half], self.plan.value.dtype
        for i in range(self.plan.weights):
            narrow = weights.astype(dtype)
            held[i] = narrow
            weights = weights - narrow.astype(jnp.float32)
        plgpu.commit_smem()

    def _mixed(self, values: Any) -> Any:
        """Weights times a piece of the values, float32 (64, width)."""

        def run(acc: Any) -> Any:
            for i, part in pairs(self.plan.weights, self.plan.value.parts):
                plgpu.wgmma(acc, self.scratch["weights"].at[self.half, i], values(part))
            return acc[...]

        return pl.run_scoped(run, plgpu.ACC((TILE, self.plan.value.width), jnp.float32))

    def _values(self, turn: Any) -> Any:
        """A block's values by part and piece, of which those that no row sees are finite."""
        plan, cut = self.plan, self.plan.value
        pieces = [self._piece(i) for i in range(plan.own)]
        if cut.staged:
            self._meet()  # where they go keys may be
            for piece in pieces:
                self._widen("value", cut, turn, piece)
            return self._wide("value")
        values = self.scratch["value_read"].at[self._stage(turn)]

        @pl.when(self._has_dead(turn))
        def _() -> None:
            dead = self._dead(turn, cut.width, 0)
            for piece in pieces:
                one = _load(values.at[piece], _TILED)
                values[piece] = jnp.where(dead, jnp.zeros((), cut.dtype), one)

        return lambda part, piece: values.at[piece]

    def _keys(self, turn: Any) -> Any:
        """A block's keys as they are multiplied, by part and piece (slots, width)."""
        plan, cut = self.plan, self.plan.key
        if not cut.staged:
            keys = self.scratch["key_read"].at[self._stage(turn)]
            return lambda part, piece: keys.at[piece]
        for piece in range(cut.count):
            # One warpgroup widens what both read.
            pl.when(self.half == piece % plan.threads)(
                partial(self._widen, "key", cut, turn, piece)
            )
        plgpu.commit_smem()
        self._meet()
        return self._wide("key")

    def _wide(self, name: str) -> Any:
        wide = self.scratch[f"{name}_wide"]
        return lambda part, piece: wide.at[part, piece]

    def _widen(self, name: str, cut: Cut, turn: Any, piece: Any) -> None:
        """A piece as numbers of 16 bits, laid out for the tensor cores."""
        first = piece * cut.width
        side, first = first // cut.stored_width, first % cut.stored_width
        read = self.scratch[f"{name}_read"].at[self._stage(turn), :, pl.ds(first, cut.width)]
        wide = widened(cut, _load(read, _TILED), side)
        if name == "value" and not cut.coded:  # codes are finite, whatever a slot holds
            wide = jnp.where(self._dead(turn, cut.width, 0), jnp.zeros((), wide.dtype), wide)
        for part, x in enumerate(taken_apart(cut, wide)):
            self.scratch[f"{name}_wide"][part, piece] = x

    def _beside(self, arrays: Any, name: str, turn: Any, group: Any) -> Any:
        """Scales or offsets of a block, float32 (slots)."""
        ref, slots = arrays[name], self._slots(turn)
        if len(ref.shape) < 3:
            return as_float(_load(ref.at[self.leaf, slots], _COL))
        # Those of several groups lie apart, and are only read so by threads that have one row each.
        apart, own = (
            _load(ref.at[self.leaf, slots, group], _ROW),
            self.scratch["beside"].at[self.half],
        )
        own[...] = as_float(apart)
        return _load(own, _COL)


def _load(ref: Any, layout: Any) -> Any:
    """Reads into registers."""
    load: Any = plgpu.load  # of which an older JAX says that it takes an index
    return load(ref, layout=layout, optimized=False)


def _channels(cut: Cut, piece: int) -> Any:
    return pl.ds(piece * cut.width, cut.width)


def _zeros(width: int) -> Any:
    return plgpu.layout_cast(jnp.zeros((TILE, width), jnp.float32), _TILED)


def _down(x: Any) -> Any:
    """One number a slot, for all rows."""
    return lax.broadcast_in_dim(x, (TILE, SLOTS), [1])


def _across(x: Any, width: int) -> Any:
    """One number a row, for all columns."""
    return lax.broadcast_in_dim(x, (TILE, width), [0])


def _tanh(x: Any) -> Any:
    """From the exponential: the GPU's own has eleven bits."""
    return 1 - 2 / (jnp.exp(2 * x) + 1)
