"""The keyword arguments of `attend` and `extend`, checked and in one object.

Masks and biases have four axes by then, (B or 1, N or 1, T or 1, C or 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, TypedDict

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from lucid_jax.attention.backends import to_try
from lucid_jax.attention.protocol import Backend
from lucid_jax.attention.rope import Rope, as_rope
from lucid_jax.attention.softmax import RowsByLeaf, Scores
from lucid_jax.cache.argument_checks import as_array, check_count, is_traced
from lucid_jax.cache.axes import check_shape, swapped
from lucid_jax.cache.sharding import MeshAxes
from lucid_jax.cache.tokens import TokenLayer

Pair = tuple[jax.Array, jax.Array]  # out and log-sum-exp


class ScoreKeywords(TypedDict, total=False):
    """What both verbs take of what is done to scores; `attend` says what each means."""

    scale: float | None
    softcap: float | None
    window: int | None
    rope_theta: float | Rope | None
    sink_logits: ArrayLike | None
    implementation: str | None


class ExtendKeywords(ScoreKeywords, total=False):
    """Keyword arguments of `extend` that do not change what kind of thing it returns."""

    lengths: ArrayLike | None
    cache_position: ArrayLike | None
    mask: ArrayLike | None
    bias: ArrayLike | None
    donate: bool


class AttendKeywords(ScoreKeywords, total=False):
    """Keyword arguments of `attend` that do not change what kind of thing it returns."""

    lengths: ArrayLike | None
    cache_position: ArrayLike | None
    mask: ArrayLike | None
    bias: ArrayLike | None
    causal: bool


@struct.dataclass
class Options:
    """How to attend, whatever the layer: arrays, and static facts by which programs are kept."""

    scores: Scores
    visible: jax.Array | None  # bool, by index in `get`
    bias: jax.Array | None  # float, by index in `get`
    causal: bool = struct.field(pytree_node=False)
    window: int | None = struct.field(pytree_node=False)
    backends: tuple[Backend, ...] = struct.field(pytree_node=False)  # to be tried in order

    if TYPE_CHECKING:

        def replace(self, **updates: object) -> Self:
            """A copy with some fields changed; flax adds it."""

    def with_masks(
        self,
        mask: ArrayLike | None,
        bias: ArrayLike | None,
        full: tuple[int, ...],
        given: int | None = None,
    ) -> Self:
        """With masks that broadcast to `full`, (B, N, T, C).

        Args:
            mask: bool.
            bias: float.
            full: the shape of all scores.
            given: slots that they may count instead: those there were before the layer grew.
        """
        return self.replace(
            visible=_by_index(mask, "mask", full, given), bias=_by_index(bias, "bias", full, given)
        )

    def parts(self, axes: MeshAxes) -> Self:
        """How its arrays are divided over a mesh: `PartitionSpec`s in their place."""
        sinks = jax.tree.map(lambda _: PartitionSpec(axes.heads), self.scores.sink_logits)
        return self.replace(
            scores=self.scores.replace(sink_logits=sinks),
            visible=axes.of_heads(self.visible),
            bias=axes.of_heads(self.bias),
        )


def as_options(queries: RowsByLeaf, given: ScoreKeywords, causal: bool = True) -> Options:
    """Checks what is done to scores of queries (B, N, T, D).

    Raises:
        ValueError: for a number that makes no sense, or options that exclude each other.
        TypeError: for one that is traced and must not be.
    """
    query = next(iter(queries.values()))
    window, softcap, scale = given.get("window"), given.get("softcap"), given.get("scale")
    rope_theta = given.get("rope_theta")
    if window is not None:
        window = min(check_count(window, "window", 1), 1 << 30)  # int32 arithmetic must not wrap
        if not causal:
            raise ValueError("window= counts back from a causal query; drop it or causal=False")
    if is_traced(scale, softcap, rope_theta):
        raise TypeError(
            "scale, softcap and rope_theta must be Python numbers, known at trace time, got a traced "
            "value; multiply the query instead, or close over a constant"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; None turns it off")
    if rope_theta is not None and set(queries) != {"key"}:
        raise ValueError(
            "rope_theta= rotates a layer's keys, so it takes queries of `key` alone; rotate the leaf "
            "that carries positions before update_leaves, and its query, by lucid_jax.nn.rope"
        )
    if rope_theta is not None and not causal:
        raise ValueError("rope_theta= gives causal queries a place; drop it or causal=False")
    scores = Scores(
        sink_logits=_as_sink_logits(given.get("sink_logits"), query.shape[1]),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        rope=None if rope_theta is None else as_rope(rope_theta),
    )
    backends = to_try(given.get("implementation"))
    return Options(scores, None, None, causal=causal, window=window, backends=backends)


def as_queries(layer: TokenLayer, query: Any, scale: Any, axes: str) -> RowsByLeaf:
    """Checks queries, by the leaf that each is scored with, and gives them storage's order of axes."""
    widths = layer.packing.widths
    by_name = isinstance(query, Mapping)
    queries = dict(query) if by_name else {"key": query}
    unknown = [name for name in queries if name not in widths]
    if unknown or not queries:
        raise ValueError(
            f"this layer stores {' and '.join(widths)}; pass queries for some of them by name, such "
            f"as {{{next(iter(widths))!r}: ...}}, got {' and '.join(queries) or 'none'}"
        )
    if by_name and scale is None:
        raise ValueError(
            "queries by name need scale=: they are wider than the heads that they stand for, whose "
            "width says what it is"
        )
    called_by = {name: f"query of {name}" if by_name else "query" for name in queries}
    queries = {name: as_array(x, called_by[name]) for name, x in queries.items()}
    for name, x in queries.items():
        called = called_by[name]
        check_shape(
            called, x, axes, layer.batch_size, layer.num_kv_heads, widths[name], grouped=True
        )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{called} must be floating point, got {x.dtype}")
    kinds = {(x.dtype.name, *x.shape[:3]) for x in queries.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"queries must have the same dtype, batch, heads and tokens, got {sorted(kinds)}"
        )
    return {name: swapped(x, axes) for name, x in queries.items()}


