"""The stateful caches as flax state: `nnx.jit`, `jax.jit`, split and merge, copies, donated clones."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax.nn as nn
from tests.test_wrapper import assert_contents, contents, full, kv

B, H, D = 2, 2, 4
KINDS = {"dynamic": nn.DynamicKVCache, "static": lambda: nn.StaticKVCache(16, 2)}


@pytest.fixture(params=KINDS)
def cache(request):
    """An empty cache of either kind."""
    return KINDS[request.param]()


@pytest.fixture
def step():
    """A compiled append to layer 0, and `step.traces`, how often it was traced."""
    traces = []

    @nnx.jit
    def append(cache, key, value):
        traces.append(None)
        return cache.update(key, value, 0)

    def run(cache, key, value):
        return append(cache, jnp.asarray(key), jnp.asarray(value))

    run.traces = traces
    return run


def test_a_compiled_update_is_seen_by_the_caller(cache, step):
    """The object that went in holds the tokens afterwards, as after an eager update."""
    key, value = kv(5)
    cache.update(key[:, :, :2], value[:, :, :2], 0)
    step(cache, key[:, :, 2:], value[:, :, 2:])
    assert cache.get_seq_length(0) == 5
    np.testing.assert_array_equal(cache.get(0)[0], key)
    np.testing.assert_array_equal(cache.get(0)[1], value)
    assert cache.positions(1).tolist() == [5]


def test_a_compiled_update_returns_the_whole_capacity(cache, step):
    """A traced length cannot shape an array: what is past it reads as zeros, stale tokens included."""
    cache.update(*full(9, 9.0), 0)
    cache.crop(2)
    keys, values = step(cache, *full(1, 1.0))
    capacity = cache.valid(0).shape[0]
    for x in (keys, values):
        assert x.shape == (B, H, capacity, D)
        np.testing.assert_array_equal(x[0, 0, :, 0], [9, 9, 1] + [0] * (capacity - 3))


def test_compiled_update_keeps_other_leading_axes(cache, step):
    """(B, T, D) comes back as (B, C, D)."""
    key = np.ones((2, 1, 4), np.float32)
    cache.update(key, key, 0)
    keys, _ = step(cache, key, key)
    assert keys.shape == (2, cache.valid(0).shape[0], 4)


def test_many_steps_are_one_program(cache, step):
    """The length is data, not structure: no new trace as it grows."""
    key, value = kv(12)
    cache.update(key[:, :, :1], value[:, :, :1], 0)
    for i in range(1, 12):
        step(cache, key[:, :, i : i + 1], value[:, :, i : i + 1])
    assert len(step.traces) == 1
    np.testing.assert_array_equal(cache.get(0)[0], key)
    cache.crop(3)
    cache.batch_select_indices([1, 0])
    step(cache, key[:, :, :1], value[:, :, :1])
    assert len(step.traces) == 1


def test_attend_and_valid_inside_jit(cache):
    """The same numbers as eagerly, step by step."""

    @nnx.jit
    def decode(cache, query, key, value):
        cache.store(key, value, 0)
        return cache.attend(query, 0), cache.valid(0), cache.get_seq_length(0), cache.positions(2)

    key, value = kv(6)
    query = kv(6, seed=1)[0]
    eager = copy.deepcopy(cache)
    eager.update(key, value, 0)
    want = eager.attend(query, 0)
    cache.update(key[:, :, :3], value[:, :, :3], 0)
    for i in range(3, 6):
        new = (jnp.asarray(x[:, :, i : i + 1]) for x in (query, key, value))
        out, valid, length, positions = decode(cache, *new)
        np.testing.assert_allclose(out, want[:, :, i : i + 1], rtol=1e-5, atol=1e-5)
        assert np.flatnonzero(valid).tolist() == list(range(i + 1))
        assert int(length) == i + 1
        assert positions.tolist() == [i + 1, i + 2]


def test_layers_made_inside_jit(cache, step):
    """The first update may be the compiled one; later ones need one more trace, then none."""
    key, value = kv(4)
    for i in range(4):
        step(cache, key[:, :, i : i + 1], value[:, :, i : i + 1])
    np.testing.assert_array_equal(cache.get(0)[0], key)
    assert len(step.traces) == 2
    cache.update(*kv(1), 1)
    assert cache.get_seq_length(1) == 1


def test_a_cache_made_inside_jit():
    """It comes out as a return value."""

    @nnx.jit
    def prefill(key, value):
        cache = nn.StaticKVCache(8, 1)
        cache.store(key, value, 0)
        return cache

    key, value = kv(3)
    cache = prefill(jnp.asarray(key), jnp.asarray(value))
    np.testing.assert_array_equal(cache.get(0)[0], key)
    np.testing.assert_array_equal(cache.update(key, value, 0)[1][:, :, 3:], value)


def test_traced_positions_and_rows(cache):
    """Positions, rows and lengths to crop to may be traced."""

    @nnx.jit
    def work(cache, key, value, position, rows, kept):
        cache.store(key, value, 0, position)
        cache.batch_select_indices(rows)
        cache.crop(kept)

    key, value = kv(4)
    cache.update(key, value, 0)
    new_key, new_value = (jnp.asarray(x) for x in kv(1, seed=1))
    work(cache, new_key, new_value, jnp.int32(1), jnp.array([1, 0]), jnp.int32(3))
    want = key[:, :, 1:].copy()
    want[:, :, :1] = new_key
    np.testing.assert_array_equal(cache.get(0)[0], want[::-1])


def test_the_other_methods_inside_jit(cache):
    """repeat_interleave, rollback and reset are visible to the caller too."""

    @nnx.jit
    def expand(cache):
        cache.batch_repeat_interleave(2)
        cache.rollback(1)

    key, value = kv(4)
    cache.update(key, value, 0)
    expand(cache)
    np.testing.assert_array_equal(cache.get(0)[0], key[[0, 0, 1, 1], :, :3])
    nnx.jit(lambda cache: cache.reset())(cache)
    assert cache.get(0) is None
    cache.update(*kv(1, batch=3), 0)


# --- what does not fit ---------------------------------------------------------------------------


def _overflow(step):
    cache = nn.StaticKVCache(4, 2)
    key, value = kv(3)
    cache.update(key, value, 0)
    keys, _ = step(cache, *kv(2, seed=1))
    return cache, key, keys


def test_overflow_inside_jit_writes_nothing(step):
    """All or nothing, and the length stays."""
    cache, key, keys = _overflow(step)
    np.testing.assert_array_equal(keys[:, :, :3], key)
    np.testing.assert_array_equal(keys[:, :, 3:], 0)
    assert cache.get_seq_length(0) == 3


@pytest.mark.parametrize(
    "call",
    [lambda c: c.update(*kv(1), 0), lambda c: c.store(*kv(1), 0), lambda c: c.get(0),
     lambda c: c.attend(kv(1)[0], 0), lambda c: c.key_cache],
    ids=["update", "store", "get", "attend", "key_cache"],
)  # fmt: skip
def test_the_next_eager_call_says_that_tokens_are_missing(step, call):
    """And changes nothing, so that it says so again, until a reset."""
    cache, _, _ = _overflow(step)
    for _ in range(2):
        with pytest.raises(OverflowError, match=r"layer 0.*length 3, capacity 4.*reset\(\)"):
            call(cache)
        assert cache.get_seq_length(0) == 3
    cache.reset()
    assert cache.update(*kv(4), 0)[0].shape == (B, H, 4, D)


def test_the_overflow_message_names_the_layer():
    """Layer 1 overflowed, layer 0 did not and can be read."""
    cache = nn.StaticKVCache(4, 2)
    for layer in range(2):
        cache.update(*kv(3), layer)
    nnx.jit(lambda cache, x: cache.store(x, x, 1))(cache, jnp.asarray(kv(2)[0]))
    cache.get(0)
    with pytest.raises(OverflowError, match="layer 1"):
        cache.get(1)


def test_what_can_never_fit_raises_at_trace_time(step):
    """More tokens than the capacity: no need to wait for the length."""
    cache = nn.StaticKVCache(4, 1)
    cache.update(*kv(1), 0)
    before = contents(cache)
    with pytest.raises(ValueError, match="capacity is 4"):
        step(cache, *kv(5))
    assert_contents(cache, before)


@pytest.mark.parametrize(
    ("error", "call"),
    [(ValueError, lambda c, x: c.update(x[:, :1], x[:, :1], 0)),
     (ValueError, lambda c, x: c.update(x, x, -1)),
     (TypeError, lambda c, x: c.update(x, x, 0, x[0, 0, 0, :1])),
     (ValueError, lambda c, x: c.update(x, x, 0, -1)),
     (TypeError, lambda c, x: c.batch_select_indices(x[0, 0, 0])),
     (IndexError, lambda c, x: c.batch_select_indices([5])),
     (TypeError, lambda c, x: c.batch_repeat_interleave(jnp.int32(x[0, 0, 0, 0])))],
    ids=["heads", "layer", "float position", "negative position", "float rows", "row", "repeats"],
)  # fmt: skip
def test_static_mistakes_raise_inside_jit_as_outside(cache, error, call):
    """And leave the cache as it was."""
    cache.update(*kv(2), 0)
    before = contents(cache)
    with pytest.raises(error):
        nnx.jit(call)(cache, jnp.asarray(kv(1)[0]))
    assert_contents(cache, before)


def test_ensure_capacity_before_compiled_steps(step):
    """A dynamic cache cannot grow inside jit; with room made before, no step is refused."""
    cache = nn.DynamicKVCache()
    key, value = kv(102, batch=1, heads=1, dim=2)
    cache.update(key[:, :, :2], value[:, :, :2], 0)
    cache.ensure_capacity(100)
    assert cache.valid(0).shape[0] == 128
    np.testing.assert_array_equal(cache.get(0)[0], key[:, :, :2])
    for i in range(2, 102):
        step(cache, key[:, :, i : i + 1], value[:, :, i : i + 1])
    assert len(step.traces) == 1
    np.testing.assert_array_equal(cache.get(0)[0], key)


def test_without_ensure_capacity_the_steps_are_refused(step):
    """At the capacity of 64, and the message says what to call."""
    cache = nn.DynamicKVCache()
    cache.update(*kv(64, batch=1, heads=1, dim=2), 0)
    step(cache, *kv(1, batch=1, heads=1, dim=2))
    assert cache.get_seq_length(0) == 64
    with pytest.raises(OverflowError, match="ensure_capacity"):
        cache.get(0)


def test_eager_and_compiled_calls_may_alternate(cache, step):
    """A dynamic cache grows between compiled steps, which are traced anew for the new shape."""
    key, value = kv(16)
    for i in range(16):
        new = key[:, :, i : i + 1], value[:, :, i : i + 1]
        if i % 2:
            step(cache, *new)
        else:
            cache.update(*new, 0)
    np.testing.assert_array_equal(cache.get(0)[0], key)


# --- as a pytree ---------------------------------------------------------------------------------


def test_jax_jit_with_the_cache_passed_and_returned(cache):
    """Plain `jax.jit` sees a pytree: the argument stays as it was, the result has the tokens."""
    traces = []

    @jax.jit
    def step(cache, key, value):
        traces.append(None)
        cache.store(key, value, 0)
        return cache

    key, value = (jnp.asarray(x) for x in kv(5))
    cache.update(key[:, :, :2], value[:, :, :2], 0)
    before = contents(cache)
    new = cache
    for i in range(2, 5):
        new = step(new, key[:, :, i : i + 1], value[:, :, i : i + 1])
    assert len(traces) == 1
    assert_contents(cache, before)
    np.testing.assert_array_equal(new.get(0)[0], key)
    new.update(*kv(1), 0)
    assert type(new) is type(cache)
    assert new.get_max_cache_shape() == cache.get_max_cache_shape()


def test_a_scan_carries_a_cache(cache):
    """The pytree's structure does not change from step to step."""
    key, value = (jnp.asarray(x) for x in kv(5))
    cache.update(key[:, :, :1], value[:, :, :1], 0)

    def body(cache, new):
        cache.store(*new, 0)
        return cache, cache.attend(new[0], 0)

    slices = tuple(jnp.moveaxis(x[:, :, 1:, None], 2, 0) for x in (key, value))
    new, out = jax.jit(lambda cache, xs: jax.lax.scan(body, cache, xs))(cache, slices)
    np.testing.assert_array_equal(new.get(0)[0], key)
    want = new.attend(key[:, :, 1:], 0)
    np.testing.assert_allclose(out[:, :, :, 0], jnp.moveaxis(want, 2, 0), rtol=1e-5, atol=1e-5)


