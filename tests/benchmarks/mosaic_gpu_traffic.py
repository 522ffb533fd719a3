"""Bytes that the kernel for GPUs moves, against those that a step needs; nothing is timed or run.

    python -m tests.benchmarks.mosaic_gpu_traffic

Moved: the blocks that its programs have brought, of every leaf, what they are told of what is seen
(written and read), queries, which each program reads, what each found (written and read), and results.
Needed: the tokens that some query sees, queries and results. Wants JAX 0.12.
"""

import collections

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

import lucid_jax as lj
from lucid_jax.attention.gpu import kernel
from lucid_jax.attention.gpu.backend import MosaicGPU
from lucid_jax.attention.gpu.plan import SLOTS, TILE
from lucid_jax.attention.gpu.seen import Between
from tests.benchmarks.pallas_tpu_traffic import CASES, CODECS, attend_through, print_table

FULL = (
    ("full, 32768 slots", 1, 8, 4, 1, lj.Static(32768), 32768, {}),
    ("full, 8191 slots", 8, 8, 4, 1, lj.Static(8191), 8191, {}),
)


def seen_slots(plan, seen) -> np.ndarray:
    """Which slots some row sees, bool (B or 1, blocks, slots), each in the block that has it."""
    begin = np.minimum(np.arange(plan.blocks) * SLOTS, plan.size - SLOTS)
    slot = begin[:, None] + np.arange(SLOTS)
    new = slot >= np.arange(plan.blocks)[:, None] * SLOTS
    if isinstance(seen, Between):
        first, low, high = (np.asarray(x).reshape(-1, 1, 1) for x in seen[:3])
        return new & (slot >= low - first) & (slot < high - first)
    return np.asarray(seen.alive[:, 0] > -jnp.inf)


def traffic(rows, heads, group, count, spec, lengths, options) -> tuple[int, int]:
    """Bytes moved and needed by `attend` of one layer."""
    found = collections.Counter()

    def count_bytes(plan, queries, sums, key, value, seen, number):
        slots = seen_slots(plan, seen)
        brought = slots.any(axis=2).sum()
        every = rows // len(slots) * heads  # programs that bring the same of another row or head
        token = sum(x.nbytes for x in (*key.values(), *value.values())) // (
            rows * heads * plan.size
        )
        programs = rows * heads * plan.splits
        asked = programs * (queries.nbytes // (rows * heads))
        told = (3 if seen[3:] == (None,) else 3 + 2 * TILE) * 4 * programs
        if not isinstance(seen, Between):
            told = (
                seen.added.nbytes + 2 * seen.alive.nbytes + plan.blocks * SLOTS * 4 * rows * heads
            )
            told += int(brought) * every * SLOTS * plan.rows * 4 if plan.many else 0
        results = programs * plan.rows * (plan.value.form.dim + 2) * 4
        found["moved"] += int(brought) * every * SLOTS * token + told + asked + 2 * results
        found["needed"] += int(slots.sum()) * every * token
        lead = rows, heads, plan.splits, plan.rows
        return jnp.zeros(lead), jnp.ones(lead), jnp.zeros((*lead, plan.value.form.dim))

    attend_through(kernel, count_bytes, rows, heads, group, count, spec, lengths, options)
    least = rows * heads * group * count * 128 * 2 * 2
    return found["moved"] + least // 2, found["needed"] + least


if __name__ == "__main__":
    lj.attention.register("counted", MosaicGPU(interpret=plgpu.InterpretGPUParams()))
    codecs = {name: codec for name, codec in CODECS.items() if name != "KIVI"}
    print_table((*FULL, *CASES), codecs, traffic)
