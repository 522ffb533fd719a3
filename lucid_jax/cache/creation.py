"""`init_cache`: an empty state from specs, allocated once, where its shardings say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lucid_jax.cache.allocation import check_memory, refusing
from lucid_jax.cache.argument_checks import (
    check_count,
    is_traced,
)
from lucid_jax.cache.axes import STORED, check_axes
from lucid_jax.cache.introspection import _nbytes
from lucid_jax.cache.layouts import LAYOUTS, LayerSpec
from lucid_jax.cache.sharding import (
    MeshAxes,
    as_axes,
    shardings,
    with_shardings,
)
from lucid_jax.cache.stacked import (
    broadcast,
)
from lucid_jax.cache.state import CacheState, Shared
from lucid_jax.cache.tokens import POSITIONS, TokenLayer

Shape = tuple[tuple[str, Any], ...]  # what `LayerSpec.init` takes, by name


def init_cache(
    spec: LayerSpec | Sequence[LayerSpec | Shared],
    *,
    batch_size: int,
    num_kv_heads: int | Sequence[int],
    head_dim: int | Mapping[str, int] | Sequence[int | Mapping[str, int]],
    num_layers: int | None = None,
    value_head_dim: int | Sequence[int] | None = None,
    dtype: DTypeLike = jnp.float32,
    ragged: bool = False,
    axes: str = STORED,
    stacked: bool = False,
    sharding: PartitionSpec | NamedSharding | None = None,
) -> CacheState:
    """An empty cache.

    Args:
        spec: one spec for all layers, or a list with one per layer; `Shared(i)` in it makes a layer
            read what layer i stores.
        batch_size: B, rows.
        num_kv_heads: H, key/value heads; or a list with one number per layer.
        head_dim: D, of keys; of values too unless `value_head_dim` says otherwise. Or the names and
            widths of other leaves, such as {"latent": 512, "rope": 64}, for `update_leaves`; values
            are then those of a leaf `value`, or else of the first. Or one per layer.
        num_layers: number of layers; may be left out when `spec` is a list.
        value_head_dim: Dv, if values are not as wide as keys. Or one per layer.
        dtype: dtype of the tokens: float8_e4m3fn, float8_e5m2, float16, bfloat16, float32, float64,
            integers or booleans; codecs that quantize take floats.
        ragged: give each row its own length (batches of unequal prompts, speculative decoding).
        axes: the order of axes of all tokens, queries and outputs that verbs of this state take and
            return: "BHTD", or "BTHD" for (batch, seq, heads, head_dim). Where as many tokens as heads
            come, no shape tells them apart. Masks, biases and scores stay (B, N, T, C), and storage
            (B, H, T, D); `lucid_jax.nn` and decoders take either state.
        stacked: keep layers of one spec and shape in one layer state, leaves (L, B, H, S, ...), for
            models that scan over their layers: verbs then take a traced `layer_idx` too (of a cache of
            several kinds a `LayerLike`), and a `scan` that carries the state writes in place. Same
            tokens, same results; `stack` and `unstack` turn one into the other.
        sharding: `PartitionSpec(batch, heads)`: the axes of the mesh in force (`jax.set_mesh`) that
            rows and key/value heads are divided over; or a `NamedSharding` of another mesh. Buffers
            are made where they belong. See `shardings`.

    Raises:
        ValueError: for a size below 1, a list that disagrees with the number of layers, a sharding as
            `shardings` refuses, or what is more than int32 can count or, called eagerly, the device
            can hold.
        TypeError: for what is no spec, or no sharding.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(16), num_layers=2, batch_size=1, num_kv_heads=4, head_dim=8
        ... )
        >>> state.layers[0].key.shape, lj.nbytes(state)
        ((1, 4, 16, 8), 8218)
    """
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        specs = list(spec)
        if num_layers is not None and num_layers != len(specs):
            raise ValueError(
                f"num_layers={num_layers} but {len(specs)} specs were given; "
                "give one spec for all layers, or one per layer"
            )
    else:
        if num_layers is None:
            raise ValueError("num_layers is needed when one spec stands for all layers")
        specs = [spec] * check_count(num_layers, "num_layers", 1)
    if not specs:
        raise ValueError("a cache needs at least one layer, got an empty list of specs")
    batch_size = check_count(batch_size, "batch_size", 1)
    heads = _each_layer(num_kv_heads, "num_kv_heads", len(specs))
    dims = _dims(head_dim, value_head_dim, len(specs))
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    stores: list[tuple[LayerSpec, Shape]] = [
        (_as_spec(one), (("num_kv_heads", heads[index]), ("dims", dims[index])))
        for index, one in enumerate(specs)
        if not isinstance(one, Shared)
    ]
    reads, owners = _readers(specs, heads, dims)
    common = {"batch_size": batch_size, "dtype": dtype, "ragged": ragged}
    alike: dict[Any, list[int]] = {}
    for number, store in enumerate(stores):
        alike.setdefault(store if stacked else number, []).append(number)
    stacks = tuple(map(tuple, alike.values())) if stacked else None
    layers = _allocated(
        [stores[one[0]] for one in alike.values()],
        None if stacks is None else [len(one) for one in stacks],
        common,
        None if sharding is None else as_axes(sharding),
    )
    return CacheState(
        layers, reads=tuple(reads), owners=tuple(owners), axes=check_axes(axes), stacks=stacks
    )


def _readers(
    specs: Sequence[LayerSpec | Shared],
    heads: Sequence[int],
    dims: Sequence[tuple[tuple[str, int], ...]],
) -> tuple[list[int], list[int]]:
    """Which stored layer each layer reads, and which layer each stored one is."""
    usual = {"key": "head_dim", "value": "value_head_dim"}
    each = [
        [("num_kv_heads", n), *((usual.get(name, "head_dim"), dim) for name, dim in widths)]
        for n, widths in zip(heads, dims, strict=True)
    ]
    owners: list[int] = []
    reads: list[int] = []
    for index, one in enumerate(specs):
        if not isinstance(one, Shared):
            reads.append(len(owners))
            owners.append(index)
            continue
        target = check_count(one.layer_idx, "layer_idx of Shared")
        if target not in owners:
            raise ValueError(
                f"layer {index} is Shared({target}), but layer {target} is not an earlier layer "
                f"that stores tokens; those are {owners}"
            )
        for (name, own), (_, other) in zip(each[index], each[target], strict=False):
            if own != other:
                raise ValueError(
                    f"layer {index} is Shared({target}), so its {name} must be that of layer "
                    f"{target}, {other}, got {own}"
                )
        reads.append(owners.index(target))
    return reads, owners


def _as_spec(spec: LayerSpec) -> LayerSpec:
    """Checks what was given as a spec."""
    if isinstance(spec, type) or not callable(getattr(spec, "init", None)):
        name = getattr(spec, "__name__", "")
        usual = {name: f"{name}({_needed(one)})" for name, one in LAYOUTS.items()}
        given = f"the class {name}" if isinstance(spec, type) else repr(spec)
        raise TypeError(
            f"spec must say how a layer stores tokens: {usual.get(name) or ', '.join(usual.values())}"
            f", got {given}"
        )
    return spec


def _needed(spec: Any) -> str:
    """What a spec must be told, in numbers that would do."""
    fields = dataclasses.fields(spec)
    return ", ".join("256" for field in fields if field.default is dataclasses.MISSING)


def _allocated(
    stores: Sequence[tuple[LayerSpec, Shape]],
    stacks: Sequence[int] | None,
    common: dict[str, Any],
    axes: MeshAxes | None,
) -> tuple[TokenLayer, ...]:
    """Empty layers of specs and their shapes, if there is memory for all of them.

    If they are to be stacks, `stacks` says of how many layers.
    """
    counts = [None] * len(stores) if stacks is None else stacks
    makers: list[Callable[[], TokenLayer]] = [
        partial(spec.init, **common, **dict(shape))
        if axes is None and count is None
        else partial(_init_at_once, spec, (*common.items(), *shape), count, axes)
        for (spec, shape), count in zip(stores, counts, strict=True)
    ]
    probe = jnp.zeros((), bool)
    if is_traced(probe):
        return tuple(make() for make in makers)
    alike = dict(zip(zip(stores, counts, strict=True), makers, strict=True))
    sizes = {key: _nbytes(jax.eval_shape(make)) for key, make in alike.items()}
    total = sum(sizes[key] for key in zip(stores, counts, strict=True))
    total //= 1 if axes is None else axes.ways
    what = f"a cache of {sum(count or 1 for count in counts)} layers such as {stores[0][0]}"
    check_memory(total, next(iter(probe.devices())), what)
    with refusing(what, total), nullcontext() if axes is None else axes.in_force():
        return tuple(make() for make in makers)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _init_at_once(
    spec: LayerSpec, sizes: Shape, layers: int | None, axes: MeshAxes | None
) -> TokenLayer:
    """A layer, or a stack of them, where it belongs."""
    layer = spec.init(**dict(sizes))
    layer = layer if layers is None else broadcast(layer, layers)
    if axes is None:
        return layer
    return with_shardings(layer, shardings(layer, axes.mesh, batch=axes.batch, heads=axes.heads))


def _dims(head_dim: Any, value_head_dim: Any, num_layers: int) -> list[tuple[tuple[str, int], ...]]:
    """The names and widths of each layer's leaves."""
    given = head_dim if isinstance(head_dim, Sequence) else [head_dim] * num_layers
    named = [isinstance(one, Mapping) for one in given]
    if value_head_dim is not None and any(named):
        raise ValueError("head_dim= names the leaves of a layer; leave value_head_dim= out")
    if not any(named):
        dims = _each_layer(head_dim, "head_dim", num_layers)
        values = dims
        if value_head_dim is not None:
            values = _each_layer(value_head_dim, "value_head_dim", num_layers)
        pairs = zip(dims, values, strict=True)
        return [(("key", dim), ("value", value_dim)) for dim, value_dim in pairs]
    if len(given) != num_layers:
        raise ValueError(
            f"head_dim has {len(given)} entries for {num_layers} layers; give one for all, or one per "
            "layer"
        )
    return [
        _named_dims(one if isinstance(one, Mapping) else {"key": one, "value": one})
        for one in given
    ]


def _named_dims(dims: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The leaves that one layer is given by name."""
    bad = [name for name in dims if not isinstance(name, str) or name == POSITIONS]
    if bad or not dims:
        raise ValueError(
            f"head_dim must name at least one leaf, by strings other than {POSITIONS!r}, got "
            f"{list(dims)}"
        )
    return tuple((name, check_count(dim, f"head_dim of {name}", 1)) for name, dim in dims.items())


def _each_layer(size: Any, name: str, num_layers: int) -> list[int]:
    """A size given once, or once per layer, as a list."""
    sizes = list(size) if isinstance(size, Sequence) else [size] * num_layers
    if len(sizes) != num_layers:
        raise ValueError(
            f"{name} has {len(sizes)} entries for {num_layers} layers; give one number, or one "
            "per layer"
        )
    return [check_count(one, name, 1) for one in sizes]
