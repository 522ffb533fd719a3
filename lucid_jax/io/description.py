"""What a state is made of, as JSON has it, and the empty state that a description gives.

A description is checked and never trusted: nothing of it is imported or run, and what it asks for is
compared with what there is before anything is made.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_type_hints

import jax
import numpy as np

from lucid_jax.cache import evict
from lucid_jax.cache.axes import ORDERS, STORED
from lucid_jax.cache.codecs import CODECS, Codec
from lucid_jax.cache.growth import shortened, with_room
from lucid_jax.cache.layouts import LAYOUTS, LayerSpec
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tokens import POSITIONS, TokenLayer
from lucid_jax.io import checked_file
from lucid_jax.io.checked_file import Mismatch, short

_TOKENS = {*checked_file.STORED, "float8_e4m3fn", "float8_e5m2"} - {"bool"}
_MAX_COUNT = 2**31 - 1
_STATE_KEYS = {"reads", "owners", "batch_size", "ragged", "layers"}
_LAYER_KEYS = {
    "spec", "num_kv_heads", "head_dim", "value_head_dim", "dtype", "slots", "tracked",
}  # fmt: skip


def describe(state: CacheState) -> dict[str, Any]:
    """What `empty_state` makes an empty state of the same structure from."""
    return {
        "reads": list(state.reads),
        "owners": list(state.owners),
        "batch_size": state.batch_size,
        "ragged": state.ragged,
        # Only where it is not the usual one, so that older versions read what they know.
        **({} if state.axes == STORED else {"axes": state.axes}),
        **({"stacked": True} if state.stacked else {}),
        "layers": [
            {
                "spec": _described(layer.spec, LAYOUTS),
                "num_kv_heads": layer.num_kv_heads,
                "head_dim": layer.packing.head_dim,
                "value_head_dim": layer.packing.value_head_dim,
                "dtype": layer.packing.dtype,
                "slots": layer.num_slots,
                "tracked": layer.tracked,
                **_names(layer),
                **_room(layer),
            }
            for layer in _each_stored(state)
        ],
    }


def _each_stored(state: CacheState) -> list[TokenLayer]:
    """For each stored layer itself, or the stack that it lies in."""
    each = {
        number: layer
        for numbers, layer in zip(state.each_stack, state.layers, strict=True)
        for number in numbers
    }
    return [each[number] for number in range(len(each))]


def _names(layer: TokenLayer) -> dict[str, Any]:
    """The names and widths of leaves that are not keys and values."""
    dims = layer.packing.dims
    if [name for name, _ in dims] == ["key", "value"]:
        return {}
    return {"leaves": [list(pair) for pair in dims]}


def _room(layer: TokenLayer) -> dict[str, Any]:
    """The capacity that a layer has grown to, where its slots do not tell."""
    told = not layer.spec.growable or layer.capacity == _told_capacity(layer.spec, layer.num_slots)
    return {} if told else {"capacity": layer.capacity}


def _told_capacity(spec: LayerSpec, slots: int) -> int:
    """What so many slots tell of a capacity: growth takes powers of two, and then rounds slots up.

    A codec of large groups rounds by more than the capacity; then it is named in the description.
    """
    layout = spec.layout()
    most = slots - (layout.slots - layout.capacity)
    return max(layout.capacity, 1 << max(most.bit_length() - 1, 0))


def _described(value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """A spec or a codec as its class name and its fields."""
    name = type(value).__name__
    if known.get(name) is not type(value):
        raise Mismatch(
            f"expected one of {', '.join(known)}, got {short(value)}",
            "files name what is registered (`lucid_jax.codecs.register`); Orbax takes any pytree",
        )
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    for field, inner in fields.items():
        if isinstance(inner, Codec):
            fields[field] = _described(inner, _codecs(known))
    return {"class": name, **fields}


def _codecs(known: Mapping[str, Any]) -> Mapping[str, Any]:
    """The codecs that one of `known` may hold; one that holds a codec holds none that does."""
    if known is LAYOUTS:
        return CODECS

    def holds_one(codec: type[Codec]) -> bool:  # a field's type may be a class or its name
        return any("Codec" in str(field.type) for field in dataclasses.fields(codec))  # type: ignore[arg-type]

    return {name: one for name, one in CODECS.items() if not holds_one(one)}


def parsed(config: str) -> Any:
    """A description from its text."""
    try:
        return json.loads(config)
    except (ValueError, RecursionError) as error:
        raise Mismatch(f"expected its description to be JSON ({error})") from None


def empty_state(description: Any, room: int) -> CacheState:
    """An abstract state of the structure described, not stacked; it is checked but not trusted.

    Args:
        description: what `describe` made, or anything else.
        room: bytes there are; a description of more is refused before anything is made of it.
    """
    axes = STORED
    if isinstance(description, dict) and "axes" in description:
        description = dict(description)
        axes = description.pop("axes")
        if axes not in ORDERS:
            raise Mismatch(f"expected axes to be one of {ORDERS}, got {short(axes)}")
    if isinstance(description, dict) and "stacked" in description:
        description = dict(description)
        if description.pop("stacked") is not True:
            raise Mismatch("expected stacked to be true where it is named")
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
    return CacheState(layers, reads=reads, owners=owners, axes=axes)


def _empty_layer(description: Any, batch_size: int, ragged: bool, room: int) -> TokenLayer:
    fields = _fields(description, _LAYER_KEYS, "a layer", may={"leaves", "capacity"})
    named = _count(fields["capacity"], "capacity", least=1) if "capacity" in fields else None
    spec = _made(fields["spec"], LAYOUTS, "spec")
    num_kv_heads, head_dim, value_head_dim, slots = (
        _count(fields[name], name, least=1)
        for name in ("num_kv_heads", "head_dim", "value_head_dim", "slots")
    )
    dims: tuple[tuple[str, int], ...] = (("key", head_dim), ("value", value_head_dim))
    if "leaves" in fields:
        dims = _dims(fields["leaves"])
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
    if named is not None and not spec.growable:
        raise Mismatch(f"expected a capacity to be named of layers that grow, got {short(spec)}")
    # No codec takes less than four bits a number.
    if batch_size * num_kv_heads * slots * max(dim for _, dim in dims) > 2 * room:
        raise Mismatch(
            f"its description asks for batch_size={batch_size}, num_kv_heads={num_kv_heads}, "
            f"slots={slots}, head_dim={head_dim}, value_head_dim={value_head_dim}, more than a file "
            f"of {room} bytes can hold"
        )

    def build() -> TokenLayer:
        layer = spec.but(codec=_unrotated(spec.codec)).init(
            batch_size=batch_size, num_kv_heads=num_kv_heads, dims=dims, dtype=dtype, ragged=ragged,
        )  # fmt: skip
        if spec.growable:
            layer = _grown(layer, named or _told_capacity(spec, slots))
        if slots == layer.layout.slots < layer.num_slots:  # an older version's, not in whole tiles
            layer = shortened(layer, layer.layout)
        if tracked and evict.can_evict(layer):
            layer = evict.tracked(layer)
        return layer

    try:
        layer = jax.eval_shape(build)
    except (ValueError, TypeError, OverflowError) as error:  # sizes that do not go together
        raise Mismatch(f"its description of {short(spec)} is impossible: {error}") from None
    if layer.num_slots != slots:
        raise Mismatch(f"expected {layer.num_slots} slots for {short(spec)}, got {slots}")
    if tracked != layer.tracked:
        raise Mismatch(f"tracked={tracked} does not go with {short(spec)}")
    return layer.replace(spec=spec, packing=dataclasses.replace(layer.packing, codec=spec.codec))


def _dims(leaves: Any) -> tuple[tuple[str, int], ...]:
    """The names and widths of a layer's leaves."""
    pairs = [pair for pair in _list(leaves, "leaves") if isinstance(pair, list) and len(pair) == 2]
    names = [name for name, _ in pairs]
    if len(pairs) != len(leaves) or len({str(name) for name in names}) != len(pairs):
        raise Mismatch(f"expected pairs of distinct names and widths, got {short(leaves)}")
    if not all(isinstance(name, str) and name != POSITIONS for name in names):
        raise Mismatch(f"expected leaves to have names, got {short(names)}")
    return tuple((name, _count(dim, f"the width of {name}", least=1)) for name, dim in pairs)


