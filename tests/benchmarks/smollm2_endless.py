"""Text without end on SmolLM2-135M: 20,000 tokens written, and a held-out text read, in windows.

    python tests/benchmarks/smollm2_endless.py --out endless.json

needs what smollm2_quality.py needs. It writes with `Sliding(1024, sinks=4)` and positions by place, and
prints the memory that the process has meanwhile. Then it reads 96 kB as one stream, in windows with and
without sinks, with positions by place and absolute ones, and with all tokens kept: bits per byte as the
stream goes on (StreamingLLM, Xiao et al. 2023, figure 3). Takes an hour and more on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from smollm2_quality import text, weights

import lucid_jax as lj
from lucid_jax.models import load_model

WINDOW, SINKS = 1024, 4
BUCKET = 1024  # tokens that share a point of the picture
READINGS = {
    "4 sinks, positions by place": (True, lj.Sliding(WINDOW, sinks=SINKS)),
    "no sinks, positions by place": (True, lj.Sliding(WINDOW + SINKS)),
    "4 sinks, absolute positions": (False, lj.Sliding(WINDOW, sinks=SINKS)),
    "no sinks, absolute positions": (False, lj.Sliding(WINDOW + SINKS)),
    "all tokens": (False, lj.Dynamic()),
}


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def write(model: Any, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Writes `count` tokens; what has been seen every 2,000."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write a very long story about a lighthouse keeper."}]
    )
    talk = lj.Conversation(
        model,
        cache=lj.Sliding(WINDOW, sinks=SINKS),
        sampling=lj.Sampling(0.8, top_p=0.95),
    )
    seen: list[dict[str, Any]] = []
    tokens: list[int] = []
    started = time.perf_counter()
    for part in talk.say(prompt, max_new_tokens=count, tokens_per_call=100):
        tokens += part
        if len(tokens) % 2000 < len(part):
            seen.append(
                {
                    "tokens": len(tokens),
                    "seconds": round(time.perf_counter() - started, 1),
                    "cache bytes": lj.nbytes(talk.cache),
                    "resident bytes": resident(),
                    "text": tokenizer.decode(tokens[-40:]),
                }
            )
            print(seen[-1], flush=True)
    return seen


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def nats(
    structure: Any, params: Any, state: Any, tokens: jax.Array, targets: jax.Array
) -> tuple[jax.Array, Any]:
    """What each of a chunk's targets costs, and the cache."""
    logits, state = nnx.merge(structure, params)(tokens, state)
    logs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(logs, targets[..., None], axis=-1)[0, :, 0], state


def read(model: Any, stream: np.ndarray, size: int, spec: Any, chunk: int = 256) -> list[float]:
    """Bits per byte of each bucket of a stream."""
    structure, params = nnx.split(model)
    whole = (len(stream) - 1) // BUCKET * BUCKET
    state, costs = lj.grow(model.init_cache(spec, 1), whole), []
    for begin in range(0, whole, chunk):
        tokens, targets = (jnp.asarray(stream[None, begin + i : begin + i + chunk]) for i in (0, 1))
        cost, state = nats(structure, params, state, tokens, targets)
        costs.append(np.asarray(cost))
    lj.check_overflow(state)
    buckets = np.concatenate(costs).reshape(-1, BUCKET).sum(axis=1)
    # The stream's own bytes a token: buckets differ in what they say, not in how it is counted.
    return [round(float(b) / math.log(2) / (BUCKET * size / len(stream)), 4) for b in buckets]


def main() -> None:
    """Prints what is seen, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=96_000)
    parser.add_argument("--only", choices=["write", "read"], help="and keep the other of --out")
    options = parser.parse_args()
    result: dict[str, Any] = {"bucket": BUCKET}
    if options.only:
        result |= json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    model, tokenizer = load_model(weights(), rope_by_place=True)
    if options.only != "read":  # first, while the process holds nothing else
        result["written"] = write(model, tokenizer, options.tokens)
    if options.only != "write":
        models = {True: model, False: load_model(weights())[0]}
        stream, result["bytes"] = text(tokenizer, options.bytes)
        result["read"] = {}
        for name, (by_place, spec) in READINGS.items():
            result["read"][name] = read(models[by_place], stream, result["bytes"], spec)
            print(name, result["read"][name], flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
