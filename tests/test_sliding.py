"""What a sliding layer promises: the same as masked full attention, in constant memory, for ever."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.attention.dense import dot_product
from tests.helpers import DV, USERS_XLA, D, H, assert_same, make, poison, queries, stored, tokens

B, N = 2, 2 * H
CODECS = {
    "identity": lj.codecs.Identity(),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(rotate=True),
    "kivi": lj.codecs.KIVI(group=4, residual=3),
}
LAYOUTS = {
    "static": functools.partial(lj.Static, 64),
    "dynamic": lj.Dynamic,
    "sliding": functools.partial(lj.Sliding, 7, 0, 3),
    "sinks": functools.partial(lj.Sliding, 8, 2, 3),
}
aligned_or_ragged = pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])

_extend = jax.jit(lj.extend, static_argnames=("layer_idx", "rope_theta", "implementation"))


def _seen(count, window, sinks=0, start=0):
    """Who sees whom of `count` tokens, bool [query, key]: itself, window - 1 before it, the sinks."""
    query, key = np.arange(count)[:, None], np.arange(count)
    return (key <= query) & (key >= start) & ((key > query - window) | (key < sinks))


def _dense(query, key, value, seen, bias=None):
    """Masked attention over plain arrays, of queries and keys that stand for the same tokens."""
    return dot_product(query, key, value, causal=False, mask=jnp.asarray(seen), bias=bias)


def _split(count, pattern):
    """(begin, size) of chunks of `count` tokens, sizes going round a pattern."""
    begin, i = 0, 0
    while begin < count:
        size = min(pattern[i % len(pattern)], count - begin)
        yield begin, size
        begin, i = begin + size, i + 1


def _close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# --- the same as full attention ------------------------------------------------------------------


@pytest.mark.parametrize("pattern, sinks", [
    ((1,), 2), ((7, 1), 2), ((12,), 0), ((12,), 2), ((64,), 0), ((64,), 2),
], ids=str)  # fmt: skip
@aligned_or_ragged
def test_after_many_wraps_it_equals_masked_full_attention(pattern, sinks, ragged, each_backend):
    """In every chunking, and in the same bytes throughout; rows of a batch may differ in length."""
    count, window = 64, 5
    rows = np.array([64, 41] if ragged else [64, 64])
    key, value = tokens(0, B, count)
    query = queries(0, B, count)
    state = make(lj.Sliding(window, sinks), ragged=ragged)
    assert count > 10 * window
    size_at_first = lj.nbytes(state)
    outs = []
    for begin, size in _split(count, pattern):
        new = [x[:, :, begin : begin + size] for x in (query, key, value)]
        lengths = np.clip(rows - begin, 0, size) if ragged else None
        options = {"lengths": lengths, "implementation": each_backend}
        out, state = _extend(state, *new, layer_idx=0, **options)
        assert lj.nbytes(state) == size_at_first
        outs.append(out)
    expected = np.array(_dense(query, key, value, _seen(count, window, sinks)))
    for row, real in enumerate(rows):
        expected[row, :, real:] = 0  # padding
        kept = [*range(sinks), *range(real - window, real)]
        for ours, sent in zip(stored(state, row=row), (key, value), strict=True):
            np.testing.assert_array_equal(ours, sent[row][:, kept])
    _close(np.concatenate(outs, axis=2), expected)
    assert not lj.overflowed(state).any()


@aligned_or_ragged
def test_update_then_attend_equals_masked_full_attention(ragged):
    """Chunks of up to slack + 1 tokens need no `extend`, however often the ring has wrapped."""
    count, window, sinks, slack = 63, 4, 2, 2
    key, value = tokens(1, B, count)
    query = queries(1, B, count)
    state = make(lj.Sliding(window, sinks, slack), ragged=ragged)
    outs = []
    for begin, size in _split(count, (3, 1, 2)):
        new = [x[:, :, begin : begin + size] for x in (query, key, value)]
        state = lj.update(state, *new[1:], 0)
        outs.append(lj.attend(state, new[0], 0))
    _close(np.concatenate(outs, axis=2), _dense(query, key, value, _seen(count, window, sinks)))


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_window_of_four_is_four_tokens_the_query_among_them(count, slack):
    """One token fewer than the window, as many, and one more: min(count, 4) are stored and seen."""
    key, value = tokens(2, B, count)
    state = make(lj.Sliding(4, slack=slack))
    for t in range(count):
        state = lj.update(state, key[:, :, t : t + 1], value[:, :, t : t + 1], 0)
    latest = value[:, :, max(0, count - 4) :]
    assert lj.seq_length(state) == latest.shape[2] == min(count, 4)
    assert lj.valid(state).tolist() == [i < count for i in range(4)]
    np.testing.assert_array_equal(lj.get(state, 0)[1][:, :, : latest.shape[2]], latest)
    even = lj.attend(state, np.zeros((B, H, 1, D), np.float32), 0)  # the mean of what is seen
    _close(even, latest.mean(axis=2, keepdims=True))


def test_without_causality_the_window_is_all_there_is():
    """`causal=False` sees what `get` gives, and not what slack has kept for a rollback."""
    key, value = tokens(3, B, 12)
    state = lj.update(make(lj.Sliding(4, 1, slack=3)), key, value, 0)
    even = lj.attend(state, np.zeros((B, H, 1, D), np.float32), 0, causal=False)
    _close(even, value[:, :, [0, 8, 9, 10, 11]].mean(axis=2, keepdims=True))


@pytest.mark.parametrize("specs, windows, feed", [
    ([lj.Sliding(4), lj.Sliding(4, slack=2)], (4, 4), (2, 1, 3, 1)),
    ([lj.Static(8), lj.Sliding(2), lj.Sliding(2, slack=1)], (99, 2, 2), (3, 1, 2)),
], ids=["windows of 4", "mixed"])  # fmt: skip
def test_masks_fit_the_keys_whatever_the_chunks(specs, windows, feed):
    """Chunk patterns that gave others masks of a wrong length; full and sliding layers together."""
    state = make(specs)
    count = sum(feed)
    key, value = tokens(4, B, count)
    query = queries(4, B, count)
    outs = [[] for _ in specs]
    for begin, size in zip(np.cumsum((0, *feed)), feed, strict=False):
        new = [x[:, :, int(begin) : int(begin) + size] for x in (query, key, value)]
        for i, window in enumerate(windows):
            out, state = lj.extend(state, *new, i)
            outs[i].append(out)
            assert lj.valid(state, i).sum() == min(window, begin + size)
    for out, window in zip(outs, windows, strict=True):
        _close(np.concatenate(out, axis=2), _dense(query, key, value, _seen(count, window)))


# --- rollback ------------------------------------------------------------------------------------


def _observe(state, seed):
    """What a user can see of a state, attention included."""
    return [*lj.get(state, 0), lj.seq_length(state), lj.positions(state, 1),
            lj.attend(state, queries(seed, B, 1), 0)]  # fmt: skip


def _assert_identical(one, other, seed):
    for a, b in zip(_observe(one, seed), _observe(other, seed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("codec, ragged", [
    *((codec, True) for codec in CODECS), ("identity", False), ("kivi", False),
])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_rolled_back_never_came(layout, codec, ragged):
    """Drafts of three, some accepted, again and again: bit for bit the cache that never drafted.

    36 tokens wrap the rings several times and flush the residual at every alignment of the two.
    """
    drafting = plain = make(LAYOUTS[layout](codec=CODECS[codec]), ragged=ragged)
    fed = np.zeros(B, int)
    for step in range(24):
        accepted = np.array([(1, 0, 2, 3)[step % 4], (2, 1, 0, 1)[step * 5 % 7 % 4]])
        if not ragged:
            accepted[:] = (1, 0, 2, 3)[step * 5 % 7 % 4]
        key, value = tokens(step, B, 3)
        drafting = lj.update(drafting, key, value, 0)
        drafting = lj.rollback(drafting, 3 - accepted if ragged else 3 - int(accepted[0]))
        if ragged:
            plain = lj.update(plain, key, value, 0, lengths=accepted)
        else:
            keep = int(accepted[0])
            plain = lj.update(plain, key[:, :, :keep], value[:, :, :keep], 0)
        fed += accepted
        _assert_identical(drafting, plain, step)
    _assert_identical(poison(drafting), plain, 0)
    assert fed.min() > 20


@pytest.mark.parametrize("codec", ["identity", "int8", "kivi"])
@pytest.mark.parametrize("layout", LAYOUTS)
@aligned_or_ragged
def test_a_rollback_that_cannot_be_exact_is_refused(layout, codec, ragged):
    """Eager: ValueError. Traced: the flag, per row. The state is as it was."""
    state = make(LAYOUTS[layout](codec=CODECS[codec]), ragged=ragged)
    state = lj.update(state, *tokens(0, B, 30), 0)
    impossible = [31, -1]
    if layout in ("sliding", "sinks") and codec != "kivi":  # whose groups leave a little more
        impossible += [lj.capacity(state), 4]  # one more than slack
    for n in impossible:
        before = _observe(state, 0)
        with pytest.raises(ValueError, match="rollback"):
            lj.rollback(state, n)
        traced = jax.jit(lj.rollback)(state, n)
        assert lj.overflowed(traced).all()
        for now in (state, traced):
            jax.tree.map(np.testing.assert_array_equal, _observe(now, 0), before)
    if ragged:
        drop = np.array([2, impossible[-1]], np.int32)
        with pytest.raises(ValueError, match="rollback"):
            lj.rollback(state, drop)
        traced = jax.jit(lj.rollback)(state, drop)
        assert lj.overflowed(traced).tolist() == [False, True]
        assert lj.positions(traced, 1)[:, 0].tolist() == [28, 30]


def test_drafts_rolled_back_before_still_count_against_slack():
    """What they overwrote stays lost: a second rollback below them is refused, not guessed."""
    key, value = tokens(0, B, 12)
    state = lj.rollback(lj.update(make(lj.Sliding(4, slack=3)), key, value, 0), 2)
    with pytest.raises(ValueError, match="slack"):
        lj.rollback(state, 2)
    assert lj.positions(lj.rollback(state, 1), 1).tolist() == [9]


@pytest.mark.parametrize("feed", [(3, 3), (6,), (1,) * 6, (5, 1)], ids=str)
def test_a_burst_that_wraps_can_be_rolled_back(feed):
    """mlx-lm#1914: window 4, six tokens, two rejected, then on as if they had never come."""
    key, value = tokens(5, B, 8)
    chunk = lambda a, b: (key[:, :, a:b], value[:, :, a:b])  # noqa: E731
    states = {slack: make(lj.Sliding(4, slack=slack)) for slack in (0, 2)}
    for slack, state in states.items():
        for begin, size in _split(6, feed):
            state = lj.update(state, *chunk(begin, begin + size), 0)
        states[slack] = state
    never = lj.update(make(lj.Sliding(4, slack=2)), *chunk(0, 4), 0)
    back = lj.rollback(states[2], 2)
    for t in range(6, 8):
        _assert_identical(back, never, t)
        back, never = (lj.update(s, *chunk(t, t + 1), 0) for s in (back, never))
    _assert_identical(back, never, 8)
    with pytest.raises(ValueError, match="slack"):
        lj.rollback(states[0], 2)


