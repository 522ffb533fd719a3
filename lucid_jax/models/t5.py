"""T5 (Raffel et al. 2020): an encoder-decoder with relative positions, versions 1.0 and 1.1 (Flan).

Shapes: sources int32 (B, S), tokens int32 (B, T) in, logits float32 (B, T, V) out. `T5.given(sources)`
is a language model like any other, for `generate`, `stream` and beam search: the keys of
cross-attention are computed there, once, and are from then on constants of the decode loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from lucid_jax.cache.codecs import PLAIN, Codec, default_codec
from lucid_jax.cache.counting import counted_together
from lucid_jax.cache.creation import init_cache
from lucid_jax.cache.encoder_decoder import EncoderDecoderState
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.layouts.contiguous import Static
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.decode.language_model import ModelStructure, split
from lucid_jax.decode.prompts import pad_prompts, power_of_two
from lucid_jax.models.t5_blocks import T5Stack
from lucid_jax.models.t5_config import T5Config
from lucid_jax.models.t5_distances import distances_back, relative_buckets


class T5(nnx.Module):
    """An encoder-decoder. `given` makes it a language model; `hidden` is the step underneath.

    Example:
      >>> import lucid_jax as lj
      >>> config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
      >>> model = T5(config, rngs=nnx.Rngs(0))
      >>> translator = model.given([[5, 6, 7, 1], [8, 1]])
      >>> lj.generate(translator, translator.prompts, max_new_tokens=3).tokens.shape
      (2, 3)
    """

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds a model with random weights.

        Args:
          config: its sizes.
          dtype: dtype to compute in; by default `param_dtype`.
          param_dtype: dtype the parameters are kept in.
          rngs: source of the parameters.
        """
        dtype = param_dtype if dtype is None else dtype
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.shared = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs, **dtypes)
        self.encoder = T5Stack(config, decoder=False, dtypes=dtypes, rngs=rngs)
        self.decoder = T5Stack(config, decoder=True, dtypes=dtypes, rngs=rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Linear(config.d_model, config.vocab_size, use_bias=False, rngs=rngs, **dtypes)
        )

    # --- the encoder ---------------------------------------------------------------------------

    def encode(self, sources: jax.Array, lengths: jax.Array) -> jax.Array:
        """The encoder's output, (B, S, d_model), for right-padded sources, int32 (B, S) and [B]."""
        config, width = self.config, sources.shape[1]
        buckets = relative_buckets(
            np.arange(1 - width, width),
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            both_sides=True,
        )
        index = jnp.arange(width, dtype=jnp.int32)
        # Spread out on the device: (S, S) numbers known at trace time would be part of the program.
        bias = self.encoder.bias_of(buckets)[:, index[None, :] - index[:, None] + (width - 1)][None]
        mask = (index[None, :] < lengths[:, None])[:, None, None]
        hidden = self.shared(sources)
        for block in self.encoder.block:
            hidden = block.encode(hidden, mask, bias)
        return self.encoder.final_layer_norm(hidden)

    def encoder_cache(
        self, sources: jax.Array, lengths: jax.Array, codec: Codec = PLAIN
    ) -> CacheState:
        """Runs the encoder and stores the cross-attention keys and values of all layers.

        Args:
          sources: int32 (B, S), right-padded.
          lengths: int32 [B].
          codec: how to store them; as they are by default.

        Returns:
          A ragged cache of S tokens a row, for `EncoderDecoderState.encoder`.
        """
        batch, width = sources.shape
        cache = self.init_cache(Static(width, codec=codec), batch, ragged=True)
        encoded = self.encode(sources, lengths)
        for index, block in enumerate(self.decoder.block):
            assert block.cross_attn is not None
            cache = block.cross_attn.store(encoded, cache, index, lengths=lengths)
        return cache

    def given(
        self, sources: ArrayLike | Sequence[Sequence[int]], *, codec: Codec | None = None
    ) -> GivenT5:
        """The decoder as a language model of what follows these sources.

        The encoder runs here, once; sources are padded to a power of two, so that few shapes are
        compiled.

        Args:
          sources: token ids, one list per row, of any lengths; or an int array (B, S).
          codec: how to store the cross-attention's keys and values; as they are by default, on CPU
            by `codecs.Bits`.

        Raises:
          ValueError: for an empty source, or an id outside the vocabulary.
        """
        tokens, lengths = pad_prompts(sources, self.config.vocab_size)
        width = max(16, power_of_two(tokens.shape[1]))
        tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
        structure, params = split(self)
        codec = default_codec(self.dtype) if codec is None else codec
        return GivenT5(self, _encoder_cache(structure, params, tokens, lengths, codec))

    # --- the decoder ---------------------------------------------------------------------------

    def hidden(
        self,
        tokens: jax.Array,
        state: EncoderDecoderState,
        *,
        lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, EncoderDecoderState]:
        """The decoder's last hidden states, (B * W, T, d_model), and the state with the tokens in it.

        Args:
          tokens: int32 (B * W, T), W rows for each of the encoder's, one after the other: the tokens
            that follow what `state.decoder` holds.
          state: the cache; `state.encoder` comes back as it is.
          lengths: int32 [B * W], ragged caches: how many of each row's tokens are real.
          positions: given if the tokens are branches of a tree, stored in another order than they are
            read in. Then distances are counted along each branch: `mask` must show each token the
            tokens of its own branch, itself included, and no others.
          mask: bool, broadcastable to (B * W, N, T, C): which stored tokens each token sees; see
            `lucid_jax.extend`.

        Raises:
          ValueError: if tokens are not (batch, seq), their rows not a multiple of the encoder's, or
            positions came without a mask.
          TypeError: if the state is no `EncoderDecoderState`, or tokens are not integers.
        """
        if not isinstance(state, EncoderDecoderState):
            raise TypeError(
                f"T5 needs an EncoderDecoderState, got {type(state).__name__}; to generate, "
                "pass model.given(sources) in place of the model"
            )
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be (batch, seq), got shape {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, got {tokens.dtype}")
        if positions is not None and mask is None:
            raise ValueError(
                "positions= need mask=: T5 counts distances along the tokens that each token sees"
            )
        tree = mask if positions is not None else None
        if state.decoder is not None:
            state = state.replace(decoder=counted_together(state.decoder, lengths))
        biases: dict[Any, jax.Array] = {}  # layers of one kind store the same tokens
        hidden = self.shared(tokens)
        for index, block in enumerate(self.decoder.block):
            layer = None if state.decoder is None else state.decoder.own_layer(index)
            kind = None if layer is None else (layer.spec, layer.num_slots)
            if kind not in biases:
                biases[kind] = self._decoder_bias(tokens.shape[1], layer, tree)
            hidden, state = block.decode(
                hidden, state, index, lengths=lengths, mask=mask, bias=biases[kind]
            )
        return self.decoder.final_layer_norm(hidden), state

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (B, T, d_model) to logits, float32 (B, T, V)."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        if self.lm_head is None:
            table = self.shared.embedding[...].astype(hidden.dtype)
            return jnp.einsum("btc,vc->btv", hidden, table, preferred_element_type=jnp.float32)
        kernel = self.lm_head.kernel[...].astype(hidden.dtype)
        return jnp.einsum("btc,cv->btv", hidden, kernel, preferred_element_type=jnp.float32)

    def cache_spec(self, max_length: int, codec: Codec = PLAIN, slack: int = 0) -> LayerSpec:
        """What the decoder needs to keep of texts of up to `max_length` tokens: all of them.

        Args:
          max_length: tokens of the longest text, the start token included.
          codec: how they are stored.
          slack: tokens that can be rolled back; here all can, whatever it says.
        """
        return Static(max_length, codec=codec)

    def init_cache(
        self, spec: LayerSpec | Sequence[LayerSpec], batch_size: int, *, ragged: bool = False
    ) -> CacheState:
        """An empty self-attention cache, for `EncoderDecoderState.decoder`."""
        return init_cache(
            spec,
            num_layers=self.config.decoder_layers,
            batch_size=batch_size,
            num_kv_heads=self.config.num_heads,
            head_dim=self.config.d_kv,
            dtype=self.dtype,
            ragged=ragged,
        )

    def _decoder_bias(
        self, tokens: int, layer: TokenLayer | None, tree: jax.Array | None
    ) -> jax.Array:
        """Bias (B|1, N, T, C) of T new tokens' scores, by how far back a key is."""
        config = self.config
        furthest = config.relative_attention_max_distance  # from here on all share a bucket
        buckets = relative_buckets(
            -np.arange(furthest + 1),
            config.relative_attention_num_buckets,
            furthest,
            both_sides=False,
        )
        table = self.decoder.bias_of(buckets)  # (N, distances)
        back = jnp.clip(distances_back(tokens, layer, tree), 0, furthest)
        heads = np.arange(config.num_heads)[None, :, None, None]
        return table[heads, back]


class GivenT5(nnx.Module):
    """The decoder of a `T5` after an encoder has read its sources: a `LanguageModel`.

    Its cache is the decoder's alone. What the encoder left is part of the model, as the weights are: a
    constant of a decode loop, which no verb on the cache can move.

    Attributes:
      model: the T5.
      encoder: its cross-attention keys and values, one row per source.
      rope_by_place: false: T5 has no rotary positions.
    """

    rope_by_place = False

    def __init__(self, model: T5, encoder: CacheState):
        """Binds a model to the keys that its `encoder_cache` returned."""
        self.model = model
        self.encoder = nnx.Cache(encoder)

    @property
    def config(self) -> T5Config:
        """The model's."""
        return self.model.config

    @property
    def prompts(self) -> list[list[int]]:
        """What to generate from: the start token, once per source."""
        return [[self.config.decoder_start_token_id]] * self._state(None).encoder.batch_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many positions back a token sees; None for all."""
        return (None,) * self.config.decoder_layers

    def hidden(
        self,
        tokens: jax.Array,
        cache: CacheState | None = None,
        *,
        lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, CacheState | None]:
        """Tokens (B, T) to hidden states and the cache of the decoder; arguments as `T5.hidden`'s."""
        options = {"lengths": lengths, "positions": positions, "mask": mask}
        hidden, state = self.model.hidden(tokens, self._state(cache), **options)
        return hidden, state.decoder

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (B, T, d_model) to logits, float32 (B, T, V)."""
        return self.model.logits(hidden)

    def cache_spec(self, max_length: int, codec: Codec = PLAIN, slack: int = 0) -> LayerSpec:
        """What the decoder needs to keep of texts of up to `max_length` tokens: all of them."""
        return self.model.cache_spec(max_length, codec, slack)

    def init_cache(
        self, spec: LayerSpec | Sequence[LayerSpec], batch_size: int, *, ragged: bool = False
    ) -> CacheState:
        """An empty cache of the decoder's own tokens; rows for each source, one after the other."""
        return self.model.init_cache(spec, batch_size, ragged=ragged)

    def _state(self, cache: CacheState | None) -> EncoderDecoderState:
        return EncoderDecoderState(decoder=cache, encoder=self.encoder.get_value())


@partial(jax.jit, static_argnums=(0, 4))
def _encoder_cache(
    structure: ModelStructure, params: Any, sources: jax.Array, lengths: jax.Array, codec: Codec
) -> CacheState:
    return structure.merge(params).encoder_cache(sources, lengths, codec)
