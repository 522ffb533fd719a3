"""The backend "pallas_tpu": the kernel for a layer and queries, one or a prompt's, tried first on TPUs.

Blocks that hold nothing which a tile of queries sees are not read. Backward it is the walk.

JAX ships kernels for prompts, of which none takes a cache: `flash_attention` is causal from the first
slot on, and wants as many KV heads as query heads; `splash_attention` wants its mask when it traces,
or as an array of all scores; `ragged_paged_attention` reads pages with keys and values interleaved,
whose last tokens are the queries, and gives no log-sum-exp. So a prompt goes through our own in tiles.
Shapes as in softmax.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from lucid_jax.attention.blocks import ByBlocks, each_block
from lucid_jax.attention.kernel_inputs import (
    interpreted,
    joined,
    layer_number,
)
from lucid_jax.attention.kernel_inputs import lacks as kernel_lacks
from lucid_jax.attention.mask import Mask
from lucid_jax.attention.protocol import NotMe, platform
from lucid_jax.attention.softmax import (
    Care,
    Query,
    Reader,
    RowsByLeaf,
    Running,
    Scores,
    queries_by_leaf,
)
from lucid_jax.attention.tpu.tiles import FEW, MOST_NUMBERS, Tiles, bytes_added
from lucid_jax.attention.walk import attention
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun
from lucid_jax.cache.tiles import ROWS, lies_on_lanes

BLOCK_BYTES = 1 << 20  # of one leaf: half of that or less leaves the memory waiting between blocks
MOST_BYTES = 1 << 21  # of one leaf: two leaves, each twice, lie beside all else in 16 MiB
MOST_SLOTS = 1024  # of a block: a row reads up to one more than it needs
MOST_SCORES = 1 << 19  # of a block, of one KV head
MOST_BLOCKS = 1 << 16  # of all tiles: their numbers lie in scalar memory


@dataclasses.dataclass(frozen=True)
class PallasTPU:
    """A backend; see `lucid_jax.attention.Backend`.

    Attributes:
        interpret: as `pallas_call` takes it: True runs the kernel on any platform, slowly.
        block_bytes: the most bytes of a leaf that are read at once.
    """

    interpret: Any = False
    block_bytes: int = BLOCK_BYTES

    def __call__(
        self, query: Query, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
    ) -> tuple[jax.Array, jax.Array] | NotMe:
        """Attention, or what the kernel lacks for it."""
        queries = queries_by_leaf(query)
        lacks = self._lacks(queries, slot_runs, mask, scores)
        if lacks:
            return NotMe(lacks)
        return attention(_Kernel(self), query, slot_runs, mask, scores)

    def _lacks(
        self, queries: RowsByLeaf, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
    ) -> str | None:
        from lucid_jax.attention.tpu.forms import takes

        if platform() != "tpu" and not self.interpret and not interpreted():
            return (
                f"runs on TPUs, and this is for {platform()}, where it wants "
                "jax.experimental.pallas.tpu.force_tpu_interpret_mode()"
            )
        common = kernel_lacks(queries, slot_runs, mask, scores, math.inf)
        if common:
            return common
        names = {*queries, slot_runs[0].mixed}
        least = [_least_slots(slot_run, names) for slot_run in slot_runs]
        if all(run.size < slots for run, slots in zip(slot_runs, least, strict=True)):
            return f"reads {least[0]} slots at a time, and there are fewer"
        batch, heads, tokens, _ = next(iter(queries.values())).shape
        group = heads // mask.num_kv_heads
        for slot_run in slot_runs:
            for name, form in slot_run.forms:
                if name in names and not takes(form):
                    return f"does not read {type(form).__name__} of {form.dtype}"
            stored = slot_run.only(names)
            cut = _cut(stored, slot_run, mask, group, self.block_bytes)
            if cut.slots * _bytes_of_slot(stored, cut.heads) > MOST_BYTES:
                return f"reads {ROWS} KV heads at a time, or all, and these are too many"
            if cut.heads * cut.tiles.rows * _widest(slot_run, stored) > MOST_NUMBERS:
                return f"reads blocks for {cut.heads * group} heads of {tokens} queries: too many"
            if bytes_added(mask, cut.tiles, cut.heads, cut.slots) > MOST_BYTES:
                return f"adds at most {MOST_BYTES} bytes to the scores of a block"
            if -(-slot_run.size // cut.slots) * batch * cut.tiles.count > MOST_BLOCKS:
                return f"counts at most {MOST_BLOCKS} blocks of slots"
        return None


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The way forward through the kernel, a call for each run."""

    backend: PallasTPU
    care: ClassVar[Care] = "masked"

    def over(self, read: Reader, rows: RowsByLeaf, stored: Packed, running: Running) -> Running:
        """Goes on with a softmax over a run; of few slots, as a tail, without the kernel."""
        slot_run, mask = read.slot_run, read.mask
        if slot_run.size < _least_slots(slot_run, stored):
            return ByBlocks(each_block, self.care).over(read, rows, stored, running)
        from lucid_jax.attention.tpu import forms, kernel

        form = dict(slot_run.forms)
        group = running.top.shape[2] // mask.tokens
        tiles, heads, slots = _cut(stored, slot_run, mask, group, self.backend.block_bytes)
        seen = tiles.seen(read, slots)
        lead = slot_run.buffer.lead
        arrays = {
            name: {
                part: _read_by_rows(slot_run, x)
                for part, x in forms.arrays_of(form[name], x).items()
            }
            for name, x in stored.items()
        }
        if seen.runs is not None:
            rows = {name: forms.narrowed(form[name], x) for name, x in rows.items()}
        plan = kernel.Plan(
            forms=tuple((name, form[name]) for name in stored),
            scored=tuple(rows),
            mixed=slot_run.mixed,
            on_lanes=frozenset(
                (name, part)
                for name, each in arrays.items()
                for part, x in each.items()
                if x.ndim - lead == 4
                and x.shape[2 + lead] == slot_run.size
                and lies_on_lanes(x.shape[-1], slot_run.size)
            ),
            each=tiles.each,
            group=tiles.group,
            tiles=tiles.count,
            runs=0 if seen.runs is None else seen.runs.shape[1] // 2,
            heads=heads,
            size=slot_run.size,
            slots=slots,
            stacked=bool(lead),
            softcap=read.scores.softcap,
            interpret=self.backend.interpret,
        )
        top, total, mixed = kernel.softmax(
            plan,
            {name: forms.queries_of(form[name], tiles.whole(x)) for name, x in rows.items()},
            arrays,
            seen,
            layer_number(slot_run),
        )
        acc = forms.value_of(form[slot_run.mixed], mixed)
        found = Running(tiles.by_rows(top), tiles.by_rows(total), acc)
        return joined(running, jax.tree.map(tiles.own, found))


