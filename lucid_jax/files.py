"""Cache states on disk: `save` writes one safetensors file, `load` gives the same state back.

The file holds every leaf under its path ("layers.0.key.codes") and, as JSON in its metadata, what an
empty state of that structure is made of. A file is data only: nothing in it is ever run or imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax import sealed
from lucid_jax.cache.checks import check_alive, is_traced
from lucid_jax.cache.codec import KIVI, Float8, Identity, Int4, Int8
from lucid_jax.cache.contiguous import Contiguous, Dynamic, Static
from lucid_jax.cache.layer import Layer
from lucid_jax.cache.ring import Sliding
from lucid_jax.cache.state import CacheState, checked, nbytes
from lucid_jax.sealed import Mismatch, short

_KIND = sealed.Kind("lucid_jax.cache", "1", "lucid_jax cache file", written_by="lucid_jax.save")

_LAYOUTS: dict[str, Any] = {"Static": Static, "Dynamic": Dynamic, "Sliding": Sliding}
_CODECS: dict[str, Any] = {
    "Identity": Identity,
    "Int8": Int8,
    "Float8": Float8,
    "Int4": Int4,
    "KIVI": KIVI,
}
_TOKENS = {*sealed.STORED, "bfloat16", "float8_e4m3fn", "float8_e5m2"} - {"bool"}
_MAX_COUNT = 2**31 - 1
_STATE_KEYS = {"reads", "owners", "batch_size", "ragged", "layers"}
_LAYER_KEYS = {
    "spec", "num_kv_heads", "head_dim", "value_head_dim", "dtype", "slots", "tracked",
}  # fmt: skip


class CacheFileError(ValueError):
    """A file holds no cache state that can be trusted, or a state is of no kind that files hold."""


def save(path: str | os.PathLike[str], state: CacheState) -> None:
    """Writes a cache state to one file, in one step: a failure leaves what was there before.

    Sharded arrays are gathered on this host. The file is as large as `nbytes(state)`, whatever the
    length, and any safetensors reader can look into it.

    Args:
        path: the file, replaced if it exists; its folder must exist.
        state: any state; it stays valid.

    Raises:
        TypeError: if `state` is no `CacheState`, or is traced.
        RuntimeError: if its buffers were donated.
        CacheFileError: if a spec or codec is not one of this package's, a token dtype is not
            supported, or the leaves are not what `init_cache` makes of them (as under `vmap`).
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lj.save(f"{folder}/prompt.safetensors", state)
        ...     lj.load(f"{folder}/prompt.safetensors").layers[0]
        Contiguous(Static(capacity=4, ...), B=1, H=2, C=4, D=8, float32, length=0)
    """
    if not isinstance(state, CacheState):
        raise TypeError(f"save takes a CacheState, got {type(state).__name__}")
    if is_traced(state):
        raise TypeError(
            "save needs a concrete state: a traced one has no contents yet; "
            "return the state and call save outside jit"
        )
    check_alive(state)
    state = checked(state, False)
    target = Path(path)
    try:
        config = json.dumps(describe(state), default=lambda number: number.item())  # NumPy's
        # A file that could not be read is never written.
        _check_structure(_empty_state(_parsed(config), nbytes(state)), state)
        # On CPU a view into the state's buffers: it must be gone before the caller donates them.
        host = jax.tree.map(lambda leaf: np.asarray(leaf, order="C"), state)
        _check_counters(host)
    except Mismatch as error:
        fix = error.fix or "save states as init_cache and the verbs make them; split one under vmap"
        raise CacheFileError(f"cannot save to {target}: {error}; {fix}") from None
    sealed.write(target, _KIND, config, _named(host))


def load(path: str | os.PathLike[str]) -> CacheState:
    """Reads what `save` wrote: the same structure, bits and dtypes, on the default device.

    Everything is checked before a state is made: what the file says of itself, the names, shapes and
    dtypes of its tensors, a checksum, and the counters. The checksum finds accidents; it is no
    signature, so a file from a stranger may hold any tokens, but never code.

    Args:
        path: a file that `save` wrote.

    Raises:
        CacheFileError: if it is no such file, is damaged, or comes from a newer version.
        FileNotFoundError: if there is none. (Other errors of the system stay `OSError` too.)

    Example:
        >>> import lucid_jax as lj
        >>> lj.load("no/such/file")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    source = Path(path)
    try:
        host = _read(source)
    except Mismatch as error:
        fix = error.fix or "the file is damaged or was edited: save it again"
        raise CacheFileError(f"cannot load {source}: {error}; {fix}") from None
    # A copy: JAX may alias a NumPy array, and could not write to it when it is donated.
    return jax.tree.map(jnp.array, host)


# --- the file --------------------------------------------------------------------------------------


