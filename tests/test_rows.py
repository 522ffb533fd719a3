"""Batch rows as slots of a running batch, eviction of chosen tokens, and layers that differ."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.attention.dense import dot_product
from tests.helpers import (
    USERS_XLA,
    H,
    assert_same,
    make,
    more_layouts,
    poison,
    queries,
    snapshot,
    stored,
    tokens,
    with_slots_of_older_versions,
)

SPECS = {
    "static": lj.Static(20),
    "dynamic": lj.Dynamic(),
    "sliding": lj.Sliding(6, 2, 3),
    "int4": lj.Static(20, lj.codecs.Int4()),
    "kivi": lj.Static(20, lj.codecs.KIVI(group=4, residual=2)),
    "sliding-kivi": lj.Sliding(8, 2, 3, lj.codecs.KIVI(group=4, residual=2)),
    "tracked": lj.Static(20, track=True),
    **{name: new() for name, new in more_layouts(20).items()},
}
LENGTHS = [12, 3, 0, 7]


@pytest.fixture(params=SPECS.values(), ids=SPECS)
def spec(request):
    """A layout and codec."""
    return request.param


def _batch(spec, lengths=LENGTHS, seed=0, **options):
    state = make(spec, batch=len(lengths), ragged=True, **options)
    return lj.update(state, *tokens(seed, len(lengths), 12), 0, lengths=lengths)


def _row(state, row):
    return [x[row] if x.ndim else x for x in snapshot(state)[0]]


def _same_row(state, row, other, other_row):
    for ours, theirs in zip(_row(state, row), _row(other, other_row), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "donated", "jitted"])
def test_insert_replaces_rows_and_nothing_else(spec, mode):
    """Rows 3 and 1 become the other state's rows 0 and 1, now and in what follows."""
    state, other = _batch(spec), _batch(spec, [9, 11], seed=1)
    expected = {3: (other, 0), 1: (other, 1), 0: (_batch(spec), 0), 2: (_batch(spec), 2)}
    call = jax.jit(lj.insert) if mode == "jitted" else lj.insert
    options = {"donate": True} if mode == "donated" else {}
    joined = call(state, np.array([3, 1]), other, **options)
    for step in range(3):
        new = tokens(5 + step, 4, 2)
        out = lj.attend(lj.update(joined, *new, 0), queries(step, 4, 2), 0)
        for row, (source, at) in expected.items():
            _same_row(joined, row, source, at)
            alone = lj.update(lj.extract(source, at), *(x[row : row + 1] for x in new), 0)
            one = lj.attend(alone, queries(step, 4, 2)[row : row + 1], 0)
            np.testing.assert_allclose(out[row : row + 1], one, rtol=1e-5, atol=1e-5)
            expected[row] = (alone, 0)
        joined = lj.update(joined, *new, 0)


