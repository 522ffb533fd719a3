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
from jax.sharding import AxisType

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
from lucid_jax.attention.walk import ByBlocks, attention, each_block
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun
from lucid_jax.cache.stacked import Stacked
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
        if any(map(divided_by_compiler, jax.tree.leaves([run.leaves for run in slot_runs]))):
            return "is not divided over a mesh by the compiler, only in jax.shard_map"
        names = {*queries, slot_runs[0].mixed}
        least = [_least_slots(slot_run, names) for slot_run in slot_runs]
        if all(run.size < slots for run, slots in zip(slot_runs, least, strict=True)):
            return f"reads {least[0]} slots at a time, and there are fewer"
        batch, heads, tokens, _ = next(iter(queries.values())).shape
        rows = heads // mask.num_kv_heads * tokens
        if rows > MOST_ROWS:
            return f"takes at most {MOST_ROWS} queries of a KV head, not {rows}"
        if scores.rope is not None:
            return "does not rotate keys"
        if any(x.dtype.itemsize > 4 for x in queries.values()):
            return "computes in float32"
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
            {name: forms.queries_of(form[name], _padded(x, padded)) for name, x in rows.items()},
            arrays,
            self._added(read, count, padded, slots),
            _number(slot_run),
        )
        acc = forms.value_of(form[slot_run.mixed], mixed)
        found = Running(top[:, :, :count], total[:, :, :count], acc[:, :, :count])
        return _joined(running, found)

    def _added(self, read: Reader, count: int, padded: int, slots: int) -> jax.Array:
        """What is added to scores, float32 (B or 1, H or 1, R or 1, S): -inf where nothing is seen."""
        slot_run, mask = read.slot_run, read.mask
        seen = mask.seen(slot_run, read.sight)
        bias = mask.bias_of(slot_run)
        bias = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
        shape = jnp.broadcast_shapes(seen.shape, bias.shape)
        group = count // mask.tokens
        rows = (1, 1) if shape[2:4] == (1, 1) else (group, mask.tokens)
        shape = (*shape[:2], *rows, slot_run.size)
        added = jnp.where(seen, jnp.broadcast_to(bias, shape), -jnp.inf)
        added = added.reshape(*shape[:2], -1, slot_run.size)
        more = padded - count if added.shape[2] > 1 else 0
        rest = -slot_run.size % slots
        return jnp.pad(added, [(0, 0), (0, 0), (0, more), (0, rest)], constant_values=-jnp.inf)


def _joined(a: Running, b: Running) -> Running:
    """Two softmaxes over different tokens as one."""
    top = jnp.maximum(a.top, b.top)
    shift = jnp.where(jnp.isneginf(top), 0, top)
    of_a, of_b = jnp.exp(a.top - shift), jnp.exp(b.top - shift)
    acc = a.acc * of_a[..., None] + b.acc * of_b[..., None]
    return Running(top, a.total * of_a + b.total * of_b, acc)


def interpreted() -> bool:
    """Whether kernels for TPUs that are traced now are interpreted, as their context manager says."""
    from jax.experimental import pallas as pl

    one = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    call = pl.pallas_call(lambda x, y: None, out_shape=one)
    (traced,) = jax.make_jaxpr(call)(one).eqns
    return bool(traced.params["interpret"])


def divided_by_compiler(leaf: jax.Array) -> bool:
    """Whether an array lies on a mesh of several devices whose work the compiler divides."""
    for mesh in (jax.typeof(leaf).sharding.mesh, jax.sharding.get_abstract_mesh()):
        sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
        if any(kind != AxisType.Manual and size > 1 for kind, size in sizes):
            return True
    return False


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


def _number(slot_run: SlotRun) -> jax.Array:
    """Which layer of a stack a run is of."""
    buffer = slot_run.buffer
    number = buffer.layer if isinstance(buffer, Stacked) else None
    return jnp.int32(0) if number is None else number


def _padded(rows: jax.Array, count: int) -> jax.Array:
    """Rows (B, H, R, D) with rows of zeros after them."""
    return jnp.pad(rows, [(0, 0), (0, 0), (0, count - rows.shape[2]), (0, 0)])


pallas_tpu = PallasTPU()
