"""`init_cache(axes="BTHD")`: refusals name the caller's order; files and modules take such states."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax import nn, scoring
from tests.helpers import H, assert_same, filled, make, queries, tokens


def swap(x):
    return np.swapaxes(x, 1, 2)


@pytest.mark.parametrize("axes", ["BDTH", "bthd", None, "BTHDX"])
def test_an_order_that_is_none_is_refused(axes):
    with pytest.raises(ValueError, match=re.escape("one of ('BHTD', 'BTHD')")):
        make(axes=axes)


@pytest.mark.parametrize(("axes", "other"), [("BHTD", "BTHD"), ("BTHD", "BHTD")])
def test_tokens_in_the_other_order_are_told_about_it(axes, other):
    key, value = tokens(0, 2, 3)
    query = queries(0, 2, 3)
    state = make(axes=axes)
    names = {"H": "heads=2", "T": "seq"}
    wanted = f"(batch=2, {', '.join(names[x] for x in axes[1:3])}, head_dim=4)"
    turn = swap if axes == "BHTD" else (lambda x: x)
    for call in (
        lambda: lj.update(state, turn(key), turn(value), 0),
        lambda: lj.extend(state, swap(turn(query)), turn(key), turn(value), 0),
    ):
        with pytest.raises(ValueError, match=f'key must be {re.escape(wanted)}.*axes="{other}"'):
            call()
    with pytest.raises(ValueError, match=f'multiple of 2 heads.*axes="{other}"'):
        lj.attend(state, turn(query), 0)
    with pytest.raises(ValueError, match="check the axis order"):
        lj.update(state, key[..., :2], value, 0)
    with pytest.raises(ValueError, match="same number of tokens, got 3 and 2"):
        lj.update(state, swap(turn(key)), swap(turn(value[:, :, :2])), 0)
    names = {"B": "batch", "H": "heads", "T": "seq", "D": "head_dim"}
    with pytest.raises(ValueError, match=re.escape(", ".join(names[x] for x in axes))):
        lj.update(state, key[0], value[0], 0)


def test_states_of_two_orders_do_not_mix():
    state, other = make(ragged=True, axes="BTHD"), make(ragged=True)
    for call in (lambda: lj.insert(state, [0, 1], other), lambda: lj.concat([state, other])):
        with pytest.raises(ValueError, match=r"same order, got axes='BTHD' and 'BHTD'.*replace"):
            call()
    assert lj.insert(state, [0, 1], other.replace(axes="BTHD")).axes == "BTHD"


def test_no_tokens_come_and_go_in_the_same_order():
    state = make(axes="BTHD")
    none, query = np.zeros((2, 0, H, 4), np.float32), np.zeros((2, 0, 4, 4), np.float32)
    out, lse = lj.attend(state, query, 0, return_lse=True)
    assert out.shape == (2, 0, 4, 3) and lse.shape == (2, 0, 4)
    out, same = lj.extend(state, query, none, none[..., :3], 0)
    assert out.shape == (2, 0, 4, 3) and same is state
    assert lj.update(state, none, none[..., :3], 0) is state


def test_a_repr_and_a_file_keep_the_order(tmp_path):
    key, value = tokens(0, 2, 3)
    state = lj.update(make(axes="BTHD"), swap(key), swap(value), 0)
    assert "axes=BTHD" in repr(state) and "axes" not in repr(make())
    lj.save(tmp_path / "a", state)
    back = lj.load(tmp_path / "a")
    assert back.axes == "BTHD"
    assert_same(back, state)
    lj.save(tmp_path / "b", make())
    assert b"axes" not in (tmp_path / "b").read_bytes()
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes().replace(b"BTHD", b"BDHT"))
    with pytest.raises(lj.CacheFileError):
        lj.load(tmp_path / "a")


def test_modules_and_stateful_caches_take_either_state():
    layer = nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 8)), jnp.float32)
    states = [make(axes=axes, dim=4, value_dim=4) for axes in ("BHTD", "BTHD")]
    (out, plain), (same, swapped) = (layer(hidden, cache=s, layer_idx=0) for s in states)
    np.testing.assert_array_equal(out, same)
    assert swapped.axes == "BTHD"
    assert_same(plain, swapped.replace(axes="BHTD"))
    stored = layer.store(hidden, states[1], 0)
    assert stored.axes == "BTHD"
    cache = nn.KVCache.from_state(swapped)
    key = jnp.ones((2, 2, 1, 4))
    cache.update(key, key, 0)
    assert cache.to_state().axes == "BTHD" and int(lj.seq_length(cache.to_state())) == 3


SCORERS = {
    "sinks_and_recent": lambda *kv, **k: scoring.sinks_and_recent(*kv, sinks=1, **k),
    "key_norm": scoring.key_norm,
    "key_diff": scoring.key_diff,
    "random": lambda *kv, **k: scoring.random(*kv, rng=jax.random.key(0), **k),
}


@pytest.mark.parametrize("name", [*SCORERS, "attention_mass"])
def test_scores_are_of_heads_and_tokens_in_either_order(name):
    """As many slots as heads, where no shape tells the orders apart; `compact` takes the masks."""
    key, value = tokens(0, 2, 2)
    states = [
        lj.update(make(lj.Static(H), axes=axes), turn(key), turn(value), 0)
        for axes, turn in (("BHTD", lambda x: x), ("BTHD", swap))
    ]
    query, made = queries(0, 2, 1), []
    for state, asked in zip(states, (query, swap(query)), strict=True):
        options = {"queries": asked} if name == "attention_mass" else {}
        score = SCORERS.get(name, scoring.attention_mass)
        made.append(score(*lj.get(state, 0), axes=state.axes, **options))
    np.testing.assert_allclose(*made, rtol=1e-6)
    assert not np.array_equal(made[0][:, 0], made[0][:, 1]) or name == "sinks_and_recent"
    kept = [
        lj.compact(state, scoring.keep_best(scores, 1), 0)
        for state, scores in zip(states, made, strict=True)
    ]
    for x, y in zip(lj.get(kept[0], 0)[:2], lj.get(kept[1], 0)[:2], strict=True):
        np.testing.assert_array_equal(x, swap(y))


def test_scores_of_keys_in_the_other_order_are_refused():
    state, *_ = filled(3)
    keys, values, valid = lj.get(state.replace(axes="BTHD"), 0)
    with pytest.raises(ValueError, match=r"axes=state.axes if that is not \(B, H, C, D\)"):
        scoring.key_norm(keys, values, valid)
    with pytest.raises(ValueError, match="axes must be one of"):
        scoring.key_norm(keys, values, valid, axes="BDTH")
