"""The kernel for GPUs, interpreted: it says what the walk says, and reads only what it must.

JAX interprets kernels of Mosaic GPU from 0.12 on; below that the backend takes no call, and tests skip.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.attention import backends
from lucid_jax.attention.gpu import backend
from lucid_jax.attention.gpu.backend import JAX, MosaicGPU, mosaic_gpu
from tests.helpers import H, make, poison, queries, tokens
from tests.kernels import agree as agree_to
from tests.kernels import both, cases_of, for_layout, options_of

B, N, D, DV = 2, 2 * H, 64, 32
SLOTS = 203  # four blocks of 64, the last of which overlaps the one before
LAYOUTS = {
    "static": lj.Static(SLOTS),
    "dynamic": lj.Dynamic(),
    "sliding": lj.Sliding(150, sinks=3, slack=4),
    "chunked": lj.Chunked(150, slack=4),
}
CODECS = {
    "identity": lj.codecs.Identity(),
    "simulated": lj.codecs.Simulated(lj.codecs.Int8()),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(rotate=True),
    "int4": lj.codecs.Int4(),
    "int4 in groups": lj.codecs.Int4(group=16, rotate=False),
}
OPTIONS = options_of(SLOTS, N)
interprets = pytest.mark.skipif(
    jax.__version_info__ < JAX,
    reason=f"jax {jax.__version__} does not interpret kernels of Mosaic GPU; 0.12 does",
)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """`implementation="kernel"`: interpreted, two programs to a KV head."""
    if jax.__version_info__ < JAX:
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    one = MosaicGPU(interpret=plgpu.InterpretGPUParams(), programs=2 * B * H)
    monkeypatch.setattr(backend, "FEWEST_TURNS", 1)
    monkeypatch.setattr(backends, "_BY_NAME", {**backends._BY_NAME, "kernel": one})


def stored(spec, ragged=False, dim=D, value_dim=DV, **options):
    """A cache of tokens that came in two calls; of rows of different lengths if ragged."""
    options = {"dtype": "bfloat16", **options}
    state = lj.grow(make(spec, ragged=ragged, dim=dim, value_dim=value_dim, **options), SLOTS)
    for seed, lengths in enumerate(([130, 40], [59, 30])):
        new = tokens(seed, B, max(lengths), dim=dim, value_dim=value_dim)
        new = [jnp.asarray(x, options["dtype"]) for x in new]
        state = lj.update(state, *new, 0, lengths=lengths if ragged else None)
    return state


def asked(seed, count, dim=D, dtype="bfloat16"):
    """Queries (B, N, T, D)."""
    return jnp.asarray(queries(seed, B, count, N, dim), dtype)


agree = functools.partial(agree_to, rtol=2e-5, atol=1e-5)
CASES = cases_of(LAYOUTS, CODECS, OPTIONS, lambda number, codec, option: number % 13 == 0)


@interprets
@pytest.mark.parametrize("layout, ragged, codec, count, option", CASES)
def test_it_says_what_the_walk_says(layout, ragged, codec, count, option):
    """Of every layout, codec and mask; dead slots may hold anything."""
    options = for_layout(OPTIONS[option], layout, count)
    state = stored(LAYOUTS[layout].but(codec=CODECS[codec]), ragged)
    # Of float32, so that what is compared has not been rounded to bfloat16.
    query = asked(0, count, dtype="float32")
    got, expected = both(poison(state), query, **options)
    agree(got, expected)
    agree(both(state, query, **options)[0], got, rtol=0, atol=0)


@interprets
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_of_16_bits_go_in_as_they_are(dtype):
    state = stored(lj.Static(SLOTS), dtype=dtype)
    agree(*both(state, asked(0, 1, dtype=dtype)), rtol=2**-7, atol=1e-5)


@interprets
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("queries_dtype", ["float32", "bfloat16"])
def test_float32_is_multiplied_as_float32(dim, queries_dtype):
    """Taken apart into three numbers of bfloat16; dead slots may hold anything."""
    state = stored(lj.Static(SLOTS), ragged=True, dim=dim, dtype="float32")
    got, expected = both(poison(state), asked(0, 1, dim, queries_dtype))
    agree(got, expected, rtol=2e-6 if queries_dtype == "float32" else 2**-7, atol=2e-6)


@interprets
def test_float32_at_the_ends_of_its_range():
    """The largest numbers do not become infinite, and what is none goes where the walk has it."""
    state = stored(lj.Static(SLOTS), dtype="float32")
    key, value = (np.float32(x) for x in tokens(9, B, 1, dim=D, value_dim=DV))
    ends = np.finfo(np.float32)
    value[:, :, 0, :3] = ends.max, ends.min, np.nan
    state = lj.update(state, key, value, 0)
    agree(*both(state, asked(0, 1, dtype="float32")))


@interprets
@pytest.mark.parametrize("dim, codec", [
    (64, "identity"), (80, "int8"), (96, "identity"), (128, "int4"), (256, "identity"),
])  # fmt: skip
def test_heads_of_every_width(dim, codec):
    # Where slots are no multiple of 8, keys and values take more room.
    state = stored(lj.Static(SLOTS + 5, CODECS[codec]), dim=dim, value_dim=dim)
    agree(*both(state, asked(0, 1, dim, "float32")))


@interprets
@pytest.mark.parametrize("dim, codec", [(64, "identity"), (256, "int8"), (128, "int4")])
def test_what_is_read_in_many_turns_races_with_nothing(dim, codec, monkeypatch):
    """By one program and one warpgroup, or two: what is brought waits for what is read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    raises = MosaicGPU(interpret=plgpu.InterpretGPUParams(detect_races=True), programs=1)
    monkeypatch.setitem(backends._BY_NAME, "kernel", raises)
    spec = lj.Static(1100, CODECS[codec])
    state = make(spec, ragged=True, dim=dim, value_dim=dim, dtype="bfloat16")
    for seed in range(3):
        new = [jnp.asarray(x, "bfloat16") for x in tokens(seed, B, 300, dim=dim, value_dim=dim)]
        state = lj.update(state, *new, 0, lengths=[300, 20])
    agree(*both(state, asked(0, 1, dim, "float32")))


