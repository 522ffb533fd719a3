"""What a cache takes: `memory_report`, and the table that a notebook shows of a state.

Everything here runs on the host and only reads: a state in, plain numbers and tables out. Sizes are
bytes; tables print them in units of 1024.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache.checks import check_alive, is_traced
from lucid_jax.cache.layer import Layer
from lucid_jax.cache.part import Part, wide
from lucid_jax.cache.state import CacheState, nbytes
from lucid_jax.tables import Printed, Sheet, count_of, short_name, size_of


def check_concrete(state: CacheState, caller: str) -> None:
    """Raises unless the host can read the state's numbers.

    Raises:
        TypeError: if it is traced.
        RuntimeError: if it was donated.
    """
    if is_traced(state):
        raise TypeError(
            f"{caller} needs a concrete state, got one that is being traced; "
            "call it outside jit, on the state that the compiled call returned"
        )
    check_alive(state)


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """What one layer state takes; sizes are bytes.

    Attributes:
        layer_idx: the model's layer that stores these tokens.
        shared_by: the model's other layers that read them.
        layout: such as "Sliding(window=256, sinks=4)".
        codec: such as "Int4".
        capacity: token slots of a row.
        length: tokens stored now, of the longest row.
        reserved: all buffers of the layer.
        used: what the stored tokens fill of them; see `memory_report`.
        float16: what keys and values of the same tokens would take as 16-bit floats.
    """

    layer_idx: int
    shared_by: tuple[int, ...]
    layout: str
    codec: str
    capacity: int
    length: int
    reserved: int
    used: int
    float16: int

    @property
    def ratio(self) -> float | None:
        """How many times less is used than 16-bit floats would take; None while empty."""
        return self.float16 / self.used if self.used else None


@dataclasses.dataclass(frozen=True)
class MemoryReport(Printed):
    """What a cache takes, layer by layer. Prints as a table; `memory_report` makes it.

    Attributes:
        rows: one per layer that stores tokens.
        batch_size: B, rows of the cache.
    """

    rows: tuple[MemoryRow, ...]
    batch_size: int

    @property
    def reserved(self) -> int:
        """Bytes of all buffers; what `nbytes` says."""
        return sum(row.reserved for row in self.rows)

    @property
    def used(self) -> int:
        """Bytes that stored tokens fill."""
        return sum(row.used for row in self.rows)

    @property
    def float16(self) -> int:
        """Bytes of the same tokens as 16-bit floats."""
        return sum(row.float16 for row in self.rows)

    @property
    def ratio(self) -> float | None:
        """How many times less is used than 16-bit floats would take; None while empty."""
        return self.float16 / self.used if self.used else None

    def _sheet(self) -> Sheet:
        return Sheet(
            title=f"KV cache memory: {count_of(len(self.rows), 'layer')}, batch {self.batch_size}",
            header=("layer", "layout", "codec", "length", "reserved", "used", "16-bit", "ratio"),
            rows=[
                (
                    _with_readers(row.layer_idx, row.shared_by),
                    row.layout,
                    row.codec,
                    f"{row.length} / {row.capacity}",
                    *_sizes(row),
                )
                for row in self.rows
            ],
            names=3,
            total=("total", "", "", "", *_sizes(self)),
        )


def _with_readers(layer_idx: int, shared_by: tuple[int, ...]) -> str:
    readers = ", ".join(map(str, shared_by))
    return f"{layer_idx} (read by {readers})" if readers else str(layer_idx)


def _sizes(counted: MemoryRow | MemoryReport) -> tuple[str, ...]:
    ratio = "-" if counted.ratio is None else f"{counted.ratio:.2f}x"
    return (size_of(counted.reserved), size_of(counted.used), size_of(counted.float16), ratio)


def memory_report(state: CacheState) -> MemoryReport:
    """What each layer of a cache reserves, what its tokens fill, and what 16-bit floats would take.

    `reserved` is the size of all buffers of the layer. `used` counts every stored token once, where
    the latest query would read it: in its slot or in the residual, with its scales and, in a tracked
    layer, its positions. A scale that several tokens share counts whole as soon as one of them is
    read. Slots kept for rollback (slack, tokens quantized that are also still in the residual), empty
    slots and the counters are reserved but not used. `float16` is 2 bytes for each number of the
    stored keys and values, by every row's own length.

    Args:
        state: the cache, not traced.

    Raises:
        TypeError: inside `jit`.
        RuntimeError: if the state was donated.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> spec = lj.Static(16, codec=lj.codecs.Int8())
        >>> state = lj.init_cache(spec, num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8)
        >>> tokens = jnp.ones((1, 2, 4, 8))
        >>> report = memory_report(lj.update(state, tokens, tokens, 0))
        >>> report.reserved, report.used, report.float16
        (781, 192, 256)
    """
    check_concrete(state, "memory_report")
    rows = []
    for index, (owner, layer) in enumerate(zip(state.owners, state.layers, strict=True)):
        lengths = np.broadcast_to(np.asarray(layer.length), layer.batch_size)
        width = layer.packing.head_dim + layer.packing.value_head_dim
        rows.append(
            MemoryRow(
                layer_idx=owner,
                shared_by=_readers(state, index),
                layout=short_name(layer.spec, leave_out="codec"),
                codec=short_name(layer.packing.codec),
                capacity=layer.capacity,
                length=int(lengths.max()),
                reserved=bytes_of(layer),
                used=_bytes_used(layer),
                float16=2 * width * layer.num_kv_heads * int(lengths.sum(dtype=np.int64)),
            )
        )
    return MemoryReport(tuple(rows), state.batch_size)


def _readers(state: CacheState, index: int) -> tuple[int, ...]:
    """The model's layers that read a layer state and do not own it."""
    return tuple(
        reader
        for reader, read in enumerate(state.reads)
        if read == index and reader != state.owners[index]
    )


