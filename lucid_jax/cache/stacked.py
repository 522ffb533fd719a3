"""Stacks: several layers of one kind as one layer state, for models that scan over their layers.

Leaves are (L, B, H, S, ...), counters [L] or [L, B]. A view is one layer of a stack: it holds the
whole leaves and its number in them, so that what it reads and writes goes to (number, ...) of the
leaf, in place in the carry of a `scan`, and never moves a layer's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.typing import ArrayLike

from lucid_jax.cache.allocation import INT32_MAX
from lucid_jax.cache.argument_checks import as_integers, is_traced
from lucid_jax.cache.buffers import Rows, scatter
from lucid_jax.cache.carry import varying_as
from lucid_jax.cache.tiles import as_it_lies
from lucid_jax.cache.tokens import TokenLayer

Counters = dict[str, jax.Array]


@struct.dataclass
class Stacked(Rows):
    """Layers one after the other, each of which has rows with slots of their own."""

    # int32 [], of a view; None: of all layers, whose leaves none reads
    layer: jax.Array | None = None
    lead: ClassVar[int] = 1

    @property
    def counter_lead(self) -> int:
        """Axes of counters before rows."""
        return 1 if self.layer is None else 0

    def sizes(self, leaf: jax.Array) -> tuple[int, int, int]:
        _, batch, heads, slots = leaf.shape[:4]
        return batch, heads, slots

    def own(self, leaf: jax.Array) -> jax.Array:
        own: jax.Array = lax.dynamic_index_in_dim(leaf, self._number, 0, keepdims=False)
        return own

    def with_own(self, leaf: jax.Array, own: jax.Array) -> jax.Array:
        changed: jax.Array = lax.dynamic_update_index_in_dim(leaf, own, self._number, 0)
        return changed

    def read(self, leaf: jax.Array, begin: jax.Array, size: int) -> jax.Array:
        return self._cut(leaf, jnp.int32(0), begin, leaf.shape[1], size)

    def write(self, leaf: jax.Array, tokens: jax.Array, begin: jax.Array) -> jax.Array:
        return self._paste(leaf, tokens, jnp.int32(0), begin)

    def take(self, leaf: jax.Array, slots: jax.Array) -> jax.Array:
        rows = slots.ndim - 1
        windows = lax.GatherDimensionNumbers(
            offset_dims=(*range(rows, 2), *range(3, leaf.ndim - 1)),
            collapsed_slice_dims=(0, 3),
            start_index_map=(0, 3),
            operand_batching_dims=(1,) * rows,
            start_indices_batching_dims=(0,) * rows,
        )
        sizes = (1, 1 if rows else leaf.shape[1], leaf.shape[2], 1, *leaf.shape[4:])
        return lax.gather(leaf, self._numbered(slots), windows, sizes, mode="clip")

    def take_by_head(self, leaf: jax.Array, slots: jax.Array) -> jax.Array:
        windows = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(3, leaf.ndim - 1)),
            collapsed_slice_dims=(0, 3),
            start_index_map=(0, 3),
            operand_batching_dims=(1, 2),
            start_indices_batching_dims=(0, 1),
        )
        sizes = (1, 1, 1, 1, *leaf.shape[4:])
        return lax.gather(leaf, self._numbered(slots), windows, sizes, mode="clip")

    def write_rows(self, leaf: jax.Array, tokens: jax.Array, begin: jax.Array) -> jax.Array:
        # The layer's axis stays, of size 1, here and below: without it XLA for TPUs copies the stack.
        windows = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(1, leaf.ndim)),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(0, 3),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )
        return scatter(leaf, self._numbered(begin), jnp.expand_dims(tokens, 1), windows)

    def scatter_at(self, leaf: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
        rows = slots.ndim - 1
        windows = lax.ScatterDimensionNumbers(
            update_window_dims=(rows, *range(rows + 1, 3), *range(4, leaf.ndim + 1)),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(0, 3),
            operand_batching_dims=(1,) * rows,
            scatter_indices_batching_dims=(0,) * rows,
        )
        tokens = jnp.expand_dims(tokens, (rows, 4))
        return scatter(leaf, self._numbered(slots), tokens, windows)

    def read_row(self, leaf: jax.Array, row: jax.Array, begin: jax.Array, size: int) -> jax.Array:
        return self._cut(leaf, row, begin, 1, size)

    def write_row(
        self, leaf: jax.Array, tokens: jax.Array, row: jax.Array, begin: jax.Array
    ) -> jax.Array:
        return self._paste(leaf, tokens, row, begin)

    def empty(self, leaf: jax.Array, rows: int) -> jax.Array:
        return jnp.zeros((leaf.shape[0], rows, *leaf.shape[2:]), leaf.dtype)

    @property
    def _number(self) -> jax.Array:
        assert self.layer is not None, "a whole stack is read layer by layer"
        return self.layer

    def _numbered(self, slots: jax.Array) -> jax.Array:
        """Slot numbers [...] with the layer's before each: [..., 2]."""
        return jnp.stack([jnp.broadcast_to(self._number, slots.shape), slots], axis=-1)

    def _at(self, leaf: jax.Array, row: jax.Array, begin: jax.Array) -> tuple[jax.Array, ...]:
        zero = jnp.int32(0)
        return (self._number, row, zero, begin, *(zero,) * (leaf.ndim - 4))

    def _cut(
        self, leaf: jax.Array, row: jax.Array, begin: jax.Array, rows: int, size: int
    ) -> jax.Array:
        shape = (1, rows, leaf.shape[2], size, *leaf.shape[4:])
        leaf = as_it_lies(leaf, 3)
        return lax.dynamic_slice(leaf, self._at(leaf, row, begin), shape)[0]

    def _paste(
        self, leaf: jax.Array, tokens: jax.Array, row: jax.Array, begin: jax.Array
    ) -> jax.Array:
        return self._pasted(leaf, tokens[None], self._at(leaf, row, begin))


