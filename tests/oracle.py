"""A slow, obvious model of one cache layer: Python lists of tokens and dense float64 attention.

Written from the documented behaviour, not from the implementation. An impossible request raises
`Refused` and changes nothing; with `traced=True` it sets the sticky flag instead (row by row if the
rows are independent).
"""

import copy
import math

import numpy as np


class Refused(Exception):
    """The request cannot be done; `error` is the exception type a user should see."""

    def __init__(self, error=ValueError):
        super().__init__(error.__name__)
        self.error = error


class Row:
    """One batch row: its tokens, oldest first, and how many it has ever seen."""

    def __init__(self):
        self.tokens = []  # (key [H, D], value [H, Dv]) pairs
        self.position = 0
        self.overflowed = False


class Oracle:
    """One layer. With `ragged=False` all rows have one length and are refused together."""

    def __init__(self, *, batch, heads, dim, value_dim=None, capacity, growable, ragged):
        self.heads, self.dim, self.value_dim = heads, dim, value_dim or dim
        self.capacity, self.growable, self.ragged = capacity, growable, ragged
        self.rows = [Row() for _ in range(batch)]

    # --- what can be asked of it ---------------------------------------------------------------

    @property
    def batch(self):
        return len(self.rows)

    def lengths(self):
        return [len(row.tokens) for row in self.rows]

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

    def get(self):
        """Keys, values, valid: padded with zeros to the capacity."""
        keys = np.zeros((self.batch, self.heads, self.capacity, self.dim), np.float32)
        values = np.zeros((self.batch, self.heads, self.capacity, self.value_dim), np.float32)
        valid = np.zeros((self.batch, self.capacity), bool)
        for b, row in enumerate(self.rows):
            for t, (key, value) in enumerate(row.tokens):
                keys[b, :, t], values[b, :, t], valid[b, t] = key, value, True
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
        fits = [
            good and all(0 <= p < self.capacity for p in row)
            for good, row in zip(length_ok, places, strict=True)
        ]
        for b in self._allowed(fits, traced):
            for t, place in enumerate(places[b]):
                self._put(self.rows[b], place, key[b, :, t], value[b, :, t])
        if not self.ragged:  # one length for all: the longest row, the others padded with zeros
            for row in self.rows:
                self._pad(row, max(self.lengths()))

    def crop(self, max_length, traced=False):
        for b in self._allowed([max_length >= 0] * self.batch, traced):
            row = self.rows[b]
            row.tokens = row.tokens[max(0, len(row.tokens) - max_length) :]

    def rollback(self, n, traced=False):
        drops = np.broadcast_to(n, self.batch).tolist()
        possible = [0 <= n <= have for n, have in zip(drops, self.lengths(), strict=True)]
        for b in self._allowed(possible, traced):
            row = self.rows[b]
            row.tokens = row.tokens[: len(row.tokens) - drops[b]]
            row.position -= drops[b]

    def select(self, indices, traced=False):
        inside = [0 <= i < self.batch for i in indices]
        if not traced and not all(inside):
            raise Refused(IndexError)
        nearest = [min(max(i, 0), self.batch - 1) for i in indices]
        self.rows = [copy.deepcopy(self.rows[i]) for i in nearest]
        self._allowed(inside, traced)

    def repeat_interleave(self, n):
        if n < 1:
            raise Refused()
        self.rows = [copy.deepcopy(row) for row in self.rows for _ in range(n)]

    def reset(self):
        self.rows = [Row() for _ in self.rows]

    def attend(
        self, query, *, lengths=None, cache_position=None, scale=None, softcap=None, window=None,
        mask=None, bias=None, causal=True,
    ):  # fmt: skip
        batch, heads, tokens, dim = query.shape
        keys, values, _ = self.get()
        full = (batch, heads, tokens, self.capacity)
        mask = np.broadcast_to(True if mask is None else mask, full)
        bias = np.broadcast_to(0.0 if bias is None else bias, full)
        out = np.zeros((batch, heads, tokens, self.value_dim))
        for b, row in enumerate(self.rows):
            real = tokens if lengths is None else int(lengths[b])
            oldest = row.position - len(row.tokens)
            slots = np.arange(len(row.tokens))
            for t in range(real):
                place = row.position - real + t
                if cache_position is not None:
                    place = oldest + int(np.broadcast_to(cache_position, (batch, tokens))[b, t])
                seen = np.ones(len(slots), bool)
                if causal:
                    seen &= oldest + slots <= place
                if window is not None:
                    seen &= oldest + slots > place - window
                for n in range(heads):
                    see = seen & mask[b, n, t, : len(slots)]
                    if not see.any():
                        continue
                    kv = n // (heads // self.heads)
                    scores = keys[b, kv, slots[see]].astype(np.float64) @ np.float64(query[b, n, t])
                    scores *= 1 / math.sqrt(dim) if scale is None else scale
                    if softcap is not None:
                        scores = softcap * np.tanh(scores / softcap)
                    scores += bias[b, n, t, slots[see]]
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    out[b, n, t] = weights @ values[b, kv, slots[see]].astype(np.float64)
        return out

    # --- parts ---------------------------------------------------------------------------------

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
        """Where the real tokens of each row go."""
        counts = [min(max(n, 0), tokens) for n in counts]
        if cache_position is None:
            return [
                list(range(have, have + n)) for have, n in zip(self.lengths(), counts, strict=True)
            ]
        everyone = np.broadcast_to(cache_position, (self.batch, tokens)).tolist()
        return [row[:n] for row, n in zip(everyone, counts, strict=True)]

    def _grow(self, need):
        while self.capacity < need:
            self.capacity *= 2

    def _pad(self, row, length):
        while len(row.tokens) < length:
            row.tokens.append(
                (np.zeros((self.heads, self.dim)), np.zeros((self.heads, self.value_dim)))
            )
            row.position += 1

    def _put(self, row, place, key, value):
        self._pad(row, place + 1)
        row.tokens[place] = (key, value)
