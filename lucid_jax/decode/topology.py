"""The shape of a tree of drafts: node 0 is the token before it, children follow level by level."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from lucid_jax.cache.argument_checks import check_count


@dataclasses.dataclass(frozen=True)
class Topology:
    """A tree whose nodes of depth l have `branching[l]` children each. Static and hashable.

    Attributes:
        branching: children of a node by its depth.

    Example:
        >>> tree = Topology((2, 1))
        >>> tree.parents.tolist(), tree.depths.tolist()
        ([-1, 0, 0, 1, 2], [0, 1, 1, 2, 2])
    """

    branching: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.branching:
            raise ValueError("a tree needs a branching of at least one level, such as (2, 2, 1)")
        levels = tuple(check_count(n, "branching of a tree", 1) for n in self.branching)
        object.__setattr__(self, "branching", levels)

    @property
    def depth(self) -> int:
        """D, the most drafts that can be accepted."""
        return len(self.branching)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Nodes of each level, the root's first."""
        widths = [1]
        for children in self.branching:
            widths.append(widths[-1] * children)
        return tuple(widths)

    @cached_property
    def upto(self) -> np.ndarray:
        """Nodes of depth 1 to d, for d from 0 on: int32 [D + 1]."""
        return (np.cumsum(self.widths) - 1).astype(np.int32)

    @property
    def nodes(self) -> int:
        """M, nodes below the root."""
        return int(self.upto[-1])

    @cached_property
    def parents(self) -> np.ndarray:
        """int32 [M + 1], -1 for the root."""
        parents, first = [-1], 0
        for width, children in zip(self.widths, self.branching, strict=False):
            parents += [first + i // children for i in range(width * children)]
            first += width
        return np.array(parents, np.int32)

    @cached_property
    def depths(self) -> np.ndarray:
        """int32 [M + 1]."""
        return np.repeat(np.arange(self.depth + 1, dtype=np.int32), self.widths)

    @cached_property
    def children(self) -> np.ndarray:
        """int32 [M + 1, W], -1 where a node has fewer than W."""
        table = np.full((self.nodes + 1, max(self.branching)), -1, np.int32)
        filled = np.zeros(self.nodes + 1, np.int32)
        for node in range(1, self.nodes + 1):
            parent = self.parents[node]
            table[parent, filled[parent]] = node
            filled[parent] += 1
        return table

    @cached_property
    def sees(self) -> np.ndarray:
        """Whether a node sees another, an ancestor or itself: bool [M + 1, M + 1]."""
        sees = np.eye(self.nodes + 1, dtype=bool)
        for node in range(1, self.nodes + 1):
            sees[node] |= sees[self.parents[node]]
        return sees
