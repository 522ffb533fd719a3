"""`keep_path`: what a tree of tokens leaves behind is what the path alone would have."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from tests.helpers import assert_same, make, poison, queries, snapshot, tokens

SPECS = {
    "static": lj.Static(12),
    "dynamic": lj.Dynamic(),
    "int4": lj.Static(12, lj.codecs.Int4(group=4)),
    "tracked": lj.Static(12, track=True),
}
N, PATHS, COUNTS = [5, 5, 0], [[0, 2, 4], [1, 3, 9], [0, 0, 0]], [3, 2, 0]


def _grown(spec):
    """Three rows with 4 tokens and a tree of 5 (the last row: none), and the same with paths only."""
    first, tree = tokens(0, 3, 4), tokens(1, 3, 5)
    state = lj.update(make(spec, batch=3, ragged=True), *first, 0)
    index = np.minimum(np.array(PATHS), 4)[:, None, :, None]
    path = [np.take_along_axis(x, index, axis=2) for x in tree]
    return (
        lj.update(state, *tree, 0, lengths=N),
        lj.update(state, *path, 0, lengths=COUNTS),
    )


_EVERYDAY = [("int4", "jitted")]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(*one, marks=() if one in _EVERYDAY else pytest.mark.exhaustive)
        for one in itertools.product(SPECS, ("eager", "donated", "jitted"))
    ],
)
def test_only_the_path_was_ever_there(name, mode):
    """Contents, positions and all that follows are those of a cache fed the path alone."""
    full, expected = _grown(SPECS[name])
    before = snapshot(full)
    if mode == "jitted":
        kept = jax.jit(lj.keep_path)(full, jnp.array(N), jnp.array(PATHS), jnp.array(COUNTS))
    else:
        kept = lj.keep_path(full, N, PATHS, COUNTS, donate=mode == "donated")
    if mode == "eager":
        assert all(np.array_equal(a, b) for a, b in zip(before[0], snapshot(full)[0], strict=True))
    assert_same(kept, expected)
    np.testing.assert_array_equal(lj.stored_positions(kept), lj.stored_positions(expected))
    kept = poison(kept)
    new, query = tokens(2, 3, 2), queries(3, 3, 2)
    for state in (kept, lj.rollback(kept, [2, 1, 0])):
        np.testing.assert_array_equal(
            lj.attend(lj.update(state, *new, 0), query, 0),
            lj.attend(
                lj.update(expected if state is kept else lj.rollback(expected, [2, 1, 0]), *new, 0),
                query,
                0,
            ),
        )


def test_a_path_at_the_end_of_the_buffer():
    """The tree fills the last slots, and the path's padding would reach past them."""
    state = lj.update(make(lj.Static(8), batch=1, ragged=True), *tokens(0, 1, 6), 0)
    kept = lj.keep_path(lj.update(state, *tokens(1, 1, 2), 0), [2], [[1, 0, 0, 0]], [1])
    expected = lj.update(state, *(x[:, :, 1:] for x in tokens(1, 1, 2)), 0)
    assert_same(kept, expected)


@pytest.mark.parametrize(
    ("n", "path", "counts"),
    [
        ([10], [[0]], [1]),
        ([2], [[1, 0]], [2]),
        ([2], [[2]], [1]),
        ([2], [[0]], [2]),
        ([-1], [[0]], [0]),
    ],
)
def test_what_is_no_path(n, path, counts):
    """Eager: refused, nothing changed. Traced: the row stays as it was and says so."""
    state = lj.update(make(lj.Static(8), batch=1, ragged=True), *tokens(0, 1, 6), 0)
    with pytest.raises(ValueError, match="ascending nodes"):
        lj.keep_path(state, n, path, counts)
    refused = jax.jit(lj.keep_path)(state, *(jnp.array(x) for x in (n, path, counts)))
    assert lj.overflowed(refused).tolist() == [True]
    assert lj.seq_length(refused).tolist() == [6]
    for a, b in zip(lj.get(state, 0), lj.get(refused, 0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_refusals_by_layout():
    """Rings, groups, aligned caches and wrong shapes."""
    for spec in (lj.Sliding(4, slack=3), lj.Static(8, lj.codecs.KIVI(group=4, residual=2))):
        with pytest.raises(ValueError, match="stores each token by itself"):
            lj.keep_path(make(spec, batch=1, ragged=True), [0], [[0]], [0])
    with pytest.raises(ValueError, match="ragged"):
        lj.keep_path(make(batch=1), [0], [[0]], [0])
    with pytest.raises(ValueError, match="path"):
        lj.keep_path(make(batch=2, ragged=True), [0, 0], [[0]], [0, 0])


def test_the_mask_of_a_tree():
    """Before the tree everything, within it ancestors, after it nothing."""
    sees = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    mask = lj.tree_mask(sees, jnp.array([0, 2]), 6)
    assert mask.shape == (2, 1, 3, 6)
    assert mask[0, 0].astype(int).tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0],
                                               [1, 0, 1, 0, 0, 0]]  # fmt: skip
    assert mask[1, 0].astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0],
                                               [1, 1, 1, 0, 1, 0]]  # fmt: skip
