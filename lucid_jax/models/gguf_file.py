"""GGUF files: their metadata, and their tensors, dequantized one at a time by the `gguf` package.

The header is read here: the package's own reader makes arrays of every string, which for a vocabulary
takes seconds, and follows any count that a damaged file gives. Sizes are checked before they are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lucid_jax.models.weights import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Kinds of value by their number in the file; strings (8) and arrays (9) come in parts.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and how it is stored.

    Attributes:
      shape: rows first, as NumPy has it; the file names the last axis first.
      kind: a `gguf.GGMLQuantizationType`.
      start: of its bytes in the file.
      size: in bytes.
    """

    shape: tuple[int, ...]
    kind: Any
    start: int
    size: int


class GgufFile:
    """An open GGUF file; a context manager.

    Attributes:
      path: of the file.
      metadata: its values by their keys: numbers, booleans, strings, and lists of these.
      tensors: what it holds, by name.

    Example:
      with GgufFile("model.gguf") as file:
          file.metadata["general.architecture"], file.read("token_embd.weight").shape
    """

    def __init__(self, path: Path | str):
        """Opens the file and reads all but the tensors.

        Raises:
          CheckpointError: if it is not a whole GGUF file that the `gguf` package can dequantize.
          ModuleNotFoundError: without the `gguf` extra.
        """
        self.path = Path(path)
        self._gguf = _package()
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self._left = self.path.stat().st_size
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, float32.

        Raises:
          CheckpointError: if the file has become shorter since it was opened.
        """
        tensor = self.tensors[name]
        self._file.seek(tensor.start)
        content = self._file.read(tensor.size)
        if len(content) != tensor.size:
            raise self._cut_short()
        rows = np.frombuffer(content, np.uint8).reshape(*tensor.shape[:-1], -1)
        # Scales of a damaged block may be infinite or NaN, which shows in what the model says.
        with np.errstate(all="ignore"):
            values: np.ndarray = self._gguf.dequantize(rows, tensor.kind)
        return values.reshape(tensor.shape)

    def _read_header(self) -> None:
        if self._left < len(_MAGIC) or self._take(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(
                f"{self.path} is not a GGUF file: it does not begin with {_MAGIC.decode()}"
            )
        version = self._number("<u4")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "big-endian numbers" if swapped else f"version {version} of the format"
            raise CheckpointError(
                f"{self.path} has {what}; supported are versions 2 and 3, little-endian: convert the "
                "model again"
            )
        tensors, values = self._number("<u8"), self._number("<u8")
        self.metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._string()
            if key in self.metadata:
                raise self._damaged(f"it names {key!r} twice")
            self.metadata[key] = self._value(self._number("<u4"), key)
        infos = {}
        for _ in range(tensors):
            name = self._string()
            if name in infos:
                raise self._damaged(f"it names the tensor {name!r} twice")
            infos[name] = self._tensor_info(name)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self._file.tell() // alignment) * alignment
        end = self._file.tell() + self._left
        self.tensors = {
            name: self._placed(name, *info, start=start, end=end, alignment=alignment)
            for name, info in infos.items()
        }

    def _tensor_info(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Shape, number of the kind, offset."""
        dimensions = self._number("<u4")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self._number("<u8") for _ in range(dimensions))[::-1]
        return shape, self._number("<u4"), self._number("<u8")

    def _placed(
        self,
        name: str,
        shape: tuple[int, ...],
        number: int,
        offset: int,
        *,
        start: int,
        end: int,
        alignment: int,
    ) -> StoredTensor:
        """A tensor that the file can hold, of a kind that can be read."""
        kinds = self._gguf.GGMLQuantizationType
        kind = next((kind for kind in kinds if kind == number), None)
        if kind is None or not self._can_dequantize(kind):
            raise CheckpointError(
                f"{self.path} stores {name!r} as {number if kind is None else kind.name}, which the "
                "gguf package cannot dequantize; convert the model to F16, or install a newer gguf"
            )
        per_block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        if not count or shape[-1] % per_block:
            raise self._damaged(
                f"{name!r} has shape {shape}, and {kind.name} blocks of {per_block}"
            )
        size = count // per_block * block_bytes
        if offset % alignment:
            raise self._damaged(f"{name!r} begins at {offset}, no multiple of {alignment}")
        if start + offset + size > end:
            raise self._cut_short()
        return StoredTensor(shape, kind, start + offset, size)

    def _can_dequantize(self, kind: Any) -> bool:
        """Whether the package can: it says so of one block."""
        block = np.zeros((1, self._gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            self._gguf.dequantize(block, kind)
        except NotImplementedError:
            return False
        return True

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(kind, 1, key)[0]
        kind, count = self._number("<u4"), self._number("<u8")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        return self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> list[Any]:
        if kind not in _SCALARS:
            raise self._damaged(f"{key!r} has values of kind {kind}, which is not known")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _number(self, kind: str) -> int:
        dtype = np.dtype(kind)
        return int.from_bytes(self._take(dtype.itemsize), "little")

    def _string(self) -> str:
        content = self._take(int.from_bytes(self._take(8), "little"))
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{content[:40]!r} is not UTF-8") from error

    def _take(self, count: int) -> bytes:
        """The next bytes of the header; asks for none beyond the file."""
        if count > self._left:
            raise self._cut_short()
        self._left -= count
        return self._file.read(count)

    def _cut_short(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a complete GGUF file: it ends before what it says it holds; fetch or "
            "convert it again"
        )

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged, or not a GGUF file: {what}; fetch or convert it again"
        )


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading GGUF files needs the gguf package; install it with: pip install 'lucid-jax[gguf]'",
            name=error.name,
        ) from error
    return gguf
