"""Trains the embedded model: `python -m lucid_jax.models.train --out DIR --steps N`.

With `--draft`, its draft for speculative decoding: a smaller model, trained alike, with its tokenizer.

The run is a function of its options alone: data order follows from (seed, step), so a run that was
stopped (SIGTERM, SIGINT, a crash) and resumed ends with the same weights as one that was not.
`DIR/model` always holds the best model so far, ready to ship.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import nnx

from lucid_jax.decode import Sampling, generate
from lucid_jax.models.checkpoint import (
    embedded_model_path,
    load_model,
    save_model,
    write_atomically,
)
from lucid_jax.models.config import ModelConfig
from lucid_jax.models.corpus import Corpus, num_bytes, python_corpus
from lucid_jax.models.evaluate import bits_per_byte, pack
from lucid_jax.models.tokenizer import Tokenizer
from lucid_jax.models.transformer import Transformer

_LOSS_EVERY = 10  # steps per point of the loss curve


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the corpus and the model's config.

    Most of the run sees half the context, at which attention costs half as much per token; the last
    `long_fraction` of the steps teaches the rest, in batches of as many tokens.

    Raises:
      ValueError: if a count is below 1 or the fraction outside [0, 1].
    """

    steps: int
    seed: int = 0
    batch_size: int = 8  # rows at the short context
    short_context: int = 256
    long_context: int = 512
    long_fraction: float = 0.15
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.2
    eval_every: int = 250

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("steps", "batch_size", "short_context", "long_context", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.long_fraction <= 1.0:
            raise ValueError(f"long_fraction must be in [0, 1], got {self.long_fraction}")

    @property
    def long_from(self) -> int:
        """The first step at the long context."""
        return self.steps - round(self.steps * self.long_fraction)

    def batch_shape(self, step: int) -> tuple[int, int]:
        """(rows, context) of a step."""
        if step < self.long_from:
            return self.batch_size, self.short_context
        rows = max(1, self.batch_size * self.short_context // self.long_context)
        return rows, self.long_context


@dataclass
class Progress:
    """What a run remembers besides arrays; stored with them as JSON."""

    step: int = 0
    best_bits: float = math.inf
    pending: list[float] = field(default_factory=list)  # losses not yet in a mean
    losses: list[tuple[int, float]] = field(default_factory=list)
    bits: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add_loss(self, loss: float, last: bool) -> None:
        """Counts a step; every tenth, and the last, closes a mean."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {self.step + 1}")
        self.step += 1
        self.pending.append(loss)
        if last or self.step % _LOSS_EVERY == 0:
            self.losses.append((self.step, float(np.mean(self.pending))))
            self.pending.clear()


def batch_at(stream: np.ndarray, recipe: Recipe, step: int) -> np.ndarray:
    """The batch of a step, int32 (rows, context + 1): inputs and, shifted by one, targets.

    Every epoch cuts the stream at another offset and shuffles the pieces, so that no two epochs
    show the same windows.
    """
    rows, context = recipe.batch_shape(step)
    local_step = step if step < recipe.long_from else step - recipe.long_from
    per_epoch = (len(stream) - 1 - context) // context  # an offset costs one window
    if per_epoch < 1:
        raise ValueError(
            f"the corpus has {len(stream)} tokens; a context of {context} needs {2 * context + 1}"
        )
    batch = np.empty((rows, context + 1), np.int32)
    for row in range(rows):
        epoch, index = divmod(local_step * rows + row, per_epoch)
        offset, order = _epoch_order(recipe.seed, epoch, context, per_epoch)
        start = offset + int(order[index]) * context
        batch[row] = stream[start : start + context + 1]
    return batch


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, context: int, count: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng((seed, epoch, context))
    return int(random.integers(context)), random.permutation(count)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with warmup, cosine decay to zero and clipping; norms are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.learning_rate,
        warmup_steps=min(recipe.warmup_steps, max(1, recipe.steps // 10)),
        decay_steps=recipe.steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def make_train_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[[Any, Any, jax.Array], tuple[Any, Any, jax.Array]]:
    """The jitted step: (params, opt_state, batch) -> (params, opt_state, loss), in place."""

    def loss_of(params: nnx.State, batch: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


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
    state_path = folder / "state.safetensors"
    if state_path.exists() and not resume:
        raise ValueError(f"{folder} already holds a run; resume it, or choose another folder")

    corpus = python_corpus() if corpus is None else corpus
    if tokenizer is None:
        vocab_size = config.vocab_size if config else vocab_size
        tokenizer = Tokenizer.train([d.text for d in corpus.train], vocab_size)
    config = config or embedded_config(tokenizer.vocab_size, recipe.long_context)
    train_stream = pack(tokenizer, corpus.train)
    held_out_stream = pack(tokenizer, corpus.held_out)
    held_out_bytes = num_bytes(corpus.held_out)

    graph, params = nnx.split(Transformer(config, rngs=nnx.Rngs(recipe.seed)))
    optimizer = make_optimizer(recipe)
    opt_state = optimizer.init(params)
    progress = Progress()
    identity = {
        "recipe": dataclasses.asdict(recipe),
        "config": dataclasses.asdict(config),
        "corpus": corpus.fingerprint,
    }
    if state_path.exists():
        (params, opt_state), progress = _load_state(state_path, (params, opt_state), identity)
    summary = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "train_bytes": num_bytes(corpus.train),
        "train_tokens": len(train_stream),
        "held_out_bytes": held_out_bytes,
        "held_out_tokens": len(held_out_stream),
        "held_out": [document.name for document in corpus.held_out],
        **identity,
    }

    train_step = make_train_step(graph, optimizer)
    end = recipe.steps if stop_after is None else min(stop_after, recipe.steps)
    with _StopSignals() as stop, _Display(recipe.steps, progress.step, quiet, summary) as display:
        while progress.step < end and not stop.requested:
            started = time.perf_counter()
            rows, context = recipe.batch_shape(progress.step)
            batch = jnp.asarray(batch_at(train_stream, recipe, progress.step))
            params, opt_state, loss = train_step(params, opt_state, batch)
            progress.add_loss(float(loss), last=progress.step + 1 == recipe.steps)
            progress.seconds += time.perf_counter() - started
            display.step(progress, rows * context)

            last = progress.step == recipe.steps
            if progress.step == recipe.long_from:
                progress.best_bits = math.inf  # scores at different contexts do not compare
            if progress.step % recipe.eval_every == 0 or last:
                model = nnx.merge(graph, params)
                bits = bits_per_byte(model, held_out_stream, held_out_bytes, context)
                progress.bits.append((progress.step, bits))
                display.score(progress)
                if bits < progress.best_bits:
                    progress.best_bits = bits
                    save_model(folder / "model", model, tokenizer, jnp.float16)
            if progress.step % save_every == 0 and not last:
                _save_state(state_path, (params, opt_state), progress, identity)
                _write_metrics(folder, summary, progress, recipe)
    _save_state(state_path, (params, opt_state), progress, identity)

    if progress.step == recipe.steps:
        # What ships is what is scored: the file, in 16 bits.
        exported, tokenizer = load_model(folder / "model")
        summary["exported_bits_per_byte"] = bits_per_byte(
            exported, held_out_stream, held_out_bytes, recipe.long_context
        )
        summary["sample"] = sample(exported, tokenizer, "Return a new")
        if not quiet:
            print(f"exported: {summary['exported_bits_per_byte']:.4f} held-out bits per byte")
            print(summary["sample"])
    _write_metrics(folder, summary, progress, recipe)
    return progress


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


def plot_curve(path: Path | str, progress: Progress, recipe: Recipe) -> None:
    """Draws training loss and held-out bits per byte over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="training loss (nats per token)")
    axes.plot(*zip(*progress.losses, strict=True), color="tab:blue", alpha=0.6, linewidth=0.8)
    axes.axvline(recipe.long_from, color="gray", linestyle=":", linewidth=0.8)
    if progress.bits:
        scores = axes.twinx()
        scores.set_ylabel("held-out bits per byte")
        scores.plot(*zip(*progress.bits, strict=True), color="tab:red", marker=".")
    figure.savefig(str(path), dpi=120)


def _save_state(path: Path, tree: Any, progress: Progress, identity: dict) -> None:
    leaves = jax.tree.leaves(tree)
    arrays = {f"{index:05d}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
    metadata = {
        "progress": json.dumps(dataclasses.asdict(progress)),
        "identity": json.dumps(identity),
    }
    write_atomically(path, safetensors.numpy.save(arrays, metadata))


def _load_state(path: Path, like: Any, identity: dict) -> tuple[Any, Progress]:
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        stored = json.loads(metadata["identity"])
        for key, value in json.loads(json.dumps(identity)).items():
            if stored[key] != value:
                raise ValueError(
                    f"{path} belongs to another run: its {key} is {stored[key]}, this run's "
                    f"{value}; repeat the options of that run, or choose another folder"
                )
        leaves, structure = jax.tree.flatten(like)
        leaves = [
            jnp.asarray(file.get_tensor(f"{index:05d}"), leaf.dtype)
            for index, leaf in enumerate(leaves)
        ]
    progress = Progress(**json.loads(metadata["progress"]))
    progress.losses = [(step, loss) for step, loss in progress.losses]
    progress.bits = [(step, bits) for step, bits in progress.bits]
    return jax.tree.unflatten(structure, leaves), progress


def _write_metrics(folder: Path, summary: dict, progress: Progress, recipe: Recipe) -> None:
    values = {**summary, **dataclasses.asdict(progress)}
    write_atomically(folder / "metrics.json", json.dumps(values, indent=1).encode())
    if progress.losses:
        plot_curve(folder / "curve.png", progress, recipe)


class _StopSignals:
    """Turns SIGTERM and SIGINT into a flag, so that a step is never cut in two."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
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


class _Display:
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
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> _Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, progress: Progress, tokens: int) -> None:
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
        self._bits = progress.bits[-1][1]
        if not self._quiet and self._bar is None:
            print(f"step {progress.step}  held-out {self._bits:.4f} bits/byte", flush=True)
        self._last = time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lucid_jax.models.train", description=__doc__)
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
