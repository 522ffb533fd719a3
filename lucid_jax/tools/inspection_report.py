"""What `inspect` reports: a table when printed, numbers in code, and whether a step is in place."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import flax
import jax

from lucid_jax.cache.shown import count_of, size_of
from lucid_jax.tools.program_moves import Event
from lucid_jax.tools.program_text import Frame
from lucid_jax.tools.tables import Printed, Sheet

TEMPORARIES = 1 / 16  # of what was donated, at most, by default


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection(Printed):
    """What the compiler of a target has made of a function; all numbers are one device's.

    Attributes:
        name: the function's.
        target: what it was compiled for.
        donated: bytes of the arguments that were given away.
        donated_names: names of those arguments.
        aliased: bytes of arguments whose memory results are written to, as the compiler counts them:
            with what its layouts pad.
        not_reused: donated arguments, by name, whose memory no result is written to.
        could_be_donated: large arguments, by name, that were not donated though a result is like them.
        temporaries: bytes of scratch memory.
        read: bytes of arguments that must be read, see `inspect`.
        large: bytes from which on an array counted as large.
        rewritten: large arrays that are made by copying, converting or joining others, whole; those
            that are not made of what was donated are no fault. What a TPU takes to a faster memory,
            updates there and puts back is not among them.
        collectives: what devices send to each other.
        host_calls: calls of Python, and transfers to or from the host.
        cycles: what the compiler estimates, on TPUs; None elsewhere.
        estimated_seconds: that by the target's clock.
        launches: kernels, on GPUs; None elsewhere.
        floor_seconds: `read` over the bandwidth of the target's memory; None where that is not known.
        loops_counted_as_told: how many loops do not say how often they turn.
        text: the compiled program.
    """

    name: str
    target: str
    donated: int
    donated_names: frozenset[str]
    aliased: int
    not_reused: tuple[str, ...]
    could_be_donated: tuple[str, ...]
    temporaries: int
    read: int
    large: int
    rewritten: tuple[Event, ...]
    collectives: tuple[Event, ...]
    host_calls: tuple[Event, ...]
    cycles: int | None
    estimated_seconds: float | None
    launches: int | None
    floor_seconds: float | None
    loops_counted_as_told: int
    text: str = dataclasses.field(repr=False)

    def faults(self, temporaries: float = TEMPORARIES) -> list[str]:
        """Why the step is not in place; nothing if it is.

        Args:
            temporaries: how much scratch memory it may take, as a part of what was donated.
        """
        found = []
        if not self.donated:
            found.append("nothing was donated, so all that changes is copied; pass donate=")
        for name in self.could_be_donated:
            found.append(f"{name} was not donated, though a result is like it")
        for name in self.not_reused:
            found.append(f"{name} was donated, and no result is written to its memory")
        if self.aliased < self.donated and not self.not_reused:
            found.append(f"{size_of(self.donated)} donated, {size_of(self.aliased)} aliased")
        if self.donated and self.temporaries > temporaries * self.donated:
            found.append(
                f"{size_of(self.temporaries)} of temporaries, more than {temporaries:.3g} of the "
                f"{size_of(self.donated)} donated"
            )
        return found + [_told(event) for event, _ in _counted(self._of_donated())]

    def _of_donated(self) -> tuple[Event, ...]:
        """What is rewritten of what was given away; of a step that gives nothing away, everything."""
        names = self.donated_names
        return tuple(event for event in self.rewritten if not names or event.of in names)

    def _sheet(self) -> Sheet:
        rows = [
            ("donated", "", size_of(self.donated)),
            ("aliased", "", size_of(self.aliased)),
            ("temporaries", "", size_of(self.temporaries)),
        ]
        for what, events in (
            ("rewritten", self._of_donated()),
            ("collective", self.collectives),
            ("host", self.host_calls),
        ):
            for event, times in _counted(events):
                rows.append(
                    (what, f"{times} x " * (times > 1) + _told(event), size_of(event.nbytes))
                )
            if not events:
                rows.append((what, "nothing", ""))
        others = [event for event in self.rewritten if event not in self._of_donated()]
        if others:
            largest = size_of(max(event.nbytes for event in others))
            told = f"{count_of(len(others), 'array')} of what was not donated, the largest of"
            rows.append(("rewritten", told, largest))
        if self.cycles is not None and self.estimated_seconds is not None:
            estimate = f"{self.cycles:,} cycles, as the compiler estimates"
            rows.append(("cost", estimate, _time(self.estimated_seconds)))
        if self.launches is not None:
            rows.append(("kernels", "launched, by the program's text", f"{self.launches:,}"))
        if self.floor_seconds is not None:
            rows.append(("floor", f"to read {size_of(self.read)}", _time(self.floor_seconds)))
        notes = [f"! {fault}" for fault in self.faults()] or ["in place"]
        if self.loops_counted_as_told and (self.cycles is not None or self.launches is not None):
            loops = count_of(self.loops_counted_as_told, "loop")
            notes.append(f"counted as turns= says: {loops} that do not say how often they turn")
        title = f"{self.name} on {self.target}, each device"
        return Sheet(title, ("", "", "bytes or time"), rows, names=2, notes=tuple(notes))


def _counted(events: Sequence[Event]) -> list[tuple[Event, int]]:
    """Events, those of many layers told once."""
    alike = collections.Counter(dataclasses.replace(event, of="") for event in events)
    return list(alike.items()) if len(events) > 4 else [(event, 1) for event in events]


def _told(event: Event) -> str:
    """What happens, to what and where."""
    of = f" of {event.of}" if event.of else ""
    times = ""
    if event.in_loop:
        times = f", {event.turns:,} times in a loop" if event.turns > 1 else ", in a loop"
    return f"{event.kind} {event.shape}{of}{times}{_where(event.stack)}"


def _where(stack: Sequence[Frame]) -> str:
    """The caller's own line, and the library's that it led to."""
    own = next((frame for frame in stack if not frame.file.startswith((*_LIBRARIES, "<"))), None)
    told = [frame for frame in dict.fromkeys((own, *stack[:1])) if frame is not None]
    return "".join(f", {_short(frame.file)}:{frame.line} in {frame.function}" for frame in told)


_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (_PACKAGE, Path(jax.__file__).parent, Path(flax.__file__).parent)
)


def _short(file: str) -> str:
    """A path from where this process stands, or from the package."""
    for folder in (Path.cwd(), _PACKAGE.parent):
        if Path(file).is_relative_to(folder):
            return str(Path(file).relative_to(folder))
    return file


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.3g} µs"