@interprets
@pytest.mark.parametrize("ragged", [False, True])
def test_it_is_mapped_as_the_walk_is(ragged):
    """By `vmap`, over caches and queries."""
    new = [jnp.asarray(np.stack([tokens(s, B, 70, dim=D)[0] for s in (i, i + 3)]), "bfloat16")
           for i in (0, 1)]  # fmt: skip
    query = jnp.stack([asked(seed, 1) for seed in (0, 1)])
    state = make(lj.Static(SLOTS), ragged=ragged, dim=D, value_dim=D, dtype="bfloat16")

    def run(name):
        def step(query, key, value):
            return lj.extend(
                lj.update(state, key[:, :, 1:], value[:, :, 1:], 0), query, key[:, :, :1],
                value[:, :, :1], 0, implementation=name, return_lse=True,
            )[0]  # fmt: skip

        return jax.tree.map(np.float32, jax.vmap(step)(query, *new))

    agree(run("kernel"), run("walk"), rtol=2**-7, atol=1e-5)


@interprets
@pytest.mark.parametrize("codec", ["identity", "int4"])
def test_it_counts_in_32_bits_where_64_are_enabled(codec):
    query = asked(0, 1, dtype="float32")
    with jax.enable_x64(True):
        agree(*both(stored(LAYOUTS["static"].but(codec=CODECS[codec])), query))
        agree(*both(stored(LAYOUTS["sliding"].but(codec=CODECS[codec]), ragged=True), query))


@interprets
def test_decoding_goes_on_as_with_the_walk():
    """Chunks and single tokens through a ring, rows of different lengths, layers stacked."""
    state = make(
        LAYOUTS["sliding"], layers=3, ragged=True, stacked=True, dim=D, value_dim=DV,
        dtype="bfloat16",
    )  # fmt: skip
    states = dict.fromkeys(("kernel", "walk"), state)
    for seed, lengths in enumerate(([140, 9], [40, 150], [1, 1], [2, 0])):
        count = max(lengths)
        query = asked(seed, count)
        new = [jnp.asarray(x, "bfloat16") for x in tokens(seed, B, count, dim=D, value_dim=DV)]
        found = []
        for name in states:
            name_ = "walk" if count > 20 else name
            pair, states[name] = lj.extend(
                states[name], query, *new, 1, lengths=lengths, implementation=name_, return_lse=True
            )
            found.append(jax.tree.map(lambda x: np.asarray(x, np.float32), pair))
        agree(*found, rtol=1e-2, atol=1e-5)


@interprets
def test_a_chunk_that_a_ring_must_read_first_is_a_run_of_its_own():
    """What is about to be overwritten, and the chunk: of a ring without slack."""
    state = stored(lj.Sliding(150, sinks=3))
    new = [jnp.asarray(x, "bfloat16") for x in tokens(5, B, 5, dim=D, value_dim=DV)]
    got, expected = (
        lj.extend(
            state, asked(1, 5, dtype="float32"), *new, 0, implementation=name, return_lse=True
        )[0]
        for name in ("kernel", "walk")
    )
    agree(got, expected)


@interprets
def test_values_that_are_not_finite_reach_who_sees_them():
    """And no other query of the call."""
    state = stored(lj.Static(SLOTS))
    key, value = tokens(9, B, 2, dim=D, value_dim=DV)
    value[0, 0, 1] = np.nan
    state = lj.update(state, *(jnp.asarray(x, "bfloat16") for x in (key, value)), 0)
    got, expected = both(state, asked(0, 2))
    np.testing.assert_array_equal(np.isnan(got[0]), np.isnan(expected[0]))
    assert np.isnan(got[0][0, 0, 1]).all() and not np.isnan(got[0][:, :, 0]).any()


