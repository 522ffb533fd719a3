"""The backend "mosaic_gpu": the kernel for a few queries over a layer, tried first on GPUs.

Blocks that hold nothing seen are not read. Backward it is the walk. Shapes as in softmax.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.attention.blocks import ByBlocks, each_block
from lucid_jax.attention.gpu import pieces
from lucid_jax.attention.gpu.plan import SLOTS, TILE, Plan
from lucid_jax.attention.gpu.seen import Between, BySlot, Seen
from lucid_jax.attention.kernel_inputs import (
    added_to_scores,
    interpreted,
    joined,
    layer_number,
    padded_rows,
    turned_for,
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
from lucid_jax.cache.codecs import Form
from lucid_jax.cache.codecs.numerics import doubled
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun

JAX = (0, 12)  # of which Mosaic GPU's interface, and its interpreter, is
ROWS = 8  # what shared memory is laid out in
MOST_WIDTH = 256  # sums of 64 rows of it are half of a program's registers
PROGRAMS = 256  # at least so many, if there are blocks for them: two for each of an H100's cores
FEWEST_TURNS = 2  # blocks that a program reads, for each 8 rows
FEW_PROGRAMS = 8  # to a KV head


@dataclasses.dataclass(frozen=True)
class MosaicGPU:
    """A backend; see `lucid_jax.attention.Backend`.

    Attributes:
        interpret: as `plgpu.kernel` takes it: `plgpu.InterpretGPUParams()` runs the kernel on any
            platform, slowly.
        programs: how many run at a time at least; those of a KV head share its blocks.
    """

    interpret: Any = None
    programs: int = PROGRAMS

    def __call__(
        self, query: Query, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
    ) -> tuple[jax.Array, jax.Array] | NotMe:
        """Attention, or what the kernel lacks for it."""
        queries = queries_by_leaf(query)
        lacks = self._lacks(queries, slot_runs, mask, scores)
        if lacks:
            return NotMe(lacks)
        return attention(_Kernel(self, str(queries["key"].dtype)), query, slot_runs, mask, scores)

    def _lacks(
        self, queries: RowsByLeaf, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
    ) -> str | None:
        if jax.__version_info__ < JAX:
            return f"wants jax {'.'.join(map(str, JAX))} or newer, and this is {jax.__version__}"
        if platform() != "gpu" and not self.interpret and not interpreted():
            return (
                f"runs on GPUs, and this is for {platform()}, where it wants "
                "jax.experimental.pallas.mosaic_gpu.force_gpu_interpret_mode()"
            )
        if platform() == "gpu" and not _is_hopper():
            return "multiplies with the tensor cores of Hopper GPUs, compute capability 9.0"
        common = kernel_lacks(queries, slot_runs, mask, scores, TILE)
        if common:
            return common
        if all(run.size < SLOTS for run in slot_runs):
            return f"reads {SLOTS} slots at a time, and there are fewer"
        if set(queries) != {"key"} or slot_runs[0].mixed != "value":
            return "scores keys and mixes values, not leaves of one's own"
        batch, heads, tokens, _ = queries["key"].shape
        rows = heads // mask.num_kv_heads * tokens
        if max(batch, mask.num_kv_heads) > 65535:
            return "counts at most 65535 rows, and as many heads"
        for slot_run in slot_runs:
            for form in (slot_run.key_form, slot_run.value_form):
                if not pieces.takes(form):
                    return f"does not read {type(form).__name__} of {form.dtype}"
                if form.dim > MOST_WIDTH or pieces.cut_of(form, slot_run.size) is None:
                    return f"multiplies 16 channels at a time, of at most {MOST_WIDTH}: not {form}"
            shape = batch, mask.num_kv_heads, rows
            many = tokens > 1 or mask.by_head
            if not _plan(self, shape, slot_run, scores, str(queries["key"].dtype), many).fits:
                return f"does not find room in shared memory for {slot_run.key_form}"
        return None


def _is_hopper() -> bool:
    """Whether what is traced now is for GPUs of that kind."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return getattr(device, "compute_capability", None) == "9.0"


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The way forward through the kernel, a call for each run."""

    backend: MosaicGPU
    dtype: str  # of the queries as they were given
    care: ClassVar[Care] = "masked"

    def over(self, read: Reader, rows: RowsByLeaf, stored: Packed, running: Running) -> Running:
        """Goes on with a softmax over a run; of few slots, as a tail, without the kernel."""
        if read.slot_run.size < SLOTS:
            return ByBlocks(each_block, self.care).over(read, rows, stored, running)
        from lucid_jax.attention.gpu import kernel

        slot_run = read.slot_run
        count = rows["key"].shape[2]
        seen = _seen(read, count)
        plan = _plan(
            self.backend,
            rows["key"].shape[:3],
            slot_run,
            read.scores,
            self.dtype,
            isinstance(seen, BySlot) and seen.added.shape[3] > 1,
            isinstance(seen, Between),
        )
        query = _multiplied(rows["key"], read.queries["key"], plan, slot_run.key_form)
        key = pieces.arrays_of(plan.key, stored["key"])
        top, total, mixed = kernel.softmax(
            plan,
            query,
            _sums(query, plan.key) if "offset" in key else None,
            key,
            pieces.arrays_of(plan.value, stored["value"]),
            seen,
            layer_number(slot_run).reshape(1),
        )
        if plan.value.coded:
            mixed = doubled(mixed, jnp.float32)
        found = _merged(Running(top, total, mixed))
        return joined(running, jax.tree.map(lambda x: x[:, :, :count], found))


def _merged(programs: Running) -> Running:
    """The softmaxes of all programs, on the third axis, as one."""
    count = programs.top.shape[2]
    if count <= FEW_PROGRAMS:  # which XLA computes in one kernel
        each = [jax.tree.map(lambda x, i=i: x[:, :, i], programs) for i in range(count)]
        all_of_them: Running = reduce(joined, each)
        return all_of_them
    top = jnp.max(programs.top, axis=2)
    weight = jnp.exp(programs.top - jnp.where(jnp.isneginf(top), 0, top)[:, :, None])
    total = jnp.sum(programs.total * weight, axis=2)
    return Running(top, total, jnp.einsum("bhpr,bhprd->bhrd", weight, programs.acc))


def _plan(
    backend: MosaicGPU,
    shape: Sequence[int],
    slot_run: SlotRun,
    scores: Scores,
    dtype: str,
    many: bool,
    between: bool = False,
) -> Plan:
    """What a run is read by, for rows (B, H, R) that were given in a dtype."""
    batch, heads, rows = shape
    key, value = (
        pieces.cut_of(form, slot_run.size) for form in (slot_run.key_form, slot_run.value_form)
    )
    assert key is not None and value is not None
    # Queries that were given in what is multiplied go in as they were, and then scores are scaled.
    given = slot_run.key_form is key.form and dtype == key.dtype
    scaled = given and 2**-20 < abs(scores.scale) < 2**20
    padded = _padded(rows)
    # What a program writes, and is read again, is then a small part of what it reads.
    most = slot_run.size // (SLOTS * FEWEST_TURNS * padded // ROWS)
    return Plan(
        key=key,
        value=value,
        batch=batch,
        heads=heads,
        size=slot_run.size,
        rows=padded,
        parts=1 if scaled else pieces.PARTS,
        scale=scores.scale if scaled else 1.0,
        softcap=scores.softcap,
        many=many,
        between=between,
        splits=max(1, min(backend.programs // (batch * heads), most)),
        interpret=backend.interpret,
    )


def _padded(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def _seen(read: Reader, count: int) -> Seen:
    """What `count` rows see."""
    between = read.mask.seen_between(read.slot_run, read.sight)
    if between is not None:
        first, low, high = between
        alike = low.shape[-1] == 1
        return Between(
            first.reshape(-1),
            jnp.min(low, axis=-1).reshape(-1),
            jnp.max(high, axis=-1).reshape(-1),
            None if alike else tuple(_of_rows(x, count) for x in (low, high)),
        )
    added = _in_blocks(added_to_scores(read, count), _padded(count))
    return BySlot(added, jnp.max(added, axis=3))


def _of_rows(x: jax.Array, count: int) -> jax.Array:
    """Numbers of queries, [T] or [B, T], by row: (1 or B, 64), zeros past the last."""
    tokens = x.shape[-1]
    rows = jnp.tile(x.reshape(-1, tokens), (1, count // tokens))
    return jnp.pad(rows, [(0, 0), (0, TILE - count)])


def _multiplied(rows: jax.Array, given: jax.Array, plan: Plan, form: Form) -> jax.Array:
    """Queries as numbers of 16 bits, (B, H, parts, R, D), that add up to them.

    The kernel reads as zeros what fewer than 8 rows lack.
    """
    count = rows.shape[2]
    if count > ROWS:
        count = plan.rows
    if plan.parts == 1:  # before they were scaled
        return padded_rows(given.reshape(rows.shape), count)[:, :, None]
    rows, dtype, parts = turned_for(form, padded_rows(rows, count)), plan.key.dtype, []
    for _ in range(plan.parts):
        bits = jnp.finfo(dtype)
        # Not by a cast there and back, which XLA leaves out.
        part = lax.reduce_precision(rows, bits.nexp, bits.nmant)
        parts.append(part.astype(dtype))
        rows = rows - part
    return jnp.stack(parts, axis=2)


def _sums(query: jax.Array, key: pieces.Cut) -> jax.Array:
    """Sums of queries over the channels that share an offset, float32 (B, H, groups, 64)."""
    whole = query.astype(jnp.float32).sum(axis=2)
    sums = whole.reshape(*whole.shape[:3], key.groups, -1).sum(axis=-1)
    more = TILE - sums.shape[2]
    return jnp.swapaxes(jnp.pad(sums, [(0, 0), (0, 0), (0, more), (0, 0)]), 2, 3)


def _in_blocks(added: jax.Array, rows: int) -> jax.Array:
    """What is added to scores (B, H, R or 1, S) as blocks (B, H, blocks, R or 1, slots).

    The last block ends with the last slot, and hides what the one before has.
    """
    more = rows - added.shape[2] if added.shape[2] > 1 else 0
    added = jnp.pad(added, [(0, 0), (0, 0), (0, more), (0, 0)], constant_values=-jnp.inf)
    size = added.shape[3]
    twice = -size % SLOTS
    if twice:
        whole = size // SLOTS * SLOTS
        last = jnp.where(jnp.arange(SLOTS) < twice, -jnp.inf, added[..., size - SLOTS :])
        added = jnp.concatenate([added[..., :whole], last], axis=3)
    added = added.reshape(*added.shape[:3], -1, SLOTS)
    return jnp.swapaxes(added, 2, 3)


mosaic_gpu = MosaicGPU()
