"""A running softmax over blocks of slots, and its gradient block by block.

Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022. The gradient computes a block's weights
again from the log-sum-exp, so that scores need not be kept. Shapes: rows (B, H, R, D), R = G * T: the
queries of a KV head, heads of a group before tokens; one for each leaf that is scored, by its name.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import struct

from lucid_jax.attention.mask import Mask
from lucid_jax.attention.rope import Rope, rope
from lucid_jax.cache.codecs.base import Form, Stored, products
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import Sight, SlotRun
from lucid_jax.cache.slots import span
from lucid_jax.cache.tiles import held


@struct.dataclass
class Scores:
    """What attention does to scores.

    Attributes:
        sink_logits: float [N], one more logit in the softmax of each query head; None for none.
        scale: multiplies the products of queries and keys.
        softcap: if given, they become `softcap * tanh(scores / softcap)`.
        rope: if given, queries and keys are rotated by their places, which `Mask.sights` tell.
    """

    sink_logits: jax.Array | None
    scale: float = struct.field(pytree_node=False)
    softcap: float | None = struct.field(pytree_node=False)
    rope: Rope | None = struct.field(pytree_node=False)

    if TYPE_CHECKING:

        def replace(self, **updates: object) -> Self:
            """A copy with some fields changed; flax adds it."""


RowsByLeaf = dict[str, jax.Array]  # of each leaf that is scored, (B, H, R, D)

Query = jax.Array | RowsByLeaf  # (B, N, T, D), of `key`, or by the names of leaves

Care = Literal["trusting", "masked", "exact"]
"""What is done about values that are not finite.

trusting: nothing, so that a weight of 0 does not silence them.
masked: those that no query sees are zeros.
exact: and the others reach those queries alone that see them.
"""


class Block(NamedTuple):
    """Slots [begin, begin + size) of a run, of which only those from `low` on are new."""

    begin: jax.Array
    low: jax.Array
    size: int


class Running(NamedTuple):
    """A softmax over the tokens read so far, per query (B, H, R)."""

    top: jax.Array  # the largest score
    total: jax.Array  # sum of exp(score - top)
    acc: jax.Array  # (B, H, R, Dv): sum of exp(score - top) * value


@dataclasses.dataclass(frozen=True)
class Reader:
    """One run as the queries of one sight see it, block by block."""

    scores: Scores
    mask: Mask
    slot_run: SlotRun
    sight: Sight
    queries: RowsByLeaf  # (B, N, T, D), as they were given: neither scaled nor rotated

    def scored(
        self, rows: RowsByLeaf, stored: Packed, bias: jax.Array | None, block: Block
    ) -> jax.Array:
        """Scores of a block, (B, H, G, T, S), of what is seen and what is not."""
        softcap = self.scores.softcap
        each = [self._products(name, x, stored[name], block) for name, x in rows.items()]
        scores = sum(each[1:], each[0])
        batch, heads, _, size = scores.shape
        scores = scores.reshape(batch, heads, -1, self.mask.tokens, size)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        return scores if bias is None else scores + bias.astype(scores.dtype)

    def _products(self, name: str, rows: jax.Array, stored: Stored, block: Block) -> jax.Array:
        """Products of rows and one leaf of a block, (B, H, R, S)."""
        form, table = self.slot_run.form(name), self.scores.rope
        if table is None:
            return form.scores(rows, stored)
        index = self.sight.key_index(self.slot_run.slots.counted(block.begin, block.size))
        keys = rope(form.decode(stored).astype(rows.dtype), index, table)
        return products(rows, keys, form.precision)

    def seen(self, block: Block) -> jax.Array:
        """What each query sees of a block that is new: bool, (B, H, G, T, S) or axes of 1."""
        begin, low, size = block
        new = (span(begin, size) >= low).reshape(1, 1, 1, 1, size)
        return new & self.mask.seen(self.slot_run, self.sight, begin, size)

    def bias(self, block: Block) -> jax.Array | None:
        """The bias of a block."""
        return self.mask.bias_of(self.slot_run, block.begin, block.size)


# --- forward -----------------------------------------------------------------------------------------


def queries_by_leaf(query: Query) -> RowsByLeaf:
    """Queries by the leaf that they are scored with."""
    return query if isinstance(query, dict) else {"key": query}


def rows_of(queries: RowsByLeaf, mask: Mask, scores: Scores) -> tuple[RowsByLeaf, ...]:
    """Queries (B, N, T, D) as rows (B, H, R, D), for each sight scaled and, by index, rotated.

    They are float32 at least. Heads of a group and tokens share one axis: scores are one matrix product
    per KV head.
    """

    def rows(query: jax.Array, sight: Sight) -> jax.Array:
        batch, heads, tokens, dim = query.shape
        wide = query.dtype if query.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
        turned = query.astype(wide)
        if scores.rope is not None:
            turned = rope(turned, sight.query_index, scores.rope)
        shape = (batch, mask.num_kv_heads, heads // mask.num_kv_heads * tokens, dim)
        return (turned * scores.scale).reshape(shape)

    return tuple(
        {name: rows(query, sight) for name, query in queries.items()} for sight in mask.sights
    )


def nothing_read(
    rows: jax.Array, value_dim: int, mask: Mask, sink_logits: jax.Array | None
) -> Running:
    """A softmax before any token, of the sinks alone if there are some."""
    batch, heads, queries, _ = rows.shape
    shape, wide = (batch, heads, queries), rows.dtype
    acc = jnp.zeros((*shape, value_dim), wide)
    if sink_logits is None:
        return Running(jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide), acc)
    logit = sink_of(sink_logits, mask, wide)
    logit = jnp.broadcast_to(logit, (batch, *logit.shape[1:])).reshape(shape)
    return Running(logit, jnp.where(jnp.isneginf(logit), 0, jnp.ones((), wide)), acc)


def sink_of(sink_logits: jax.Array, mask: Mask, dtype: jnp.dtype) -> jax.Array:
    """The sink's logit of each query, (B or 1, H, G, T); -inf for padding, which sees nothing."""
    logit = sink_logits.astype(dtype).reshape(1, mask.num_kv_heads, -1, 1)
    return jnp.where(mask.real, logit, -jnp.inf)


