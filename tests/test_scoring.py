"""Eviction scorers and the choice they lead to, against slow NumPy twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_jax.cache import scoring
from lucid_jax.cache.scoring import attention_mass, keep_best, key_diff, key_norm

B, H, T, D, G = 2, 2, 7, 4, 3
VALID = {
    "aligned": np.arange(T) < 5,
    "ragged": np.arange(T) < np.array([[3], [7]]),
    "holes": np.array([[0, 1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1, 0]], bool),
    "one row empty": np.arange(T) < np.array([[0], [1]]),
}
every_valid = pytest.mark.parametrize("valid", VALID.values(), ids=VALID.keys())


def stored(valid, bad=np.nan, seed=0):
    """Keys and values as `get` returns them, but with `bad` in the slots that hold no token."""
    rng = np.random.default_rng(seed)
    live = np.broadcast_to(valid, (B, T))[:, None, :, None]
    keys = rng.standard_normal((B, H, T, D)).astype(np.float32)
    values = rng.standard_normal((B, H, T, 3)).astype(np.float32)
    return np.where(live, keys, np.float32(bad)), np.where(live, values, np.float32(bad))


def questions(count, seed=1):
    return np.random.default_rng(seed).standard_normal((B, H * G, count, D)).astype(np.float32)


def twin(valid, score_row):
    """Scores by calling `score_row(b, h, live slots)` for each row and head, -inf elsewhere."""
    out = np.full((B, H, T), -np.inf)
    for b in range(B):
        live = np.flatnonzero(np.broadcast_to(valid, (B, T))[b])
        for h in range(H):
            out[b, h, live] = score_row(b, h, live)
    return out


def twin_mass(keys, queries, valid, asked=None, places=None, scale=D**-0.5):
    """Softmax one query at a time; `asked` is (B, Q), `places` (B, H, T)."""

    def score_row(b, h, live):
        mass = np.zeros(T)
        for head in range(h * G, (h + 1) * G):
            for q in range(queries.shape[2]):
                seen = [t for t in live if asked is None or places[b, h, t] <= asked[b, q]]
                e = np.exp([np.float64(keys[b, h, t]) @ queries[b, head, q] * scale for t in seen])
                mass[seen] += e / e.sum()
        return mass[live]

    return twin(valid, score_row)


def close(x, y):
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


SCORERS = {
    "sinks_and_recent": lambda k, v, m: scoring.sinks_and_recent(k, v, m, sinks=2),
    "key_norm": key_norm,
    "key_diff": key_diff,
    "random": lambda k, v, m: scoring.random(k, v, m, rng=jax.random.key(3)),
    "attention_mass": lambda k, v, m: attention_mass(
        k, v, m, queries=questions(4), query_positions=np.arange(3, 7),
        key_positions=np.arange(T), pool=3,
    ),
}  # fmt: skip


@every_valid
@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS.keys())
def test_every_scorer_ignores_dead_slots(scorer, valid):
    """Dead slots score -inf, live ones finite numbers that no dead NaN changes; jit and vmap agree."""
    clean, dirty = stored(valid, bad=0), stored(valid)
    scores = scorer(*dirty, valid)
    live = np.broadcast_to(np.broadcast_to(valid, (B, T))[:, None], (B, H, T))
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(np.isfinite(scores), live)
    np.testing.assert_array_equal(np.isneginf(scores), ~live)
    np.testing.assert_array_equal(scores, scorer(*clean, valid))
    close(jax.jit(scorer)(*dirty, valid), scores)
    close(jax.vmap(scorer)(*(np.stack([x, x]) for x in (*dirty, valid)))[1], scores)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in clean]
    close(scorer(*narrow, valid), scorer(*(x.astype(jnp.float32) for x in narrow), valid))


@every_valid
@pytest.mark.parametrize("sinks", [0, 1, 3, 9, 2**40])
def test_sinks_come_first_then_the_newest(valid, sinks):
    """In order of score: the oldest `sinks` live tokens, then the others from the newest back."""
    scores = np.asarray(scoring.sinks_and_recent(*stored(valid), valid, sinks=sinks))
    for b in range(B):
        live = np.flatnonzero(np.broadcast_to(valid, (B, T))[b]).tolist()
        for row in scores[b]:
            order = np.argsort(-row, kind="stable")[: len(live)].tolist()
            assert order == live[:sinks] + live[sinks:][::-1]


@every_valid
def test_key_scores(valid):
    """Both scorers that read keys alone agree with their definitions."""
    keys, values = stored(valid)

    def diff(b, h, live):
        unit = [keys[b, h, t] / np.linalg.norm(keys[b, h, t]) for t in live]
        mean = np.mean(unit, axis=0) if unit else None
        return [-(u @ mean) / np.linalg.norm(mean) for u in unit]

    norms = twin(valid, lambda b, h, live: [-np.sqrt(sum(keys[b, h, t] ** 2)) for t in live])
    close(key_norm(keys, values, valid), norms)
    close(key_diff(keys, values, valid), twin(valid, diff))


def test_extreme_keys_stay_live():
    """A zero key has no direction and a huge one no float32 norm; neither makes a NaN or -inf."""
    keys = np.zeros((1, 1, 3, 2), np.float32)
    keys[0, 0, 1:] = [[3e38, 3e38], [1, 0]]
    for scorer in (key_norm, key_diff):
        scores = scorer(keys, keys, np.ones(3, bool))
        assert np.isfinite(scores).all()
        assert keep_best(scores, 3).all()
    assert (key_diff(keys[:, :, :1], keys[:, :, :1], np.ones(1, bool)) == 0).all()


def test_random_is_uniform():
    """4000 draws have the mean and spread of [0, 1); heads and PRNG keys differ."""
    kv, valid = np.zeros((2, 2, 1000, 1), np.float32), np.ones(1000, bool)
    draw, other = (
        np.asarray(scoring.random(kv, kv, valid, rng=jax.random.key(seed))) for seed in range(2)
    )
    assert abs(draw.mean() - 0.5) < 0.025
    assert abs(draw.std() - 12**-0.5) < 0.025
    assert len(np.unique(draw)) > 3900
    assert (draw != other).any()


@every_valid
def test_attention_mass(valid):
    """Grouped heads sum to the twin's softmax; chunks of queries add up; `scale` is used."""
    (keys, values), queries = stored(valid), questions(4)
    scores = attention_mass(keys, values, valid, queries=queries)
    close(scores, twin_mass(keys, queries, valid))
    halves = [attention_mass(keys, values, valid, queries=q) for q in np.split(queries, 2, axis=2)]
    close(sum(halves), scores)
    sharp = attention_mass(keys, values, valid, queries=queries, scale=jnp.float32(2))
    close(sharp, twin_mass(keys, queries, valid, scale=2))