def test_an_aligned_prompt_of_another_capacity_joins(spec):
    """What was prefilled alone, in a smaller or larger cache, is a row of the running batch."""
    other = spec if not spec.bounded else lj.Static(8, spec.codec, spec.track)
    one = make(other, batch=1)
    one = lj.update(one, *tokens(2, 1, 7), 0)
    joined = lj.insert(_batch(spec), [2], one)
    for ours, theirs in zip(stored(joined, row=2), stored(one), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert lj.positions(joined, 1).ravel().tolist() == [12, 3, 7, 7]


def test_extract_then_insert_is_the_identity(spec):
    """Sinks, residuals and positions included."""
    state = _batch(spec)
    for row in range(4):
        assert_same(lj.insert(state, [row], lj.extract(state, row)), state)


def test_concat_is_all_rows_in_order(spec):
    """And splitting it again gives the parts."""
    a, b = _batch(spec), _batch(spec, [5, 12], seed=3)
    joined = lj.concat([a, b])
    assert joined.batch_size == 6
    for row in range(6):
        _same_row(joined, row, *((a, row) if row < 4 else (b, row - 4)))
    assert_same(lj.select(joined, range(4)), a)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_concat_takes_states_of_older_versions(spec, stacked, traced):
    """Out of a checkpoint, whose slots were not rounded up to tiles: they were refused."""
    a, b = _batch(spec, layers=2, stacked=stacked), _batch(spec, [5], 3, layers=2, stacked=stacked)
    older = with_slots_of_older_versions(b)
    concat = jax.jit(lj.concat) if traced else lj.concat
    for states in ([a, older], [older, a]):
        joined = concat(states)
        assert joined.layers[0].num_slots == a.layers[0].num_slots
        assert_same(joined, lj.concat([a, b] if states[0] is a else [b, a]))


@pytest.mark.parametrize(
    "rows", [[0, 3], np.array([True, False, False, True])], ids=["ids", "mask"]
)
@pytest.mark.parametrize("mode", ["eager", "donated", "jitted"])
def test_freed_rows_are_empty_and_never_seen_again(spec, rows, mode):
    """The next sequence in a freed row is as in a fresh cache, whatever the old slots hold."""
    call = jax.jit(lj.free) if mode == "jitted" else lj.free
    options = {"donate": True} if mode == "donated" else {}
    freed = poison(call(_batch(spec), jnp.asarray(rows), **options))
    assert lj.seq_length(freed)[0] == lj.seq_length(freed)[3] == 0
    _same_row(freed, 1, _batch(spec), 1)
    new = tokens(9, 4, 4)
    out = lj.attend(lj.update(freed, *new, 0), queries(0, 4, 3), 0)
    fresh = lj.update(make(spec, batch=4, ragged=True), *new, 0)
    expected = lj.attend(fresh, queries(0, 4, 3), 0)
    for row in (0, 3):
        np.testing.assert_array_equal(out[row], expected[row])
        _same_row(lj.update(freed, *new, 0), row, fresh, row)


def test_rows_that_sit_out_write_nothing(spec):
    """`lengths` 0 leaves a row as it was, storage included."""
    state = _batch(spec)
    after = lj.update(state, *tokens(4, 4, 3), 0, lengths=[0, 2, 0, 3])
    for row in (0, 2):
        _same_row(after, row, state, row)
        old, new = (lj.select(s, [row]).layers[0] for s in (state, after))
        chex.assert_trees_all_equal(old, new)


def test_a_traced_insert_that_does_not_fit_changes_nothing_but_the_flag():
    """Rows out of range, and more tokens than the capacity."""
    state = _batch(lj.Static(12, track=True))
    insert = jax.jit(lj.insert)
    large = make(lj.Static(20), batch=1, ragged=True)
    large = lj.update(large, *tokens(1, 1, 15), 0)
    for rows, other in (([1], large), ([-1], lj.extract(state, 0)), ([4], lj.extract(state, 0))):
        refused = insert(state, np.array(rows), other)
        assert np.asarray(lj.overflowed(refused)).any()
        for before, after in zip(snapshot(state)[0][:4], snapshot(refused)[0][:4], strict=True):
            np.testing.assert_array_equal(before, after)
        assert_same(lj.rollback(refused, [1, 1, 0, 1]).replace(layers=refused.layers), refused)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda s: lj.insert(make(batch=4), [0], lj.extract(s, 0)), ValueError, "ragged"),
        (lambda s: lj.insert(s, [0, 0], lj.select(s, [1, 2])), ValueError, "distinct"),
        (lambda s: lj.insert(s, [0, 1], lj.extract(s, 0)), ValueError, "one row number per row"),
        (lambda s: lj.insert(s, [4], lj.extract(s, 0)), IndexError, r"\[0, 4\)"),
        (lambda s: lj.insert(s, [0.5], lj.extract(s, 0)), TypeError, "integers"),
        (lambda s: lj.insert(s, [0], make(lj.Sliding(4), batch=1)), ValueError, "same layout"),
        (lambda s: lj.insert(s, [0], make(batch=1, layers=2)), ValueError, "same layers"),
        (
            lambda s: lj.insert(
                s, [0], lj.update(make(lj.Static(40), batch=1), *tokens(0, 1, 33), 0)
            ),
            ValueError,
            "33",
        ),
        (lambda s: lj.extract(s, 4), IndexError, r"\[0, 4\)"),
        (lambda s: lj.extract(s, -1), IndexError, r"\[0, 4\)"),
        (lambda s: lj.concat([]), ValueError, "at least one"),
        (lambda s: lj.concat([s, make(lj.Static(9), ragged=True)]), ValueError, "equal layers"),
        (
            lambda s: lj.concat(
                [make(lj.Static(64), ragged=True), make(lj.Dynamic(), ragged=True)]
            ),
            ValueError,
            "equal layers",
        ),
        (lambda s: lj.free(s, [7]), IndexError, r"\[0, 4\)"),
        (lambda s: lj.free(s, [True]), ValueError, r"\(4,\)"),
        (lambda s: lj.free(make(batch=4), [0]), ValueError, "ragged"),
    ],
    ids=range(16),
)
def test_rows_that_cannot_move_are_refused_with_the_fix(call, error, says):
    """Before anything changes."""
    with pytest.raises(error, match=says):
        call(_batch(lj.Static(20)))