def bytes_of(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def slot_leaves(tree: Any) -> list[Any]:
    """Leaves (B, H, S, ...): all but counters."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim >= 3]


def _bytes_used(layer: Layer) -> int:
    """See `memory_report`."""
    used = 0
    # The slots, and, if the codec has a residual, that.
    stored = (layer.replace(recent=None), layer.recent)
    for read, leaves in zip(_slots_read(layer), map(slot_leaves, stored), strict=False):
        read = np.asarray(read)
        repeats = layer.batch_size * layer.num_kv_heads // math.prod(read.shape[:2])
        for leaf in leaves:
            entries = read.reshape(*read.shape[:2], leaf.shape[2], -1).any(axis=-1)
            entry = leaf.dtype.itemsize * math.prod(leaf.shape[3:])
            used += entry * repeats * int(np.count_nonzero(entries))
    return used


@jax.jit
def _slots_read(layer: Layer) -> list[jax.Array]:
    """Of each part, the slots that the latest token's query reads: bool [1 or B, 1 or H, S]."""
    latest = layer.position - 1
    regions = layer.regions(latest[..., None], False)

    def read(part: Part) -> jax.Array:
        stored = part.positions(jnp.int32(0), part.size)
        stored = stored.reshape(*stored.shape[:-1], *(1,) * (5 - stored.ndim), part.size)
        seen = jnp.zeros((1,) * 5, bool)
        for region in regions:
            seen = seen | (True if region.sees is None else region.sees(wide(latest), stored))
        if part.visible is not None:
            seen = seen & part.visible(wide(latest), stored)
        return (seen & (stored >= 0))[:, :, 0, 0]

    return [read(part) for part in layer.parts()]


def state_html(state: CacheState) -> str:
    """A state as an HTML table, one line per layer of the model: its `_repr_html_` in notebooks.

    Works on any state, also traced, donated or of shapes only.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(16), num_layers=2, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> state_html(state).count("<tr>")  # a heading, and the layers
        3
    """
    rows = []
    for index, read in enumerate(state.reads):
        layer, owner = state.layers[read], state.owners[read]
        if owner != index:
            rows.append((str(index), f"reads layer {owner}", *[""] * 5))
            continue
        dim, value_dim = layer.packing.head_dim, layer.packing.value_head_dim
        rows.append(
            (
                str(index),
                short_name(layer.spec, leave_out="codec"),
                short_name(layer.packing.codec),
                _length_text(layer),
                str(layer.capacity),
                f"{layer.num_kv_heads} x {dim}" + ("" if dim == value_dim else f" / {value_dim}"),
                size_of(bytes_of(layer)),
            )
        )
    first = state.layers[0]
    title = (
        f"CacheState: {count_of(state.num_layers, 'layer')}, batch {state.batch_size}, {first.dtype}, "
        f"{'ragged, ' if state.ragged else ''}{size_of(nbytes(state))}"
    )
    header = ("layer", "layout", "codec", "length", "capacity", "heads x dim", "bytes")
    return Sheet(title, header, rows, names=3).html()


def _length_text(layer: Layer) -> str:
    """The length, or the range of the rows' lengths, if it can be known."""
    if is_traced(layer):
        return "traced"
    if isinstance(layer.position, jax.ShapeDtypeStruct):
        return "shapes only"
    try:
        check_alive(layer)
    except RuntimeError:
        return "donated"
    lengths = np.asarray(layer.length)
    low, high = int(lengths.min()), int(lengths.max())
    return str(low) if low == high else f"{low} to {high}"
