"""Where a state lies on a mesh: `shardings`, and what lies as something else does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.tokens import TokenLayer

Axis = str | tuple[str, ...] | None  # a mesh axis, or several, or none
State = TypeVar("State")  # a pytree of layers


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
        before, divided = axes_divided(leaf, buffer)
        for name, size in zip(list(axes)[:divided], leaf.shape[before:], strict=False):
            if size % ways_of(mesh, axes[name]):
                raise ValueError(
                    f"{name}={axes[name]!r} divides over {ways_of(mesh, axes[name])} devices, but the "
                    f"state has {size} {'rows' if name == 'batch' else 'key/value heads'}; choose an "
                    "axis whose size divides that, or None to keep a copy on each device"
                )
        each = (axes[name] for name in list(axes)[:divided])
        return NamedSharding(mesh, PartitionSpec(*[None] * before, *each))

    def of_layer(layer: Any) -> Any:
        buffer = layer.buffer if is_layer(layer) else Rows()
        return jax.tree.map(partial(of_leaf, buffer=buffer), layer)

    where: State = jax.tree.map(of_layer, state, is_leaf=is_layer)
    return where


def axes_divided(leaf: Any, buffer: Rows) -> tuple[int, int]:
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
        return ways_of(self.mesh, self.batch) * ways_of(self.mesh, self.heads)

    def of_heads(self, tree: Any) -> Any:
        """`PartitionSpec`s of arrays (B or 1, heads or 1, ...)."""

        def spec(x: Any) -> PartitionSpec:
            of_one = (size == 1 for size in x.shape)
            axes = zip((self.batch, self.heads), of_one, strict=False)
            return PartitionSpec(*(None if one else axis for axis, one in axes))

        return jax.tree.map(spec, tree)

    def of_rows(self, tree: Any, ndim: int) -> Any:
        """`PartitionSpec`s of arrays (B, ...) of so many axes, or of fewer: the same for all rows."""
        return jax.tree.map(lambda x: PartitionSpec(*[self.batch] * (x.ndim == ndim)), tree)

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
            if explicit_axes(sharding.mesh)
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
    if traced and not explicit_axes(where.mesh):
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


def is_layer(x: Any) -> bool:
    """Whether this is one layer of a state."""
    return isinstance(x, TokenLayer)


def explicit_axes(mesh: Mesh | AbstractMesh) -> list[str]:
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
        if not set(names_of(axis)) <= set(mesh.axis_names):
            raise ValueError(
                f"{name}={axis!r} is not an axis of the mesh, whose axes are {mesh.axis_names}"
            )


def names_of(axis: Axis) -> tuple[str, ...]:
    """The mesh axes that are meant."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def ways_of(mesh: Mesh | AbstractMesh, axis: Axis) -> int:
    """Over how many devices an axis divides."""
    count = 1
    for name in names_of(axis):
        count *= mesh.shape[name]
    return count
