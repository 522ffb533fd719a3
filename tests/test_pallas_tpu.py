"""The kernel for TPUs, interpreted: it says what the walk says, and reads only what it must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import lucid_jax as lj
from lucid_jax.attention import backends
from lucid_jax.attention.tpu.backend import pallas_tpu
from lucid_jax.cache.tiles import lies_on_lanes
from tests.helpers import H, make, poison, queries, tokens
from tests.kernels import agree as agree_to
from tests.kernels import both, cases_of, for_layout, options_of

pytestmark = pytest.mark.usefixtures("pallas_kernel")
B, N, SLOTS = 2, 2 * H, 300  # three blocks of 128, the last of them not whole
LAYOUTS = {
    "static": lj.Static(SLOTS),
    "dynamic": lj.Dynamic(),
    "sliding": lj.Sliding(200, sinks=3, slack=4),
    "chunked": lj.Chunked(200, slack=4),
}
CODECS = {
    "identity": lj.codecs.Identity(),
    "bits": lj.codecs.Bits(),
    "simulated": lj.codecs.Simulated(lj.codecs.Int8()),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(rotate=True),
    "int4": lj.codecs.Int4(),
    "int4 in groups": lj.codecs.Int4(group=1, rotate=False),
    "kivi": lj.codecs.KIVI(group=16, residual=20),
    "kivi rotated": lj.codecs.KIVI(group=8, residual=5, rotate=True),
}
OPTIONS = options_of(SLOTS, N)


def stored(spec, ragged=False, **options):
    """A cache of tokens that came in two calls; of rows of different lengths if ragged."""
    state = make(spec, ragged=ragged, **options)
    state = lj.grow(state, SLOTS)
    for seed, lengths in enumerate(([190, 70], [99, 60])):
        new = tokens(seed, B, max(lengths))
        state = lj.update(state, *new, 0, lengths=lengths if ragged else None)
    return state


agree = functools.partial(agree_to, rtol=1e-5, atol=2e-6)
CASES = cases_of(
    LAYOUTS, CODECS, OPTIONS, lambda number, codec, option: (codec, option) == ("int8", "plain")
)


@pytest.mark.parametrize("layout, ragged, codec, count, option", CASES)
def test_it_says_what_the_walk_says(layout, ragged, codec, count, option):
    """Of every layout, codec and mask; dead slots may hold anything."""
    options = for_layout(OPTIONS[option], layout, count)
    state = stored(LAYOUTS[layout].but(codec=CODECS[codec]), ragged)
    got, expected = both(state, queries(0, B, count), **options)
    agree(got, expected)
    agree(both(poison(state), queries(0, B, count), **options)[0], got, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_goes_on_as_with_the_walk(dtype):
    """Chunks and single tokens through a ring, rows of different lengths, layers stacked."""
    state = make(LAYOUTS["sliding"], layers=3, ragged=True, stacked=True, dtype=dtype)
    states = dict.fromkeys(("kernel", "walk"), state)
    for seed, lengths in enumerate(([180, 9], [40, 200], [1, 1], [2, 0])):
        count = max(lengths)
        query = jnp.asarray(queries(seed, B, count), dtype)
        new = [jnp.asarray(x, dtype) for x in tokens(seed, B, count)]
        found = []
        for name in states:
            name_ = "walk" if count > 20 else name
            pair, states[name] = lj.extend(
                states[name], query, *new, 1, lengths=lengths, implementation=name_, return_lse=True
            )
            found.append(jax.tree.map(lambda x: np.asarray(x, np.float32), pair))
        agree(*found, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-5)


def test_a_chunk_that_a_ring_must_read_first_is_a_run_of_its_own():
    """What is about to be overwritten, and the chunk: of a ring without slack."""
    state = stored(lj.Sliding(200, sinks=3))
    query, new = queries(1, B, 5), tokens(5, B, 5)
    got, expected = (
        lj.extend(state, query, *new, 0, implementation=name, return_lse=True)[0]
        for name in ("kernel", "walk")
    )
    agree(got, expected)


@pytest.mark.parametrize("codec", ["identity", "int8"])
def test_leaves_of_ones_own_are_scored_and_mixed(codec):
    """Latent attention: one leaf is scored and mixed, another scored only."""
    widths = {"latent": 8, "rope": 4}
    state = lj.init_cache(
        lj.Static(SLOTS, CODECS[codec]), num_layers=1, batch_size=B, num_kv_heads=1, head_dim=widths
    )
    new = {name: tokens(3, B, 250, 1, dim)[0] for name, dim in widths.items()}
    state = lj.update_leaves(state, new, 0)
    query = {name: queries(3, B, 1, 4, dim) for name, dim in widths.items()}
    agree(*both(state, query, scale=0.3))


@pytest.mark.parametrize("group, slots, dim", [(64, 1100, 5), (128, 2000, 8), (256, 4000, 4)])
def test_groups_of_tokens_share_registers_or_fill_them(group, slots, dim):
    """KIVI's keys, of an odd width too; a layer of a stack, whose scales may be read by themselves."""
    spec = lj.Static(slots, lj.codecs.KIVI(group))
    state = make(spec, layers=2, stacked=True, heads=1, dim=dim)
    key, value = (tokens(n, B, slots - 40, 1, width)[0] for n, width in enumerate((dim, 3)))
    state = lj.update(state, 10 * key, value, 1)
    for count in (1, 2):
        query = queries(0, B, count, 2, dim)
        got, expected = (
            lj.attend(state, query, 1, implementation=name, return_lse=True)
            for name in ("kernel", "walk")
        )
        agree(got, expected, rtol=1e-4, atol=1e-5)


