"""`DecodeOptions`: what all decoders are asked for, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import NamedSharding, PartitionSpec

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.decode.prompts import as_stops
from lucid_jax.decode.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """The keyword arguments that `generate`, `stream`, `beam_search` and `speculate` share.

    Attributes:
        max_new_tokens: the most tokens to add to a row.
        cache: a spec, or one per layer; None for what the model asks for.
        sampling: how to choose tokens.
        seed: of the random choices.
        stops: ids that end a row, sorted.
        prefill_chunk: the most prompt tokens per call.
        sharding: of the cache, as for `init_cache`.
    """

    max_new_tokens: int
    cache: LayerSpec | Sequence[LayerSpec] | None
    sampling: Sampling
    seed: int
    stops: tuple[int, ...]
    prefill_chunk: int
    sharding: PartitionSpec | NamedSharding | None

    @classmethod
    def of(
        cls,
        *,
        max_new_tokens: int,
        cache: LayerSpec | Sequence[LayerSpec] | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
        prefill_chunk: int = 512,
        sharding: PartitionSpec | NamedSharding | None = None,
    ) -> DecodeOptions:
        """Options as callers give them.

        Raises:
            ValueError: if a count is below 1, or a stop token negative.
            TypeError: if one is no integer.
        """
        return cls(
            max_new_tokens=check_count(max_new_tokens, "max_new_tokens", 1),
            cache=cache,
            sampling=Sampling() if sampling is None else sampling,
            seed=seed,
            stops=as_stops(stop_tokens),
            prefill_chunk=check_count(prefill_chunk, "prefill_chunk", 1),
            sharding=sharding,
        )
