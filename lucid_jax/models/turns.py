"""Scanning over a model's layers: alike blocks stacked, and a turn of them compiled once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lucid_jax.cache.stacked import LayerLike
from lucid_jax.cache.state import CacheState
from lucid_jax.models.blocks import Block
from lucid_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Turns:
    """How a model scans over layers of a repeating pattern, such as five sliding ones and a global one.

    The first `period` blocks of the model hold the weights of all whole turns, stacked: place i those
    of layers i, period + i, and so on. What is left over follows them, layer by layer.

    Attributes:
      period: layers of a turn.
      count: whole turns.
    """

    period: int
    count: int

    def stacked(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks of a model as it keeps them, from those of its layers."""
        whole = self.period * self.count
        return [
            *(_stacked(blocks[i : whole : self.period]) for i in range(self.period)),
            *blocks[whole:],
        ]

    def layer_of(self, index: int, turn: int) -> int:
        """The layer that block `index` is in a turn."""
        if index < self.period:
            return turn * self.period + index
        return self.period * self.count + index - self.period

    def turns_of(self, index: int) -> range | None:
        """The turns that block `index` has weights of; None if it is not stacked."""
        return range(self.count) if index < self.period else None

    def run(
        self, blocks: Sequence[Block], hidden: jax.Array, cache: Any, options: dict[str, Any]
    ) -> tuple[jax.Array, Any]:
        """All layers: whole turns by `scan`, or, of a cache that is not stacked, one by one."""
        split = [nnx.split(block) for block in blocks[: self.period]]
        graphs, weights = [graph for graph, _ in split], [params for _, params in split]

        def turn(carry: tuple[jax.Array, Any], x: Any) -> tuple[tuple[jax.Array, Any], None]:
            (hidden, cache), (number, weights) = carry, x
            for index, (graph, params) in enumerate(zip(graphs, weights, strict=True)):
                layer_idx = number * self.period + index
                known = layer_idx if isinstance(number, int) else LayerLike(index, layer_idx)
                hidden, cache = nnx.merge(graph, params)(hidden, cache, known, **options)
            return (hidden, cache), None

        if cache is None or (isinstance(cache, CacheState) and cache.stacked):
            numbers = jnp.arange(self.count, dtype=jnp.int32)
            (hidden, cache), _ = jax.lax.scan(turn, (hidden, cache), (numbers, weights))
        else:
            for number in range(self.count):
                params = jax.tree.map(lambda x, number=number: x[number], weights)
                (hidden, cache), _ = turn((hidden, cache), (number, params))
        for index, block in enumerate(blocks[self.period :], self.period):
            hidden, cache = block(hidden, cache, self.layer_of(index, 0), **options)
        return hidden, cache


def _stacked(blocks: Sequence[Block]) -> Block:
    """Blocks that are alike as one, whose parameters have an axis more, the first."""
    split = [nnx.split(block) for block in blocks]
    params = jax.tree.map(lambda *x: jnp.stack(x), *(params for _, params in split))
    return nnx.merge(split[0][0], params)


def pattern(config: ModelConfig) -> tuple[int, int]:
    """After how many layers those of a model repeat, and how often they do."""
    layers = config.num_hidden_layers
    kinds = [(config.windows[index], config.rope(index)) for index in range(layers)]
    period = next(n for n in range(1, layers + 1) if kinds[n:] == kinds[:-n])
    return period, layers // period
