"""Where drafts come from: another model, the row's own text (n-grams), or a tree of a model's best.

A `Drafter` is static; what it must remember is a cache, carried through the compiled loop beside the
target's. It proposes tokens to follow a row's text and, once the target has spoken, takes back what was
not accepted.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from lucid_jax.cache import introspection, verbs
from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.slots import span
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tree import keep_path, tree_mask
from lucid_jax.decode.language_model import LanguageModel, ModelStructure
from lucid_jax.decode.prefill import hidden_at
from lucid_jax.decode.sampling import Sampling, filtered, likeliest
from lucid_jax.decode.topology import Topology


@dataclasses.dataclass(frozen=True)
class NGram:
    """Drafts from the row's own text: what followed the latest earlier occurrence of its last tokens.

    Prompt lookup (Saxena 2023; Yang et al. 2023, "Inference with Reference"). Costs no model, and pays
    where text repeats itself: quotes, edits, code. A copy that runs into the end of the text goes on
    with what it has copied, so that loops are drafted whole.

    Attributes:
        max_ngram: the most last tokens to look for; the longest that occurs is taken.
        min_ngram: the fewest; where they do not occur, nothing is drafted.

    Raises:
        ValueError: unless 1 <= min_ngram <= max_ngram.
    """

    max_ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self) -> None:
        check_count(self.min_ngram, "min_ngram", 1)
        check_count(self.max_ngram, "max_ngram (at least min_ngram)", self.min_ngram)


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """Drafts that branch: a model's likeliest continuations, all verified in one chunk.

    SpecInfer (Miao et al. 2024). Greedy decoding only.

    Attributes:
        model: the draft.
        branching: children of a node by its depth: (2, 2, 1) has 2 + 4 + 4 nodes and accepts up to 3.
    """

    model: LanguageModel
    branching: tuple[int, ...] = (2, 2, 1)


@struct.dataclass
class Text:
    """The rows so far: what drafts are to follow."""

    history: Any  # int32 (B, S): prompt and new tokens
    filled: Any  # int32 (B,): tokens of each row; the last is not in the target's cache yet
    left: Any  # int32 (B,): tokens still to be added; 0 for rows that are done
    seen: jax.Array | None  # bool (B, V), for the repetition penalty

    @property
    def wanted(self) -> jax.Array:
        """The most drafts of use, int32 (B,): the target adds one token of its own."""
        return jnp.maximum(self.left - 1, 0)

    def at(self, index: jax.Array) -> jax.Array:
        """Tokens at an index (B, T) of each row, clipped."""
        last = self.history.shape[1] - 1
        return jnp.take_along_axis(self.history, jnp.clip(index, 0, last), axis=1)


@struct.dataclass
class Proposal:
    """Drafts of each row."""

    tokens: jax.Array  # int32 (B, K)
    counts: jax.Array  # int32 (B,): how many are real
    probs: jax.Array | None  # (B, K, V): what they were drawn from; None if greedy


class Drafter(Protocol):
    """What the compiled loop asks of a draft. Hashable: it is static there.

    Attributes:
        width: K, drafts a round.
        tree: how they hang together; None for a chain.
    """

    @property
    def width(self) -> int:
        """K, drafts a round."""

    @property
    def tree(self) -> Topology | None:
        """How they hang together; None for a chain."""

    def propose(
        self, params: Any, cache: Any, text: Text, keys: jax.Array, sampling: Sampling
    ) -> tuple[Proposal, Any]:
        """Drafts to follow each row's text, and the draft's cache. `keys` are (B,), one a row."""

    def settle(self, cache: Any, before: Text, filled: jax.Array, path: jax.Array | None) -> Any:
        """The cache with all but the last of a row's `filled` tokens, or one less."""


@dataclasses.dataclass(frozen=True)
class NGramDrafter:
    """`NGram` in the loop."""

    spec: NGram
    width: int
    vocab_size: int
    tree = None

    def propose(
        self, params: Any, cache: Any, text: Text, keys: jax.Array, sampling: Sampling
    ) -> tuple[Proposal, Any]:
        """Copies what followed. The drafts are certain, so q is one-hot."""
        tokens, found = lookup(text.history, text.filled, self.spec, self.width)
        counts = jnp.where(found, jnp.minimum(text.wanted, self.width), 0)
        probs = (
            None
            if sampling.temperature == 0
            else jax.nn.one_hot(tokens, self.vocab_size, dtype=jnp.float32)
        )
        return Proposal(tokens, counts, probs), cache

    def settle(self, cache: Any, before: Text, filled: jax.Array, path: jax.Array | None) -> Any:
        """Nothing: the text is all it knows."""
        return cache


