"""Tables of plain cells: as text of fixed width, for rich, and as HTML for notebooks."""

from __future__ import annotations

import abc
import dataclasses
import html
import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 120  # lets no cell be cut


@dataclasses.dataclass(frozen=True)
class Sheet:
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
            shown.append(f"{field.name}={value!r}")
    return type(config).__name__ + (f"({', '.join(shown)})" if shown else "")


class Printed(abc.ABC):
    """Prints as a table: as text, in rich, and in notebooks."""

    @abc.abstractmethod
    def _sheet(self) -> Sheet:
        """The table."""

    def __str__(self) -> str:
        return self._sheet().text()

    def __rich__(self) -> Table:
        return self._sheet().rich()

    def _repr_html_(self) -> str:
        return self._sheet().html()
