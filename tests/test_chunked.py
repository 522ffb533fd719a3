"""Attention within blocks of positions, `Chunked`, against a dense block-diagonal mask."""

import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.attention.dense import dot_product
from lucid_jax.attention.rope import rope
from tests.helpers import make, queries, tokens

SIZE, COUNT = 5, 23


def _dense(query, key, value):
    place = np.arange(COUNT)
    mask = jnp.asarray(place[:, None] // SIZE == place[None] // SIZE)
    return dot_product(*(jnp.asarray(x) for x in (query, key, value)), mask=mask)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("splits", [(COUNT,), (1,) * COUNT, (4, 7, 1, 11)])
def test_a_query_sees_its_own_block_up_to_itself(splits, ragged):
    key, value = tokens(0, 2, COUNT)
    query = queries(0, 2, COUNT)
    state, outs, begin = make(lj.Chunked(SIZE), ragged=ragged), [], 0
    for count in splits:
        new = (x[:, :, begin : begin + count] for x in (query, key, value))
        out, state = lj.extend(state, *new, 0)
        outs.append(out)
        begin += count
    np.testing.assert_allclose(
        np.concatenate(outs, axis=2), _dense(query, key, value), rtol=1e-5, atol=1e-5
    )


def test_a_block_is_dropped_when_the_next_begins_and_comes_back_on_rollback():
    state = make(lj.Chunked(4, slack=2))
    lengths = []
    for seed in range(10):
        state = lj.update(state, *tokens(seed, 2, 1), 0)
        lengths.append(int(lj.seq_length(state)))
    assert lengths == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert lj.stored_positions(lj.rollback(state, 2)).tolist() == [4, 5, 6, 7]
    assert lj.stored_positions(state).tolist() == [8, 9, -1, -1]
    with pytest.raises(ValueError, match="is more than Chunked"):
        lj.rollback(state, 7)
    assert lj.stored_positions(lj.crop(state, 1)).tolist() == [9, -1, -1, -1]


def test_rotary_positions_count_from_the_block():
    """By index the tokens of a block stand at 0, 1, ...: only distances matter."""
    key, value = tokens(0, 2, COUNT)
    query = queries(0, 2, COUNT)
    out, _ = lj.extend(make(lj.Chunked(SIZE)), query, key, value, 0, rope_theta=100.0)
    place = jnp.arange(COUNT, dtype=jnp.int32)
    turned = (rope(jnp.asarray(x), place, lj.nn.Rope(100.0)) for x in (query, key))
    np.testing.assert_allclose(out, _dense(*turned, value), rtol=1e-4, atol=1e-5)


def test_the_command_line_and_errors_name_it():
    from lucid_jax.tools.specs import parse_spec

    assert parse_spec("chunked:64", "int8", capacity=9) == lj.Chunked(64, codec=lj.codecs.Int8())
    with pytest.raises(ValueError, match="size of Chunked must be at least 1, got 0"):
        lj.Chunked(0)
    with pytest.raises(ValueError, match="slack of Chunked must be at least 0, got -1"):
        lj.Chunked(4, slack=-1)
