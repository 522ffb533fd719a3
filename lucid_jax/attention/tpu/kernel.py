"""The kernel: a running softmax of tiles of queries over those blocks of slots that hold what they see.

Flash attention (Dao et al. 2022, 2023) as a Pallas kernel for TPUs. Shapes: rows (B, H, G * T, D), of
which each of n tiles has R = G * T / n; leaves (B, H, S, ...), or (L, B, H, S, ...) of a stack.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lucid_jax.attention.tpu import forms
from lucid_jax.attention.tpu.products import How, Piece
from lucid_jax.attention.tpu.tiles import Seen
from lucid_jax.cache.codecs.base import Form
from lucid_jax.cache.tiles import LANES, ROWS


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of a call.

    Attributes:
        forms: how each leaf is stored, by name.
        scored: the leaves that are scored.
        mixed: the leaf that is mixed.
        on_lanes: arrays of leaves, by leaf and name, whose tokens lie along the lanes.
        group: G.
        each: T / n, a multiple of 8.
        tiles: n.
        runs: of positions that a query sees, where `Seen` has them; else 0.
        heads: KV heads of a block.
        size: S.
        slots: slots of a block.
        stacked: whether leaves are of a stack; what is of one layer alone is a stack of one.
        softcap: see `attend`.
        interpret: as of `pallas_call`.
    """

    forms: tuple[tuple[str, Form], ...]
    scored: tuple[str, ...]
    mixed: str
    on_lanes: frozenset[tuple[str, str]]
    group: int
    each: int
    tiles: int
    runs: int
    heads: int
    size: int
    slots: int
    stacked: bool
    softcap: float | None
    interpret: Any

    @property
    def rows(self) -> int:
        """R."""
        return self.group * self.each

    def grouped(self, rows: jax.Array) -> jax.Array:
        """Rows (B, H, k * G * T, D) as (B, H, k * G, T, D), of which a tile is a piece along T."""
        shape = (*rows.shape[:2], -1, self.tiles * self.each, rows.shape[-1])
        return rows.reshape(shape)

    def tile_of(self, b: Any, count: int) -> Any:
        """Which of `count` tiles, of all rows or of each alike, is the b-th of all."""
        return b if count > self.tiles else b % self.tiles

    def how(self, name: str) -> How:
        """How numbers of a leaf are multiplied with."""
        return How((name, "numbers") in self.on_lanes, rounded=self.runs > 0)


class Visits(NamedTuple):
    """Which blocks are read, for each tile of each row, or of all rows alike; prefetched."""

    counts: jax.Array  # int32 [B * n or n]
    blocks: jax.Array  # int32 [(B * n or n) * blocks]: of each tile its blocks, then anything


def visits(some: jax.Array) -> Visits:
    """The blocks that hold a slot which some query of a tile sees, bool (B * n or n, blocks)."""
    number = jnp.arange(some.shape[1], dtype=jnp.int32).reshape(1, -1)
    one, other = number[:, :, None], number[:, None]
    rank = jnp.sum(some[:, :, None] & (one < other), axis=1, dtype=jnp.int32)
    here = some[:, :, None] & (rank[:, :, None] == other)
    blocks = jnp.sum(jnp.where(here, one, 0), axis=1, dtype=jnp.int32)
    return Visits(jnp.sum(some, axis=1, dtype=jnp.int32), blocks.reshape(-1))