def _unrotated(codec: Any) -> Any:
    """The codec without rotation: stored alike, but tracing it builds no matrix of head_dim squared."""
    fields = {field.name: getattr(codec, field.name) for field in dataclasses.fields(codec)}
    changes = {name: _unrotated(one) for name, one in fields.items() if isinstance(one, Codec)}
    if "rotate" in fields:
        changes["rotate"] = False
    return dataclasses.replace(codec, **changes)


def _grown(layer: TokenLayer, capacity: int) -> TokenLayer:
    """The layer as growth makes it."""
    room = with_room(layer, capacity)
    assert room is not None
    return room


def _made(description: Any, known: Mapping[str, Any], what: str) -> Any:
    """A spec or codec from its class name and its fields."""
    name = description.get("class") if isinstance(description, dict) else None
    if not isinstance(name, str) or name not in known:
        raise Mismatch(
            f"expected {what} to be one of {', '.join(known)}, got {short(description)}",
            "if a codec of one's own, import its module first (`lucid_jax.codecs.register`); if of a "
            "newer lucid_jax, update the package",
        )
    hints = get_type_hints(known[name])  # of one's own class they may be strings or types
    types = {field.name: hints[field.name] for field in dataclasses.fields(known[name])}
    fields = _fields(description, {"class", *types}, name)
    read: dict[Any, Callable[[Any, str], Any]] = {
        int: _count,
        bool: _bool,
        Codec: lambda x, what: _made(x, _codecs(known), what),
    }
    if others := [field for field, kind in types.items() if kind not in read]:
        raise Mismatch(
            f"expected the fields of {name} to be annotated int, bool or Codec, "
            f"got {others[0]}: {types[others[0]]}"
        )
    values = {field: read[kind](fields[field], field) for field, kind in types.items()}
    try:
        return known[name](**values)
    except ValueError as error:
        raise Mismatch(f"its description of {name} is impossible: {error}") from None


