"""Bytes that the kernel for TPUs moves, against those that a step needs; nothing is timed or run.

    python tests/benchmarks/pallas_tpu_traffic.py

Moved: the blocks it visits, of every leaf and for each tile of queries, what is added to scores and
what else says who sees what (written and read), queries and results, as the kernel lays them out.
Needed: the tokens that some query sees, queries and results.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np

import lucid_jax as lj
from lucid_jax.attention.tpu import kernel
from lucid_jax.attention.tpu.backend import PallasTPU

CODECS = {
    "bf16": lj.codecs.Identity(),
    "int8": lj.codecs.Int8(),
    "int4": lj.codecs.Int4(),
    "KIVI": lj.codecs.KIVI(),
}
RAGGED = [8000, 7000, 5000, 4000, 2000, 1000, 500, 100]
CASES = (  # rows, heads, group, queries, spec, lengths, options
    ("full", 8, 8, 4, 1, lj.Static(8192), 8192, {}),
    ("half full", 8, 8, 4, 1, lj.Static(8192), 4096, {}),
    ("100 to 8000 tokens", 8, 8, 4, 1, lj.Static(8192), RAGGED, {}),
    ("window of 1024", 8, 8, 4, 1, lj.Static(8192), 8000, {"window": 1024}),
    ("ring of 4096, 4 sinks", 8, 8, 4, 1, lj.Sliding(4096, sinks=4), 8000, {}),
    ("8 queries", 8, 8, 4, 8, lj.Static(8192), 8000, {}),
    ("one row and head", 1, 1, 8, 1, lj.Static(32768), 32000, {}),
    ("64 queries", 8, 8, 4, 64, lj.Static(8192), 8000, {}),
    ("512 queries", 8, 8, 4, 512, lj.Static(8192), 8000, {}),
    ("512 queries, all there is", 8, 8, 4, 512, lj.Static(8192), 512, {}),
    ("512 queries, 600 to 8000 tokens", 8, 8, 4, 512, lj.Static(8192), [600, *RAGGED[:7]], {}),
    ("512 queries, window of 1024", 8, 8, 4, 512, lj.Static(8192), 8000, {"window": 1024}),
    ("one row and head, 512 queries", 1, 1, 8, 512, lj.Static(32768), 32000, {}),
)


def filled(rows, heads, spec, lengths):
    """A cache of one layer that has so many tokens, of zeros."""
    state = lj.init_cache(
        spec, num_layers=1, batch_size=rows, num_kv_heads=heads, head_dim=128, dtype=jnp.bfloat16,
        ragged=not isinstance(lengths, int),
    )  # fmt: skip
    (layer,) = state.layers
    at = jnp.asarray(lengths, jnp.int32)
    return state.with_layers([layer.replace(position=at, reach=at)])


def attend_through(kernel, count_bytes, rows, heads, group, count, spec, lengths, options) -> None:
    """`attend` of one layer by the backend "counted", with `count_bytes` in place of its kernel."""
    own, kernel.softmax = kernel.softmax, count_bytes
    try:
        query = jnp.zeros((rows, heads * group, count, 128), jnp.bfloat16)
        with jax.disable_jit():
            state = filled(rows, heads, spec, lengths)
            lj.attend(state, query, 0, implementation="counted", **options)
    finally:
        kernel.softmax = own


def traffic(rows, heads, group, count, spec, lengths, options) -> tuple[int, int]:
    """Bytes moved and needed by `attend` of one layer."""
    found = collections.Counter()

    def count_bytes(plan, queries, leaves, seen, number):
        visited = kernel.visits(seen.some).counts
        every = rows * plan.tiles // len(visited)
        arrays = [x for each in leaves.values() for x in each.values()]
        slots = arrays[0].shape[2]
        token = sum(x.size * x.dtype.itemsize for x in arrays) // (rows * slots)
        asked = [x for each in queries.values() for x in each.values()]
        sight = [x for x in (seen.added, seen.at, seen.runs) if x is not None]
        queries_of_row = plan.tiles * plan.rows
        groups, width = kernel.forms.mixed_shape(dict(plan.forms)[plan.mixed], queries_of_row)
        stats = (
            rows * heads * plan.tiles * kernel.ROWS * -(-plan.rows // kernel.LANES) * kernel.LANES
        )
        found["moved"] += (
            int(visited.sum()) * every * plan.slots * token
            + sum(2 * x.size * 4 for x in sight)
            + sum(x.size * x.dtype.itemsize for x in asked)
            + (rows * heads * groups * width + stats) * 4
        )
        found["needed"] += tokens_seen(plan, seen) * token
        top = jnp.zeros((rows * plan.tiles, heads, plan.rows))
        return top, top + 1, jnp.zeros((rows, heads, groups, width))

    def tokens_seen(plan, seen):
        """Tokens that some query sees, of all rows."""
        if seen.runs is None:
            some = jnp.any(~jnp.isneginf(seen.added), axis=(1, 2, 3))
        else:
            at = seen.at[:, 0, 0]
            runs = seen.runs.reshape(-1, plan.tiles, plan.runs, 2, seen.runs.shape[-1])
            first, stop = jnp.moveaxis(runs, 3, 0).reshape(2, len(runs), -1, 1)
            some = jnp.any((at >= first) & (at < stop), axis=1)
        return int(some.sum()) * rows // len(some)

    attend_through(kernel, count_bytes, rows, heads, group, count, spec, lengths, options)
    least = rows * heads * group * count * 128 * 2 * 2
    return found["moved"], found["needed"] + least


def print_table(cases, codecs, traffic) -> None:
    """What `traffic` counts of each case and codec."""
    print("| case | codec | MB moved | MB needed | ratio |\n|---|---|---:|---:|---:|")
    for name, rows, heads, group, count, spec, lengths, options in cases:
        for codec, kind in codecs.items():
            if codec == "KIVI" and count > 33:
                continue  # its latest tokens are read before the chunk comes, by `extend`
            moved, needed = traffic(
                rows, heads, group, count, spec.but(codec=kind), lengths, options
            )
            shape = f"B={rows} H={heads} G={group}"
            print(
                f"| {shape}, {name} | {codec} | {np.round(moved / 1e6, 2)} | "
                f"{np.round(needed / 1e6, 2)} | {moved / needed:.2f} |"
            )


if __name__ == "__main__":
    lj.attention.register("counted", PallasTPU(interpret=True))
    print_table(CASES, CODECS, traffic)
