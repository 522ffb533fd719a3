"""Files of arrays: safetensors with a description and a checksum, written in one step.

What is in them is checked against what their reader expects before anything is made of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import reprlib
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import safetensors
import safetensors.numpy

STORED = {  # dtypes of leaves, as safetensors calls them
    "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a file says it is.

    Attributes:
        format: its name, for programs.
        version: of the format, as it is written.
        name: its name, for people.
        written_by: what writes such files, for messages.
        older: versions that are still read.
    """

    format: str
    version: str
    name: str
    written_by: str
    older: tuple[str, ...] = ()


class Mismatch(Exception):
    """What was expected and what came, and the fix if it is special; the caller knows the file."""

    def __init__(self, problem: str, fix: str | None = None) -> None:
        super().__init__(problem)
        self.fix = fix


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Gives the path of a new file that takes the place of `target` when the block ends well.

    Readers see the old content or the new, never a part; a failure leaves what was there before. The
    new file has the old one's mode; a symbolic link stays, and what it names is replaced.
    """
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".lucid_jax-{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)  # raises what is wrong with the folder
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            mode = temporary.stat().st_mode  # as the umask has it
        temporary.chmod(0o600)  # until it is whole: the old file may have been private
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(target: Path, kind: Kind, config: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays and a description of them."""
    metadata = {
        "format": kind.format,
        "version": kind.version,
        "config": config,
        "sha256": digest(config, tensors),
    }
    with replacing(target) as temporary:
        try:
            safetensors.numpy.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {temporary}, in place of {target}: {error}") from error


def read(
    source: Path, kind: Kind, expected: Callable[[str, int, str], Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Reads what `write` wrote.

    Args:
        source: the file.
        kind: what it must be.
        expected: of the description, the size of the file in bytes and its version, what arrays
            there must be: their dtypes and shapes by name.

    Raises:
        Mismatch: if it is anything else.
        FileNotFoundError: if there is none.
    """
    found = source.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Mismatch("expected a file, got a folder or a device", "name the file")
    try:
        with safetensors.safe_open(source, framework="numpy") as file:
            config, checksum, version = _metadata(file, kind)
            names = expected(config, found.st_size, version)
            _check_tensors(file, names)
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise Mismatch(
            f"expected a complete safetensors file ({error})",
            "it is cut short, damaged or of another format: save it again",
        ) from None
    if digest(config, tensors) != checksum:
        raise Mismatch(f"expected contents of checksum {short(checksum)}, got others")
    return tensors


def _metadata(file: Any, kind: Kind) -> tuple[str, str, str]:
    """The description, still text, the checksum and the version."""
    metadata = file.metadata() or {}
    if metadata.get("format") != kind.format:
        raise Mismatch(
            f"not a {kind.name}: expected format {kind.format!r}, got "
            f"{short(metadata.get('format'))}",
            f"name a file that {kind.written_by} wrote",
        )
    version = metadata.get("version")
    if version not in (kind.version, *kind.older):
        raise Mismatch(
            f"expected format version {kind.version}, got {short(version)}",
            "a newer lucid_jax wrote it: update the package",
        )
    if set(metadata) != {"format", "version", "config", "sha256"}:
        raise Mismatch(
            f"expected metadata format, version, config and sha256, got {short(sorted(metadata))}"
        )
    return metadata["config"], metadata["sha256"], metadata["version"]


def _check_tensors(file: Any, expected: Mapping[str, Any]) -> None:
    """Compares the file's own header with the leaves of an abstract state; reads no tensor."""
    found = set(file.keys())
    if found != set(expected):
        raise Mismatch(
            f"its tensors are not those of its description: {len(set(expected) - found)} missing "
            f"{short(sorted(set(expected) - found))}, {len(found - set(expected))} unknown "
            f"{short(sorted(found - set(expected)))}"
        )
    for name, leaf in expected.items():
        header = file.get_slice(name)
        came = header.get_dtype(), tuple(header.get_shape())
        if came != (STORED[leaf.dtype.name], leaf.shape):
            raise Mismatch(
                f"expected {name} to be {STORED[leaf.dtype.name]} {leaf.shape} by its description, "
                f"got {came[0]} {came[1]}"
            )


def digest(config: str, tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the description and of all tensors, in the order of their names."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def short(value: Any) -> str:
    """A value from a file for a message, however large it is."""
    return _REPR.repr(value)
