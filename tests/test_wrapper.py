"""The documented stateful caches, dynamic and static: every line of the behaviour they promise."""

import contextlib
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lucid_jax as lucid
import lucid_jax.nn as nn
from tests.helpers import tokens
from tests.oracle import Oracle, Refused
from tests.test_lucid import OnlyArray, OnlyDLPack, aligned

B, H, D = 2, 2, 4
KINDS = {
    "dynamic": nn.DynamicKVCache,
    "static": lambda: nn.StaticKVCache(max_cache_len=16, num_layers=4),
}


@pytest.fixture(params=KINDS)
def cache(request):
    """An empty cache of either kind, at least 16 tokens and 4 layers."""
    return KINDS[request.param]()


def kv(count, seed=0, batch=B, heads=H, dim=D):
    """Keys and values (B, H, T, D) as NumPy arrays."""
    return tokens(seed, batch, count, heads=heads, dim=dim, value_dim=dim)


def full(count, number, batch=B):
    """Keys and values that all hold one number."""
    return (np.full((batch, H, count, D), number, np.float32),) * 2


def contents(cache):
    """Everything a user can see of a cache, as NumPy arrays."""
    seen = [cache.get_max_cache_shape()]
    for index, pair in enumerate(zip(cache.key_cache, cache.value_cache, strict=True)):
        seen += [None if x is None else np.asarray(x) for x in pair]
        seen += [cache.get_seq_length(index), np.asarray(cache.positions(2, index))]
    return seen


def assert_contents(cache, before):
    """The cache shows what it showed before."""
    after = contents(cache)
    assert len(after) == len(before)
    for x, y in zip(after, before, strict=True):
        np.testing.assert_array_equal(x, y)


@contextlib.contextmanager
def refused(cache, error, match=None):
    """The block raises, and leaves the cache as it was."""
    before = contents(cache)
    with pytest.raises(error, match=match):
        yield
    assert_contents(cache, before)


# --- the classes ---------------------------------------------------------------------------------


def test_the_abstract_classes_cannot_be_made():
    """`Cache` and `KVCache` are contracts and annotations."""
    assert {
        "update", "reset", "batch_select_indices", "batch_repeat_interleave", "crop",
        "get_max_cache_shape",
    } <= nn.Cache.__abstractmethods__  # fmt: skip
    assert callable(nn.Cache.reorder_cache)
    for abstract in (nn.Cache, nn.KVCache):
        with pytest.raises(TypeError, match="abstract"):
            abstract()


def test_what_is_a_what(cache):
    """Both kinds are a `KVCache`, an encoder-decoder pair is only a `Cache`."""
    assert isinstance(cache, nn.KVCache)
    assert isinstance(cache, nn.Cache)
    pair = nn.EncoderDecoderCache()
    assert isinstance(pair, nn.Cache)
    assert not isinstance(pair, nn.KVCache)


def test_documented_parameter_names(cache):
    """Callers may pass everything by the documented names."""
    names = {
        "update": ["key", "value", "layer_idx", "cache_position"],
        "get": ["layer_idx"],
        "get_seq_length": ["layer_idx"],
        "reorder_cache": ["beam_idx"],
        "batch_select_indices": ["indices"],
        "batch_repeat_interleave": ["repeats"],
        "crop": ["max_length"],
        "reset": [],
        "get_max_cache_shape": [],
    }
    for method, expected in names.items():
        assert list(inspect.signature(getattr(cache, method)).parameters) == expected, method


def test_max_cache_shape():
    """No bound for the dynamic cache, `max_cache_len` for the static one."""
    assert nn.DynamicKVCache().get_max_cache_shape() is None
    assert nn.StaticKVCache(12, 3).get_max_cache_shape() == 12


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0, 1), ValueError), ((4, 0), ValueError), ((-1, 1), ValueError),
     ((2.5, 1), TypeError), ((4, True), TypeError)],
)  # fmt: skip
def test_a_static_cache_needs_sensible_sizes(arguments, error):
    """At least one token and one layer, as integers."""
    with pytest.raises(error, match=r"max_cache_len|num_layers"):
        nn.StaticKVCache(*arguments)


# --- what update and get return ------------------------------------------------------------------


def test_update_returns_exactly_what_is_stored(cache):
    """Keys and values of the stored length, bit for bit, whatever the chunks."""
    key, value = kv(9)
    end = 0
    for count in (1, 4, 1, 3):
        begin, end = end, end + count
        got = cache.update(key[:, :, begin:end], value[:, :, begin:end], 0)
        for have, want in zip(got, (key, value), strict=True):
            assert isinstance(have, jax.Array)
            np.testing.assert_array_equal(have, want[:, :, :end])
        np.testing.assert_array_equal(cache.get(0)[0], key[:, :, :end])
        np.testing.assert_array_equal(cache.get(0)[1], value[:, :, :end])
        assert cache.get_seq_length(0) == end
        assert isinstance(cache.get_seq_length(0), int)


def test_a_layer_never_written_holds_nothing(cache):
    """`get` is None and the length 0, beside written layers too."""
    assert cache.get(0) is None
    assert cache.get_seq_length() == 0
    cache.update(*kv(2), 2)
    assert cache.get(0) is None
    assert cache.get(3) is None
    assert cache.get_seq_length(3) == 0


