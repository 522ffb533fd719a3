"""What a loop starts from, inside `shard_map`.

There an array's type says along which mesh axes it varies. Zeros vary along none, while what a loop
makes of them varies as all that the loop reads, and a carry must keep its type.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")


def varying_as(tree: T, *like: Any) -> T:
    """The arrays of `tree`, which also vary along the mesh axes that arrays of `like` vary along.

    Args:
        tree: arrays; their numbers stay as they are.
        *like: what they will be combined with.

    Example:
        >>> import jax.numpy as jnp
        >>> varying_as(jnp.zeros(2), jnp.ones(3)).tolist()  # outside of shard_map nothing varies
        [0.0, 0.0]
    """
    axes = frozenset[str]().union(*map(_varies, jax.tree.leaves((tree, like))))
    if not axes:
        return tree

    def cast(x: jax.Array) -> jax.Array:
        varying: jax.Array = lax.pcast(x, tuple(sorted(axes - _varies(x))), to="varying")
        return varying

    result: T = jax.tree.map(cast, tree)
    return result


def _varies(x: Any) -> frozenset[str]:
    """The mesh axes along which an array varies."""
    return jax.typeof(x).mat.varying if isinstance(x, jax.Array) else frozenset()