def _flatten(cache):
    leaves, treedef = jax.tree.flatten(cache)
    return jax.tree.unflatten(treedef, leaves)


def _through_state(cache):
    """A checkpoint: the leaves are saved, more happens, and they are put back."""
    saved = jax.tree.map(jnp.copy, nnx.state(cache))
    cache.update(*kv(2, seed=5), 1)
    cache.batch_select_indices([0, 0])
    nnx.update(cache, saved)
    return cache


@pytest.mark.parametrize(
    "trip", [lambda c: nnx.merge(*nnx.split(c)), nnx.clone, _flatten, _through_state],
    ids=["split and merge", "clone", "flatten", "state and update"],
)  # fmt: skip
def test_a_cache_survives_a_round_trip(cache, trip):
    """Contents, layers that were skipped, configuration; and the next update works."""
    key, value = kv(3)
    cache.update(key, value, 1)
    cache.crop(2)
    before = contents(cache)
    twin = trip(cache)
    assert type(twin) is type(cache)
    assert_contents(twin, before)
    keys, _ = twin.update(key[:, :, :1], value[:, :, :1], 1)
    np.testing.assert_array_equal(keys, key[:, :, [1, 2, 0]])
    twin.update(key, value, 0)
    if isinstance(twin, nn.StaticKVCache):
        with pytest.raises(ValueError, match="num_layers=2"):
            twin.update(key, value, 2)
        with pytest.raises(ValueError, match="capacity is 16"):
            twin.update(*kv(14), 0)


