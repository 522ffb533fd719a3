"""Counting what all layers store at once, in a step that goes through them layer by layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.cache.argument_checks import is_traced
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tiles import divided_by_compiler


def counted_together(state: CacheState, lengths: Any) -> CacheState:
    """The same state, for a traced step that is about to append to each of its layers.

    XLA for GPUs takes a kernel for the counters of every layer. It takes one for many layers where
    their counters come from one array, so there positions, int32 [] or [B], are parts of one. With
    `lengths`, which every layer gets, they come from those.
    """
    positions = tuple(layer.position for layer in state.layers)
    if lengths is not None or state.stacked or len(positions) == 1 or not is_traced(positions):
        return state
    alike = len({jax.typeof(position) for position in positions}) == 1
    if not alike or any(map(divided_by_compiler, positions)):
        return state

    def of_one_array(*positions: jax.Array) -> tuple[jax.Array, ...]:
        one = lax.optimization_barrier(jnp.stack(positions))
        return tuple(one[number] for number in range(len(positions)))

    positions = lax.platform_dependent(
        *positions, cuda=of_one_array, default=lambda *positions: positions
    )
    return state.with_layers(
        layer.replace(position=position)
        for layer, position in zip(state.layers, positions, strict=True)
    )