def test_layers_may_be_skipped_and_differ(cache):
    """Layer 2 first; heads, widths and lengths are each layer's own."""
    key2, value2 = kv(3, heads=3, dim=2)
    key0, value0 = kv(1)
    cache.update(key2, value2, 2)
    cache.update(key0, value0, 0)
    np.testing.assert_array_equal(cache.get(2)[0], key2)
    np.testing.assert_array_equal(cache.get(0)[1], value0)
    assert cache.get(1) is None
    assert [cache.get_seq_length(i) for i in range(3)] == [1, 0, 3]
    assert cache.key_cache[1] is None
    np.testing.assert_array_equal(cache.value_cache[2], value2)


def test_key_cache_has_an_entry_for_each_layer():
    """A dynamic cache has the layers used so far, a static one all it was made with."""
    dynamic, static = KINDS["dynamic"](), KINDS["static"]()
    assert dynamic.key_cache == dynamic.value_cache == []
    assert static.key_cache == static.value_cache == [None] * 4
    for cache, layers in ((dynamic, 2), (static, 4)):
        cache.update(*kv(1), 1)
        assert len(cache.key_cache) == len(cache.value_cache) == layers
        cache.reset()
    assert dynamic.key_cache == []
    assert static.key_cache == [None] * 4


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 3, 2)], ids=str)
def test_other_leading_axes_come_back_as_they_went_in(cache, lead):
    """(T, D), (B, T, D) and (B, X, Y, T, D) beside the usual four axes."""
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, *lead, 5, D)).astype(np.float32)
    cache.update(key[..., :3, :], value[..., :3, :], 0)
    keys, values = cache.update(key[..., 3:, :], value[..., 3:, :], 0)
    np.testing.assert_array_equal(keys, key)
    np.testing.assert_array_equal(values, value)
    cache.crop(2)
    np.testing.assert_array_equal(cache.get(0)[0], key[..., 3:, :])
    if lead:
        cache.batch_select_indices([1, 0])
        np.testing.assert_array_equal(cache.get(0)[0], key[::-1][..., 3:, :])
        cache.batch_repeat_interleave(2)
        np.testing.assert_array_equal(cache.get(0)[1], value[[1, 1, 0, 0]][..., 3:, :])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_a_dtype_is_kept_bit_for_bit(cache, dtype):
    """The first update decides; nothing is widened or rounded on the way."""
    key, value = (jnp.asarray(x * 50).astype(dtype) for x in kv(4))
    cache.update(key[:, :, :3], value[:, :, :3], 0)
    keys, values = cache.update(key[:, :, 3:], value[:, :, 3:], 0)
    assert keys.dtype == values.dtype == dtype
    np.testing.assert_array_equal(keys, key)
    np.testing.assert_array_equal(values, value)


def test_64_bit_arrays_become_32_bit(cache):
    """NumPy's default float is what JAX can store, without a warning."""
    key, value = (x.astype(np.float64) for x in kv(2))
    keys, _ = cache.update(key, value, 0)
    assert keys.dtype == jnp.float32
    np.testing.assert_array_equal(keys, key.astype(np.float32))


@pytest.mark.parametrize(
    "wrap", [np.asarray, jnp.asarray, OnlyArray, OnlyDLPack, np.ndarray.tolist],
    ids=["numpy", "jax", "__array__", "__dlpack__", "list"],
)  # fmt: skip
def test_any_array_like_may_be_stored(cache, wrap):
    """Arrays are recognised by their protocol, not by their type."""
    key, value = kv(3)
    keys, values = cache.update(wrap(key), wrap(value), 0)
    np.testing.assert_array_equal(keys, key)
    np.testing.assert_array_equal(values, value)


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [int, np.int64, jnp.int32, lambda n: lucid.Tensor(n)])
def test_a_0d_position_writes_one_token(cache, wrap):
    """In the middle it replaces, at the end it appends."""
    key, value = kv(4)
    cache.update(key, value, 0)
    new = kv(1, seed=1)
    keys, values = cache.update(*new, 0, cache_position=wrap(1))
    np.testing.assert_array_equal(keys[:, :, 1:2], new[0])
    np.testing.assert_array_equal(values[:, :, [0, 2, 3]], value[:, :, [0, 2, 3]])
    keys, _ = cache.update(*new, 0, cache_position=wrap(4))
    assert keys.shape == (B, H, 5, D)
    np.testing.assert_array_equal(keys[:, :, 4:], new[0])


@pytest.mark.parametrize(
    "wrap", [list, tuple, np.array, jnp.array, OnlyArray, lambda p: OnlyDLPack(np.array(p))],
    ids=["list", "tuple", "numpy", "jax", "__array__", "__dlpack__"],
)  # fmt: skip
def test_1d_positions_write_each_token(cache, wrap):
    """Out of order, over stored tokens and past them."""
    key, value = kv(4)
    cache.update(key, value, 0)
    new_key, new_value = kv(3, seed=1)
    keys, values = cache.update(new_key, new_value, 0, cache_position=wrap([4, 0, 2]))
    np.testing.assert_array_equal(keys[:, :, [4, 0, 2]], new_key)
    np.testing.assert_array_equal(values[:, :, [4, 0, 2]], new_value)
    np.testing.assert_array_equal(keys[:, :, [1, 3]], key[:, :, [1, 3]])
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize(
    "wrap", [list, np.array, jnp.array, lambda p: OnlyDLPack(np.array(p))],
    ids=["list", "numpy", "jax", "__dlpack__"],
)  # fmt: skip
def test_2d_positions_write_row_by_row(cache, wrap):
    """Each row has its own places; one length, the largest, holds for all."""
    cache.update(*full(2, 9.0), 0)
    key, value = kv(2, seed=1)
    keys, _ = cache.update(key, value, 0, cache_position=wrap([[0, 1], [3, 1]]))
    assert keys.shape == (B, H, 4, D)
    np.testing.assert_array_equal(keys[0, :, :2], key[0])
    np.testing.assert_array_equal(keys[0, :, 2:], 0)
    np.testing.assert_array_equal(keys[1, :, [3, 1]], key[1].swapaxes(0, 1))
    np.testing.assert_array_equal(keys[1, :, 0], 9)
    np.testing.assert_array_equal(keys[1, :, 2], 0)


