"""Prompts and stop tokens on the host: checked, padded, and what occurs in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.decode.sampling import Sampling

Prompts = ArrayLike | Sequence[Sequence[int]]


def as_stops(stop_tokens: Any) -> tuple[int, ...]:
    """Checks the ids that end a row; sorted, so that naming them in another order compiles nothing."""
    if not isinstance(stop_tokens, Iterable):
        raise TypeError(
            f"stop_tokens must be a list of token ids, got {stop_tokens!r}; write [...]"
        )
    return tuple(sorted({check_count(token, "a stop token") for token in stop_tokens}))


def pad_prompts(prompts: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads prompts: int32 (B, longest) and lengths (B,).

    Raises:
        ValueError: for no prompts, an empty one, or an id outside the vocabulary.
        TypeError: for ids that are not integers.
    """
    # Rows of a JAX array by themselves would take XLA a program for each shape.
    whole = np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts
    rows = [np.asarray(row) for row in whole]
    if not rows:
        raise ValueError("prompts must hold at least one row, got none")
    for index, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(
                f"each prompt must be a list of token ids, got shape {row.shape} for prompt {index}; "
                "for one prompt pass [ids]"
            )
        if row.size == 0:
            raise ValueError(
                f"prompt {index} is empty; give at least one token, such as the BOS id"
            )
        if not np.issubdtype(row.dtype, np.integer):
            raise TypeError(f"token ids must be integers, got {row.dtype} in prompt {index}")
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"token ids must be in [0, {vocab_size}), got {row.min()} ... {row.max()} in "
                f"prompt {index}; was it encoded with another tokenizer?"
            )
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, lengths


def unpad(tokens: ArrayLike, attention_mask: ArrayLike) -> list[list[int]]:
    """The rows of a padded batch, as `generate` takes them; padding may be left, right or both.

    Args:
        tokens: int (B, T).
        attention_mask: bool or 0 and 1, (B, T): which are real, as transformers' tokenizers give it.

    Raises:
        ValueError: if shapes differ, or real tokens of a row do not follow each other.

    Example:
        >>> unpad([[0, 0, 7], [5, 6, 0]], [[0, 0, 1], [1, 1, 0]])
        [[7], [5, 6]]
    """
    ids, real = np.asarray(tokens), np.asarray(attention_mask).astype(bool)
    if ids.ndim != 2 or ids.shape != real.shape:
        raise ValueError(
            f"tokens and attention_mask must both be (batch, seq), got {ids.shape} and {real.shape}"
        )
    edges = np.diff(np.pad(real, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    if np.any(np.sum(edges == 1, axis=1) > 1):
        row = int(np.argmax(np.sum(edges == 1, axis=1) > 1))
        raise ValueError(
            f"row {row} of attention_mask has padding between real tokens; move it to the ends"
        )
    return [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()


def seen_tokens(
    tokens: np.ndarray, lengths: np.ndarray, model: Any, sampling: Sampling
) -> jax.Array | None:
    """Which tokens occur in each padded prompt, bool (B, V), if `sampling` wants to know."""
    if not sampling.remembers:
        return None
    seen = np.zeros((len(tokens), model.config.vocab_size), bool)
    for row, ids, length in zip(seen, tokens, lengths, strict=True):
        row[ids[:length]] = True
    return jnp.asarray(seen)
