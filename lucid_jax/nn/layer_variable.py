"""`LayerVariable`: the flax variable of one layer's pure state, and whether its buffers are its own.

An eager update reuses buffers, so nobody else may hold them. Flax, `jax.tree` and callers reach them
through `_raw_value` alone: `nnx.clone`, `nnx.split`, `jax.tree.map`, `nnx.jit`, a conversion. Once one
of them has read it, or put a value there, the next update copies, once, and is then alone again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lucid_jax.cache.argument_checks import is_traced
from lucid_jax.cache.tokens import TokenLayer


class LayerVariable(nnx.Variable):
    """The flax variable that holds one layer's pure state.

    Made as `LayerVariable(layer, inner=...)`, with the axes of the caller's (..., T, D) between batch
    and T, a tuple, or None if there is no batch axis: static, as all metadata of a variable.
    """

    __slots__ = ("_alone", "_layer", "_stored")

    @property
    def _raw_value(self) -> Any:
        """What flax and `jax.tree` see: after that the buffers may be anybody's."""
        self._share()
        return self._layer

    @_raw_value.setter
    def _raw_value(self, value: Any) -> None:
        self._share()
        object.__setattr__(self, "_layer", value)

    def _share(self) -> None:
        object.__setattr__(self, "_alone", False)
        object.__setattr__(self, "_stored", None)

    @property
    def layer(self) -> TokenLayer:
        """The state, for who neither keeps it nor gives it away."""
        return self._layer

    @property
    def alone(self) -> bool:
        """Whether nobody else can hold these buffers, so that an update may reuse them."""
        return self._alone

    @property
    def stored(self) -> int | None:
        """Tokens in a bounded layer, where the host knows, and that the layer is sound and there."""
        return self._stored

    @property
    def inner(self) -> tuple[int, ...] | None:
        """The axes between batch and T."""
        return self._var_metadata["inner"]

    def keep(self, layer: TokenLayer, stored: int | None = None) -> None:
        """Takes what came of the layer (donated if it was `alone`), whose buffers are then ours.

        Leaves that the old state still is in are copied.
        """
        self._check_can_update()
        if not self._alone and not is_traced(layer):
            old = {id(leaf) for leaf in jax.tree.leaves(self._layer)}
            layer = jax.tree.map(lambda x: jnp.copy(x) if id(x) in old else x, layer)
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_alone", True)
        object.__setattr__(self, "_stored", stored)


def owned(layer: TokenLayer, inner: tuple[int, ...] | None) -> LayerVariable:
    """The variable of a layer that was just made, and that nobody else holds."""
    variable = LayerVariable(layer, inner=inner)
    object.__setattr__(variable, "_alone", True)
    return variable