@pytest.mark.parametrize("lead", [(2,), (2, 3, 2)], ids=str)
def test_2d_positions_with_other_leading_axes(cache, lead):
    """The first axis is the batch that the positions' first axis means."""
    key = np.arange(np.prod(lead) * 2, dtype=np.float32).reshape(*lead, 2, 1) + 1
    keys, _ = cache.update(key, key, 0, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(keys[0], key[0])
    np.testing.assert_array_equal(keys[1], key[1][..., ::-1, :])


@pytest.mark.parametrize("position", [7, [7], [[7], [7]]], ids=str)
def test_skipped_positions_read_as_zeros(cache, position):
    """Length becomes the largest position + 1, on the first write and later."""
    cache.update(*full(1, 1.0), 0, position)
    keys, values = cache.update(*full(1, 2.0), 0, np.asarray(position) + 3)
    want = [0.0] * 7 + [1, 0, 0, 2]
    for x in (keys, values):
        np.testing.assert_array_equal(x, np.broadcast_to(np.reshape(want, (11, 1)), (B, H, 11, D)))


def test_a_smaller_position_does_not_shorten(cache):
    """Length is max(length, largest position + 1)."""
    cache.update(*kv(6), 0)
    for position in (0, 3, 5):
        cache.update(*kv(1), 0, position)
        assert cache.get_seq_length() == 6
    cache.update(*kv(2), 0, [1, 6])
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("positions", [[2, 0, 2, 2], [[2, 0, 2, 2], [2, 0, 2, 2]]], ids=str)
def test_of_duplicate_positions_the_last_wins(cache, positions):
    """The third write of place 2 is what is read."""
    key, value = kv(4)
    keys, values = cache.update(key, value, 0, positions)
    np.testing.assert_array_equal(keys[:, :, 2], key[:, :, 3])
    np.testing.assert_array_equal(values[:, :, 0], value[:, :, 1])
    np.testing.assert_array_equal(keys[:, :, 1], 0)


def test_dynamic_grows_to_fit():
    """By appends and by positions, in powers of two; what was stored stays."""
    cache = nn.DynamicKVCache()
    key, value = kv(70)
    keys, values = cache.update(key, value, 0)
    np.testing.assert_array_equal(keys, key)
    keys, values = cache.update(*full(1, 5.0), 0, 300)
    assert keys.shape == (B, H, 301, D)
    np.testing.assert_array_equal(keys[:, :, :70], key)
    np.testing.assert_array_equal(values[:, :, 70:300], 0)
    assert (values[:, :, 300] == 5).all()


def test_static_fills_to_the_brim_and_refuses_the_next():
    """The error names the bound; a crop makes room again."""
    cache = nn.StaticKVCache(max_cache_len=6, num_layers=1)
    with refused(cache, ValueError, "capacity is 6"):
        cache.update(*kv(7), 0)
    key, value = kv(6)
    keys, _ = cache.update(key, value, 0)
    np.testing.assert_array_equal(keys, key)
    with refused(cache, ValueError, "capacity is 6"):
        cache.update(*kv(1), 0)
    for position in (6, [6], [[0], [6]]):
        with refused(cache, ValueError, "capacity is 6"):
            cache.update(*kv(1), 0, position)
    cache.crop(4)
    cache.update(*kv(2), 0)
    with refused(cache, ValueError, "capacity is 6"):
        cache.update(*kv(1), 0)


# --- crop, batch operations, reset, rollback -----------------------------------------------------


def test_crop_keeps_the_latest_of_every_layer(cache):
    """A layer with fewer tokens keeps them all."""
    key, value = kv(7)
    cache.update(key, value, 0)
    cache.update(key[:, :, :2], value[:, :, :2], 1)
    cache.crop(3)
    np.testing.assert_array_equal(cache.get(0)[0], key[:, :, 4:])
    np.testing.assert_array_equal(cache.get(0)[1], value[:, :, 4:])
    np.testing.assert_array_equal(cache.get(1)[0], key[:, :, :2])
    cache.crop(100)
    assert [cache.get_seq_length(i) for i in range(2)] == [3, 2]


@pytest.mark.parametrize("count", [2, np.int64(2), np.array(2), jnp.int32(2)], ids=repr)
def test_crop_takes_any_integer(cache, count):
    """Python, NumPy and JAX integers alike."""
    cache.update(*kv(5), 0)
    cache.crop(count)
    assert cache.get_seq_length() == 2


def test_after_crop_positions_count_from_the_first_kept(cache):
    """Place 0 is the oldest token that survived; RoPE positions go on all the same."""
    key, value = kv(5)
    cache.update(key, value, 0)
    cache.crop(3)
    new = kv(1, seed=1)
    keys, _ = cache.update(*new, 0, cache_position=0)
    np.testing.assert_array_equal(keys[:, :, :1], new[0])
    np.testing.assert_array_equal(keys[:, :, 1:], key[:, :, 3:])
    cache.update(*new, 0, cache_position=3)
    assert cache.get_seq_length() == 4
    assert cache.positions(2, 0).tolist() == [6, 7]


def test_crop_to_nothing(cache):
    """Arrays with a zero-length sequence axis, not None; then the cache goes on."""
    cache.update(*kv(5), 0)
    cache.crop(0)
    keys, values = cache.get(0)
    assert keys.shape == values.shape == (B, H, 0, D)
    assert cache.get_seq_length() == 0
    key, value = kv(2, seed=1)
    np.testing.assert_array_equal(cache.update(key, value, 0)[0], key)


def test_cropped_tokens_never_come_back(cache):
    """Whatever is written after a crop, slots skipped on the way are zeros."""
    cache.update(*full(10, 9.0), 0)
    cache.crop(2)
    keys, values = cache.update(*full(1, 1.0), 0, cache_position=8)
    for x in (keys, values):
        assert x[0, 0, :, 0].tolist() == [9, 9, 0, 0, 0, 0, 0, 0, 1]
    cache.crop(0)
    keys, _ = cache.update(*full(1, 1.0), 0, cache_position=[[4], [2]])
    assert keys[:, 0, :, 0].tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    assert cache.update(*full(1, 2.0), 0)[0].shape == (B, H, 6, D)


def test_tokens_of_before_a_reset_never_come_back(cache):
    """As after a crop."""
    cache.update(*full(10, 9.0), 0)
    cache.reset()
    keys, _ = cache.update(*full(1, 1.0), 0, cache_position=3)
    assert keys[0, 0, :, 0].tolist() == [0, 0, 0, 1]


def test_rollback_drops_the_latest(cache):
    """As if they had never come, in every layer; more than is stored is refused."""
    key, value = kv(5)
    for layer in (0, 2):
        cache.update(key, value, layer)
    cache.rollback(2)
    for layer in (0, 2):
        np.testing.assert_array_equal(cache.get(layer)[0], key[:, :, :3])
        assert cache.positions(1, layer).tolist() == [3]
    cache.update(*kv(1), 0)
    for n, error in ((4, ValueError), (-1, ValueError), (1.5, TypeError)):
        with refused(cache, error, r"n must|rollback"):
            cache.rollback(n)


def test_rollback_of_an_empty_cache_refuses_what_a_written_one_does(cache):
    """There is nothing to drop; a count that makes no sense still raises."""
    cache.rollback(0)
    with pytest.raises(TypeError, match="n must"):
        cache.rollback(1.5)
    with pytest.raises(ValueError, match="rollback"):
        cache.rollback(-1)


def test_repeat_interleave_order(cache):
    """Rows 0, 0, 0, 1, 1, 1 in every layer."""
    key, value = kv(3)
    for layer in (0, 2):
        cache.update(key, value, layer)
    cache.batch_repeat_interleave(3)
    for layer in (0, 2):
        np.testing.assert_array_equal(cache.get(layer)[0], key[[0, 0, 0, 1, 1, 1]])
        np.testing.assert_array_equal(cache.get(layer)[1], value[[0, 0, 0, 1, 1, 1]])
    cache.batch_repeat_interleave(1)
    keys, _ = cache.update(*kv(1, batch=6), 0)
    assert keys.shape == (6, H, 4, D)


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize(
    "rows", [[2, 0, 1], [0, 0, 2], [1], [2, 0], [0, 0, 2, 1], [1, 1, 1, 1, 0]], ids=str
)
def test_rows_may_be_reordered_repeated_and_dropped(cache, method, rows):
    """Row i of the result is row `indices[i]`, a gather and no permutation."""
    key, value = kv(3, batch=3)
    for layer in (0, 2):
        cache.update(key, value, layer)
    getattr(cache, method)(rows)
    for layer in (0, 2):
        np.testing.assert_array_equal(cache.get(layer)[0], key[rows])
        np.testing.assert_array_equal(cache.get(layer)[1], value[rows])
    keys, _ = cache.update(*kv(1, batch=len(rows)), 0)
    assert keys.shape == (len(rows), H, 4, D)


@pytest.mark.parametrize(
    "wrap", [list, tuple, np.array, jnp.array, lambda r: lucid.Tensor(r, dtype=lucid.Int64),
             OnlyArray, lambda r: OnlyDLPack(np.array(r))],
    ids=["list", "tuple", "numpy", "jax", "tensor", "__array__", "__dlpack__"],
)  # fmt: skip
def test_any_array_like_may_name_rows(cache, wrap):
    """Indices are recognised by their protocol, not by their type."""
    key, value = kv(2)
    cache.update(key, value, 0)
    cache.batch_select_indices(wrap([1, 0]))
    np.testing.assert_array_equal(cache.get(0)[0], key[::-1])


def test_reset_forgets_everything(cache):
    """Batch size, heads, width and dtype included: like new."""
    cache.update(*kv(5), 0)
    cache.update(*kv(5), 2)
    cache.reset()
    assert cache.get(0) is None
    assert cache.get(2) is None
    assert cache.get_seq_length(2) == 0
    assert cache.positions(1).tolist() == [0]
    key, value = (x.astype(np.float16) for x in kv(2, batch=3, heads=1, dim=6))
    np.testing.assert_array_equal(cache.update(key, value, 0)[0], key)


def test_everything_runs_on_an_empty_cache(cache):
    """Batch operations, crop and reset of nothing leave nothing."""
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices([2, 0])
    cache.reorder_cache([0])
    cache.crop(4)
    cache.rollback(0)
    cache.reset()
    assert cache.get(0) is None


def test_an_empty_chunk_of_a_layer_never_written_attends_to_nothing():
    """With `return_lse`, there is one for each output: none."""
    cache, empty = nn.DynamicKVCache(), jnp.zeros((2, 3, 0, 8))
    assert cache.extend(empty, empty, empty, 0).shape == (2, 3, 0, 8)
    out, lse = cache.extend(empty, empty, empty, 0, return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 3, 0, 8), (2, 3, 0), jnp.float32)


