"""`update` and the batch verbs: what is refused and how, and what lands where."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.cache.codecs import default_codec
from tests.helpers import (
    DV,
    D,
    H,
    assert_same,
    filled,
    make,
    more_layouts,
    snapshot,
    stored,
    tokens,
)

B, T, C = 2, 3, 8
KEY, VALUE = tokens(1, B, T)


class OnlyArray:
    """An object with `__array__` and nothing else."""

    def __init__(self, x):
        self._x = np.asarray(x)

    def __array__(self, dtype=None, copy=None):
        return self._x if dtype is None else self._x.astype(dtype)


class OnlyDlpack:
    """An object with the DLPack protocol and nothing else."""

    def __init__(self, x):
        self._x = jnp.asarray(x)

    def __dlpack__(self, **options):
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._x.__dlpack_device__()


# --- what is refused -----------------------------------------------------------------------------


def _with(**changes):
    """Arguments of a good update, some replaced."""
    return {"key": KEY, "value": VALUE, "layer_idx": 0, **changes}


STATIC_ERRORS = {
    # name: (arguments, exception, words the message must hold)
    "key rank": (_with(key=KEY[0]), ValueError, ["batch, heads, seq, head_dim", "(2, 3, 4)"]),
    "value rank": (_with(value=VALUE[None]), ValueError, ["value", "(1, 2, 2, 3, 3)"]),
    "key heads": (_with(key=KEY[:, :1]), ValueError, ["heads=2", "(2, 1, 3, 4)"]),
    "value heads": (_with(value=VALUE[:, :1]), ValueError, ["heads=2", "(2, 1, 3, 3)"]),
    "key head_dim": (_with(key=KEY[..., :2]), ValueError, ["head_dim=4", "(2, 2, 3, 2)"]),
    "value head_dim": (_with(value=VALUE[..., :2]), ValueError, ["head_dim=3", "(2, 2, 3, 2)"]),
    "key as value": (_with(value=KEY), ValueError, ["head_dim=3", "(2, 2, 3, 4)"]),
    "batch": (_with(key=KEY[:1], value=VALUE[:1]), ValueError, ["batch=2", "(1, 2, 3, 4)"]),
    "token counts": (_with(value=VALUE[:, :, :2]), ValueError, ["same number", "3", "2"]),
    "key dtype": (_with(key=KEY.astype(np.float16)), TypeError, ["float16", "float32"]),
    "value dtype": (_with(value=VALUE.astype(np.int32)), TypeError, ["int32", "float32"]),
    "layer past the end": (_with(layer_idx=2), ValueError, ["[0, 2)", "2"]),
    "negative layer": (_with(layer_idx=-1), ValueError, ["[0, 2)", "-1"]),
    "float layer": (_with(layer_idx=0.0), TypeError, ["int", "0.0"]),
    "boolean layer": (_with(layer_idx=False), TypeError, ["int", "False"]),
    "float position": (_with(cache_position=np.arange(3.0)), TypeError, ["integers", "float"]),
    "boolean position": (_with(cache_position=np.ones(3, bool)), TypeError, ["integers", "bool"]),
    "text key": (_with(key="abcd"), TypeError, ["key must be an array of numbers", "str"]),
    "text position": (_with(cache_position=["a", "b", "c"]), TypeError, ["integers"]),
    "0-D for many": (_with(cache_position=4), ValueError, ["one token", "3"]),
    "1-D length": (_with(cache_position=[0, 1]), ValueError, ["(3,)", "(2,)"]),
    "2-D shape": (_with(cache_position=np.zeros((3, 2), int)), ValueError, ["(2, 3)", "(3, 2)"]),
    "3-D": (_with(cache_position=np.zeros((1, 2, 3), int)), ValueError, ["at most 2", "(1, 2, 3)"]),
    "negative position": (_with(cache_position=[0, -1, 2]), ValueError, ["negative", "-1"]),
    "position too far": (_with(cache_position=[0, 8, 2]), ValueError, ["9", "8", "capacity"]),
    "huge position": (_with(cache_position=[0, 2**40, 2]), ValueError, ["int32", str(2**40)]),
    "lengths on aligned": (_with(lengths=[1, 2]), ValueError, ["ragged"]),
}
RAGGED_ERRORS = {
    "lengths shape": (_with(lengths=[1, 2, 3]), ValueError, ["(2,)", "(3,)"]),
    "0-D lengths": (_with(lengths=2), ValueError, ["(2,)", "()"]),
    "float lengths": (_with(lengths=np.ones(2, np.float32)), TypeError, ["integers", "float32"]),
    "boolean lengths": (_with(lengths=[True, False]), TypeError, ["integers", "bool"]),
    "negative lengths": (_with(lengths=[-1, 2]), ValueError, ["[0, 3]", "-1"]),
    "lengths past the chunk": (_with(lengths=[1, 4]), ValueError, ["[0, 3]", "4"]),
}
ERRORS = [
    *((name, False, *case) for name, case in STATIC_ERRORS.items()),
    *((name, True, *case) for name, case in RAGGED_ERRORS.items()),
]


@pytest.mark.parametrize(
    "_, ragged, arguments, error, words", ERRORS, ids=[case[0] for case in ERRORS]
)
def test_a_wrong_update_says_what_was_expected_and_what_came(_, ragged, arguments, error, words):
    """The same exception eagerly (state untouched) and while tracing."""
    state, *_ = filled(2, layers=2, ragged=ragged)
    before = snapshot(state)
    with pytest.raises(error) as eager:
        lj.update(state, **arguments)
    for donate in (True, False):
        with pytest.raises(error):
            lj.update(state, **arguments, donate=donate)
    for old, new in zip(before, snapshot(state), strict=True):
        chex.assert_trees_all_equal(old, new)
    with pytest.raises(error) as traced:
        jax.eval_shape(lambda s: lj.update(s, **arguments), state)
    for message in (str(eager.value), str(traced.value)):
        for word in words:
            assert word in message, message


def test_a_traced_layer_index_is_refused():
    """A layer is chosen at trace time; a traced index says so."""
    with pytest.raises(TypeError, match="trace time"):
        jax.jit(lambda s, i: lj.update(s, KEY, VALUE, i))(make(), 0)


@pytest.mark.parametrize("position", [np.float32([0, 1, 2]), np.array([True, False, True])])
def test_traced_positions_that_are_not_integers_are_refused(position):
    """Tracers are checked by dtype like everything else."""
    with pytest.raises(TypeError, match="integers"):
        jax.jit(lambda s, p: lj.update(s, KEY, VALUE, 0, p))(make(), position)


BATCH_ERRORS = {
    "2-D": (lj.select, [[0, 1]], ValueError, "1-D.*\\(1, 2\\)"),
    "0-D": (lj.select, 0, ValueError, "1-D"),
    "no rows": (lj.select, [], ValueError, "at least one"),
    "float": (lj.select, np.float32([0, 1]), TypeError, "integers.*float32"),
    "boolean": (lj.select, [True, False], TypeError, "integers.*bool"),
    "past the end": (lj.select, [0, 2], IndexError, "\\[0, 2\\).*2"),
    "negative": (lj.select, [0, -1], IndexError, "\\[0, 2\\).*-1"),
    "reorder": (lj.reorder, [0, 5], IndexError, "5"),
    "no repeats": (lj.repeat_interleave, 0, ValueError, "at least 1.*0"),
    "float repeats": (lj.repeat_interleave, 2.0, TypeError, "integer.*2.0"),
    "boolean repeats": (lj.repeat_interleave, True, TypeError, "integer.*True"),
    "negative crop": (lj.crop, -1, ValueError, "at least 0.*-1"),
    "float crop": (lj.crop, 1.0, TypeError, "integers.*float"),
    "boolean crop": (lj.crop, True, TypeError, "integers.*bool"),
    "crop by row": (lj.crop, [1, 2], ValueError, "one integer.*\\(2,\\)"),
    "negative rollback": (lj.rollback, -1, ValueError, "-1"),
    "rollback too far": (lj.rollback, 3, ValueError, "rollback\\(3\\).*2"),
    "float rollback": (lj.rollback, 1.0, TypeError, "integers.*float"),
    "rollback by row, aligned": (lj.rollback, [1, 1], ValueError, "ragged"),
    "2-D rollback": (lj.rollback, [[1, 1]], ValueError, "\\(1, 2\\)"),
    "layer": (lj.get, 1, ValueError, "\\[0, 1\\).*1"),
    "negative layer": (lj.get, -1, ValueError, "\\[0, 1\\).*-1"),
    "negative n": (lj.positions, -1, ValueError, "at least 0.*-1"),
    "static growth": (lj.grow, 9, ValueError, "cannot grow.*9.*8"),
    "static room": (lj.ensure_capacity, 7, ValueError, "9.*8"),
}


@pytest.mark.parametrize("verb, argument, error, message", BATCH_ERRORS.values(), ids=BATCH_ERRORS)
def test_a_wrong_argument_of_the_other_verbs_is_refused(verb, argument, error, message):
    """The right exception, a message that names the value, and the state as it was."""
    state, *_ = filled(2)
    before = snapshot(state)
    with pytest.raises(error, match=f"(?s){message}"):
        verb(state, argument)
    chex.assert_trees_all_equal(before, snapshot(state))


def test_rollback_by_row_needs_one_number_per_row():
    """A vector of another length is refused, ragged or not."""
    state, *_ = filled(2, ragged=True)
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        lj.rollback(state, [1, 1, 1])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_layers": 0}, ValueError, "num_layers.*0"),
        ({"num_layers": None}, ValueError, "num_layers"),
        ({"batch_size": 0}, ValueError, "batch_size.*0"),
        ({"num_kv_heads": -1}, ValueError, "num_kv_heads.*-1"),
        ({"head_dim": 2.0}, TypeError, "head_dim.*2.0"),
        ({"value_head_dim": 0}, ValueError, "value_head_dim.*0"),
        ({"spec": []}, ValueError, "at least one|num_layers"),
        ({"spec": [lj.Static(4)]}, ValueError, "num_layers=2.*1"),
    ],
    ids=str,
)
def test_a_cache_of_impossible_size_is_refused(change, error, message):
    """`init_cache` names the size that is wrong."""
    good = {
        "spec": lj.Static(4),
        "num_layers": 2,
        "batch_size": 1,
        "num_kv_heads": 1,
        "head_dim": 2,
    }
    with pytest.raises(error, match=message):
        lj.init_cache(**{**good, **change})


@pytest.mark.parametrize("capacity, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError),
                                             (True, TypeError), ("8", TypeError)])  # fmt: skip
def test_a_static_capacity_is_a_positive_int(capacity, error):
    """`Static` refuses the rest when it is made, and is frozen and hashable."""
    with pytest.raises(error, match=repr(capacity)):
        lj.Static(capacity)
    with pytest.raises(dataclasses.FrozenInstanceError):
        lj.Static(4).capacity = 5
    assert hash(lj.Static(4)) == hash(lj.Static(4)) and lj.Dynamic() == lj.Dynamic()


# --- running out of room -------------------------------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_an_eager_append_that_does_not_fit_raises_and_changes_nothing(ragged, donate):
    """The message names what is needed, what there is, and the fix; even with `donate`."""
    state, *_ = filled(6, ragged=ragged)
    before = snapshot(state)
    with pytest.raises(ValueError, match=r"6 stored \+ 3 new.*9 slots.*capacity is 8.*Static"):
        lj.update(state, KEY, VALUE, 0, donate=donate)
    chex.assert_trees_all_equal(before, snapshot(state))


def test_a_chunk_larger_than_the_whole_cache_raises_while_tracing():
    """What can never fit is a static error, not a flag."""
    with pytest.raises(ValueError, match=r"9.*8"):
        jax.eval_shape(lambda s: lj.update(s, *tokens(0, B, 9), 0), make())


def test_a_traced_append_that_does_not_fit_writes_nothing_and_raises_a_sticky_flag():
    """Nothing is lost; `check_overflow` tells the host; later appends that fit still work."""
    state, *_ = filled(6)
    append = jax.jit(lambda s, k, v: lj.update(s, k, v, 0))
    full = append(state, KEY, VALUE)
    assert lj.overflowed(full).item() and not lj.overflowed(state).item()
    np.testing.assert_array_equal(stored(full)[0], stored(state)[0])
    assert lj.seq_length(full) == 6 and lj.positions(full, 1).tolist() == [6]
    with pytest.raises(OverflowError, match=r"layer 0.*length 6, capacity 8"):
        lj.check_overflow(full)
    more = append(lj.rollback(full, 2), KEY, VALUE)
    assert lj.seq_length(more) == 7 and lj.overflowed(more).item()
    assert not lj.overflowed(lj.reset(more)).item()
    lj.check_overflow(lj.reset(more))


def test_a_traced_overflow_of_one_ragged_row_leaves_the_others_to_go_on():
    """The row without room is flagged and kept; its neighbour gets its tokens."""
    state = make(ragged=True)
    state = lj.update(state, *tokens(0, B, 7), 0, lengths=[7, 2])
    after = jax.jit(lambda s: lj.update(s, KEY, VALUE, 0))(state)
    assert lj.overflowed(after).tolist() == [True, False]
    assert lj.seq_length(after).tolist() == [7, 5]
    np.testing.assert_array_equal(stored(after, row=0)[0], stored(state, row=0)[0])
    np.testing.assert_array_equal(stored(after, row=1)[0][:, 2:], KEY[1])
    with pytest.raises(OverflowError, match=r"rows \[0\]"):
        lj.check_overflow(after)


@pytest.mark.parametrize("bad", [[0, 8, 1], [0, -1, 1], [0, np.iinfo(np.int32).max, 1]], ids=str)
def test_a_traced_position_out_of_range_writes_nothing(bad):
    """One place outside the capacity refuses the whole write."""
    state, *_ = filled(4)
    write = jax.jit(lambda s, p: lj.update(s, KEY, VALUE, 0, p))
    after = write(state, np.int32(bad))
    assert lj.overflowed(after).item() and lj.seq_length(after) == 4
    np.testing.assert_array_equal(stored(after)[0], stored(state)[0])


def test_traced_rows_out_of_the_batch_are_clamped_and_flagged():
    """A traced `select` cannot raise, so it sets the flag; ragged rows each for themselves."""
    select = jax.jit(lj.select)
    state, key, _ = filled(2)
    after = select(state, np.int32([2, -1]))
    assert lj.overflowed(after).item()
    np.testing.assert_array_equal(stored(after, row=0)[0], key[1])
    np.testing.assert_array_equal(stored(after, row=1)[0], key[0])
    ragged, *_ = filled(2, ragged=True)
    assert lj.overflowed(select(ragged, np.int32([2, 0, 1]))).tolist() == [True, False, False]


@pytest.mark.parametrize("ragged", [False, True])
def test_traced_crop_and_rollback_out_of_range_drop_nothing(ragged):
    """Negative, or more than is stored: flagged, state as it was."""
    state, key, _ = filled(3, ragged=ragged)
    for verb, n in ((lj.crop, -1), (lj.rollback, -2), (lj.rollback, 4)):
        after = jax.jit(verb)(state, np.int32(n))
        assert np.all(lj.overflowed(after)) and np.all(lj.seq_length(after) == 3)
        np.testing.assert_array_equal(stored(after)[0], key[0])


def test_checkify_reports_a_traced_overflow_at_the_call():
    """`checked` turns the flag into an error for who asks for checks."""
    from jax.experimental import checkify

    state, *_ = filled(6)
    checked = checkify.checkify(jax.jit(lambda s: lj.update(s, KEY, VALUE, 0)))
    error, _ = checked(lj.checked(state))
    assert "past the capacity of 8" in error.get()
    error, after = checked(lj.checked(make()))
    assert error.get() is None
    assert all(layer.checked for layer in after.layers)


SPECS = [
    lj.Static(8),
    lj.Sliding(4, 1, 2),
    lj.Dynamic(lj.codecs.Int8()),
    lj.Static(8, lj.codecs.KIVI(4, 4)),
    *(new() for new in more_layouts(8).values()),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_programs_have_no_effects(spec):
    """Else jit takes the slow way through Python at every call."""
    sizes = dict(num_layers=1, batch_size=B, num_kv_heads=H, head_dim=D, value_head_dim=DV)
    state = lj.grow(lj.init_cache(spec, **sizes, ragged=True), 6)
    query = jnp.zeros((B, H, 2, D), jnp.float32)
    kivi = isinstance(state.layers[0].spec.codec, lj.codecs.KIVI)

    def step(state):
        _, state = lj.extend(state, query, *tokens(0, B, 2), 0)
        if not kivi:
            place = jnp.ones((B, 1), jnp.int32)
            state = lj.update(state, *tokens(0, B, 1), 0, cache_position=place)
        state = lj.crop(lj.rollback(state, jnp.ones(B, jnp.int32)), jnp.int32(3))
        state = lj.insert(state, jnp.array([1]), lj.extract(state, 0))
        if isinstance(spec, lj.Static) and not kivi:
            state = lj.compact(state, jnp.ones((B, lj.capacity(state)), bool), 0)
        return lj.free(lj.select(state, jnp.arange(B)), jnp.array([0]))

    assert not jax.make_jaxpr(step)(state).effects
    assert jax.make_jaxpr(step)(lj.checked(state)).effects


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_checks_are_static_and_do_not_stick_to_files_or_rows(spec, tmp_path):
    """`save` drops them; rows joined or inserted have those of the first state."""
    state = lj.init_cache(spec, num_layers=1, batch_size=B, num_kv_heads=H, head_dim=D, ragged=True)
    key = tokens(0, B, 2)[0]
    state = lj.update(state, key, key, 0)
    checked = lj.checked(state)
    chex.assert_trees_all_equal(lj.checked(checked, False), state)
    assert jax.tree.structure(checked) != jax.tree.structure(state)
    lj.save(tmp_path / "state", checked)
    chex.assert_trees_all_equal(lj.load(tmp_path / "state"), state)
    for first, other in ((state, checked), (checked, state)):
        joined = lj.concat([first, other])
        expected = lj.concat([state, state])
        chex.assert_trees_all_equal(lj.checked(joined, False), expected)
        assert joined.layers[0].checked == first.layers[0].checked
        assert lj.insert(first, [0, 1], other).layers[0].checked == first.layers[0].checked


@pytest.mark.parametrize("other", [None, lj.nn.StaticKVCache(8, 1)], ids=["None", "StaticKVCache"])
def test_only_states_are_checked(other):
    with pytest.raises(TypeError, match="takes a CacheState, got"):
        lj.checked(other)


# --- what lands where ----------------------------------------------------------------------------


def test_an_empty_chunk_changes_nothing():
    """Zero tokens are fine, in a full cache too."""
    state, *_ = filled(8)
    none = tokens(0, B, 0)
    assert_same(lj.update(state, *none, 0), state)
    assert_same(lj.update(state, *none, 0, []), state)
    assert_same(jax.jit(lambda s: lj.update(s, *none, 0))(state), state)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_of_duplicate_positions_the_last_wins(ragged, traced):
    """In one write, however many times a place is named, 1-D and 2-D."""
    key, value = tokens(3, B, 6)
    run = jax.jit(lj.update, static_argnums=3) if traced else lj.update
    state = run(make(ragged=ragged), key, value, 0, np.int32([2, 0, 2, 1, 0, 2]))
    np.testing.assert_array_equal(stored(state)[0], key[0][:, np.array([4, 3, 5])])
    by_row = np.int32([[0, 1, 0, 1, 0, 2], [2, 2, 2, 2, 1, 0]])
    state = run(make(ragged=ragged), key, value, 0, by_row)
    np.testing.assert_array_equal(stored(state, row=0)[1], value[0][:, np.array([4, 3, 5])])
    np.testing.assert_array_equal(stored(state, row=1)[1], value[1][:, np.array([5, 4, 3])])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "past",
    [
        lambda s: make(ragged=s.ragged),
        lambda s: lj.rollback(s, 6),
        lambda s: lj.crop(s, 2),
        lambda s: lj.crop(s, 0),
        lj.reset,
    ],
    ids=["fresh", "rollback", "crop", "crop to nothing", "reset"],
)
def test_skipped_slots_read_as_zeros_even_where_old_tokens_lay(past, ragged):
    """A write beyond the end leaves zeros in between, not what was stored there before."""
    state = past(filled(8, ragged=ragged)[0])
    start = int(np.max(lj.seq_length(state)))
    key, value = tokens(9, B, 1)
    state = lj.update(state, key, value, 0, 7)
    keys, values = stored(state, row=1)
    assert keys.shape[1] == 8 and np.all(lj.seq_length(state) == 8)
    assert not keys[:, start:7].any() and not values[:, start:7].any()
    assert keys[:, :start].any(axis=(0, 2)).all()
    np.testing.assert_array_equal(keys[:, 7], key[1, :, 0])


@pytest.mark.parametrize("capacity", [64, 65, 200])
def test_long_gaps_are_cleared_whatever_the_capacity(capacity):
    """The zeros reach from the old end to the new token across block boundaries."""
    for ragged in (False, True):
        state, *_ = filled(capacity, lj.Static(capacity), ragged=ragged)
        state = lj.rollback(state, capacity - 3)
        state = lj.update(state, *tokens(1, B, 1), 0, capacity - 1)
        keys, _ = stored(state)
        assert keys[:, :3].all() and not keys[:, 3:-1].any() and keys[:, -1].all()


def test_a_two_dimensional_write_places_each_row_and_zeroes_what_a_row_skips():
    """Aligned rows share the largest length; where a row wrote nothing it holds zeros."""
    state, *_ = filled(8)
    state = lj.update(lj.reset(state), KEY, VALUE, 0, [[0, 1, 2], [5, 0, 1]])
    assert lj.seq_length(state) == 6
    keys, _ = stored(state, row=0)
    np.testing.assert_array_equal(keys[:, :3], KEY[0])
    assert not keys[:, 3:].any()
    keys, _ = stored(state, row=1)
    np.testing.assert_array_equal(keys[:, np.array([5, 0, 1])], KEY[1])
    assert not keys[:, 2:5].any()


def test_ragged_positions_and_lengths_together_ignore_the_padding():
    """Padding may carry any place, even outside the capacity: it is not written."""
    places = np.int32([[1, 0, 99], [4, 99, 99]])
    for run in (lj.update, jax.jit(lj.update, static_argnums=3)):
        state = run(make(ragged=True), KEY, VALUE, 0, places, np.int32([2, 1]))
        assert lj.seq_length(state).tolist() == [2, 5]
        assert not np.any(lj.overflowed(state))
        np.testing.assert_array_equal(stored(state, row=0)[0], KEY[0][:, np.array([1, 0])])
        np.testing.assert_array_equal(stored(state, row=1)[0][:, 4], KEY[1][:, 0])


def test_writing_in_place_moves_neither_length_nor_position():
    """Overwriting stored tokens is not growth."""
    state, *_ = filled(5)
    state = lj.crop(state, 4)
    state = lj.update(state, KEY, VALUE, 0, [3, 0, 1])
    assert lj.seq_length(state) == 4 and lj.positions(state, 1).tolist() == [5]
    state = lj.update(state, KEY, VALUE, 0, [3, 5, 4])
    assert lj.seq_length(state) == 6 and lj.positions(state, 1).tolist() == [7]


def test_a_padded_chunk_whose_real_tokens_just_fit_is_stored():
    """Padding that would reach past the end moves nothing that is stored."""
    state, key, _ = filled(6, ragged=True)
    lengths = [2, 1]
    state = lj.update(state, *tokens(5, B, 5), 0, lengths=lengths)
    new = tokens(5, B, 5)[0]
    for row, n in enumerate(lengths):
        got = stored(state, row=row)[0]
        np.testing.assert_array_equal(got, np.concatenate([key[row], new[row, :, :n]], axis=1))


def test_layers_are_independent():
    """Writing one layer changes neither the content nor the buffers of another."""
    state = make([lj.Static(4), lj.Dynamic(), lj.Static(8)])
    after = lj.update(state, KEY, VALUE, 1)
    assert [int(lj.seq_length(after, i)) for i in range(3)] == [0, 3, 0]
    assert after.layers[0] is state.layers[0] and after.layers[2] is state.layers[2]
    assert lj.seq_length(state, 1) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8])
def test_every_dtype_is_stored_bit_for_bit(dtype):
    """NaN payloads, infinities, negative zeros and denormals included, where there are any.

    Of plain bfloat16 XLA on CPU alters some payloads, hence the default of decoders.
    """
    bits = np.random.default_rng(0).integers(0, 256, (B, H, T, D * 4), np.uint8)
    key, value = (bits.view(dtype)[..., :width] for width in (D, DV))
    state = lj.update(make(lj.Static(8, default_codec(dtype)), dtype=dtype), key, value, 0)
    keys, values = stored(state)
    assert keys.dtype == values.dtype == dtype
    np.testing.assert_array_equal(keys.view(np.uint8), key[0].copy().view(np.uint8))
    np.testing.assert_array_equal(values.view(np.uint8), value[0].copy().view(np.uint8))


def test_growth_keeps_the_tokens_and_doubles():
    """A dynamic layer passes 64 and 128 slots with every token in place; the old state lives on."""
    state = make(lj.Dynamic())
    key, value = tokens(0, B, 150)
    capacities = []
    for start in range(0, 150, 50):
        chunk = slice(start, start + 50)
        older, state = state, lj.update(state, key[:, :, chunk], value[:, :, chunk], 0)
        assert lj.seq_length(older) == start
        np.testing.assert_array_equal(stored(older)[0], key[0, :, :start])
        capacities.append(lj.capacity(state))
    assert capacities == [64, 128, 256]
    np.testing.assert_array_equal(stored(state)[0], key[0])
    state = lj.update(state, KEY, VALUE, 0, [0, 300, 299])
    assert lj.capacity(state) == 512 and lj.seq_length(state) == 301


def test_a_traced_dynamic_layer_does_not_grow_but_says_so():
    """Inside jit the capacity is what the state came with; `ensure_capacity` is the fix."""
    state, *_ = filled(62, lj.Dynamic())
    append = jax.jit(lambda s: lj.update(s, KEY, VALUE, 0))
    assert lj.overflowed(append(state)).item()
    roomy = lj.ensure_capacity(state, 3)
    assert lj.capacity(roomy) == 128 and not lj.overflowed(append(roomy)).item()
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda s: lj.ensure_capacity(s, 3))(state)


# --- what is accepted ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [list, tuple, np.asarray, jnp.asarray, OnlyArray, OnlyDlpack,
                                  np.uint8, np.int64])  # fmt: skip
def test_integers_come_in_many_forms(wrap):
    """Positions, lengths and rows: lists, tuples, arrays of any kind and width."""
    expected = lj.update(make(ragged=True), KEY, VALUE, 0, np.int32([4, 1, 0]))
    assert_same(lj.update(make(ragged=True), KEY, VALUE, 0, wrap([4, 1, 0])), expected)
    expected = lj.update(make(ragged=True), KEY, VALUE, 0, lengths=np.int32([2, 0]))
    assert_same(lj.update(make(ragged=True), KEY, VALUE, 0, lengths=wrap([2, 0])), expected)
    assert_same(lj.select(expected, wrap([1, 1])), lj.select(expected, np.int32([1, 1])))
    assert_same(lj.rollback(expected, wrap([1, 0])), lj.rollback(expected, np.int32([1, 0])))


@pytest.mark.parametrize("one", [int, np.int32, np.uint64, jnp.int32, np.array, jnp.array])
def test_single_integers_come_in_many_forms(one):
    """A 0-D position, a crop length and a rollback count."""
    state, *_ = filled(5)
    new = tokens(4, B, 1)
    assert_same(lj.update(state, *new, 0, one(3)), lj.update(state, *new, 0, np.int32(3)))
    assert_same(lj.crop(state, one(3)), lj.crop(state, 3))
    assert_same(lj.rollback(state, one(3)), lj.rollback(state, 3))
    assert_same(lj.update(state, *new, np.int64(0)), lj.update(state, *new, 0))


@pytest.mark.parametrize(
    "wrap", [np.asarray, jnp.asarray, OnlyArray, OnlyDlpack, np.ndarray.tolist]
)
def test_tokens_come_in_many_forms(wrap):
    """Arrays, nested lists, and objects with only `__array__` or only `__dlpack__`."""
    dtype = jnp.result_type(float) if wrap is np.ndarray.tolist else KEY.dtype
    state = lj.update(make(dtype=dtype), wrap(KEY), wrap(VALUE), 0)
    np.testing.assert_array_equal(stored(state)[0], KEY[0])
    np.testing.assert_array_equal(stored(state)[1], VALUE[0])


def test_a_traced_position_in_a_list_is_accepted():
    """`[i, i + 1, i + 2]` of traced integers is a position like any other."""
    write = jax.jit(lambda s, i: lj.update(s, KEY, VALUE, 0, [i, i + 1, i + 2]))
    assert_same(write(make(), 2), lj.update(make(), KEY, VALUE, 0, [2, 3, 4]))


def test_selecting_another_number_of_rows_with_donate_does_not_warn():
    """Memory that cannot be reused is the library's business, not a warning."""
    state, *_ = filled(3)
    assert lj.select(state, [1, 0, 1], donate=True).batch_size == 3


