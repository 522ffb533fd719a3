"""Models on disk in the Hugging Face layout: config.json, *.safetensors, tokenizer.json; or as GGUF.

Reading weights is weights.py's part, what config.json may say config.py's; the modules named gguf read
that format.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from lucid_jax.io.checked_file import replacing
from lucid_jax.models.config import ModelConfig, one_or_several, read_object
from lucid_jax.models.gguf_config import read_config as read_gguf_config
from lucid_jax.models.gguf_file import GgufFile
from lucid_jax.models.gguf_weights import load_gguf_weights
from lucid_jax.models.t5 import T5
from lucid_jax.models.t5_config import T5Config
from lucid_jax.models.t5_weights import load_t5
from lucid_jax.models.transformer import Transformer
from lucid_jax.models.weights import (
    WEIGHTS,
    CheckpointError,
    load_weights,
    stored_name,
    stored_tensors,
)

if TYPE_CHECKING:
    from lucid_jax.models.tokenizer import Tokenizer  # needs the text extra

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
_SETTINGS = "tokenizer_config.json"


def load_pretrained(
    directory: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    rope_by_place: bool = False,
    scan_layers: bool = False,
) -> tuple[Transformer | T5, Tokenizer | None]:
    """Reads a checkpoint folder as it comes from the Hugging Face hub, or a GGUF file.

    Of the families in `families.FAMILIES`: Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3, Gemma 2 and 3,
    GPT-2; and T5 (1.0, 1.1, Flan), which comes as a `T5`. Of GGUF files those of the architecture
    "llama", quantized or not: with the config, the tokenizer and the chat template inside. Weights are
    read one tensor at a time.

    Args:
      directory: holds config.json; model.safetensors, or model.safetensors.index.json and the files
        it names; and, perhaps, generation_config.json, whose end tokens then become the config's,
        tokenizer.json, and tokenizer_config.json and chat_template.jinja for the latter. Or a GGUF
        file.
      dtype: dtype of the parameters and of the computation, whatever the files store.
      rope_by_place: see `Transformer`.
      scan_layers: see `Transformer`.

    Returns:
      The model, and its tokenizer, or None if the folder has no tokenizer.json or the file no
      vocabulary.

    Raises:
      CheckpointError: if a file is missing, unreadable or cut short; if config.json or a GGUF file
        describes a model that is not supported; if the tensors are not, by name, shape and type, those
        that it asks for; or if the tokenizer has more ids than the model.
      ValueError: if `dtype` is not floating point.
      ModuleNotFoundError: if there is a tokenizer.json, and the `text` extra is not installed; or of
        a GGUF file, without the `gguf` extra.
    """
    folder = Path(directory)
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype must be floating point, such as bfloat16, got {jnp.dtype(dtype)}")
    if _is_gguf(folder):
        return _load_gguf(folder, dtype, rope_by_place, scan_layers)
    config = _read_config(folder)
    tokenizer = _read_tokenizer(folder, config) if (folder / _TOKENIZER).is_file() else None
    if isinstance(config, T5Config):
        if rope_by_place:
            raise ValueError("rope_by_place=True is for rotary positions, and T5 has none; drop it")
        if scan_layers:
            raise ValueError(
                "scan_layers=True is for decoder-only models, and this is a T5; drop it"
            )
        return load_t5(folder, config, dtype), tokenizer
    model = _abstract(config, dtype, rope_by_place, scan_layers)
    load_weights(model, folder, jnp.dtype(dtype))
    return model, tokenizer


def load_model(
    directory: Path | str | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    rope_by_place: bool = False,
    scan_layers: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """`load_pretrained` for text: by default the small model that ships with the package.

    Args:
      directory: as for `load_pretrained`, tokenizer.json included.
      dtype: as for `load_pretrained`.
      rope_by_place: as for `load_pretrained`.
      scan_layers: as for `load_pretrained`.

    Returns:
      The model and its tokenizer.

    Raises:
      CheckpointError: as for `load_pretrained`, and if there is no tokenizer.
    """
    folder = embedded_model_path() if directory is None else Path(directory)
    if not _is_gguf(folder):
        _need(folder, _CONFIG)
        _need(folder, _TOKENIZER)
    model, tokenizer = load_pretrained(
        folder, dtype, rope_by_place=rope_by_place, scan_layers=scan_layers
    )
    if not isinstance(model, Transformer):
        raise CheckpointError(
            f"{folder} holds an encoder-decoder, which continues no text by itself; read it with "
            "load_pretrained, and see T5.given"
        )
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no vocabulary; read the model with load_pretrained")
    return model, tokenizer


def save_model(
    directory: Path | str,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a model folder; each file is replaced in one step, so a crash leaves no half file.

    Args:
      directory: made if missing.
      model: what to save.
      tokenizer: its tokenizer.
      dtype: dtype to store the weights in; by default the one they have.

    Raises:
      ValueError: if the tokenizer has more ids than the model has embeddings.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only "
            f"{model.config.vocab_size} embeddings"
        )
    tensors = {
        stored_name(name, model.config.family): tensor.join(dtype)
        for name, tensor in stored_tensors(model).items()
    }
    stored = next(iter(tensors.values())).dtype.name
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / _TOKENIZER, tokenizer.to_json().encode())
    if settings := tokenizer.settings():
        write_atomically(folder / _SETTINGS, json.dumps(settings, indent=2).encode())
    write_atomically(folder / _CONFIG, model.config.to_json(stored).encode())


def embedded_model_path() -> Path:
    """The folder of the small model that ships with the package.

    Example:
      model, tokenizer = load_model(embedded_model_path())
    """
    return Path(str(importlib.resources.files("lucid_jax.models") / "data"))


def embedded_draft_path() -> Path:
    """The folder of a smaller model that drafts for the embedded one; see `models.distill`.

    Example:
      draft, _ = load_model(embedded_draft_path())
    """
    return embedded_model_path() / "draft"


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file in one step: readers see the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _is_gguf(path: Path) -> bool:
    return path.is_file() or (path.suffix.lower() == ".gguf" and not path.is_dir())


def _load_gguf(
    path: Path, dtype: DTypeLike, rope_by_place: bool, scan_layers: bool
) -> tuple[Transformer, Tokenizer | None]:
    with GgufFile(path) as file:
        from lucid_jax.models.gguf_tokenizer import read_tokenizer

        try:
            config = read_gguf_config(file)
            tokenizer = read_tokenizer(file.metadata)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{path} has {tokenizer.vocab_size} tokens but says vocab_size={config.vocab_size}; "
                "it is damaged"
            )
        model = _abstract(config, dtype, rope_by_place, scan_layers)
        load_gguf_weights(model, file, jnp.dtype(dtype))
    return model, tokenizer


def _abstract(
    config: ModelConfig, dtype: DTypeLike, rope_by_place: bool, scan_layers: bool
) -> Transformer:
    """The shapes to fill, without drawing random weights first."""
    return nnx.eval_shape(
        lambda: Transformer(
            config,
            param_dtype=jnp.dtype(dtype),
            rope_by_place=rope_by_place,
            scan_layers=scan_layers,
            rngs=nnx.Rngs(0),
        )
    )


def _need(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        files = sorted(path.name for path in folder.glob("*.gguf"))
        if files:
            raise CheckpointError(f"{folder} has no {name}, but {files[0]}: give that file's path")
        raise CheckpointError(
            f"{folder} has no {name}; a model folder holds {_CONFIG}, {WEIGHTS} (or its parts) and "
            f"{_TOKENIZER}: write one with save_model, or copy the missing file"
        )


def _read_config(folder: Path) -> ModelConfig | T5Config:
    """config.json, with the first and last tokens that generation_config.json names, if it does."""
    _need(folder, _CONFIG)
    config: ModelConfig | T5Config
    try:
        text = (folder / _CONFIG).read_text("utf-8")
        kind = T5Config if read_object(text).get("model_type") == "t5" else ModelConfig
        config = kind.from_json(text)
    except ValueError as error:
        raise CheckpointError(f"{folder / _CONFIG}: {error}") from error
    path = folder / _GENERATION
    if not path.is_file():
        return config
    try:
        generation = read_object(path.read_text("utf-8"), _GENERATION)
        found = {
            name: one_or_several(generation[name])
            for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id")
            if hasattr(config, name) and generation.get(name) is not None
        }
        return dataclasses.replace(config, **found)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_tokenizer(folder: Path, config: ModelConfig | T5Config) -> Tokenizer:
    from lucid_jax.models.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(folder / _TOKENIZER)
    except ValueError as error:
        raise CheckpointError(f"{folder / _TOKENIZER}: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder / _TOKENIZER} has {tokenizer.vocab_size} ids but {_CONFIG} says vocab_size="
            f"{config.vocab_size}; the files belong to different models"
        )
    return tokenizer
