"""Trains the embedded model: `python -m lucid_jax.training.train --out DIR --steps N`.

With `--draft`, its draft for speculative decoding: a smaller model, trained alike, with its tokenizer.

The run is a function of its options alone: data order follows from (seed, step), so a run that was
stopped (SIGTERM, SIGINT, a crash) and resumed ends with the same weights as one that was not.
`DIR/model` always holds the best model so far, ready to ship.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lucid_jax.decode import Sampling, generate
from lucid_jax.models.checkpoint import embedded_model_path, load_model, save_model
from lucid_jax.models.config import ModelConfig
from lucid_jax.models.evaluate import bits_per_byte, num_bytes, pack
from lucid_jax.models.tokenizer import Tokenizer
from lucid_jax.models.transformer import Transformer
from lucid_jax.training.corpus import Corpus, python_corpus
from lucid_jax.training.display import Display, StopSignals
from lucid_jax.training.progress import Progress, load_state, save_state, write_metrics
from lucid_jax.training.recipe import Recipe, batch_at, make_optimizer, make_train_step

_STATE = "state.safetensors"


def train(
    out: Path | str,
    recipe: Recipe,
    *,
    corpus: Corpus | None = None,
    config: ModelConfig | None = None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 2048,
    resume: bool = False,
    save_every: int = 250,
    stop_after: int | None = None,
    quiet: bool = False,
) -> Progress:
    """Trains a model, or goes on with one.

    Args:
      out: folder for the state, the metrics, the loss curve and `model/`, the best model so far.
      recipe: how to train.
      corpus: what to train on; by default the running Python's documentation.
      config: the model's sizes, `vocab_size` included; by default those of the embedded model.
      tokenizer: which to use; by default one is trained on the corpus.
      vocab_size: ids the tokenizer may have, if neither it nor `config` is given.
      resume: go on from the state in `out`, if there is one.
      save_every: steps between saved states.
      stop_after: stop (as on SIGTERM) once this many steps are done.
      quiet: show nothing.

    Returns:
      The losses and scores so far.

    Raises:
      ValueError: if `out` holds a run and `resume` is false, or the run there differs from this
        one in its recipe, config or corpus.
      FloatingPointError: if the loss stops being finite; the state saved last is kept.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _STATE).exists() and not resume:
        raise ValueError(f"{folder} already holds a run; resume it, or choose another folder")
    corpus = python_corpus() if corpus is None else corpus
    if tokenizer is None:
        vocab_size = config.vocab_size if config else vocab_size
        tokenizer = Tokenizer.train([d.text for d in corpus.train], vocab_size)
    config = config or embedded_config(tokenizer.vocab_size, recipe.long_context)
    run = _Run(folder, recipe, config, tokenizer, corpus)
    progress = run.progress
    end = recipe.steps if stop_after is None else min(stop_after, recipe.steps)
    with (
        StopSignals() as stop,
        Display(recipe.steps, progress.step, quiet, run.summary) as display,
    ):
        while progress.step < end and not stop.requested:
            run.step(display)
            last = progress.step == recipe.steps
            if progress.step == recipe.long_from:
                progress.best_bits = math.inf  # scores at different contexts do not compare
            if progress.step % recipe.eval_every == 0 or last:
                run.evaluate(display)
            if progress.step % save_every == 0 and not last:
                run.save()
                write_metrics(folder, run.summary, progress, recipe)
    run.save()
    if progress.step == recipe.steps:
        run.score_export(quiet)
    write_metrics(folder, run.summary, progress, recipe)
    return progress