@aligned_or_ragged
@pytest.mark.parametrize("spec, count, drop", [
    (lj.Sliding(4, sinks=3), 8, 7),
    (lj.Sliding(4, sinks=8, slack=1), 14, 12),
    (lj.Static(64, lj.codecs.KIVI(2, 2)), 20, 20),
    (lj.Sliding(5, codec=lj.codecs.KIVI(2, 2)), 5, 5),
], ids=["ring", "far", "kivi", "both"])  # fmt: skip
def test_after_a_rollback_to_the_very_start_new_tokens_are_seen(spec, count, drop, ragged):
    """Far behind what was once reached, a layer goes on like one that never went there."""
    state = lj.rollback(lj.update(make(spec, ragged=ragged), *tokens(0, B, count), 0), drop)
    plain = make(spec, ragged=ragged)
    if count > drop:
        plain = lj.update(plain, *(x[:, :, : count - drop] for x in tokens(0, B, count)), 0)
    for step in range(12):
        state, plain = (lj.update(s, *tokens(step + 1, B, 1), 0) for s in (state, plain))
        _assert_identical(state, plain, step)


# --- places --------------------------------------------------------------------------------------


@aligned_or_ragged
def test_extend_by_place_past_the_end_moves_the_window_on(ragged):
    """The query stands where its token was placed, and sees zeros for the places skipped."""
    key, value = tokens(6, B, 5)
    query = queries(6, B, 1)
    for place, row in ((4, [1, 2, 3, 4]), (6, [3, None, None, 4]), (1, [0, 4])):
        state = lj.update(make(lj.Sliding(4), ragged=ragged), key[:, :, :4], value[:, :, :4], 0)
        out, state = lj.extend(
            state, query, key[:, :, 4:], value[:, :, 4:], 0, cache_position=np.array([place])
        )
        k, v = (
            np.stack([x[:, :, t] if t is not None else 0 * x[:, :, 0] for t in row], axis=2)
            for x in (key, value)
        )
        _close(out, _dense(query, k, v, np.ones((1, len(row)), bool)))


