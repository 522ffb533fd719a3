"""Bugs known from other KV caches, one test each: what went wrong there must not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from tests.helpers import USERS_XLA, H, assert_same, filled, make, poison, queries, stored, tokens
from tests.oracle import Oracle

B = 2

pytestmark = pytest.mark.whole


def _step(seed, batch=B):
    return tokens(seed, batch, 1)


# --- losing or corrupting tokens -----------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_the_last_slot_is_not_rewritten_for_ever(ragged):
    """A decode loop that runs past the end keeps the tokens it has and says so."""
    key, value = tokens(0, B, 12)

    def body(state, new):
        return lj.update(state, *(x[:, :, None] for x in new), 0), None

    moved = (jnp.moveaxis(key, 2, 0), jnp.moveaxis(value, 2, 0))
    state, _ = jax.jit(lambda s: jax.lax.scan(body, s, moved))(make(ragged=ragged))
    assert np.all(lj.seq_length(state) == 8) and np.all(lj.overflowed(state))
    np.testing.assert_array_equal(stored(state)[0], key[0, :, :8])
    with pytest.raises(OverflowError):
        lj.check_overflow(state)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_a_chunk_at_the_end_is_not_shifted_back_over_live_tokens(traced, ragged):
    """Four tokens at slot 6 of 8 are refused, not clamped to slots 4 to 7."""
    state, key, _ = filled(6, ragged=ragged)
    four = tokens(1, B, 4)
    if traced:
        after = jax.jit(lambda s: lj.update(s, *four, 0))(state)
        assert np.all(lj.overflowed(after)) and np.all(lj.seq_length(after) == 6)
    else:
        with pytest.raises(ValueError, match="capacity is 8"):
            lj.update(state, *four, 0)
        after = state
    np.testing.assert_array_equal(stored(after)[0], key[0])


@pytest.mark.parametrize("ragged", [False, True])
def test_rejected_drafts_leave_no_trace(ragged):
    """Append four, roll two back, go on: the same as never having drafted them."""
    start, *_ = filled(2, ragged=ragged)
    good, drafts, following = (tokens(seed, B, n) for seed, n in ((1, 2), (2, 2), (3, 2)))
    plain = lj.update(start, *good, 0)
    drafted = lj.rollback(lj.update(plain, *drafts, 0), 2)
    assert_same(drafted, plain)
    plain, drafted = (lj.update(s, *following, 0) for s in (plain, drafted))
    assert_same(drafted, plain)
    query = queries(0, B, 2)
    np.testing.assert_array_equal(lj.attend(drafted, query, 0), lj.attend(plain, query, 0))


def test_cropping_to_more_than_is_stored_crops_nothing():
    """Lengths never go negative, after several appends before one crop either."""
    state = make()
    for seed in range(3):
        state = lj.update(state, *_step(seed), 0)
    for limit in (100, 8, 4, 3):
        assert_same(lj.crop(state, limit), state)
    assert lj.seq_length(lj.crop(lj.crop(state, 1), 5)) == 1
    assert lj.seq_length(lj.crop(lj.crop(state, 0), 2)) == 0


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("limit", range(9))
def test_length_and_tokens_agree_after_every_crop(limit, ragged):
    """The length counts exactly the keys that come out, and they are the latest."""
    state, key, value = filled(7, ragged=ragged)
    state = lj.crop(state, limit)
    keys, values = stored(state, row=1)
    kept = min(limit, 7)
    assert np.all(lj.seq_length(state) == kept) and keys.shape[1] == values.shape[1] == kept
    np.testing.assert_array_equal(keys, key[1, :, 7 - kept :])
    np.testing.assert_array_equal(values, value[1, :, 7 - kept :])


@pytest.mark.parametrize("verb", [lj.rollback, lj.crop])
def test_a_negative_amount_never_makes_a_cache_longer(verb):
    """Refused eagerly, flagged when traced; the length stays."""
    state, *_ = filled(5)
    with pytest.raises(ValueError, match="-2"):
        verb(state, -2)
    after = jax.jit(verb)(state, np.int32(-2))
    assert lj.seq_length(after) == 5 and lj.overflowed(after)


def test_ragged_prompts_store_no_prompt_token_twice():
    """Unequal prompts, then decoding: every row holds its own tokens, once each, in order."""
    prompts, lengths = tokens(0, 3, 5), [5, 2, 3]
    state = lj.update(make(lj.Static(16), batch=3, ragged=True), *prompts, 0, lengths=lengths)
    steps = [tokens(seed, 3, 1) for seed in (1, 2, 3)]
    for step in steps:
        state = lj.update(state, *step, 0)
    for row, n in enumerate(lengths):
        expected = [prompts[0][row, :, :n], *(step[0][row] for step in steps)]
        np.testing.assert_array_equal(stored(state, row=row)[0], np.concatenate(expected, axis=1))
    assert lj.positions(state, 1)[:, 0].tolist() == [n + 3 for n in lengths]


def test_a_negative_index_does_not_count_from_the_end():
    """Neither as a position nor as a row, neither eager nor traced."""
    state, key, _ = filled(8)
    new = _step(1)
    with pytest.raises(ValueError, match="-1"):
        lj.update(state, *new, 0, -1)
    with pytest.raises(IndexError, match="-1"):
        lj.select(state, [-1, 0])
    after = jax.jit(lambda s, p: lj.update(s, *new, 0, p))(state, np.int32(-1))
    np.testing.assert_array_equal(stored(after)[0], key[0])
    assert lj.overflowed(after)
    after = jax.jit(lj.select)(state, np.int32([-1, 0]))
    np.testing.assert_array_equal(stored(after)[0], key[0])
    assert lj.overflowed(after)


@pytest.mark.parametrize("spec", [lj.Static(64), lj.Dynamic()], ids=["static", "dynamic"])
@pytest.mark.parametrize("array", [np.array, jnp.array], ids=["numpy", "jax"])
def test_the_callers_arrays_and_the_cache_share_no_memory(array, spec):
    """Changing the array afterwards changes nothing stored, nor the other way round."""
    key, value = (array(x) for x in tokens(0, B, 64))
    original = np.array(key)
    state = lj.update(make(spec), key, value, 0)
    if array is np.array:
        key[:] = value[:] = 7
    np.testing.assert_array_equal(stored(state)[0], original[0])
    state = lj.update(state, *_step(1), 0, 3, donate=True)
    if array is jnp.array:
        np.testing.assert_array_equal(key, original)
    np.testing.assert_array_equal(stored(state)[0][:, 4:], original[0][:, 4:])


def test_a_large_callers_array_may_be_reused_at_once():
    """Work still under way does not read the caller's buffer after `update` returned."""
    raw = np.empty(8 * 2048 * 64 + 16, np.float32)
    begin = -raw.ctypes.data % 64 // 4  # JAX on CPU takes 64-byte aligned arrays without a copy
    buffer = raw[begin : begin + 8 * 2048 * 64].reshape(1, 8, 2048, 64)
    state = make(lj.Static(8192), batch=1, heads=8, dim=64, value_dim=64)
    for i in range(4):
        buffer[:] = i
        state = lj.update(state, buffer, buffer, 0, donate=True)
        buffer[:] = -1
    keys = np.asarray(lj.get(state, 0)[0])
    for i in range(4):
        assert (keys[:, :, 2048 * i : 2048 * (i + 1)] == i).all()