class _Cut(NamedTuple):
    """What is worked on at a time."""

    tiles: Tiles
    heads: int  # KV heads
    slots: int


def _cut(stored: Packed, slot_run: SlotRun, mask: Mask, group: int, most_bytes: int) -> _Cut:
    """How a run is read for queries of `group` heads to a KV head."""
    from lucid_jax.attention.tpu.forms import arrays_of

    form, lead = dict(slot_run.forms), slot_run.buffer.lead
    arrays = [x for name, each in stored.items() for x in arrays_of(form[name], each).values()]
    # What comes once a token lies (H, S), and is read by eights of H or all.
    together = mask.num_kv_heads if mask.num_kv_heads % ROWS else ROWS
    alone = group * mask.tokens > FEW and all(x.ndim - lead == 4 for x in arrays)
    heads = 1 if alone else together
    tiles = Tiles.of(group, mask.tokens, heads * _widest(slot_run, stored))
    # A window begins and ends inside a block, of which the rest is read for nothing.
    most = MOST_SLOTS if mask.window is None else min(MOST_SLOTS, mask.window // 4)
    most = min(most, most_bytes // _bytes_of_slot(stored, heads), MOST_SCORES // tiles.rows)
    fewest = slots = _least_slots(slot_run, stored)
    while 2 * slots <= most:
        slots *= 2
    return _Cut(tiles, heads, min(slots, math.ceil(slot_run.size / fewest) * fewest))


def _least_slots(slot_run: SlotRun, names: Collection[str]) -> int:
    """Slots of the smallest block of a run."""
    from lucid_jax.attention.tpu.forms import least_slots

    return max(least_slots(slot_run.form(name)) for name in names)


def _read_by_rows(slot_run: SlotRun, array: jax.Array) -> jax.Array:
    """An array as the kernel reads it.

    What groups of tokens share is read group by group. Where those lie along the lanes that is a copy,
    of what is small; then of one layer, not of the stack.
    """
    lead = slot_run.buffer.lead
    groups = array.shape[2 + lead]
    if lead and groups < slot_run.size and lies_on_lanes(array.shape[-1], groups):
        return slot_run.buffer.own(array)[None]
    return array


def _widest(slot_run: SlotRun, names: Collection[str]) -> int:
    """The most numbers of a token, of some leaves."""
    return max(slot_run.form(name).dim for name in names)


def _bytes_of_slot(stored: Packed, heads: int) -> int:
    """Bytes of one slot of the largest leaf, of so many KV heads."""
    numbers = [jax.tree.leaves(x)[0] for x in stored.values()]
    widest: int = max(x.shape[-1] * x.dtype.itemsize for x in numbers)
    return widest * heads


pallas_tpu = PallasTPU()
