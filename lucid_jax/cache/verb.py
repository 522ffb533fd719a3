"""`verb`: one pure function on a state, to be called three ways at no extra cost.

Traced inside the caller's `jit`, it is part of the caller's program. Called eagerly it is compiled, and
the old state stays valid (kept), or the old state's buffers are reused and it is gone (donated).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import jax

from lucid_jax.cache.argument_checks import is_traced
from lucid_jax.cache.mesh_programs import PartsOf, in_auto_axes, on_each_device

R = TypeVar("R")


class Verb(Generic[R]):
    """A pure function of a state, and of arrays, in each of its three ways.

    Attributes:
        traced: for arguments of a caller's trace.
        kept: compiled; leaves the state as it was.
        donated: compiled; works in the state's own buffers.
    """

    def __init__(
        self,
        run: Callable[..., R],
        static: tuple[str, ...] = (),
        *,
        shares: bool = False,
        parts: PartsOf | None = None,
    ) -> None:
        self.traced: Callable[..., R] = (
            in_auto_axes(run) if parts is None else on_each_device(run, parts)
        )
        self.kept: Callable[..., R] = (
            _without_copies(self.traced) if shares else jax.jit(self.traced, static_argnames=static)
        )
        self.donated: Callable[..., R] = jax.jit(
            self.traced, static_argnames=static, donate_argnums=0
        )

    def __call__(self, state: Any, *args: Any, donate: bool = False, **static: Any) -> R:
        """Traced if anything given is, else donated or kept."""
        if is_traced(state, args):
            return self.traced(state, *args, **static)
        return self.compiled(donate)(state, *args, **static)

    def compiled(self, donate: bool) -> Callable[..., R]:
        """The program for eager calls."""
        return self.donated if donate else self.kept


def verb(
    *static: str, shares: bool = False, parts: PartsOf | None = None
) -> Callable[[Callable[..., R]], Verb[R]]:
    """Makes a `Verb` of a pure function whose first argument is the state, or a layer of one.

    Args:
        *static: names of arguments that are static.
        shares: the function hands most buffers of tokens through untouched, and what is kept is to
            share them with the old state rather than copy them. It must give back a state.
        parts: the function is of one layer, whose rows and heads do not know of each other, and this
            says which of them arguments and results are of; see `on_each_device`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> @verb()
        ... def add(state, x):
        ...     return state + x
        >>> state = jnp.zeros(3)
        >>> jax.jit(add)(state, 1.0).tolist(), add(state, 1.0).tolist()
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
        >>> add(state, 1.0, donate=True).tolist(), state.is_deleted()
        ([1.0, 1.0, 1.0], True)
    """
    return lambda run: Verb(run, static, shares=shares, parts=parts)


def _without_copies(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` compiled, its result holding the very buffers of tokens that `run` hands through.

    `jax.jit` alone would copy them. Counters are always new.
    """

    @partial(jax.jit, keep_unused=True)  # so that the mesh of what is handed through is known
    def changed(state: Any, *args: Any) -> list[jax.Array | None]:
        leaves = zip(jax.tree.leaves(state), jax.tree.leaves(run(state, *args)), strict=True)
        return [None if new is old and old.ndim > 2 else new for old, new in leaves]

    def call(state: Any, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(state)
        pairs = zip(leaves, changed(state, *args), strict=True)
        return jax.tree.unflatten(structure, [old if new is None else new for old, new in pairs])

    return call
