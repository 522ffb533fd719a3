r"""Teaches a draft to write like its target: `python -m lucid_jax.training.distill --draft A --out B`.

The target continues pieces of the corpus greedily, and the draft goes on training on batches of half
corpus, half that text (sequence-level distillation, Kim & Rush 2016; for drafts, DistillSpec, Zhou et
al. 2024). The draft that ships was made so, on one core in half an hour:

    python -m lucid_jax.training.train --draft --out a --steps 5000 --learning-rate 4e-3 \
        --weight-decay 0.1 --eval-every 5000
    python -m lucid_jax.training.distill --draft a/model --out b --steps 4000 --learning-rate 3e-3
    python -m lucid_jax.training.distill --draft b --out c --steps 4500 --learning-rate 2e-3 --rows 5120
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lucid_jax.cache.layouts.contiguous import Static
from lucid_jax.decode import generate
from lucid_jax.models.checkpoint import load_model, save_model
from lucid_jax.models.evaluate import pack
from lucid_jax.models.transformer import Transformer
from lucid_jax.training.corpus import python_corpus
from lucid_jax.training.recipe import Recipe, batch_at, make_optimizer, make_train_step


def written_by(
    model: Transformer, stream: np.ndarray, rows: int, *, prompt: int, new: int, seed: int = 0
) -> np.ndarray:
    """Pieces of a token stream and how the model goes on greedily, int32 (rows, prompt + new)."""
    random = np.random.default_rng(seed)
    batch, texts = 64, []
    for start in range(0, rows, batch):
        starts = random.integers(len(stream) - prompt, size=min(batch, rows - start))
        prompts = np.stack([stream[at : at + prompt] for at in starts])
        result = generate(model, prompts, max_new_tokens=new, cache=Static(prompt + new))
        texts.append(np.concatenate([prompts, result.tokens], axis=1))
    return np.concatenate(texts).astype(np.int32)


def distill(
    draft: Path | str, out: Path | str, recipe: Recipe, *, rows: int, prompt: int = 32
) -> list[float]:
    """Trains a draft of the embedded model further and writes it to `out`; the losses.

    Args:
      draft: folder of the draft to start from, trained with the embedded model's tokenizer.
      out: folder for the result.
      recipe: how to train; its short context is the length of a text.
      rows: texts for the target to write.
      prompt: tokens of the corpus each starts with.
    """
    target, tokenizer = load_model()
    student, _ = load_model(draft)
    stream = pack(tokenizer, python_corpus().train)
    context = recipe.short_context
    texts = written_by(target, stream, rows, prompt=prompt, new=context + 1 - prompt)
    graph, params = nnx.split(student)
    optimizer = make_optimizer(recipe)
    opt_state = optimizer.init(params)
    train_step = make_train_step(graph, optimizer)
    random = np.random.default_rng(recipe.seed)
    losses = []
    half = recipe.batch_size // 2
    started = time.perf_counter()
    for step in range(recipe.steps):
        own = texts[random.integers(len(texts), size=recipe.batch_size - half)]
        batch = np.concatenate([batch_at(stream, recipe, step)[:half], own])
        params, opt_state, loss = train_step(params, opt_state, jnp.asarray(batch))
        losses.append(float(loss))
        if (step + 1) % 100 == 0:
            mean, seconds = np.mean(losses[-100:]), time.perf_counter() - started
            print(f"step {step + 1}/{recipe.steps}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
    save_model(out, nnx.merge(graph, params), tokenizer, jnp.float16)
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lucid_jax.training.distill", description=__doc__
    )
    parser.add_argument(
        "--draft", type=Path, required=True, help="folder of the draft to start from"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rows", type=int, default=2560, help="texts for the target to write")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    options = parser.parse_args(arguments)
    recipe = Recipe(
        options.steps, learning_rate=options.learning_rate, long_fraction=0.0, weight_decay=0.1
    )
    distill(options.draft, options.out, recipe, rows=options.rows)


if __name__ == "__main__":
    main()
