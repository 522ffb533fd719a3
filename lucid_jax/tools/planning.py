"""What would fit: `plan`, which counts the bytes of a cache exactly without making it."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.creation import init_cache
from lucid_jax.cache.growth import with_room
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.shown import bytes_of, count_of, short_name, size_of
from lucid_jax.cache.state import CacheState, Shared
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.tools.report import slot_leaves
from lucid_jax.tools.tables import Printed, Sheet

_LIMIT = int(np.iinfo(np.int32).max)  # positions are int32


class CacheConfig(Protocol):
    """What `plan` needs to know of a model; `lucid_jax.models.ModelConfig` is one."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model."""
        ...

    @property
    def kv_heads(self) -> int:
        """H, key/value heads."""
        ...

    @property
    def dim_per_head(self) -> int:
        """D, width of keys and values."""
        ...


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """Layers of one kind in a plan.

    Attributes:
        layers: how many the model has.
        layout: such as "Static(capacity=2048)".
        codec: such as "Int4".
        capacity: token slots of a row.
        nbytes: of all of them.
        bytes_per_token: of all of them, for one token of one row; 0 if the size is constant.
    """

    layers: int
    layout: str
    codec: str
    capacity: int
    nbytes: int
    bytes_per_token: float


@dataclasses.dataclass(frozen=True)
class Plan(Printed):
    """What a cache would take, and what would fit. Prints as a table; `plan` makes it.

    Attributes:
        rows: one per kind of layer; layers that share another's tokens take nothing.
        batch_size: B.
        length: tokens a row is to hold.
        dtype: name of the tokens' dtype.
        budget: bytes there are; None if not said.
        max_batch_size: the most rows that fit at this length, 0 if not even one; None without a budget.
        max_length: the most tokens that fit at this batch size, 0 if not even one; None without a
            budget, and None if the size does not depend on the length and fits.
    """

    rows: tuple[PlanRow, ...]
    batch_size: int
    length: int
    dtype: str
    budget: int | None
    max_batch_size: int | None
    max_length: int | None

    @property
    def nbytes(self) -> int:
        """Bytes the cache would take: exactly `nbytes` of it once allocated."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bytes_per_token(self) -> float | None:
        """What a token of one row takes in the layers that grow with the length; None if none does."""
        return sum(row.bytes_per_token for row in self.rows) or None

    @property
    def fits(self) -> bool | None:
        """Whether the cache is within the budget; None without one."""
        return None if self.budget is None else self.nbytes <= self.budget

    def _sheet(self) -> Sheet:
        return Sheet(
            title=f"KV cache plan: batch {self.batch_size}, length {self.length}, {self.dtype}",
            header=("layers", "layout", "codec", "capacity", "bytes"),
            rows=[
                (str(row.layers), row.layout, row.codec, str(row.capacity), size_of(row.nbytes))
                for row in self.rows
            ],
            names=3,
            total=("total", "", "", "", size_of(self.nbytes)),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> list[str]:
        if self.bytes_per_token is None:
            notes = ["constant size, however long the text"]
        else:
            notes = [f"{size_of(self.bytes_per_token)} for each token of a row"]
        if self.budget is None:
            return notes
        spare = self.budget - self.nbytes
        verdict = f"fits, {size_of(spare)} to spare" if self.fits else f"{size_of(-spare)} too much"
        longest = "unbounded" if self.max_length is None else f"{self.max_length} tokens"
        return [
            *notes,
            f"budget {size_of(self.budget)}: {verdict}",
            f"largest batch at length {self.length}: {count_of(self.max_batch_size or 0, 'row')}",
            f"largest length at batch {self.batch_size}: {longest}",
        ]


def plan(
    config: CacheConfig,
    batch_size: int,
    length: int,
    spec: LayerSpec | Sequence[LayerSpec | Shared],
    budget: int | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    ragged: bool = False,
) -> Plan:
    """What a cache would take and what would fit, by the exact count and without allocating it.

    A `Static` layer counts at its capacity, a `Dynamic` one at the capacity it grows to for `length`
    tokens. For the largest length a `Static` capacity is made as large as that length.

    Args:
        config: the model's sizes.
        batch_size: B, rows.
        length: tokens each row is to hold, prompt and new ones.
        spec: as `init_cache` takes it: one spec for all layers, or a list with one per layer.
        budget: bytes the cache may take, such as `8 * 2**30`.
        dtype: dtype of the tokens.
        ragged: whether each row has its own length, as `generate`'s caches do.

    Raises:
        ValueError: if a layer cannot hold `length` tokens, or for what `init_cache` refuses.
        TypeError: if a number is not an integer.

    Example:
        >>> import lucid_jax as lj
        >>> from lucid_jax.models import ModelConfig
        >>> config = ModelConfig(vocab_size=512, hidden_size=64, num_attention_heads=4)
        >>> planned = plan(config, 2, 100, lj.Dynamic(), budget=2**20)
        >>> planned.nbytes, planned.fits, planned.max_batch_size, planned.max_length
        (655425, True, 3, 128)
    """
    batch_size = check_count(batch_size, "batch_size", 1)
    length = check_count(length, "length", 1)
    if budget is not None:
        budget = check_count(budget, "budget (bytes, such as 8 * 2**30)")
    layers = config.num_hidden_layers
    specs = list(spec) if isinstance(spec, Sequence) else [spec] * layers
    empty = partial(
        init_cache,
        num_kv_heads=config.kv_heads,
        head_dim=config.dim_per_head,
        dtype=dtype,
        ragged=ragged,
    )
    # Whoever allocates would refuse a wrong number of layers, or sharing with a later one.
    jax.eval_shape(lambda: empty(specs, num_layers=layers, batch_size=batch_size))
    stored = [one for one in specs if not isinstance(one, Shared)]

    def fits(rows: int, tokens: int, resize: bool) -> bool:
        sized = [one.sized(tokens) for one in stored] if resize else stored
        assert budget is not None
        return sum(row.nbytes for row in _plan_rows(empty, sized, rows, tokens)) <= budget

    rows = _plan_rows(empty, stored, batch_size, length)
    max_batch_size = max_length = None
    if budget is not None:
        max_batch_size = _largest(lambda n: fits(n, length, False))
        constant = not any(row.bytes_per_token for row in rows)
        if not (constant and fits(batch_size, 1, True)):
            max_length = _largest(lambda n: fits(batch_size, n, True))
    return Plan(
        rows=rows,
        batch_size=batch_size,
        length=length,
        dtype=jax.dtypes.canonicalize_dtype(dtype).name,
        budget=budget,
        max_batch_size=max_batch_size,
        max_length=max_length,
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n that fits, 0 if none does; what is larger than one that does not fit does not."""
    return bisect.bisect_left(range(1, _LIMIT + 1), True, key=lambda n: not fits(n))