def test_a_deep_copy_is_independent(cache):
    """Neither sees what is done to the other, in place or not."""
    key, value = kv(3)
    cache.update(key, value, 0)
    twin = copy.deepcopy(cache)
    before = contents(cache)
    twin.update(*kv(2, seed=1), 0)
    twin.batch_select_indices([1, 1])
    twin.update(*kv(2, seed=1), 1)
    assert_contents(cache, before)
    kept = contents(twin)
    cache.update(key, value, 0)
    cache.reset()
    assert_contents(twin, kept)


@pytest.mark.parametrize(
    "call",
    [lambda c: c.get(0), lambda c: c.update(*kv(1), 0), lambda c: c.attend(kv(1)[0], 0),
     lambda c: c.get_seq_length(0), lambda c: c.positions(1), lambda c: c.valid(0),
     lambda c: c.crop(1), lambda c: c.rollback(1), lambda c: c.batch_select_indices([0]),
     lambda c: c.batch_repeat_interleave(2)],
    ids=["get", "update", "attend", "get_seq_length", "positions", "valid", "crop", "rollback",
         "batch_select_indices", "batch_repeat_interleave"],
)  # fmt: skip
def test_a_cache_that_the_caller_donated_says_so(cache, call):
    """To a compiled function of their own: its buffers are gone."""
    cache.update(*kv(3), 0)
    new = jax.jit(lambda cache: cache, donate_argnums=0)(cache)
    with pytest.raises(RuntimeError, match="donated to an earlier call"):
        call(cache)
    cache.reset()
    cache.update(*kv(1), 0)
    assert new.get_seq_length(0) == 3


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 300])
def test_a_prefill_that_makes_its_own_layer_attends_to_it(count):
    """Lengths are constants then, and XLA miscounts loops with a constant bound (xla#48454)."""
    key = np.random.default_rng(0).standard_normal((1, 1, count, 2)).astype(np.float32)

    @nnx.jit
    def prefill(cache, key):
        cache.store(key, key, 0)
        return cache.attend(key[:, :, -1:], 0)

    cache = nn.StaticKVCache(320, 1)
    out = prefill(cache, jnp.asarray(key))
    want = cache.attend(key[:, :, -1:], 0)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.get(0)[0], key)
