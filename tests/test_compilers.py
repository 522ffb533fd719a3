"""What the compilers of TPUs and GPUs make of every kind of step; neither device need be there.

Their wheels are in .ci/compilers; where they are not installed, tests skip and say which. CI, which has
them, sets LUCID_JAX_TEST_COMPILERS=required, and there a missing one fails.
"""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lucid_jax as lj
from lucid_jax.tools import inspect, targets
from tests.device_steps import (
    CASES,
    CODECS,
    FACTORS,
    KNOWN,
    KNOWN_LOOPS,
    LOOPS,
    SLOTS,
    Case,
    cover,
    faults,
    inspected,
    known,
    loop_on_mesh,
    placed,
)

MISSING = {name: targets.wheels(name) for name in FACTORS.target}
WHEELS = "; ".join(sorted({*filter(None, MISSING.values())}))
REQUIRED = os.environ.get("LUCID_JAX_TEST_COMPILERS") == "required"
pytestmark = pytest.mark.skipif(
    not REQUIRED and any(MISSING.values()),
    reason=f"the compilers of TPUs and GPUs come by: {WHEELS}",
)
LOOP_TARGETS = ("tpu:v5e", "gpu:h100")


@pytest.mark.whole
def test_all_compilers_are_installed():
    assert not any(MISSING.values()), MISSING


@pytest.mark.parametrize("case", cover(), ids=str)
def test_a_step_is_in_place(case):
    report = inspected(case)
    reason = known(case)
    if reason is None:
        assert not faults(report), report
        assert report.aliased >= report.donated
    elif faults(report):
        pytest.xfail(reason)


@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", "128"), ("float32", "64")])
@pytest.mark.parametrize("layout", FACTORS.layout)
def test_tokens_of_ragged_rows_are_written_over_nearly_as_fast(layout, dtype, dim):
    """On TPUs slots that are skipped were cleared one by one, in a loop that took most of the time."""
    ragged, aligned = (
        inspected(Case("write at", layout, "plain", rows, dtype, dim, "once", "tpu:v5e"))
        for rows in ("ragged", "aligned")
    )
    assert not faults(ragged), ragged
    assert ragged.cycles < 8 * aligned.cycles


@pytest.mark.parametrize(
    ("verb", "rows"),
    [("update", "aligned"), ("write at", "ragged"), ("decode", "stacked"), ("crop", "ragged")],
)
def test_scales_of_one_number_a_token_stay_where_they_are(verb, rows):
    """Those of int4 at head_dim 64, of 4 MiB: whole copies were most of what a token cost on TPUs."""
    case = Case(verb, "static", "int4", rows, "bfloat16", "64", "once", "tpu:v5e")
    report = inspected(case, large=1 << 20)
    assert not faults(report), report


@pytest.mark.parametrize("codec", ["plain", "int8", "int4"])
@pytest.mark.parametrize("layout", [lj.Static, lj.Sliding, lj.Chunked])
def test_any_number_of_slots_is_read_where_it_lies(layout, codec):
    """Rows of 16,385 tokens: XLA for TPUs copied them whole to read them."""
    state = jax.eval_shape(
        lambda: lj.init_cache(
            layout(16385, codec=CODECS[codec]), num_layers=1, batch_size=2, num_kv_heads=8,
            head_dim=128, dtype=jnp.bfloat16,
        )
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((2, 8, 1, 128), jnp.bfloat16)

    def step(state, tokens):
        return lj.extend(state, tokens, tokens, tokens, 0)

    report = inspect(step, state, tokens, donate=0, target="tpu:v5e")
    assert not report.faults(), report


MESH = AbstractMesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)


@pytest.mark.parametrize("codec, rows", [*zip(CODECS, ["aligned", "ragged"] * 3, strict=False)])
def test_on_a_mesh_each_device_runs_the_kernel_by_itself(codec, rows):
    """Two by two TPUs: in place, and no device waits for another."""
    spec = lj.Static(4 * SLOTS[codec], codec=CODECS[codec])
    state = jax.eval_shape(
        lambda: lj.init_cache(
            spec, num_layers=1, batch_size=8, num_kv_heads=8, head_dim=128, dtype=jnp.bfloat16,
            ragged=rows == "ragged",
        )
    )  # fmt: skip
    state = placed(state, lj.shardings(state, MESH, batch="dp", heads="tp"))
    where = NamedSharding(MESH, P("dp", "tp"))
    query, tokens = (
        jax.ShapeDtypeStruct((8, heads, 1, 128), jnp.bfloat16, sharding=where) for heads in (32, 8)
    )

    def step(state, query, tokens):
        return lj.extend(state, query, tokens, tokens, 0, implementation="pallas_tpu")

    report = inspect(step, state, query, tokens, donate=0, target="tpu:v5e:2x2", mesh=MESH)
    assert not report.faults() and not report.collectives, report


def test_a_decoders_loop_on_a_mesh_sends_next_to_nothing():
    """Hidden states once a layer, where the products of an output are added, and who is done."""
    report = loop_on_mesh(MESH, "tpu:v5e:2x2")
    assert not report.faults(), report
    assert len(report.collectives) <= 1 + 2, report  # of two layers
    assert all(event.nbytes <= 8 * 256 * 2 for event in report.collectives)


@pytest.mark.parametrize("target", LOOP_TARGETS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_decoders_loop_is_in_place(loop, target):
    """Of the cache: other large arrays are a model's weights."""
    report = LOOPS[loop](target, "plain")
    reason = KNOWN_LOOPS.get((loop, target))
    if reason is None:
        assert not report.faults(), report
    elif report.faults():
        pytest.xfail(reason)


def test_the_cover_is_of_all_pairs():
    pairs = {(i, j, case[i], case[j]) for case in CASES for i in range(len(case)) for j in range(i)}
    covered = {
        (i, j, case[i], case[j]) for case in cover() for i in range(len(case)) for j in range(i)
    }
    assert pairs == covered
    assert len(cover()) < 70


@pytest.mark.whole
@pytest.mark.parametrize("target", FACTORS.target)
def test_what_is_not_in_place_is_found(target):
    """Negative controls: a cache that is shifted, one that is read to be written, one not donated."""
    cache = jax.ShapeDtypeStruct((8, 8, 16384, 128), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((8, 8, 1, 128), jnp.bfloat16)

    def shift(cache, new):
        return jnp.concatenate([cache, new], axis=2)[:, :, 1:]

    def write(cache, new):
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, 7, 0))

    def masked(cache, new):
        return jnp.where(jnp.arange(16384)[:, None] == 7, new, cache)

    assert not faults(inspect(write, cache, new, donate=0, target=target))
    for step, donate in ((shift, 0), (masked, 0), (write, ())):
        assert faults(inspect(step, cache, new, donate=donate, target=target))


def test_what_is_known_names_cases_that_exist():
    assert all(any(map(one.holds, CASES)) for one in KNOWN)
