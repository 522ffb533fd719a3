"""The block walk: attention over the runs of a layer, a block of slots at a time, and its gradient.

A running softmax goes through the slots in use, so cost follows the length and not the capacity. The
backward pass walks the same blocks again, of any other way forward too. Shapes as in softmax.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lucid_jax.attention.blocks import (
    ByBlocks,
    Way,
    each_block,
    each_small_block,
    tokens_of_small_block,
)
from lucid_jax.attention.by_row import RowByRow
from lucid_jax.attention.gradient import (
    Gradients,
    finite,
    floats_of,
    gradient_block,
    gradient_of_sinks,
    incoming,
)
from lucid_jax.attention.mask import Mask
from lucid_jax.attention.softmax import (
    Query,
    Reader,
    RowsByLeaf,
    Running,
    Scores,
    nothing_read,
    queries_by_leaf,
    rows_of,
)
from lucid_jax.cache.carry import varying_as
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun


def walk(
    query: Query, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
) -> tuple[jax.Array, jax.Array]:
    """The backend "walk", which takes every call: see `lucid_jax.attention.Backend`."""
    way: Way = RowByRow("masked") if mask.tokens == 1 else ByBlocks(each_block, "masked")
    return attention(way, query, slot_runs, mask, scores)


@struct.dataclass
class _Asked:
    """All that attention reads and that has no gradient: who sees what."""

    slot_runs: tuple[SlotRun, ...]  # without their tokens
    mask: Mask  # without its bias
    scores: Scores  # without the sinks
    queries: RowsByLeaf  # as they were given, beside the rows that gradients go through


@struct.dataclass
class _Inputs:
    """All that attention reads and that may have a gradient."""

    rows: tuple[RowsByLeaf, ...]  # per sight
    tokens: tuple[Packed, ...]  # of each run, the leaves that are scored or mixed
    bias: jax.Array | None
    sink_logits: jax.Array | None


def attention(
    way: Way, query: Query, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
) -> tuple[jax.Array, jax.Array]:
    """Attention as a running softmax by some way forward; backward it is the walk.

    Differentiable in reverse mode: by queries, bias, sinks and the floating-point leaves of the runs.

    Args:
        way: how it goes forward; static.
        query: (B, N, T, D), or one for each leaf that is scored, by name.
        slot_runs: what is stored.
        mask: who sees what.
        scores: what is done to scores.

    Returns:
        (B, N, T, Dv) and the log-sum-exp (B, N, T), both in float32 or wider.
    """
    queries = queries_by_leaf(query)
    tokens = tuple(slot_run.only({*queries, slot_run.mixed}) for slot_run in slot_runs)
    inputs = _Inputs(rows_of(queries, mask, scores), tokens, mask.bias, scores.sink_logits)
    bare = tuple(slot_run.replace(leaves=None) for slot_run in slot_runs)
    given = lax.stop_gradient(queries)
    asked = _Asked(bare, mask.replace(bias=None), scores.replace(sink_logits=None), given)
    out, lse = _attention(way, *varying_as((inputs, asked)))
    shape = next(iter(queries.values())).shape[:3]
    return out.reshape(*shape, -1), lse.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(way: Way, inputs: _Inputs, asked: _Asked) -> tuple[jax.Array, jax.Array]:
    rows, mask = next(iter(inputs.rows[0].values())), asked.mask.replace(bias=inputs.bias)
    value_dim = asked.slot_runs[0].value_form.dim
    start = varying_as(nothing_read(rows, value_dim, mask, inputs.sink_logits), rows)
    running = _softmax(way, inputs, asked, start)
    # Whether queries of a KV head may see different tokens.
    many = mask.tokens > 1 or mask.by_head
    careful = ByBlocks(each_small_block, "exact" if many else "masked")
    if way.care != careful.care:
        # A token that is not finite shows in the sum of whoever read its block. Then all is walked
        # again, with more care. By a loop and not a choice, which under vmap would always do both.
        broken = ~jnp.all(jnp.isfinite(running.acc))
        running = lax.while_loop(
            lambda carry: carry[0],
            lambda carry: (carry[0] & False, _softmax_in_tiles(careful, inputs, asked, start)),
            (broken, running),
        )[1]
    total = running.total
    seen = total > 0
    out = running.acc / jnp.where(seen, total, 1)[..., None]
    return out, jnp.log(total) + jnp.where(seen, running.top, 0)


def _softmax(way: Way, inputs: _Inputs, asked: _Asked, running: Running) -> Running:
    """Goes on with a softmax over all runs, sight by sight."""
    for r, p, read in _readers(inputs, asked):
        running = way.over(read, inputs.rows[r], inputs.tokens[p], running)
    return running


def _softmax_in_tiles(way: Way, inputs: _Inputs, asked: _Asked, running: Running) -> Running:
    """The same, for some queries after the others, so that the scores of a block are few."""
    mask = asked.mask
    batch, heads, queries = running.top.shape
    group = queries // mask.tokens
    count = min(mask.tokens, tokens_of_small_block(batch * heads * group))
    if count == mask.tokens:
        return _softmax(way, inputs, asked, running)

    def by_token(x: jax.Array) -> jax.Array:  # (B, H, G * T, ...) as (B, H, G, T, ...)
        return x.reshape(batch, heads, group, mask.tokens, *x.shape[3:])

    def tile(turn: jax.Array, found: Running) -> Running:
        begin = jnp.minimum(turn * count, mask.tokens - count)

        def cut(x: jax.Array) -> jax.Array:
            some = lax.dynamic_slice_in_dim(by_token(x), begin, count, 3)
            return some.reshape(batch, heads, group * count, *x.shape[3:])

        def put(x: jax.Array, some: jax.Array) -> jax.Array:
            some = some.reshape(batch, heads, group, count, *x.shape[3:])
            return lax.dynamic_update_slice_in_dim(by_token(x), some, begin, 3).reshape(x.shape)

        some = mask.replace(bias=inputs.bias).of_tokens(begin, count)
        rows = jax.tree.map(cut, inputs.rows)
        new = _softmax(
            way,
            dataclasses.replace(inputs, rows=rows, bias=some.bias),
            dataclasses.replace(asked, mask=some.replace(bias=None)),
            Running(*map(cut, running)),
        )
        return Running(*map(put, found, new))

    tiles = jnp.int32(-(-mask.tokens // count))
    all_of_them: Running = lax.fori_loop(jnp.int32(0), tiles, tile, running)
    return all_of_them


def _readers(inputs: _Inputs, asked: _Asked) -> Iterator[tuple[int, int, Reader]]:
    """What is read of each sight and run, the first run up to where tokens of a sight can be."""
    mask = asked.mask.replace(bias=inputs.bias)
    for r, sight in enumerate(mask.sights):
        for p, slot_run in enumerate(asked.slot_runs):
            if p == 0 and sight.slots is not None:
                slot_run = slot_run.replace(stop=jnp.minimum(slot_run.stop, sight.slots))
            yield r, p, Reader(asked.scores, mask, slot_run, sight, asked.queries)


# --- backward ----------------------------------------------------------------------------------------


@struct.dataclass
class _Wanted:
    """Which gradients are asked for; the others are not computed."""

    rows: bool = struct.field(pytree_node=False)
    tokens: tuple[bool, ...] = struct.field(pytree_node=False)
    bias: bool = struct.field(pytree_node=False)
    sink_logits: bool = struct.field(pytree_node=False)


def _forward(way: Way, inputs: Any, asked: Any) -> Any:
    def perturbed(tree: Any) -> bool:
        return any(leaf.perturbed for leaf in jax.tree.leaves(tree))

    wanted = _Wanted(
        perturbed(inputs.rows),
        tuple(map(perturbed, inputs.tokens)),
        perturbed(inputs.bias),
        perturbed(inputs.sink_logits),
    )
    inputs, asked = jax.tree.map(lambda x: x.value, (inputs, asked))
    out, lse = _attention(way, inputs, asked)
    return (out, lse), (wanted, inputs, asked, out, lse)


def _backward(way: Way, kept: Any, cotangents: Any) -> Any:
    wanted, inputs, asked, out, lse = kept
    d_out, d_lse = (
        jnp.zeros(like.shape, like.dtype)
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
        else cotangent
        for cotangent, like in zip(cotangents, (out, lse), strict=True)
    )
    grad = incoming(out, lse, d_out, d_lse)
    d_rows: list[Any] = [
        jax.tree.map(jnp.zeros_like, x) if wanted.rows else None for x in inputs.rows
    ]
    d_tokens: list[Any] = [
        jax.tree.map(jnp.zeros_like, floats_of(x)) if want else None
        for x, want in zip(inputs.tokens, wanted.tokens, strict=True)
    ]
    d_bias = jnp.zeros(inputs.bias.shape, out.dtype) if wanted.bias else None
    d_rows, d_tokens, d_bias = varying_as((d_rows, d_tokens, d_bias), inputs.rows)
    for r, p, read in _readers(inputs, asked):
        mine = jax.tree.map(finite, inputs.rows[r])
        body = partial(gradient_block, grad, read, mine, inputs.tokens[p])
        sums = Gradients(d_rows[r], d_tokens[p], d_bias)
        d_rows[r], d_tokens[p], d_bias = each_block(read.slot_run, mine, body, sums)
    d_sinks = None
    if wanted.sink_logits:
        d_sinks = gradient_of_sinks(grad, inputs.sink_logits, asked.mask)
    d_bias = None if d_bias is None else d_bias.astype(inputs.bias.dtype)
    return _Inputs(tuple(d_rows), tuple(d_tokens), d_bias, d_sinks), None


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
