"""The kernel for GPUs as the GPU's own compiler takes it, for an H100 that need not be there.

Wants JAX 0.12 and wheels that `lucid_jax.tools.targets.wheels` names; nothing is executed.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lucid_jax as lj
from lucid_jax.attention.gpu.backend import JAX
from lucid_jax.cache.counting import counted_together
from lucid_jax.models import ModelConfig, Transformer, transformer
from lucid_jax.tools import inspect, targets
from lucid_jax.tools.program_text import read_program
from tests.kernels import CALLS, compiled, moved, some_of

TARGET = "gpu:h100"
WHEELS = targets.wheels(TARGET)
pytestmark = [
    pytest.mark.skipif(WHEELS is not None, reason=f"the GPU's compiler comes by: {WHEELS}"),
    pytest.mark.skipif(jax.__version_info__ < JAX, reason="the kernel wants JAX 0.12"),
]
CODECS = {
    "bf16": lj.codecs.Identity(),
    "f16": lj.codecs.Identity(),
    "f32": lj.codecs.Identity(),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(),
}
SLOTS = 16384
WIDTHS = (64, 80, 96, 128, 256)


@pytest.fixture(autouse=True)
def _looked_at(monkeypatch, uncached):
    """The compiler says what it made."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")


def spilled(capfd):
    """Bytes of registers that the compiler keeps in memory, of each kernel that it had not met."""
    said = "".join(capfd.readouterr())
    return [int(count) for count in re.findall(r"(\d+) bytes spill stores", said)]


def check(codec, capfd, *, static=True, **how):
    """A call runs in the kernel, holds next to nothing and copies nothing of a leaf's size."""
    layout = lj.Static(SLOTS) if static else lj.Sliding(SLOTS - 96, sinks=4, slack=92)
    dtype = {"f16": "float16", "f32": "float32"}.get(codec, "bfloat16")
    jax.clear_caches()  # a kernel that was lowered already says nothing
    spilled(capfd)
    program, cache, leaf = compiled(TARGET, layout.but(codec=CODECS[codec]), dtype=dtype, **how)
    text = program.as_text()
    assert "mosaic_gpu" in text
    # Of a cache of few heads many programs share a head: their results are some hundred KiB.
    assert program.memory_analysis().temp_size_in_bytes < max(cache / 16, 2 << 20)
    assert not moved(read_program(text).computations.values(), leaf // 2)
    return spilled(capfd)


@pytest.mark.parametrize("codec, dim, group", some_of(CODECS, WIDTHS, (1, 4, 8, 16)))
def test_widths_and_groups(codec, dim, group, capfd):
    """Every width that models have, and every group."""
    if (codec, dim) == ("int4", 80):
        pytest.skip("half a byte a number: 40 channels have a scale in common, which are not 16s")
    if (codec, dim) == ("f32", 256):
        pytest.skip(
            "three parts of 64 keys of 256 channels and of the queries, and both as they lie"
        )
    spills = check(codec, capfd, dim=dim, group=group)
    # Of groups whose scores add up in registers, some bytes a thread lie in memory for a while.
    most = {("int4", 96): 8, ("int4", 128): 64, ("int4", 256): 640}.get((codec, dim), 0)
    if codec == "f32":  # as what is taken apart is held twice
        most = 512
    assert max(spills, default=0) <= most, spills


@pytest.mark.parametrize(
    "stored, how", some_of([("bf16", 64), ("bf16", 128), ("int8", 128), ("int4", 64)], CALLS),
    ids=str,
)  # fmt: skip
def test_shapes_and_options(stored, how, capfd, request):
    """Rows of different lengths, rings, stacks, several queries, many heads and few."""
    codec, dim = stored
    if codec == "int4" and "count" in how:
        pytest.skip("the walk, entered where something is not finite, holds blocks of float32")
    if codec == "int8" and how == {"count": 4, "group": 16}:
        reason = (
            "of 64 queries the walk's block of scores is more than a sixteenth of a narrow cache"
        )
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=False))
    check(codec, capfd, **{"dim": dim, "group": 4, **how})