@pytest.mark.parametrize("wide", [2**32 + 1, -(2**32) + 1])
def test_a_wide_traced_integer_is_not_cut_to_another_one(wide):
    """Under x64, position 2**32 + 1 is out of range, not slot 1; the same for rollback."""
    state, key, _ = filled(4)
    new = tokens(1, B, 1)
    with jax.enable_x64(True):
        placed = jax.jit(lambda s, p: lj.update(s, *new, 0, p))(state, np.int64(wide))
        dropped = jax.jit(lj.rollback)(state, np.int64(wide))
    for after in (placed, dropped):
        assert lj.overflowed(after).item() and lj.seq_length(after) == 4
        np.testing.assert_array_equal(stored(after)[0], key[0])


@pytest.mark.parametrize("ragged", [False, True])
def test_duplicates_never_reach_the_scatter(ragged, monkeypatch):
    """The order of duplicate writes is the backend's; CPU happens to let the last win by itself."""
    from lucid_jax.cache.buffers import Rows
    from lucid_jax.cache.write import write

    targets = []
    write_at = Rows.write_at

    def spy(self, leaf, new, target):
        if not isinstance(target, jax.core.Tracer):  # not the zeros that a loop writes
            targets.append(np.asarray(target))
        return write_at(self, leaf, new, target)

    monkeypatch.setattr(Rows, "write_at", spy)
    new = dict(zip(("key", "value"), map(jnp.asarray, tokens(3, B, 6)), strict=True))
    write(make(ragged=ragged).layers[0], new, jnp.int32([2, 0, 2, 1, 0, 2]), None)
    assert len(targets) == 2  # keys and values
    for row in np.concatenate([np.atleast_2d(target) for target in targets]):
        assert sorted(row[row < C]) == [0, 1, 2]
