"""The lucid-shaped names that documented snippets use: `Tensor`, `randn`, dtypes, `manual_seed`.

All arrays are plain `jax.Array`s; these are other names for making them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lucid_jax.cache.argument_checks import as_array

Int8, Int16, Int32, Int64 = jnp.int8, jnp.int16, jnp.int32, jnp.int64
Float16, Float32, Float64, BFloat16 = jnp.float16, jnp.float32, jnp.float64, jnp.bfloat16
Bool = jnp.bool_


class _ArrayType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, jax.Array)


class Tensor(metaclass=_ArrayType):
    """`Tensor(data, dtype=...)` makes a `jax.Array`; every `jax.Array` is an instance.

    Example:
        >>> import lucid_jax as lucid
        >>> x = lucid.Tensor([3, 1, 0, 2], dtype=lucid.Int32)
        >>> x.dtype, isinstance(x, lucid.Tensor)
        (dtype('int32'), True)
    """

    def __new__(cls, data: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:  # type: ignore[misc]
        """Converts `data`; 64-bit dtypes become 32-bit unless `jax_enable_x64` is set."""
        array = as_array(data)
        if dtype is None:
            return array
        return array.astype(jax.dtypes.canonicalize_dtype(dtype))


# Drawn on the host: a device generator would compile a program for every new shape.
_generator = np.random.default_rng(0)


def manual_seed(seed: int) -> None:
    """Restarts the generator behind `randn`."""
    global _generator
    _generator = np.random.default_rng(seed)


def randn(*shape: int) -> jax.Array:
    """Standard normal float32 numbers from a process-wide generator; see `manual_seed`.

    For throw-away data in eager code. Inside `jit` it would be a constant: use `jax.random`.

    Example:
        >>> import lucid_jax as lucid
        >>> lucid.randn(2, 8, 1, 64).shape
        (2, 8, 1, 64)
    """
    # Not jnp.asarray, which compiles a copy for every new shape (60 ms each on CPU).
    return jax.device_put(_generator.standard_normal(shape, np.float32))
