"""Safetensors files of a Hugging Face folder, read one tensor at a time into an abstract model.

Linear kernels are (in, out) in flax and (out, in) on disk; everything else is stored as it is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, in which safetensors hands over weights)
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from lucid_jax.models.config import read_object
from lucid_jax.models.families import Family
from lucid_jax.models.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
# What wraps the decoder in some files: `model.layers.0`, `transformer.h.0`, `model.language_model...`.
_WRAPPERS = ("model.", "transformer.", "language_model.")
# What some writers also store: RoPE's frequencies, GPT-2's causal mask, parts that see images.
_DERIVED = re.compile(
    r"(.*\.)?(inv_freq|attn\.bias|attn\.masked_bias)$|(vision_tower|multi_modal_projector)\."
)


class CheckpointError(ValueError):
    """A model folder is incomplete, damaged, or holds another model than its config describes."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, and the parameters that it holds side by side.

    Attributes:
      parameters: one; or several that lie behind each other on the last axis (of flax's kernel).
      transposed: whether it is stored (out, in).
      turn: which of their first axis, if they hold several tensors stacked; see `Turns`.
    """

    parameters: tuple[nnx.Param, ...]
    transposed: bool
    turn: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        *rest, _ = self.parameters[0].shape
        rest = rest if self.turn is None else rest[1:]
        shape = (*rest, sum(p.shape[-1] for p in self.parameters))
        return shape[::-1] if self.transposed else shape

    def join(self, dtype: DTypeLike | None) -> np.ndarray:
        """The parameters' values as stored; `dtype` None keeps theirs."""
        values = [p[...] if self.turn is None else p[self.turn] for p in self.parameters]
        values = values if dtype is None else [value.astype(dtype) for value in values]
        array = np.concatenate([np.asarray(value) for value in values], axis=-1)
        return np.ascontiguousarray(array.T if self.transposed else array)

    def fill(self, array: np.ndarray, dtype: DTypeLike) -> None:
        """Sets the parameters from what is stored."""
        array = array.T if self.transposed else array
        ends = np.cumsum([p.shape[-1] for p in self.parameters])[:-1]
        for parameter, part in zip(self.parameters, np.split(array, ends, axis=-1), strict=True):
            value = jax.device_put(np.ascontiguousarray(part, dtype))
            if self.turn is not None:
                whole: Any = parameter.get_value()
                if not isinstance(whole, jax.Array):  # abstract, until its first part comes
                    whole = jnp.zeros(parameter.shape, dtype)
                value = _with_part(whole, value, np.int32(self.turn))
            parameter.set_value(value)


@partial(jax.jit, donate_argnums=0)
def _with_part(whole: jax.Array, part: jax.Array, turn: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, turn, 0)


def stored_tensors(model: Transformer) -> dict[str, Tensor]:
    """The tensors a file of this model holds, by name, without the wrapper (`model.`)."""
    family = model.config.family
    found: dict[str, list[tuple[str, nnx.Param, bool, int | None]]] = {}
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            *modules, leaf = (str(part) for part in path)
            kind = "bias" if leaf == "bias" else "weight"
            for ours, turn in _layers_of(modules, model):
                transposed = leaf == "kernel" and (ours == "lm_head" or not family.kernels_as_used)
                name = f"{_module_in_file(ours, family)}.{kind}"
                found.setdefault(name, []).append((ours, variable, transposed, turn))
    order = {ours: index for index, ours in enumerate(family.modules)}
    tensors = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: order.get(_any_layer(part[0]), 0))
        tensors[name] = Tensor(tuple(variable for _, variable, _, _ in parts), *parts[0][2:])
    return tensors


def _layers_of(modules: list[str], model: Transformer) -> list[tuple[str, int | None]]:
    """The module of each layer that a parameter of `modules` belongs to, and its turn if stacked."""
    if model.turns is None or modules[0] != "layers":
        return [(".".join(modules), None)]
    block = int(modules[1])
    turns = model.turns.turns_of(block)
    return [
        (".".join(["layers", str(model.turns.layer_of(block, turn or 0)), *modules[2:]]), turn)
        for turn in ([None] if turns is None else turns)
    ]


def stored_name(name: str, family: Family) -> str:
    """A tensor's name with the wrapper that transformers gives it."""
    if name.startswith("lm_head."):
        return name
    return ("transformer." if family.kernels_as_used else "model.") + name


