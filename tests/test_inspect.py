"""`inspect`: on steps that are in place, and on those that are not, it says so and names the line."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import lucid_jax as lj
from lucid_jax.tools import MissingCompiler, assert_in_place, inspect, targets
from lucid_jax.tools.program_text import read_program
from tests.helpers import USERS_XLA

on_cpu = partial(inspect, compiler_options=USERS_XLA)
# Each target once; where its compiler is not installed, the skip names the wheels.
TARGETS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            targets.wheels(name) is not None, reason=f"{name} needs {targets.wheels(name)}"
        ),
    )
    for name in ("cpu", "tpu:v5e", "gpu:h100")
]
(on_tpu,) = TARGETS[1].marks
each_target = pytest.mark.parametrize("target", TARGETS)
SLOTS, HEADS, DIM = 4096, 2, 128


def _state(slots=SLOTS, **options):
    sizes = {"num_layers": 1, "batch_size": 2, "num_kv_heads": HEADS, "head_dim": DIM}
    return jax.eval_shape(lambda: lj.init_cache(lj.Static(slots), **sizes | options))


def _tokens(heads=HEADS, count=1):
    return jax.ShapeDtypeStruct((2, heads, count, DIM), jnp.float32)


def _line_of(words):
    """Where this file says something."""
    lines = Path(__file__).read_text("utf-8").splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if words in line and "_line_of" not in line]
    return f"test_inspect.py:{number} in "


def append(state, key, value):
    return lj.update(state, key, value, 0)  # the caller's own line


def decode(state, query, key, value):
    return lj.extend(state, query, key, value, 0)


def grow(cache, key):
    longer = jnp.concatenate([cache, key], axis=2)
    return longer[:, :, 1:]


@pytest.mark.whole
@each_target
def test_a_step_of_ours_is_in_place(target):
    report = assert_in_place(
        append,
        _state(),
        _tokens(),
        _tokens(),
        donate=0,
        target=target,
        compiler_options=_xla(target),
    )
    assert report.aliased >= report.donated > 2 * 2 * HEADS * SLOTS * DIM * 4
    assert report.temporaries < report.donated / 100
    assert not (report.rewritten or report.collectives or report.host_calls or report.not_reused)
    assert (report.cycles is not None) == target.startswith("tpu")
    assert (report.launches is not None) == target.startswith("gpu")
    assert (report.floor_seconds is None) == (target == "cpu")
    assert str(report).endswith("in place")


@pytest.mark.whole
@each_target
def test_growing_by_concatenate_is_told_with_its_line(target):
    cache = jax.ShapeDtypeStruct((2, HEADS, SLOTS, DIM), jnp.float32)
    report = inspect(grow, cache, _tokens(), donate=0, target=target, compiler_options=_xla(target))
    told = [event for event in report.rewritten if event.kind == "concatenate"]
    assert told and all(event.of == "cache" and not event.in_loop for event in told)
    assert _line_of("jnp.concatenate([cache, key]") in str(report)
    assert any("concatenate" in fault for fault in report.faults())


@pytest.mark.whole
@each_target
def test_a_step_that_was_not_donated_is_told_with_its_line(target):
    report = inspect(append, _state(), _tokens(), _tokens(), target=target)
    assert report.donated == report.aliased == 0
    keys, values = (f"state.layers[0].leaves['{name}']" for name in ("key", "value"))
    assert report.could_be_donated == (keys, values)
    assert {event.of for event in report.rewritten} == {keys, values}
    assert str(report).count(_line_of("the caller's own line")) >= 2
    with pytest.raises(AssertionError, match="nothing was donated"):
        assert_in_place(report)


@pytest.mark.whole
@each_target
def test_copies_inside_loops_are_told(target):
    """Negative control: what a scan rewrites in each turn."""

    def shift(cache, keys):
        def step(cache, key):
            return jnp.roll(cache, -1, axis=2).at[:, :, -1:].set(key), None

        return jax.lax.scan(step, cache, keys)[0]

    cache = jax.ShapeDtypeStruct((2, HEADS, SLOTS, DIM), jnp.float32)
    keys = jax.ShapeDtypeStruct((7, 2, HEADS, 1, DIM), jnp.float32)
    report = inspect(shift, cache, keys, donate=0, target=target)
    inside = [event for event in report.rewritten if event.in_loop]
    assert inside and {event.turns for event in inside} == {7}
    assert report.faults()


def decode_loop(state, tokens):
    def token(_, carry):
        return decode(carry[1], tokens, tokens, tokens)

    return jax.lax.fori_loop(0, 100, token, (tokens, state))


def keep_the_old(state, tokens):
    return state, decode(state, tokens, tokens, tokens)


def turn_around(state, tokens):
    def turn(_, leaf):
        return jnp.roll(leaf, -1, axis=2).at[:, :, -1:].set(tokens)

    return state.with_layers(
        layer.replace(
            leaves=layer.leaves | {"key": jax.lax.fori_loop(0, 100, turn, layer.leaves["key"])}
        )
        for layer in state.layers
    )


@on_tpu
@pytest.mark.parametrize(
    ("step", "copies"), [(decode_loop, False), (keep_the_old, True), (turn_around, True)]
)
def test_what_a_tpu_updates_in_its_fast_memory_is_no_copy(step, copies):
    """Keys small enough for it go there and back; what is not updated in place there is told still."""
    state = _state(num_layers=1, batch_size=1, head_dim=64, dtype=jnp.bfloat16, slots=512)
    tokens = jax.ShapeDtypeStruct((1, HEADS, 1, 64), jnp.bfloat16)
    report = inspect(step, state, tokens, donate=0, target="tpu:v5e")
    assert re.search(r"bf16\S*\)\}, bf16\S*S\(1\)\}, \S+ copy-start\(", report.text)
    assert bool(report.rewritten) == bool(report.faults()) == copies, report


def _xla(target):
    return USERS_XLA if target == "cpu" else None


def test_what_was_donated_for_nothing_is_named():
    report = on_cpu(lambda state, key: key, _state(), _tokens(), donate=0)
    assert "state.layers[0].leaves['key']" in report.not_reused
    assert "no result is written to its memory" in report.faults()[0]


def test_temporaries_are_a_fault_by_their_share():
    def scratch(cache):
        order = jnp.argsort(cache, axis=-1)
        return cache.at[0].set(jnp.float32(order[0, -1])), order.sum()

    cache = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    report = on_cpu(scratch, cache, donate=0, large=1 << 30)
    assert not report.faults(temporaries=10)
    assert re.search("of temporaries, more than 0.0625 of the", report.faults()[0])


def test_host_calls_are_told():
    def step(state, key, value):
        jax.debug.print("{}", lj.seq_length(state))
        return append(state, key, value)

    report = on_cpu(step, _state(), _tokens(), _tokens(), donate=0)
    (event,) = report.host_calls
    assert "callback" in event.kind
    assert _line_of("jax.debug.print(") in str(report)


def test_on_a_mesh_bytes_are_a_devices_and_collectives_are_told():
    """The arguments' own mesh is of no devices; the target has eight."""
    mesh = AbstractMesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    where = lj.shardings(_state(), mesh, batch="rows", heads="heads")
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        _state(),
        where,
    )
    whole = on_cpu(append, _state(), _tokens(), _tokens(), donate=0)
    divided = on_cpu(append, state, _tokens(), _tokens(), donate=0, mesh=mesh)
    assert not divided.faults() and not divided.collectives
    assert divided.donated < whole.donated / 3.9

    def total(state):
        return state.layers[0].key.sum()

    report = on_cpu(total, state, mesh=mesh)
    assert {event.kind for event in report.collectives} == {"all-reduce"}
    assert _line_of("state.layers[0].key.sum()") in str(report)
    with pytest.raises(ValueError, match="mesh= has 16 devices, and cpu 8; choose a topology"):
        inspect(append, state, mesh=AbstractMesh((16,), ("x",)))


