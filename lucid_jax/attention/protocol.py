"""What a backend of attention is: a function of a query, runs of slots, a mask and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax

from lucid_jax.attention.mask import Mask
from lucid_jax.attention.softmax import Query, Scores
from lucid_jax.cache.reading import SlotRun


class NotMe(NamedTuple):
    """What a backend returns for a call that it does not take.

    Attributes:
        lacks: what it would need, as a clause: "takes no softcap".
    """

    lacks: str


class Backend(Protocol):
    """Computes attention, or says that it does not; called while tracing, with shapes known."""

    def __call__(
        self, query: Query, slot_runs: Sequence[SlotRun], mask: Mask, scores: Scores, /
    ) -> tuple[jax.Array, jax.Array] | NotMe:
        """Attention of queries over the tokens of all runs in one softmax.

        A slot that a query does not see must never reach its output or gradient, whatever it holds.
        Sums are float32 at least. A query that sees nothing gets zeros.

        Args:
            query: (B, N, T, D), neither scaled nor rotated; of a layer with leaves of its own names a
                dict by them, whose scores add up.
            slot_runs: what is stored; a token may be in several, of which `mask.seen` shows each query
                one.
            mask: what each query sees, and the bias.
            scores: what is done to scores.

        Returns:
            (B, N, T, Dv) of any float dtype, and the log-sum-exp of each query's scores and sink,
            float32 (B, N, T), -inf where nothing was seen. Or `NotMe`.
        """
        ...


def platform() -> str:
    """Where what is traced now is going to run, as far as JAX knows: "cpu", "gpu" or "tpu"."""
    device = getattr(jax.config, "jax_default_device", None)
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "gpu" if name in ("cuda", "rocm") else str(name)
