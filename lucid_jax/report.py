"""What a cache takes, and what would fit: `memory_report`, `plan`, and tables for notebooks.

Everything here runs on the host and only reads: a state (or the shapes of one) in, plain numbers and
tables out. Sizes are bytes; tables print them in units of 1024.
"""

from __future__ import annotations

import bisect
import dataclasses
import html
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lucid_jax.cache.checks import check_alive, check_count, is_traced
from lucid_jax.cache.contiguous import Static
from lucid_jax.cache.layer import Layer, LayerSpec
from lucid_jax.cache.part import Part, wide
from lucid_jax.cache.state import CacheState, Shared, init_cache, nbytes

_WIDTH = 120  # lets no cell be cut
_LIMIT = int(np.iinfo(np.int32).max)  # positions are int32


# --- tables ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """A table before it is known where it will be shown. The first `names` columns are words."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int
    total: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def rich(self) -> Table:
        """For a rich console: where it is narrow, cells break, and nothing is cut off."""
        # Text throughout: a bracket in a plain string would be taken for markup.
        notes = Text("\n".join(self.notes)) if self.notes else None
        table = Table(
            title=Text(self.title),
            caption=notes,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        for index, heading in enumerate(self.header):
            justify: Any = "left" if index < self.names else "right"
            table.add_column(heading, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        if self.total is not None:
            table.add_section()
            table.add_row(*map(Text, self.total))
        return table

    def text(self) -> str:
        """Plain text, at most `_WIDTH` wide whatever the terminal or notebook."""
        out = io.StringIO()
        console = Console(file=out, width=_WIDTH, color_system=None, force_jupyter=False)
        console.print(self.rich())
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def html(self) -> str:
        """A plain HTML table, everything in it escaped."""

        def line(tag: str, cells: Sequence[str]) -> str:
            tags = (
                f'<{tag} style="text-align: {"left" if index < self.names else "right"}">'
                f"{html.escape(cell)}</{tag}>"
                for index, cell in enumerate(cells)
            )
            return f"<tr>{''.join(tags)}</tr>"

        head = f"<thead>{line('th', self.header)}</thead>"
        body = f"<tbody>{''.join(line('td', row) for row in self.rows)}</tbody>"
        foot = "" if self.total is None else f"<tfoot>{line('td', self.total)}</tfoot>"
        caption = f'<caption style="text-align: left">{html.escape(self.title)}</caption>'
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table>{caption}{head}{body}{foot}</table>{notes}"


def _size(count: float) -> str:
    """Bytes for people: `_size(1536)` is "1.5 KiB"."""
    if count < 1024:
        return f"{count:.4g} B"
    power = min(4, (int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:,.1f} {' KMGT'[power]}iB"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def short_name(config: Any, leave_out: str = "") -> str:
    """A spec or codec as one would write it: what is at its default is not shown.

    Args:
        config: a frozen dataclass; anything else is shown by its `repr`.
        leave_out: a field that is not shown.

    Example:
        >>> import lucid_jax as lj
        >>> short_name(lj.Sliding(256, sinks=4, codec=lj.codecs.Int4()), leave_out="codec")
        'Sliding(window=256, sinks=4)'
    """
    if not dataclasses.is_dataclass(config):
        return repr(config)
    shown = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != leave_out and value != field.default:
            shown.append(f"{field.name}={value!r}")
    return type(config).__name__ + (f"({', '.join(shown)})" if shown else "")


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


# --- what a state takes ----------------------------------------------------------------------------


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
class MemoryReport:
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

    def __str__(self) -> str:
        return self._sheet().text()

    def __rich__(self) -> Table:
        return self._sheet().rich()

    def _repr_html_(self) -> str:
        return self._sheet().html()

    def _sheet(self) -> _Sheet:
        return _Sheet(
            title=f"KV cache memory: {_count(len(self.rows), 'layer')}, batch {self.batch_size}",
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
    return (_size(counted.reserved), _size(counted.used), _size(counted.float16), ratio)


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
                reserved=_nbytes(layer),
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


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _slot_leaves(tree: Any) -> list[Any]:
    """Leaves (B, H, S, ...): all but counters."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim >= 3]


def _bytes_used(layer: Layer) -> int:
    """See `memory_report`."""
    used = 0
    # The slots, and, if the codec has a residual, that.
    stored = (layer.replace(recent=None), layer.recent)
    for read, leaves in zip(_slots_read(layer), map(_slot_leaves, stored), strict=False):
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


# --- what would fit --------------------------------------------------------------------------------


class CacheConfig(Protocol):
    """What `plan` needs to know of a model; `lucid_jax.models.ModelConfig` is one."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model."""
        ...

    @property
    def kv_heads(self) -> int:
        """H, key/value heads."""
        ...

    @property
    def dim_per_head(self) -> int:
        """D, width of keys and values."""
        ...


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """Layers of one kind in a plan.

    Attributes:
        layers: how many the model has.
        layout: such as "Static(capacity=2048)".
        codec: such as "Int4".
        capacity: token slots of a row.
        nbytes: of all of them.
        bytes_per_token: of all of them, for one token of one row; 0 if the size is constant.
    """

    layers: int
    layout: str
    codec: str
    capacity: int
    nbytes: int
    bytes_per_token: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a cache would take, and what would fit. Prints as a table; `plan` makes it.

    Attributes:
        rows: one per kind of layer; layers that share another's tokens take nothing.
        batch_size: B.
        length: tokens a row is to hold.
        dtype: name of the tokens' dtype.
        budget: bytes there are; None if not said.
        max_batch_size: the most rows that fit at this length, 0 if not even one; None without a budget.
        max_length: the most tokens that fit at this batch size, 0 if not even one; None without a
            budget, and None if the size does not depend on the length and fits.
    """

    rows: tuple[PlanRow, ...]
    batch_size: int
    length: int
    dtype: str
    budget: int | None
    max_batch_size: int | None
    max_length: int | None

    @property
    def nbytes(self) -> int:
        """Bytes the cache would take: exactly `nbytes` of it once allocated."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bytes_per_token(self) -> float | None:
        """What a token of one row takes in the layers that grow with the length; None if none does."""
        return sum(row.bytes_per_token for row in self.rows) or None

    @property
    def fits(self) -> bool | None:
        """Whether the cache is within the budget; None without one."""
        return None if self.budget is None else self.nbytes <= self.budget

    def __str__(self) -> str:
        return self._sheet().text()

    def __rich__(self) -> Table:
        return self._sheet().rich()

    def _repr_html_(self) -> str:
        return self._sheet().html()

    def _sheet(self) -> _Sheet:
        return _Sheet(
            title=f"KV cache plan: batch {self.batch_size}, length {self.length}, {self.dtype}",
            header=("layers", "layout", "codec", "capacity", "bytes"),
            rows=[
                (str(row.layers), row.layout, row.codec, str(row.capacity), _size(row.nbytes))
                for row in self.rows
            ],
            names=3,
            total=("total", "", "", "", _size(self.nbytes)),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> list[str]:
        if self.bytes_per_token is None:
            notes = ["constant size, however long the text"]
        else:
            notes = [f"{_size(self.bytes_per_token)} for each token of a row"]
        if self.budget is None:
            return notes
        spare = self.budget - self.nbytes
        verdict = f"fits, {_size(spare)} to spare" if self.fits else f"{_size(-spare)} too much"
        longest = "unbounded" if self.max_length is None else f"{self.max_length} tokens"
        return [
            *notes,
            f"budget {_size(self.budget)}: {verdict}",
            f"largest batch at length {self.length}: {_count(self.max_batch_size or 0, 'row')}",
            f"largest length at batch {self.batch_size}: {longest}",
        ]


def plan(
    config: CacheConfig,
    batch_size: int,
    length: int,
    spec: LayerSpec | Sequence[LayerSpec | Shared],
    budget: int | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    ragged: bool = False,
) -> Plan:
    """What a cache would take and what would fit, by the exact count and without allocating it.

    A `Static` layer counts at its capacity, a `Dynamic` one at the capacity it grows to for `length`
    tokens. For the largest length a `Static` capacity is made as large as that length.

    Args:
        config: the model's sizes.
        batch_size: B, rows.
        length: tokens each row is to hold, prompt and new ones.
        spec: as `init_cache` takes it: one spec for all layers, or a list with one per layer.
        budget: bytes the cache may take, such as `8 * 2**30`.
        dtype: dtype of the tokens.
        ragged: whether each row has its own length, as `generate`'s caches do.

    Raises:
        ValueError: if a layer cannot hold `length` tokens, or for what `init_cache` refuses.
        TypeError: if a number is not an integer.

    Example:
        >>> import lucid_jax as lj
        >>> from lucid_jax.models import ModelConfig
        >>> config = ModelConfig(vocab_size=512, hidden_size=64, num_attention_heads=4)
        >>> planned = plan(config, 2, 100, lj.Dynamic(), budget=2**20)
        >>> planned.nbytes, planned.fits, planned.max_batch_size, planned.max_length
        (655425, True, 3, 128)
    """
    batch_size = check_count(batch_size, "batch_size", 1)
    length = check_count(length, "length", 1)
    if budget is not None:
        budget = check_count(budget, "budget (bytes, such as 8 * 2**30)")
    layers = config.num_hidden_layers
    specs = list(spec) if isinstance(spec, Sequence) else [spec] * layers
    empty = partial(
        init_cache,
        num_kv_heads=config.kv_heads,
        head_dim=config.dim_per_head,
        dtype=dtype,
        ragged=ragged,
    )
    # Whoever allocates would refuse a wrong number of layers, or sharing with a later one.
    jax.eval_shape(lambda: empty(specs, num_layers=layers, batch_size=batch_size))
    stored = [one for one in specs if not isinstance(one, Shared)]

    def fits(rows: int, tokens: int, resize: bool) -> bool:
        sized = [_resized(one, tokens) for one in stored] if resize else stored
        assert budget is not None
        return sum(row.nbytes for row in _plan_rows(empty, sized, rows, tokens)) <= budget

    rows = _plan_rows(empty, stored, batch_size, length)
    max_batch_size = max_length = None
    if budget is not None:
        max_batch_size = _largest(lambda n: fits(n, length, False))
        constant = not any(row.bytes_per_token for row in rows)
        if not (constant and fits(batch_size, 1, True)):
            max_length = _largest(lambda n: fits(batch_size, n, True))
    return Plan(
        rows=rows,
        batch_size=batch_size,
        length=length,
        dtype=jax.dtypes.canonicalize_dtype(dtype).name,
        budget=budget,
        max_batch_size=max_batch_size,
        max_length=max_length,
    )


def _resized(spec: LayerSpec, length: int) -> LayerSpec:
    return dataclasses.replace(spec, capacity=length) if isinstance(spec, Static) else spec


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n that fits, 0 if none does; what is larger than one that does not fit does not."""
    return bisect.bisect_left(range(1, _LIMIT + 1), True, key=lambda n: not fits(n))


def _plan_rows(
    empty: Callable[..., CacheState], specs: Sequence[LayerSpec], batch_size: int, length: int
) -> tuple[PlanRow, ...]:
    """One row per distinct spec: layers of the same spec have the same shapes."""
    kinds = list(dict.fromkeys(specs))

    def build() -> CacheState:
        state = empty(kinds, batch_size=batch_size)
        return state.with_layers(_with_room(layer, length) for layer in state.layers)

    rows = []
    for spec, layer in zip(kinds, jax.eval_shape(build).layers, strict=True):
        layers = specs.count(spec)
        slots = batch_size * layer.num_slots
        growing = _slot_leaves(layer.replace(recent=None)) if layer.bounded else []
        rows.append(
            PlanRow(
                layers=layers,
                layout=short_name(spec, leave_out="codec"),
                codec=short_name(layer.packing.codec),
                capacity=layer.capacity,
                nbytes=layers * _nbytes(layer),
                bytes_per_token=layers * _nbytes(growing) / slots,
            )
        )
    return tuple(rows)


def _with_room(layer: Layer, length: int) -> Layer:
    """A layer as it will be once it holds `length` tokens."""
    if length <= layer.capacity or not layer.bounded:
        return layer
    roomy = layer.with_room(length)
    if roomy is None:
        raise ValueError(
            f"a length of {length} does not fit {short_name(layer.spec)}, whose capacity is "
            f"{layer.capacity}; use Static({length}) or more, Dynamic(), or Sliding to keep the latest "
            "tokens only"
        )
    return roomy


# --- a state in a notebook -------------------------------------------------------------------------


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
                _size(_nbytes(layer)),
            )
        )
    first = state.layers[0]
    title = (
        f"CacheState: {_count(state.num_layers, 'layer')}, batch {state.batch_size}, {first.dtype}, "
        f"{'ragged, ' if state.ragged else ''}{_size(nbytes(state))}"
    )
    header = ("layer", "layout", "codec", "length", "capacity", "heads x dim", "bytes")
    return _Sheet(title, header, rows, names=3).html()


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