# --- cost ----------------------------------------------------------------------------------------


def _large(window, codec):
    spec = lj.Sliding(window, 4, 4, codec)
    return make(spec, batch=1, heads=2, dim=16, value_dim=16)


def _one(count=1):
    return jnp.ones((1, 2, count, 16), jnp.float32)


def _append(state):
    return lj.update(state, _one(), _one(), 0)


def _chunk(state):
    return lj.update(state, _one(5), _one(5), 0)


def _attend(state):
    state = _append(state)
    return state, lj.attend(state, _one(), 0)


def _loop(state):
    def body(carry):
        i, state, out = carry
        state = lj.update(state, out, out, 0)
        return i + 1, state, lj.attend(state, out, 0)

    return jax.lax.while_loop(lambda c: c[0] < 300, body, (jnp.int32(0), state, _one()))


def _speculate(state):
    def body(carry):
        i, state = carry
        return i + 1, lj.rollback(_chunk(state), 3)

    return jax.lax.while_loop(lambda c: c[0] < 300, body, (jnp.int32(0), state))


@pytest.mark.parametrize("codec", ["identity", "kivi"])
@pytest.mark.parametrize("program", [_append, _chunk, _attend, _loop, _speculate],
                         ids=lambda p: p.__name__.strip("_"))  # fmt: skip