def softmax_block(
    read: Reader, rows: RowsByLeaf, stored: Packed, care: Care, running: Running, block: Block
) -> Running:
    """Goes on with a softmax over the tokens of a block.

    Args:
        read: what is read.
        rows: (B, H, R, D), see `rows_of`.
        stored: the run's tokens.
        care: what is done about values that are not finite.
        running: the softmax so far.
        block: which slots.
    """
    top, total, acc = running
    slot_run = read.slot_run
    cut = slot_run.cut(stored, block.begin, block.size)
    value, seen = cut[slot_run.mixed], read.seen(block)
    scores = jnp.where(seen, read.scored(rows, cut, read.bias(block), block), -jnp.inf)
    scores = scores.reshape(*top.shape, -1)

    # While nothing was seen the maximum is -inf; subtracting 0 instead keeps NaN out.
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    shift = jnp.where(jnp.isneginf(new_top), 0, new_top)
    weights = jnp.exp(scores - shift[..., None])
    decay = jnp.exp(top - shift)
    total = total * decay + jnp.sum(weights, axis=-1)
    alive = jnp.any(seen, axis=(2, 3))
    if care == "exact":
        mixed = _mix_exactly(slot_run.value_form, weights, value, seen, alive)
    else:
        value = value if care == "trusting" else _kept(value, alive)
        mixed = slot_run.value_form.mix(weights, value)
    return Running(new_top, total, acc * decay[..., None] + mixed)


def _mix_exactly(
    form: Form, weights: jax.Array, value: Stored, seen: jax.Array, alive: jax.Array
) -> jax.Array:
    """Weights times values, of which what is not finite goes to the queries that see it alone."""
    # XLA for TPUs may want a block in another order, and then always copies all slots into that.
    value = jax.tree.map(lambda leaf: held(leaf) if leaf.ndim > 3 else leaf, value)
    sound = form.is_finite(value)
    broken = alive & ~sound
    tokens = jnp.where(broken[..., None], form.decode(value).astype(weights.dtype), 0)
    finite = jnp.isfinite(tokens)
    group = weights.shape[2] // seen.shape[3]
    each = jnp.broadcast_to(seen, (*weights.shape[:2], group, *seen.shape[3:]))
    each = each.reshape(weights.shape) & broken[:, :, None]
    mix = partial(jnp.einsum, "bhrs,bhsd->bhrd", precision=form.precision)
    met = each.astype(weights.dtype)
    nan, high, low = (
        mix(met, kind(tokens).astype(weights.dtype)) > 0
        for kind in (jnp.isnan, jnp.isposinf, jnp.isneginf)
    )
    extra = mix(jnp.where(each, weights, 0), jnp.where(finite, tokens, 0))
    extra = jnp.where(high, jnp.inf, jnp.where(low, -jnp.inf, extra))
    extra = jnp.where(nan | (high & low), jnp.nan, extra)
    return form.mix(weights, _kept(value, alive & sound)) + extra


def _kept(stored: Stored, keep: jax.Array) -> Stored:
    """Stored values, leaves (B, H, S, ...), of the tokens to keep, bool (B or 1, H or 1, S); else 0."""

    def kept(leaf: jax.Array) -> jax.Array:
        shaped = keep.reshape(*keep.shape, *(1,) * (leaf.ndim - 3))
        return jnp.where(shaped, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(kept, stored)
