"""What a call of the kernel will be: blocks, programs, and what each keeps in shared memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from lucid_jax.attention.gpu.pieces import Cut

SLOTS = 64  # of a block
TILE = 64  # rows of a matrix product, of which the last may be of no query
WEIGHTS = 2  # numbers of 16 bits that stand for a weight, of what is no float32
AHEAD = 2  # times as many blocks are looked at as are on their way
MOST_STAGES = 4
SHARED_BYTES = 222 << 10  # of 227 KiB a program: the compiler takes some


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of a call.

    Attributes:
        key: how keys are cut.
        value: how values are cut.
        batch: B.
        heads: H.
        size: S.
        rows: R.
        parts: numbers of 16 bits that stand for one of a query.
        scale: multiplies scores.
        softcap: see `attend`.
        many: whether what is added to scores differs by row.
        between: whether what is seen is told by two positions, and not slot by slot.
        splits: programs among which the blocks of a row are dealt out.
        interpret: as of `plgpu.kernel`.
    """

    key: Cut
    value: Cut
    batch: int
    heads: int
    size: int
    rows: int
    parts: int
    scale: float
    softcap: float | None
    many: bool
    between: bool
    splits: int
    interpret: Any

    @property
    def blocks(self) -> int:
        """Blocks of a row; the last one may overlap the one before."""
        return -(-self.size // SLOTS)

    @property
    def turns(self) -> int:
        """The most blocks that a program reads."""
        return -(-self.blocks // self.splits)

    @property
    def threads(self) -> int:
        """Warpgroups of a program: where values are of several pieces, two have half of them each."""
        count, groups = self.value.count, self.value.groups
        return 2 if count % 2 == 0 and (groups == 1 or groups % 2 == 0) else 1

    @property
    def weights(self) -> int:
        """Numbers of 16 bits that stand for a weight."""
        return max(WEIGHTS, self.value.parts)

    @property
    def own(self) -> int:
        """Pieces of the values that a warpgroup mixes."""
        return self.value.count // self.threads

    @property
    def stages(self) -> int:
        """Blocks that are on their way or read at a time."""
        fitting = (n for n in range(1, MOST_STAGES + 1) if self._bytes(n) <= SHARED_BYTES)
        return min(max(fitting, default=1), self.turns)

    @property
    def fits(self) -> bool:
        """Whether a program's shared memory holds it."""
        return self._bytes(1) <= SHARED_BYTES

    def arrays(self, stages: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of what a program holds in shared memory; see `same_place`."""
        wide: dict[str, tuple[tuple[int, ...], Any]] = {}
        for name, cut in (("key", self.key), ("value", self.value)):
            shape = (cut.count, SLOTS, cut.width)
            if cut.staged:
                wide[f"{name}_wide"] = (cut.parts, *shape), cut.dtype
                wide[f"{name}_read"] = (stages, SLOTS, cut.stored_width), cut.stored_dtype
            else:
                wide[f"{name}_read"] = (stages, *shape), cut.dtype
        return {
            **wide,
            "query": ((self.parts, self.key.count, TILE, self.key.width), self.key.dtype),
            "weights": ((self.threads, self.weights, TILE, SLOTS), self.value.dtype),
            **({} if self.between else {"alive": ((AHEAD * stages, SLOTS), jnp.float32)}),
            **({"bias": ((stages, TILE, SLOTS), jnp.float32)} if self.many else {}),
            "mixed": ((self.threads, TILE, self.value.width), jnp.float32),
            "stats": ((2, TILE), jnp.float32),
            **(
                {"beside": ((self.threads, SLOTS), jnp.float32)}
                if max(self.key.groups, self.value.groups) > 1
                else {}
            ),
        }

    def same_place(self, stages: int) -> tuple[tuple[str, str], ...]:
        """Of which arrays the second lies where the first was, which is of no use any more by then."""
        sizes = self._sizes(stages)
        last = max(("key_read", "query"), key=sizes.__getitem__), "mixed"
        staged = self.key.staged and self.value.staged
        return (last, ("key_wide", "value_wide")) if staged else (last,)

    def _sizes(self, stages: int) -> dict[str, int]:
        return {
            name: math.prod(shape) * jnp.dtype(dtype).itemsize
            for name, (shape, dtype) in self.arrays(stages).items()
        }

    def _bytes(self, stages: int) -> int:
        """Shared memory of a program."""
        sizes = self._sizes(stages)
        twice = (min(sizes[name] for name in names) for names in self.same_place(stages))
        return sum(sizes.values()) - sum(twice)