@pytest.mark.parametrize("spec", [
    lj.Static(SLOTS + 3), lj.Sliding(SLOTS, sinks=4), lj.Static(SLOTS + 1, lj.codecs.Int8()),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dim", [64, 256])
def test_any_number_of_slots(spec, dim):
    """Of what is no multiple of 8 slots TMA lays out nothing for the tensor cores."""
    program, cache, leaf = compiled(TARGET, spec, dim=dim, group=4, ragged=True)
    text = program.as_text()
    assert "mosaic_gpu" in text
    assert program.memory_analysis().temp_size_in_bytes < cache / 16
    assert not moved(read_program(text).computations.values(), leaf // 2)


def _state(spec, layers=1, **options):
    sizes = dict(num_layers=layers, batch_size=8, num_kv_heads=8, head_dim=128, dtype=jnp.bfloat16)
    return jax.eval_shape(lambda: lj.init_cache(spec, **sizes, **options))


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("codec, attend, update", [
    (lj.codecs.Identity(), 2, 3), (lj.codecs.Int8(), 2, {False: 7, True: 5}),
], ids=["bf16", "int8"])  # fmt: skip
def test_launches_of_a_step(codec, attend, update, ragged):
    """Of a token: the kernel, and what its programs found joined; counters, and each leaf's write.

    Codes of an aligned layer are computed first, and then written.
    """
    state = _state(lj.Static(8192, codec), ragged=ragged)
    new = jax.ShapeDtypeStruct((8, 8, 1, 128), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((8, 32, 1, 128), jnp.bfloat16)
    update = update[ragged] if isinstance(update, dict) else update
    steps = {
        "attend": lambda s, q, k, v: lj.attend(s, q, 0),
        "update": lambda s, q, k, v: lj.update(s, k, v, 0),
        "extend": lambda s, q, k, v: lj.extend(s, q, k, v, 0),
    }
    reports = {
        name: inspect(step, state, query, new, new, donate=() if name == "attend" else 0,
                      target=TARGET)
        for name, step in steps.items()
    }  # fmt: skip
    assert {name: report.launches for name, report in reports.items()} == {
        "attend": attend, "update": update, "extend": attend + update,
    }  # fmt: skip
    assert not reports["extend"].faults()


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("spec", [lj.Static(8192), lj.Sliding(8192)], ids=["static", "ring"])
@pytest.mark.parametrize("loop", [False, True], ids=["once", "in a loop"])
def test_launches_of_a_layer_of_several(spec, ragged, loop):
    """Four, in a ring one more: the counters of all layers are one kernel, also in a loop's body."""
    new = jax.ShapeDtypeStruct((8, 8, 1, 128), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((8, 32, 1, 128), jnp.bfloat16)
    turns = 10 if loop else 1

    def step(_, carry):
        query, key, value, state = carry
        state = counted_together(state, None)
        for layer in range(len(state.layers)):
            query, state = lj.extend(state, query, key, value, layer)
        return query, key, value, state

    def run(state, query, key, value):
        carry = query, key, value, state
        query, *_, state = jax.lax.fori_loop(0, 10, step, carry) if loop else step(0, carry)
        return query, state

    launches = {}
    for layers in (2, 4):
        state = _state(spec, layers, ragged=ragged)
        report = inspect(run, state, query, new, new, donate=0, target=TARGET)
        assert not report.faults()
        launches[layers] = report.launches
    assert launches[4] - launches[2] == 2 * turns * (4 if isinstance(spec, lj.Static) else 5)


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_a_model_counts_for_all_of_its_layers(ragged, monkeypatch):
    """A layer of it takes a kernel less than where each is counted by itself."""

    def launches(layers):
        config = ModelConfig(
            vocab_size=512, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        )  # fmt: skip
        model = nnx.eval_shape(lambda: Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        structure, params = nnx.split(model)
        report = inspect(
            lambda state, params, token: nnx.merge(structure, params)(token, state),
            _state(lj.Static(8192), layers, ragged=ragged), params,
            jax.ShapeDtypeStruct((8, 1), jnp.int32), donate=0, target=TARGET,
        )  # fmt: skip
        assert not report.faults()
        return report.launches

    together = launches(4) - launches(2)
    monkeypatch.setattr(transformer, "counted_together", lambda state, lengths: state)
    assert together == launches(4) - launches(2) - 2


@pytest.mark.parametrize("way", ["mapped", "x64"])
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_mapped_and_with_64_bits(way, ragged):
    """A step under `vmap`, or where integers are 64 bits wide, is in the kernel and in place."""
    state = _state(lj.Static(4096), ragged=ragged)
    new = jax.ShapeDtypeStruct((8, 8, 1, 128), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((8, 32, 1, 128), jnp.bfloat16)
    given = state, query, new, new

    def step(state, query, key, value):
        return lj.extend(state, query, key, value, 0)

    if way == "mapped":
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), given)
    with jax.enable_x64(way == "x64"):
        report = inspect(
            jax.vmap(step) if way == "mapped" else step, *given, donate=0, target=TARGET
        )
    assert report.launches <= 6
    assert not report.faults()


def test_each_device_of_a_mesh_runs_the_kernel_on_its_own():
    """In `shard_map`, rows of different lengths and heads divided."""
    devices = targets.open_target("gpu:h100:2").devices
    mesh = jax.sharding.Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    state = _state(lj.Static(4096), ragged=True)
    where = lj.shardings(state, mesh, heads="x")
    specs = jax.tree.map(lambda x: x.spec, where)
    heads = PartitionSpec(None, "x")
    state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, where
    )
    query = jax.ShapeDtypeStruct((8, 32, 1, 128), jnp.bfloat16, sharding=NamedSharding(mesh, heads))
    run = jax.shard_map(
        lambda s, q: lj.attend(s, q, 0), mesh=mesh, in_specs=(specs, heads), out_specs=heads
    )
    with jax.default_device(devices[0]):
        text = jax.jit(run).lower(state, query).compile().as_text()
    assert "mosaic_gpu" in text and "all-" not in text