@every_valid
@pytest.mark.parametrize("shape", [(T,), (B, T), (B, H, T)], ids=str)
def test_attention_mass_is_causal_by_position(valid, shape):
    """A query sees its own position and before; one at -1, even of NaN, counts for nothing."""
    (keys, values), queries = stored(valid), questions(3)
    places = np.sort(np.random.default_rng(2).integers(0, 9, shape), axis=-1)
    asked = np.array([[2, 5, 8], [4, 0, 6]] if len(shape) > 1 else [2, 5, 8])
    each = np.broadcast_to(places[:, None] if len(shape) == 2 else places, (B, H, T))
    expected = twin_mass(keys, queries, valid, np.broadcast_to(asked, (B, 3)), each)
    padded = np.pad(queries, [(0, 0), (0, 0), (1, 0), (0, 0)], constant_values=np.nan)
    for q, at in ((queries, asked), (padded, np.insert(asked, 0, -1, axis=-1))):
        options = {"queries": q, "query_positions": at, "key_positions": places}
        close(attention_mass(keys, values, valid, **options), expected)


@every_valid
@pytest.mark.parametrize("pool", [1, 3, 9])
def test_pool_averages_over_live_neighbours(valid, pool):
    """Neither dead slots nor places before the first or after the last slot count as neighbours."""
    (keys, values), queries = stored(valid), questions(2)
    plain = twin_mass(keys, queries, valid)

    def around(b, h, live):
        return [np.mean([plain[b, h, s] for s in live if abs(s - t) <= pool // 2]) for t in live]

    close(attention_mass(keys, values, valid, queries=queries, pool=pool), twin(valid, around))


def twin_keep(row, n, first):
    """One row of `keep_best`, by sorting (protected, score, slot)."""
    live = [t for t in range(len(row)) if row[t] != -np.inf]
    score = np.where(np.isnan(row), -1e30, row)
    best = sorted(live, key=lambda t: (first[t], score[t], t), reverse=True)[:n]
    return [t in best for t in range(len(row))]


GRADES = st.sampled_from([-np.inf, np.nan, -1.0, -0.0, 0.0, 1.0, np.inf])  # few, so many tie


@given(st.lists(GRADES, min_size=2 * T, max_size=2 * T), st.integers(0, T + 2), st.data())
def test_keep_best(grades, n, data):
    """As the twin sorts: ties to the later, protected first, exactly min(n, live) per row and head."""
    scores = np.array(grades, np.float32).reshape(1, 2, T)
    shape = data.draw(st.sampled_from([None, (T,), (2, T), (1, 2, T), (1, 1, T)]))
    first = None if shape is None else np.random.default_rng(n).random(shape) < 0.4
    every = np.broadcast_to(False if first is None else first, scores.shape)
    kept = np.asarray(keep_best(scores, n, protect=first))
    expected = [[twin_keep(scores[0, h], n, every[0, h]) for h in range(2)]]
    np.testing.assert_array_equal(kept, expected)
    jitted = jax.jit(lambda s, p: keep_best(s, n, protect=p))(scores, first)
    np.testing.assert_array_equal(jitted, kept)


KV, OK, Q = np.zeros((B, H, T, D), np.float32), np.ones(T, bool), questions(3)
REFUSED = [
    (ValueError, "keys must be", lambda: key_norm(KV[0], KV, OK)),
    (ValueError, "values must be", lambda: key_norm(KV, KV[:, :, 1:], OK)),
    (ValueError, "valid must be", lambda: key_diff(KV, KV, OK[1:])),
    (TypeError, "valid must be boolean", lambda: key_diff(KV, KV, OK.astype(int))),
    (ValueError, "sinks must be", lambda: scoring.sinks_and_recent(KV, KV, OK, sinks=-1)),
    (ValueError, "use 3 or 5", {"pool": 4}),
    (ValueError, "pool must be at least 1", {"pool": 0}),
    (ValueError, "multiple of 2 heads", {"queries": Q[:, :5]}),
    (ValueError, "multiple of 2 heads", {"queries": Q[:, :0]}),
    (ValueError, "head_dim=4", {"queries": Q[..., :3]}),
    (ValueError, "pass key_positions=", {"query_positions": np.arange(3)}),
    (ValueError, "pass query_positions=", {"key_positions": np.arange(T)}),
    (ValueError, r"must be \(3,\) or", {"query_positions": [0], "key_positions": np.arange(T)}),
    (ValueError, "scores must be", lambda: keep_best(KV, 1)),
    (TypeError, "scores must be", lambda: keep_best(KV[0] == 0, 1)),
    (ValueError, "n must be", lambda: keep_best(KV[0], -1)),
    (TypeError, "n must be", lambda: keep_best(KV[0], 1.0)),
    (ValueError, "protect must broadcast", lambda: keep_best(KV[0], 1, protect=OK[:2])),
    (
        ValueError,
        "protect must broadcast",
        lambda: keep_best(KV[0], 1, protect=OK[:1, None, None, None]),
    ),
    (TypeError, "protect must be", lambda: keep_best(KV[0], 1, protect=KV[0])),
]


@pytest.mark.parametrize("error, message, call", REFUSED)
def test_wrong_input_is_refused(error, message, call):
    """Every error says what is wrong; a dict stands for options of `attention_mass`."""
    with pytest.raises(error, match=message):
        call() if callable(call) else attention_mass(KV, KV, OK, **({"queries": Q} | call))
