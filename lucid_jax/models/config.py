"""The shape of a Llama-family transformer, read from and written to a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

# A config.json must name these; our defaults for them are those of the embedded model.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a decoder-only transformer; names are those of config.json.

    Example:
      >>> ModelConfig(vocab_size=512, hidden_size=64, num_attention_heads=4).head_dim
      16
    """

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # by default as many as query heads
    head_dim: int | None = None  # by default hidden_size / num_attention_heads
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0

    def __post_init__(self) -> None:
        """Fills the two defaults that depend on others, and checks every field."""
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in (*_REQUIRED, "num_key_value_heads", "max_position_embeddings"):
            _check_positive(name, getattr(self, name))
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
        if self.dim_per_head % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is None:
                continue
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name} must be an integer in [0, {self.vocab_size}) or None, got {token!r}"
                )

    @property
    def kv_heads(self) -> int:
        """`num_key_value_heads`, never None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dim_per_head(self) -> int:
        """`head_dim`, never None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads the content of a config.json; keys this model has no use for are ignored.

        Of several end tokens the first is taken.

        Raises:
          ValueError: if the text is not a JSON object, describes another kind of model, lacks
            one of its sizes, or holds a value out of range.
        """
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"config.json is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"config.json must hold an object, got {type(values).__name__}")
        kind = values.get("model_type", "llama")
        if kind != "llama":
            raise ValueError(f"config.json describes a {kind!r} model; only 'llama' can be read")
        for key, expected in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("rope_scaling", None),
        ):
            if values.get(key, expected) != expected:
                raise ValueError(
                    f"config.json has {key}={values[key]!r}; only {expected!r} is supported"
                )
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        # transformers 5 moved theta into a table; some checkpoints list several end tokens.
        rope = values.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"config.json has rope_type={rope['rope_type']!r}; only 'default' is supported"
            )
        values.setdefault("rope_theta", rope.get("rope_theta", cls.rope_theta))
        for key in ("bos_token_id", "eos_token_id"):
            if isinstance(values.setdefault(key, None), list):
                values[key] = values[key][0] if values[key] else None
        values.setdefault("tie_word_embeddings", False)  # Hugging Face's default, not ours
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def to_json(self, dtype: str | None = None) -> str:
        """The content of a config.json that Hugging Face reads as a `LlamaForCausalLM`.

        Args:
          dtype: name of the dtype the weights are stored in, noted as `torch_dtype`.
        """
        values = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }
        if dtype is not None:
            values["torch_dtype"] = dtype
        return json.dumps(values, indent=2) + "\n"


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
