"""`merge`: attention over disjoint sets of tokens, combined exactly."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Combines attention of the same queries over disjoint sets of tokens, exactly.

    Each result is weighed by its share of the softmax's denominator (Juravsky et al. 2024, "Hydragen";
    FlashDecoding): a shared prefix and each row's suffix, or runs kept on different devices.

    Args:
        outs: attention outputs (B, N, T, Dv).
        lses: their log-sum-exps (B, N, T), as `attend(return_lse=True)` gives them; -inf if a query
            saw nothing there.

    Returns:
        The attention over all tokens, (B, N, T, Dv) in the outputs' dtype, and its log-sum-exp.

    Raises:
        ValueError: if there is nothing to merge, or shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> outs = [jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2))]
        >>> out, lse = merge(outs, [jnp.zeros((1, 1, 1))] * 2)
        >>> out[0, 0, 0].tolist(), round(float(lse[0, 0, 0]), 4)
        ([0.5, 0.5], 0.6931)
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge needs as many log-sum-exps as outputs, at least one, got {len(outs)} and "
            f"{len(lses)}"
        )
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                "merge takes outputs (B, N, T, Dv) of one shape and log-sum-exps (B, N, T), got "
                f"{[x.shape for x in outs]} and {[x.shape for x in lses]}"
            )
    stacked = jnp.stack([jnp.asarray(lse) for lse in lses])
    top = jnp.max(stacked, axis=0)
    shift = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(stacked - shift[None])
    total = jnp.sum(weights, axis=0)
    share = weights / jnp.where(total > 0, total, 1)[None]
    # A run without a share may hold anything.
    mixed = [
        jnp.where(s[..., None] > 0, out.astype(s.dtype) * s[..., None], 0)
        for out, s in zip(outs, share, strict=True)
    ]
    out = sum(mixed[1:], mixed[0])
    return out.astype(outs[0].dtype), jnp.log(total) + shift
