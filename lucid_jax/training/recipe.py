"""How to train, as a function of its options alone: which batch comes when, and what a step does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx


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
