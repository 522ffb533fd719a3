"""The reference transformer, its checkpoints, and the small trained model that ships with it.

`load_model` and `save_model` need the `tokenizers` package (the `text` extra), so they are imported
when first asked for.
"""

from typing import Any

from lucid_jax.models.config import ModelConfig
from lucid_jax.models.transformer import Transformer

__all__ = ["CheckpointError", "ModelConfig", "Transformer", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name in ("CheckpointError", "load_model", "save_model"):
        from lucid_jax.models import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
