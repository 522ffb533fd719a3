"""Where a state lies on a mesh: `shardings`, and verbs whose results lie where their inputs do.

Under a mesh whose axes are `Explicit`, as `jax.make_mesh` makes them, an array's type says where it
lies, and each operation must be able to say it of its result. A verb says it of what it returns. On
the inside the axes are `Auto`, and the compiler divides the work as it does under any `Auto` mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.tokens import TokenLayer

Axis = str | tuple[str, ...] | None  # a mesh axis, or several, or none
State = TypeVar("State")  # a pytree of layers
R = TypeVar("R")


def shardings(
    state: State,
    mesh: Mesh | AbstractMesh | None = None,
    *,
    batch: Axis = None,
    heads: Axis = None,
) -> State:
    """How a whole state, of any layout and codec, is divided over a mesh by rows and by heads.

    For `jax.device_put`, `jit(in_shardings=, out_shardings=)` and checkpoints.

    Args:
        state: a `CacheState`, an `EncoderDecoderState`, or what `jax.eval_shape` gives of one.
        mesh: the mesh; None takes the one in force (`jax.set_mesh`).
        batch: the mesh axis, or axes, that rows are divided over.
        heads: the mesh axis, or axes, that key/value heads are divided over.

    Returns:
        A pytree like `state`, with a `NamedSharding` in place of each array.

    Raises:
        ValueError: if there is no mesh, it has no such axis, or rows or heads do not divide evenly.

    Example:
        >>> import jax, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8, lj.codecs.Int8()), num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8
        ... )
        >>> mesh = jax.make_mesh((1, 1), ("dp", "tp"))
        >>> where = lj.shardings(state, mesh, batch="dp", heads="tp")
        >>> tuple(where.layers[0].key["scale"].spec), tuple(where.layers[0].position.spec)
        (('dp', 'tp'), ())
        >>> state = jax.device_put(state, where)
    """
    mesh = _in_force() if mesh is None else mesh
    axes = {"batch": batch, "heads": heads}
    _check_axes(mesh, axes)

    def of_leaf(leaf: Any, buffer: Rows) -> NamedSharding:
        before, divided = _divided(leaf, buffer)
        for name, size in zip(list(axes)[:divided], leaf.shape[before:], strict=False):
            if size % _ways(mesh, axes[name]):
                raise ValueError(
                    f"{name}={axes[name]!r} divides over {_ways(mesh, axes[name])} devices, but the "
                    f"state has {size} {'rows' if name == 'batch' else 'key/value heads'}; choose an "
                    "axis whose size divides that, or None to keep a copy on each device"
                )
        each = (axes[name] for name in list(axes)[:divided])
        return NamedSharding(mesh, PartitionSpec(*[None] * before, *each))

    def of_layer(layer: Any) -> Any:
        buffer = layer.buffer if _is_layer(layer) else Rows()
        return jax.tree.map(partial(of_leaf, buffer=buffer), layer)

    where: State = jax.tree.map(of_layer, state, is_leaf=_is_layer)
    return where


def _divided(leaf: Any, buffer: Rows) -> tuple[int, int]:
    """Of a leaf or a counter, the axes before those that are divided, rows and heads, and how many."""
    if leaf.ndim > 2 + buffer.lead:
        return buffer.lead, 2
    return (buffer.counter_lead, 1) if leaf.ndim > buffer.counter_lead else (0, 0)


class MeshAxes(NamedTuple):
    """The axes of a mesh that rows and heads are divided over."""

    mesh: Mesh | AbstractMesh
    batch: Axis
    heads: Axis

    @property
    def ways(self) -> int:
        """Over how many devices."""
        return _ways(self.mesh, self.batch) * _ways(self.mesh, self.heads)

    def in_force(self) -> AbstractContextManager[object]:
        """A context in which a program without arguments runs on the devices of the mesh."""
        return jax.set_mesh(self.mesh) if isinstance(self.mesh, Mesh) else nullcontext()


def as_axes(sharding: Any) -> MeshAxes:
    """What `init_cache` is given as `sharding=`."""
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
    elif isinstance(sharding, PartitionSpec):
        mesh, spec = _in_force(), sharding
    else:
        raise TypeError(
            "sharding must be a PartitionSpec(batch, heads) for the mesh in force, or a "
            f"NamedSharding with one, got {type(sharding).__name__}"
        )
    if any(axis is not None for axis in spec[2:]):
        raise ValueError(
            f"sharding names mesh axes for rows and for heads, PartitionSpec(batch, heads); slots and "
            f"widths are not divided, got {spec}"
        )
    batch, heads = (*spec, None, None)[:2]
    _check_axes(mesh, {"batch": batch, "heads": heads})
    return MeshAxes(mesh, batch, heads)


def with_shardings(tree: State, where: State) -> State:
    """Arrays that are being traced, to lie `where` says: a pytree like `shardings` gives."""

    def put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        laid: jax.Array = (
            jax.reshard(leaf, sharding)
            if _explicit(sharding.mesh)
            else jax.lax.with_sharding_constraint(leaf, sharding)
        )
        return laid

    result: State = jax.tree.map(put, tree, where)
    return result


def of_tokens(tokens: jax.Array) -> NamedSharding | None:
    """How a layer is divided that tokens (B, H, T, D) go to, as `init_cache` takes it.

    None: on one device, or, while tracing, as the compiler chooses.
    """
    traced = isinstance(tokens, jax.core.Tracer)
    where = jax.typeof(tokens).sharding if traced else tokens.sharding
    if not isinstance(where, NamedSharding) or where.mesh.size == 1:
        return None
    if traced and not _explicit(where.mesh):
        return None
    return NamedSharding(where.mesh, PartitionSpec(*where.spec[:2]))


def of_one_row(sharding: Any) -> NamedSharding | None:
    """How `sharding=`, if given, divides a state of one row: by heads alone."""
    if sharding is None:
        return None
    axes = as_axes(sharding)
    return NamedSharding(axes.mesh, PartitionSpec(None, axes.heads))


def divided_like_tokens(layer: TokenLayer, tokens: jax.Array) -> TokenLayer:
    """A concrete layer; if it was never placed, divided as the tokens are that it is about to take."""
    where = of_tokens(tokens)
    if where is None or layer.position.committed:
        return layer
    batch, heads = (*where.spec, None, None)[:2]
    divided = shardings(layer, where.mesh, batch=batch, heads=heads)
    laid: TokenLayer = jax.device_put(layer, divided)
    return laid


def divided_as_rows(state: Any, array: Any) -> Any:
    """An array (B, ...) of the host, on the devices that hold those rows of a ragged state."""
    first = state.layers[0]
    where, before = first.position.sharding, first.buffer.counter_lead
    if not isinstance(where, NamedSharding):
        return array
    rows = PartitionSpec(*where.spec[before : before + 1])
    return jax.device_put(array, NamedSharding(where.mesh, rows))


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
        auto = mesh.update_axis_types(dict.fromkeys(_explicit(mesh), AxisType.Auto))

        given, structure = jax.tree.flatten(args)
        with jax.sharding.use_abstract_mesh(auto):
            hidden = [
                jax.reshard(x, PartitionSpec()) if isinstance(x, jax.Array) else x for x in given
            ]
            out = run(*jax.tree.unflatten(structure, hidden), **static)
        through = {id(x): y for x, y in zip(hidden, given, strict=True)}
        return _divided_like(args if by_heads else args[2:], out, mesh, through, by_heads)

    return wrapped


def _divided_like(
    args: Any, out: R, mesh: AbstractMesh, through: dict[int, jax.Array], by_heads: bool
) -> R:
    """`out` divided as `args` are, see `in_auto_axes`; what was handed through is what was given."""
    given = jax.tree.leaves(args, is_leaf=_is_layer)
    layers = [x for x in given if _is_layer(x)]
    mixed = [jax.tree.leaves(x.leaves[x.packing.mixed])[0] for x in layers]
    stored = [_spec(leaf)[x.buffer.lead :] for x, leaf in zip(layers, mixed, strict=True)]
    others = [_spec(x) for x in given if isinstance(x, jax.Array) and x.ndim > 2]
    ragged = any(x.ragged for x in layers)
    before = iter(layers)

    def put(leaf: jax.Array, spec: tuple[Axis, ...]) -> jax.Array:
        if id(leaf) in through:
            return through[id(leaf)]
        fits = (
            None if size % _ways(mesh, axis) else axis
            for size, axis in zip(leaf.shape, spec, strict=False)
        )
        laid: jax.Array = jax.reshard(leaf, NamedSharding(mesh, PartitionSpec(*fits)))
        return laid

    def by_axes(leaf: jax.Array, spec: tuple[Axis, ...]) -> jax.Array:
        return put(leaf, spec[: 2 if leaf.ndim > 2 else ragged])

    def like(new: Any) -> Any:
        if not _is_layer(new):
            many = others if by_heads else [()]
            return by_axes(new, (*(many if new.ndim > 2 else ()), *stored)[0])
        leaves, olds = jax.tree.leaves(new), jax.tree.leaves(next(before))
        if [x.ndim for x in leaves] == [x.ndim for x in olds]:
            laid = [put(x, _spec(y)) for x, y in zip(leaves, olds, strict=True)]
        else:  # as where compact has put positions beside the tokens
            where = [_divided(x, new.buffer) for x in leaves]
            laid = [
                put(x, ((None,) * before + stored[0][:divided]) if divided else ())
                for x, (before, divided) in zip(leaves, where, strict=True)
            ]
        return jax.tree.unflatten(jax.tree.structure(new), laid)

    where_given: R = jax.tree.map(like, out, is_leaf=_is_layer)
    return where_given


def _is_layer(x: Any) -> bool:
    return isinstance(x, TokenLayer)


def _spec(leaf: jax.Array) -> tuple[Axis, ...]:
    """The mesh axes of an array, as far as its type names them."""
    return tuple(jax.typeof(leaf).sharding.spec)


def _mesh_of(args: Any) -> AbstractMesh | None:
    """The mesh with `Explicit` axes that arguments lie on, if there is one."""
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, jax.Array):
            mesh: AbstractMesh = jax.typeof(leaf).sharding.mesh
            if _explicit(mesh):
                return mesh
    return None


def _off_meshes() -> AbstractContextManager[object]:
    """A context in which new arrays lie on no mesh, if they would on one with `Explicit` axes."""
    if not _explicit(jax.sharding.get_abstract_mesh()):
        return nullcontext()
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def _explicit(mesh: Mesh | AbstractMesh) -> list[str]:
    """The axes that types name."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Explicit]


def _in_force() -> Mesh | AbstractMesh:
    """The mesh of `jax.set_mesh`; while tracing, what is known of it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            "no mesh is in force; pass one (mesh=, or a NamedSharding), or call this inside "
            "`with jax.set_mesh(mesh):`"
        )
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # as it says inside jit
        return mesh


def _check_axes(mesh: Mesh | AbstractMesh, axes: dict[str, Axis]) -> None:
    for name, axis in axes.items():
        if not set(_names(axis)) <= set(mesh.axis_names):
            raise ValueError(
                f"{name}={axis!r} is not an axis of the mesh, whose axes are {mesh.axis_names}"
            )


def _names(axis: Axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _ways(mesh: Mesh | AbstractMesh, axis: Axis) -> int:
    """Over how many devices an axis divides."""
    count = 1
    for name in _names(axis):
        count *= mesh.shape[name]
    return count
