"""Every kind of step for every target, by their compilers: aliased, scratch, rewritten, and its cost.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.compiled_steps --out steps.csv

Goes on from what the file holds already, so that it can be stopped, and prints a table of it.
`--only gpu:h100 bfloat16 decode` takes the cases with these words, `--cover` those that CI
compiles; `--seconds` says when to stop. All take hours. The compilers' wheels are in .ci/compilers.
"""

import argparse
import collections
import csv
import time
from pathlib import Path

from tests.device_steps import CASES, Case, cover, faults, inspected, known

COLUMNS = (
    *Case._fields,
    *("donated", "aliased", "temporaries", "rewritten", "cycles", "launches", "in place", "known"),
)


def row_of(case):
    """A line of the file."""
    report = inspected(case)
    numbers = report.donated, report.aliased, report.temporaries, len(report.rewritten)
    cost = report.cycles, report.launches
    return (*case, *numbers, *cost, "no" if faults(report) else "yes", known(case) or "")


def summary(rows):
    """Per target and verb: steps in place of all, the most scratch memory, and the cost's range."""
    kinds = collections.defaultdict(list)
    for row in rows:
        kinds[row["target"], row["verb"]].append(row)
    yield "| target | step | in place | most temporaries / cache | cycles, or kernels launched |"
    yield "|---|---|---:|---:|---:|"
    for (target, verb), found in sorted(kinds.items()):
        good = sum(row["in place"] == "yes" for row in found)
        most = max(int(row["temporaries"]) / int(row["donated"]) for row in found)
        costs = [int(row["cycles"] or row["launches"] or 0) for row in found]
        low, high = min(costs), max(costs)
        yield f"| {target} | {verb} | {good}/{len(found)} | {most:.3f} | {low:,} to {high:,} |"


def main():
    """Compiles what is not in the file yet, and prints what is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="words that a case must have")
    parser.add_argument("--cover", action="store_true", help="only the cases that CI compiles")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="to stop after")
    options = parser.parse_args()
    rows = []
    if options.out.exists():
        with options.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {tuple(row[name] for name in Case._fields) for row in rows}
    wanted = cover() if options.cover else CASES
    todo = [case for case in wanted if case not in done and {*options.only} <= {*case}]
    began = time.perf_counter()
    with options.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not rows:
            writer.writerow(COLUMNS)
        for case in todo:
            if time.perf_counter() - began > options.seconds:
                break
            writer.writerow(made := row_of(case))
            file.flush()
            rows.append(dict(zip(COLUMNS, made, strict=True)))
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
