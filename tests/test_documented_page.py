"""The code blocks of the documented page run verbatim, and print what its comments say."""

import sys
import textwrap

import pytest

import lucid_jax
import lucid_jax.nn

QUICK_START = textwrap.dedent(
    """
    import lucid
    import lucid.nn as nn

    cache = nn.DynamicKVCache()

    # key/value shape example: (batch, heads, seq_len, head_dim)
    key = lucid.randn(2, 8, 1, 64)
    value = lucid.randn(2, 8, 1, 64)

    # append into layer 0
    k_all, v_all = cache.update(key, value, layer_idx=0)
    print(k_all.shape, v_all.shape)  # (2, 8, 1, 64), (2, 8, 1, 64)

    # next token append
    key2 = lucid.randn(2, 8, 1, 64)
    value2 = lucid.randn(2, 8, 1, 64)
    k_all, v_all = cache.update(key2, value2, layer_idx=0)
    print(cache.get_seq_length(0))   # 2
    """
)
BEAM_SEARCH = textwrap.dedent(
    """
    import lucid.nn as nn
    import lucid

    cache = nn.DynamicKVCache()
    # ... prefill/update cache first ...

    num_beams = 4
    cache.batch_repeat_interleave(num_beams)   # B -> B*num_beams

    # after beam pruning
    beam_idx = lucid.Tensor([3, 1, 0, 2], dtype=lucid.Int32)
    cache.reorder_cache(beam_idx)
    """
)
MEMORY_CONTROL = textwrap.dedent(
    """
    # keep only most recent 1024 tokens
    cache.crop(1024)

    # clear everything between requests
    cache.reset()
    """
)
PREFILL_HERE = "# ... prefill/update cache first ..."


@pytest.fixture(autouse=True)
def lucid_is_this_package(monkeypatch):
    """`import lucid` finds `lucid_jax`."""
    monkeypatch.setitem(sys.modules, "lucid", lucid_jax)
    monkeypatch.setitem(sys.modules, "lucid.nn", lucid_jax.nn)


def _run(code, names=None):
    names = {} if names is None else names
    exec(compile(code, "<documented page>", "exec"), names)
    return names


def test_quick_start_prints_what_its_comments_say(capsys):
    """Two appends: the shapes after the first, the length after the second."""
    names = _run(QUICK_START)
    assert capsys.readouterr().out == "(2, 8, 1, 64) (2, 8, 1, 64)\n2\n"
    assert names["k_all"].shape == names["v_all"].shape == (2, 8, 2, 64)
    assert (names["k_all"][:, :, :1] == names["key"]).all()
    assert (names["v_all"][:, :, 1:] == names["value2"]).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_beam_search_snippet_after_a_prefill(batch):
    """One prompt becomes four beams, which are then reordered; of two prompts the first four."""
    prefill = f"k, v = lucid.randn({batch}, 2, 5, 4), lucid.randn({batch}, 2, 5, 4)\n" + (
        "for layer in range(2): cache.update(k, v, layer)"
    )
    names = _run(BEAM_SEARCH.replace(PREFILL_HERE, prefill))
    cache, key, value = names["cache"], names["k"], names["v"]
    for layer in range(2):
        keys, values = cache.get(layer)
        assert keys.shape == values.shape == (4, 2, 5, 4)
        for beam in range(4):  # beams 0 to 3 all came from the first prompt
            assert (keys[beam] == key[0]).all()
            assert (values[beam] == value[0]).all()


def test_memory_control_snippet_after_a_prefill():
    """1024 of 1030 tokens survive the crop, then none the reset."""
    names = _run("import lucid, lucid.nn as nn\ncache = nn.DynamicKVCache()")
    key = lucid_jax.randn(1, 1, 1030, 2)
    names["cache"].update(key, key, 0)
    crop, reset = MEMORY_CONTROL.split("\n\n")
    _run(crop, names)
    assert names["cache"].get_seq_length() == 1024
    assert (names["cache"].get(0)[0] == key[:, :, 6:]).all()
    _run(reset, names)
    assert names["cache"].get_seq_length() == 0
    assert names["cache"].get(0) is None


def test_the_snippets_run_one_after_the_other_even_on_an_empty_cache(capsys):
    """As pasted from the page, with nothing prefilled; the chain ends in a fresh cache."""
    names = _run(BEAM_SEARCH, _run(QUICK_START))
    cache = _run(MEMORY_CONTROL, names)["cache"]
    assert cache.get(0) is None
    key = lucid_jax.randn(3, 2, 1, 4)
    assert cache.update(key, key, 0)[0].shape == (3, 2, 1, 4)


def test_memory_control_follows_the_quick_start(capsys):
    """Fewer tokens than the crop keeps: nothing is dropped before the reset."""
    names = _run(QUICK_START)
    _run(MEMORY_CONTROL.split("\n\n")[0], names)
    assert names["cache"].get_seq_length(0) == 2
    _run(MEMORY_CONTROL, names)
    assert names["cache"].get(0) is None