def test_an_empty_append():
    """A static cache refuses it; a dynamic one has nothing to do."""
    nothing = kv(0)
    cache = KINDS["static"]()
    with refused(cache, ValueError, "empty"):
        cache.update(*nothing, 0)
    cache.update(*kv(2), 0)
    with refused(cache, ValueError, "empty"):
        cache.update(*nothing, 0)
    cache = nn.DynamicKVCache()
    assert cache.update(*nothing, 0)[0].shape == (B, H, 0, D)
    cache.update(*kv(2), 0)
    assert cache.update(*nothing, 0)[0].shape == (B, H, 2, D)


# --- errors --------------------------------------------------------------------------------------

NAN = float("nan")
BAD_CALLS = {  # layer 0 holds 3 tokens of 2 rows, layer 2 one of 3 heads, the others nothing
    "key and value differ": (ValueError, "equal shapes", lambda c: c.update(kv(1)[0], kv(2)[1], 0)),
    "key and value differ, new layer": (
        ValueError, "equal shapes", lambda c: c.update(kv(1)[0], kv(2)[1], 3)),
    "1 axis": (ValueError, "at least 2 axes", lambda c: c.update(np.ones(4), np.ones(4), 3)),
    "a number": (ValueError, "at least 2 axes", lambda c: c.update(1.0, 1.0, 0)),
    "heads": (ValueError, r"\(2, 2, seq, 4\)", lambda c: c.update(*kv(1, heads=3), 0)),
    "head_dim": (ValueError, "head_dim", lambda c: c.update(*kv(1, dim=6), 0)),
    "batch": (ValueError, "batch", lambda c: c.update(*kv(1, batch=3), 0)),
    "other axes": (ValueError, "shape", lambda c: c.update(np.ones((2, 1, 4)), np.ones((2, 1, 4)), 0)),
    "other axes, as many numbers": (
        ValueError, "shape", lambda c: c.update(*(np.ones((2, 1, 2, 1, 4)),) * 2, 0)),
    "dtype": (TypeError, "float16", lambda c: c.update(*(x.astype(np.float16) for x in kv(1)), 0)),
    "dtypes differ, new layer": (
        TypeError, "dtype", lambda c: c.update(kv(1)[0], kv(1)[1].astype(np.float16), 3)),
    "negative layer": (ValueError, "layer_idx", lambda c: c.update(*kv(1), -1)),
    "negative layer, get": (ValueError, "layer_idx", lambda c: c.get(-1)),
    "negative layer, length": (ValueError, "layer_idx", lambda c: c.get_seq_length(-1)),
    "negative layer, valid": (ValueError, "layer_idx", lambda c: c.valid(-1)),
    "negative layer, attend": (ValueError, "layer_idx", lambda c: c.attend(kv(1)[0], -1)),
    "negative layer, positions": (ValueError, "layer_idx", lambda c: c.positions(1, -1)),
    "layer not an integer": (TypeError, "layer_idx", lambda c: c.update(*kv(1), 0.0)),
    "layer a boolean": (TypeError, "layer_idx", lambda c: c.get(True)),
    "negative position": (ValueError, "negative", lambda c: c.update(*kv(1), 0, -1)),
    "negative position among others": (ValueError, "negative", lambda c: c.update(*kv(2), 0, [0, -1])),
    "negative position of one row": (
        ValueError, "negative", lambda c: c.update(*kv(1), 3, [[0], [-1]])),
    "0-D position, two tokens": (ValueError, "0-D", lambda c: c.update(*kv(2), 0, 0)),
    "0-D position, two tokens, new layer": (ValueError, "0-D", lambda c: c.update(*kv(2), 3, 0)),
    "1-D positions too few": (ValueError, "1-D", lambda c: c.update(*kv(2), 0, [0])),
    "1-D positions too many": (ValueError, "1-D", lambda c: c.update(*kv(2), 3, [0, 1, 2])),
    "2-D positions of another shape": (ValueError, "2-D", lambda c: c.update(*kv(2), 0, [[0, 1]])),
    "2-D positions transposed": (
        ValueError, "2-D", lambda c: c.update(*kv(3), 0, np.zeros((3, 2), int))),
    "2-D positions, no batch axis": (
        ValueError, "batch axis", lambda c: c.update(np.ones((1, 4)), np.ones((1, 4)), 3, [[0]])),
    "2-D positions, no batch axis, DLPack": (
        ValueError, "batch axis",
        lambda c: c.update(np.ones((1, 4)), np.ones((1, 4)), 3, OnlyDLPack(np.array([[0]])))),
    "3-D positions": (ValueError, "axes", lambda c: c.update(*kv(2), 0, np.zeros((2, 2, 2), int))),
    "float position": (TypeError, "integers", lambda c: c.update(*kv(1), 0, 1.0)),
    "float positions": (TypeError, "integers", lambda c: c.update(*kv(1), 3, jnp.zeros(1))),
    "boolean position": (TypeError, "integers", lambda c: c.update(*kv(1), 0, True)),
    "boolean positions": (TypeError, "integers", lambda c: c.update(*kv(2), 0, [True, False])),
    "string position": (TypeError, "integers", lambda c: c.update(*kv(1), 0, "0")),
    "indices 0-D": (ValueError, "1-D", lambda c: c.batch_select_indices(0)),
    "indices 2-D": (ValueError, "1-D", lambda c: c.reorder_cache([[0, 1]])),
    "index past the batch": (IndexError, "indices", lambda c: c.batch_select_indices([0, 2])),
    "index negative": (IndexError, "indices", lambda c: c.reorder_cache([-1, 0])),
    "indices float": (TypeError, "integers", lambda c: c.batch_select_indices([0.0, 1.0])),
    "indices boolean": (TypeError, "integers", lambda c: c.batch_select_indices([True, False])),
    "no indices": (ValueError, "at least one", lambda c: c.batch_select_indices([])),
    "no repeats": (ValueError, "repeats", lambda c: c.batch_repeat_interleave(0)),
    "negative repeats": (ValueError, "repeats", lambda c: c.batch_repeat_interleave(-2)),
    "repeats float": (TypeError, "repeats", lambda c: c.batch_repeat_interleave(2.0)),
    "negative crop": (ValueError, "max_length", lambda c: c.crop(-1)),
    "crop float": (TypeError, "max_length", lambda c: c.crop(1.5)),
    "crop boolean": (TypeError, "max_length", lambda c: c.crop(True)),
    "valid of nothing": (ValueError, "layer 3 holds nothing", lambda c: c.valid(3)),
    "attend to nothing": (ValueError, "layer 3 holds nothing", lambda c: c.attend(kv(1)[0], 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_raises_and_changes_nothing(cache, name):
    """Every documented error, and the cache as it was afterwards."""
    error, match, call = BAD_CALLS[name]
    cache.update(*kv(3), 0)
    cache.update(*kv(1, heads=3), 2)
    with refused(cache, error, match):
        call(cache)
    cache.update(*kv(1), 0)  # and it still works
    assert cache.get_seq_length(0) == 4


EMPTY_CACHE_CALLS = [
    "negative layer", "negative layer, get", "negative layer, length", "negative position",
    "0-D position, two tokens", "1-D positions too few", "2-D positions of another shape",
    "3-D positions", "float position", "boolean position", "key and value differ", "1 axis",
    "indices 2-D", "index negative", "indices float", "no repeats", "negative crop", "crop float",
]  # fmt: skip


@pytest.mark.parametrize("name", EMPTY_CACHE_CALLS)
def test_a_bad_call_raises_on_an_empty_cache_too(cache, name):
    """Nothing stored is no reason to let a mistake pass; no layer appears."""
    error, match, call = BAD_CALLS[name]
    with refused(cache, error, match):
        call(cache)
    assert cache.get(0) is None


@pytest.mark.parametrize("position", [0, [[0]], [0], -1, 0.5], ids=str)
def test_an_empty_chunk_does_not_hide_a_bad_position(cache, position):
    """No tokens and one position disagree, in a layer that exists and one that does not."""
    cache.update(*kv(1), 0)
    for layer in (0, 1):
        with refused(cache, (ValueError, TypeError)):
            cache.update(*kv(0), layer, position)


@pytest.mark.parametrize("layer", [4, 100])
def test_a_static_cache_has_its_layers_and_no_more(layer):
    """The error names how many there are."""
    cache = KINDS["static"]()
    calls = (lambda: cache.update(*kv(1), layer), lambda: cache.get(layer),
             lambda: cache.get_seq_length(layer), lambda: cache.positions(1, layer))  # fmt: skip
    for call in calls:
        with refused(cache, ValueError, "num_layers=4"):
            call()
    cache.update(*kv(1), 3)


def test_batch_operations_need_a_batch_axis(cache):
    """Of (T, D) tokens there are no rows to choose."""
    cache.update(np.ones((3, D), np.float32), np.ones((3, D), np.float32), 0)
    with refused(cache, ValueError, "batch axis"):
        cache.batch_select_indices([0])
    with refused(cache, ValueError, "batch axis"):
        cache.batch_repeat_interleave(2)


def test_an_error_in_one_layer_leaves_all_layers_alone(cache):
    """Layers of 3 and 2 rows: an index that fits only one changes neither."""
    cache.update(*kv(2, batch=3), 0)
    cache.update(*kv(2, batch=2), 1)
    with refused(cache, IndexError, "indices"):
        cache.batch_select_indices([2, 0])
    cache.update(*kv(1, batch=2), 1)
    with refused(cache, ValueError, "rollback"):
        cache.rollback(3)


# --- nobody shares memory with a cache -----------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: x, OnlyDLPack], ids=["numpy", "dlpack"])
@pytest.mark.parametrize("append", ["update", "store"])
def test_the_cache_does_not_follow_the_callers_array(cache, wrap, append):
    """The first append copies; so does every later one. Written to at once, it may be too early."""
    for _ in range(8):
        cache.reset()
        for _ in range(2):
            key = aligned((8, 16, 8, 64))
            getattr(cache, append)(wrap(key), wrap(key), 0)
            key[...] = 7.0
        assert float(cache.get(0)[0].max()) == 1.0


def test_an_empty_append_does_not_share_memory_either():
    """What an empty append returns belongs to the caller."""
    key, value = kv(0)
    assert nn.DynamicKVCache().update(key, value, 0)[0] is not key


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [3, 16], ids=["partly full", "full"])
def test_returned_arrays_never_change(cache, batch, count):
    """B = H = 1 makes the stored tokens one stretch of the buffer, which would be easy to hand out."""
    heads = batch
    key, value = kv(count, batch=batch, heads=heads)
    first = cache.update(key, value, 0)
    again, lists = cache.get(0), (cache.key_cache[0], cache.value_cache[0])
    everything = [*first, *again, *lists]
    before = [np.array(x) for x in everything]
    cache.update(*(np.full_like(x[:, :, :2], 7.0) for x in (key, value)), 0, [0, 1])
    cache.crop(2)
    cache.batch_select_indices([0] * batch)
    cache.update(*(np.full_like(x[:, :, :1], 8.0) for x in (key, value)), 0)
    for x, y in zip(everything, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_returned_arrays_never_change_at_exactly_full_capacity():
    """The buffer itself, if it were returned, would be overwritten here."""
    for batch, count, cache in ((1, 4, nn.StaticKVCache(4, 1)), (2, 64, nn.DynamicKVCache())):
        key, value = kv(count, batch=batch, heads=1)
        keys, values = cache.update(key, value, 0)
        cache.update(*(np.full_like(x, 7.0) for x in (key, value)), 0, list(range(count)))
        np.testing.assert_array_equal(keys, key)
        np.testing.assert_array_equal(values, value)


def test_returned_lists_are_not_the_caches_own(cache):
    """Writing to `key_cache` changes nothing in the cache."""
    cache.update(*kv(2), 0)
    before = contents(cache)
    cache.key_cache[0] = None
    cache.value_cache.clear()
    assert_contents(cache, before)


# --- attend, valid, positions --------------------------------------------------------------------


def test_valid_marks_the_stored_slots(cache):
    """A bool for each slot of the capacity."""
    cache.update(*kv(3), 0)
    valid = cache.valid(0)
    assert valid.dtype == bool
    assert np.flatnonzero(valid).tolist() == [0, 1, 2]


@pytest.mark.parametrize("lead", [(), (2,), (2, 2), (2, 2, 2)], ids=str)
def test_attend_agrees_with_softmax_over_what_get_returns(cache, lead):
    """Causal, newest queries last, with any leading axes."""
    rng = np.random.default_rng(0)
    key, value, query = rng.standard_normal((3, *lead, 5, D)).astype(np.float32)
    cache.update(key, value, 0)
    scores = query @ np.swapaxes(key, -1, -2) / np.sqrt(D)
    weights = np.exp(np.where(np.tri(5, dtype=bool), scores, -np.inf))
    want = weights / weights.sum(-1, keepdims=True) @ value
    out = cache.attend(query, 0)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        cache.attend(query[..., 3:, :], 0), want[..., 3:, :], rtol=1e-5, atol=1e-5
    )


def test_positions_continue_where_the_tokens_end(cache):
    """From 0 in a new layer; places count from the oldest kept token."""
    assert cache.positions(3).tolist() == [0, 1, 2]
    assert cache.positions(1, 0, 5).tolist() == [5]
    cache.update(*kv(4), 0)
    assert cache.positions(2).tolist() == [4, 5]
    cache.crop(1)
    assert cache.positions(2).tolist() == [4, 5]
    assert cache.positions(2, 0, [0, 1]).tolist() == [3, 4]
    assert cache.positions(2, 0, [[0, 1], [2, 0]]).tolist() == [[3, 4], [5, 3]]
    assert cache.positions(2, 1).tolist() == [0, 1]


# --- random sequences against the slow model -----------------------------------------------------

LAYERS = 2
SIZES = {"dynamic": 64, "static": 8}
POSITIONS = {"dynamic": 66, "static": 9}

append = st.tuples(st.just("append"), st.integers(0, LAYERS - 1), st.sampled_from([1, 3]))
place = st.tuples(
    st.just("place"),
    st.integers(0, LAYERS - 1),
    st.sampled_from(["0-D", "1-D", "2-D"]),
    st.lists(st.integers(-1, 7) | st.integers(0, 80), min_size=9, max_size=9),
)
other = st.one_of(
    st.tuples(st.just("crop"), st.sampled_from([0, 1, 2, 5, -1])),
    st.tuples(st.just("rollback"), st.integers(0, 3)),
    st.tuples(st.just("select"), st.lists(st.integers(-1, 3), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(0, 2)),
    st.tuples(st.just("reset")),
)


class Model:
    """A list of oracles, one per layer, that knows nothing of how the cache works."""

    def __init__(self, kind):
        self.kind, self.layers, self.batch = kind, [None] * LAYERS, B

    def fresh(self):
        return Oracle(batch=self.batch, heads=1, dim=2, capacity=SIZES[self.kind],
                      growable=self.kind == "dynamic", ragged=False)  # fmt: skip

    def update(self, index, key, value, position=None):
        layer = self.layers[index] or self.fresh()
        layer.update(key, value, position)
        self.layers[index] = layer

    def each(self, method, *arguments):
        """One operation on all layers, or on none."""
        written = [layer for layer in self.layers if layer]
        if method == "rollback" and any(layer.lengths()[0] < arguments[0] for layer in written):
            raise Refused
        for layer in written:
            getattr(layer, method)(*arguments)
        self.batch = written[0].batch if written else self.batch


def _step(cache, model, operation, number):
    """One operation, as (on the cache, on the model)."""
    name, *arguments = operation
    rng = np.random.default_rng(number)
    if name in ("append", "place"):
        index, count, position = arguments[0], arguments[1], None
        if name == "place":
            count = 1 if arguments[1] == "0-D" else 3
            position = np.clip(arguments[2], -1, POSITIONS[model.kind])
            position = {"0-D": position[0], "1-D": position[:3],
                        "2-D": position[: 3 * model.batch].reshape(-1, 3)}[arguments[1]]  # fmt: skip
        key, value = rng.standard_normal((2, model.batch, 1, count, 2)).astype(np.float32)
        return (
            lambda: cache.update(key, value, index, position),
            lambda: model.update(index, key, value, position),
        )
    if name == "reset":
        return cache.reset, lambda: model.__init__(model.kind)
    methods = {
        "crop": (cache.crop, "crop"), "rollback": (cache.rollback, "rollback"),
        "select": (cache.batch_select_indices, "select"),
        "repeat": (cache.batch_repeat_interleave, "repeat_interleave"),
    }  # fmt: skip
    method, twin = methods[name]
    return lambda: method(arguments[0]), lambda: model.each(twin, *arguments)


@pytest.mark.parametrize("kind", SIZES)
@given(operations=st.lists(st.one_of(append, place, other), min_size=8, max_size=14))
def test_random_operations_agree_with_the_model(kind, operations):
    """Every operation does what the list model does, or is refused where that refuses."""
    cache = nn.DynamicKVCache() if kind == "dynamic" else nn.StaticKVCache(SIZES[kind], LAYERS)
    model = Model(kind)
    for number, operation in enumerate(operations):
        if not any(model.layers):
            model.batch = B
            if operation[0] not in ("append", "place"):
                continue
        if operation[0] == "repeat" and operation[1] * model.batch > 3:
            continue  # shapes stay few, and so do compilations
        on_cache, on_model = _step(cache, model, operation, number)
        try:
            on_model()
        except Refused as refusal:
            with refused(cache, refusal.error):
                on_cache()
        else:
            on_cache()
        for index, layer in enumerate(model.layers):
            if layer is None:
                assert cache.get(index) is None
                continue
            length = layer.lengths()[0]
            assert cache.get_seq_length(index) == length
            assert cache.positions(1, index).tolist() == [layer.position()]
            for have, want in zip(cache.get(index), layer.get(), strict=False):
                np.testing.assert_array_equal(have, want[:, :, :length])


# --- cost ----------------------------------------------------------------------------------------

DOCUMENTED_LOOP = """
import time
import jax
import lucid_jax as lucid
import lucid_jax.nn as nn

compiled = 0
def listen(event, seconds, **_):
    global compiled
    compiled += event == "/jax/core/compile/backend_compile_duration"
jax.monitoring.register_event_duration_secs_listener(listen)

shape = (2, 8, 1, 64)
tokens = [(lucid.randn(*shape), lucid.randn(*shape)) for _ in range(300)]
compiled, start = 0, time.perf_counter()
cache = nn.DynamicKVCache()
for key, value in tokens:
    k_all, v_all = cache.update(key, value, layer_idx=0)
k_all.block_until_ready()
print(compiled, k_all.shape[-2], time.perf_counter() - start)
"""


def test_300_documented_appends_compile_a_handful_of_programs():
    """In a cold process, which is what a notebook's first cell is. (The time is only printed.)"""
    run = subprocess.run([sys.executable, "-c", DOCUMENTED_LOOP], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    compiled, length, seconds = run.stdout.split()
    print(f"{compiled} programs, {float(seconds):.2f} s")
    assert int(length) == 300
    assert 0 < int(compiled) <= 10


@pytest.mark.parametrize("lead", [(2, 3), (2,), (), (2, 3, 2)], ids=str)
def test_no_step_compiles_whatever_the_leading_axes(cache, lead, compilations):
    """After the first append, neither length nor the shape to return is new to XLA."""
    key = np.ones((*lead, 1, D), np.float32)
    cache.update(key, key, 0)
    before = compilations()
    for _ in range(12):
        cache.update(key, key, 0)
        cache.get(0)
    assert compilations() == before


def test_chunks_of_new_lengths_compile_only_the_append(cache, compilations):
    """Bringing a NumPy array to the device is a transfer, not a program."""
    cache.update(*kv(1), 0)
    before = compilations()
    for count in (2, 3, 4):
        cache.update(*kv(count), 0)
    assert compilations() - before <= 3


def test_growth_steps_are_geometric():
    """300 tokens grow the buffer three times, doubling it each time."""
    cache = nn.DynamicKVCache()
    key, value = kv(1, batch=1, heads=1, dim=2)
    capacities = []
    for _ in range(300):
        cache.store(key, value, 0)
        capacities.append(cache.valid(0).shape[0])
    steps = sorted(set(capacities))
    assert steps == [steps[0] * 2**i for i in range(len(steps))]
    assert len(steps) <= 5


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_updates_its_buffer_in_place(cache, size):
    """There is never a second buffer, even while the caller holds on to what was returned."""
    held = [cache.update(*kv(3, batch=size, heads=size), 0)]
    addresses = set()
    for _ in range(4):
        held.append(cache.update(*kv(1, batch=size, heads=size), 0))
        layer = cache._layer(0)
        addresses |= {(layer.key.unsafe_buffer_pointer(), layer.value.unsafe_buffer_pointer())}
    assert len(addresses) == 1
