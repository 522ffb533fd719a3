"""What int32 cannot count and no memory can hold is refused, not wrapped, and never aborts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from tests.helpers import assert_same, make, more_layouts, stored, tokens

MOST = 2**31 - 1
B = 2
KIVI = lj.codecs.KIVI(group=4, residual=3)
SPECS = [
    lj.Static(8), lj.Dynamic(), lj.Static(12, codec=KIVI), lj.Static(8, track=True),
    lj.Sliding(5, sinks=1, slack=2), lj.Sliding(8, codec=KIVI),
    *(new() for new in more_layouts(8).values()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "sizes", "message"),
    [
        (lj.Static(2**62), {}, f"{2**62} token slots .* int32, up to {MOST}; use fewer"),
        (lj.Static(2**31), {}, f"{2**31} token slots"),
        (lj.Static(2**62, codec=KIVI), {}, "token slots"),
        (lj.Sliding(2**31), {}, "token slots"),
        (lj.Sliding(MOST, sinks=4), {}, f"{2**31 + 8} token slots"),
        (lj.Static(4), {"batch": 2**40}, "batch_size must fit int32"),
        (lj.Static(4), {"heads": 2**40}, "num_kv_heads must fit int32"),
        (lj.Static(4), {"dim": 2**40}, " head_dim must fit int32|^head_dim must fit int32"),
        (lj.Static(4), {"value_dim": 2**40}, "value_head_dim must fit int32"),
        (lj.Static(2**30), {"batch": 2**30}, "more than any machine can address"),
        (lj.Static(2**30), {"batch": 2**12}, r"needs \d{14,} bytes.* use fewer tokens"),
        (lj.Static(4), {"layers": 2**9, "batch": 2**30}, r"cache of 512 layers .* \d{14,} bytes"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_before_xla_hears_of_it(spec, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(spec, **sizes)
    if "bytes" in message:  # what a compiled call allocates is XLA's to refuse
        assert lj.nbytes(jax.eval_shape(lambda: make(spec, **sizes))) > 10**13
    else:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: make(spec, **sizes))


def test_growth_past_int32_or_memory_is_refused():
    state = make(lj.Dynamic())
    for need in (2**40, MOST):
        with pytest.raises(ValueError, match="token slots"):
            lj.grow(state, need)
    with pytest.raises(ValueError, match="token slots"):
        lj.ensure_capacity(state, 2**62)
    with pytest.raises(ValueError, match=r"room for 1073741824 tokens .* needs \d+ bytes"):
        lj.grow(make(lj.Dynamic(), heads=64, dim=256), 2**30)


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        (lj.Static, r"Static\(256\), got the class Static"),
        (lj.Dynamic, r"Dynamic\(\), got the class Dynamic"),
        (lj.Sliding, r"Sliding\(256\), got the class Sliding"),
        ([lj.Static(4), lj.Sliding], r"Sliding\(256\), got the class Sliding"),
        ("static", r"Static\(256\), Dynamic\(\), Sliding\(256\), .*got 'static'"),
        (lj.codecs.Int8(), "got Int8"),
    ],
)
def test_what_is_no_spec_is_told_what_to_write(spec, advice):
    with pytest.raises(TypeError, match=advice):
        make(spec)


def near(spec, left, **options):
    """An empty cache with `left` positions to go, as one that was cropped after 2**31 tokens."""
    state = make(spec, batch=B, **options)
    layer = state.layers[0]
    place = jnp.full_like(layer.position, MOST - left)
    return state.with_layers([layer.replace(start=place, position=place, reach=place)])


def appends(spec):
    """Ways to send three tokens."""
    key, value = tokens(7, B, 3)
    query = jnp.zeros((B, 4, 3, 4), jnp.float32)
    ways = {
        "update": lambda s: lj.update(s, key, value, 0),
        "extend": lambda s: lj.extend(s, query, key, value, 0)[1],
    }
    if spec.codec.unit == 1 and not getattr(spec, "track", False):
        ways["places"] = lambda s: lj.update(s, key, value, 0, cache_position=[2, 3, 4])
    return ways


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_no_position_passes_int32(spec, ragged):
    """What fits is stored, the last position included; the next token is refused, or flagged."""
    key, value = tokens(3, B, 2)
    full = lj.update(near(spec, 2, ragged=ragged), key, value, 0)
    assert np.all(full.layers[0].position == MOST) and not lj.overflowed(full).any()
    if spec.codec.unit == 1:
        np.testing.assert_array_equal(stored(full)[0], key[0])
    for state in (full, near(spec, 2, ragged=ragged)):
        for name, way in appends(spec).items():
            if name == "places" and state is full:
                continue  # places 2 to 4 of two that are stored
            with pytest.raises(ValueError, match=r"int32 can count"):
                way(state)
            after = jax.jit(way)(state)
            assert lj.overflowed(after).all()
            assert_same(
                after.with_layers([after.layers[0].replace(overflowed=state.layers[0].overflowed)]),
                state,
            )
    assert np.all(lj.rollback(full, 1).layers[0].position == MOST - 1)
    assert np.all(lj.crop(full, 1).layers[0].position == MOST)
    assert np.all(lj.positions(lj.reset(full), 1) == 0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_row_that_cannot_count_on_stops_alone(spec):
    """A padded chunk may lie past the last position; only real tokens count."""
    key, value = tokens(5, B, 3)
    state = near(spec, 2, ragged=True)
    layer = state.layers[0]
    state = state.with_layers(
        [
            layer.replace(
                **{n: layer.start - jnp.array([0, 100]) for n in ("start", "position", "reach")}
            )
        ]
    )
    some = lj.update(state, key, value, 0, lengths=[2, 3])
    assert some.layers[0].position.tolist() == [MOST, MOST - 99]
    if spec.codec.unit == 1:
        np.testing.assert_array_equal(stored(some, row=0)[0], key[0][:, :2])
        np.testing.assert_array_equal(stored(some, row=1)[0], key[1])
    with pytest.raises(ValueError, match="3 new tokens would pass"):
        lj.update(state, key, value, 0)
    after = jax.jit(lambda s: lj.update(s, key, value, 0))(state)
    assert lj.overflowed(after).tolist() == [True, False]
    assert after.layers[0].position.tolist() == [MOST - 2, MOST - 99]


def test_the_stateful_cache_counts_on_as_far():
    """It keeps lengths on the host; positions near the end it asks for."""
    key, value = tokens(1, 1, 2, value_dim=4)
    cache = lj.nn.StaticKVCache(4, 1)
    cache.update(key, value, 0)
    layer = cache._layers["0"].layer
    place = jnp.full_like(layer.position, MOST - 3)
    cache._layers["0"].keep(layer.replace(start=place, position=place + 2, reach=place + 2))
    cache.update(key[:, :, :1], value[:, :, :1], 0)
    with pytest.raises(ValueError, match="int32 can count"):
        cache.update(key[:, :, :1], value[:, :, :1], 0)