def test_values_that_are_not_finite_reach_who_sees_them():
    """And no other query of the call."""
    state = stored(lj.Static(SLOTS))
    key, value = tokens(9, B, 2)
    value[0, 0, 1] = np.nan
    state = lj.update(state, key, value, 0)
    got, expected = both(state, queries(0, B, 2))
    np.testing.assert_array_equal(np.isnan(got[0]), np.isnan(expected[0]))
    assert np.isnan(got[0][0, 0, 1]).all() and not np.isnan(got[0][:, :, 0]).any()


@pytest.mark.parametrize("layout", ["static", "sliding"])
def test_its_gradient_is_that_of_the_walk(layout):
    """By queries, keys, values, sinks and bias, through output and log-sum-exp."""
    query, new = queries(0, B, 2), tokens(7, B, 2)
    start = stored(LAYOUTS[layout])

    def f(name, query, key, value, sinks, bias):
        (out, lse), _ = lj.extend(
            start, query, key, value, 0, implementation=name, return_lse=True, softcap=3.0,
            sink_logits=sinks, bias=bias,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    given = (jnp.asarray(query), *map(jnp.asarray, new), jnp.ones(N), jnp.ones((B, 1, 1, 1)))
    got, expected = (
        jax.jit(jax.grad(functools.partial(f, name), argnums=range(5)))(*given)
        for name in ("kernel", "walk")
    )
    agree(got, expected, atol=1e-5)


def test_it_runs_elsewhere_only_if_interpreted():
    """Forced by name on this platform it says how; tried first on TPUs alone."""
    state, query = stored(lj.Static(SLOTS)), queries(0, B, 1)
    assert backends._TRIED["tpu"][0] is pallas_tpu
    assert pallas_tpu not in backends._TRIED["cpu"] + backends._TRIED["gpu"]
    with pytest.raises(ValueError, match=r"runs on TPUs, .*force_tpu_interpret_mode"):
        lj.attend(state, query, 0, implementation="pallas_tpu")
    with pltpu.force_tpu_interpret_mode():
        got = lj.attend(state, query, 0, implementation="pallas_tpu")
    expected = lj.attend(state, query, 0, implementation="walk")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_it_says_so_in_shard_map_too():
    """Where JAX asks of each kernel's results along which axes they vary."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state, query = stored(lj.Static(SLOTS)), jnp.asarray(queries(0, B, 1))
    specs = jax.tree.map(lambda x: x.spec, lj.shardings(state, mesh, heads="x"))
    heads = jax.sharding.PartitionSpec(None, "x")
    run = jax.shard_map(
        lambda state, query: lj.attend(state, query, 0, implementation="pallas_tpu"),
        mesh=mesh, in_specs=(specs, heads), out_specs=heads,
    )  # fmt: skip
    with pytest.raises(ValueError, match="runs on TPUs"):
        jax.jit(run)(state, query)


@pytest.mark.parametrize("spec, count, options, lacks", [
    (lj.Static(SLOTS), 1, {"rope_theta": 10.0}, "rotate keys"),
    (lj.Static(600, lj.codecs.KIVI(group=24)), 1, {}, "does not read ChannelNibbles"),
    (lj.Static(SLOTS, lj.codecs.KIVI(residual=2)), 1, {}, "512 slots at a time"),
    (lj.Static(100), 1, {}, "128 slots at a time"),
])  # fmt: skip
def test_what_it_does_not_take_it_names(spec, count, options, lacks):
    """So the next backend is asked."""
    with pytest.raises(ValueError, match=lacks):
        lj.attend(make(spec), queries(0, B, count), 0, implementation="kernel", **options)


def test_it_leaves_a_mesh_whose_work_the_compiler_divides():
    """A kernel is one device's; in `shard_map` it is."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state = stored(lj.Static(SLOTS))
    query = jnp.asarray(queries(0, B, 1))
    expected = lj.attend(state, query, 0, implementation="walk")
    where = lj.shardings(state, mesh, heads="x")
    divided = jax.device_put(state, where)
    with pytest.raises(ValueError, match="not divided over a mesh by the compiler"):
        lj.attend(divided, query, 0, implementation="kernel")

    def run(state, query):
        return lj.attend(state, query, 0, implementation="kernel")

    specs = jax.tree.map(lambda x: x.spec, where)
    heads = jax.sharding.PartitionSpec(None, "x")
    # What is interpreted does not say along which axes it varies; compiled, it does.
    run = jax.shard_map(run, mesh=mesh, in_specs=(specs, heads), out_specs=heads, check_vma=False)
    np.testing.assert_allclose(jax.jit(run)(divided, query), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout, options, blocks", [
    ("static", {}, [3, 2]), ("static", {"window": 20}, [1, 2]), ("static", {"window": 1}, [1, 1]),
    ("sliding", {}, [2, 2]), ("sliding", {"window": 30}, [1, 2]),
])  # fmt: skip
def test_blocks_that_hold_nothing_seen_are_not_read(layout, options, blocks, monkeypatch):
    """A window skips what lies before it, a short row what lies after it."""
    from lucid_jax.attention.tpu import kernel

    found, own = [], kernel.visits

    def keep(*call):
        found.append(own(*call))
        return found[-1]

    monkeypatch.setattr(kernel, "visits", keep)
    state = stored(LAYOUTS[layout], ragged=True)
    with jax.disable_jit():
        lj.attend(state, queries(0, B, 1), 0, implementation="kernel", **options)
    ((counts, _),) = found
    assert counts.tolist() == blocks


@pytest.mark.parametrize("width, slots, on_lanes", [
    (64, 8192, True), (80, 8192, True), (96, 8192, True), (128, 8192, False), (256, 8192, False),
    (64, 64, False), (192, 8192, True), (64, 1000, True), (128, 1000, False),
])  # fmt: skip
def test_tokens_lie_along_the_lanes_where_their_numbers_would_leave_some_empty(
    width, slots, on_lanes
):
    """As XLA lays them on TPU: read in another order a leaf would be copied."""
    assert lies_on_lanes(width, slots) == on_lanes