@interprets
def test_its_gradient_is_that_of_the_walk():
    """By queries, keys, values, sinks and bias, through output and log-sum-exp."""
    new = [jnp.asarray(x, "bfloat16") for x in tokens(7, B, 2, dim=D, value_dim=DV)]
    start = stored(LAYOUTS["static"])

    def f(name, query, key, value, sinks, bias):
        (out, lse), _ = lj.extend(
            start, query, key, value, 0, implementation=name, return_lse=True, softcap=3.0,
            sink_logits=sinks, bias=bias,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    given = (asked(0, 2, dtype="float32"), *new, jnp.ones(N), jnp.ones((B, 1, 1, 1)))
    got, expected = (
        jax.jit(jax.grad(functools.partial(f, name), argnums=range(5)))(*given)
        for name in ("kernel", "walk")
    )
    for a, b in zip(got, expected, strict=True):
        rtol = 1e-4 if a.dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=rtol, atol=1e-4)


@interprets
def test_it_runs_elsewhere_only_if_interpreted():
    """Forced by name on this platform it says how."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    state, query = stored(lj.Static(SLOTS)), asked(0, 1, dtype="float32")
    with pytest.raises(ValueError, match=r"runs on GPUs, .*force_gpu_interpret_mode"):
        lj.attend(state, query, 0, implementation="mosaic_gpu")
    with plgpu.force_gpu_interpret_mode():
        got = lj.attend(state, query, 0, implementation="mosaic_gpu")
    expected = lj.attend(state, query, 0, implementation="walk")
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)


def test_it_is_tried_first_on_gpus_alone():
    assert backends._TRIED["gpu"][0] is mosaic_gpu
    assert mosaic_gpu not in backends._TRIED["cpu"] + backends._TRIED["tpu"]


@pytest.mark.skipif(jax.__version_info__ >= JAX, reason="this JAX is new enough")
def test_an_older_jax_is_named():
    with pytest.raises(ValueError, match=r"wants jax 0.12 or newer, and this is"):
        lj.attend(stored(lj.Static(SLOTS)), asked(0, 1), 0, implementation="mosaic_gpu")


@interprets
@pytest.mark.parametrize("spec, options, lacks", [
    (lj.Static(SLOTS), {"rope_theta": 10.0}, "rotate keys"),
    (lj.Static(SLOTS), {"count": 33}, "at most 64 queries of a KV head, not 66"),
    (lj.Static(SLOTS), {"dim": 24}, "16 channels at a time, .*dim=24"),
    (lj.Static(SLOTS, lj.codecs.KIVI()), {}, "does not read ChannelNibbles"),
    (lj.Static(60), {}, "64 slots at a time"),
])  # fmt: skip
def test_what_it_does_not_take_it_names(spec, options, lacks):
    """So the next backend is asked."""
    dim, count = options.pop("dim", D), options.pop("count", 1)
    state = make(spec, dim=dim, value_dim=dim, dtype="bfloat16")
    with pytest.raises(ValueError, match=lacks):
        lj.attend(state, asked(0, count, dim), 0, implementation="kernel", **options)


@interprets
def test_it_leaves_a_mesh_whose_work_the_compiler_divides():
    """A kernel is one device's; in `shard_map`, which the interpreter does not take, it is."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state = stored(lj.Static(SLOTS))
    divided = jax.device_put(state, lj.shardings(state, mesh, heads="x"))
    with pytest.raises(ValueError, match="not divided over a mesh by the compiler"):
        lj.attend(divided, asked(0, 1), 0, implementation="kernel")


@interprets
@pytest.mark.parametrize("layout, options, blocks", [
    ("static", {}, 5), ("static", {"window": 20}, 3), ("static", {"window": 1}, 2),
    ("sliding", {}, 5), ("sliding", {"window": 30}, 3),
])  # fmt: skip
def test_blocks_that_hold_nothing_seen_are_not_read(layout, options, blocks, monkeypatch):
    """A window skips what lies before it, a short row what lies after it."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    copies, own = [], gpu_callbacks.copy_gmem_to_smem

    def copy(**call):
        copies.append(call)
        return own(**call)

    monkeypatch.setattr(gpu_callbacks, "copy_gmem_to_smem", copy)
    state = stored(LAYOUTS[layout], ragged=True)
    jax.clear_caches()  # an earlier program would call the interpreter's own
    lj.attend(state, asked(0, 1), 0, implementation="kernel", **options).block_until_ready()
    jax.clear_caches()
    # Of each KV head and row the queries twice, and keys and values; where two positions do not say
    # what is seen, also that, of all blocks.
    looked_at = 0 if layout == "static" else -(-state.layers[0].num_slots // 64)
    assert len(copies) == B * H * (2 + looked_at) + H * 2 * blocks
