"""`beam_search`: the W most likely continuations of each prompt, in one compiled loop.

A prompt is prefilled once. From there beams either are branches of a tree of tokens in one row of the
cache, where nothing ever moves, or have a row each, of which only what two beams do not share moves.
Shapes: B prompts, W beams, R hypotheses returned of each, N new tokens, S steps taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lucid_jax.cache import introspection, verbs
from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.layouts.contiguous import grown_capacity
from lucid_jax.cache.state import CacheState
from lucid_jax.decode.beam_loop import (
    History,
    PrefilledPrompts,
    Rules,
    Search,
    SearchSetup,
    search_from,
)
from lucid_jax.decode.language_model import LanguageModel, split
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prefill import open_cache, sized
from lucid_jax.decode.prefill_apart import prefill_prompts
from lucid_jax.decode.prompts import Prompts, pad_prompts, seen_tokens
from lucid_jax.decode.sampling import Sampling
from lucid_jax.decode.storage import empty_cache
from lucid_jax.decode.token_loop import out_size


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


def beam_search(
    model: LanguageModel,
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
    sharding: PartitionSpec | NamedSharding | None = None,
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
        cache: spec of the cache, or one per layer. By default as for `generate`.
        prefill_chunk: as for `generate`.
        history: how beams share the past; by default "tree" where that can be. All give the same
            hypotheses. "tree": beams are branches in one row of the cache and see their own past
            through a mask, so the prompt is stored and read once; for `Static` and `Dynamic` layers
            that store each token by itself, with room for the prompt and W * (N - 1) tokens.
            "reorder": a row per beam, and only what two beams do not share is moved; for every cache.
            "gather": moves everything at each step, to see what the others save.
        sharding: as for `generate`; the rows are those of prompts.

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
    width = check_count(num_beams, "num_beams", 1)
    options = DecodeOptions.of(
        max_new_tokens=max_new_tokens,
        cache=cache,
        sampling=Sampling(repetition_penalty=repetition_penalty),
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
        sharding=sharding,
    )
    returned = check_count(num_return_sequences, "num_return_sequences", 1)
    if returned > width:
        raise ValueError(
            f"num_return_sequences must be at most num_beams, got {returned} and {width}"
        )
    rules = as_rules(options, length_penalty, early_stopping, model.config.vocab_size)
    setup, *start = prefilled(model, prompts, options, width, history)
    search = search_from(setup, *start, rules)
    introspection.check_overflow(search.cache)
    return _result(search, options.max_new_tokens, returned, setup.history)


def as_rules(
    options: DecodeOptions, length_penalty: float, early_stopping: Any, vocab: int
) -> Rules:
    """The options of `beam_search` that decide between hypotheses, checked."""
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise ValueError(f"early_stopping must be False, True or 'never', got {early_stopping!r}")
    if len(options.stops) >= vocab:
        raise ValueError(f"of {vocab} ids at least one must not be a stop token")
    new = options.max_new_tokens
    # In double precision and then rounded, as transformers does.
    length = np.clip(np.arange(out_size(new) + 1, dtype=np.float64), 1, new)
    with np.errstate(all="ignore"):
        divisor = (length**length_penalty).astype(np.float32)
    if not (np.isfinite(divisor) & (divisor > 0)).all():
        raise ValueError(
            f"{new} ** length_penalty must be a positive float32, got length_penalty={length_penalty}"
        )
    hopeful = early_stopping == "never" and length_penalty > 0
    return Rules(
        new=np.int32(new),
        stops=np.array(options.stops, np.int32),
        divisor=divisor,
        bound=np.full_like(divisor, divisor[new]) if hopeful else divisor,
        early=np.bool_(early_stopping is True),
        penalty=np.float32(options.sampling.repetition_penalty),
    )


def prefilled(
    model: LanguageModel,
    prompts: Prompts,
    options: DecodeOptions,
    width: int,
    history: History | None,
) -> tuple[SearchSetup, Any, CacheState, PrefilledPrompts]:
    """What `search_from` takes, but for the rules: the prompts fed once each."""
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    state, room, history = _open_cache(model, options, lengths, width, history)
    structure, params = split(model)
    last, state = prefill_prompts(
        structure, params, state, tokens, lengths, options.prefill_chunk, room
    )
    if history != "tree":
        state = verbs.repeat_interleave(state, width)
    seen = seen_tokens(tokens, lengths, model, options.sampling)
    setup = SearchSetup(structure, width, history)
    return setup, params, state, PrefilledPrompts(last, lengths, seen)


def _open_cache(
    model: LanguageModel,
    options: DecodeOptions,
    lengths: np.ndarray,
    width: int,
    history: History | None,
) -> tuple[CacheState, int, History]:
    """What `open_cache` gives, with room for all beams' tokens, and how they will use it."""
    if history not in (None, "tree", "reorder", "gather"):
        raise ValueError(f"history must be 'tree', 'reorder' or 'gather', got {history!r}")
    new, longest = options.max_new_tokens, int(lengths.max())
    branches = (width - 1) * (new - 1)  # slots of a tree beyond those that one beam takes
    if history in (None, "tree"):
        obstacle = _no_tree(model, options.cache, longest + new - 1, branches)
        if obstacle is not None and history == "tree":
            raise ValueError(f"a tree of beams cannot be kept: {obstacle}; use history='reorder'")
        history = "tree" if obstacle is None else "reorder"
    spare = branches if history == "tree" else 0
    state, room = open_cache(model, options, lengths, spare=spare)
    if options.cache is not None:
        state = verbs.grow(state, longest + new - 1 + spare)
    return state, room, history


def _no_tree(model: LanguageModel, cache: Any, chain: int, branches: int) -> str | None:
    """Why beams cannot be branches in one row of this cache, if so."""
    if any(window is not None for window in model.windows):
        return "the model's attention windows count back in the cache, not along a branch"
    if model.rope_by_place:
        return "the model's rotary positions count places in the cache, not along a branch"
    need = chain + branches
    if cache is None:  # it will have room, but may have layers that drop tokens without a window
        cache, need = sized(model.cache_spec(chain), 1), 1
    # Without its buffers; `grow` will round up what can grow.
    layers = jax.eval_shape(lambda: empty_cache(model, cache, 1)).layers
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


def _result(search: Search, new: int, returned: int, history: History) -> BeamResult:
    steps = int(search.step)
    # Cut on the host: on the device each length would be a program.
    tokens, parents, sums = (
        np.asarray(x)[:steps].copy() for x in (search.tokens, search.parents, search.sums)
    )
    ends = jax.tree.map(lambda x: np.asarray(x)[:, :returned].copy(), search.finished)
    sequences = np.zeros((*ends.length.shape, new), np.int32)
    beam, row = ends.beam, np.arange(len(ends.beam))[:, None]
    # From each hypothesis's last token back to its first.
    for step in range(steps - 1, -1, -1):
        inside = step < ends.length - 1
        sequences[..., step] = np.where(inside, tokens[step][row, beam], 0)
        sequences[..., step] = np.where(step == ends.length - 1, ends.token, sequences[..., step])
        beam = np.where(inside, parents[step][row, beam], beam)
    return BeamResult(sequences, ends.length, ends.score, tokens, parents, sums, ends.beam, history)