def test_temporaries_do_not_grow_with_the_window(program, codec):
    """Scratch memory with a window of 65536 is what it is with 64: steps are in place."""
    scratch = []
    for window in (64, 65536):
        state = _large(window, CODECS[codec])
        compiled = jax.jit(program, donate_argnums=0).lower(state).compile(USERS_XLA)
        scratch.append(compiled.memory_analysis().temp_size_in_bytes)
    blocks = 0 if program in (_append, _chunk, _speculate) else 128 * 1024  # attention's own
    assert scratch[1] <= scratch[0] + 1024 + blocks
    assert scratch[1] < _large(65536, CODECS["kivi"]).layers[0].key["codes"].nbytes / 2


@pytest.mark.parametrize("codec", ["identity", "int8", "kivi"])
def test_a_donated_append_copies_no_buffer_and_stays_where_it_is(codec):
    """The compiled program has no copy as large as a buffer, and addresses do not change."""
    state = _large(1024, CODECS[codec])
    slots = state.layers[0].num_slots
    text = jax.jit(_append, donate_argnums=0).lower(state).compile(USERS_XLA).as_text()
    whole = re.compile(rf"= \w+\[1,2,{slots}[,\]][^=]* copy(-start)?\(")
    assert f"[1,2,{slots}" in text
    assert not [line for line in text.splitlines() if whole.search(line)]
    leaves = lambda s: jax.tree.leaves((s.layers[0].key, s.layers[0].value))  # noqa: E731
    addresses = [leaf.unsafe_buffer_pointer() for leaf in leaves(state)]
    for _ in range(3):
        state = lj.update(state, _one(), _one(), 0, donate=True)
        assert addresses == [leaf.unsafe_buffer_pointer() for leaf in leaves(state)]