@pytest.mark.parametrize("ragged", [False, True])
def test_a_crop_does_not_bring_old_tokens_back(ragged):
    """What lay beyond the new length is gone: for reading, for growing, for gaps."""
    state = lj.crop(filled(8, ragged=ragged)[0], 3)
    keys, values, valid = (np.asarray(x) for x in lj.get(state, 0))
    assert valid.sum() == 3 * valid.ndim and not keys[:, :, 3:].any() and not values[:, :, 3:].any()
    state = lj.update(state, *_step(1), 0, 6)
    assert not stored(state)[0][:, 3:6].any()
    state = lj.update(state, *_step(2), 0)
    np.testing.assert_array_equal(stored(state)[0][:, 7], _step(2)[0][0, :, 0])


@pytest.mark.parametrize("ragged", [False, True])
def test_slots_freed_by_one_sequence_do_not_leak_into_the_next(ragged):
    """A row given to another user after reset, rollback or reordering shows nothing of the last."""
    for free in (lj.reset, lambda s: lj.crop(s, 0), lambda s: lj.rollback(s, 8)):
        used = poison(free(filled(8, ragged=ragged)[0]))
        fresh = make(ragged=ragged)
        for state in (used, fresh):
            assert not np.asarray(lj.attend(state, queries(0, B, 2), 0)).any()
        outs = []
        for state in (used, fresh):
            state = lj.update(state, *tokens(1, B, 2), 0)
            state = lj.select(lj.update(state, *_step(2), 0, 6), [1, 0])
            outs.append([lj.get(state, 0), lj.attend(state, queries(1, B, 3), 0)])
        jax.tree.map(np.testing.assert_array_equal, *outs)


# --- masks and positions -------------------------------------------------------------------------


