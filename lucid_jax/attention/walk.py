"""The block walk: attention over the runs of a layer, a block of slots at a time, and its gradient.

A running softmax goes through the slots in use, so cost follows the length and not the capacity (few
slots most of which are in use are read at once, so there it is at most twice as much). The
backward pass walks the same blocks again, of any other way forward too. Shapes as in softmax.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lucid_jax.attention.gradient import (
    Gradients,
    finite,
    floats_of,
    gradient_block,
    gradient_of_sinks,
    incoming,
)
from lucid_jax.attention.mask import Mask
from lucid_jax.attention.protocol import platform
from lucid_jax.attention.softmax import (
    Block,
    Care,
    Query,
    Reader,
    RowsByLeaf,
    Running,
    Scores,
    nothing_read,
    queries_by_leaf,
    rows_of,
    softmax_block,
)
from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.carry import varying_as
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun


class Sizes(NamedTuple):
    """What a block may be."""

    least: int  # slots, whatever else
    most: int  # slots
    tokens: int  # the most numbers of its keys, of all rows and heads
    scores: int  # the most numbers, of all rows, heads and queries


# On CPU a turn of the loop costs as much as some ten thousand numbers, and what a block holds is to be
# in the cores' caches: of 64 to 2048 slots these are the best, or nearly, from 1 row of 2 heads of 64
# to 64 rows of 8 heads of 128, for one query and for 512. A TPU reads a block where it lies: by its
# compiler's estimates the longer it is the better, while scores fit its memory. A GPU copies it first.
SIZES = {
    "cpu": Sizes(64, 512, 1 << 19, 1 << 20),
    "tpu": Sizes(256, 4096, 1 << 26, 1 << 24),
}
OTHERS_SIZES = Sizes(256, 512, 1 << 26, 1 << 24)

Carry = TypeVar("Carry")


class Blocks(Protocol):
    """How the slots of a run that are in use are gone through."""

    def __call__(
        self,
        slot_run: SlotRun,
        rows: RowsByLeaf,
        body: Callable[[Carry, Block], Carry],
        carry: Carry,
        /,
    ) -> Carry:
        """Runs `body(carry, block)` over blocks that hold slots `slot_run.start` to `slot_run.stop`.

        `rows` are the queries, which say how large a block of so many slots is.
        """
        ...


class Way(Protocol):
    """A way forward; hashable."""

    @property
    def care(self) -> Care:
        """With how much of it."""
        ...

    def over(self, read: Reader, rows: RowsByLeaf, stored: Packed, running: Running, /) -> Running:
        """Goes on with a softmax over what is stored in a run."""
        ...


class ByBlocks(NamedTuple):
    """The way of a running softmax: which blocks, and with how much care."""

    blocks: Blocks
    care: Care

    def over(self, read: Reader, rows: RowsByLeaf, stored: Packed, running: Running) -> Running:
        """Goes on with a softmax, block by block."""
        body = partial(softmax_block, read, rows, stored, self.care)
        return self.blocks(read.slot_run, rows, body, running)


def walk(
    query: Query, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores
) -> tuple[jax.Array, jax.Array]:
    """The backend "walk", which takes every call: see `lucid_jax.attention.Backend`."""
    blocks: Blocks = at_once_or_each_block if mask.tokens == 1 else each_block
    return attention(ByBlocks(blocks, "masked"), query, slot_runs, mask, scores)


def block_size(rows: RowsByLeaf) -> int:
    """Slots of a block for queries (B, H, R, D), a power of two."""
    sizes = SIZES.get(platform(), OTHERS_SIZES)
    batch, heads, queries, _ = next(iter(rows.values())).shape
    dim = sum(x.shape[-1] for x in rows.values())
    each = max(batch * heads, 1)
    size = min(sizes.most, sizes.tokens // (each * dim), sizes.scores // (each * queries))
    return 1 << (max(size, sizes.least).bit_length() - 1)


def at_once_or_each_block(
    slot_run: SlotRun, rows: RowsByLeaf, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    """A decode step's way: all slots at once if they are few and most are in use, else by blocks.

    A block is copied out of its leaf before it is multiplied, which takes XLA on CPU as long as the
    products do; of the whole leaf only values are, to mask those that are dead. It is read in a loop of
    one turn: not by a choice, which under vmap would always do both, nor right after its append, as XLA
    then appends to a copy of it too.
    """
    one_block = block_size(rows) >= slot_run.size
    if platform() != "cpu" or not (one_block or _can_be_read_at_once(slot_run, rows)):
        return each_block(slot_run, rows, body, carry)
    used = slot_run.stop - slot_run.start
    most = used > 0 if one_block else 2 * used > slot_run.size

    def whole(turn: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        going, carry = turn
        return going & False, body(carry, Block(jnp.int32(0), slot_run.start, slot_run.size))

    carry = lax.while_loop(lambda turn: turn[0], whole, (most, carry))[1]
    if one_block:
        return carry
    rest = slot_run.replace(stop=jnp.where(most, slot_run.start, slot_run.stop))
    return each_block(rest, rows, body, carry)


def _can_be_read_at_once(slot_run: SlotRun, rows: RowsByLeaf) -> bool:
    """Whether all slots are no more than a block may hold, and lie as they are multiplied."""
    one = next(iter(rows.values()))
    batch, heads, queries, _ = one.shape
    each = batch * heads * slot_run.size
    few = each * sum(x.shape[-1] for x in rows.values()) <= SIZES["cpu"].tokens
    ready = all(
        form.differentiable and form.dtype == one.dtype
        for name, form in slot_run.forms
        if name in rows or name == slot_run.mixed
    )
    return few and each * queries <= SIZES["cpu"].scores and ready and slot_run.buffer == Rows()


def each_block(
    slot_run: SlotRun, rows: RowsByLeaf, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    """Blocks of `block_size` slots one by one; the last may overlap the one before."""
    return _blocks_of(block_size(rows), slot_run, body, carry)


def each_small_block(
    slot_run: SlotRun, rows: RowsByLeaf, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    """The same for what is hardly ever done, and takes its memory all the same: the least blocks."""
    return _blocks_of(SIZES.get(platform(), OTHERS_SIZES).least, slot_run, body, carry)


def _blocks_of(
    slots: int, slot_run: SlotRun, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    size = min(max(slots // slot_run.stride, 1) * slot_run.stride, slot_run.size)
    oldest = slot_run.start // slot_run.stride * slot_run.stride

    def step(turn_and_carry: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        turn, carry = turn_and_carry
        low = oldest + turn * size
        return turn + 1, body(carry, Block(jnp.minimum(low, slot_run.size - size), low, size))

    if size == slot_run.size:
        # One block holds it: no loop, at whose turns XLA on CPU waits for its threads (16 us a layer of
        # the shipped model with 4 new tokens).
        return step((jnp.int32(0), carry))[1]
    # Counted in ones: XLA gets the trip count of a constant loop wrong if the step does not divide
    # its range, and then drops turns (openxla/xla#48454).
    turns = -(-(slot_run.stop - oldest) // size)
    return lax.while_loop(lambda carry: carry[0] < turns, step, (jnp.int32(0), carry))[1]


@struct.dataclass
class _Asked:
    """All that attention reads and that has no gradient: who sees what."""

    slot_runs: tuple[SlotRun, ...]  # without their tokens
    mask: Mask  # without its bias
    scores: Scores  # without the sinks


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
    asked = _Asked(bare, mask.replace(bias=None), scores.replace(sink_logits=None))
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
            lambda carry: (carry[0] & False, _softmax(careful, inputs, asked, start)),
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


def _readers(inputs: _Inputs, asked: _Asked) -> Iterator[tuple[int, int, Reader]]:
    """What is read of each sight and run, the first run up to where tokens of a sight can be."""
    mask = asked.mask.replace(bias=inputs.bias)
    for r, sight in enumerate(mask.sights):
        for p, slot_run in enumerate(asked.slot_runs):
            if p == 0 and sight.slots is not None:
                slot_run = slot_run.replace(stop=jnp.minimum(slot_run.stop, sight.slots))
            yield r, p, Reader(asked.scores, mask, slot_run, sight)


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
