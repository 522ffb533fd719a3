"""Decode speed of one random Llama under transformers, flax nnx and lucid_jax, in turns.

    python tests/benchmarks/end_to_end.py

needs the `peers` extra (torch for CPU, transformers). The model: 8 layers, hidden 512, 8 query and 2
key/value heads, vocabulary 8,192, float32; a prompt of 512 tokens, 256 new ones, greedy. transformers
writes the checkpoint and lucid_jax reads it, and both must choose the same tokens. flax has rotary
positions nowhere in its attention, so its model goes without and has that much less to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from rich.console import Console
from rich.table import Table

import lucid_jax as lj
from lucid_jax.decode import generate
from lucid_jax.models.blocks import MLP
from lucid_jax.models.checkpoint import load_pretrained
from lucid_jax.models.config import ModelConfig

LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, VOCAB = 8, 512, 1408, 8, 2, 8192

# Takes a number of new tokens, returns them.
Decoder = Callable[[int], list[int]]


def transformers_decoder(model: Any, prompt: np.ndarray, cache: str | None) -> Decoder:
    """`generate` of transformers with its dynamic (None) or "static" cache."""
    tokens = torch.tensor(prompt)
    options = {} if cache is None else {"cache_implementation": cache}

    def decode(new: int) -> list[int]:
        with torch.inference_mode():
            out = model.generate(tokens, max_new_tokens=new, do_sample=False, **options)
        return out[0, prompt.shape[1] :].tolist()

    return decode


def lucid_decoder(model: Any, prompt: np.ndarray, spec: Any) -> Decoder:
    """`lucid_jax.decode.generate`."""

    def decode(new: int) -> list[int]:
        return generate(model, prompt, max_new_tokens=new, cache=spec).rows()[0]

    return decode


class FlaxBlock(nnx.Module):
    """A block of the same sizes with flax's own attention and its decode cache."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.before = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, HIDDEN, num_kv_heads=KV_HEADS, use_bias=False, decode=True, rngs=rngs,
            keep_rngs=False,
        )  # fmt: skip
        self.after = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.mlp = MLP(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = hidden + self.attention(self.before(hidden))
        return hidden + self.mlp(self.after(hidden))


class FlaxModel(nnx.Module):
    """The same Llama but for its rotary positions."""

    def __init__(self, config: ModelConfig, capacity: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, HIDDEN, rngs=rngs)
        self.blocks = nnx.List([FlaxBlock(config, rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCAB, use_bias=False, rngs=rngs)
        for block in self.blocks:
            block.attention.init_cache((1, capacity, HIDDEN))

    def __call__(self, token: jax.Array) -> jax.Array:
        hidden = self.embed(token[:, None])
        for block in self.blocks:
            hidden = block(hidden)
        return jnp.argmax(self.head(self.norm(hidden))[:, 0], axis=-1).astype(jnp.int32)


def flax_stepwise_decoder(config: ModelConfig, prompt: np.ndarray, capacity: int) -> Decoder:
    """flax as its documentation decodes: one `nnx.jit` call a token."""
    model = FlaxModel(config, capacity, nnx.Rngs(0))
    empty = jax.tree.map(jnp.copy, nnx.state(model, nnx.Cache))

    @nnx.jit
    def step(model: FlaxModel, token: jax.Array) -> jax.Array:
        return model(token)

    def decode(new: int) -> list[int]:
        nnx.update(model, jax.tree.map(jnp.copy, empty))
        for token in prompt[0]:
            out = step(model, jnp.asarray(token)[None])
        tokens = [out]
        for _ in range(new - 1):
            tokens.append(step(model, tokens[-1]))
        return [int(token[0]) for token in tokens]

    return decode


def flax_loop_decoder(config: ModelConfig, prompt: np.ndarray, capacity: int) -> Decoder:
    """flax's cache at its best: everything in one compiled loop on a donated state."""
    graph, params, empty = nnx.split(FlaxModel(config, capacity, nnx.Rngs(0)), nnx.Param, ...)

    @partial(jax.jit, donate_argnums=1)
    def feed(params: Any, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        def body(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
            model = nnx.merge(graph, params, state)
            out = model(token[None])
            return nnx.state(model, nnx.Not(nnx.Param)), out

        state, outs = jax.lax.scan(body, state, tokens)
        return outs[-1], state

    @partial(jax.jit, donate_argnums=1, static_argnums=3)
    def continue_(params: Any, state: Any, token: jax.Array, new: int) -> tuple[jax.Array, Any]:
        def body(carry: Any, _: None) -> tuple[Any, jax.Array]:
            state, token = carry
            model = nnx.merge(graph, params, state)
            out = model(token)
            return (nnx.state(model, nnx.Not(nnx.Param)), out), token

        (state, last), tokens = jax.lax.scan(body, (state, token), length=new - 1)
        return jnp.append(tokens[:, 0], last), state

    def decode(new: int) -> list[int]:
        state = jax.tree.map(jnp.copy, empty)
        token, state = feed(params, state, jnp.asarray(prompt[0]))
        return continue_(params, state, token, new)[0].tolist()

    return decode


@dataclasses.dataclass(frozen=True)
class Speed:
    """One round of one decoder: tokens/s after the first token, and of the whole request."""

    decode: float
    request: float


def measure(decoders: dict[str, Decoder], new: int, rounds: int) -> dict[str, list[Speed]]:
    """Times each decoder in turns; decoding is what `new` tokens take beyond the first one."""
    for decode in decoders.values():  # compiles
        decode(1)
        decode(new)
    speeds: dict[str, list[Speed]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decode in decoders.items():
            times = []
            for count in (1, new):
                start = time.perf_counter()
                decode(count)
                times.append(time.perf_counter() - start)
            first, whole = times
            speeds[name].append(Speed((new - 1) / (whole - first), new / whole))
    return speeds


def floor(model: Any, rounds: int) -> float:
    """The most tokens/s of one row: what reading every weight once, in matrix products, takes."""
    weights = [w[...] for w in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=_is_param)]
    matrices = [w for w in weights if w.ndim == 2 and w.shape != (VOCAB, HIDDEN)]

    @jax.jit
    def read(matrices: list[jax.Array]) -> jax.Array:
        def body(_: int, scale: jax.Array) -> jax.Array:
            outs = [jnp.full((1, w.shape[0]), scale) @ w for w in matrices]
            return 1 + 1e-30 * sum(jnp.sum(out) for out in outs)

        return jax.lax.fori_loop(0, 50, body, jnp.float32(1))

    read(matrices).block_until_ready()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        read(matrices).block_until_ready()
        times.append((time.perf_counter() - start) / 50)
    return 1 / statistics.median(times)


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--capacity", type=int, help="slots of the caches of flax and lucid_jax")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=2048,
            bos_token_id=None, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
            initializer_range=0.06,  # wide enough that greedy choices are far apart
        )
    ).eval()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model, _ = load_pretrained(folder)
    prompt = np.random.default_rng(0).integers(0, VOCAB, (1, options.prompt))
    slots = options.capacity or options.prompt + options.new
    decoders = {
        "transformers, dynamic": transformers_decoder(peer, prompt, None),
        "transformers, static": transformers_decoder(peer, prompt, "static"),
        "flax nnx, stepwise": flax_stepwise_decoder(model.config, prompt, slots),
        "flax nnx, one loop": flax_loop_decoder(model.config, prompt, slots),
        "lucid_jax, static": lucid_decoder(model, prompt, lj.Static(slots)),
        "lucid_jax, dynamic": lucid_decoder(model, prompt, lj.Dynamic()),
    }
    expected = decoders["transformers, dynamic"](options.new)
    for name in ("transformers, static", "lucid_jax, static", "lucid_jax, dynamic"):
        got = decoders[name](options.new)
        if got != expected:
            at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
            raise SystemExit(f"{name} differs from transformers' tokens at new token {at}")
    speeds = measure(decoders, options.new, options.rounds)
    title = f"prompt {options.prompt} + {options.new} new tokens, {os.cpu_count()} cores"
    table = Table(title=f"{title}, medians of {options.rounds} rounds in turns")
    headings = (
        "decode tokens/s",
        "lowest-highest",
        "lucid_jax is",
        "request tokens/s",
        "lucid_jax is",
    )
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    ours = speeds["lucid_jax, static"]
    for name, rounds in speeds.items():
        decode = statistics.median(s.decode for s in rounds)
        request = statistics.median(s.request for s in rounds)
        table.add_row(
            name,
            f"{decode:.0f}",
            f"{min(s.decode for s in rounds):.0f}-{max(s.decode for s in rounds):.0f}",
            f"{statistics.median(s.decode for s in ours) / decode:.2f}x",
            f"{request:.0f}",
            f"{statistics.median(s.request for s in ours) / request:.2f}x",
        )
    table.add_row("(matrix products alone)", f"{floor(model, options.rounds):.0f}")
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    Console(width=110).print(table, f"{versions}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
