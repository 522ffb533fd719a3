"""A model as the compiled loops take it: its structure, which is static, and its parameters.

nnx describes a structure by nested records. Hashing and comparing those of a small model takes a
quarter of a millisecond, at each jit call; here it is done once, by `split`.
"""

from __future__ import annotations

import weakref
from typing import Any

from flax import nnx


class Graph:
    """The structure of an nnx module, hashable; equal ones are one object, see `split`."""

    def __init__(self, definition: Any):
        """Takes what `nnx.split` gives first."""
        self._definition = definition
        self._hash = hash(definition)

    def __hash__(self) -> int:
        """The definition's, kept."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether two modules have the same structure."""
        if not isinstance(other, Graph):
            return NotImplemented
        return self is other or (
            self._hash == other._hash and self._definition == other._definition
        )

    def merge(self, params: Any) -> Any:
        """The module with some parameters."""
        return nnx.merge(self._definition, params)


# Those in use, perhaps by jit's caches alone: what nobody has any more is forgotten.
_KNOWN: weakref.WeakKeyDictionary[Graph, weakref.ref[Graph]] = weakref.WeakKeyDictionary()


def split(model: Any) -> tuple[Graph, Any]:
    """A module's structure and its parameters.

    Args:
        model: any nnx module.

    Returns:
        The structure, the same object for modules of equal structure, and an nnx state.

    Example:
        >>> graph, params = split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> other, _ = split(nnx.Linear(2, 3, rngs=nnx.Rngs(1)))
        >>> other is graph, graph.merge(params).in_features
        (True, 2)
    """
    definition, params = nnx.split(model)
    graph = Graph(definition)
    return _KNOWN.setdefault(graph, weakref.ref(graph))() or graph, params
