"""How XLA lays arrays out in a TPU's memory: by tiles, of which the last two axes are the sides."""

from __future__ import annotations

import math

LANES = 128  # numbers side by side in a register of a TPU
ROWS = 8  # registers are so many rows of them


def lies_on_lanes(width: int, slots: int) -> bool:
    """Whether tokens, rather than their numbers, lie along a TPU's lanes: where that pads less.

    An array that is wanted the other way round is copied whole first.

    Example:
        >>> lies_on_lanes(64, 8192), lies_on_lanes(128, 8192)
        (True, False)
    """

    def size(rows: int, lanes: int) -> int:
        return math.ceil(rows / ROWS) * math.ceil(lanes / LANES)

    return size(width, slots) < size(slots, width)
