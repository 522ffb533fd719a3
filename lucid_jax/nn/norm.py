"""Normalization over the last axis: x (..., D) in, the same shape and dtype out."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

NormKind = Literal["rms", "rms+1", "layer"]


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich, 2019) or LayerNorm, computed in float32 at least.

    Attributes:
      kind: "rms"; "rms+1", which scales by 1 + `scale` (Gemma); or "layer", with a bias.

    Example:
      >>> Norm(4, kind="rms")(jnp.array([1.0, -1.0, 1.0, -1.0])).tolist()
      [1.0, -1.0, 1.0, -1.0]
    """

    def __init__(
        self,
        width: int,
        *,
        kind: NormKind = "rms",
        epsilon: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Builds the parameters, which leave the normalized input as it is.

        Args:
          width: D.
          kind: see the class.
          epsilon: added to the mean square.
          param_dtype: dtype the parameters are kept in.
        """
        start = 0.0 if kind == "rms+1" else 1.0
        self.kind: NormKind = kind
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.full(width, start, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype)) if kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last axis."""
        wide = x if x.dtype.itemsize > 4 else x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        wide = wide * self._along(self.scale, wide, 1.0 if self.kind == "rms+1" else 0.0)
        if self.bias is not None:
            wide = wide + self._along(self.bias, wide, 0.0)
        return wide.astype(x.dtype)

    def _along(self, param: nnx.Param, x: jax.Array, offset: float) -> jax.Array:
        return (param[...].astype(x.dtype) + offset).reshape((1,) * (x.ndim - 1) + (-1,))
