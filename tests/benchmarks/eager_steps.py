"""What a one-token step of an eager stateful cache takes on this machine, in microseconds.

    python tests/benchmarks/eager_steps.py

One row of 8 heads of 64, float32, capacity 512. Best and median of 60 rounds of 6 steps.
"""

import statistics
import time

import numpy as np

import lucid_jax as lucid
import lucid_jax.nn as nn


def main() -> None:
    """Prints a line for each number of tokens stored."""
    step = lucid.randn(1, 8, 1, 64), lucid.randn(1, 8, 1, 64)
    for stored in (8, 64, 448):
        prompt = np.ones((1, 8, stored, 64), np.float32)
        for name in ("store", "update"):
            cache = nn.StaticKVCache(512, 1)
            run, times = getattr(cache, name), []
            for _ in range(60):
                cache.reset()
                cache.update(prompt, prompt, 0)
                run(*step, 0)
                start = time.perf_counter()
                for _ in range(6):
                    run(*step, 0)
                times.append((time.perf_counter() - start) / 6e-6)
            print(
                f"{stored} stored, {name}: best {min(times):.0f}, "
                f"median {statistics.median(times):.0f}"
            )


if __name__ == "__main__":
    main()
