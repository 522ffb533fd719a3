"""`beam_search`: the W most likely continuations of each prompt, in one compiled loop.

A prompt is prefilled once. From there beams either are branches of a tree of tokens in one row of the
cache, where nothing ever moves, or have a row each, of which only what two beams do not share moves.
Shapes: B prompts, W beams, N new tokens, K candidates a step, V ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from lucid_jax.cache import state as core
from lucid_jax.cache.checks import check_count
from lucid_jax.cache.contiguous import grown_capacity
from lucid_jax.cache.layer import LayerSpec
from lucid_jax.decode.generation import as_stops, open_cache, pad_prompts, prefill, seen_tokens
from lucid_jax.decode.graph import Graph, split
from lucid_jax.decode.sampling import Sampling, penalized

History = Literal["tree", "reorder", "gather"]


@dataclasses.dataclass(frozen=True)
class BeamResult:
    """What `beam_search` returns: R hypotheses of each prompt, best first, and how they were found.

    Attributes:
        sequences: int32 (B, R, N), 0 past a hypothesis's end.
        lengths: int32 (B, R), new tokens of each, its stop token included; 0 where none was found.
        scores: float32 (B, R): sum of log-probabilities / length ** length_penalty; -inf where none.
        tokens: int32 (S, B, W): the token each live beam took at each of S steps.
        parents: int32 (S, B, W): the beam of the step before that it went on from.
        sums: float32 (S, B, W): its sum of log-probabilities so far.
        ends: int32 (B, R): the live beam whose past the last token of each hypothesis follows.
        history: how the past was kept, "tree", "reorder" or "gather".
    """

    sequences: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    sums: np.ndarray
    ends: np.ndarray
    history: str

    def rows(self) -> list[list[list[int]]]:
        """The new tokens of each hypothesis of each prompt as lists."""
        return [
            [tokens[:n].tolist() for tokens, n in zip(*row, strict=True)]
            for row in zip(self.sequences, self.lengths, strict=True)
        ]


@struct.dataclass
class _Rules:
    """What decides between hypotheses; traced, so that another value compiles nothing."""

    stops: jax.Array  # int32 [S]
    divisor: jax.Array  # float32 [N + 1]: what the sum of a hypothesis of n tokens is divided by
    bound: jax.Array  # float32 [N + 1]: the same for the best that live beams may still become
    early: jax.Array  # bool []: W finished hypotheses are enough
    penalty: jax.Array  # float32 []: of repetition


@struct.dataclass
class _Finished:
    """The best finished hypotheses, as the live beam each went on from and its last token."""

    score: jax.Array  # float32 (B, W), descending; -inf where there is none
    length: jax.Array  # int32 (B, W)
    beam: jax.Array  # int32 (B, W)
    token: jax.Array  # int32 (B, W)


@struct.dataclass
class _Search:
    """What the compiled loop carries from step to step."""

    cache: Any  # what the model returns; every chosen token but the newest is in it
    sum: jax.Array  # float32 (B, W): log-probability of each live beam; -inf for none
    tokens: jax.Array  # int32 (N, B, W)
    parents: jax.Array  # int32 (N, B, W)
    sums: jax.Array  # float32 (N, B, W)
    finished: _Finished
    open: jax.Array  # bool (B,): whether live beams may still improve what has finished
    step: jax.Array  # int32 []: tokens chosen so far
    seen: jax.Array | None  # bool (B, W, V), for the repetition penalty
    path: jax.Array | None  # tree: bool (B, W, C), the slots of each beam's own past
    # reorder: int32 (B, W, W), how many new tokens two rows of the cache have in common

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""


def beam_search(
    model: Any,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    num_beams: int,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    cache: LayerSpec | Sequence[LayerSpec] | None = None,
    prefill_chunk: int = 512,
    history: History | None = None,
) -> BeamResult:
    """Searches for the likeliest continuations, keeping `num_beams` unfinished ones at each step.

    Hypotheses, scores and all meanings of the options are those of transformers' `generate`. A prompt
    does not depend on the others of its batch.

    Args:
        model: an nnx module such as `lucid_jax.models.Transformer`; see `LanguageModel`.
        prompts: token ids, one list per row, of any lengths; or an int array (B, T).
        num_beams: W, unfinished hypotheses kept at each step.
        max_new_tokens: N, the most tokens to add. A hypothesis of so many counts as finished.
        num_return_sequences: R, hypotheses to return per prompt, at most W.
        length_penalty: hypotheses are compared by log-probability / new tokens ** length_penalty:
            above 0 helps long ones, below 0 short ones.
        early_stopping: when a prompt is done, besides at N tokens. False: when W hypotheses have
            finished and the best live beam, judged at its present length, does not beat the worst of
            them. True: when W have finished. "never": as False, but with a positive penalty the beam
            is judged as if it had length N, which no continuation can beat.
        repetition_penalty: multiplies the log-probability of tokens that occurred already, in the
            prompt too (see `Sampling`); 1 is off.
        stop_tokens: ids that finish a hypothesis.
        cache: spec of the cache, or one per layer. By default static with exactly the room needed.
        prefill_chunk: as for `generate`.
        history: how beams share the past; by default "tree" where that can be. All give the same
            hypotheses. "tree": beams are branches in one row of the cache and see their own past
            through a mask, so the prompt is stored and read once; for `Static` and `Dynamic` layers
            that store each token by itself, with room for the prompt and W * (N - 1) tokens.
            "reorder": a row per beam, and only what two beams do not share is moved; for every cache.
            "gather": moves everything at each step, to see what the others save.

    Returns:
        The best hypotheses of each prompt, and the tree of live beams.

    Raises:
        ValueError: for an option out of its range, an empty prompt, an id outside the vocabulary, what
            does not fit the cache, or a tree where there cannot be one.

    Example:
        >>> from flax import nnx
        >>> from lucid_jax.models import ModelConfig, Transformer
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, num_attention_heads=2)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> result = beam_search(
        ...     model, [[1, 2, 3]], num_beams=4, max_new_tokens=5, num_return_sequences=2
        ... )
        >>> result.sequences.shape, result.history
        ((1, 2, 5), 'tree')
    """
    width, new = (
        check_count(num_beams, "num_beams", 1),
        check_count(max_new_tokens, "max_new_tokens", 1),
    )
    check_count(prefill_chunk, "prefill_chunk", 1)
    returned = check_count(num_return_sequences, "num_return_sequences", 1)
    if returned > width:
        raise ValueError(
            f"num_return_sequences must be at most num_beams, got {returned} and {width}"
        )
    vocab = model.config.vocab_size
    rules = as_rules(new, length_penalty, early_stopping, repetition_penalty, stop_tokens, vocab)
    start = prefilled(model, prompts, rules, width, cache, prefill_chunk, history)
    search = search_from(*start)
    core.check_overflow(search.cache)
    return _result(search, returned, start[-1])


# --- the host's part -------------------------------------------------------------------------------


def as_rules(
    new: int,
    length_penalty: float,
    early_stopping: Any,
    repetition_penalty: float,
    stop_tokens: Sequence[int],
    vocab: int,
) -> _Rules:
    """The options of `beam_search` that decide between hypotheses, checked."""
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise ValueError(f"early_stopping must be False, True or 'never', got {early_stopping!r}")
    Sampling(repetition_penalty=repetition_penalty)  # raises if it is out of its range
    stops = as_stops(stop_tokens)
    if len(stops) >= vocab:
        raise ValueError(f"of {vocab} ids at least one must not be a stop token")
    # In double precision and then rounded, as transformers does.
    length = np.maximum(np.arange(new + 1, dtype=np.float64), 1)
    with np.errstate(all="ignore"):
        divisor = (length**length_penalty).astype(np.float32)
    if not (np.isfinite(divisor) & (divisor > 0)).all():
        raise ValueError(
            f"{new} ** length_penalty must be a positive float32, got length_penalty={length_penalty}"
        )
    hopeful = early_stopping == "never" and length_penalty > 0
    return _Rules(
        stops=jnp.array(stops, jnp.int32),
        divisor=jnp.asarray(divisor),
        bound=jnp.asarray(np.full_like(divisor, divisor[new]) if hopeful else divisor),
        early=jnp.asarray(early_stopping is True),
        penalty=jnp.float32(repetition_penalty),
    )


def prefilled(
    model: Any,
    prompts: Any,
    rules: _Rules,
    width: int,
    cache: Any,
    prefill_chunk: int,
    history: Any,
) -> tuple:
    """What `search_from` takes: the prompts fed once each, and the rest of its arguments."""
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    batch, longest = tokens.shape
    new = len(rules.divisor) - 1
    state, history = _open(model, cache, batch, longest, new, width, history)
    graph, params = split(model)
    last, state = prefill(graph, params, state, tokens, lengths, prefill_chunk)
    if history != "tree":
        state = core.repeat_interleave(state, width)
    seen = seen_tokens(tokens, lengths, model, Sampling(repetition_penalty=float(rules.penalty)))
    return graph, params, state, last, lengths, seen, rules, width, history


def _open(
    model: Any, cache: Any, batch: int, longest: int, new: int, width: int, history: Any
) -> tuple[Any, History]:
    """An empty cache for the prompts, with room for the new tokens, and how beams will use it."""
    if history not in (None, "tree", "reorder", "gather"):
        raise ValueError(f"history must be 'tree', 'reorder' or 'gather', got {history!r}")
    branches = (width - 1) * (new - 1)  # slots of a tree beyond those that one beam takes
    if history in (None, "tree"):
        obstacle = _no_tree(model, cache, longest + new - 1 + branches)
        if obstacle is not None and history == "tree":
            raise ValueError(f"a tree of beams cannot be kept: {obstacle}; use history='reorder'")
        history = "tree" if obstacle is None else "reorder"
    spare = branches if history == "tree" else 0
    state = open_cache(model, cache, batch, longest, new, spare=spare)
    return core.grow(state, longest + new - 1 + spare), history


def _no_tree(model: Any, cache: Any, need: int) -> str | None:
    """Why beams cannot be branches in one row of this cache, if so."""
    if any(window is not None for window in model.windows):
        return "the model's attention windows count back in the cache, not along a branch"
    if model.rope_by_place:
        return "the model's rotary positions count places in the cache, not along a branch"
    if cache is None:
        return None
    # Without its buffers; `grow` will round up what can grow.
    layers = jax.eval_shape(lambda: model.init_cache(cache, 1, ragged=True)).layers
    sizes = set()
    for layer in layers:
        if not layer.in_order or layer.lookback is not None:
            return f"{layer.spec} does not store each token by itself, for good"
        roomy = layer.capacity >= need or not layer.spec.growable
        sizes.add(layer.capacity if roomy else grown_capacity(need))
    if min(sizes) < need:
        return f"it takes {need} slots, but the capacity is {min(sizes)}"
    if len(sizes) > 1:
        return f"one mask cannot fit layers of different capacities {sorted(sizes)}"
    return None


def _result(search: _Search, returned: int, history: History) -> BeamResult:
    steps = int(search.step)
    tokens, parents, sums = (
        np.array(x[:steps]) for x in (search.tokens, search.parents, search.sums)
    )
    ends = jax.tree.map(lambda x: np.array(x[:, :returned]), search.finished)
    sequences = np.zeros((*ends.length.shape, len(search.tokens)), np.int32)
    beam, row = ends.beam, np.arange(len(ends.beam))[:, None]
    # From each hypothesis's last token back to its first.
    for step in range(steps - 1, -1, -1):
        inside = step < ends.length - 1
        sequences[..., step] = np.where(inside, tokens[step][row, beam], 0)
        sequences[..., step] = np.where(step == ends.length - 1, ends.token, sequences[..., step])
        beam = np.where(inside, parents[step][row, beam], beam)
    return BeamResult(sequences, ends.length, ends.score, tokens, parents, sums, ends.beam, history)


# --- the device's part -----------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=2)
def search_from(
    graph: Graph,
    params: Any,
    cache: Any,
    last: jax.Array,
    prompt: jax.Array,
    seen: jax.Array | None,
    rules: _Rules,
    width: int,
    history: History,
) -> _Search:
    """The whole search, from the hidden state of each prompt's last token, (B, E)."""
    model = graph.merge(params)
    batch, new = len(prompt), len(rules.divisor) - 1
    shape = (batch, width)
    path: jax.Array | None = None
    if history == "tree":
        slot = jnp.arange(cache.layers[0].capacity, dtype=jnp.int32)[None, None]
        path = jnp.broadcast_to(slot < prompt[:, None, None], (*shape, slot.size))
    elif history == "reorder":
        path = jnp.zeros((*shape, width), jnp.int32)
    search = _Search(
        cache=cache,
        # All go on from one beam at first, or they would be W times the same.
        sum=jnp.full(shape, -jnp.inf, jnp.float32).at[:, 0].set(0),
        tokens=jnp.zeros((new, *shape), jnp.int32),
        parents=jnp.zeros((new, *shape), jnp.int32),
        sums=jnp.zeros((new, *shape), jnp.float32),
        finished=_Finished(
            score=jnp.full(shape, -jnp.inf, jnp.float32),
            length=jnp.zeros(shape, jnp.int32),
            beam=jnp.zeros(shape, jnp.int32),
            token=jnp.zeros(shape, jnp.int32),
        ),
        open=jnp.ones(batch, bool),
        step=jnp.int32(0),
        seen=None if seen is None else jnp.repeat(seen[:, None], width, axis=1),
        path=path,
    )
    feed = _feed_tree if history == "tree" else _feed_rows

    def step(search: _Search) -> _Search:
        hidden, search = feed(model, search, prompt)
        return _choose(model.logits(hidden), search, rules)

    logits = model.logits(last[:, None])
    search = _choose(jnp.broadcast_to(logits, (*shape, logits.shape[-1])), search, rules)
    if new == 1:  # a cache of the prompt's size would have no room for a step, even one not taken
        return search
    return jax.lax.while_loop(
        lambda search: (search.step < new) & jnp.any(search.open), step, search
    )