@pytest.mark.parametrize("move", [
    lambda s: jax.tree.unflatten(jax.tree.structure(s), jax.tree.leaves(s)),
    lambda s: jax.device_put(s, jax.devices()[0]),
    jax.jit(lambda s: s),
], ids=["flatten", "device_put", "jit"])  # fmt: skip
def test_the_window_survives_moving_a_state(move):
    """transformers#47900: after a move the next updates still forget, and memory stays constant."""
    state = lj.update(make(lj.Sliding(4, 1, 2)), *tokens(0, B, 9), 0)
    moved = move(state)
    size = lj.nbytes(state)
    for seed in range(1, 12):
        state, moved = (lj.update(s, *tokens(seed, B, 3), 0) for s in (state, moved))
        assert lj.nbytes(moved) == size and lj.seq_length(moved) == 5
        assert_same(moved, state)


# --- options of extend and attend ----------------------------------------------------------------


@aligned_or_ragged
@pytest.mark.parametrize("count, stored_before", [(1, 20), (3, 3), (9, 0), (9, 20)])
def test_mask_and_bias_count_the_tokens_before_then_the_new_ones(
    count, stored_before, ragged, each_backend
):
    """`extend` with a mask and bias over C + T tokens is a dense computation over the same."""
    window, sinks = 4, 2
    state = make(lj.Sliding(window, sinks, slack=2), ragged=ragged)
    total = stored_before + count
    key, value = tokens(7, B, total)
    query = queries(7, B, total)
    if stored_before:
        state = lj.update(state, key[:, :, :stored_before], value[:, :, :stored_before], 0)
    capacity, length = lj.capacity(state), int(np.max(lj.seq_length(state)))
    rng = np.random.default_rng(0)
    mask = rng.random((B, N, count, capacity + count)) < 0.6
    bias = rng.standard_normal(mask.shape).astype(np.float32)
    new = [x[:, :, stored_before:] for x in (query, key, value)]
    out, _ = lj.extend(state, *new, 0, mask=mask, bias=bias)
    # Absolute positions of entries of the mask: what is stored, then what is new.
    old = [p for p in range(stored_before) if p < sinks or p >= stored_before - window]
    entries = [*old, *range(stored_before, total)]
    assert len(old) == length
    seen = _seen(total, window, sinks)[stored_before:][:, entries] & mask[..., : len(entries)]
    expected = dot_product(
        new[0], key[:, :, entries], value[:, :, entries], causal=False,
        mask=jnp.asarray(seen), bias=jnp.asarray(bias[..., : len(entries)]),
    )  # fmt: skip
    _close(out, expected)


def test_what_cannot_be_done_is_refused_with_the_fix():
    """A chunk too long to attend to after the fact, masks of it, and windows too small for a codec."""
    state = lj.update(make(lj.Sliding(4, slack=1)), *tokens(0, B, 3), 0)
    with pytest.raises(ValueError, match="extend"):
        lj.attend(state, queries(0, B, 3), 0)
    with pytest.raises(ValueError, match="extend"):
        lj.attend(state, queries(0, B, 2), 0, mask=np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="extend"):
        jax.jit(lj.attend, static_argnames="layer_idx")(state, queries(0, B, 3), layer_idx=0)
    with pytest.raises(ValueError, match="slack"):
        new = tokens(0, B, 3)
        lj.extend(state, queries(0, B, 3), *new, 0, cache_position=np.arange(3))
    with pytest.raises(ValueError, match="at least 6"):
        lj.Sliding(5, codec=lj.codecs.KIVI(group=4, residual=2))
    lj.Sliding(6, codec=lj.codecs.KIVI(group=4, residual=2))
    for bad in ({"window": 0}, {"window": 4, "sinks": -1}, {"window": 4, "slack": -1}):
        with pytest.raises(ValueError, match="of Sliding"):
            lj.Sliding(**bad)
    with pytest.raises(TypeError, match="integer"):
        lj.Sliding(2.5)


