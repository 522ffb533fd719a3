"""The gradient of loops that move slots in place.

Such a loop is a linear map of its leaves, but JAX cannot transpose a loop of traced length. It can, of
the same map written at once, as a gather of the whole leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lucid_jax.cache.carry import varying_as


@struct.dataclass
class _Kept:
    """What the backward pass needs: never the leaves themselves."""

    rest: tuple[Any, ...]
    leaves: tuple[jax.ShapeDtypeStruct, ...] = struct.field(pytree_node=False)


def with_gradient_of(
    plain: Callable[..., jax.Array], leaves: int = 1
) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """Gives a function the gradient of `plain`, which computes the same at once, in O(capacity).

    Args:
        plain: takes the same arguments, and is linear in the first `leaves` of them.
        leaves: how many arguments have a gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> @with_gradient_of(lambda x, n: jnp.exp2(n.astype(x.dtype)) * x)
        ... def doubled(x, n):
        ...     return jax.lax.fori_loop(0, n, lambda _, x: 2 * x, x)
        >>> jax.grad(doubled)(jnp.float32(1), jnp.int32(3)).item()
        8.0
    """

    def wrap(loop: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        run = jax.custom_vjp(loop)

        def forward(*args: Any) -> tuple[jax.Array, _Kept]:
            shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args[:leaves])
            return loop(*args), _Kept(args[leaves:], shapes)

        def backward(kept: _Kept, cotangent: jax.Array) -> tuple[Any, ...]:
            def at_once(*xs: jax.Array) -> jax.Array:
                return plain(*xs, *kept.rest)

            zeros = (jnp.zeros(leaf.shape, leaf.dtype) for leaf in kept.leaves)
            grads = jax.vjp(at_once, *varying_as(tuple(zeros), cotangent))[1](cotangent)
            return (*grads, *(None for _ in kept.rest))

        run.defvjp(forward, backward)
        return functools.wraps(loop)(lambda *args: run(*varying_as(args)))

    return wrap