@partial(jax.jit, static_argnums=0)
def softmax(
    plan: Plan,
    queries: dict[str, Piece],
    leaves: dict[str, Piece],
    seen: Seen,
    number: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The softmax of rows over what they see.

    Args:
        plan: static facts.
        queries: of each leaf that is scored, (B, H, k * G * T, ...), scaled.
        leaves: the arrays of each leaf, (B, H, S, width) or (B, H, S), before them the stack's axis;
            of what a group of tokens shares (B, H, S / group, width).
        seen: who sees what.
        number: int32 [], which layer of a stack.

    Returns:
        What `Running` holds, of tiles (B * n, H, R), but values (B, H, ...) as they were mixed.
    """
    batch, heads, _, _ = next(iter(queries.values()))["rows"].shape
    mixed = forms.mixed_shape(dict(plan.forms)[plan.mixed], plan.rows)
    counts, blocks = visits(seen.some)
    most = seen.some.shape[1]

    def block_of(b: Any, j: Any, counts: Any, blocks: Any) -> Any:
        tile = plan.tile_of(b, len(seen.some))
        return blocks[tile * most + jnp.minimum(j, jnp.maximum(counts[tile] - 1, 0))]

    def of_leaf(name: str, part: str, array: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        stride = plan.size // array.shape[2 + plan.stacked]
        shape: tuple[int, ...] = (1, plan.heads, plan.slots // stride)
        where: list[int | None] = [0]  # the axis of slots
        if array.ndim - plan.stacked == 4:
            shape, where = (*shape, array.shape[-1]), [0, None]
            if (name, part) in plan.on_lanes:
                array = jnp.swapaxes(array, -1, -2)
                shape, where = (*shape[:2], shape[3], shape[2]), [None, 0]

        def index(b: Any, h: Any, j: Any, number: Any, counts: Any, blocks: Any) -> tuple[Any, ...]:
            at = block_of(b, j, counts, blocks)
            of_row = (b // plan.tiles, h, *(0 if axis is None else at for axis in where))
            return (jnp.minimum(number[0], len(array) - 1), *of_row) if plan.stacked else of_row

        lead = (None,) if plan.stacked else ()
        return array, pl.BlockSpec((*lead, *shape), index)

    arrays, specs = [], []
    for name, pieces in leaves.items():
        for part, array in pieces.items():
            array, spec = of_leaf(name, part, array)
            arrays.append(array)
            specs.append(spec)
    asked = [(name, part) for name in plan.scored for part in queries[name]]
    rows = [plan.grouped(queries[name][part]) for name, part in asked]

    def of_tile(groups: int, width: int) -> pl.BlockSpec:
        shape = (1, plan.heads, groups, plan.each, width)
        return pl.BlockSpec(shape, lambda b, h, j, *_: (b // plan.tiles, h, 0, b % plan.tiles, 0))

    def of_slots(array: jax.Array) -> pl.BlockSpec:
        by_row, by_head, _, by_query, _ = (n > 1 for n in array.shape)

        def index(b: Any, h: Any, j: Any, number: Any, counts: Any, blocks: Any) -> tuple[Any, ...]:
            return (
                b // plan.tiles if by_row else 0,
                h if by_head else 0,
                0,
                b % plan.tiles if by_query else 0,
                block_of(b, j, counts, blocks),
            )

        tokens = array.shape[3] // plan.tiles if by_query else 1
        heads = plan.heads if by_head else 1
        return pl.BlockSpec((1, heads, array.shape[2], tokens, plan.slots), index)

    sight = {name: x for name, x in seen._asdict().items() if name != "some" and x is not None}
    of_sight = [of_slots(x) for name, x in sight.items() if name != "runs"]
    scratch = [pltpu.VMEM((plan.heads, plan.rows, LANES), jnp.float32)] * 2
    if seen.runs is not None:
        count, ends, width = seen.runs.shape
        of_sight.append(
            pl.BlockSpec((1, ends, width), lambda b, h, j, *_: (plan.tile_of(b, count), 0, 0))
        )
        scratch.append(pltpu.VMEM((ends, width, LANES), jnp.int32))

    def out(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=jax.typeof(rows[0]).mat)

    groups, width = mixed[0] // plan.each, mixed[1]
    stats_of = (ROWS, -(-plan.rows // LANES) * LANES)
    names = [(name, part) for name, pieces in leaves.items() for part in pieces]
    acc, stats = pl.pallas_call(
        _Body(plan, tuple(asked), tuple(sight), tuple(names)),
        out_shape=[
            out(batch, heads, groups, plan.tiles * plan.each, width),
            out(batch * plan.tiles, heads, *stats_of),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch * plan.tiles, heads // plan.heads, jnp.maximum(jnp.max(counts), 1)),
            in_specs=[*(of_tile(x.shape[2], x.shape[4]) for x in rows), *of_sight, *specs],
            out_specs=[
                of_tile(groups, width),
                pl.BlockSpec((1, plan.heads, *stats_of), lambda b, h, j, *_: (b, h, 0, 0)),
            ],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
        name="lucid_jax_decode" if plan.runs == 0 else "lucid_jax_prefill",
    )(number.reshape(1), counts, blocks, *rows, *sight.values(), *arrays)
    top, total = (stats[:, :, i, : plan.rows] for i in range(2))
    return top, total, acc.reshape(batch, heads, -1, width)


@dataclasses.dataclass(frozen=True)
class _Body:
    """The program of one block of one tile and a few KV heads."""

    plan: Plan
    asked: tuple[tuple[str, str], ...]  # leaf and name of the arrays of queries, in order
    sight: tuple[str, ...]  # of those of `Seen`
    names: tuple[tuple[str, str], ...]  # of those of leaves

    def __call__(self, number: Any, counts: Any, blocks: Any, *refs: Any) -> None:
        """Goes on with the softmax of a tile; grid (B * n, H / heads, blocks)."""
        plan = self.plan
        queries, refs = refs[: len(self.asked)], refs[len(self.asked) :]
        sight, refs = dict(zip(self.sight, refs, strict=False)), refs[len(self.sight) :]
        arrays, refs = refs[: len(self.names)], refs[len(self.names) :]
        acc, stats, top, total, *runs = refs
        turn = pl.program_id(2)
        count = counts[plan.tile_of(pl.program_id(0), counts.shape[0])]

        @pl.when(turn == 0)
        def _() -> None:
            acc[...] = jnp.zeros(acc.shape, jnp.float32)
            top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)
            for i in range(2 * plan.runs):  # down the rows, as scores lie
                end = sight["runs"][0, i : i + 1]
                runs[0][i] = jnp.broadcast_to(end, (LANES, end.shape[1])).T

        @pl.when(turn < count)
        def _() -> None:
            for head in range(plan.heads):
                added, hidden = self._hidden(head, sight, runs)
                self._head(head, queries, added, hidden, arrays, acc, top, total)

        @pl.when(turn == pl.num_programs(2) - 1)
        def _() -> None:
            lane = jax.lax.broadcasted_iota(jnp.int32, top.shape[1:], 1)
            rest = [jnp.zeros((n, LANES), jnp.float32) for n in (-plan.rows % LANES,) if n]
            for head in range(plan.heads):  # along the lanes, where they leave none empty
                both = jnp.where(lane == 0, top[head], total[head])
                stats[0, head] = jnp.concatenate([both, *rest]).T[: stats.shape[2]]

    def _hidden(self, head: int, sight: Any, runs: Any) -> tuple[Any, Any]:
        """What is added to scores, float32 (R or 1, S), and which are hidden, bool."""
        plan = self.plan
        added, hidden = jnp.zeros((1, 1), jnp.float32), None
        if "added" in sight:
            ref = sight["added"]
            groups = ref[0, head if ref.shape[1] > 1 else 0]
            added = groups[0]
            if plan.group > 1 and (ref.shape[2] > 1 or ref.shape[3] > 1):
                shape = (plan.each, plan.slots)
                each = [groups[i if ref.shape[2] > 1 else 0] for i in range(plan.group)]
                added = jnp.concatenate([jnp.broadcast_to(x, shape) for x in each])
            hidden = added == -jnp.inf
        if plan.runs:
            ref = sight["at"]
            at = ref[0, head if ref.shape[1] > 1 else 0, 0]
            unseen: Any = True
            for i in range(plan.runs):
                first, stop = (runs[0][2 * i + j, : plan.rows, :1] for j in range(2))
                unseen = unseen & ((at < first) | (at >= stop))
            hidden = unseen if hidden is None else unseen | hidden
        return added, hidden

    def _head(
        self,
        head: int,
        queries: Any,
        added: Any,
        hidden: Any,
        arrays: Any,
        acc: Any,
        top: Any,
        total: Any,
    ) -> None:
        plan = self.plan
        form = dict(plan.forms)
        asked: dict[str, Piece] = {}
        pieces: dict[str, Piece] = {}
        for (name, part), ref in zip(self.asked, queries, strict=True):
            asked.setdefault(name, {})[part] = ref[0, head].reshape(-1, ref.shape[-1])
        for (name, part), ref in zip(self.names, arrays, strict=True):
            by_width = len(ref.shape) == 4
            pieces.setdefault(name, {})[part] = ref[0, head if by_width else pl.ds(head, 1)]
        score: Any = 0.0
        for name in plan.scored:
            score = score + forms.scores(form[name], asked[name], pieces[name], plan.how(name))
        if plan.softcap is not None:
            score = plan.softcap * jnp.tanh(score / plan.softcap)
        score = jnp.where(hidden, -jnp.inf, score + added)

        before = top[head]
        now = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
        shift = jnp.where(now == -jnp.inf, 0.0, now)
        weights = jnp.exp(score - shift[:, :1])
        decay = jnp.exp(before - shift)
        top[head] = now
        total[head] = total[head] * decay + jnp.sum(weights, axis=1, keepdims=True)
        alive = jnp.max(jnp.where(hidden, 0.0, 1.0), axis=0, keepdims=True) > 0
        how = plan.how(plan.mixed)
        mixed = forms.mix(form[plan.mixed], weights, pieces[plan.mixed], alive, how)
        each = jnp.concatenate([decay[:, :1]] * (len(mixed) // plan.rows))
        before = acc[0, head].reshape(mixed.shape)
        acc[0, head] = (before * each + mixed).reshape(acc.shape[2:])
