"""`inspect`: what the compiler of a target, which need not be there, makes of a decode step."""

from __future__ import annotations

import collections
import contextlib
import inspect as python_inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lucid_jax.tools import program_store
from lucid_jax.tools.inspection_report import TEMPORARIES, Inspection
from lucid_jax.tools.program_moves import Moves
from lucid_jax.tools.program_text import read_program
from lucid_jax.tools.targets import MissingCompiler, Target, open_target


def inspect(
    fn: Callable[..., Any],
    *args: Any,
    donate: int | Sequence[int] = (),
    target: str = "cpu",
    mesh: Mesh | AbstractMesh | None = None,
    large: int | None = None,
    turns: int = 1,
    must_read: int | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Inspection:
    """Compiles a step for a target and says what it costs there: nothing is run, nothing is allocated.

    A step is in place if the cache that goes in is the memory of the one that comes out, and no array
    of a cache's size is written anew. What a TPU's or a GPU's compiler does differs from what a CPU's
    does, and both can be asked on a machine that has neither device.

    Args:
        fn: a function of arrays and pytrees of them, also one that is jitted already. What is static
            belongs into a `functools.partial`.
        *args: what it is called with: arrays, or `jax.ShapeDtypeStruct`s such as `jax.eval_shape`
            gives, in any pytrees. With `mesh`, those of a `NamedSharding` are divided as it says.
        donate: numbers of the arguments that are given away, as `jax.jit`'s `donate_argnums`. That of a
            function jitted already counts only here.
        target: "cpu", or "tpu:v5e", "tpu:v5p" or "tpu:v6e" with a topology such as "tpu:v5e:2x2", or
            "gpu:h100" with a number such as "gpu:h100:8".
        mesh: axes to lay the target's devices out in; its own devices do not matter, `AbstractMesh` has
            none. Without one, everything is on one device.
        large: bytes on a device from which on an array counts as large; by default half of the largest
            array that is donated, or, where none is, that is an argument.
        turns: how often to count a loop that does not say how often it turns, as of attention over as
            many blocks of slots as are in use.
        must_read: bytes a device must read, for the floor; by default all arguments, once.
        compiler_options: as for `jax.jit`.

    Returns:
        The report: print it, or ask for its `faults()`.

    Raises:
        ValueError: for a name that is no target, or a mesh of other than the target's devices.
        MissingCompiler: if the target's compiler is not installed; it names the wheels.

    Example:
        >>> import jax, jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4096), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=64
        ... )
        >>> new = jax.ShapeDtypeStruct((1, 2, 1, 64), jnp.float32)
        >>> def step(state, key, value):
        ...     return lj.update(state, key, value, 0)
        >>> inspect(step, state, new, new, donate=0).faults()
        []
        >>> inspect(step, state, new, new).faults()[0]
        'nothing was donated, so all that changes is copied; pass donate='
    """
    opened = open_target(target)
    donated = {donate} if isinstance(donate, int) else set(donate)
    args = tuple(_placed(args, opened, mesh))
    compiled = _compiled(fn, args, donated, opened, compiler_options)
    text = compiled.as_text()
    program = read_program(text)
    named = [
        (
            f"{_name_of(fn, path[0].idx)}{jax.tree_util.keystr(path[1:])}",
            path[0].idx in donated,
            leaf,
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(args)
    ]
    given = [leaf for _, away, leaf in named if away]
    if large is None:
        large = max(map(_bytes, given or [leaf for *_, leaf in named]), default=0) // 2
    moves = Moves(program, max(large, 1), turns)
    memory = compiled.memory_analysis()
    cycles = moves.cycles()
    clock, bandwidth = opened.chip.clock, opened.chip.bandwidth
    read = sum(_bytes(leaf) for *_, leaf in named) if must_read is None else must_read
    return Inspection(
        name=getattr(fn, "__name__", type(fn).__name__),
        target=target,
        donated=sum(map(_bytes, given)),
        donated_names=frozenset(name for name, away, _ in named if away),
        aliased=memory.alias_size_in_bytes,
        not_reused=tuple(
            name for i, (name, away, _) in enumerate(named) if away and i not in program.reused
        ),
        could_be_donated=_like_results(compiled, named, large),
        temporaries=memory.temp_size_in_bytes,
        read=read,
        large=large,
        rewritten=tuple(moves.rewritten()),
        collectives=tuple(moves.collectives()),
        host_calls=tuple(moves.host_calls()),
        cycles=cycles if clock else None,
        estimated_seconds=cycles / clock if clock and cycles is not None else None,
        launches=moves.launches() if opened.chip.platform == "cuda" else None,
        floor_seconds=read / bandwidth if bandwidth else None,
        loops_counted_as_told=moves.loops_of_unknown_turns(),
        text=text,
    )


def assert_in_place(
    step: Inspection | Callable[..., Any],
    *args: Any,
    temporaries: float = TEMPORARIES,
    **options: Any,
) -> Inspection:
    """Raises unless a step updates what it is given in place: for tests.

    Args:
        step: a report of `inspect`, or a function, which is then inspected.
        *args: of the function.
        temporaries: how much scratch memory it may take, as a part of what is donated.
        **options: of `inspect`: `donate=`, `target=` and so on.

    Returns:
        The report.

    Raises:
        AssertionError: if something large is copied, converted or not reused; it has the report.
        ValueError: as `inspect`.
        MissingCompiler: as `inspect`.

    Example:
        >>> import jax.numpy as jnp
        >>> def grow(cache, new):
        ...     return jnp.concatenate([cache[1:], new])
        >>> assert_in_place(grow, jnp.zeros((512, 64)), jnp.ones((1, 64)), donate=0)
        Traceback (most recent call last):
        AssertionError: grow is not in place on cpu...
    """
    report = step if isinstance(step, Inspection) else inspect(step, *args, **options)
    faults = report.faults(temporaries)
    if faults:
        told = "\n".join(f"  {fault}" for fault in faults)
        raise AssertionError(f"{report.name} is not in place on {report.target}:\n{told}\n{report}")
    return report


def _compiled(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    donated: set[int],
    target: Target,
    options: Mapping[str, Any] | None,
) -> Any:
    # Arguments that are not used are kept, so that the program's are numbered as ours are.
    jitted = jax.jit(fn, donate_argnums=tuple(donated), keep_unused=True)
    try:
        with _settings(), jax.default_device(target.devices[0]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # reported
            return jitted.lower(*args).compile(dict(options) if options else None)
    except RuntimeError as error:
        if "Unknown backend" not in str(error):
            raise
        raise MissingCompiler(
            f"to be compiled for {target.name}, a step that calls Python on the host needs the device; "
            "leave out jax.debug.print and other callbacks"
        ) from error


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Whole stacks, and no programs out of files: those for other machines cannot be loaded."""
    settings: dict[str, object] = {
        "jax_traceback_in_locations_limit": -1,
        "jax_enable_compilation_cache": False,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    program_store.configure(settings)
    try:
        yield
    finally:
        program_store.configure(before)


def _placed(args: Sequence[Any], target: Target, mesh: Mesh | AbstractMesh | None) -> Iterator[Any]:
    """Shapes of the arguments, on the target's devices."""
    everywhere: Any = SingleDeviceSharding(target.devices[0])
    if mesh is not None:
        if mesh.size > len(target.devices):
            raise ValueError(
                f"mesh= has {mesh.size} devices, and {target.name} {len(target.devices)}; choose a "
                "topology of as many"
            )
        devices = np.array(target.devices[: mesh.size]).reshape(mesh.axis_sizes)
        there = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
        everywhere = NamedSharding(there, PartitionSpec())

    def place(leaf: Any, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = getattr(leaf, "sharding", None)
        if mesh is not None and isinstance(where, NamedSharding):
            where = NamedSharding(there, where.spec)
        else:
            where = everywhere
        return jax.ShapeDtypeStruct(
            shape.shape,
            shape.dtype,
            weak_type=shape.weak_type,
            sharding=where,
        )

    for arg in args:
        yield jax.tree.map(place, arg, jax.eval_shape(lambda x: x, arg))


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """On one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _like_results(
    compiled: Any, named: Sequence[tuple[str, bool, Any]], large: int
) -> tuple[str, ...]:
    """Large arguments that were not donated, and results are left that are like them."""
    results = collections.Counter(
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(compiled.out_info)
    )
    results.subtract((leaf.shape, leaf.dtype) for _, away, leaf in named if away)
    found = []
    for name, away, leaf in named:
        kind = (leaf.shape, leaf.dtype)
        if not away and _bytes(leaf) >= large and results[kind] > 0:
            results[kind] -= 1
            found.append(name)
    return tuple(found)


def _name_of(fn: Callable[..., Any], number: int) -> str:
    """What a function calls an argument."""
    try:
        names = list(python_inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        names = []
    if number < len(names) and names[number].kind != names[number].VAR_POSITIONAL:
        return names[number].name
    return f"argument {number}"