def lookup(
    history: jax.Array, filled: jax.Array, spec: NGram, width: int
) -> tuple[jax.Array, jax.Array]:
    """What followed the latest earlier occurrence of each row's last tokens.

    Args:
        history: int32 (B, S).
        filled: int32 (B,), tokens of each row.
        spec: how many last tokens must agree.
        width: K, tokens to propose.

    Returns:
        int32 (B, K), and whether there was such an occurrence, bool (B,).

    Example:
        >>> tokens, found = lookup(jnp.array([[5, 6, 7, 5, 6, 0]]), jnp.array([5]), NGram(), 4)
        >>> tokens.tolist(), found.tolist()
        ([[7, 5, 6, 7]], [True])
    """
    size = history.shape[1]
    end = jnp.arange(size, dtype=jnp.int32)[None]  # where an occurrence may end
    agree = jnp.ones_like(history)
    length = jnp.zeros_like(history)
    for back in range(min(spec.max_ngram, size)):
        last = jnp.take_along_axis(history, jnp.maximum(filled - 1 - back, 0)[:, None], axis=1)
        same = (jnp.roll(history, back, axis=1) == last) & (end >= back)
        agree = agree * same.astype(jnp.int32)
        length = length + agree
    earlier = end < (filled - 1)[:, None]
    # The longest, and of those the latest.
    score = jnp.where(earlier & (length >= spec.min_ngram), length * size + end, -1)
    best = jnp.argmax(score, axis=1).astype(jnp.int32)[:, None]
    found = jnp.take_along_axis(score, best, axis=1)[:, 0] >= 0
    period = jnp.maximum(filled[:, None] - 1 - best, 1)
    index = best + 1 + jnp.arange(width, dtype=jnp.int32)[None] % period
    return jnp.take_along_axis(history, jnp.minimum(index, size - 1), axis=1), found


# Steps of a draft model that are compiled one by one. Of a loop within the caller's loop XLA copies the
# draft's cache at each turn, so up to twice as many tokens are drafted without one; but each step takes
# its time to compile, so that more are drafted in turns.
UNROLLED = 4


@dataclasses.dataclass(frozen=True)
class ModelDrafter:
    """A language model drafts one token after the other."""

    structure: ModelStructure
    width: int
    tree = None

    def propose(
        self, params: Any, cache: Any, text: Text, keys: jax.Array, sampling: Sampling
    ) -> tuple[Proposal, Any]:
        """Catches up with the text, then draws token after token."""
        model = self.structure.merge(params)
        counts = jnp.minimum(text.wanted, self.width)
        hidden, cache = _catch_up(model, cache, text, counts)
        token, seen, probs = _draw(model, hidden, text.seen, _step_keys(keys, 0), sampling)

        def step(carry: Any, index: jax.Array) -> tuple[Any, Any]:
            cache, token, seen = carry
            live = (index < counts).astype(jnp.int32)
            hidden, cache = model.hidden(token[:, None], cache, lengths=live)
            token, seen, probs = _draw(model, hidden[:, 0], seen, _step_keys(keys, index), sampling)
            return (cache, token, seen), (token, probs)

        later = jnp.arange(1, self.width, dtype=jnp.int32)
        (cache, _, _), (tokens, more) = jax.lax.scan(
            step, (cache, token, seen), later, unroll=UNROLLED
        )
        tokens = jnp.concatenate([token[:, None], tokens.T], axis=1)
        if probs is not None:
            probs = jnp.concatenate([probs[:, None], jnp.swapaxes(more, 0, 1)], axis=1)
        return Proposal(tokens, counts, probs), cache

    def settle(self, cache: Any, before: Text, filled: jax.Array, path: jax.Array | None) -> Any:
        """Takes back what was not accepted; tokens it never had are fed in the next round."""
        return verbs.rollback(cache, jnp.maximum(_fed(cache) - (filled - 1), 0))


