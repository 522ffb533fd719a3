"""The kernel for TPUs with a prompt's queries in tiles, interpreted: it says what the walk says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.attention import backends, blocks
from lucid_jax.attention.tpu.backend import PallasTPU
from lucid_jax.attention.tpu.tiles import FEW, Tiles
from tests.helpers import H, make, poison, queries, tokens
from tests.kernels import agree

pytestmark = pytest.mark.usefixtures("pallas_kernel")
B, BEFORE = 2, 150  # what is stored before a prompt's chunk
SLOTS = BEFORE + 600
LAYOUTS = {
    "static": lj.Static(SLOTS),
    "tracked": lj.Static(SLOTS, track=True),
    "sliding": lj.Sliding(200, sinks=3, slack=4),
    "roomy ring": lj.Sliding(200, sinks=3, slack=530),
    "chunked": lj.Chunked(200, slack=4),
}
CODECS = {
    "identity": lj.codecs.Identity(),
    "bits": lj.codecs.Bits(),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(rotate=True),
    "int4": lj.codecs.Int4(),
    "int4 in groups": lj.codecs.Int4(group=1, rotate=False),
    "kivi": lj.codecs.KIVI(group=16, residual=20),
}
DRAWN = np.random.default_rng(0)
OPTIONS = {
    "window": {"window": 40},
    "softcap and sinks": {"softcap": 2.0, "sink_logits": np.float32([0.5, -1.0, 2.0, -np.inf] * 2)},
    "mask": {"mask": DRAWN.random(SLOTS) > 0.3},
    "mask by query": {"mask": DRAWN.random((B, 1, 65, SLOTS)) > 0.3},
    "bias by head": {"bias": DRAWN.standard_normal((8, 1, SLOTS)).astype(np.float32)},
    "bias by head and query": {"bias": DRAWN.standard_normal((8, 65, SLOTS)).astype(np.float32)},
    "bias by row": {"bias": DRAWN.standard_normal((B, 1, 1, 1)).astype(np.float32)},
    "places": {"cache_position": np.int32([np.arange(65), np.arange(64, -1, -1)]) + 9},
}


def stored(spec, ragged=True, **options):
    """A cache of some tokens, of rows of different lengths if ragged; dead slots hold NaN."""
    state = make(spec, ragged=ragged, **options)
    new = tokens(0, B, BEFORE, dtype=state.layers[0].packing.forms["key"].dtype)
    return poison(lj.update(state, *new, 0, lengths=[BEFORE, 70] if ragged else None))


def both(state, count, group, **options):
    """Output and log-sum-exp of a chunk, by the kernel and by the walk."""
    ragged, dtype = state.layers[0].ragged, state.layers[0].packing.forms["key"].dtype
    query = jnp.asarray(queries(1, B, count, H * group), dtype)
    lengths = [count, max(count - 9, 0)] if ragged and "cache_position" not in options else None
    return [
        jax.tree.map(
            lambda x: np.asarray(x, np.float32),
            lj.extend(
                state, query, *tokens(2, B, count, dtype=dtype), 0, implementation=name,
                return_lse=True, lengths=lengths, **options,
            )[0],
        )
        for name in ("kernel", "walk")
    ]  # fmt: skip


@pytest.mark.parametrize("layout, ragged, count, group", [
    pytest.param(
        layout, ragged, count, group,
        marks=() if (layout, count, group) == ("static", 65, 4) else pytest.mark.exhaustive,
    )
    for layout in LAYOUTS
    for ragged in (False, True)
    for count, group in ((1, 8), (7, 4), (65, 4), (65, 8), (200, 1), (200, 4), (513, 1), (513, 8))
])  # fmt: skip
def test_a_prompt_goes_through_it_as_through_the_walk(layout, ragged, count, group):
    """Any number of queries, of rows of any lengths; what a ring is about to lose included."""
    got, expected = both(stored(LAYOUTS[layout], ragged), count, group)
    assert np.isfinite(got[0]).all()
    agree(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("option", [
    "window", "mask by query", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in OPTIONS),
])  # fmt: skip
def test_options(option):
    """Masks and biases, also by query, which come as arrays beside the positions."""
    got, expected = both(stored(LAYOUTS["static"]), 65, 4, **OPTIONS[option])
    agree(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec, dtype, stacked):
    """Queries and weights are rounded to what a TPU multiplies narrow tokens with."""
    state = stored(
        lj.Static(SLOTS, CODECS[codec]), dtype=dtype, layers=2 if stacked else 1, stacked=stacked
    )
    exact = dtype == "float32" and codec == "identity"
    agree(*both(state, 65, 4), rtol=1e-5, atol=1e-5 if exact else 2e-2)


def test_a_tile_reads_the_blocks_that_its_queries_see(monkeypatch):
    """The first of a prompt nothing that comes after, those in a window nothing that was before."""
    from lucid_jax.attention.tpu import kernel

    found, own = [], kernel.visits

    def keep(some):
        found.append(own(some))
        return found[-1]

    monkeypatch.setattr(kernel, "visits", keep)
    state = make(lj.Static(1300), heads=1, dim=4)
    tile = Tiles.of(4, 1200, 4)
    assert (tile.count, tile.each, tile.rows) == (10, 128, 512)
    run = functools.partial(lj.extend, state, queries(1, B, 1200, 4), *tokens(1, B, 1200, 1), 0)
    with jax.disable_jit():
        run(implementation="kernel")
        run(implementation="kernel", window=128)
    assert found[0].counts.tolist() == list(range(1, 11))
    assert found[1].counts.tolist() == [1] + 9 * [2]


@pytest.mark.parametrize("option", ["plain", "window", "bias by head and query"])
@pytest.mark.parametrize("scores", [1, blocks.FEW_SCORES])
def test_values_that_are_not_finite_reach_who_sees_them(scores, option, monkeypatch):
    """And no other query of the tile; also where all is walked again a few queries at a time."""
    monkeypatch.setattr(blocks, "FEW_SCORES", scores)
    # A backend of its own, as programs are compiled once for each.
    monkeypatch.setitem(backends._BY_NAME, "kernel", PallasTPU(interpret=True, block_bytes=scores))
    state, count, options = stored(lj.Static(SLOTS), False), 65, OPTIONS.get(option, {})
    query, (key, value) = queries(0, B, count, 8), tokens(9, B, count)
    expected = np.array(lj.extend(state, query, key, value, 0, implementation="walk", **options)[0])
    expected[0, :4, 30:] = np.nan
    value[0, 0, 30] = np.nan
    got, _ = lj.extend(state, query, key, value, 0, implementation="kernel", **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


def test_its_gradient_is_that_of_the_walk():
    """By queries, keys and values."""
    start = stored(lj.Static(SLOTS))

    def f(name, query, key, value):
        out, lse = lj.extend(
            start, query, key, value, 0, implementation=name, return_lse=True
        )[0]  # fmt: skip
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    given = jax.tree.map(jnp.asarray, (queries(0, B, 70), *tokens(7, B, 70)))
    got, expected = (
        jax.jit(jax.grad(functools.partial(f, name), argnums=range(3)))(*given)
        for name in ("kernel", "walk")
    )
    agree(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, FEW])
def test_under_vmap(count):
    """Rows of a batch of one's own, each with a cache."""
    state, query = stored(lj.Static(SLOTS)), queries(1, B, count)
    several = jax.tree.map(lambda *x: jnp.stack(x), state, lj.rollback(state, 40))
    asked = jnp.stack([query, -query])
    got, expected = (
        jax.vmap(lambda s, q, name=name: lj.attend(s, q, 0, implementation=name))(several, asked)
        for name in ("kernel", "walk")
    )
    agree([got], [expected], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("count", [1, FEW])
def test_with_64_bit_types(count):
    """What it counts and computes stays as narrow."""
    with jax.enable_x64(True):
        state = stored(lj.Static(SLOTS), dtype="float32")
        agree(*both(state, count, 2), rtol=1e-5, atol=2e-6)


def test_what_it_does_not_take_it_names():
    """So the next backend is asked."""
    wide = make(lj.Static(SLOTS, CODECS["int8"]), heads=8, dim=128, value_dim=128)
    query = jnp.zeros((B, 8 * 17, 65, 128))
    with pytest.raises(ValueError, match="reads blocks for 136 heads of 65 queries: too many"):
        lj.attend(wide, query, 0, implementation="kernel")
    narrow = make(lj.Static(SLOTS, CODECS["int8"]), heads=8)
    query = jnp.zeros((B, 8 * 64, 65, 4))
    with pytest.raises(ValueError, match="adds at most 2097152 bytes to the scores of a block"):
        bias = jnp.zeros((B, 8 * 64, 65, 1))
        lj.attend(narrow, query, 0, implementation="kernel", bias=bias)