def _fields(value: Any, keys: set[str], what: str, may: Collection[str] = ()) -> dict[str, Any]:
    """A description that has all keys, and those it may have."""
    if not isinstance(value, dict) or set(value).difference(may) != keys:
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


def check_structure(empty: CacheState, state: CacheState) -> None:
    """Whether a state is what its description gives."""
    expected, came = leaves_by_path(empty), leaves_by_path(state)
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


def check_counters(state: CacheState) -> None:
    """Whether a state of NumPy arrays can have come about."""
    for name, leaf in leaves_by_path(state).items():
        if leaf.dtype == np.bool_ and leaf.reshape(-1).view(np.uint8).max() > 1:
            raise Mismatch(f"expected {name} to hold 0 or 1")
    for index, layer in enumerate(state.layers):
        start, position, reach = _wide(layer.start, layer.position, layer.reach)
        ok = (start >= 0) & (start <= position) & (position <= reach)
        if layer.bounded:
            ok &= position - start <= layer.capacity
        if layer.tracked:
            stored, floor = _wide(layer.leaves[POSITIONS], layer.floor)
            live = np.arange(layer.num_slots) < (position - start).reshape(-1, 1, 1)
            past = ~live | ((stored >= 0) & (stored < position.reshape(-1, 1, 1)))
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


# What older versions called by other names than paths now have. Leaves of a user's own names keep their
# prefix: one may be named as a counter is.
_PATHS = {
    ".leaves.key": ".key",
    ".leaves.value": ".value",
    f".leaves.{POSITIONS}": ".places.position",
    ".floor": ".places.floor",
    ".tail": ".recent",
}


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their path in files, such as "layers.0.key.codes", in the order of the tree."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for now, before in _PATHS.items():
            name = re.sub(rf"^(\w+\.\d+){re.escape(now)}(?=\.|$)", rf"\1{before}", name)
        named[name] = leaf
    return named
