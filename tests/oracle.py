"""A slow, obvious model of one cache layer: Python lists of tokens and dense float64 attention.

Written from the documented behaviour, not from the implementation. An impossible request raises
`Refused` and changes nothing; with `traced=True` it sets the sticky flag instead (row by row if the
rows are independent).
"""

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np


class Refused(Exception):
    """The request cannot be done; `error` is the exception type a user should see."""

    def __init__(self, error=ValueError):
        super().__init__(error.__name__)
        self.error = error


@dataclasses.dataclass
class Codec:
    """What stored tokens read back as.

    `read_back` takes the keys [H, n, D] and values [H, n, Dv] of tokens that are quantized together,
    n = `group`. With a `residual`, groups lie at multiples of `group`, and one is quantized when that
    many further tokens have come; until then its tokens are read as they came.
    """

    read_back: Callable = lambda key, value: (key, value)
    group: int = 1
    residual: int = 0

    def flushed(self, position):
        """Of the first `position` tokens, how many are read as the codec gives them back."""
        if not self.residual:
            return position
        return max(0, (position - self.residual) // self.group * self.group)


@dataclasses.dataclass
class Window:
    """A sliding layer: the first `sinks` tokens and the latest `window`; `slack` for rollback."""

    window: int
    sinks: int = 0
    slack: int = 0

    def sees(self, position, newest):
        """Whether the token at a position is seen from the newest."""
        return position > newest - self.window or position < self.sinks

    def slot(self, position, whole):
        """The ring slot of a position after the pinned ones; None of those."""
        pinned = whole(self.sinks)
        return (position - pinned) % self.ring(whole) if position >= pinned else None

    def ring(self, whole):
        """Slots of the ring: whole groups."""
        return whole(self.window + self.slack)


class Arithmetic:
    """Another layout that drops tokens, by its own three functions: tested is what follows from them.

    What they mean is for a test of the layout's own.
    """

    def __init__(self, spec):
        self.layout, self.slack = spec.layout(), spec.layout().slack
        self._seen, self._slots = {}, {}

    def sees(self, position, newest):
        """Whether the token at a position is seen from the newest."""
        if newest not in self._seen:
            runs = self.layout.kept(0, newest + 1)
            self._seen[newest] = [(int(first), int(stop)) for first, stop in runs]
        return any(first <= position < stop for first, stop in self._seen[newest])

    def slot(self, position, whole):
        """The ring slot of a position after the pinned ones; None of those."""
        if position not in self._slots:
            self._slots[position] = int(self.layout.slot(position, 0))
        return self._slots[position] if position >= self.layout.pinned else None

    def ring(self, whole):
        """Slots of the ring."""
        return self.layout.slots - self.layout.pinned


class Row:
    """One batch row: every token it ever saw, and which of them are still there."""

    def __init__(self):
        self.past = []  # (key [H, D], value [H, Dv]) of each absolute position
        self.coded = {}  # position: what the codec gives back
        self.start = 0  # tokens before this position were cropped away
        self.ring, self.residual = {}, {}  # slot: the position that was last written to it
        self.before = 0, []  # position and positions shown before the latest update
        self.overflowed = False

    @property
    def position(self):
        return len(self.past)

    def copy(self):
        """Another row with the same tokens, which never change."""
        twin = copy.copy(self)
        for name in ("past", "coded", "ring", "residual"):
            setattr(twin, name, getattr(self, name).copy())
        return twin


class Oracle:
    """One layer. With `ragged=False` all rows have one length and are refused together."""

    def __init__(
        self, *, batch, heads, dim, value_dim=None, capacity, growable=False, ragged,
        sliding=None, codec=None,
    ):  # fmt: skip
        self.heads, self.dim, self.value_dim = heads, dim, value_dim or dim
        self.capacity, self.growable, self.ragged = capacity, growable, ragged
        self.sliding, self.codec = sliding, codec or Codec()
        self.rows = [Row() for _ in range(batch)]

    def copy(self):
        """Another layer, to go back to when a request is refused."""
        twin = copy.copy(self)
        twin.rows = [row.copy() for row in self.rows]
        return twin

    # --- what can be asked of it ---------------------------------------------------------------

    @property
    def batch(self):
        return len(self.rows)

    def lengths(self):
        return [len(self.shown(row)) for row in self.rows]

    def length(self):
        """int [B] if ragged, else int []."""
        return np.array(self.lengths() if self.ragged else self.lengths()[0])

    def position(self):
        """int [B] if ragged, else int []."""
        seen = [row.position for row in self.rows]
        return np.array(seen if self.ragged else seen[0])

    def overflowed(self):
        """bool [B] if ragged, else bool []."""
        flags = [row.overflowed for row in self.rows]
        return np.array(flags if self.ragged else flags[0])

    def positions(self, n):
        return self.position()[..., None] + np.arange(n)

    def shown(self, row, position=None):
        """Positions that `get` gives when `position` (by default: all) tokens have come."""
        position = row.position if position is None else position
        newest = position - 1
        return [p for p in range(row.start, position) if self._in_window(p, newest)]

    def get(self):
        """Keys, values, valid: padded with zeros to the capacity."""
        keys = np.zeros((self.batch, self.heads, self.capacity, self.dim), np.float32)
        values = np.zeros((self.batch, self.heads, self.capacity, self.value_dim), np.float32)
        valid = np.zeros((self.batch, self.capacity), bool)
        for b, row in enumerate(self.rows):
            for t, place in enumerate(self.shown(row)):
                keys[b, :, t], values[b, :, t] = self._token(row, place, row.position - 1)
                valid[b, t] = True
        return keys, values, valid if self.ragged else valid[0]

    # --- verbs ---------------------------------------------------------------------------------

    def update(self, key, value, cache_position=None, lengths=None, traced=False):
        tokens = key.shape[2]
        if tokens == 0:
            return
        counts = [tokens] * self.batch if lengths is None else [int(n) for n in lengths]
        length_ok = [0 <= n <= tokens for n in counts]
        places = self._places(cache_position, tokens, counts)
        if not traced and not all(length_ok):
            raise Refused()
        if not traced and any(p < 0 for row in places for p in row):
            raise Refused()
        if not traced and self.growable:
            self._grow(max((p + 1 for row in places for p in row), default=0))
        most = math.inf if self.sliding else self.capacity
        fits = [
            good and all(0 <= p < most for p in row)
            for good, row in zip(length_ok, places, strict=True)
        ]
        for b in self._allowed(fits, traced):
            row = self.rows[b]
            row.before = row.position, self.shown(row)
            where = [self._absolute(row, place) for place in places[b]]
            if cache_position is not None:  # tokens skipped read as zeros
                self._pad(row, max(where, default=-1) + 1)
            for t, position in enumerate(where):
                self._put(row, position, (key[b, :, t], value[b, :, t]))
        if not self.ragged:  # one length for all: the longest row, the others padded with zeros
            for row in self.rows:
                self._pad(row, max(row.position for row in self.rows))

    def crop(self, max_length, traced=False):
        for b in self._allowed([max_length >= 0] * self.batch, traced):
            row = self.rows[b]
            shown = self.shown(row)
            if max_length < len(shown):
                row.start = [*shown, row.position][len(shown) - max_length]

    def rollback(self, n, traced=False):
        drops = np.broadcast_to(n, self.batch).tolist()
        possible = [
            0 <= n <= row.position - row.start and self._all_there(row, row.position - n)
            for n, row in zip(drops, self.rows, strict=True)
        ]
        for b in self._allowed(possible, traced):
            row = self.rows[b]
            row.past = row.past[: row.position - drops[b]]

    def select(self, indices, traced=False):
        inside = [0 <= i < self.batch for i in indices]
        if not traced and not all(inside):
            raise Refused(IndexError)
        nearest = [min(max(i, 0), self.batch - 1) for i in indices]
        self.rows = [self.rows[i].copy() for i in nearest]
        self._allowed(inside, traced)

    def repeat_interleave(self, n):
        if n < 1:
            raise Refused()
        self.rows = [row.copy() for row in self.rows for _ in range(n)]

    def reset(self):
        self.rows = [Row() for _ in self.rows]

    def asked(self, tokens, lengths=None, cache_position=None):
        """Absolute positions of the real ones of T queries, a list per row.

        They are the newest, or those of `cache_position` as the latest update was given it.
        """
        counts = [tokens] * self.batch if lengths is None else [int(n) for n in lengths]
        if cache_position is None:
            return [
                list(range(row.position - n, row.position))
                for row, n in zip(self.rows, counts, strict=True)
            ]
        places = self._places(cache_position, tokens, counts)
        return [
            [self._absolute(row, place, *(row.before if self.sliding else ())) for place in of_row]
            for row, of_row in zip(self.rows, places, strict=True)
        ]

    def has_what_is_seen(self, asked):
        """Whether all that queries at these positions (a list per row) should see is still there."""
        return all(
            self._in_slot(row, p)
            for row, of_row in zip(self.rows, asked, strict=True)
            for q in of_row
            for p in range(row.start, min(q + 1, row.position))
            if self._in_window(p, q)
        )

    def attend(
        self, query, *, lengths=None, cache_position=None, scale=None, softcap=None, window=None,
        mask=None, bias=None, causal=True, sink_logits=None,
    ):  # fmt: skip
        """Every query sees the tokens as they stood when it was the newest, however long ago.

        `mask` and `bias` count the stored tokens, so they are for layers that drop none. `sink_logits`
        [N] are one more column of each head's softmax, of a token whose value is zero.
        """
        batch, heads, tokens, dim = query.shape
        full = (batch, heads, tokens, self.capacity)
        mask = np.broadcast_to(True if mask is None else mask, full)
        bias = np.broadcast_to(0.0 if bias is None else bias, full)
        out = np.zeros((batch, heads, tokens, self.value_dim))
        asked = self.asked(tokens, lengths, cache_position)
        for b, row in enumerate(self.rows):
            for t, now in enumerate(asked[b]):
                seen = self.shown(row)
                if causal:
                    stored = range(row.start, min(now + 1, row.position))
                    seen = [p for p in stored if self._in_window(p, now)]
                if window is not None:
                    seen = [p for p in seen if p > now - window]
                at = {p: self._token(row, p, now if causal else row.position - 1) for p in seen}
                for n in range(heads):
                    see = seen
                    if not self.sliding:
                        see = [p for p in seen if mask[b, n, t, p - row.start]]
                    if not see:
                        continue
                    kv = n // (heads // self.heads)
                    scores = np.stack([at[p][0][kv] for p in see]).astype(np.float64)
                    scores = scores @ np.float64(query[b, n, t])
                    scores *= 1 / math.sqrt(dim) if scale is None else scale
                    if softcap is not None:
                        scores = softcap * np.tanh(scores / softcap)
                    if not self.sliding:
                        scores += bias[b, n, t, np.array(see) - row.start]
                    if sink_logits is not None:
                        scores = np.append(scores, sink_logits[n])
                    weights = np.exp(scores - scores.max())
                    weights = (weights / weights.sum())[: len(see)]
                    out[b, n, t] = weights @ np.stack([at[p][1][kv] for p in see])
        return out

    # --- parts ---------------------------------------------------------------------------------

    def _in_window(self, position, newest):
        """Whether the token at a position is seen from the newest: all, or sinks and window."""
        return self.sliding is None or self.sliding.sees(position, newest)

    def _token(self, row, position, newest):
        """The token at a position as it is read when `newest` is the newest one."""
        if position < self.codec.flushed(newest + 1):
            return row.coded[position]
        return row.past[position]

    def _allowed(self, possible, traced):
        """Rows that may go ahead; the others raise, or are flagged if traced."""
        if not self.ragged:
            possible = [all(possible)] * self.batch
        if not traced and not all(possible):
            raise Refused()
        for row, good in zip(self.rows, possible, strict=True):
            row.overflowed |= not good
        return [b for b, good in enumerate(possible) if good]

    def _places(self, cache_position, tokens, counts):
        """Where the real tokens of each row go, counted from the oldest stored."""
        counts = [min(max(n, 0), tokens) for n in counts]
        if cache_position is None:
            return [
                list(range(have, have + n)) for have, n in zip(self.lengths(), counts, strict=True)
            ]
        everyone = np.broadcast_to(cache_position, (self.batch, tokens)).tolist()
        return [row[:n] for row, n in zip(everyone, counts, strict=True)]

    def _absolute(self, row, place, position=None, shown=None):
        """The absolute position of a place: that of the stored token there, or one to come."""
        position = row.position if position is None else position
        shown = self.shown(row) if shown is None else shown
        return shown[place] if place < len(shown) else position + place - len(shown)

    def _grow(self, need):
        while self.capacity < need:
            self.capacity *= 2

    def _pad(self, row, position):
        zero = np.zeros((self.heads, self.dim)), np.zeros((self.heads, self.value_dim))
        while row.position < position:
            self._put(row, row.position, zero)

    def _put(self, row, position, token):
        """Stores a token, the next one or in place of another; codes what is due."""
        before = self.codec.flushed(row.position)
        row.past[position : position + 1] = [token]
        if not self.codec.residual:
            self._code(row, [position])
            return
        row.residual[position % self._residual_slots()] = position
        group = self.codec.group
        for first in range(before, self.codec.flushed(row.position), group):
            self._code(row, list(range(first, first + group)))

    def _code(self, row, positions):
        """Quantizes tokens together; those cropped away before have no say."""
        live = [p for p in positions if p >= row.start]
        for position in positions:
            slot = self._slot(position)
            if slot is not None and position >= row.position - self._ring_slots():
                row.ring[slot] = position  # or else it is written to a place long left behind
        if not live:
            return
        filled = [row.past[p if p in live else live[0]] for p in positions]
        key, value = (
            np.stack(part, axis=1).astype(np.float32) for part in zip(*filled, strict=True)
        )
        key, value = self.codec.read_back(key, value)
        for i, position in enumerate(positions):
            row.coded[position] = np.asarray(key)[:, i], np.asarray(value)[:, i]

    # What is physically there, and so can be rolled back to.

    def _residual_slots(self):
        """Tokens kept in full precision: enough to take back `residual` of them across a flush."""
        return 2 * self.codec.residual + self.codec.group

    def _slot(self, position):
        """The ring slot of a position; None if it stays where it is."""
        return None if self.sliding is None else self.sliding.slot(position, self._whole)

    def _ring_slots(self):
        return self.sliding.ring(self._whole)

    def _whole(self, count):
        return -(-count // self.codec.group) * self.codec.group

    def _in_slot(self, row, position):
        slot = self._slot(position)
        return slot is None or row.ring.get(slot) == position

    def _all_there(self, row, position):
        """Whether all is there that the row showed when `position` tokens had come."""
        flushed = self.codec.flushed(position)
        return all(
            self._in_slot(row, p)
            if p < flushed
            else row.residual.get(p % self._residual_slots()) == p
            for p in self.shown(row, position)
        )