def test_moving_rows_compiles_once_and_makes_no_copy(compilations):
    """Whatever the rows and lengths; temporaries stay below one buffer."""
    state, one = _batch(lj.Static(20)), _batch(lj.Static(20), [5])
    for row in range(4):
        if row == 1:
            before = compilations()
        state = lj.free(lj.insert(state, [row], one, donate=True), [(row + 1) % 4], donate=True)
    assert compilations() == before
    large = make(lj.Static(4096), batch=4, ragged=True, dim=64, value_dim=64)
    new = make(lj.Static(4096), batch=1, ragged=True, dim=64, value_dim=64)
    run = jax.jit(lambda s, o: lj.insert(s, jnp.array([2]), o), donate_argnums=0)
    scratch = run.lower(large, new).compile(USERS_XLA).memory_analysis().temp_size_in_bytes
    assert scratch < large.layers[0].key.nbytes / 8


def test_a_residual_longer_than_a_block_moves_whole():
    """Of the full-precision ring every slot counts, however few the other layer has."""
    codec = lj.codecs.KIVI(group=64, residual=128)
    one = make(lj.Static(320, codec), batch=1)
    one = lj.update(one, *tokens(0, 1, 310), 0)
    joined = lj.insert(make(lj.Static(640, codec), batch=2, ragged=True), [1], one)
    for ours, theirs in zip(stored(joined, row=1), stored(one), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_freeing_nothing_or_a_row_that_is_not_there():
    """No rows: no change. Traced, a row out of range is flagged, as everywhere."""
    state = _batch(lj.Static(20))
    assert_same(lj.free(state, []), state)
    flagged = jax.jit(lj.free)(state, np.array([5]))
    assert np.asarray(lj.overflowed(flagged)).all()
    np.testing.assert_array_equal(lj.seq_length(flagged), lj.seq_length(state))


def test_a_state_is_not_donated_into_itself():
    """The rows to insert would be gone."""
    state = _batch(lj.Static(20))
    with pytest.raises(ValueError, match="shares its buffers"):
        lj.insert(state, [1, 0, 2, 3], state, donate=True)
    assert_same(lj.insert(state, [1, 0, 2, 3], state), lj.select(state, [1, 0, 2, 3]))


def test_of_rows_named_twice_the_last_wins_in_every_leaf():
    """A traced caller may name a row twice; contents and counters then come from one sequence."""
    other = _batch(lj.Static(20), [9, 4], seed=1)
    joined = jax.jit(lj.insert)(_batch(lj.Static(20)), np.array([1, 1]), other)
    _same_row(joined, 1, other, 1)


def test_rows_need_room_only_in_their_own_layers():
    """A layer that holds little is not asked to hold what another does."""
    specs = [lj.Static(8), lj.Dynamic(), lj.Sliding(4)]
    sizes = {"batch_size": 1, "num_kv_heads": H, "head_dim": 4, "value_head_dim": 3, "ragged": True}
    one = lj.init_cache(specs, **sizes)
    for i, count in enumerate((5, 100, 20)):
        one = lj.update(one, *tokens(i, 1, count), i)
    joined = lj.insert(lj.init_cache(specs, **sizes), [0], one)
    assert [lj.seq_length(joined, i).tolist() for i in range(3)] == [[5], [100], [4]]
    roomy = lj.ensure_capacity(joined, 3)
    assert [lj.capacity(roomy, i) for i in range(3)] == [8, 128, 4]
    with pytest.raises(ValueError, match="layer 0 cannot grow: 9 tokens"):
        lj.ensure_capacity(joined, 4)


# --- eviction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [lj.codecs.Identity(), lj.codecs.Int4()], ids=["raw", "int4"])
@pytest.mark.parametrize("mode", ["eager", "donated", "jitted"])
def test_compact_keeps_the_chosen_tokens_of_each_head_in_order(mode, codec):
    """Keys, values and positions; then new tokens follow, and attention sees just these."""
    state = make(lj.Static(12, codec), batch=2, ragged=True)
    state = lj.update(state, *tokens(0, 2, 10), 0, lengths=[10, 6])
    keys, values, _ = lj.get(state, 0)
    keep = np.zeros((2, H, 12), bool)
    picks = {(0, 0): [0, 3, 9], (0, 1): [2, 4, 5], (1, 0): [1, 5], (1, 1): [0, 1]}
    for (row, head), slots in picks.items():
        keep[row, head, slots] = True
    keep[1, :, 8] = True  # holds nothing, so counts for nothing
    call = jax.jit(lj.compact, static_argnames="layer_idx") if mode == "jitted" else lj.compact
    options = {"donate": True} if mode == "donated" else {}
    small = poison(call(state, keep, layer_idx=0, **options))
    assert lj.seq_length(small).tolist() == [3, 2]
    assert lj.positions(small, 1).ravel().tolist() == [10, 6]
    new = tokens(1, 2, 2)
    longer = lj.update(small, *new, 0)
    query = queries(0, 2, 2)
    for window in (None, 4):
        out = lj.attend(longer, query, 0, window=window)
        got = lj.get(longer, 0)
        for (row, head), slots in picks.items():
            where = jnp.array(slots)
            k, v = (
                jnp.concatenate([old[row, head][where], g[row, head, len(slots) : len(slots) + 2]])
                for old, g in zip((keys, values), got[:2], strict=True)
            )
            at = [*slots, *(int(lj.positions(small, 2)[row, i]) for i in range(2))]
            expected = dot_product(
                query[row : row + 1, 2 * head : 2 * head + 2], k[None, None], v[None, None],
                query_positions=jnp.array(at[-2:]), key_positions=jnp.array(at), window=window,
            )  # fmt: skip
            np.testing.assert_allclose(
                out[row, 2 * head : 2 * head + 2], expected[0], rtol=1e-5, atol=1e-5
            )
            np.testing.assert_array_equal(got[0][row, head][: len(slots)], keys[row, head][where])
    with pytest.raises(ValueError, match="compact"):
        lj.rollback(small, 1)
    assert_same(lj.rollback(longer, 2), small)
    assert lj.seq_length(lj.crop(longer, 1)).tolist() == [1, 1]


def test_evicting_in_a_compiled_loop_keeps_the_carry():
    """An H2O-like loop: append, and when full keep the best; one program, no growth."""
    spec = lj.Static(8, track=True)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(state, keys, values, query):
        def step(state, new):
            out, state = lj.extend(state, query, *(x[:, :, None] for x in new), 0)
            stored_keys, stored_values, valid = lj.get(state, 0)
            best = lj.scoring.keep_best(
                lj.scoring.sinks_and_recent(stored_keys, stored_values, valid, sinks=2), 7
            )
            return lj.compact(state, best, 0), out

        moved = (jnp.moveaxis(keys, 2, 0), jnp.moveaxis(values, 2, 0))
        return jax.lax.scan(step, state, moved)

    chex.clear_trace_counter()
    key, value = (jnp.asarray(x) for x in tokens(0, 1, 30))
    query = jnp.asarray(queries(0, 1, 1))
    state, outs = run(make(spec, batch=1), key, value, query)
    assert not np.asarray(lj.overflowed(state)).any()
    # Keeping two sinks and the five latest, and then one more, is a window of six with two sinks.
    ring, expected = make(lj.Sliding(6, 2), batch=1), []
    for i in range(30):
        out, ring = lj.extend(ring, query, key[:, :, i : i + 1], value[:, :, i : i + 1], 0)
        expected.append(out)
    np.testing.assert_allclose(outs, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_unequal_eviction_is_refused_eagerly_and_flagged_traced():
    """Heads must keep equally many tokens, and rows too unless ragged."""
    compact = jax.jit(lj.compact, static_argnames="layer_idx")
    for ragged, keep in (
        (True, np.arange(8) < np.array([3, 4])[None, :, None]),
        (False, np.arange(8) < np.array([3, 4])[:, None, None]),
    ):
        state = lj.update(make(ragged=ragged), *tokens(0, 2, 6), 0)
        with pytest.raises(ValueError, match="equally many"):
            lj.compact(state, keep, 0)
        flagged = compact(state, keep, layer_idx=0)
        assert np.asarray(lj.overflowed(flagged)).all()
        np.testing.assert_array_equal(lj.get(flagged, 0)[0], lj.get(state, 0)[0])
        assert np.all(lj.seq_length(lj.rollback(flagged, 2)) == 4)  # nothing was evicted


def test_positions_of_stored_tokens_are_remembered():
    """`stored_positions` says them per head; one position for all heads there no longer is."""
    state = lj.update(make(batch=1), *tokens(0, 1, 6), 0)
    assert lj.stored_positions(state).tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    state = lj.compact(state, np.isin(np.arange(8), [0, 3, 4]), 0)
    assert lj.stored_positions(state)[0].tolist() == [[0, 3, 4, -1, -1, -1, -1, -1]] * H
    for call in (
        lambda: lj.positions(state, 1, cache_position=0),
        lambda: lj.attend(state, queries(0, 1, 1), 0, cache_position=0),
    ):
        with pytest.raises(ValueError, match="append instead"):
            call()


def test_eviction_moves_only_what_is_stored_and_in_place():
    """Temporaries stay far below one buffer, and a donated buffer is reused."""
    state = make(lj.Static(4096, track=True), batch=1, dim=64, value_dim=64)
    keep = jnp.arange(4096) % 2 == 0
    run = jax.jit(lambda s: lj.compact(s, keep, 0), donate_argnums=0)
    scratch = run.lower(state).compile(USERS_XLA).memory_analysis().temp_size_in_bytes
    buffer = state.layers[0].key
    assert scratch < buffer.nbytes / 4
    pointer = buffer.unsafe_buffer_pointer()
    assert lj.compact(state, keep, 0, donate=True).layers[0].key.unsafe_buffer_pointer() == pointer


@pytest.mark.parametrize(
    ("spec", "keep", "error", "says"),
    [
        (lj.Sliding(8), np.ones(8, bool), ValueError, "Static or Dynamic"),
        (lj.Static(8, lj.codecs.KIVI(2, 1)), np.ones(8, bool), ValueError, "by itself"),
        (lj.Static(8), np.ones(8, np.int32), TypeError, "keep_best"),
        (lj.Static(8), np.ones(7, bool), ValueError, r"\(2, 2, 8\)"),
    ],
    ids=range(4),
)
def test_what_cannot_be_evicted_is_refused_with_the_fix(spec, keep, error, says):
    """Layouts, codecs, dtypes and shapes."""
    with pytest.raises(error, match=says):
        lj.compact(make(spec), keep, 0)


def test_a_tracked_layer_takes_no_places():
    """After eviction an index is no one position."""
    with pytest.raises(ValueError, match="append instead"):
        lj.update(make(lj.Static(8, track=True)), *tokens(0, 2, 1), 0, 3)


# --- layers that differ ----------------------------------------------------------------------------

MIXED = [
    lj.Static(12), lj.Sliding(3, 1, 1), lj.Shared(0), lj.Dynamic(lj.codecs.Int8()),
    lj.Shared(1), lj.Static(12, lj.codecs.KIVI(2, 1)),
]  # fmt: skip
HEADS, DIMS, VALUE_DIMS = [2, 1, 2, 4, 1, 2], [4, 8, 4, 2, 8, 4], [4, 3, 4, 2, 3, 6]


def _mixed(**options):
    return lj.init_cache(
        MIXED, batch_size=2, num_kv_heads=HEADS, head_dim=DIMS, value_head_dim=VALUE_DIMS, **options
    )


def test_mixed_layers_behave_as_each_does_alone():
    """Layouts, codecs, heads and widths differ per layer; shared layers read another's tokens."""
    state = _mixed()
    alone = {
        i: lj.init_cache(MIXED[i], num_layers=1, batch_size=2, num_kv_heads=HEADS[i],
                         head_dim=DIMS[i], value_head_dim=VALUE_DIMS[i])
        for i in (0, 1, 3, 5)
    }  # fmt: skip
    for step in range(4):
        for i, one in alone.items():
            new = tokens(step, 2, 2, HEADS[i], DIMS[i], VALUE_DIMS[i])
            query = queries(step, 2, 2, 2 * HEADS[i], DIMS[i])
            out, state = lj.extend(state, query, *new, i)
            expected, alone[i] = lj.extend(one, query, *new, 0)
            np.testing.assert_array_equal(out, expected)
        for reader, owner in ((2, 0), (4, 1)):
            query = queries(step, 2, 1, HEADS[owner], DIMS[owner])
            np.testing.assert_array_equal(
                lj.attend(state, query, reader), lj.attend(state, query, owner)
            )
            assert lj.seq_length(state, reader) == lj.seq_length(state, owner)
    state = lj.rollback(state, 1)
    for i, one in alone.items():
        for ours, theirs in zip(lj.get(state, i), lj.get(lj.rollback(one, 1), 0), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert state.num_layers == 6 and len(state.layers) == 4
    assert lj.nbytes(state) == sum(lj.nbytes(one) for one in alone.values())


def test_a_sharing_layer_stores_nothing_and_says_who_does():
    """Or every token would be stored twice; donation stays possible as no buffer is there twice."""
    state = _mixed()
    new = tokens(0, 2, 1, 2, 4, 4)
    for call in (lj.update, lambda s, k, v, i: lj.extend(s, queries(0, 2, 1), k, v, i)):
        with pytest.raises(ValueError, match="update layer 0 only"):
            call(state, *new, 2)
    leaves = jax.tree.leaves(lj.select(state, [1, 0], donate=True))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize(
    ("specs", "sizes", "says"),
    [
        ([lj.Static(4), lj.Shared(1)], {}, "earlier layer"),
        ([lj.Shared(0), lj.Static(4)], {}, "earlier layer"),
        ([lj.Static(4), lj.Shared(0), lj.Shared(1)], {}, "earlier layer"),
        ([lj.Static(4), lj.Shared(0)], {"num_kv_heads": [2, 1]}, "must be that of layer 0"),
        ([lj.Static(4)] * 2, {"num_kv_heads": [2]}, "1 entries for 2"),
        ([lj.Static(4)] * 2, {"head_dim": [2, 0]}, "at least 1"),
    ],
    ids=range(6),
)
def test_layers_that_make_no_sense_are_refused(specs, sizes, says):
    """At the start."""
    with pytest.raises(ValueError, match=says):
        lj.init_cache(specs, **{"batch_size": 1, "num_kv_heads": 2, "head_dim": 4, **sizes})


def test_errors_name_the_layers_of_the_model():
    """Not the number of the stored state, where some layers share one."""
    specs = [lj.Static(4), lj.Shared(0), lj.Static(2)]
    state = lj.init_cache(specs, batch_size=1, num_kv_heads=H, head_dim=4, value_head_dim=3)
    full = jax.jit(lambda s: lj.update(lj.update(s, *tokens(0, 1, 2), 2), *tokens(0, 1, 1), 2))(
        state
    )
    with pytest.raises(OverflowError, match="layer 2"):
        lj.check_overflow(full)
    with pytest.raises(ValueError, match="layer 2 cannot grow"):
        lj.grow(state, 3)


def test_a_mixed_state_is_one_carry():
    """jit, scan and donation take it as any other state."""
    state = _mixed(ragged=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state):
        def step(state, _):
            for i in (0, 1, 3, 5):
                sizes = ((2, HEADS[i], 1, n) for n in (DIMS[i], VALUE_DIMS[i]))
                new = (jnp.ones(size, jnp.float32) for size in sizes)
                state = lj.update(state, *new, i, lengths=jnp.array([1, 0]))
            return state, None

        return jax.lax.scan(step, state, length=5)[0]

    state = run(state)
    assert [lj.seq_length(state, i).tolist() for i in range(6)] == [
        [5, 0], [4, 0], [5, 0], [5, 0], [4, 0], [5, 0],
    ]  # fmt: skip
