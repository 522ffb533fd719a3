"""Prompts of unequal lengths into an empty cache: each by itself where padding them all costs more."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache import rows, verbs
from lucid_jax.cache.state import CacheState
from lucid_jax.decode.language_model import ModelStructure
from lucid_jax.decode.prefill import better_apart, prefill, with_slots


def prefill_prompts(
    structure: ModelStructure,
    params: Any,
    state: CacheState,
    tokens: np.ndarray,
    lengths: np.ndarray,
    largest: int,
    slots: int = 1,
) -> tuple[jax.Array, CacheState]:
    """`prefill` of a cache that holds nothing yet.

    One by one takes one more row's memory.
    """
    if not (better_apart(lengths, largest) and _on_one_device(state, params)):
        return prefill(structure, params, state, tokens, lengths, largest, slots)
    one, lasts = verbs.select(state, np.zeros(1, np.int32)), []
    for row, length in enumerate(lengths):
        last, one = prefill(
            structure, params, one, tokens[row : row + 1, :length], lengths[row : row + 1], largest
        )
        state = rows.insert(state, np.array([row], np.int32), one, donate=True)
        one = verbs.reset(one, donate=True)
        lasts.append(last)
    return jnp.concatenate(lasts), with_slots(state, slots)


def _on_one_device(*trees: Any) -> bool:
    devices = [x.devices() for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
    return len(frozenset().union(*devices)) == 1
