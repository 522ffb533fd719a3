"""How programs run on a mesh: by each device for what it holds, or divided by the compiler.

Under a mesh whose axes are `Explicit`, as `jax.make_mesh` makes them, an array's type says where it
lies, and each operation must be able to say it of its result. A verb says it of what it returns. On
the inside its axes are `Auto`, and the compiler divides the work as it does under any `Auto` mesh. Or
they are `Manual`, where rows and heads do not know of each other, and each device does its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lucid_jax.cache.sharding import (
    Axis,
    MeshAxes,
    axes_divided,
    explicit_axes,
    is_layer,
    names_of,
    shardings,
    ways_of,
)
from lucid_jax.cache.tokens import TokenLayer

R = TypeVar("R")

Parts = tuple[tuple[Any, ...], Any]
"""`PartitionSpec`s in place of arrays: of arguments after the layer, and of the result."""

PartsOf = Callable[..., Parts | None]  # of axes, specs of the layer and the arguments after it

_LOOP: ContextVar[MeshAxes | None] = ContextVar("how a decoder's loop has divided its layers")


def on_each_device(run: Callable[..., R], parts: PartsOf) -> Callable[..., R]:
    """`run(layer, ...)`, in which rows and heads do not know of each other, on a mesh by each device.

    So where types say how the layer is divided, or the decoder's loop around does. Each device goes to
    the end of its own rows, waits for no other, and may run kernels, which the compiler cannot divide.
    Elsewhere it is `in_auto_axes`. Results lie as they do there.

    Args:
        run: the function.
        parts: of `(axes, specs of the layer, ...)` the `PartitionSpec`s of what comes after the layer
            and of the result; None if it is for the compiler all the same. Arrays of two axes are
            taken for places of each row, those of more for (B or 1, heads or 1, ...).
    """
    divided = in_auto_axes(run)

    @functools.wraps(run)
    def wrapped(layer: TokenLayer, *args: Any, **static: Any) -> R:
        axes = _axes_of(layer, args)
        if axes is None:
            return divided(layer, *args, **static)
        mesh, explicit = axes.mesh, explicit_axes(axes.mesh)
        # All query heads read the only head there is of keys, which is not divided.
        heads = axes.heads if layer.num_kv_heads > 1 else None
        where = shardings(layer, mesh, batch=axes.batch, heads=heads)
        of_layer = jax.tree.map(lambda x: x.spec, where)
        found = parts(axes, of_layer, *args)
        if found is None:
            return divided(layer, *args, **static)
        of_args, of_result = found
        given, structure = jax.tree.flatten((layer, *args))
        every = jax.tree.leaves((of_layer, *of_args))
        arrays = {
            i: jnp.asarray(x) for i, x in enumerate(given) if isinstance(x, jax.Array | np.ndarray)
        }
        specs = {i: every[i] for i in arrays}
        if explicit:
            arrays = {i: jax.reshard(x, NamedSharding(mesh, specs[i])) for i, x in arrays.items()}

        def here(arrays: dict[int, jax.Array]) -> R:
            mine = [arrays.get(i, x) for i, x in enumerate(given)]
            return run(*jax.tree.unflatten(structure, mine), **static)

        out: R = jax.shard_map(here, mesh=mesh, in_specs=(specs,), out_specs=of_result)(arrays)
        # Arguments may have come divided otherwise.
        return _divided_like((layer, *args), out, mesh, {}, by_heads=True) if explicit else out

    return wrapped


def _axes_of(layer: TokenLayer, args: Any) -> MeshAxes | None:
    """The axes over which a device can do what it holds of a layer by itself; None where it cannot."""
    arrays: list[Any] = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array | np.ndarray)]
    mesh = _mesh_of((layer, args))
    axes = _axes_in_loop(layer) if mesh is None else _axes_by_types(layer, mesh)
    if layer.checked or axes is None:  # checks are of all rows
        return None
    if not layer.ragged and axes.batch is not None and any(x.ndim == 2 for x in arrays):
        return None  # places of each row, and one length, the largest of all
    if mesh is not None and layer.num_kv_heads == 1:  # all queries read it, wherever they are
        several = (spec[1] for spec in map(_spec, arrays) if len(spec) > 1)
        axes = axes._replace(heads=next((x for x in several if ways_of(mesh, x) > 1), None))
    # Along what is left of a mesh something else may be divided: queries of a head, or what vmap maps.
    every = [*names_of(axes.batch), *names_of(axes.heads)]
    return axes if len({*every}) == len(every) and axes.ways == axes.mesh.size > 1 else None


def _axes_by_types(layer: TokenLayer, mesh: AbstractMesh) -> MeshAxes | None:
    """The axes that all leaves of a layer are divided over, if by rows and heads alone."""
    if len(explicit_axes(mesh)) < len(mesh.axis_names):
        return None
    found = set()
    for leaf in jax.tree.leaves(layer):
        before, divided = axes_divided(leaf, layer.buffer)
        if divided < 2:
            continue
        spec = (*_spec(leaf), *[None] * leaf.ndim)[: leaf.ndim]
        if any(axis is not None for axis in (*spec[:before], *spec[before + 2 :])):
            return None
        found.add(spec[before : before + 2])
    if len(found) != 1:
        return None
    # Axes of one device divide nothing.
    batch, heads = (axis if ways_of(mesh, axis) > 1 else None for axis in found.pop())
    return MeshAxes(mesh, batch, heads)


def _axes_in_loop(layer: TokenLayer) -> MeshAxes | None:
    """The axes that the decoder's loop around has divided its layers over."""
    axes = _LOOP.get(None)
    if axes is None or axes.mesh != jax.sharding.get_abstract_mesh():
        return None
    rows, heads = ways_of(axes.mesh, axes.batch), ways_of(axes.mesh, axes.heads)
    return axes if layer.batch_size % rows == 0 and layer.num_kv_heads % heads == 0 else None


