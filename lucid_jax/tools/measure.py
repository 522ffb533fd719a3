"""Timing things against each other: in turns, in bursts, by their medians."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: milliseconds of the naive way and of this package."""

    operation: str
    case: str
    naive: str
    naive_ms: float
    lucid_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster this package is."""
        return self.naive_ms / self.lucid_ms


def medians(repeats: int, *runs: Callable[[], Any], burst: int = 20) -> list[float]:
    """Median milliseconds of each run, taken in turns after one unmeasured round.

    A turn is a burst of steps, the first unmeasured: a decode loop runs one thing after itself, and
    not after something else has emptied the processor's caches.
    """
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, seconds in zip(runs, times, strict=True):
            for step in range(burst):
                started = time.perf_counter()
                jax.block_until_ready(jax.tree.leaves(run()))
                if turn and (step or burst == 1):
                    seconds.append(time.perf_counter() - started)
    return [1e3 * statistics.median(seconds) for seconds in times]
