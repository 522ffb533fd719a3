"""What a cache takes: `memory_report`, and the table that a notebook shows of a state.

Everything here runs on the host and only reads: a state in, plain numbers and tables out. Sizes are
bytes; tables print them in units of 1024.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lucid_jax.attention.mask import Mask
from lucid_jax.cache.argument_checks import check_alive, is_traced
from lucid_jax.cache.reading import sights, slot_runs
from lucid_jax.cache.shown import bytes_of, count_of, short_name, size_of
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.tools.tables import Printed, Sheet


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
    the latest query would read it: in its slot or in the tail, with its scales and, in a tracked
    layer, its positions. A scale that several tokens share counts whole as soon as one of them is
    read. Slots kept for rollback (slack, tokens quantized that are also still in the tail), empty
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
    for index, owner in enumerate(state.owners):
        layer = state.layer(owner)
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
                reserved=_bytes_reserved(layer),
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


def _bytes_reserved(layer: TokenLayer) -> int:
    """Bytes of a layer, or of one of a stack."""
    tokens = bytes_of((layer.leaves, layer.tail))
    alike = jax.tree.leaves(layer.leaves)[0].shape[0] if layer.buffer.lead else 1
    return tokens // alike + bytes_of(layer.counters())


def slot_leaves(tree: Any) -> list[Any]:
    """Leaves (B, H, S, ...): all but counters."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim >= 3]


def _bytes_used(layer: TokenLayer) -> int:
    """What the stored tokens of a layer fill, as `memory_report` counts it."""
    used = 0
    # The slots, and, if the codec has a tail, that.
    stored = (layer.replace(tail=None), layer.tail)
    for read, leaves in zip(_slots_read(layer), map(slot_leaves, stored), strict=False):
        read = np.asarray(read)
        repeats = layer.batch_size * layer.num_kv_heads // math.prod(read.shape[:2])
        for leaf in leaves:
            _, _, slots, *width = leaf.shape[layer.buffer.lead :]
            entries = read.reshape(*read.shape[:2], slots, -1).any(axis=-1)
            entry = leaf.dtype.itemsize * math.prod(width)
            used += entry * repeats * int(np.count_nonzero(entries))
    return used


@jax.jit
def _slots_read(layer: TokenLayer) -> list[jax.Array]:
    """Of each part, the slots that the latest token's query reads: bool [1 or B, 1 or H, S]."""
    latest = (layer.position - 1)[..., None]
    (sight,) = sights(layer, latest, False)
    mask = Mask(
        position=latest, sights=(sight,), visible=None, bias=None,
        num_kv_heads=layer.num_kv_heads, causal=False, window=None,
    )  # fmt: skip
    return [mask.seen(slot_run, sight)[:, :, 0, 0] for slot_run in slot_runs(layer)]
