"""The chunks of a `PromptCache` in a folder: a file of arrays for each, and an index of them.

A chunk's file is written once and never changes; the index is replaced last, in one step, so that a
save that fails leaves the old one, whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lucid_jax.cache.codecs import bits_dtype, of_no_backend
from lucid_jax.cache.cut_and_join import cut
from lucid_jax.decode.prompt_chunks import ROOT, Content, name_of
from lucid_jax.decode.storage import empty_cache
from lucid_jax.io import checked_file
from lucid_jax.io.checked_file import Mismatch, short
from lucid_jax.io.description import describe, leaves_by_path
from lucid_jax.io.files import CacheFileError

_INDEX = "index.json"
_FORMAT, _VERSION = "lucid_jax.prompts", 1
_KIND = checked_file.Kind(_FORMAT, "1", "file of a prompt cache", written_by="PromptCache.save")


def write(
    folder: Path, model: Any, spec: Any, chunk: int, nodes: Sequence[tuple[str, str, Content]]
) -> None:
    """Writes chunks (name, name before, content), the least recently used first.

    Raises:
        CacheFileError: if files cannot hold caches of this spec.
        OSError: if they cannot be written.
    """
    try:
        about = _about(model, spec, chunk)
    except Mismatch as error:
        raise CacheFileError(f"cannot save to {folder}: {error}; {error.fix}") from None
    folder.mkdir(parents=True, exist_ok=True)
    before = _listed(folder)
    for name, parent, content in nodes:
        file = _file(about, name)
        if not (folder / file).exists():
            config = _config(about, name, parent)
            checked_file.write(folder / file, _KIND, config, leaves_by_path(_bits(content)))
    index = {
        "format": _FORMAT,
        "version": _VERSION,
        "about": about,
        "chunks": [[name, parent] for name, parent, _ in nodes],
    }
    with checked_file.replacing(folder / _INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1), "utf-8")
    for file in before - {_file(about, name) for name, _, _ in nodes}:
        (folder / file).unlink(missing_ok=True)


def read(folder: Path, model: Any, spec: Any) -> tuple[int, Iterator[tuple[str, str, Content]]]:
    """The size of the chunks in a folder, and the chunks, the most recently used first.

    Raises:
        CacheFileError: if they are of another model or cache, or damaged; also while iterating.
        FileNotFoundError: if there is no index.
    """
    try:
        index = _index(folder)
        about = index["about"]
        _check_about(about, _about(model, spec, about["chunk"]))
    except Mismatch as error:
        raise _refusal(folder, error) from None
    return about["chunk"], _chunks(folder, about, index["chunks"], model, spec)


def _chunks(
    folder: Path, about: dict[str, Any], names: list[Any], model: Any, spec: Any
) -> Iterator[tuple[str, str, Content]]:
    like = _abstract(model, spec, about["chunk"])
    known = {ROOT}
    for name, parent in reversed(names):
        source = folder / _file(about, name)
        try:
            if parent not in known or name in known:
                raise Mismatch(f"expected chunk {short(name)} once, after the one it follows")
            content = _content(source, _config(about, name, parent), like)
            if name_of(parent, content.tokens) != name:
                raise Mismatch(f"expected the tokens of chunk {short(name)}, got others")
            if not 0 <= content.tokens.min() <= content.tokens.max() < model.config.vocab_size:
                raise Mismatch(f"expected token ids below {model.config.vocab_size}")
        except FileNotFoundError:
            missing = Mismatch("expected the file of a chunk that the index names, got none")
            raise _refusal(source, missing) from None
        except Mismatch as error:
            raise _refusal(source, error) from None
        known.add(name)
        yield name, parent, content


def _content(source: Path, config: str, like: Content) -> Content:
    stored = leaves_by_path(_bits(like))

    def expected(found: str, *_: Any) -> dict[str, Any]:
        if found != config:
            raise Mismatch(f"expected a chunk described as {short(config)}, got {short(found)}")
        return stored

    tensors = checked_file.read(source, _KIND, expected)
    leaves, structure = jax.tree.flatten(like)
    content: Content = jax.tree.unflatten(
        structure, [x.view(leaf.dtype) for x, leaf in zip(tensors.values(), leaves, strict=True)]
    )
    return content


# --- what a folder is of ---------------------------------------------------------------------------


def _about(model: Any, spec: Any, chunk: int) -> dict[str, Any]:
    state = jax.eval_shape(lambda: empty_cache(model, spec, 1))
    state = state.with_layers(
        layer.replace(spec=layer.spec.but(codec=of_no_backend(layer.spec.codec)))
        for layer in state.layers
    )
    text = json.dumps(describe(state), default=lambda number: number.item())  # NumPy's
    return {"model": _model_digest(model), "cache": json.loads(text), "chunk": chunk}


def _check_about(found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found["model"] != expected["model"]:
        raise Mismatch(
            "it holds what another model computed, or the same one with other weights",
            "load it with the model it was saved for, or prefill again",
        )
    if found["cache"] != expected["cache"]:
        raise Mismatch(
            f"expected chunks of the cache {expected['cache']}, got those of {short(found['cache'])}",
            "load it with the spec it was saved with",
        )


def _model_digest(model: Any) -> str:
    """Tells models apart: a hash of configuration, settings, and a checksum of each weight."""
    digest = hashlib.sha256(repr(model.config).encode())
    for path, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Module):
            settings = sorted(
                (name, value)
                for name, value in vars(module).items()
                if isinstance(value, (bool, int, float, str))
            )
            digest.update(repr((path, settings)).encode())
    params = nnx.state(model, nnx.Param)
    sums = jax.tree.leaves(jax.device_get(_checksums(params)))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), checksum in zip(leaves, sums, strict=True):
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {checksum}".encode())
    return digest.hexdigest()


@jax.jit
def _checksums(params: Any) -> Any:
    """A number of all bits of each weight, uint32 []: one that changes or moves changes it."""

    def of(leaf: jax.Array) -> jax.Array:
        words = jnp.dtype(f"uint{min(32, 8 * leaf.dtype.itemsize)}")
        bits = jnp.ravel(jax.lax.bitcast_convert_type(leaf, words)).astype(jnp.uint32)
        # By an odd number of its own, as otherwise two that change places would go unseen.
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return jax.tree.map(of, params)


def _abstract(model: Any, spec: Any, chunk: int) -> Content:
    """The shapes and dtypes of a chunk."""

    def build() -> Content:
        state = empty_cache(model, spec, 1)
        hidden = model.hidden(jnp.zeros((1, 1), jnp.int32))[0][:, 0]
        return Content(jnp.zeros(chunk, jnp.int32), hidden, cut(state, chunk))

    return jax.eval_shape(build)


# --- files -----------------------------------------------------------------------------------------


def _index(folder: Path) -> dict[str, Any]:
    text = (folder / _INDEX).read_bytes()
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Mismatch(f"expected {_INDEX} to be JSON ({error})") from None
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise Mismatch(f"expected an index of format {_FORMAT!r}, got {short(index)}")
    if index.get("version") != _VERSION:
        raise Mismatch(
            f"expected format version {_VERSION}, got {short(index.get('version'))}",
            "a newer lucid_jax wrote it: update the package",
        )
    about, chunks = index.get("about"), index.get("chunks")
    if (
        not isinstance(about, dict)
        or set(about) != {"model", "cache", "chunk"}
        or type(about["chunk"]) is not int
        or not 1 <= about["chunk"] < 1 << 31
    ):
        raise Mismatch(f"expected what the chunks are of, got {short(about)}")
    if not isinstance(chunks, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        for pair in chunks
    ):
        raise Mismatch(f"expected a list of pairs of names, got {short(chunks)}")
    return index


def _listed(folder: Path) -> set[str]:
    """The files of chunks that a folder's index names; none if it cannot be read."""
    try:
        index = _index(folder)
    except (Mismatch, OSError):
        return set()
    return {_file(index["about"], name) for name, _ in index["chunks"]}


def _file(about: dict[str, Any], name: str) -> str:
    """A chunk's file: of the same tokens, another model or cache makes another chunk."""
    text = json.dumps([about, name], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.safetensors"


def _config(about: dict[str, Any], name: str, parent: str) -> str:
    return json.dumps({"about": about, "name": name, "before": parent}, sort_keys=True)


def _bits(content: Content) -> Content:
    """The chunk with floats as unsigned integers, which files hold whatever their dtype.

    The hidden state always, the cache's where they are narrow.
    """

    def view(leaf: Any, dtype: np.dtype) -> Any:
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(leaf.shape, dtype) if abstract else leaf.view(dtype)

    hidden = view(content.hidden, np.dtype(f"uint{8 * content.hidden.dtype.itemsize}"))
    narrow = jax.tree.map(lambda leaf: view(leaf, bits_dtype(leaf.dtype)), content)
    return narrow.replace(hidden=hidden)


def _refusal(source: Path, error: Mismatch) -> CacheFileError:
    fix = error.fix or "it is damaged or was edited: save it again"
    return CacheFileError(f"cannot load {source}: {error}; {fix}")