def test_one_decoded_token_sees_more_than_key_zero():
    """A causal mask aligned to the top left would show a single query the first key alone."""
    state, _, value = filled(6)
    got = lj.attend(state, np.zeros((B, 2 * H, 1, 4), np.float32), 0)
    np.testing.assert_allclose(got[:, ::2, 0], value.mean(axis=2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ragged", [False, True])
def test_positions_go_on_after_a_crop_and_back_after_a_rollback(ragged):
    """The next RoPE position is what was ever seen, not what is stored."""
    state = lj.crop(filled(7, ragged=ragged)[0], 2)
    assert np.all(np.asarray(lj.positions(state, 2)) == [7, 8])
    state = lj.update(state, *_step(1), 0)
    assert np.all(lj.positions(state, 1) == 8) and np.all(lj.seq_length(state) == 3)
    state = lj.rollback(state, 2)
    assert np.all(lj.positions(state, 1) == 6) and np.all(lj.seq_length(state) == 1)
    assert np.all(lj.positions(lj.reset(state), 1) == 0)


def test_a_window_counts_the_query_itself():
    """At W - 1, W and W + 1 stored tokens a window of W shows 'itself and W - 1 before'."""
    width, zero = 4, np.zeros((B, 2 * H, 1, 4), np.float32)
    for count in (width - 1, width, width + 1):
        state, _, value = filled(count)
        expected = value[:, :, -width:].mean(axis=2)
        got = lj.attend(state, zero, 0, window=width)[:, ::2, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [(2, 1, 3, 1), (3, 1, 2)], ids=str)
def test_masks_fit_the_keys_for_every_pattern_of_chunks(chunks):
    """A full layer and one windowed to 2, fed the same chunks: shapes always agree."""
    state = make([lj.Static(8), lj.Dynamic()])
    models = [
        Oracle(batch=B, heads=H, dim=4, value_dim=3, capacity=lj.capacity(state, i),
               growable=i == 1, ragged=False)
        for i in range(2)
    ]  # fmt: skip
    for seed, count in enumerate(chunks):
        key, value = tokens(seed, B, count)
        query = queries(seed, B, count)
        for i, model in enumerate(models):
            state = lj.update(state, key, value, i)
            model.update(key, value)
            assert lj.valid(state, i).shape == (lj.get(state, i)[0].shape[2],)
            window = (None, 2)[i]
            got = lj.attend(state, query, i, window=window)
            expected = model.attend(query, window=window)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_nan_in_unused_value_slots_is_not_multiplied_by_zero():
    """A weight of zero does not silence NaN, so unused slots are not weighed at all."""
    for ragged in (False, True):
        state = poison(filled(3, ragged=ragged)[0])
        clean = filled(3, ragged=ragged)[0]
        query = queries(0, B, 2)
        assert np.isfinite(lj.attend(state, query, 0)).all()
        np.testing.assert_array_equal(lj.attend(state, query, 0), lj.attend(clean, query, 0))


# --- cost ----------------------------------------------------------------------------------------


def test_the_offset_is_an_array_not_a_constant_of_the_program(compilations):
    """Lengths and positions are leaves, so that steps at different offsets share one program."""
    step = jax.jit(lambda s, k, v: lj.update(s, k, v, 0))
    state = step(make(), *_step(0))
    before = compilations()
    for seed in range(1, 8):
        state = step(state, *_step(seed))
    assert compilations() == before and lj.seq_length(state) == 8
    structure = jax.tree.structure(state)
    assert structure == jax.tree.structure(make())


def test_growth_is_geometric_not_by_concatenation():
    """A thousand tokens by ones change the capacity five times."""
    state = make(lj.Dynamic(), batch=1)
    new = tokens(0, 1, 1)
    capacities = []
    for _ in range(1000):
        state = lj.update(state, *new, 0, donate=True)
        capacities.append(lj.capacity(state))
    assert len(set(capacities)) == 5 and capacities[-1] == 1024


def _scratch(run, state):
    """Bytes of temporaries of `run` compiled with the state donated."""
    compiled = jax.jit(run, donate_argnums=0).lower(state).compile(USERS_XLA)
    return compiled.memory_analysis().temp_size_in_bytes


def _large():
    return make(lj.Static(8192), batch=1, dim=16, value_dim=16)


def test_a_scanned_loop_adds_no_second_cache():
    """The cache is carried through the loop, not cut up and stacked again."""
    one = jnp.ones((1, H, 1, 16))

    def run(state):
        return jax.lax.scan(lambda s, _: (lj.update(s, one, one, 0), None), state, length=5)[0]

    assert _scratch(run, _large()) < _large().layers[0].key.nbytes / 16


def test_a_step_that_may_do_nothing_copies_nothing():
    """A refused append and rows that sit out write old slots back; no branch copies a buffer."""
    one = jnp.ones((1, H, 1, 16))
    for ragged in (False, True):
        state = make(lj.Static(8192), batch=1, dim=16, value_dim=16, ragged=ragged)
        lengths = jnp.zeros(1, jnp.int32) if ragged else None
        run = lambda s, n=lengths: lj.update(s, one, one, 0, lengths=n)  # noqa: E731
        assert _scratch(run, state) < state.layers[0].key.nbytes / 16


def test_the_first_update_can_be_donated():
    """Keys and values start in zeros of their own; one shared array could not be given away."""
    state = make(value_dim=4, layers=2)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    assert len(pointers) == len(jax.tree.leaves(state))
    new = tokens(0, B, 2, value_dim=4)
    after = lj.update(state, *new, 0, donate=True)
    assert {after.layers[0].key.unsafe_buffer_pointer(),
            after.layers[0].value.unsafe_buffer_pointer()} <= pointers  # fmt: skip


def test_a_beam_reorder_makes_no_second_cache():
    """A donated reorder moves rows within the buffers, in blocks."""
    state = make(lj.Static(8192), batch=4, dim=16, value_dim=16)
    rows = jnp.array([0, 0, 3, 1])
    assert _scratch(lambda s: lj.reorder(s, rows), state) < state.layers[0].key.nbytes / 8


def test_a_prefix_is_shared_by_its_continuations_and_guarded_against_donation():
    """Several continuations of one state need no deep copy; a donated one says so."""
    prefix, key, _ = filled(3, layers=2)
    a, b = (lj.update(prefix, *_step(seed), 0) for seed in (1, 2))
    assert a.layers[1] is prefix.layers[1] is b.layers[1]
    for state, seed in ((a, 1), (b, 2)):
        np.testing.assert_array_equal(stored(state)[0][:, :3], key[0])
        np.testing.assert_array_equal(stored(state)[0][:, 3:], _step(seed)[0][0])
    lj.update(a, *_step(3), 1, donate=True)  # gives away the layer that all three share
    for state in (prefix, b):
        with pytest.raises(RuntimeError, match=r"donated.*donate=False"):
            lj.update(state, *_step(4), 1)
        assert lj.seq_length(lj.update(state, *_step(4), 0)) in (4, 5)  # layer 0 is still fine


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kept", [1, 255, 256, 257, 400, 511, 599])
def test_moving_tokens_to_the_front_is_not_miscompiled(kept, ragged):
    """A crop moves overlapping ranges across block borders; every kept token arrives intact."""
    state, key, value = filled(600, lj.Static(601), ragged=ragged)
    for cropped in (lj.crop(state, kept), jax.jit(lj.crop)(state, kept)):
        keys, values = stored(cropped, row=1)
        np.testing.assert_array_equal(keys, key[1, :, 600 - kept :])
        np.testing.assert_array_equal(values, value[1, :, 600 - kept :])


# --- state that does not survive -----------------------------------------------------------------


@pytest.mark.parametrize("spec", [lj.Static(4), lj.Dynamic()], ids=["static", "dynamic"])
def test_configuration_lives_in_the_treedef(spec):
    """A state rebuilt from its leaves still refuses, or grows, as it was told to."""
    state, *_ = filled(4, spec)
    leaves, structure = jax.tree.flatten(state)
    for rebuilt in (
        jax.tree.unflatten(structure, [np.asarray(x) for x in leaves]),
        jax.jit(lambda s: s)(state),
        jax.device_put(state),
    ):
        rebuilt = jax.tree.map(jnp.asarray, rebuilt)
        if isinstance(spec, lj.Static):
            with pytest.raises(ValueError, match="capacity is 4"):
                lj.update(rebuilt, *_step(1), 0)
        else:
            assert lj.capacity(lj.update(rebuilt, *tokens(1, B, 61), 0)) == 128


def test_a_dynamic_cache_after_reset_is_like_new():
    """Whatever it held, it goes on as a fresh one would; only its room is kept."""
    state, *_ = filled(70, lj.Dynamic(), ragged=True)
    state = lj.reset(lj.crop(state, 30))
    fresh = lj.grow(make(lj.Dynamic(), ragged=True), 128)
    assert_same(state, fresh)
    new = tokens(1, B, 3)
    assert_same(*(lj.update(s, *new, 0, lengths=[3, 1]) for s in (state, fresh)))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("rows", [[0, 0, 3, 1], [3, 3, 3, 3], [1, 2, 3, 0]], ids=str)
def test_reordering_with_repeated_rows_gathers(rows, donate, ragged):
    """Each new row is the old row it names, though old rows are overwritten on the way."""
    state, key, value = filled(300, lj.Static(310), batch=4, ragged=ragged)
    state = lj.reorder(state, rows, donate=donate)
    for new, old in enumerate(rows):
        keys, values = stored(state, row=new)
        np.testing.assert_array_equal(keys, key[old])
        np.testing.assert_array_equal(values, value[old])
