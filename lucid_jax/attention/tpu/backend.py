"""The backend "pallas_tpu": the kernel for a few queries over a layer, tried first on TPUs.

Which queries see which slots reaches the kernel as an array, so that every layout and mask is the same
to it, and blocks that hold nothing seen are not read. Backward it is the walk. Shapes as in softmax.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lucid_jax.attention.blocks import ByBlocks, each_block
from lucid_jax.attention.kernel_inputs import (
    added_to_scores,
    interpreted,
    joined,
    layer_number,
    padded_rows,
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
from lucid_jax.attention.walk import attention
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun
from lucid_jax.cache.tiles import ROWS, lies_on_lanes

BLOCK_BYTES = 1 << 20  # of one leaf: half of that or less leaves the memory waiting between blocks
MOST_BYTES = 1 << 21  # of one leaf: two leaves, each twice, lie beside all else in 16 MiB
MOST_SLOTS = 1024  # of a block: a row reads up to one more than it needs
MOST_ROWS = 128  # queries of a KV head; of more the scores of a block are large
MOST_BLOCKS = 1 << 16  # of all rows: their numbers lie in scalar memory


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
        common = kernel_lacks(queries, slot_runs, mask, scores, MOST_ROWS)
        if common:
            return common
        names = {*queries, slot_runs[0].mixed}
        least = [_least_slots(slot_run, names) for slot_run in slot_runs]
        if all(run.size < slots for run, slots in zip(slot_runs, least, strict=True)):
            return f"reads {least[0]} slots at a time, and there are fewer"
        batch = len(next(iter(queries.values())))
        for slot_run, fewest in zip(slot_runs, least, strict=True):
            for name, form in slot_run.forms:
                if name in names and not takes(form):
                    return f"does not read {type(form).__name__} of {form.dtype}"
            stored = slot_run.only(names)
            slots = _slots_of_block(stored, slot_run.size, fewest, mask, self.block_bytes)
            if slots * _bytes_of_slot(stored, mask.num_kv_heads) > MOST_BYTES:
                return f"reads {ROWS} KV heads at a time, or all, and these are too many"
            if -(-slot_run.size // slots) * batch > MOST_BLOCKS:
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
        fewest = _least_slots(slot_run, stored)
        if slot_run.size < fewest:
            return ByBlocks(each_block, self.care).over(read, rows, stored, running)
        from lucid_jax.attention.tpu import forms, kernel

        form = dict(slot_run.forms)
        count = running.top.shape[2]
        slots = _slots_of_block(stored, slot_run.size, fewest, mask, self.backend.block_bytes)
        padded = -(-count // ROWS) * ROWS
        lead = slot_run.buffer.lead
        arrays = {
            name: {
                part: _read_by_rows(slot_run, x)
                for part, x in forms.arrays_of(form[name], x).items()
            }
            for name, x in stored.items()
        }
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
            rows=padded,
            heads=_heads_of_block(mask.num_kv_heads),
            size=slot_run.size,
            slots=slots,
            stacked=bool(lead),
            softcap=read.scores.softcap,
            interpret=self.backend.interpret,
        )
        top, total, mixed = kernel.softmax(
            plan,
            {
                name: forms.queries_of(form[name], padded_rows(x, padded))
                for name, x in rows.items()
            },
            arrays,
            self._added(read, count, padded, slots),
            layer_number(slot_run),
        )
        acc = forms.value_of(form[slot_run.mixed], mixed)
        found = Running(top[:, :, :count], total[:, :, :count], acc[:, :, :count])
        return joined(running, found)

    def _added(self, read: Reader, count: int, padded: int, slots: int) -> jax.Array:
        """What is added to scores, float32 (B or 1, H or 1, R or 1, S), in whole blocks and rows."""
        added = added_to_scores(read, count)
        more = padded - count if added.shape[2] > 1 else 0
        rest = -added.shape[3] % slots
        return jnp.pad(added, [(0, 0), (0, 0), (0, more), (0, rest)], constant_values=-jnp.inf)


def _heads_of_block(heads: int) -> int:
    """KV heads that are read together: scales of a token lie (H, S), by eights of H or all."""
    return heads if heads % ROWS else ROWS


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


def _slots_of_block(stored: Packed, size: int, fewest: int, mask: Mask, most_bytes: int) -> int:
    """Slots that are read together, `fewest` or twice that and so on, of `size`."""
    each = _bytes_of_slot(stored, mask.num_kv_heads)
    # A window begins and ends inside a block, of which the rest is read for nothing.
    most = MOST_SLOTS if mask.window is None else min(MOST_SLOTS, mask.window // 4)
    slots = fewest
    while 2 * slots <= most and 2 * slots * each <= most_bytes:
        slots *= 2
    return min(slots, math.ceil(size / fewest) * fewest)


def _bytes_of_slot(stored: Packed, heads: int) -> int:
    """Bytes of one slot of the largest leaf, of the KV heads that are read together."""
    numbers = [jax.tree.leaves(x)[0] for x in stored.values()]
    widest: int = max(x.shape[-1] * x.dtype.itemsize for x in numbers)
    return widest * _heads_of_block(heads)


pallas_tpu = PallasTPU()
