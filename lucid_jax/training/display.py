"""What a person at a terminal sees of a run, and how they stop it."""

from __future__ import annotations

import math
import signal
import sys
import time
from typing import Any

from lucid_jax.training.progress import Progress


class StopSignals:
    """Turns SIGTERM and SIGINT into a flag, so that a step is never cut in two."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: the caller's own handlers stay
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True


class Display:
    """A rich progress bar on a terminal, plain lines in a log."""

    def __init__(self, steps: int, done: int, quiet: bool, summary: dict) -> None:
        self._quiet = quiet
        self._steps = steps
        self._bits = math.nan
        self._rate = 0.0
        self._last = time.perf_counter()
        self._bar: Any = None
        if quiet:
            return
        print(
            f"{summary['parameters']:,} parameters; train {summary['train_tokens']:,} tokens "
            f"({summary['train_bytes']:,} bytes), held out {summary['held_out_tokens']:,} tokens "
            f"({summary['held_out_bytes']:,} bytes)",
            flush=True,
        )
        if sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, progress: Progress, tokens: int) -> None:
        """Shows a step of so many tokens."""
        if self._quiet:
            return
        now = time.perf_counter()
        rate = tokens / (now - self._last)
        self._last = now
        self._rate = 0.98 * self._rate + 0.02 * rate if self._rate else rate
        if not progress.losses:
            return
        loss = progress.losses[-1][1]
        text = f"loss {loss:.3f}  held-out {self._bits:.3f} bits/byte  {self._rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.step, description=text)
        elif progress.step % 50 == 0 or progress.step == self._steps:
            left = (self._steps - progress.step) * tokens / self._rate / 60
            print(f"step {progress.step}/{self._steps}  {text}  {left:.0f} min left", flush=True)

    def score(self, progress: Progress) -> None:
        """Shows an evaluation."""
        self._bits = progress.bits[-1][1]
        if not self._quiet and self._bar is None:
            print(f"step {progress.step}  held-out {self._bits:.4f} bits/byte", flush=True)
        self._last = time.perf_counter()