def as_result(result: Pair, axes: str, return_lse: bool) -> jax.Array | Pair:
    """What the caller gets, in the state's order of axes."""
    out, lse = result
    out = swapped(out, axes)
    return (out, swapped(lse, axes)) if return_lse else out


def as_given(
    given: ArrayLike | Mapping[str, ArrayLike], queries: dict[str, jax.Array]
) -> jax.Array | dict[str, jax.Array]:
    """Queries as backends take them: of keys alone an array, as they were given."""
    return queries if isinstance(given, Mapping) else queries["key"]


def _as_sink_logits(x: ArrayLike | None, heads: int) -> jax.Array | None:
    if x is None:
        return None
    logits = as_array(x, "sink_logits")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"sink_logits must be floating point, got {logits.dtype}")
    if logits.shape != (heads,):
        raise ValueError(
            f"sink_logits must have one logit per query head, ({heads},), got {logits.shape}"
        )
    return logits


def _by_index(
    given: ArrayLike | None, name: str, full: tuple[int, ...], before: int | None
) -> jax.Array | None:
    """Checks a mask or bias and gives it four axes."""
    if given is None:
        return None
    x = as_array(given, name)
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean (True = may see), got {x.dtype}; or pass it as bias="
        )
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"bias must be floating point, got {x.dtype}; or pass it as mask=")
    if before is not None and x.ndim and x.shape[-1] == before < full[-1]:
        added = [(0, 0)] * (x.ndim - 1) + [(0, full[-1] - before)]
        x = jnp.pad(x, added, constant_values=name == "mask")
    shape = (*(1,) * (4 - x.ndim), *x.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, seq, capacity) = {full}, got {x.shape}; "
            "its last axis counts slots of get(), the oldest stored token first"
        )
    return x.reshape(shape)