class LayerLike(NamedTuple):
    """A traced layer index, of a stacked state of several kinds of layers.

    Shapes must be known at trace time, so it says also which kind: that of layer `like`. A model of
    five sliding layers and a global one, time and again, has in its scan, at turn `turn`,
    `LayerLike(2, turn * 6 + 2)` for the third.

    Attributes:
        like: the index of a layer of the same spec and shape, a Python int.
        layer_idx: the layer's own, an integer or a traced int32 [].
    """

    like: int
    layer_idx: ArrayLike


LayerIndex = int | jax.Array | LayerLike  # what verbs take: an int, or of a stacked state traced


def stacked_index(layer_idx: Any, stacked: bool, kinds: int) -> tuple[Any, Any]:
    """What a verb got as `layer_idx`: a static index of a layer of its kind, and its own.

    Raises:
        TypeError: for a traced one, if the state is not stacked or has several kinds of layers.
    """
    like, index = layer_idx if isinstance(layer_idx, LayerLike) else (None, layer_idx)
    if not is_traced(index):
        return index, index
    if not stacked:
        raise TypeError(
            "layer_idx must be a Python int (it selects a layer at trace time), got a traced value; "
            "to scan over layers, make the cache with init_cache(..., stacked=True) or stack(state)"
        )
    if like is None and kinds > 1:
        raise TypeError(
            f"this state has {kinds} kinds of layers, and a traced layer_idx does not say which; pass "
            "lucid_jax.LayerLike(like, index), like being the Python int of a layer of the same kind"
        )
    index = jnp.asarray(as_integers(index, "layer_idx"))
    if index.ndim:
        raise ValueError(f"layer_idx must be one integer, got shape {index.shape}")
    return 0 if like is None else like, index


# --- one layer of a stack ----------------------------------------------------------------------------


def count(layer: TokenLayer) -> int:
    """L of a stack; 1 of a layer by itself."""
    return len(layer.position) if layer.stacked else 1


def view(stack: TokenLayer, number: Any) -> TokenLayer:
    """Layer `number` of a stack, an int or a traced int32 [].

    Of a traced number out of range it is a layer that sees nothing and refuses all, as it would be at
    the last position that can be counted.
    """
    traced = is_traced(number)
    number = jnp.asarray(number, jnp.int32) if traced else np.int32(number)
    counters = (_sliced if is_traced(stack, number) else _sliced_jit)(stack.counters(), number)
    if traced:
        inside, number = _inside(stack, number)
        full = {n: jnp.int32(INT32_MAX) for n in counters if n != "overflowed"}
        counters |= {n: jnp.where(inside, counters[n], most) for n, most in full.items()}
    return _view(stack, jnp.asarray(number), counters)


def with_view(stack: TokenLayer, number: Any, layer: TokenLayer) -> TokenLayer:
    """The stack that a changed view belongs to; what a traced number out of range asked is flagged."""
    old, new = stack.counters(), layer.counters()
    number = jnp.asarray(number, jnp.int32) if is_traced(number) else np.int32(number)
    if is_traced(number):
        inside, number = _inside(stack, number)
        before = _sliced(old, number)
        before["overflowed"] = jnp.ones_like(before["overflowed"])
        new = {n: jnp.where(inside, x, before[n]) for n, x in new.items()}
    put = _put if is_traced(old, new, number) else _put_jit
    return layer.replace(buffer=stack.buffer, **put(old, new, number))


def alone(stack: TokenLayer, number: Any) -> TokenLayer:
    """A copy of layer `number` of a stack as a layer of its own."""
    of_stack = view(stack, number)
    leaves, last = jax.tree.map(of_stack.buffer.own, (stack.leaves, stack.tail))
    return of_stack.replace(leaves=leaves, tail=last, buffer=Rows())


def stacked(layers: list[TokenLayer]) -> TokenLayer:
    """A stack of layers that are alike; copies."""
    host = isinstance(layers[0].position, np.ndarray)
    together: TokenLayer = jax.tree.map(lambda *x: (np if host else jnp).stack(x), *layers)
    return together.replace(buffer=Stacked())