@dataclasses.dataclass(frozen=True)
class TreeDrafter:
    """A language model drafts a tree, level by level."""

    structure: ModelStructure
    tree: Topology

    @property
    def width(self) -> int:
        """M, the nodes below the root."""
        return self.tree.nodes

    def propose(
        self, params: Any, cache: Any, text: Text, keys: jax.Array, sampling: Sampling
    ) -> tuple[Proposal, Any]:
        """Of every node the likeliest continuations; no two alike."""
        model, tree = self.structure.merge(params), self.tree
        depth = jnp.minimum(text.wanted, tree.depth)
        hidden, cache = _catch_up(model, cache, text, depth)
        hidden = hidden[:, None]
        levels: list[jax.Array] = []
        seen = None if text.seen is None else text.seen[:, None]
        for level, children in enumerate(tree.branching):
            if level:
                here = slice(int(tree.upto[level - 1]) + 1, int(tree.upto[level]) + 1)
                hidden, cache = model.hidden(
                    levels[-1],
                    cache,
                    lengths=jnp.where(level < depth, tree.widths[level], 0),
                    positions=text.filled[:, None] - 1 + jnp.asarray(tree.depths[None, here]),
                    # Node 0 is the row's last token, in the slot before the nodes'.
                    mask=tree_mask(tree.sees[here], text.filled - 1, introspection.capacity(cache)),
                )
            logits = filtered_along(model.logits(hidden), sampling, seen)
            best = jax.lax.top_k(logits, children)[1].astype(jnp.int32)
            levels.append(best.reshape(best.shape[0], -1))
            if seen is not None:
                grown = seen[:, :, None] | jax.nn.one_hot(best, seen.shape[-1], dtype=bool)
                seen = grown.reshape(best.shape[0], -1, seen.shape[-1])
        counts = jnp.take(jnp.asarray(tree.upto), depth)
        return Proposal(jnp.concatenate(levels, axis=1), counts, None), cache

    def settle(self, cache: Any, before: Text, filled: jax.Array, path: jax.Array | None) -> Any:
        """Keeps the path of nodes that were accepted."""
        assert path is not None
        nodes = jnp.maximum(_fed(cache) - before.filled, 0)
        offsets = path[:, 1:] - 1
        kept = (offsets < nodes[:, None]) & (
            jnp.arange(offsets.shape[1], dtype=jnp.int32)[None]
            < (filled - before.filled - 1)[:, None]
        )
        return keep_path(cache, nodes, offsets, jnp.sum(kept, axis=1, dtype=jnp.int32))


def filtered_along(logits: jax.Array, sampling: Sampling, seen: jax.Array | None) -> jax.Array:
    """`filtered` for (B, T, V), with `seen` (B, T, V)."""
    flat = None if seen is None else seen.reshape(-1, seen.shape[-1])
    return filtered(logits.reshape(-1, logits.shape[-1]), sampling, flat).reshape(logits.shape)


def _fed(cache: CacheState) -> jax.Array:
    """Tokens of each row's text that a cache has had, int32 (B,)."""
    return introspection.positions(cache, 1)[:, 0]


def _catch_up(
    model: LanguageModel, cache: CacheState, text: Text, wanted: jax.Array
) -> tuple[jax.Array, CacheState]:
    """Feeds what the cache lacks of a row's text, one token or two; the last one's state (B, E).

    Two if the target accepted all drafts: the last of them was never fed to the model it came from.
    """
    first = _fed(cache)
    missing = jnp.where(wanted > 0, text.filled - first, 0)
    hidden, cache = model.hidden(text.at(span(first, 2)), cache, lengths=missing)
    return hidden_at(hidden, missing), cache


def _step_keys(keys: jax.Array, step: Any) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def _draw(
    model: LanguageModel,
    hidden: jax.Array,
    seen: jax.Array | None,
    keys: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Draws a token from hidden states (B, E): (B,), what was seen by then, and its distribution."""
    logits = filtered(model.logits(hidden[:, None])[:, 0], sampling, seen)
    probs = None
    if sampling.temperature == 0:
        token = likeliest(logits)
    else:
        token = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        probs = jax.nn.softmax(logits, axis=-1)
    if seen is not None:
        seen = seen | jax.nn.one_hot(token, seen.shape[-1], dtype=bool)
    return token, seen, probs
