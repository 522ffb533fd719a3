"""What queries see, as data: `Mask`, arrays and static facts that any kernel can take.

Nothing is a closure, so that a backward pass can read it again. Shapes: T queries of N = H * G heads;
masks and biases by index are (B or 1, N or 1, T or 1, C or 1), C the slots of `get`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lucid_jax.cache.reading import Sight, SlotRun
from lucid_jax.cache.slots import span

if TYPE_CHECKING:
    from lucid_jax.cache.layouts.base import Runs


@struct.dataclass
class Mask:
    """Which stored tokens each of T queries sees, and what is added to their scores.

    Attributes:
        position: int32 [T] or [B, T], absolute positions of the queries. A negative one is of no token,
            as padding: it sees nothing, not even a sink.
        sights: what the layer's layout lets them see: several only where RoPE by place differs.
        visible: bool by index; False hides a token. Trees of tokens are such a mask.
        bias: float by index, added to scores; minus infinity hides a token.
        num_kv_heads: H.
        causal: whether a query sees only its own position and those before.
        window: if given, a query sees itself and the `window - 1` positions before it.
    """

    position: jax.Array
    sights: tuple[Sight, ...]
    visible: jax.Array | None
    bias: jax.Array | None
    num_kv_heads: int = struct.field(pytree_node=False)
    causal: bool = struct.field(pytree_node=False)
    window: int | None = struct.field(pytree_node=False)

    if TYPE_CHECKING:

        def replace(self, **updates: object) -> Self:
            """A copy with some fields changed; flax adds it."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.position.shape[-1]

    @property
    def real(self) -> jax.Array:
        """Which queries are of a token, and not padding: bool (B or 1, 1, 1, T)."""
        return self.position.reshape(-1, 1, 1, self.tokens) >= 0

    def of_tokens(self, begin: jax.Array, count: int) -> Mask:
        """The mask of `count` of the queries, from one on."""

        def cut(x: jax.Array | None) -> jax.Array | None:
            if x is None or x.shape[2] == 1:
                return x
            return lax.dynamic_slice_in_dim(x, begin, count, 2)

        position = lax.dynamic_slice_in_dim(self.position, begin, count, -1)
        return self.replace(position=position, visible=cut(self.visible), bias=cut(self.bias))

    @property
    def by_head(self) -> bool:
        """Whether query heads that share a KV head may see different tokens."""
        given = (x for x in (self.visible, self.bias) if x is not None)
        return any(x.shape[1] > self.num_kv_heads for x in given)

    def seen(
        self, slot_run: SlotRun, sight: Sight, begin: jax.Array | int = 0, size: int | None = None
    ) -> jax.Array:
        """What queries see in slots [begin, begin + size) of a run as tokens of a sight.

        Args:
            slot_run: slots of a layer; dead ones are never seen.
            sight: one of `sights`.
            begin: the first slot, int32 [].
            size: how many, S; all by default.

        Returns:
            bool (B, H, G, T, S), or 1 in place of B, H, G or T where it is the same for all.
        """
        first, size = jnp.asarray(begin, jnp.int32), slot_run.size if size is None else size
        asked = self.position.reshape(-1, 1, 1, self.tokens, 1)
        at = positions_by_head(slot_run, first, size)[:, :, None, None]
        seen = jnp.zeros((1,) * 5, bool)
        for begins, ends in self.runs_seen(slot_run, sight, asked):
            seen = seen | ((at >= begins) & (at < ends))
        if self.visible is not None:
            seen = seen & self._cut(self.visible, slot_run, first, size)
        bias = self.bias_of(slot_run, first, size)
        return seen if bias is None else seen & ~jnp.isneginf(bias)

    def seen_between(
        self, slot_run: SlotRun, sight: Sight
    ) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """What each query sees, where that is all tokens of positions [low, high), and no others.

        Args:
            slot_run: slots of a layer, in order of positions.
            sight: one of `sights`.

        Returns:
            The position of slot 0, int32 [] or [B], and low and high of each query, int32 [T] or
            [B, T]; None where they do not say it all.
        """
        slots = slot_run.slots
        if self.visible is not None or self.bias is not None or slot_run.copy is not None:
            return None
        if not slots.in_order or sight.run is not None:
            return None
        asked, low, high = self.position, slots.low[..., None], slots.high[..., None]
        first_unseen = asked + 1 if self.causal else jnp.where(asked >= 0, high, 0)
        if self.window is not None:
            low = jnp.maximum(low, asked - (self.window - 1))
        first = slots.at(jnp.zeros((*slots.reach.shape, 1), jnp.int32))[..., 0]
        high = jnp.minimum(high, first_unseen)
        return first, jnp.broadcast_to(low, high.shape), high

    def runs_seen(self, slot_run: SlotRun, sight: Sight, asked: jax.Array) -> Runs:
        """Runs of positions [first, stop) that queries see, but for `visible` and `bias`.

        Args:
            slot_run: slots of a layer.
            sight: one of `sights`.
            asked: positions of the queries, int32 [...] or [B, ...]; -1 sees nothing.

        Returns:
            Of each run where it begins and where it ends, shaped as `asked`.
        """
        found = []
        for first, stop in sight.runs_seen(asked):
            first = jnp.maximum(first, 0)
            if self.causal:
                stop = jnp.minimum(stop, asked + 1)
            if self.window is not None:
                first = jnp.maximum(first, asked - (self.window - 1))
            if slot_run.copy is not None:
                first, stop = slot_run.copy.of_run(asked, first, stop)
            stop = jnp.where(asked >= 0, stop, 0)
            found.append((jnp.broadcast_to(first, asked.shape), stop))
        return tuple(found)

    def visible_of(self, slot_run: SlotRun) -> jax.Array | None:
        """What `visible` says of a run's slots, shaped as what `seen` gives; None if nothing."""
        if self.visible is None:
            return None
        return self._cut(self.visible, slot_run, jnp.int32(0), slot_run.size)

    def bias_of(
        self, slot_run: SlotRun, begin: jax.Array | int = 0, size: int | None = None
    ) -> jax.Array | None:
        """The bias of slots of a run, shaped as what `seen` gives; None if there is none."""
        if self.bias is None:
            return None
        first = jnp.asarray(begin, jnp.int32)
        return self._cut(self.bias, slot_run, first, slot_run.size if size is None else size)

    def add_to_bias(
        self, total: jax.Array, gradient: jax.Array, slot_run: SlotRun, begin: jax.Array
    ) -> jax.Array:
        """Adds the gradient of some slots, as `bias_of` gives their bias, to that of the whole bias."""
        batch, h, g, tokens, size = gradient.shape
        gradient = gradient.reshape(batch, h * g, tokens, size)
        if total.shape[-1] == 1:
            return total + _summed(gradient, total.shape)
        index = _index(slot_run, begin, size)
        if index is None:
            old = lax.dynamic_slice_in_dim(total, begin, size, axis=3)
            return lax.dynamic_update_slice_in_dim(total, old + gradient, begin, axis=3)
        # Slots that hold nothing have no index; their gradient is 0.
        index = jnp.clip(index, 0, total.shape[-1] - 1)
        if index.ndim == 1:
            return total.at[..., index].add(gradient)

        def add_row(total: jax.Array, gradient: jax.Array, index: jax.Array) -> jax.Array:
            return total.at[..., index].add(gradient)

        add = jax.vmap(add_row)
        if total.shape[0] > 1:
            return add(total, gradient, index)
        wide = add(jnp.zeros((batch, *total.shape[1:]), total.dtype), gradient, index)
        return total + jnp.sum(wide, axis=0, keepdims=True)

    def _cut(self, x: jax.Array, slot_run: SlotRun, begin: jax.Array, size: int) -> jax.Array:
        """Slots of a mask or bias by index, as (B|1, H|1, G|1, T|1, S|1)."""
        if x.shape[-1] > 1:
            index = _index(slot_run, begin, size)
            if index is None:
                x = lax.dynamic_slice_in_dim(x, begin, size, axis=3)
            elif index.ndim == 1:
                x = jnp.take(x, index, axis=-1, mode="clip")
            else:
                x = jnp.broadcast_to(x, (len(index), *x.shape[1:]))
                index = jnp.clip(index, 0, x.shape[-1] - 1)[:, None, None]
                x = jnp.take_along_axis(x, index, axis=-1)
        batch, heads, tokens, slots = x.shape
        split = (1, 1) if heads == 1 else (self.num_kv_heads, heads // self.num_kv_heads)
        return x.reshape(batch, *split, tokens, slots)


def with_padding(position: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Positions [T] or [B, T] of queries, -1 past the first `counts`, int32 [B], of each row."""
    if counts is None:
        return position
    real = span(jnp.zeros_like(counts), position.shape[-1]) < counts[:, None]
    return jnp.where(real, position, -1)


def positions_by_head(slot_run: SlotRun, begin: jax.Array, size: int) -> jax.Array:
    """Positions of slots [begin, begin + size), -1 if dead: int32 (B or 1, H or 1, S)."""
    at = slot_run.positions(begin, size)
    return at if at.ndim == 3 else at.reshape(-1, 1, size)


def _index(slot_run: SlotRun, begin: jax.Array, size: int) -> jax.Array | None:
    """Entries of a mask's last axis for some slots; None if they are the slots."""
    return None if slot_run.in_order else slot_run.index_of_slots(begin, size)


def _summed(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    axes = tuple(i for i, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m)
    return jnp.sum(x, axis=axes, keepdims=True)
