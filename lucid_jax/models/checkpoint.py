"""Models on disk in the Hugging Face layout: config.json, model.safetensors, tokenizer.json.

Linear kernels are (in, out) in flax and (out, in) on disk; everything else is stored as it is.
"""

from __future__ import annotations

import importlib.resources
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, in which safetensors hands over weights)
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from lucid_jax.models.config import ModelConfig
from lucid_jax.models.tokenizer import Tokenizer
from lucid_jax.models.transformer import Transformer

_CONFIG, _WEIGHTS, _TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class CheckpointError(ValueError):
    """A model folder is incomplete, damaged, or holds another model than its config describes."""


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
    tensors = {}
    for name, variable, is_kernel in _named_parameters(model):
        array = np.asarray(variable[...] if dtype is None else variable[...].astype(dtype))
        tensors[name] = np.ascontiguousarray(array.T if is_kernel else array)
    stored = next(iter(tensors.values())).dtype.name
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_atomically(folder / _WEIGHTS, weights)
    write_atomically(folder / _TOKENIZER, tokenizer.to_json().encode())
    write_atomically(folder / _CONFIG, model.config.to_json(stored).encode())


def load_model(
    directory: Path | str | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    rope_by_place: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """Reads a model folder.

    Args:
      directory: holds config.json, model.safetensors and tokenizer.json; by default the small
        trained model that ships with the package.
      dtype: dtype of the parameters and of the computation, whatever the file stores.
      rope_by_place: see `Transformer`.

    Returns:
      The model and its tokenizer.

    Raises:
      CheckpointError: if a file is missing, unreadable or cut short, or the tensors are not, by
        name and shape, those that config.json asks for.
    """
    folder = embedded_model_path() if directory is None else Path(directory)
    for name in (_CONFIG, _WEIGHTS, _TOKENIZER):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}; a model folder holds {_CONFIG}, {_WEIGHTS} and "
                f"{_TOKENIZER}: write one with save_model, or copy the missing file"
            )
    try:
        config = ModelConfig.from_json((folder / _CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / _CONFIG}: {error}") from error
    try:
        tokenizer = Tokenizer.load(folder / _TOKENIZER)
    except ValueError as error:
        raise CheckpointError(f"{folder / _TOKENIZER}: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder / _TOKENIZER} has {tokenizer.vocab_size} ids but {_CONFIG} says vocab_size="
            f"{config.vocab_size}; the files belong to different models"
        )
    # Abstract: the shapes to fill, without drawing random weights first.
    param_dtype = jnp.dtype(dtype)
    model = nnx.eval_shape(
        lambda: Transformer(
            config, param_dtype=param_dtype, rope_by_place=rope_by_place, rngs=nnx.Rngs(0)
        )
    )
    _fill(model, _read_tensors(folder / _WEIGHTS), folder / _WEIGHTS, param_dtype)
    return model, tokenizer


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); it may be cut short or of "
            "another format: fetch or save it again"
        ) from error
    except KeyError as error:
        raise CheckpointError(
            f"{path} stores tensors as {error}, which NumPy has no type for; convert them to "
            "bfloat16 first"
        ) from error


def _fill(model: Transformer, tensors: dict[str, np.ndarray], path: Path, dtype: DTypeLike) -> None:
    """Gives an abstract model its weights; names and shapes must be the config's, exactly."""
    missing = []
    for name, variable, is_kernel in _named_parameters(model):
        array = tensors.pop(name, None)
        if array is None:
            missing.append(name)
            continue
        shape = tuple(variable.shape[::-1] if is_kernel else variable.shape)
        if array.shape != shape:
            raise CheckpointError(
                f"{path}: {name!r} should have shape {shape} by {_CONFIG}, got {array.shape}; "
                "the files belong to different models"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(
                f"{path}: {name!r} should be floating point, got {array.dtype}; quantized "
                "checkpoints are not supported: convert it to bfloat16 first"
            )
        variable.set_value(jnp.asarray(array.T if is_kernel else array, dtype))
    # Some writers also store what can be derived: a tied head, the frequencies of RoPE.
    extra = [n for n in tensors if n != "lm_head.weight" and not n.endswith(".inv_freq")]
    if missing or extra:
        raise CheckpointError(
            f"{path} does not hold the tensors {_CONFIG} asks for: {len(missing)} are missing "
            f"{missing[:3]}, {len(extra)} are not known {extra[:3]}; the files belong to different "
            "models, or to another architecture"
        )


def embedded_model_path() -> Path:
    """The folder of the small model that ships with the package.

    Example:
      model, tokenizer = load_model(embedded_model_path())
    """
    return Path(str(importlib.resources.files("lucid_jax.models") / "data"))


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file in one step: readers see the old content or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0o600 would make an installed model private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _named_parameters(model: Transformer) -> Iterator[tuple[str, nnx.Param, bool]]:
    """Yields (Hugging Face name, parameter, whether it is a transposed kernel)."""
    leaf_names = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    for path, variable in nnx.iter_graph(model):
        if not isinstance(variable, nnx.Param):
            continue
        *modules, leaf = (str(part) for part in path)
        prefix = "" if modules[0] == "lm_head" else "model."
        yield f"{prefix}{'.'.join(modules)}.{leaf_names[leaf]}", variable, leaf == "kernel"
