"""The shape of a T5, read from a Hugging Face config.json."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lucid_jax.models.config import one_or_several, read_object

_REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


@dataclass(frozen=True)
class T5Config:
    """Sizes and constants of a T5; names are those of config.json.

    Example:
      >>> T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4).gated
      False
    """

    vocab_size: int
    d_model: int
    d_kv: int  # width of a head, whatever d_model / num_heads is
    d_ff: int
    num_layers: int
    num_heads: int
    num_decoder_layers: int | None = None  # by default as many as the encoder's
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # or "gated-gelu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True  # by d_model ** -0.5 before the head, as version 1.0 does
    decoder_start_token_id: int = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self) -> None:
        """Fills the number of decoder layers, and checks every field."""
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        counts = (
            *_REQUIRED,
            "num_decoder_layers",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        )
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        # The encoder halves the buckets, and half of what is left stand for one distance each.
        if not 4 <= self.relative_attention_num_buckets <= 2 * self.relative_attention_max_distance:
            raise ValueError(
                "relative_attention_num_buckets must be at least 4, and at most twice "
                f"relative_attention_max_distance, got {self.relative_attention_num_buckets} and "
                f"{self.relative_attention_max_distance}"
            )
        if not self.layer_norm_epsilon > 0:
            raise ValueError(
                f"layer_norm_epsilon must be positive, got {self.layer_norm_epsilon!r}"
            )
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise ValueError(
                f"feed_forward_proj must be 'relu' or 'gated-gelu', got {self.feed_forward_proj!r}"
            )
        ids = {
            "decoder_start_token_id": (self.decoder_start_token_id,),
            "eos_token_id": self.eos_token_ids,
        }
        for name, tokens in ids.items():
            for token in tokens:
                if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must be in [0, {self.vocab_size}), got {token!r}")

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections, as version 1.1 does."""
        return self.feed_forward_proj == "gated-gelu"

    @property
    def decoder_layers(self) -> int:
        """`num_decoder_layers`, never None."""
        return self.num_decoder_layers or self.num_layers

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple, perhaps an empty one."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    @classmethod
    def from_json(cls, text: str) -> T5Config:
        """Reads the content of a config.json; keys this model has no use for are ignored.

        Raises:
          ValueError: if the text is not a JSON object, describes another kind of model, lacks one
            of its sizes, or holds a value out of range.
        """
        values = read_object(text)
        if values.get("model_type") != "t5":
            raise ValueError(
                f"config.json describes a {values.get('model_type')!r} model; T5 reads 't5'"
            )
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        # Version 1.1 and Flan say that they do not tie to say that they do not scale either.
        values.setdefault("tie_word_embeddings", True)
        values.setdefault("scale_decoder_outputs", values["tie_word_embeddings"])
        if values.get("decoder_start_token_id") is None:
            values["decoder_start_token_id"] = values.get("pad_token_id") or 0
        values["eos_token_id"] = one_or_several(values.get("eos_token_id", 1))
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})