def _feed_tree(model: Any, search: _Search, prompt: jax.Array) -> tuple[jax.Array, _Search]:
    """Appends each row's W newest tokens; a beam sees the prompt and its own branch."""
    token, parent = search.tokens[search.step - 1], search.parents[search.step - 1]
    batch, width = token.shape
    assert search.path is not None
    first = prompt + width * (search.step - 1)
    own = first[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    slot = jnp.arange(search.path.shape[-1], dtype=jnp.int32)
    path = jnp.take_along_axis(search.path, parent[..., None], axis=1)
    path = path | (own[..., None] == slot[None, None])
    positions = jnp.broadcast_to((prompt + search.step - 1)[:, None], (batch, width))
    hidden, cache = model.hidden(token, search.cache, positions=positions, mask=path[:, None])
    return hidden, search.replace(cache=cache, path=path)


def _feed_rows(model: Any, search: _Search, prompt: jax.Array) -> tuple[jax.Array, _Search]:
    """Brings the past of each beam to its row, then appends its newest token."""
    token, parent = search.tokens[search.step - 1], search.parents[search.step - 1]
    batch, width = token.shape
    first = width * jnp.arange(batch, dtype=jnp.int32)[:, None]
    rows, path = (first + parent).reshape(-1), search.path
    if path is None:
        cache = core.reorder(search.cache, rows)
    else:
        across = jnp.broadcast_to(parent[:, None], (batch, width, width))
        from_parent = jnp.take_along_axis(path, parent[..., None], axis=2)[..., 0]
        since = prompt[:, None] + from_parent
        cache = core.reorder(search.cache, rows, since=since.reshape(-1))
        path = jnp.take_along_axis(path, parent[..., None], axis=1)
        path = jnp.take_along_axis(path, across, axis=2)
        itself = jnp.eye(width, dtype=bool)[None]
        path = jnp.where(itself, search.step, path)
    hidden, cache = model.hidden(token.reshape(-1, 1), cache)
    hidden = hidden.reshape(batch, width, -1)
    return hidden, search.replace(cache=cache, path=path)


def _choose(logits: jax.Array, search: _Search, rules: _Rules) -> _Search:
    """Goes on from logits (B, W, V): the beams that live on, and hypotheses that finish."""
    batch, width, vocab = logits.shape
    new = len(search.tokens)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    if search.seen is not None:
        log_probs = penalized(log_probs, search.seen, rules.penalty)
    total = (search.sum[..., None] + log_probs).reshape(batch, width * vocab)
    # So many that W do not stop, even if each beam could stop in every way there is.
    count = (1 + len(rules.stops)) * width
    total, index = jax.lax.top_k(total, count)
    beam, token = index // vocab, index % vocab
    length = search.step + 1
    stops = jnp.any(token[..., None] == rules.stops[None, None], axis=-1) | (length == new)

    # Only what is among the W best may finish; the others are there to live on.
    best = jnp.arange(count)[None] < width
    ends = stops & best & search.open[:, None]
    old = search.finished
    merged = _Finished(
        score=jnp.where(ends, total / rules.divisor[length], -jnp.inf),
        length=jnp.full_like(beam, length),
        beam=beam,
        token=token,
    )
    merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, merged)
    score, kept = jax.lax.top_k(merged.score, width)
    finished = _picked(merged, kept)
    finished = finished.replace(length=jnp.where(score > -jnp.inf, finished.length, 0))

    order = jax.lax.top_k(jnp.where(stops, -jnp.inf, total), width)[1]
    order = _settled(beam, order)
    total, beam, token = _picked((total, beam, token), order)
    # Judged by what the best live beam may still become.
    full = jnp.all(score > -jnp.inf, axis=1)
    hope = jnp.max(total, axis=1) / rules.bound[length] > jnp.min(score, axis=1)
    seen = search.seen
    if seen is not None:
        seen = jnp.take_along_axis(seen, beam[..., None], axis=1)
        seen = seen | (token[..., None] == jnp.arange(vocab, dtype=jnp.int32)[None, None])
    return search.replace(
        sum=total,
        tokens=search.tokens.at[search.step].set(token),
        parents=search.parents.at[search.step].set(beam),
        sums=search.sums.at[search.step].set(total),
        finished=finished,
        open=search.open & hope & ~(full & rules.early),
        step=length,
        seen=seen,
    )


def _picked(tree: Any, index: jax.Array) -> Any:
    """Entries `index` int32 (B, W) of arrays (B, K)."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=1), tree)


def _settled(beam: jax.Array, order: jax.Array) -> jax.Array:
    """The same W candidates in an order in which a beam's best continuation keeps its number.

    So rows of a cache move only where a beam dies and another branches into its place.
    """
    parent = jnp.take_along_axis(beam, order, axis=1)  # (B, W)
    width = parent.shape[1]
    number = jnp.arange(width, dtype=parent.dtype)
    is_from = parent[:, :, None] == number[None, None]  # (B, candidate, beam)
    heir = jnp.argmax(is_from, axis=1)  # the first candidate of each beam, if it has any
    extinct = ~jnp.any(is_from, axis=1)
    later = jnp.take_along_axis(heir, parent, axis=1) != number[None]
    # Candidates that are not a first, in order, then take the places of extinct beams.
    queue = jnp.argsort(~later, axis=1, stable=True)
    turn = jnp.cumsum(extinct, axis=1) - 1
    place = jnp.where(extinct, jnp.take_along_axis(queue, jnp.maximum(turn, 0), axis=1), heir)
    return jnp.take_along_axis(order, place, axis=1)
