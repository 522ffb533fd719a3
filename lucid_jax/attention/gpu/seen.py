"""What rows of the kernel see, as it is told: by two positions, or slot by slot."""

from __future__ import annotations

from typing import Any, NamedTuple


class Between(NamedTuple):
    """Rows see all tokens of positions [low, high), and slot 0 holds `first`.

    Attributes:
        first: int32 [1] or [B].
        low: int32 [1] or [B], of all rows the least.
        high: int32 [1] or [B], of all rows the greatest.
        each: low and high of each row, int32 (1 or B, 64); None if all rows have the same.
    """

    first: Any
    low: Any
    high: Any
    each: Any


class BySlot(NamedTuple):
    """Rows see slots whose number is not -inf; blocks are those of the kernel.

    Attributes:
        added: float32 (B or 1, H or 1, blocks, R or 1, slots), what is added to scores.
        alive: float32 (B or 1, H or 1, blocks, slots), the largest of it.
    """

    added: Any
    alive: Any


Seen = Between | BySlot
