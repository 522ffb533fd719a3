"""`CacheState`, a tuple of layer states: what every verb takes and gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import struct

from lucid_jax.cache.argument_checks import (
    as_layer_index,
    check_alive,
    check_layer_axes,
    check_layer_dtypes,
    is_traced,
)
from lucid_jax.cache.axes import STORED
from lucid_jax.cache.shown import state_html
from lucid_jax.cache.stacked import (
    LayerIndex,
    LayerLike,
    stacked_index,
    view,
    with_view,
)
from lucid_jax.cache.tokens import TokenLayer


@dataclasses.dataclass(frozen=True)
class Shared:
    """Stands in a list of specs for a layer that reads another's tokens and stores none itself.

    Cross-layer sharing (Brandon et al. 2024; Gemma 3n): `[Static(64), Shared(0)]`.

    Attributes:
        layer_idx: the layer to read, one that stores tokens.
    """

    layer_idx: int


@struct.dataclass(repr=False)
class CacheState:
    """The cache of a whole model: one layer state per layer that stores tokens, each free to differ.

    `reads[i]` says which of the stored layers the model's layer i reads: itself, or one it shares.
    `axes` is the order in which verbs take and return tokens; they are stored as (B, H, T, D) whatever
    it is. Of a stacked state `layers` are stacks of stored layers of one kind, and `stacks` says which
    those are, in order.
    """

    layers: tuple[TokenLayer, ...]
    reads: tuple[int, ...] = struct.field(pytree_node=False)
    # The model's layer of each stored one.
    owners: tuple[int, ...] = struct.field(pytree_node=False)
    axes: str = struct.field(pytree_node=False, default=STORED)  # how callers order tokens' axes
    stacks: tuple[tuple[int, ...], ...] | None = struct.field(pytree_node=False, default=None)

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> CacheState:
            """A copy with some fields changed; flax adds it."""

    def __repr__(self) -> str:
        """One line for all layers that are alike."""
        alike: dict[str, list[int]] = {}
        for stored, layer in zip(self.each_stack, self.layers, strict=True):
            alike.setdefault(repr(layer), []).extend(self.owners[number] for number in stored)
        many = " x " if self.stacks is None else " stacked "
        lines = [f"{f'{len(at)}{many}' if len(at) > 1 else ''}{text}" for text, at in alike.items()]
        readers: dict[int, list[int]] = {}
        for index, read in enumerate(self.reads):
            if self.owners[read] != index:
                readers.setdefault(self.owners[read], []).append(index)
        if len(lines) > 1 or readers or self.axes != STORED:
            lines = [f"{_ranges(at)}: {x}" for x, at in zip(lines, alike.values(), strict=True)]
            lines += [f"{_ranges(at)}: reads layer {owner}" for owner, at in readers.items()]
            lines += [f"axes={self.axes}"] * (self.axes != STORED)
            lines = ["", *(f"    {line}," for line in lines), ""]
        return f"CacheState({chr(10).join(lines)})"

    def _repr_html_(self) -> str:
        return state_html(self)

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self.reads)

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self.layers[0].batch_size

    @property
    def ragged(self) -> bool:
        """Whether each row has its own length."""
        return self.layers[0].ragged

    @property
    def stacked(self) -> bool:
        """Whether layers of one kind are one layer state, so that `layer_idx` may be traced."""
        return self.stacks is not None

    @property
    def each_stack(self) -> tuple[tuple[int, ...], ...]:
        """Which stored layers each of `layers` has."""
        return tuple((i,) for i in range(len(self.layers))) if self.stacks is None else self.stacks

    @property
    def in_stacks(self) -> list[int]:
        """The model's layer of each stored one, in the order of `layers`, stack by stack."""
        return [self.owners[number] for stored in self.each_stack for number in stored]

    def layer(self, layer_idx: LayerIndex) -> TokenLayer:
        """What the model's layer reads; of a stacked state a view of it, see stacked.py.

        Raises:
            ValueError: for an index out of range.
            RuntimeError: if its buffers were donated.
            TypeError: if its leaves were converted to other dtypes, or the index is traced and the
                state not stacked.
        """
        return self._layer(layer_idx, owned=False)

    def _layer(self, layer_idx: LayerIndex, owned: bool) -> TokenLayer:
        stack, number = self._find(layer_idx, owned)
        layer = self.layers[stack]
        check_alive(layer)
        check_layer_axes(layer)
        check_layer_dtypes(layer)
        return layer if number is None else view(layer, number)

    def _find(self, layer_idx: LayerIndex, owned: bool) -> tuple[int, Any]:
        """Which of `layers` the model's layer reads, and its number there, None if not stacked.

        A traced index that names no layer of the stack, or, if `owned`, one that stores nothing itself,
        gives a number out of range.
        """
        like, index = stacked_index(layer_idx, self.stacked, len(self.layers))
        stored = self.reads[as_layer_index(like, self.num_layers)]
        if self.stacks is None:
            return stored, None
        stack = next(i for i, one in enumerate(self.stacks) if stored in one)
        if not is_traced(index):
            return stack, self.stacks[stack].index(stored)
        numbers = {stored: number for number, stored in enumerate(self.stacks[stack])}
        named = [
            numbers.get(read, -1) if not owned or self.owners[read] == i else -1
            for i, read in enumerate(self.reads)
        ]
        if named == list(range(len(numbers))):
            return stack, index
        inside = (index >= 0) & (index < len(named))
        table = jnp.asarray(named, jnp.int32)
        return stack, jnp.where(inside, table[jnp.clip(index, 0, len(named) - 1)], -1)

    def owns(self, layer_idx: LayerIndex) -> bool:
        """Whether the model's layer stores tokens, rather than read another's.

        Of a traced index, whether all do, or, of a `LayerLike`, the one that it is like.
        """
        own = [self.owners[read] == index for index, read in enumerate(self.reads)]
        if is_traced(layer_idx) and not isinstance(layer_idx, LayerLike):
            return all(own)
        like, _ = stacked_index(layer_idx, self.stacked, len(self.layers))
        return own[as_layer_index(like, self.num_layers)]

    def own_layer(self, layer_idx: LayerIndex) -> TokenLayer:
        """`layer`, for one that is about to be written.

        Raises:
            ValueError: also if the layer only reads another's tokens. (Of a traced index: it refuses
                all.)
        """
        layer = self._layer(layer_idx, owned=True)
        traced = is_traced(layer_idx) and not isinstance(layer_idx, LayerLike)
        if not traced and not self.owns(layer_idx):
            index = int(stacked_index(layer_idx, self.stacked, len(self.layers))[0])
            owner = self.owners[self.reads[index]]
            raise ValueError(
                f"layer {index} shares the tokens of layer {owner} and stores none itself; "
                f"update layer {owner} only"
            )
        return layer

    def with_layer(self, layer_idx: LayerIndex, layer: TokenLayer) -> CacheState:
        """This state with one layer replaced; the other layers are shared, not copied."""
        index, number = self._find(layer_idx, owned=True)
        if number is not None:
            layer = with_view(self.layers[index], number, layer)
        return self.with_layers((*self.layers[:index], layer, *self.layers[index + 1 :]))

    def with_layers(self, layers: Iterable[TokenLayer]) -> CacheState:
        """This state with other layer states in the same places."""
        return self.replace(layers=tuple(layers))


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text.

    Example:
        >>> _ranges([0, 1, 2, 4, 7, 8])
        '0-2, 4, 7-8'
    """
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    ends = zip(firsts, lasts, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)


def of_layers(*layers: TokenLayer) -> CacheState:
    """A state of layers that share nothing."""
    each = tuple(range(len(layers)))
    return CacheState(tuple(layers), reads=each, owners=each)