def load_weights(model: Transformer, folder: Path, dtype: DTypeLike) -> None:
    """Gives an abstract model its weights; names and shapes must be the config's, exactly.

    Everything is checked before anything is read; then one tensor at a time is read, converted and
    put on the device, so that the host never holds more than the model and one tensor.

    Raises:
      CheckpointError: see `load_pretrained`.
    """
    config = model.config
    wanted = {stored_name(name, config.family): t for name, t in stored_tensors(model).items()}

    def name_of(stored: str) -> str | None:
        short = _unwrapped(stored)
        tied = short == "lm_head.weight" and config.tie_word_embeddings  # the embeddings once more
        return None if tied or _DERIVED.match(short) else stored_name(short, config.family)

    fill_weights(wanted, folder, dtype, name_of)


def fill_weights(
    wanted: Mapping[str, Tensor],
    folder: Path,
    dtype: DTypeLike,
    name_of: Callable[[str], str | None],
) -> None:
    """`load_weights` for the tensors of any model.

    Args:
      wanted: the tensors to fill, by name.
      folder: holds the files.
      dtype: dtype to convert to.
      name_of: which of `wanted` a stored tensor is, by its name there; None for one to leave out.
    """
    with contextlib.ExitStack() as stack:
        files = {path.name: stack.enter_context(_opened(path)) for path in _shards(folder)}
        found: dict[str, tuple[str, str]] = {}
        for stored, file in _file_of_each(folder, files).items():
            name = name_of(stored)
            if name in found:
                raise CheckpointError(
                    f"{folder} holds both {found[name][0]!r} and {stored!r}, which are one tensor of "
                    "the model; keep the one that is meant"
                )
            if name is not None:
                found[name] = (stored, file)
        _check_names(folder, wanted, found)
        for name, (stored, file) in found.items():
            _check_tensor(folder / file, stored, files[file], wanted[name].shape)
        for name, (stored, file) in found.items():
            wanted[name].fill(files[file].get_tensor(stored), dtype)


def stored_names(folder: Path) -> set[str]:
    """The names of all tensors of a folder."""
    with contextlib.ExitStack() as stack:
        files = {path.name: stack.enter_context(_opened(path)) for path in _shards(folder)}
        return set(_file_of_each(folder, files))


def _shards(folder: Path) -> Iterable[Path]:
    """The files that hold the weights, one or those that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {others[0]} holds pickles, which are not read: convert it" if others else ""
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} and no {INDEX} with the parts it names{hint}"
        )
    names = sorted(set(_weight_map(folder).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {INDEX} names: "
            f"{', '.join(missing)}; fetch them again"
        )
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        table = read_object(path.read_text("utf-8"), INDEX).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path} must hold a weight_map from tensor names to files")
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{path} places {name!r} in {file!r}; expected the name of a file in the same folder"
            )
    return table


def _file_of_each(folder: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """Which file holds each tensor."""
    held = {file: set(content.keys()) for file, content in files.items()}
    if WEIGHTS in files:
        return dict.fromkeys(sorted(held[WEIGHTS]), WEIGHTS)
    table = _weight_map(folder)
    wrong = [name for name, file in table.items() if name not in held[file]]
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} places {len(wrong)} tensors in files that do not hold them, such as "
            f"{wrong[0]!r} in {table[wrong[0]]}; the files belong to different models"
        )
    return table


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); it may be cut short or of "
            "another format: fetch or save it again"
        ) from error
    with file as content:
        yield content


def _check_names(
    folder: Path, wanted: Mapping[str, Any], found: Mapping[str, tuple[str, str]]
) -> None:
    missing = sorted(name for name in wanted if name not in found)
    extra = sorted(stored for name, (stored, _) in found.items() if name not in wanted)
    if missing or extra:
        raise CheckpointError(
            f"{folder} does not hold the {len(wanted)} tensors that config.json asks for: "
            f"{len(missing)} are missing {missing[:3]}, {len(extra)} are not known {extra[:3]}; the "
            "files belong to different models, or to another architecture"
        )


def _check_tensor(path: Path, name: str, file: Any, shape: tuple[int, ...]) -> None:
    stored = file.get_slice(name)
    if stored.get_dtype() not in _FLOATS:
        raise CheckpointError(
            f"{path}: {name!r} should be floating point ({', '.join(_FLOATS)}), got "
            f"{stored.get_dtype()}; quantized checkpoints are not supported: convert it to bfloat16 "
            "first"
        )
    if tuple(stored.get_shape()) != shape:
        raise CheckpointError(
            f"{path}: {name!r} should have shape {shape} by config.json, got "
            f"{tuple(stored.get_shape())}; the files belong to different models"
        )


def _unwrapped(name: str) -> str:
    while (wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None)) is not None:
        name = name.removeprefix(wrapper)
    return name


def _any_layer(module: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", module)


def _module_in_file(module: str, family: Family) -> str:
    theirs = family.modules.get(_any_layer(module), module)
    number = re.search(r"\.(\d+)\.", module)
    return theirs.replace("*", number[1]) if number else theirs