def _plan_rows(
    empty: Callable[..., CacheState], specs: Sequence[LayerSpec], batch_size: int, length: int
) -> tuple[PlanRow, ...]:
    """One row per distinct spec: layers of the same spec have the same shapes."""
    kinds = list(dict.fromkeys(specs))

    def build() -> CacheState:
        state = empty(kinds, batch_size=batch_size)
        return state.with_layers(_with_room(layer, length) for layer in state.layers)

    rows = []
    for spec, layer in zip(kinds, jax.eval_shape(build).layers, strict=True):
        layers = specs.count(spec)
        slots = batch_size * layer.num_slots
        growing = slot_leaves(layer.replace(tail=None)) if layer.bounded else []
        rows.append(
            PlanRow(
                layers=layers,
                layout=short_name(spec, leave_out="codec"),
                codec=short_name(layer.packing.codec),
                capacity=layer.capacity,
                nbytes=layers * bytes_of(layer),
                bytes_per_token=layers * bytes_of(growing) / slots,
            )
        )
    return tuple(rows)


def _with_room(layer: TokenLayer, length: int) -> TokenLayer:
    """A layer as it will be once it holds `length` tokens."""
    if length <= layer.capacity or not layer.bounded:
        return layer
    roomy = with_room(layer, length)
    if roomy is None:
        raise ValueError(
            f"a length of {length} does not fit {short_name(layer.spec)}, whose capacity is "
            f"{layer.capacity}; use Static({length}) or more, Dynamic(), or Sliding to keep the latest "
            "tokens only"
        )
    return roomy
