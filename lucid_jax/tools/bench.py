"""`lucid-jax bench`: each operation against the naive way of doing it, side by side in one run.

A row times both in turns, a burst of steps each, so that whatever else the machine does falls on
both, and compares medians. Milliseconds are this machine's; the ratios are what carries over.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lucid_jax.tools import bench_cache, bench_decode
from lucid_jax.tools.measure import Row

GROUPS = (*bench_cache.GROUPS, *bench_decode.GROUPS)


def run_bench(*, as_json: bool = False, quick: bool = False) -> list[Row]:
    """Runs every comparison and prints a table, or JSON for machines.

    Args:
        as_json: print one JSON object with the environment and the rows.
        quick: smaller sizes and fewer repeats: shows that it runs, not how fast.
    """
    repeats = 1 if quick else 4
    rows: list[Row] = []
    # Where nobody's terminal sets the width, let no cell be cut.
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    with Progress(console=console, transient=True) as progress:
        for group in progress.track(GROUPS, description="measuring"):
            rows.extend(group(repeats, quick))
    environment = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if as_json:
        records = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
        print(json.dumps({"environment": environment, "rows": records}, indent=2))
        return rows
    title = ", ".join(f"{name} {value}" for name, value in environment.items())
    table = Table(title=f"lucid-jax bench: {title}", title_justify="left")
    for heading in ("operation", "case", "against"):
        table.add_column(heading)
    for heading in ("naive ms", "lucid ms", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (f"{row.naive_ms:.3f}", f"{row.lucid_ms:.3f}")
        table.add_row(row.operation, row.case, row.naive, *times, f"{row.ratio:.1f}x")
    console.print(table)
    return rows
