"""A decoder-only transformer, driven by its configuration: Llama and its relatives, Gemma, GPT-2.

Shapes: tokens int32 (B, T) in, logits float32 (B, T, V) out. Attribute names are those of Hugging
Face's Llama (and Gemma), so that a checkpoint's tensor names are module paths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.codecs import PLAIN, Codec
from lucid_jax.cache.counting import counted_together
from lucid_jax.cache.creation import init_cache
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.layouts.contiguous import Static
from lucid_jax.cache.layouts.ring import Sliding
from lucid_jax.cache.state import CacheState
from lucid_jax.models.blocks import INIT_STD, Block, model_norm
from lucid_jax.models.config import ModelConfig
from lucid_jax.models.turns import Turns, pattern
from lucid_jax.nn.attention_call import next_positions
from lucid_jax.nn.base import Cache


class Transformer(nnx.Module):
    """A decoder-only language model.

    Example:
      >>> config = ModelConfig(vocab_size=64, hidden_size=32, num_attention_heads=2)
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 3), jnp.int32)).shape
      (1, 3, 64)
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rope_by_place: bool = False,
        scan_layers: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds a model with random weights.

        Args:
          config: its sizes.
          dtype: dtype to compute in; by default `param_dtype`.
          param_dtype: dtype the parameters are kept in.
          rope_by_place: see `MultiHeadAttention`: with a sliding cache, text of any length keeps
            to the positions that were trained.
          scan_layers: keep the weights of alike layers stacked and run them in a `jax.lax.scan`, with
            a stacked cache: one layer is compiled rather than all, and the same tokens come out. XLA
            on CPU takes longer for each of them.
          rngs: source of the parameters.
        """
        dtype = param_dtype if dtype is None else dtype
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        embed = functools.partial(
            nnx.Embed,
            features=config.hidden_size,
            embedding_init=nnx.initializers.normal(INIT_STD),
            rngs=rngs,
            **dtypes,
        )
        self.embed_tokens = embed(num_embeddings=config.vocab_size)
        self.embed_positions = (
            embed(num_embeddings=config.max_position_embeddings)
            if config.family.learned_positions
            else None
        )
        blocks = [
            Block(config, index, rngs=rngs, rope_by_place=rope_by_place, **dtypes)
            for index in range(config.num_hidden_layers)
        ]
        self.turns = Turns(*pattern(config)) if scan_layers else None
        self.layers = nnx.List(blocks if self.turns is None else self.turns.stacked(blocks))
        self.norm = model_norm(config, param_dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=nnx.initializers.normal(INIT_STD),
                rngs=rngs,
                **dtypes,
            )
        )

    def __call__(
        self,
        tokens: jax.Array,
        cache: Cache | CacheState | None = None,
        *,
        lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> Any:
        """Predicts, after each token, the next one.

        Args:
          tokens: int32 (B, T): with a cache, the tokens that follow what it holds.
          cache: a stateful cache, changed in place, or a pure `CacheState`, returned changed.
          lengths: int32 [B], ragged pure caches: how many of each row's tokens are real.
          positions: int32 [T] or [B, T], the tokens' positions in their text, where those are not
            the order in which the cache stores them (the branches of a tree of tokens).
          mask: bool, broadcastable to (B, N, T, C): which stored tokens each token sees, of those
            before it in the cache; see `lucid_jax.extend`.

        Returns:
          Logits, float32 (B, T, V); with a pure `CacheState`, those and the new state.

        Raises:
          ValueError: if tokens are not 2-D.
          TypeError: if tokens are not integers.
        """
        hidden, cache = self.hidden(tokens, cache, lengths=lengths, positions=positions, mask=mask)
        logits = self.logits(hidden)
        return (logits, cache) if isinstance(cache, CacheState) else logits

    def hidden(
        self,
        tokens: jax.Array,
        cache: Any = None,
        *,
        lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The last hidden states, (B, T, hidden_size), and the cache; arguments as `__call__`'s.

        All layers of the cache must have had the same tokens: positions are computed once.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be (batch, seq), got shape {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, got {tokens.dtype}")
        hidden = self.embed_tokens(tokens)
        if self.config.family.scaled_embeddings:
            # Gemma rounds the factor to the dtype it computes in.
            hidden = hidden * jnp.asarray(math.sqrt(self.config.hidden_size), hidden.dtype)
        if isinstance(cache, CacheState):
            cache = counted_together(cache, lengths)
        if positions is None and not self.rope_by_place:
            # Once for all layers, which all get the same tokens.
            positions = next_positions(cache, tokens.shape[1], lengths=lengths)
        known = None
        if self.embed_positions is not None:
            assert positions is not None
            table = self.config.max_position_embeddings
            rows = jnp.atleast_2d(positions)
            hidden = hidden + self.embed_positions(jnp.minimum(rows, table - 1))
            known = rows < table
        options = {"lengths": lengths, "positions": positions, "mask": mask}
        if self.turns is None:
            for index, layer in enumerate(self.layers):
                hidden, cache = layer(hidden, cache, index, **options)
        else:
            hidden, cache = self.turns.run(list(self.layers), hidden, cache, options)
        hidden = self.norm(hidden)
        if known is not None:  # past the last learned position nothing sound can come out
            hidden = jnp.where(known[..., None], hidden, jnp.nan)
        return hidden, cache

    @property
    def rope_by_place(self) -> bool:
        """Whether a layer counts positions in the cache; see `MultiHeadAttention`."""
        return any(layer.self_attn.rope_by_place for layer in self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many positions back a token sees (itself included); None for all."""
        return self.config.windows

    def cache_spec(self, max_length: int, codec: Codec = PLAIN, slack: int = 0) -> list[LayerSpec]:
        """What each layer needs to keep of texts of up to `max_length` tokens, for `init_cache`.

        A layer with a window shorter than the text gets a ring of that size, any other a static
        cache.

        Args:
          max_length: tokens of the longest text.
          codec: how they are stored.
          slack: tokens that can be rolled back once a ring has wrapped; see `Sliding`.

        Raises:
          ValueError: if the model has no positions for a text so long, or it is below 1.
          TypeError: if `max_length` is not an integer.

        Example:
          >>> config = ModelConfig(
          ...     512, 64, 64, 3, 4, model_type="gemma2", sliding_window=128, head_dim=16
          ... )
          >>> model = Transformer(config, rngs=nnx.Rngs(0))
          >>> for spec in model.cache_spec(1000):
          ...     print(spec)
          Sliding(window=128, sinks=0, slack=0, codec=Identity())
          Static(capacity=1000, codec=Identity(), track=False)
          Sliding(window=128, sinks=0, slack=0, codec=Identity())
        """
        max_length = check_count(max_length, "max_length", 1)
        known = self.config.max_position_embeddings
        if self.embed_positions is not None and max_length > known:
            raise ValueError(
                f"this model has learned {known} positions, and {max_length} tokens are asked for; "
                "shorten the prompt or max_new_tokens"
            )
        return [
            Static(max_length, codec)
            if window is None or window >= max_length
            else Sliding(window, slack=slack, codec=codec)
            for window in self.windows
        ]

    def init_cache(
        self, spec: LayerSpec | Sequence[LayerSpec], batch_size: int, *, ragged: bool = False
    ) -> CacheState:
        """An empty cache of the right sizes for this model, in its compute dtype.

        Stacked, if the model scans over its layers.
        """
        return init_cache(
            spec,
            num_layers=self.config.num_hidden_layers,
            batch_size=batch_size,
            num_kv_heads=self.config.kv_heads,
            head_dim=self.config.dim_per_head,
            dtype=self.dtype,
            ragged=ragged,
            stacked=self.turns is not None,
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (B, T, hidden_size) to logits, float32 (B, T, V)."""
        if self.lm_head is None:
            table = self.embed_tokens.embedding[...].astype(hidden.dtype)
            # The table first: with a few tokens XLA on CPU takes 32 us so, and 55 us the other way.
            logits = jnp.einsum("vc,btc->vbt", table, hidden, preferred_element_type=jnp.float32)
            logits = jnp.moveaxis(logits, 0, -1)
        else:
            kernel = self.lm_head.kernel[...].astype(hidden.dtype)
            logits = jnp.einsum("btc,cv->btv", hidden, kernel, preferred_element_type=jnp.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
