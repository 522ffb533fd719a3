"""The shape of a decoder-only transformer, read from and written to a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lucid_jax.attention.rope import SCALINGS, Rope, Scaling, is_positive
from lucid_jax.models.families import FAMILIES, Family
from lucid_jax.models.rope_config import ROPE_THETA, read_rope

# A config.json must name these; our defaults for them are those of the embedded model.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Read of every family.
_COMMON = (
    *_REQUIRED, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip
# What config.json may leave out of any family, with transformers' values for it, not ours.
_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Keys that would change the result in a way this model does not know, whatever the family.
_ONLY: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "kv_lora_rank": (None,),  # multi-head latent attention
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (None, False),
}
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_MOST_LAYERS = 10_000
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a decoder-only transformer; names are those of config.json.

    Attributes:
      vocab_size: V, token ids.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_hidden_layers: blocks.
      num_attention_heads: N, query heads.
      num_key_value_heads: H, key/value heads; by default N.
      head_dim: D; by default hidden_size / N.
      rope_theta: base of the rotary positions.
      rms_norm_eps: epsilon of the norms, of whatever kind.
      max_position_embeddings: positions trained for.
      tie_word_embeddings: whether the head is the embedding table.
      bos_token_id: starts a text, if anything does.
      eos_token_id: ends a text; some models have several.
      model_type: a key of `families.FAMILIES`, whose facts hold besides the values here.
      hidden_act: a key of `ACTIVATIONS`.
      attention_bias: whether attention's projections have a bias.
      mlp_bias: whether the MLP's have.
      rope_scaling: how rotary positions were stretched.
      rope_local_theta: base of the rotary positions in layers with a window, which then are not
        stretched; None: as in the others.
      sliding_window: positions that a token sees, itself included, in layers with a window.
      layer_types: "sliding_attention" or "full_attention" for each layer; by default the family's
        pattern if there is a `sliding_window`.
      query_pre_attn_scalar: scores are divided by its square root; by default by head_dim's.
      attn_logit_softcapping: bounds the scores, see `lucid_jax.attend`.
      final_logit_softcapping: bounds the logits likewise.

    Example:
      >>> ModelConfig(vocab_size=512, hidden_size=64, num_attention_heads=4).head_dim
      16
    """

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = ROPE_THETA
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0
    model_type: str = "llama"
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Scaling | None = None
    rope_local_theta: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        """Fills the defaults that depend on other fields, and checks every field."""
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported; supported are "
                f"{', '.join(sorted(FAMILIES))}"
            )
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in (*_REQUIRED, "num_key_value_heads", "max_position_embeddings"):
            _check_positive(name, getattr(self, name))
        if self.num_hidden_layers > _MOST_LAYERS:  # before making a list of them
            raise ValueError(
                f"num_hidden_layers must be at most {_MOST_LAYERS}, got {self.num_hidden_layers}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                    f"({self.num_attention_heads}); give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_positive("head_dim", self.head_dim)
        if self.dim_per_head % 2 and not self.family.learned_positions:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name in (
            "rope_theta", "rms_norm_eps", "rope_local_theta", "query_pre_attn_scalar",
            "attn_logit_softcapping", "final_logit_softcapping",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name not in ("rope_theta", "rms_norm_eps"):
                continue
            if not is_positive(value):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not supported; supported are "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.rope_scaling is not None:
            Rope(self.rope_theta, self.rope_scaling)  # which checks that they fit
        self._check_windows()
        self._check_tokens()

    def _check_windows(self) -> None:
        if self.sliding_window is not None:
            _check_positive("sliding_window", self.sliding_window)
        if self.layer_types is None:
            every = self.family.full_every
            object.__setattr__(
                self,
                "layer_types",
                tuple(
                    _FULL
                    if self.sliding_window is None or (every and (i + 1) % every == 0)
                    else _SLIDING
                    for i in range(self.num_hidden_layers)
                ),
            )
        types = tuple(self.layer_types or ())
        object.__setattr__(self, "layer_types", types)
        known = all(kind in (_FULL, _SLIDING) for kind in types)
        if len(types) != self.num_hidden_layers or not known:
            raise ValueError(
                f"layer_types must name {_FULL!r} or {_SLIDING!r} for each of "
                f"{self.num_hidden_layers} layers, got {list(types)}"
            )
        if self.sliding_window is None and _SLIDING in types:
            raise ValueError(f"layer_types has {_SLIDING!r}, but there is no sliding_window")

    def _check_tokens(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        ids = {"bos_token_id": (self.bos_token_id,), "eos_token_id": self.eos_token_ids}
        for name, tokens in ids.items():
            for token in tokens:
                if token is None:
                    continue
                integer = isinstance(token, int) and not isinstance(token, bool)
                if not integer or not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name} must be an integer in [0, {self.vocab_size}) or None, got {token!r}"
                    )

    @property
    def family(self) -> Family:
        """The facts of the family."""
        return FAMILIES[self.model_type]

    @property
    def kv_heads(self) -> int:
        """`num_key_value_heads`, never None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dim_per_head(self) -> int:
        """`head_dim`, never None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple, perhaps an empty one."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many positions back a token sees (itself included); None for all."""
        types = self.layer_types or ()
        return tuple(self.sliding_window if kind == _SLIDING else None for kind in types)

    def rope(self, layer_idx: int) -> Rope | None:
        """The rotary positions of a layer; None where positions are learned."""
        if self.family.learned_positions:
            return None
        if self.rope_local_theta is not None and self.windows[layer_idx] is not None:
            return Rope(self.rope_local_theta)
        return Rope(self.rope_theta, self.rope_scaling)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads the content of a config.json; keys that change no result are ignored.

        Both transformers 5's keys (`rope_parameters`, `layer_types`) and those before are known. Of a
        multimodal Gemma 3 the text model is read.

        Raises:
          ValueError: if the text is not a JSON object, describes a kind of model that is not
            supported, lacks one of its sizes, or holds a value out of range.
        """
        values = read_object(text)
        kind = values.get("model_type", "llama")
        if kind == "gemma3" and isinstance(values.get("text_config"), dict):
            kind = "gemma3_text"
            outer = {k: v for k, v in values.items() if k not in ("text_config", "vision_config")}
            values = {**outer, **values["text_config"]}
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ValueError(
                f"config.json describes a {kind!r} model; supported are "
                f"{', '.join(sorted(FAMILIES))}"
            )
        family = FAMILIES[kind]
        for key, allowed in {**_ONLY, **family.only}.items():
            if values.get(key, allowed[0]) not in allowed:
                raise ValueError(
                    f"config.json has {key}={values[key]!r}; only {allowed[-1]!r} is supported"
                )
        fields = {**_DEFAULTS, **family.defaults}
        for name in (*_COMMON, *family.reads):
            key = family.keys.get(name, name)
            if key in values:
                fields[name] = values[key]
        if family.learned_positions:
            # GPT-2 leaves the MLP's width out, or null, for four times the model's.
            width = fields.get("hidden_size")
            if fields.get("intermediate_size") is None and isinstance(width, int):
                fields["intermediate_size"] = 4 * width
        else:
            fields |= read_rope(values, fields)
        missing = [family.keys.get(name, name) for name in _REQUIRED if name not in fields]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        if "layer_types" in family.reads:
            fields |= _read_windows(values, fields, family)
        fields["eos_token_id"] = one_or_several(fields["eos_token_id"])
        return cls(model_type=kind, **fields)

    def to_json(self, dtype: str | None = None) -> str:
        """The content of a config.json that Hugging Face reads.

        Args:
          dtype: name of the dtype the weights are stored in, noted as `torch_dtype`.
        """
        family = self.family
        values: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
        }
        for name in (*_COMMON, *family.reads):
            value = getattr(self, name)
            values[family.keys.get(name, name)] = list(value) if isinstance(value, tuple) else value
        if not family.learned_positions:
            values["rope_theta"] = self.rope_theta
            if self.rope_scaling is not None:
                (name,) = (k for k, v in SCALINGS.items() if isinstance(self.rope_scaling, v))
                values["rope_scaling"] = {
                    "rope_type": name,
                    **dataclasses.asdict(self.rope_scaling),
                }
            if self.rope_local_theta is not None:
                values["rope_local_base_freq"] = self.rope_local_theta
        if family.windows_from is not None and self.sliding_window is not None:
            values["use_sliding_window"] = True
        if dtype is not None:
            values["torch_dtype"] = dtype
        return json.dumps(values, indent=2) + "\n"


def read_object(text: str, name: str = "config.json") -> dict[str, Any]:
    """The JSON object that a file such as config.json holds.

    Raises:
      ValueError: if it holds something else.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # brackets in brackets, without end
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold an object, got {type(values).__name__}")
    return values


def one_or_several(ids: Any) -> Any:
    """An `eos_token_id` as `ModelConfig` has it: lists become tuples, and those of one id that id."""
    if isinstance(ids, list):
        ids = tuple(ids)
        return ids if len(ids) > 1 else ids[0] if ids else None
    return ids


def _read_windows(
    values: Mapping[str, Any], fields: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    """`sliding_window` and `layer_types`, from the switches that stood for them before."""
    layers, window = fields["num_hidden_layers"], fields.get("sliding_window")
    first = family.windows_from
    if first is not None and not values.get("use_sliding_window"):
        # Off unless switched on, and the file then may still name a window.
        return {"sliding_window": None, "layer_types": None}
    types = values.get("layer_types")
    known = isinstance(layers, int) and layers <= _MOST_LAYERS  # else an error follows
    if types is None and window is not None and known:
        if first is not None:
            first = values.get("max_window_layers", first)
            if not isinstance(first, int):
                raise ValueError(f"max_window_layers must be an integer, got {first!r}")
            types = [_SLIDING if i >= first else _FULL for i in range(layers)]
        elif "sliding_window_pattern" in values:
            every = values["sliding_window_pattern"]
            _check_positive("sliding_window_pattern", every)
            types = [_SLIDING if (i + 1) % every else _FULL for i in range(layers)]
    if types is not None and not isinstance(types, list):
        raise ValueError(f"layer_types must be a list, got {types!r}")
    return {"sliding_window": window, "layer_types": None if types is None else tuple(types)}


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