@aligned_or_ragged
def test_merged_attention_of_prefix_and_suffix_is_attention_of_both(ragged):
    """A prefix all see, each row's suffix, and a part that nobody saw: exactly one state's."""
    key, value = tokens(8, B, 12)
    query = queries(8, B, 4)
    whole = lj.update(make(lj.Static(16), ragged=ragged), key, value, 0)
    expected, total = lj.attend(whole, query, 0, return_lse=True)
    prefix = lj.update(make(lj.Static(8), ragged=ragged), key[:, :, :8], value[:, :, :8], 0)
    suffix = lj.update(make(lj.Static(8), ragged=ragged), key[:, :, 8:], value[:, :, 8:], 0)
    empty = make(lj.Static(8), ragged=ragged)
    parts = [
        lj.attend(empty, query, 0, causal=False, return_lse=True),
        lj.attend(prefix, query, 0, causal=False, return_lse=True),
        lj.attend(suffix, query, 0, return_lse=True),
    ]
    assert np.isneginf(parts[0][1]).all() and not np.asarray(parts[0][0]).any()
    out, lse = lj.merge(*zip(*parts, strict=True))
    _close(out, expected)
    _close(lse, total)
    out, lse = lj.merge(*zip(parts[0], parts[0], strict=True))
    assert np.isneginf(lse).all() and not np.asarray(out).any()
    junk = jnp.full_like(parts[0][0], jnp.nan)  # what has no share may hold anything
    out, _ = lj.merge([junk, expected], [parts[0][1], total])
    _close(out, expected)


# --- rotary positions by place -------------------------------------------------------------------


