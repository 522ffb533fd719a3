"""How specs, sizes and states are shown to people: in words, and as tables in notebooks."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lucid_jax.cache.argument_checks import is_traced

if TYPE_CHECKING:
    from lucid_jax.cache.state import CacheState
    from lucid_jax.cache.tokens import TokenLayer


def size_of(count: float) -> str:
    """Bytes for people: `size_of(1536)` is "1.5 KiB"."""
    if count < 1024:
        return f"{count:.4g} B"
    power = min(4, (int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:,.1f} {' KMGT'[power]}iB"


def count_of(n: int, what: str) -> str:
    """A number and its noun: "1 layer", "2 layers"."""
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
            shown.append(f"{field.name}={short_name(value)}")
    return type(config).__name__ + (f"({', '.join(shown)})" if shown else "")


def layer_text(layer: TokenLayer) -> str:
    """Sizes rather than megabytes of numbers, whatever the leaves: `tree.map` may give any."""
    kinds = sorted({type(leaf).__name__ for leaf in jax.tree.leaves(layer)})
    sizes = f"leaves of {', '.join(kinds) or 'nothing'}"
    if layer.has_shapes:
        layers = f"L={len(layer.position)}, " if layer.stacked else ""
        sizes = f"{layers}B={layer.batch_size}, H={layer.num_kv_heads}, C={layer.capacity}"
    dims = f"D={layer.packing.head_dim}, {layer.packing.dtype}"
    name = type(layer.layout).__name__
    return f"{name}({layer.spec}, {sizes}, {dims}, length={length_text(layer)})"


def length_text(layer: TokenLayer) -> str:
    """The length, or the range of the rows' lengths, or why it cannot be known."""
    if is_traced(layer):
        return "traced"
    leaves = [leaf for leaf in jax.tree.leaves(layer) if isinstance(leaf, jax.Array)]
    if any(leaf.is_deleted() for leaf in leaves):
        return "donated"
    counters = (layer.start, layer.position)
    if not all(isinstance(x, (jax.Array, np.ndarray)) for x in counters):
        return "shapes only" if layer.has_shapes else "unknown"
    if not all(x.is_fully_replicated or x.is_fully_addressable for x in leaves if x.ndim < 2):
        return "on other hosts"
    lengths = layer.length_on_host()
    low, high = lengths.min(), lengths.max()
    return str(low) if low == high else f"{low} to {high}"


def bytes_of(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def html_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    names: int,
    total: Sequence[str] | None = None,
) -> str:
    """A plain HTML table, everything in it escaped; the first `names` columns are words."""

    def line(tag: str, cells: Sequence[str]) -> str:
        tags = (
            f'<{tag} style="text-align: {"left" if index < names else "right"}">'
            f"{html.escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(tags)}</tr>"

    head = f"<thead>{line('th', header)}</thead>"
    body = f"<tbody>{''.join(line('td', row) for row in rows)}</tbody>"
    foot = "" if total is None else f"<tfoot>{line('td', total)}</tfoot>"
    caption = f'<caption style="text-align: left">{html.escape(title)}</caption>'
    return f"<table>{caption}{head}{body}{foot}</table>"


def state_html(state: CacheState) -> str:
    """A state as an HTML table, one line per layer of the model: its `_repr_html_` in notebooks.

    Works on any state, also traced, donated or of shapes only; of what has no shapes it is the `repr`.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(16), num_layers=2, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> state._repr_html_().count("<tr>")  # a heading, and the layers
        3
    """
    if not all(layer.has_shapes for layer in state.layers):
        return f"<pre>{html.escape(repr(state))}</pre>"
    rows = []
    layers = {
        number: (layer, len(stored))
        for layer, stored in zip(state.layers, state.each_stack, strict=True)
        for number in stored
    }
    for index, read in enumerate(state.reads):
        (layer, alike), owner = layers[read], state.owners[read]
        if owner != index:
            rows.append((str(index), f"reads layer {owner}", *[""] * 5))
            continue
        dim, value_dim = layer.packing.head_dim, layer.packing.value_head_dim
        rows.append(
            (
                str(index),
                short_name(layer.spec, leave_out="codec"),
                short_name(layer.packing.codec),
                length_text(layer),
                str(layer.capacity),
                f"{layer.num_kv_heads} x {dim}" + ("" if dim == value_dim else f" / {value_dim}"),
                size_of(bytes_of(layer) // alike),
            )
        )
    first = state.layers[0]
    title = (
        f"CacheState: {count_of(state.num_layers, 'layer')}, batch {state.batch_size}, {first.dtype}, "
        f"{'ragged, ' if state.ragged else ''}{size_of(bytes_of(state))}"
    )
    header = ("layer", "layout", "codec", "length", "capacity", "heads x dim", "bytes")
    return html_table(title, header, rows, names=3)
