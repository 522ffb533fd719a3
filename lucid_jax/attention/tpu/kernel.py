"""The kernel: a running softmax of a few queries over those blocks of slots that hold what they see.

Flash decoding (Dao et al. 2023) as a Pallas kernel for TPUs. Shapes: rows (B, H, R, D), R a multiple of
8; leaves (B, H, S, ...), or (L, B, H, S, ...) of a stack.
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
from lucid_jax.attention.tpu.products import Piece
from lucid_jax.cache.codecs.base import Form
from lucid_jax.cache.tiles import LANES


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of a call.

    Attributes:
        forms: how each leaf is stored, by name.
        scored: the leaves that are scored.
        mixed: the leaf that is mixed.
        on_lanes: arrays of leaves, by leaf and name, whose tokens lie along the lanes.
        rows: R.
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
    rows: int
    heads: int
    size: int
    slots: int
    stacked: bool
    softcap: float | None
    interpret: Any


class Visits(NamedTuple):
    """Which blocks are read, for each row or for all alike; prefetched."""

    counts: jax.Array  # int32 [B or 1]
    blocks: jax.Array  # int32 [(B or 1) * n]: of each row its blocks, then anything


def visits(seen: jax.Array, slots: int) -> Visits:
    """The blocks that hold a slot which some query sees, bool (B or 1, n * slots)."""
    some = jnp.any(seen.reshape(len(seen), -1, slots), axis=-1)
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
    extra: jax.Array,
    number: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The softmax of rows over what they see.

    Args:
        plan: static facts.
        queries: of each leaf that is scored, float32 (B, H, ...), scaled.
        leaves: the arrays of each leaf, (B, H, S, width) or (B, H, S), before them the stack's axis;
            of what a group of tokens shares (B, H, S / group, width).
        extra: float32 (B or 1, H or 1, R or 1, n * slots), what is added to scores; -inf hides.
        number: int32 [], which layer of a stack.

    Returns:
        What `Running` holds, but values (B, H, ...) as they were mixed.
    """
    batch, heads = next(iter(queries.values()))["rows"].shape[:2]
    mixed = forms.mixed_shape(dict(plan.forms)[plan.mixed], plan.rows)
    seen = jnp.any(~jnp.isneginf(extra), axis=(1, 2))
    counts, blocks = visits(seen, plan.slots)
    most = extra.shape[-1] // plan.slots
    by_row, by_head = len(extra) > 1, extra.shape[1] > 1

    def block_of(b: Any, j: Any, counts: Any, blocks: Any) -> Any:
        row = b if by_row else 0
        return blocks[row * most + jnp.minimum(j, jnp.maximum(counts[row] - 1, 0))]

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
            of_row = (b, h, *(0 if axis is None else at for axis in where))
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
    rows = [queries[name][part] for name, part in asked]
    of_rows = [
        pl.BlockSpec((1, plan.heads, *x.shape[2:]), lambda b, h, j, *_: (b, h, 0, 0)) for x in rows
    ]
    of_extra = pl.BlockSpec(
        (1, plan.heads if by_head else 1, extra.shape[2], plan.slots),
        lambda b, h, j, number, counts, blocks: (
            b if by_row else 0,
            h if by_head else 0,
            0,
            block_of(b, j, counts, blocks),
        ),
    )

    def out(shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        whole, varying = (batch, heads, *shape), jax.typeof(rows[0]).mat
        return (
            jax.ShapeDtypeStruct(whole, jnp.float32, manual_axis_type=varying),
            pl.BlockSpec((1, plan.heads, *shape), lambda b, h, j, *_: (b, h, 0, 0)),
        )

    outs = [out(mixed), out((plan.rows, LANES))]
    names = [(name, part) for name, pieces in leaves.items() for part in pieces]
    acc, stats = pl.pallas_call(
        _Body(plan, tuple(asked), tuple(names)),
        out_shape=[shape for shape, _ in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads // plan.heads, jnp.maximum(jnp.max(counts), 1)),
            in_specs=[*of_rows, of_extra, *specs],
            out_specs=[spec for _, spec in outs],
            scratch_shapes=[pltpu.VMEM((plan.heads, plan.rows, LANES), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
        name="lucid_jax_decode",
    )(
        number.reshape(1),
        jnp.broadcast_to(counts, (batch if by_row else 1,)),
        blocks,
        *rows,
        extra,
        *arrays,
    )
    return stats[..., 0], stats[..., 1], acc


@dataclasses.dataclass(frozen=True)
class _Body:
    """The program of one block of one row and a few KV heads."""

    plan: Plan
    asked: tuple[tuple[str, str], ...]  # leaf and name of the arrays of queries, in order
    names: tuple[tuple[str, str], ...]  # of those of leaves

    def __call__(self, number: Any, counts: Any, blocks: Any, *refs: Any) -> None:
        """Goes on with the softmax of a row; grid (B, H / heads, blocks)."""
        plan = self.plan
        queries, refs = refs[: len(self.asked)], refs[len(self.asked) :]
        extra, *arrays = refs[: 1 + len(self.names)]
        acc, stats, top, total = refs[1 + len(self.names) :]
        row, turn = pl.program_id(0), pl.program_id(2)
        count = counts[jnp.minimum(row, counts.shape[0] - 1)]

        @pl.when(turn == 0)
        def _() -> None:
            acc[...] = jnp.zeros(acc.shape, jnp.float32)
            top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)

        @pl.when(turn < count)
        def _() -> None:
            for head in range(plan.heads):
                self._head(head, queries, extra, arrays, acc, top, total)

        @pl.when(turn == pl.num_programs(2) - 1)
        def _() -> None:
            lane = jax.lax.broadcasted_iota(jnp.int32, top.shape, 2)
            stats[0] = jnp.where(lane == 0, top[...], total[...])

    def _head(
        self, head: int, queries: Any, extra: Any, arrays: Any, acc: Any, top: Any, total: Any
    ) -> None:
        plan = self.plan
        form = dict(plan.forms)
        asked: dict[str, Piece] = {}
        pieces: dict[str, Piece] = {}
        for (name, part), ref in zip(self.asked, queries, strict=True):
            asked.setdefault(name, {})[part] = ref[0, head]
        for (name, part), ref in zip(self.names, arrays, strict=True):
            by_width = len(ref.shape) == 4
            pieces.setdefault(name, {})[part] = ref[0, head if by_width else pl.ds(head, 1)]
        added = extra[0, head if extra.shape[1] > 1 else 0]
        hidden = added == -jnp.inf
        score: Any = 0.0
        for name in plan.scored:
            on_lanes = (name, "numbers") in plan.on_lanes
            score = score + forms.scores(form[name], asked[name], pieces[name], on_lanes)
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
        on_lanes = (plan.mixed, "numbers") in plan.on_lanes
        mixed = forms.mix(form[plan.mixed], weights, pieces[plan.mixed], alive, on_lanes)
        each = jnp.concatenate([decay[:, :1]] * (len(mixed) // plan.rows))
        acc[0, head] = acc[0, head] * each + mixed
