"""A masked product over a static run of slots: few kernels, at the price of scores for all of them.

On a GPU each turn of a walk is a dozen launches and its end is decided on the host, and on a TPU its
blocks are too small; this is one softmax over the whole capacity, or over a run that holds the slots in
use. Shapes as in softmax.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.attention.blocks import ByBlocks, Carry
from lucid_jax.attention.mask import Mask
from lucid_jax.attention.protocol import NotMe, platform
from lucid_jax.attention.softmax import Block, Query, RowsByLeaf, Scores, queries_by_leaf
from lucid_jax.attention.walk import attention
from lucid_jax.cache.reading import SlotRun


class Runs(NamedTuple):
    """Which powers of two of slots may be read instead of all."""

    short: int  # from here on
    share: int  # up to one in so many of all


# A GPU's host waits for the choice, and XLA copies a run there before it multiplies, which trebles what
# is moved. A TPU does neither: by its compiler's estimates a run costs what its length says.
RUNS = {"tpu": Runs(512, 2)}
OTHERS_RUNS = Runs(2048, 16)
FEW = 64  # queries of a KV head whose scores are small beside the tokens, however many those are
MOST = 1 << 20  # scores of a KV head, of more queries


def dense(
    query: Query, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
) -> tuple[jax.Array, jax.Array]:
    """The backend "dense", which takes every call: see `lucid_jax.attention.Backend`."""
    queries = queries_by_leaf(query)
    shape = next(iter(queries.values())).shape
    if shape[1:3] == (mask.num_kv_heads, 1):
        # With a single row to a KV head XLA makes no matrix product and transposes all values first.
        sinks = scores.sink_logits
        sinks = None if sinks is None else jnp.repeat(sinks, 2)
        scores = scores.replace(sink_logits=sinks)
        twice = {name: jnp.repeat(x, 2, axis=1) for name, x in queries.items()}
        out, lse = dense(twice, slot_runs, mask, scores)
        return _every_other(out), _every_other(lse)
    # Masked values would be a copy of them all, so that is only done if it turns out to be needed.
    return attention(ByBlocks(one_block, "trusting"), query, slot_runs, mask, scores)


def dense_if_small(
    query: Query, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
) -> tuple[jax.Array, jax.Array] | NotMe:
    """`dense` where scores are few and a layer lies by itself: tried first on GPUs and TPUs."""
    _, heads, tokens, _ = next(iter(queries_by_leaf(query).values())).shape
    rows = heads // mask.num_kv_heads * tokens
    slots = sum(slot_run.size for slot_run in slot_runs)
    if rows > FEW and rows * slots > MOST:
        return NotMe(f"keeps all scores, and {rows} queries of {slots} slots are more than {MOST}")
    if any(_packed(slot_run) for slot_run in slot_runs):
        return NotMe("would unpack all slots at once, and here several numbers share a byte")
    if any(slot_run.buffer.lead for slot_run in slot_runs):
        # On TPU by its compiler's estimate three times as long.
        return NotMe("reads a layer whole, which of a stack takes longer than the walk")
    return dense(query, slot_runs, mask, scores)


def _every_other(x: jax.Array) -> jax.Array:
    """Of heads (B, 2 H, ...) each second one; a stride along sharded heads would move them."""
    return x.reshape(len(x), -1, 2, *x.shape[2:])[:, :, 0]


def _packed(slot_run: SlotRun) -> bool:
    """Whether stored tokens are narrower than what they stand for."""
    each = ((jax.tree.leaves(slot_run.only([name]))[0], form) for name, form in slot_run.forms)
    return any(codes.shape[-1] < form.dim for codes, form in each)


def one_block(
    slot_run: SlotRun, rows: RowsByLeaf, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    """The product's way: one block, of the least of a few static sizes that holds all slots in use."""
    oldest = slot_run.start // slot_run.stride * slot_run.stride
    sizes = _sizes(slot_run)

    def over(size: int, carry: Carry) -> Carry:
        return body(carry, Block(jnp.minimum(oldest, slot_run.size - size), oldest, size))

    if len(sizes) == 1:
        return over(slot_run.size, carry)
    need = slot_run.stop - oldest
    which = jnp.sum(need > jnp.array(sizes[:-1], jnp.int32), dtype=jnp.int32)
    chosen: Carry = lax.switch(which, [partial(over, size) for size in sizes], carry)
    return chosen


def _sizes(slot_run: SlotRun) -> list[int]:
    """The runs to choose from, in whole groups of tokens, and all slots."""
    size, share = RUNS.get(platform(), OTHERS_RUNS)
    sizes = []
    while size * share <= slot_run.size:
        sizes.append(-(-size // slot_run.stride) * slot_run.stride)
        size *= 2
    return [*sizes, slot_run.size]
