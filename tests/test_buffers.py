"""Buffers: slots moved in place, by whichever way a platform takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.cache import buffers
from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.stacked import Stacked
from tests.helpers import make

WAYS = {
    "others": jax.jit(buffers._shift_by_number),
    "ragged on TPU": jax.jit(buffers._shift_each),
    "ragged on TPU, of few numbers": jax.jit(buffers._shift_by_bits),
    "aligned on TPU": jax.jit(
        lambda leaf, rows, shift, kept: buffers._shift_alike(leaf, rows, shift[0], kept[0])
    ),
}


@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "stack"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slots", [3, 256, 520])
def test_slots_move_down(slots, way, stacked):
    """Of every row those that are kept, however far, also past the last whole block."""
    leaf = np.arange(4 * 2 * slots).reshape(4, 2, slots).astype(np.float32)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        shift = rng.integers(0, slots + 1, 4) if seed else np.array([slots - 1, 1, 0, slots // 2])
        shift = np.full(4, shift[0]) if way == "aligned on TPU" else shift
        kept = slots - shift if seed % 2 else rng.integers(0, slots - shift + 1)
        kept = np.full(4, kept[0]) if way == "aligned on TPU" else kept
        rows, given = Rows(), jnp.asarray(leaf)
        if stacked:
            rows, given = Stacked(jnp.int32(1)), jnp.stack([given + 9, given, given - 9])
        moved = WAYS[way](given, rows, *(jnp.asarray(x, jnp.int32) for x in (shift, kept)))
        own = rows.own(moved)
        for b in range(4):
            np.testing.assert_array_equal(
                own[b, :, : kept[b]], leaf[b, :, shift[b] : shift[b] + kept[b]]
            )
        if stacked:
            np.testing.assert_array_equal(moved[::2], given[::2])


@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "stack"])
@pytest.mark.parametrize("way", [buffers._clear_alike, buffers._clear_each])
@pytest.mark.parametrize("slots", [3, 64, 200])
def test_slots_of_each_row_are_cleared(slots, way, stacked):
    """Those and no others, of rows that have nothing to clear, or all; NaN too."""
    clear = jax.jit(way)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        leaf = rng.choice([np.nan, 1.0, 2.0], (4, 2, slots, 3)).astype(np.float32)
        start, stop = rng.integers(0, slots + 1, (2, 4), dtype=np.int32)
        start[0], stop[0] = (0, slots) if seed % 2 else (slots, slots)
        rows, given = Rows(), jnp.asarray(leaf)
        if stacked:
            rows, given = Stacked(jnp.int32(1)), jnp.stack([given + 9, given, given - 9])
        cleared = clear(given, rows, jnp.asarray(start), jnp.asarray(stop))
        for b in range(4):
            leaf[b, :, start[b] : stop[b]] = 0
        np.testing.assert_array_equal(rows.own(cleared), leaf)
        if stacked:
            np.testing.assert_array_equal(cleared[::2], given[::2])


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_crop_gathers_no_slots_on_a_tpu(ragged, stacked):
    """A gather of slots gives a leaf another layout there: it was copied whole, at each turn."""
    state = make(lj.Static(600), batch=3, ragged=ragged, stacked=stacked)
    crop = jax.jit(functools.partial(lj.crop, max_length=9))
    text = crop.trace(state).lower(lowering_platforms=("tpu",)).as_text()
    assert '"stablehlo.gather"' not in text


CHUNKS = (1, 7, 2, 30, 3)  # one of them longer than the rings below


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize(
    "spec",
    [
        lj.Static(50),
        lj.Static(50, lj.codecs.Int8()),
        lj.Sliding(20, 3, 4),
        lj.Sliding(2),
        lj.Sliding(24, 3, 4, lj.codecs.KIVI(4, 8)),
        lj.Chunked(16, slack=4),
    ],
    ids=repr,
)
def test_what_a_tpu_writes_is_the_same(spec, stacked, ragged, monkeypatch):
    """Windows, and tokens one by one, where others scatter; and leaves turned, of few numbers."""
    sizes = {"batch": 2, "heads": 2, "dim": 16, "value_dim": 16}
    tokens = jax.random.normal(jax.random.key(0), (2, 2, sum(CHUNKS), 16))

    def appended(tokens):
        state, first = make(spec, layers=2, stacked=stacked, ragged=ragged, **sizes), 0
        for count in CHUNKS:
            new = tokens[:, :, first : first + count]
            state, first = lj.update(state, new, -new, 1), first + count
        if not spec.codec.tail:  # a group of tokens cannot be written over
            new = tokens[:, :, :4]
            # Of two tokens for one place one is dropped; a place is skipped.
            after = np.array([-1, 1, 1, -2], np.int32)
            places = jnp.stack([lj.seq_length(state, 1) + by for by in after], axis=-1)
            state = lj.update(state, new, -new, 1, places)
        return state

    expected = jax.jit(appended)(tokens)
    assert not np.any(lj.overflowed(expected))

    def for_a_tpu(*args, default, tpu=None, **others):
        return (tpu or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", for_a_tpu)
    on_a_tpu = jax.jit(lambda tokens: appended(tokens))(tokens)
    jax.tree.map(np.testing.assert_array_equal, on_a_tpu, expected)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize("divided", [False, True])
def test_leaves_are_told_to_lie_as_they_do_on_a_tpu(divided, stacked):
    """Of few numbers a token they were copied around loops; those that are divided are not told."""
    state = make(lj.Static(600), layers=2, stacked=stacked, batch=2)
    if divided:
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        state = jax.device_put(state, lj.shardings(state, mesh, batch="x"))
    crop = jax.jit(functools.partial(lj.crop, max_length=9))
    text = crop.trace(state).lower(lowering_platforms=("tpu",)).as_text()
    assert ("LayoutConstraint" in text) != divided
