"""The reference transformer, its checkpoints, the small trained model that ships with it, and T5.

`load_model`, `load_pretrained` and `save_model` are imported when first asked for: planning a cache
needs no reader of files.
"""

from typing import Any

from lucid_jax.models.chat import ChatTemplate
from lucid_jax.models.config import ModelConfig
from lucid_jax.models.t5 import T5
from lucid_jax.models.t5_config import T5Config
from lucid_jax.models.transformer import Transformer

__all__ = [
    "T5",
    "ChatTemplate",
    "CheckpointError",
    "ModelConfig",
    "T5Config",
    "Transformer",
    "embedded_draft_path",
    "load_model",
    "load_pretrained",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name in (
        "CheckpointError",
        "embedded_draft_path",
        "load_model",
        "load_pretrained",
        "save_model",
    ):
        from lucid_jax.models import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