def test_arrays_are_taken_as_their_shapes_are():
    """And none is touched, donated or not."""
    state = lj.init_cache(lj.Static(64), num_layers=1, batch_size=1, num_kv_heads=1, head_dim=8)
    new = jnp.ones((1, 1, 1, 8))
    assert_in_place(jax.jit(append), state, new, new, donate=[0], compiler_options=USERS_XLA)
    assert lj.seq_length(lj.update(state, new, new, 0)) == 1


@pytest.mark.parametrize("name", ["tpu", "tpu:v9", "gpu", "gpu:h100:2x2", "tpu:v5e:four", "cpu:8"])
def test_unknown_targets_are_refused(name):
    with pytest.raises(ValueError, match=f"a target is cpu, tpu:v5e, .*; got '{name}'"):
        inspect(append, target=name)


@pytest.mark.parametrize(
    ("name", "install"),
    [("tpu:v6e:2x2", r"'jax\[tpu\]=="), ("gpu:h100", "--no-deps jax-cuda12-plugin==")],
)
def test_without_a_compiler_it_says_which_wheels_to_install(name, install, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingCompiler, match=f"get it with: pip install {install}"):
        inspect(append, target=name)


def test_only_programs_can_be_read():
    with pytest.raises(ValueError, match="with an ENTRY computation"):
        read_program("module @jit_f {}")