def _read(source: Path) -> CacheState:
    """The state a file holds, of NumPy arrays."""
    empty: Any = None

    def expected(config: str, size: int) -> dict[str, Any]:
        nonlocal empty
        empty = _empty_state(_parsed(config), size)
        return _named(empty)

    tensors = sealed.read(source, _KIND, expected)
    host = jax.tree.unflatten(jax.tree.structure(empty), list(tensors.values()))
    _check_counters(host)
    return host


def _named(state: CacheState) -> dict[str, Any]:
    """Leaves by their path, such as "layers.0.key.codes", in the order of the tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


# --- what a state is made of -----------------------------------------------------------------------


def describe(state: CacheState) -> dict[str, Any]:
    """What `_empty_state` makes an empty state of the same structure from."""
    return {
        "reads": list(state.reads),
        "owners": list(state.owners),
        "batch_size": state.batch_size,
        "ragged": state.ragged,
        "layers": [
            {
                "spec": _described(layer.spec, _LAYOUTS),
                "num_kv_heads": layer.num_kv_heads,
                "head_dim": layer.packing.head_dim,
                "value_head_dim": layer.packing.value_head_dim,
                "dtype": layer.packing.dtype,
                "slots": layer.num_slots,
                "tracked": isinstance(layer, Contiguous) and layer.places is not None,
            }
            for layer in state.layers
        ],
    }


def _described(value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """A spec or a codec as its class name and its fields."""
    name = type(value).__name__
    if known.get(name) is not type(value):
        raise Mismatch(
            f"expected one of {', '.join(known)}, got {short(value)}",
            "files name classes of this package only; Orbax takes any pytree",
        )
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if "codec" in fields:
        fields["codec"] = _described(fields["codec"], _CODECS)
    return {"class": name, **fields}


def _parsed(config: str) -> Any:
    try:
        return json.loads(config)
    except (ValueError, RecursionError) as error:
        raise Mismatch(f"expected its description to be JSON ({error})") from None


def _empty_state(description: Any, room: int) -> CacheState:
    """An abstract state of the structure described, which is checked but not trusted.

    Args:
        description: what `describe` made, or anything else.
        room: bytes there are; a description of more is refused before anything is made of it.
    """
    fields = _fields(description, _STATE_KEYS, "the state")
    batch_size = _count(fields["batch_size"], "batch_size", least=1)
    ragged = _bool(fields["ragged"], "ragged")
    layers = tuple(
        _empty_layer(layer, batch_size, ragged, room) for layer in _list(fields["layers"], "layers")
    )
    reads, owners = (
        tuple(_count(index, name) for index in _list(fields[name], name))
        for name in ("reads", "owners")
    )
    for index, read in enumerate(reads):
        if read >= len(owners) or owners[read] > index:
            raise Mismatch(f"layer {index} reads no layer at or before it")
    # Each stored layer once, in order, by its owner, which reads itself.
    own = tuple(index for index, read in enumerate(reads) if owners[read] == index)
    if own != owners or [reads[index] for index in own] != list(range(len(layers))):
        raise Mismatch(
            f"expected {len(layers)} layers, each owned by one that reads it, got owners "
            f"{short(list(owners))} and reads {short(list(reads))}"
        )
    return CacheState(layers, reads=reads, owners=owners)


def _empty_layer(description: Any, batch_size: int, ragged: bool, room: int) -> Layer:
    fields = _fields(description, _LAYER_KEYS, "a layer")
    spec = _made(fields["spec"], _LAYOUTS, "spec")
    num_kv_heads, head_dim, value_head_dim, slots = (
        _count(fields[name], name, least=1)
        for name in ("num_kv_heads", "head_dim", "value_head_dim", "slots")
    )
    dtype, tracked = fields["dtype"], _bool(fields["tracked"], "tracked")
    if not isinstance(dtype, str) or dtype not in _TOKENS:
        raise Mismatch(
            f"expected a token dtype among {', '.join(sorted(_TOKENS))}, got {short(dtype)}"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise Mismatch(
            f"its tokens are {dtype}, which JAX offers only with 64 bits enabled",
            'call jax.config.update("jax_enable_x64", True) first',
        )
    # No codec takes less than four bits a number.
    if batch_size * num_kv_heads * slots * max(head_dim, value_head_dim) > 2 * room:
        raise Mismatch(
            f"its description asks for batch_size={batch_size}, num_kv_heads={num_kv_heads}, "
            f"slots={slots}, head_dim={head_dim}, value_head_dim={value_head_dim}, more than a file "
            f"of {room} bytes can hold"
        )

    def build() -> Layer:
        layer = _unrotated(spec).init(
            batch_size=batch_size, num_kv_heads=num_kv_heads, head_dim=head_dim,
            value_head_dim=value_head_dim, dtype=dtype, ragged=ragged,
        )  # fmt: skip
        if spec.growable:
            layer = _grown(layer, slots)
        if tracked and isinstance(layer, Contiguous):
            layer = layer.tracked()
        return layer

    try:
        layer = jax.eval_shape(build)
    except (ValueError, TypeError, OverflowError) as error:  # sizes that do not go together
        raise Mismatch(f"its description of {short(spec)} is impossible: {error}") from None
    if layer.num_slots != slots:
        raise Mismatch(f"expected {layer.num_slots} slots for {short(spec)}, got {slots}")
    if tracked != (isinstance(layer, Contiguous) and layer.places is not None):
        raise Mismatch(f"tracked={tracked} does not go with {short(spec)}")
    return layer.replace(spec=spec, packing=dataclasses.replace(layer.packing, codec=spec.codec))


def _unrotated(spec: Any) -> Any:
    """The spec without rotation: stored alike, but tracing it builds no matrix of head_dim squared."""
    if isinstance(spec.codec, Identity):
        return spec
    return dataclasses.replace(spec, codec=dataclasses.replace(spec.codec, rotate=False))


def _grown(layer: Layer, slots: int) -> Layer:
    """The layer as growth makes it, with `slots` slots if they are a number that growth gives."""
    capacity = slots - (layer.num_slots - layer.capacity)
    # Growth takes powers of two, and a codec rounds those up to whole groups of tokens.
    room = layer.with_room(1 << max(capacity.bit_length() - 1, 0))
    assert room is not None
    return room


def _made(description: Any, known: Mapping[str, Any], what: str) -> Any:
    """A spec or codec from its class name and its fields."""
    name = description.get("class") if isinstance(description, dict) else None
    if not isinstance(name, str) or name not in known:
        raise Mismatch(
            f"expected {what} to be one of {', '.join(known)}, got {short(description)}",
            "if a newer lucid_jax wrote it, update the package",
        )
    types = {field.name: field.type for field in dataclasses.fields(known[name])}
    fields = _fields(description, {"class", *types}, name)
    read: dict[str, Callable[[Any, str], Any]] = {
        "int": _count,
        "bool": _bool,
        "Codec": lambda x, what: _made(x, _CODECS, what),
    }
    values = {field: read[str(types[field])](fields[field], field) for field in types}
    try:
        return known[name](**values)
    except ValueError as error:
        raise Mismatch(f"its description of {name} is impossible: {error}") from None


def _fields(value: Any, keys: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        raise Mismatch(
            f"expected {what} to be described by {sorted(keys)}, got {short(value)}",
            "if a newer lucid_jax wrote it, update the package",
        )
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Mismatch(f"expected {what} to be a list, got {short(value)}")
    return value


def _count(value: Any, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _MAX_COUNT:  # a bool is an int to isinstance
        raise Mismatch(
            f"expected {what} to be an integer in [{least}, {_MAX_COUNT}], got {short(value)}"
        )
    return value


def _bool(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise Mismatch(f"expected {what} to be true or false, got {short(value)}")
    return value


# --- what a state may hold -------------------------------------------------------------------------


def _check_structure(empty: CacheState, state: CacheState) -> None:
    """Whether a state is what its description gives."""
    expected, came = _named(empty), _named(state)
    for name, leaf in expected.items():
        other = came.get(name)
        if not isinstance(other, (jax.Array, np.ndarray)):
            raise Mismatch(f"expected an array at {name}, got {short(other)}")
        if (other.dtype, other.shape) != (leaf.dtype, leaf.shape):
            raise Mismatch(
                f"expected {name} to be {leaf.dtype} {leaf.shape}, as init_cache makes it, got "
                f"{other.dtype} {other.shape}"
            )
    structure: Any = jax.tree.structure(empty)
    if structure != jax.tree.structure(state):
        raise Mismatch("expected the structure that init_cache makes; its parts were replaced")


def _check_counters(state: CacheState) -> None:
    """Whether a state of NumPy arrays can have come about."""
    for name, leaf in _named(state).items():
        if leaf.dtype == np.bool_ and leaf.reshape(-1).view(np.uint8).max() > 1:
            raise Mismatch(f"expected {name} to hold 0 or 1")
    for index, layer in enumerate(state.layers):
        start, position, reach = _wide(layer.start, layer.position, layer.reach)
        ok = (start >= 0) & (start <= position) & (position <= reach)
        if layer.bounded:
            ok &= position - start <= layer.capacity
        if isinstance(layer, Contiguous) and layer.places is not None:
            place, floor = _wide(layer.places.position, layer.places.floor)
            live = np.arange(layer.num_slots) < (position - start).reshape(-1, 1, 1)
            past = ~live | ((place >= 0) & (place < position.reshape(-1, 1, 1)))
            ok &= np.all(past) & (floor >= 0) & (floor <= position)
        if not np.all(ok):
            raise Mismatch(
                f"layer {index} cannot be: expected 0 <= start <= position <= reach, a length of at "
                f"most {layer.capacity} and places before position, got start "
                f"{short(start.tolist())}, position {short(position.tolist())}, reach "
                f"{short(reach.tolist())}"
            )


def _wide(*counters: Any) -> list[np.ndarray]:
    """Counters to calculate with: no difference overflows."""
    return [np.asarray(counter).astype(np.int64) for counter in counters]