def taken_apart(stack: TokenLayer) -> list[TokenLayer]:
    """The layers of a stack, each by itself; copies, of NumPy arrays views."""

    def one(number: int) -> TokenLayer:
        layer: TokenLayer = jax.tree.map(lambda x: x[number, ...], stack)
        return layer.replace(buffer=Rows())

    return [one(number) for number in range(count(stack))]


def broadcast(layer: TokenLayer, layers: int) -> TokenLayer:
    """A stack of layers that are all like one, while tracing."""
    many: TokenLayer = jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), layer)
    return many.replace(buffer=Stacked())


def _view(stack: TokenLayer, number: jax.Array, counters: Counters) -> TokenLayer:
    return stack.replace(buffer=Stacked(number), **counters)


def _inside(stack: TokenLayer, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether there is a layer of that number, and one that there is."""
    last = count(stack) - 1
    return (number >= 0) & (number <= last), jnp.clip(number, 0, last)


def _sliced(counters: Counters, number: Any) -> Counters:
    return {n: lax.dynamic_index_in_dim(x, number, 0, False) for n, x in counters.items()}


def _put(old: Counters, new: Counters, number: Any) -> Counters:
    return {n: lax.dynamic_update_index_in_dim(x, new[n], number, 0) for n, x in old.items()}


_sliced_jit, _put_jit = jax.jit(_sliced), jax.jit(_put)


# --- all layers of a stack ---------------------------------------------------------------------------


def each(layer: TokenLayer, change: Callable[..., TokenLayer], *others: TokenLayer) -> TokenLayer:
    """A layer changed; of a stack each of its layers, in place.

    Leaves that `change` hands through are the very same, as of a layer by itself.

    Args:
        layer: a layer or a stack.
        change: from a layer to a layer; it must treat all alike.
        *others: further arguments of `change`, of as many layers.
    """
    if not layer.stacked:
        return change(layer, *others)
    stacks = (layer, *others)
    numbers = jnp.arange(count(layer), dtype=jnp.int32)
    leaves, structure = jax.tree.flatten((layer.leaves, layer.tail))

    def changed(leaves: list[jax.Array], x: Any) -> TokenLayer:
        number, counters = x
        tokens, last = jax.tree.unflatten(structure, leaves)
        mine = layer.replace(leaves=tokens, tail=last)
        views = map(_view, (mine, *others), [number] * len(stacks), counters)
        return change(*views)

    after: list[jax.Array] = []  # what becomes of the leaves, as far as it shows in tracing once

    def look(x: Any) -> Counters:
        new = changed(leaves, x)
        after.extend(jax.tree.leaves((new.leaves, new.tail)))
        return new.counters()

    each_counters = [stack.counters() for stack in stacks]
    first = jax.tree.map(lambda x: x[0], (numbers, each_counters))
    jax.eval_shape(look, first)
    if any(a.shape != b.shape for a, b in zip(after, leaves, strict=True)):
        return _resized(stacks, change)
    moved = [a is not b for a, b in zip(after, leaves, strict=True)]
    if not any(moved):
        counters = jax.vmap(lambda x: changed(leaves, x).counters())((numbers, each_counters))
        return layer.replace(**counters)

    def moving(every: list[jax.Array]) -> list[jax.Array]:
        return [leaf for leaf, moves in zip(every, moved, strict=True) if moves]

    def among_all(some: list[jax.Array]) -> list[jax.Array]:
        rest = iter(some)
        return [next(rest) if moves else leaf for leaf, moves in zip(leaves, moved, strict=True)]

    def turn(some: list[jax.Array], x: Any) -> tuple[list[jax.Array], Counters]:
        new = changed(among_all(some), x)
        return moving(jax.tree.leaves((new.leaves, new.tail))), new.counters()

    start = [varying_as(*pair) for pair in zip(moving(leaves), moving(after), strict=True)]
    some, counters = lax.scan(turn, start, (numbers, each_counters))
    tokens, last = jax.tree.unflatten(structure, among_all(some))
    return layer.replace(leaves=tokens, tail=last, **counters)


def _resized(stacks: tuple[TokenLayer, ...], change: Callable[..., TokenLayer]) -> TokenLayer:
    """`each` where leaves get another size, and so cannot stay where they are."""

    def one(number: jax.Array) -> TokenLayer:
        return change(*(alone(stack, number) for stack in stacks))

    many: TokenLayer = lax.map(one, jnp.arange(count(stacks[0]), dtype=jnp.int32))
    return many.replace(buffer=Stacked())


def ask(layer: TokenLayer, question: Callable[..., jax.Array]) -> jax.Array:
    """What each layer of a stack answers of its counters, (L, ...); (1, ...) of a layer by itself."""
    if not layer.stacked:
        return question(layer)[None]
    numbers = jnp.arange(count(layer), dtype=jnp.int32)
    answers: jax.Array = jax.vmap(lambda i, c: question(_view(layer, i, c)))(
        numbers, layer.counters()
    )
    return answers


def counter(layer: TokenLayer, name: str) -> jax.Array:
    """A counter, [L] or [L, B] of a stack; [1] or [1, B] of a layer by itself."""
    found: jax.Array = getattr(layer, name)
    return found if layer.stacked else found[None]
