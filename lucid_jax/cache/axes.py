"""The order of axes that a state takes tokens in: `BHTD`, which is how they are stored, or `BTHD`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

STORED = "BHTD"
ORDERS = (STORED, "BTHD")
_NAMES = {"B": "batch", "H": "heads", "T": "seq", "D": "head_dim"}


def check_axes(axes: str) -> str:
    """Checks what was given as `axes=`.

    Raises:
        ValueError: if it is no order that states have.
    """
    if axes not in ORDERS:
        raise ValueError(f"axes must be one of {ORDERS}: batch, heads, tokens, width; got {axes!r}")
    return axes


def swapped(x: jax.Array, axes: str) -> jax.Array:
    """`x`, (B, H, T, ...) or (B, T, H, ...), taken from a state's order to storage's, or back."""
    return x if axes == STORED else jnp.swapaxes(x, 1, 2)


def check_shape(
    name: str, x: jax.Array, axes: str, batch: int, heads: int, dim: int, *, grouped: bool = False
) -> None:
    """Checks the shape of tokens, or of queries, which may have several heads a group.

    Raises:
        ValueError: which names the order, and the other one if that fits.
    """
    if x.ndim != 4:
        order = ", ".join(_NAMES[axis] for axis in axes)
        raise ValueError(f"{name} must be ({order}), got shape {x.shape}; reshape it to four axes")

    def fits(order: str) -> bool:
        size = dict(zip(order, x.shape, strict=True))
        multiple = grouped and size["H"] > 0 and size["H"] % heads == 0
        return (size["B"], size["D"]) == (batch, dim) and (size["H"] == heads or multiple)

    if fits(axes):
        return
    words = {
        "B": f"batch={batch}",
        "H": f"a multiple of {heads} heads" if grouped else f"heads={heads}",
        "T": "seq",
        "D": f"head_dim={dim}",
    }
    other = ORDERS[axes == STORED]
    fix = "check the axis order, or init_cache with these sizes"
    if fits(other):
        fix = (
            f'if that is ({", ".join(_NAMES[axis] for axis in other)}), use init_cache(axes="{other}") '
            "or swap axes 1 and 2"
        )
    raise ValueError(
        f"{name} must be ({', '.join(words[axis] for axis in axes)}) for this layer, got {x.shape}; "
        f"{fix}"
    )