class _Run:
    """A run in memory: the data, the model and how far it has come."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        config: ModelConfig,
        tokenizer: Tokenizer,
        corpus: Corpus,
    ) -> None:
        """Starts, or goes on from the state in the folder if there is one."""
        self.folder, self.recipe, self.tokenizer = folder, recipe, tokenizer
        self.train_stream = pack(tokenizer, corpus.train)
        self.held_out_stream = pack(tokenizer, corpus.held_out)
        self.held_out_bytes = num_bytes(corpus.held_out)
        self.graph, self.params = nnx.split(Transformer(config, rngs=nnx.Rngs(recipe.seed)))
        optimizer = make_optimizer(recipe)
        self.opt_state = optimizer.init(self.params)
        self.train_step = make_train_step(self.graph, optimizer)
        self.progress = Progress()
        self.identity = {
            "recipe": dataclasses.asdict(recipe),
            "config": dataclasses.asdict(config),
            "corpus": corpus.fingerprint,
        }
        if (folder / _STATE).exists():
            (self.params, self.opt_state), self.progress = load_state(
                folder / _STATE, (self.params, self.opt_state), self.identity
            )
        self.summary: dict[str, Any] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            "train_bytes": num_bytes(corpus.train),
            "train_tokens": len(self.train_stream),
            "held_out_bytes": self.held_out_bytes,
            "held_out_tokens": len(self.held_out_stream),
            "held_out": [document.name for document in corpus.held_out],
            **self.identity,
        }

    def step(self, display: Display) -> None:
        """One step of the optimizer."""
        progress, recipe = self.progress, self.recipe
        started = time.perf_counter()
        rows, context = recipe.batch_shape(progress.step)
        batch = jnp.asarray(batch_at(self.train_stream, recipe, progress.step))
        self.params, self.opt_state, loss = self.train_step(self.params, self.opt_state, batch)
        progress.add_loss(float(loss), last=progress.step + 1 == recipe.steps)
        progress.seconds += time.perf_counter() - started
        display.step(progress, rows * context)

    def evaluate(self, display: Display) -> None:
        """Scores the model at the context of the latest step, and keeps it if it is the best."""
        _, context = self.recipe.batch_shape(self.progress.step - 1)
        model = nnx.merge(self.graph, self.params)
        bits = bits_per_byte(model, self.held_out_stream, self.held_out_bytes, context)
        self.progress.bits.append((self.progress.step, bits))
        display.score(self.progress)
        if bits < self.progress.best_bits:
            self.progress.best_bits = bits
            save_model(self.folder / "model", model, self.tokenizer, jnp.float16)

    def save(self) -> None:
        """Writes what the run goes on from."""
        tree = self.params, self.opt_state
        save_state(self.folder / _STATE, tree, self.progress, self.identity)

    def score_export(self, quiet: bool) -> None:
        """What ships is what is scored: the file, in 16 bits."""
        exported, tokenizer = load_model(self.folder / "model")
        bits = bits_per_byte(
            exported, self.held_out_stream, self.held_out_bytes, self.recipe.long_context
        )
        self.summary["exported_bits_per_byte"] = bits
        self.summary["sample"] = sample(exported, tokenizer, "Return a new")
        if not quiet:
            print(f"exported: {bits:.4f} held-out bits per byte")
            print(self.summary["sample"])


def embedded_config(vocab_size: int, context: int) -> ModelConfig:
    """The sizes of the embedded model: 3.5 M parameters, 7 MB in 16 bits."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )


def draft_config(vocab_size: int, context: int) -> ModelConfig:
    """The sizes of the embedded model's draft: 0.2 M parameters, an eighteenth of its own."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=context,
    )


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int = 120,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continues a prompt, to look at what a run has learned."""
    end = tokenizer.end_of_text_id
    result = generate(
        model,
        [tokenizer.encode_prompt(prompt)],
        max_new_tokens=num_tokens,
        sampling=Sampling(temperature=temperature),
        seed=seed,
        stop_tokens=[end],
    )
    (new,) = result.rows()
    return prompt + tokenizer.decode([token for token in new if token != end])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lucid_jax.training.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps in all")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--draft", action="store_true", help="train the embedded model's draft")
    for recipe_field in dataclasses.fields(Recipe)[1:]:
        default = recipe_field.default
        option = f"--{recipe_field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    options = vars(parser.parse_args(arguments))
    out, resume, vocab = options.pop("out"), options.pop("resume"), options.pop("vocab_size")
    draft, recipe = options.pop("draft"), Recipe(**options)
    if not draft:
        train(out, recipe, vocab_size=vocab, resume=resume)
        return
    tokenizer = Tokenizer.load(embedded_model_path() / "tokenizer.json")
    config = draft_config(tokenizer.vocab_size, recipe.long_context)
    train(out, recipe, config=config, tokenizer=tokenizer, resume=resume)


if __name__ == "__main__":
    main()
