"""The gradient of attention through one block of slots: finite where the block holds NaN unseen.

Weights are computed again from the log-sum-exp, so memory is linear in the queries and in the capacity.
Shapes as in softmax.py: rows (B, H, R, D), R = G * T.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.attention.mask import Mask
from lucid_jax.attention.softmax import Block, Reader, RowsByLeaf, sink_of
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun


class Incoming(NamedTuple):
    """What the backward pass knows of each query, (B, H, R) and (B, H, R, Dv)."""

    d_out: jax.Array
    common: jax.Array  # d loss / d score is weight * (d_out . value - this)
    shift: jax.Array  # its log-sum-exp; infinity where the output is not used
    spoilt: jax.Array  # gives NaN to what it saw, and to nothing else


class Gradients(NamedTuple):
    """Sums so far; None for what no gradient is asked of."""

    rows: RowsByLeaf | None
    tokens: Packed | None
    bias: jax.Array | None


def incoming(out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> Incoming:
    """Results (B, H, R, Dv) and (B, H, R) and their cotangents, as blocks need them."""
    # An output that nobody uses has no gradient, even if it is NaN.
    used = jnp.any(d_out != 0, axis=-1) | (d_lse != 0)
    sound = (jnp.isfinite(lse) | jnp.isneginf(lse)) & jnp.all(jnp.isfinite(d_out), axis=-1)
    return Incoming(
        d_out=finite(d_out),
        common=jnp.where(used, jnp.sum(d_out * out, axis=-1) - d_lse, 0),
        shift=jnp.where(used, jnp.where(jnp.isneginf(lse), 0, lse), jnp.inf),
        spoilt=used & ~sound,
    )


def gradient_block(
    grad: Incoming, read: Reader, rows: RowsByLeaf, stored: Packed, sums: Gradients, block: Block
) -> Gradients:
    """Adds the gradients that come through a block."""
    slot_run = read.slot_run
    # What some query does not see may be anything, and 0 * NaN is NaN.
    cut = slot_run.cut(stored, block.begin, block.size)
    cut = {name: slot_run.form(name).made_finite(x) for name, x in cut.items()}
    seen, bias = read.seen(block), read.bias(block)
    bias = None if bias is None else finite(bias).astype(grad.shift.dtype)

    def score(rows: RowsByLeaf, floats: Any, bias: jax.Array | None) -> jax.Array:
        return read.scored(rows, _with_floats(cut, floats), bias, block)

    scores, pull_scores = jax.vjp(score, rows, floats_of(cut), bias)
    grouped = scores.shape  # (B, H, G, T, S)

    def per_query(x: jax.Array) -> jax.Array:
        return x.reshape(*grouped[:4], 1)

    weights = jnp.where(seen, jnp.exp(scores - per_query(grad.shift)), 0)
    weights = jnp.where(seen & per_query(grad.spoilt), jnp.nan, weights)
    flat = weights.reshape(*grad.shift.shape, -1)

    def mix(weights: jax.Array, floats: Any) -> jax.Array:
        return slot_run.value_form.mix(weights, _with_floats(cut[slot_run.mixed], floats))

    _, pull_mix = jax.vjp(mix, flat, floats_of(cut[slot_run.mixed]))
    d_weights, d_mixed = pull_mix(grad.d_out)
    d_scores = weights * (d_weights.reshape(grouped) - per_query(grad.common))
    d_scores = jnp.where(seen, d_scores, 0)
    d_rows, d_tokens, d_bias = pull_scores(d_scores)
    # A leaf may be both scored and mixed.
    d_tokens[slot_run.mixed] = jax.tree.map(jnp.add, d_tokens[slot_run.mixed], d_mixed)
    add = partial(_add_slots, slot_run, block.begin)
    return Gradients(
        None if sums.rows is None else jax.tree.map(jnp.add, sums.rows, d_rows),
        None if sums.tokens is None else jax.tree.map(add, sums.tokens, d_tokens),
        None
        if sums.bias is None
        else read.mask.add_to_bias(sums.bias, d_bias, slot_run, block.begin),
    )


def gradient_of_sinks(grad: Incoming, sink_logits: jax.Array, mask: Mask) -> jax.Array:
    """The gradient [N] of logits whose value is zero, summed in the rows' dtype."""
    logit = sink_of(sink_logits, mask, grad.shift.dtype)

    def per_query(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), mask.num_kv_heads, -1, mask.tokens)

    weights = jnp.exp(logit - per_query(grad.shift))
    weights = jnp.where(per_query(grad.spoilt) & mask.real, jnp.nan, weights)
    # One that weighs nothing has no gradient, whatever the others have.
    share = jnp.where(weights == 0, 0, -weights * per_query(grad.common))
    return jnp.sum(share, axis=(0, 3)).reshape(sink_logits.shape).astype(sink_logits.dtype)


def _add_slots(
    slot_run: SlotRun, begin: jax.Array, total: jax.Array, block: jax.Array
) -> jax.Array:
    """Adds the gradient of a block's slots to that of all."""
    first = begin // (slot_run.size // slot_run.buffer.slots(total))
    old = slot_run.buffer.read(total, first, block.shape[2])
    return slot_run.buffer.write(total, old + block, first)


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def floats_of(tree: Any) -> Any:
    """The leaves that can carry a gradient; None in place of codes."""
    return jax.tree.map(lambda x: x if _is_float(x) else None, tree)


def _with_floats(tree: Any, floats: Any) -> Any:
    """`tree`, with what `floats_of` took from it replaced."""
    return jax.tree.map(
        lambda x, y: x if y is None else y, tree, floats, is_leaf=lambda x: x is None
    )


def finite(x: jax.Array) -> jax.Array:
    """`x`, with zeros for what is not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))
