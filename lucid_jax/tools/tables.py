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

from lucid_jax.cache.shown import html_table

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
        table = html_table(self.title, self.header, self.rows, names=self.names, total=self.total)
        return table + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)


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
