"""`Conversation`: a cache kept between turns, so that each turn computes only what is new."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lucid_jax.cache import introspection, verbs
from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.state import CacheState
from lucid_jax.decode.generation import go_on, news
from lucid_jax.decode.language_model import LanguageModel, split
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prefill import prefill, sized
from lucid_jax.decode.prompts import pad_prompts, seen_tokens
from lucid_jax.decode.sampling import Sampling
from lucid_jax.decode.storage import empty_cache
from lucid_jax.decode.token_loop import LoopSetup, TokenLoop, out_size, start_loop


class Conversation:
    """A text that grows by turns: you `say` tokens, the model answers, and the cache stays.

    Not for several threads at once.

    Example:
        >>> from flax import nnx
        >>> from lucid_jax.models import ModelConfig, Transformer
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, num_attention_heads=2)
        >>> talk = Conversation(Transformer(config, rngs=nnx.Rngs(0)), capacity=64)
        >>> first = [token for part in talk.say([1, 2, 3], max_new_tokens=4) for token in part]
        >>> len(first), talk.stored  # the latest token goes into the cache when the text goes on
        (4, 6)
        >>> second = [token for part in talk.say([4, 5], max_new_tokens=4) for token in part]
        >>> talk.stored
        12
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        cache: LayerSpec | Sequence[LayerSpec] | None = None,
        capacity: int = 2048,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
        prefill_chunk: int = 512,
    ) -> None:
        """An empty conversation.

        Args:
            model: who answers; see `LanguageModel`.
            cache: spec of the cache, or one per layer; a `Sliding` one never fills. By default what
                `model.cache_spec` asks for, with `capacity` slots in its static layers.
            capacity: tokens of the whole conversation, where `cache` is not given.
            sampling: how to choose tokens; greedy by default. A repetition penalty remembers all turns.
            seed: of the random choices.
            stop_tokens: ids that end an answer.
            prefill_chunk: as for `generate`.

        Raises:
            ValueError: for counts below 1, or a spec that the model cannot take.
        """
        check_count(capacity, "capacity", 1)
        self._options = DecodeOptions.of(
            max_new_tokens=1,
            sampling=sampling,
            seed=seed,
            stop_tokens=stop_tokens,
            prefill_chunk=prefill_chunk,
        )
        self._model = model
        self._spec = cache
        if cache is None:
            self._spec = sized(model.cache_spec(capacity), capacity)
        self._structure, self._params = split(model)
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was said."""
        self._cache: CacheState | None = empty_cache(self._model, self._spec, 1)
        self._last: int | None = None  # chosen, and not yet in the cache
        self._seen: jax.Array | None = None
        self._turn = 0

    @property
    def cache(self) -> CacheState:
        """All that was said but the latest token; the next turn takes its buffers.

        Raises:
            RuntimeError: if a turn was interrupted while it ran.
        """
        if self._cache is None:
            raise RuntimeError(
                "a turn was interrupted and took the cache with it; reset the conversation"
            )
        return self._cache

    @property
    def stored(self) -> int:
        """Tokens in the cache, or of a window those that have come by."""
        return int(np.max(self.cache.layers[0].position))

    def say(
        self, tokens: Sequence[int], *, max_new_tokens: int, tokens_per_call: int = 8
    ) -> Iterator[list[int]]:
        """Adds a turn, and yields the answer as it comes, its stop token included.

        An answer stops at a stop token, after `max_new_tokens`, or when the cache is full. A stop token
        does not go into the cache: what closes an answer begins the next turn, as in chat templates.
        An iterator that is left early leaves its answer as far as it came.

        Args:
            tokens: ids of the turn, all that goes between the last answer and this one.
            max_new_tokens: the most tokens of the answer.
            tokens_per_call: as for `stream`.

        Yields:
            The tokens that are new since the last time.

        Raises:
            ValueError: for no tokens, ids outside the vocabulary, or a turn that the cache has no
                room for; the conversation is then as it was.
            RuntimeError: as for `cache`.
        """
        new = check_count(max_new_tokens, "max_new_tokens", 1)
        check_count(tokens_per_call, "tokens_per_call", 1)
        last = [] if self._last is None else [self._last]
        pad_prompts([tokens], self._model.config.vocab_size)  # refuses what is no turn
        padded, lengths = pad_prompts([[*last, *tokens]], self._model.config.vocab_size)
        cache, room = self._with_room(int(lengths[0]))
        new = new if room is None else min(new, room - int(lengths[0]) + 1)
        # Refuses positions that the model has not, as learned ones end.
        self._model.cache_spec(self.stored + int(lengths[0]) + new - 1)
        yield from self._answer(cache, padded, lengths, new, tokens_per_call)

    def _with_room(self, count: int) -> tuple[CacheState, int | None]:
        """The cache with room for a turn, and how much it can ever have; None if that has no bound."""
        try:
            cache = verbs.ensure_capacity(self.cache, count)
        except ValueError as error:
            raise ValueError(
                f"a turn of {count} tokens after {self.stored} does not fit the cache: {error}. Reset "
                "the conversation, give it more capacity, or a Sliding cache, which never fills"
            ) from None
        if any(layer.spec.growable for layer in cache.layers):
            return cache, None
        return cache, introspection.room(cache)

    def _answer(
        self,
        cache: CacheState,
        padded: np.ndarray,
        lengths: np.ndarray,
        new: int,
        tokens_per_call: int,
    ) -> Iterator[list[int]]:
        options = self._options
        seen = seen_tokens(padded, lengths, self._model, options.sampling)
        if seen is not None and self._seen is not None:
            seen = seen | self._seen
        self._cache = None  # its buffers go into the turn
        hidden, cache = prefill(
            self._structure, self._params, cache, padded, lengths, options.prefill_chunk
        )
        setup = LoopSetup(self._structure, options.sampling, options.stops)
        key = jax.random.fold_in(jax.random.key(options.seed), self._turn)
        size = out_size(min(tokens_per_call, new))
        loop = start_loop(setup, self._params, cache, hidden, seen, key, size)
        self._turn += 1
        for (part,) in news(self._kept(go_on(setup, self._params, loop, new, tokens_per_call))):
            yield part

    def _kept(self, loops: Iterator[TokenLoop]) -> Iterator[TokenLoop]:
        """The loops, each of which holds the conversation as far as it has come."""
        for loop in loops:
            token = int(loop.token[0])
            self._cache, self._seen = loop.cache, loop.seen
            self._last = None if token in self._options.stops else token
            yield loop
            self._cache = None  # while the next call works in it
        self._cache = loop.cache