@contextmanager
def _tracing_loop(axes: MeshAxes | None) -> Iterator[None]:
    """While a decoder's loop is traced whose layers are divided so."""
    token = _LOOP.set(axes)
    try:
        yield
    finally:
        _LOOP.reset(token)


def in_auto_axes(run: Callable[..., R], *, by_heads: bool = True) -> Callable[..., R]:
    """The function, with the `Explicit` axes of the mesh its arguments lie on left to the compiler.

    Results lie where arguments do: layers as the layers that came in, in order; other arrays (B,
    heads, ...), or (B, ...) if rows are ragged, as the first array of more than two axes that came with
    them, or else as what the first layer stores. Of a decoder's loop, not `by_heads`, whose first two
    arguments are a model, layers are those of the others, and arrays of more than two axes are whole
    on each device.
    """

    @functools.wraps(run)
    def wrapped(*args: Any, **static: Any) -> R:
        mesh = _mesh_of(args)
        if mesh is None:
            # What `run` makes by itself must not lie on the mesh in force either.
            with _off_meshes():
                return run(*args, **static)
        auto = mesh.update_axis_types(dict.fromkeys(explicit_axes(mesh), AxisType.Auto))

        given, structure = jax.tree.flatten(args)
        every = set() if by_heads else {_axes_by_types(x, mesh) for x in _layers_of(args)}
        alike = every.pop() if len(every) == 1 else None
        loop = None if alike is None else alike._replace(mesh=auto)
        with jax.sharding.use_abstract_mesh(auto), _tracing_loop(loop):
            hidden = [
                jax.reshard(x, PartitionSpec()) if isinstance(x, jax.Array) else x for x in given
            ]
            out = run(*jax.tree.unflatten(structure, hidden), **static)
        through = {id(x): y for x, y in zip(hidden, given, strict=True)}
        return _divided_like(args if by_heads else args[2:], out, mesh, through, by_heads)

    return wrapped


def _divided_like(
    args: Any, out: R, mesh: Mesh | AbstractMesh, through: dict[int, jax.Array], by_heads: bool
) -> R:
    """`out` divided as `args` are, see `in_auto_axes`; what was handed through is what was given."""
    given, layers = jax.tree.leaves(args, is_leaf=is_layer), _layers_of(args)
    mixed = [jax.tree.leaves(x.leaves[x.packing.mixed])[0] for x in layers]
    stored = [_spec(leaf)[x.buffer.lead :] for x, leaf in zip(layers, mixed, strict=True)]
    others = [_spec(x) for x in given if isinstance(x, jax.Array) and x.ndim > 2]
    ragged = any(x.ragged for x in layers)
    before = iter(layers)

    def put(leaf: jax.Array, spec: tuple[Axis, ...]) -> jax.Array:
        if id(leaf) in through:
            return through[id(leaf)]
        fits = (
            None if size % ways_of(mesh, axis) else axis
            for size, axis in zip(leaf.shape, spec, strict=False)
        )
        laid: jax.Array = jax.reshard(leaf, NamedSharding(mesh, PartitionSpec(*fits)))
        return laid

    def by_axes(leaf: jax.Array, spec: tuple[Axis, ...]) -> jax.Array:
        return put(leaf, spec[: 2 if leaf.ndim > 2 else ragged])

    def like(new: Any) -> Any:
        if not is_layer(new):
            many = others if by_heads else [()]
            return by_axes(new, (*(many if new.ndim > 2 else ()), *stored)[0])
        leaves, olds = jax.tree.leaves(new), jax.tree.leaves(next(before))
        if [x.ndim for x in leaves] == [x.ndim for x in olds]:
            laid = [put(x, _spec(y)) for x, y in zip(leaves, olds, strict=True)]
        else:  # as where compact has put positions beside the tokens
            where = [axes_divided(x, new.buffer) for x in leaves]
            laid = [
                put(x, ((None,) * before + stored[0][:divided]) if divided else ())
                for x, (before, divided) in zip(leaves, where, strict=True)
            ]
        return jax.tree.unflatten(jax.tree.structure(new), laid)

    where_given: R = jax.tree.map(like, out, is_leaf=is_layer)
    return where_given


def _layers_of(args: Any) -> list[TokenLayer]:
    return [x for x in jax.tree.leaves(args, is_leaf=is_layer) if is_layer(x)]


def _spec(leaf: jax.Array) -> tuple[Axis, ...]:
    """The mesh axes of an array, as far as its type names them."""
    return tuple(jax.typeof(leaf).sharding.spec)


def _mesh_of(args: Any) -> AbstractMesh | None:
    """The mesh with `Explicit` axes that arguments lie on, if there is one."""
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, jax.Array):
            mesh: AbstractMesh = jax.typeof(leaf).sharding.mesh
            if explicit_axes(mesh):
                return mesh
    return None


def _off_meshes() -> AbstractContextManager[object]:
    """A context in which new arrays lie on no mesh, if they would on one with `Explicit` axes."""
    if not explicit_axes(jax.sharding.get_abstract_mesh()):
        return nullcontext()
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