def _rotated(x, place, theta):
    """x [..., D] rotated by one place, rotate-half form, in float64."""
    half = x.shape[-1] // 2
    angle = place * theta ** (-np.arange(half) / half)
    a, b = np.float64(x[..., :half]), np.float64(x[..., half:])
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def _streaming(query, key, value, seen, theta):
    """StreamingLLM by its definition, of one row: places 0 ... n - 1 for the tokens a query sees."""
    out = np.zeros((*query.shape[:2], value.shape[-1]))
    for t in range(query.shape[1]):
        visible = np.flatnonzero(seen[t])
        if not len(visible):
            continue
        for n in range(query.shape[0]):
            q = _rotated(query[n, t], len(visible) - 1, theta)
            k = [_rotated(key[n // (N // H), p], i, theta) for i, p in enumerate(visible)]
            scores = np.stack(k) @ q / np.sqrt(len(q))
            weights = np.exp(scores - scores.max())
            out[n, t] = weights / weights.sum() @ value[n // (N // H), visible]
    return out


@aligned_or_ragged
@pytest.mark.parametrize("pattern, sinks", [((1,), 3), ((7, 1), 0), ((30,), 3)], ids=str)
def test_places_in_the_cache_rotate_as_in_streaming_llm(pattern, sinks, ragged, each_backend):
    """Unrotated keys with `rope_theta=`: the twin that numbers what each query sees from 0."""
    count, window, theta = 30, 5, 100.0
    rows = np.array([30, 17] if ragged else [30, 30])
    key, value = tokens(9, B, count)
    query = queries(9, B, count)
    state = make(lj.Sliding(window, sinks), ragged=ragged)
    outs = []
    for begin, size in _split(count, pattern):
        new = [x[:, :, begin : begin + size] for x in (query, key, value)]
        lengths = np.clip(rows - begin, 0, size) if ragged else None
        options = {"lengths": lengths, "rope_theta": theta, "implementation": each_backend}
        out, state = _extend(state, *new, layer_idx=0, **options)
        outs.append(out)
    got = np.concatenate(outs, axis=2)
    for row, real in enumerate(rows):
        expected = _streaming(query[row], key[row], value[row], _seen(count, window, sinks), theta)
        _close(got[row, :, :real], expected[:, :real])


@pytest.mark.parametrize("kept", [1, 3, 5, 6])
@pytest.mark.parametrize("spec", [lj.Sliding(5, 2, 1), lj.Static(32), lj.Sliding(5, 2, 1,
                         lj.codecs.Int8())], ids=["sliding", "static", "int8"])  # fmt: skip
def test_places_count_from_what_crop_left(spec, kept, each_backend):
    """After a crop the oldest token left, a sink or not, stands at place 0."""
    count, theta = 16, 100.0
    key, value = tokens(10, B, count)
    query = queries(10, B, count)
    state = lj.crop(lj.update(make(spec), key[:, :, :12], value[:, :, :12], 0), kept)
    left = [0, 1, *range(7, 12)] if isinstance(spec, lj.Sliding) else list(range(12))
    start = left[-kept]
    outs = []
    for t in range(12, count, 2):
        new = [x[:, :, t : t + 2] for x in (query, key, value)]
        state = lj.update(state, *new[1:], 0)
        outs.append(lj.attend(state, new[0], 0, rope_theta=theta))
    key_form, value_form = state.layers[0].packing.forms.values()
    key, value = (np.asarray(f.decode(f.encode(jnp.asarray(x))))
                  for f, x in ((key_form, key), (value_form, value)))  # fmt: skip
    window, sinks = (5, 2) if isinstance(spec, lj.Sliding) else (99, 0)
    seen = _seen(count, window, sinks, start)
    for row in range(B):
        expected = _streaming(query[row], key[row], value[row], seen, theta)[:, 12:]
        _close(np.concatenate(outs, axis=2)[row], expected)


@pytest.mark.parametrize("offset", [0, 100_003, 1_000_000_000])
def test_places_stay_small_however_far_the_text_goes(offset):
    """A billion tokens on, attention by place is what it was at the start of the text."""
    window, sinks, count, theta = 5, 2, 20, 10_000.0
    key, value = tokens(11, B, count)
    query = queries(11, B, count)
    state = lj.update(make(lj.Sliding(window, sinks)), key[:, :, :sinks], value[:, :, :sinks], 0)
    layer = state.layers[0]
    far = {name: getattr(layer, name) + jnp.int32(offset) for name in ("position", "reach")}
    state = state.with_layers([layer.replace(**far)])
    outs = []
    for begin, size in ((2, 5), (7, 1), (8, 1), (9, 11)):
        new = [x[:, :, begin : begin + size] for x in (query, key, value)]
        out, state = _extend(state, *new, layer_idx=0, rope_theta=theta)
        outs.append(out)
    got = np.concatenate(outs, axis=2)
    assert np.isfinite(got).all()
    for row in range(B):  # from where the window holds only tokens that were really fed
        expected = _streaming(query[row], key[row], value[row], _seen(count, window, sinks), theta)
        _close(got[row, :, 5:], expected[:, sinks + 5 :])
    assert got.shape[3] == DV


def test_a_draft_longer_than_the_window_rolls_back_within_slack():
    """What slid out of the window while the draft was there comes back."""
    for spec, drafts in ((lj.Sliding(2, slack=6), 4), (lj.Sliding(1, sinks=3, slack=4), 3)):
        state = lj.crop(lj.update(make(spec, batch=1), *tokens(0, 1, 10), 0), 2)
        drafted = lj.update(state, *tokens(1, 1, drafts), 0)
        assert_same(lj.rollback(drafted, drafts), state)
        with pytest.raises(ValueError, match="slack="):
            lj.rollback(drafted, drafts + 5)


@pytest.mark.parametrize("slack", [0, 3, 5])
def test_nan_that_slid_out_of_the_window_is_not_seen(slack):
    """Slack keeps it for a rollback, and no query for it."""
    key, value = tokens(0, 1, 8)
    value[:, :, 2] = np.nan
    state = lj.update(make(lj.Sliding(4, slack=slack), batch=1), key, value, 0)
    assert np.isfinite(lj.attend(state, queries(0, 1, 1), 0)).all()


def test_a_concrete_state_works_inside_jit():
    """A cached prefix that a compiled function closes over is checked and grown as outside."""
    prefix = lj.update(make(lj.Dynamic(), batch=1), *tokens(0, 1, 8), 0)
    query = queries(0, 1, 1)
    for change in (lambda s: lj.rollback(s, 1), lambda s: lj.ensure_capacity(s, 100)):
        out = jax.jit(lambda q, change=change: lj.attend(change(prefix), q, 0))(query)
        np.testing.assert_allclose(out, lj.attend(change(prefix), query, 0), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="tokens stored"):
        jax.jit(lambda q: lj.attend(lj.rollback(prefix, 9), q, 0))(query)
    with pytest.raises(TypeError, match="Python numbers"):
        jax.jit(lambda scale: lj.attend(prefix, query, 0, scale=scale))(0.5)
