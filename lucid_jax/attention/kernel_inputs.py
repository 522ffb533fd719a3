"""What kernels are given, and what is made of their results, for all of them.

Which of a few queries see which slots comes as an array, so that every layout and mask is the same to a
kernel.
Shapes as in softmax.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lucid_jax.attention.mask import Mask
from lucid_jax.attention.softmax import Reader, RowsByLeaf, Running, Scores
from lucid_jax.cache.codecs import Form, Rotated
from lucid_jax.cache.codecs.rotation import hadamard
from lucid_jax.cache.reading import SlotRun
from lucid_jax.cache.stacked import Stacked
from lucid_jax.cache.tiles import divided_by_compiler


def lacks(
    queries: RowsByLeaf, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores, most_rows: float
) -> str | None:
    """What every kernel lacks for a call, of at most `most_rows` queries of a KV head."""
    if any(map(divided_by_compiler, jax.tree.leaves([run.leaves for run in slot_runs]))):
        return (
            "is not divided over a mesh by the compiler, only in jax.shard_map, "
            "or by Explicit axes that divide rows and heads alone"
        )
    _, heads, tokens, _ = next(iter(queries.values())).shape
    rows = heads // mask.num_kv_heads * tokens
    if rows > most_rows:
        return f"takes at most {most_rows} queries of a KV head, not {rows}"
    if scores.rope is not None:
        return "does not rotate keys"
    if any(x.dtype.itemsize > 4 for x in queries.values()):
        return "computes in float32"
    return None


def added_to_scores(read: Reader, count: int) -> jax.Array:
    """What is added to scores of `count` rows, float32 (B or 1, H or 1, R or 1, S): -inf hides."""
    slot_run, mask = read.slot_run, read.mask
    seen = mask.seen(slot_run, read.sight)
    bias = mask.bias_of(slot_run)
    bias = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    shape = jnp.broadcast_shapes(seen.shape, bias.shape)
    rows = (1, 1) if shape[2:4] == (1, 1) else (count // mask.tokens, mask.tokens)
    shape = (*shape[:2], *rows, slot_run.size)
    added = jnp.where(seen, jnp.broadcast_to(bias, shape), -jnp.inf)
    return added.reshape(*shape[:2], -1, slot_run.size)


def layer_number(slot_run: SlotRun) -> jax.Array:
    """Which layer of a stack a run is of, int32 []."""
    buffer = slot_run.buffer
    number = buffer.layer if isinstance(buffer, Stacked) else None
    return jnp.int32(0) if number is None else number


def padded_rows(rows: jax.Array, count: int) -> jax.Array:
    """Rows (B, H, R, D) with rows of zeros after them."""
    return jnp.pad(rows, [(0, 0), (0, 0), (0, count - rows.shape[2]), (0, 0)])


def turned_for(form: Form, rows: jax.Array) -> jax.Array:
    """Queries as keys of a form are stored: turned if those are."""
    if not isinstance(form, Rotated):
        return rows
    turn = jnp.asarray(hadamard(rows.shape[-1]), rows.dtype)
    return jnp.einsum("bhrd,de->bhre", rows, turn, precision="highest")


def joined(a: Running, b: Running) -> Running:
    """Two softmaxes over different tokens as one."""
    top = jnp.maximum(a.top, b.top)
    shift = jnp.where(jnp.isneginf(top), 0, top)
    of_a, of_b = jnp.exp(a.top - shift), jnp.exp(b.top - shift)
    acc = a.acc * of_a[..., None] + b.acc * of_b[..., None]
    return Running(top, a.total * of_a + b.total * of_b, acc)


def interpreted() -> bool:
    """Whether kernels that are traced now are interpreted, as Pallas' context managers say."""
    from jax.experimental import pallas as pl

    same = jax.typeof(jnp.zeros(())).mat  # for all devices
    one = jax.ShapeDtypeStruct((8, 128), jnp.float32, manual_axis_type=same)
    call = pl.pallas_call(lambda x, y: None, out_shape=one)
    (traced,) = jax.make_jaxpr(call)(one).eqns
    return bool(traced.params["interpret"])
