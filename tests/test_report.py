"""Memory reports and plans against bytes counted by hand; pictures against the slots they show."""

import dataclasses
import io
import re
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lucid_jax as lj
from lucid_jax.models import ModelConfig
from lucid_jax.tools.planning import plan
from lucid_jax.tools.plots import plot_occupancy
from lucid_jax.tools.report import memory_report

from .helpers import filled, make, tokens

KIVI = lj.codecs.KIVI(group=4, residual=2)
COUNTERS = 13  # start, position and reach int32, overflowed bool
# Bytes of one token in one head, float32, D=4 and Dv=3: key and value, each with its scales.
FLOAT32, INT8, INT4 = 4 * 4 + 4 * 3, (4 + 4) + (3 + 4), (2 + 4) + (2 + 4)
PACKED, GROUP, RECENT = 2 + 6, 4 * (2 + 2), 8  # KIVI: per token, per group; slots of the residual


@dataclasses.dataclass(frozen=True)
class Noted(lj.codecs.Identity):
    """A codec whose name is full of markup."""

    note: str = "<b>&[bold]"


# Seven tokens in each of 2 rows x 2 heads: reserved and used bytes of one row and head. Slots come in
# eights.
@pytest.mark.parametrize(
    ("spec", "reserved", "used"),
    [
        (lj.Static(8), 8 * FLOAT32, 7 * FLOAT32),
        (lj.Static(8, codec=lj.codecs.Int8()), 8 * INT8, 7 * INT8),
        (lj.Static(8, codec=lj.codecs.Float8()), 8 * INT8, 7 * INT8),
        (lj.Static(8, codec=lj.codecs.Int4()), 8 * INT4, 7 * INT4),
        # Four of the seven are quantized; the residual holds copies of them, which nobody reads.
        (
            lj.Static(8, codec=KIVI),
            16 * PACKED + 4 * GROUP + RECENT * FLOAT32,
            4 * PACKED + GROUP + 3 * FLOAT32,
        ),
        (lj.Static(8, track=True), 8 * (FLOAT32 + 4) + 1, 7 * (FLOAT32 + 4)),  # floor: 4 bytes
        (lj.Dynamic(codec=lj.codecs.Int8()), 64 * INT8, 7 * INT8),
        # Positions 0, 1 and 3 ... 6; position 2 is still there, in the slack.
        (lj.Sliding(4, sinks=2, slack=1), 8 * FLOAT32, 6 * FLOAT32),
        (lj.Sliding(4, codec=lj.codecs.Int4()), 8 * INT4, 4 * INT4),
        (
            lj.Sliding(8, sinks=3, slack=1, codec=KIVI),
            16 * PACKED + 4 * GROUP + RECENT * FLOAT32,
            4 * PACKED + GROUP + 3 * FLOAT32,
        ),
    ],
    ids=str,
)
def test_bytes_counted_by_hand(spec, reserved, used):
    state, _, _ = filled(7, spec)
    (row,) = memory_report(state).rows
    assert (row.reserved, row.used) == (4 * reserved + COUNTERS, 4 * used)
    assert row.reserved == lj.nbytes(state)
    assert row.float16 == 4 * 2 * (4 + 3) * row.length
    assert row.ratio == row.float16 / row.used
    # Back to position 5, where KIVI has everything in its residual; then the latest three.
    if not isinstance(spec, lj.Sliding) or spec.codec == KIVI:
        (less,) = memory_report(lj.crop(lj.rollback(state, 2), 3)).rows
        each = FLOAT32 if spec.codec == KIVI else row.used // 4 // row.length
        assert (less.length, less.used, less.reserved) == (3, 4 * 3 * each, row.reserved)


@pytest.mark.parametrize(
    ("codec", "least", "exact"),
    [(lj.codecs.Int8(), 1.88, 512 / 264), (lj.codecs.Int4(), 3.5, 512 / 144)],
)
@pytest.mark.parametrize("layout", [lj.Static(64), lj.Sliding(60, sinks=4)], ids=str)
def test_quantized_caches_are_as_small_as_promised(codec, least, exact, layout):
    spec = dataclasses.replace(layout, codec=codec)
    state = make(spec, batch=1, dim=128, value_dim=128, dtype=jnp.bfloat16)
    new = jnp.ones((1, 2, 64, 128), jnp.bfloat16)
    report = memory_report(lj.update(state, new, new, 0))
    assert report.ratio == exact >= least
    assert report.float16 / report.reserved >= least


def test_rows_count_by_their_own_length():
    key, value = tokens(0, 2, 6)
    state = lj.update(make(lj.Static(8), ragged=True), key, value, 0, lengths=np.array([6, 1]))
    (row,) = memory_report(state).rows
    assert (row.length, row.used, row.float16) == (6, 2 * 7 * FLOAT32, 2 * 7 * 2 * 7)
    assert row.reserved == 4 * 8 * FLOAT32 + 2 * COUNTERS
    assert "1 to 6" in state._repr_html_()


def test_a_scale_counts_whole_while_one_of_its_group_is_read():
    state = lj.crop(filled(7, lj.Static(8, codec=KIVI))[0], 4)  # position 3, and 4 ... 6 in full
    (row,) = memory_report(state).rows
    assert row.used == 4 * (PACKED + GROUP + 3 * FLOAT32)


def test_an_empty_cache_has_no_ratio():
    report = memory_report(make(lj.Static(8, codec=KIVI), layers=2))
    assert (report.used, report.float16, report.ratio) == (0, 0, None)


def test_a_sliding_cache_stays_as_large_as_it_is():
    state = make(lj.Sliding(14, sinks=2, codec=lj.codecs.Int8()), batch=1)
    key, value = tokens(0, 1, 1)
    seen = set()
    for step in range(100):
        state = lj.update(state, key, value, 0, donate=True)
        (row,) = memory_report(state).rows
        assert row.used == 2 * INT8 * min(step + 1, 16) <= row.reserved
        seen.add(row.reserved)
    assert seen == {2 * 16 * INT8 + COUNTERS}


def several():
    """Layers of three kinds, one shared; a name full of markup."""
    specs = [lj.Static(8, codec=Noted("<i>")), lj.Shared(0), lj.Sliding(4, sinks=2), lj.Shared(0)]
    return filled(5, specs)[0]


def test_shared_layers_are_counted_once_and_named():
    state = several()
    report = memory_report(state)
    assert [(row.layer_idx, row.shared_by) for row in report.rows] == [(0, (1, 3)), (2, ())]
    assert report.reserved == lj.nbytes(state) == 4 * (8 + 8) * FLOAT32 + 2 * COUNTERS
    assert report.used == sum(row.used for row in report.rows) == 4 * 5 * FLOAT32


@pytest.mark.parametrize("reported", [memory_report, lambda _: small_plan(budget=10_000)])
def test_reports_print_everywhere(reported):
    report = reported(several())
    out = io.StringIO()
    Console(file=out, width=120).print(report)
    for text in (str(report), out.getvalue()):
        assert "Sliding(window=4, sinks=2)" in text and "total" in text
        assert all(len(line) <= 120 for line in text.splitlines())
    assert "\x1b" not in str(report)
    assert len(ElementTree.fromstring(f"<p>{report._repr_html_()}</p>").findall(".//tr")) == 4


def test_a_name_is_never_markup():
    state = make([lj.Static(8, codec=Noted(note)) for note in ("<b>", "[bold]")])
    assert "Noted(note='[bold]')" in str(memory_report(state))
    for html in (state._repr_html_(), memory_report(state)._repr_html_()):
        assert "&lt;b&gt;" in html and "<b>" not in html


def test_html_of_a_state_has_every_layer():
    state = several()
    rows = ElementTree.fromstring(state._repr_html_()).findall("./tbody/tr")
    cells = [[cell.text or "" for cell in row] for row in rows]
    assert [row[0] for row in cells] == ["0", "1", "2", "3"]
    assert [row[1] for row in cells[1::2]] == ["reads layer 0"] * 2
    assert cells[2][1:6] == ["Sliding(window=4, sinks=2)", "Identity", "0", "6", "2 x 4 / 3"]
    lj.reset(state, donate=True)
    assert ">donated<" in state._repr_html_()
    assert ">shapes only<" in jax.eval_shape(make)._repr_html_()
    seen = []
    jax.jit(lambda traced: seen.append(traced._repr_html_()))(make())
    assert ">traced<" in seen[0]


def test_a_repr_has_one_line_for_layers_that_are_alike():
    whole = repr(
        lj.init_cache(lj.Static(8), num_layers=32, batch_size=1, num_kv_heads=1, head_dim=4)
    )
    assert whole.startswith("CacheState(32 x Contiguous(Static(capacity=8") and len(whole) < 160
    assert "length=0)" in whole
    mixed = [*[lj.Sliding(4)] * 5, lj.Static(8), *[lj.Sliding(4)] * 2, lj.Shared(5), lj.Shared(5)]
    lines = repr(lj.update(make(mixed), *tokens(0, 2, 3), 1)).splitlines()
    assert [re.split(" [CR]", line)[0].strip() for line in lines[1:4]] == [
        "0, 2-4, 6-7: 6 x", "1:", "5:",
    ]  # fmt: skip
    assert "length=3)" in lines[2] and lines[4:] == ["    8-9: reads layer 5,", ")"]


def texts(state):
    return repr(state), state._repr_html_()


@pytest.mark.parametrize("spec", [lj.Static(8, codec=KIVI), lj.Dynamic(), lj.Sliding(4)], ids=str)
def test_a_state_shows_itself_whatever_its_leaves_are(spec):
    state, *_ = filled(3, spec, ragged=True)
    row = lj.update(state, *tokens(1, 2, 2), 0, lengths=[2, 0])
    assert all("3 to 5" in text for text in texts(row) if spec != lj.Sliding(4))
    seen = []

    def look(state):
        seen.extend(texts(state))
        return state

    jax.jit(look)(state)
    jax.lax.scan(lambda s, _: (look(s), None), state, length=2)
    jax.vmap(look)(jax.tree.map(lambda x: jnp.stack([x, x]), state))
    assert seen and all("traced" in text for text in seen)
    assert all("shapes only" in text for text in texts(jax.eval_shape(lambda: state)))
    for leaf in (jax.sharding.PartitionSpec("x"), 3, np.float32(1), "text"):
        other = jax.tree.map(lambda _, leaf=leaf: leaf, state)
        assert all(f"leaves of {type(leaf).__name__}, D=4" in text for text in texts(other))
    assert all("leaves of nothing" in x for x in texts(jax.tree.map(lambda _: None, state)))
    mesh = jax.sharding.Mesh(jax.devices(), "x")
    placed = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert all("3" in text for text in texts(placed))
    assert all("3" in text for text in texts(jax.tree.map(np.asarray, state)))
    inside = []
    jax.jit(lambda x: inside.extend(texts(state)) or x)(1.0)
    assert inside == [*texts(state)]
    lj.update(state, *tokens(1, 2, 1), 0, donate=True)
    assert all("donated" in text for text in texts(state))


@pytest.mark.parametrize("reader", [memory_report, plot_occupancy])
def test_a_state_that_cannot_be_read_is_refused(reader):
    with pytest.raises(TypeError, match=f"{reader.__name__} needs a concrete .* outside jit"):
        jax.jit(reader)(make())
    state = make()
    lj.reset(state, donate=True)
    with pytest.raises(RuntimeError, match="donated"):
        reader(state)


# --- plan ------------------------------------------------------------------------------------------

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=3)
PLANNED = [
    lj.Static(100),
    lj.Static(100, codec=KIVI),
    lj.Dynamic(codec=lj.codecs.Int8()),
    lj.Dynamic(codec=lj.codecs.KIVI(group=12, residual=8)),
    lj.Sliding(16, sinks=4, codec=lj.codecs.Int4()),
    [lj.Sliding(16), lj.Static(100, track=True), lj.Shared(1)],
]


MIXED = [lj.Sliding(4, sinks=2), lj.Static(8), lj.Shared(1)]


def small_plan(spec=MIXED, batch=2, **options):
    return plan(CONFIG, batch, 8, spec, **options)


def allocated(spec, batch, length, **options):
    """Bytes of a cache that really exists and has room for `length` tokens."""
    state = lj.init_cache(
        spec, num_layers=3, batch_size=batch, num_kv_heads=4, head_dim=8, **options
    )
    return lj.nbytes(lj.grow(state, length) if isinstance(spec, lj.Dynamic) else state)


def with_capacity(spec, length):
    if isinstance(spec, list):
        return [with_capacity(one, length) for one in spec]
    return dataclasses.replace(spec, capacity=length) if isinstance(spec, lj.Static) else spec


@pytest.mark.parametrize("spec", PLANNED, ids=str)
def test_a_plan_is_what_is_then_allocated(spec):
    options = {"dtype": jnp.bfloat16, "ragged": True}
    budget = 60_000
    planned = plan(CONFIG, 2, 70, spec, budget, **options)
    assert planned.nbytes == allocated(spec, 2, 70, **options)
    assert planned.fits == (planned.nbytes <= budget)
    most = planned.max_batch_size
    assert most > 0 and allocated(spec, most, 70, **options) <= budget
    assert allocated(spec, most + 1, 70, **options) > budget
    if isinstance(spec, lj.Sliding):
        assert planned.max_length is None and planned.bytes_per_token is None
        return
    longest = planned.max_length
    assert longest > 0
    assert allocated(with_capacity(spec, longest), 2, longest, **options) <= budget
    assert allocated(with_capacity(spec, longest + 1), 2, longest + 1, **options) > budget


def test_a_plan_allocates_nothing():
    planned = plan(CONFIG, 2**12, 2**20, lj.Static(2**20))
    assert planned.bytes_per_token == 3 * 4 * (8 + 8) * 4
    assert planned.nbytes == 2**32 * planned.bytes_per_token + 3 * COUNTERS
    assert (planned.fits, planned.max_batch_size, planned.max_length) == (None, None, None)


def test_where_nothing_fits_the_largest_is_zero():
    planned = small_plan(lj.Sliding(4), budget=100)
    assert (planned.fits, planned.max_batch_size, planned.max_length) == (False, 0, 0)
    spec = lj.Static(16)
    exact = small_plan(spec).nbytes
    assert small_plan(spec, budget=exact).fits
    assert small_plan(spec, budget=exact).max_batch_size == 2
    less = small_plan(spec, budget=exact - 1)
    assert not less.fits and less.max_length == 8  # slots come in eights
    assert "1 B too much" in str(less)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spec": lj.Static(7)}, ValueError, r"length of 8 .* capacity is 7; use Static\(8\)"),
        ({"spec": [lj.Static(8)]}, ValueError, "one per layer"),
        ({"budget": "8 GB"}, TypeError, r"budget \(bytes, .*8 GB"),
        ({"batch": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_a_plan_that_cannot_be_says_why(arguments, error, message):
    with pytest.raises(error, match=message):
        small_plan(**arguments)


# --- pictures --------------------------------------------------------------------------------------


def shown(figure):
    """What each band shows, -1 for a dead slot; drawn once, so that drawing is tested too."""
    figure.savefig(io.BytesIO())
    return [axes.images[0].get_array().filled(-1).tolist() for axes in figure.axes[:-1]]


def test_bands_show_where_tokens_are():
    key, value = tokens(0, 2, 9)
    specs = [lj.Sliding(4, 2, slack=1), lj.Shared(0), lj.Static(12, codec=KIVI)]
    state = lj.update(make(specs), key, value, 0)
    state = lj.update(state, key[:, :, :7], value[:, :, :7], 2)
    ring, slots, recent = shown(figure := plot_occupancy(state))
    assert ring == [[0, 1, 7, 8, 4, 5, 6]]
    assert slots == [[0, 1, 2, 3, *[-1] * 12]]
    assert recent == [[0, 1, 2, 3, 4, 5, 6, -1]]
    titles = [axes.get_title(loc="left") for axes in figure.axes[:-1]]
    assert titles[0] == "layer 0: Sliding(window=4, sinks=2, slack=1), Identity, length 6 / 6"
    assert "layer 2: Static(capacity=12), KIVI(group=4, residual=2), length 7 / 12" in titles[1]
    assert list(figure.axes[0].lines[0].get_xdata()) == [1.5, 1.5]
    assert not figure.axes[1].lines
    # Position 8 is rolled back; of 7, 6, 5 and what came before, the latest three stay.
    less = lj.crop(lj.rollback(state, 1), 3)
    assert shown(plot_occupancy(less, layer_idx=1)) == [[[-1, -1, 7, -1, -1, 5, 6]]]


def test_rows_and_heads_are_told_apart():
    key, value = tokens(0, 2, 3)
    state = lj.update(make(lj.Static(4), ragged=True), key, value, 0, lengths=np.array([3, 1]))
    assert shown(plot_occupancy(state, 0, row=1)) == [[[0, -1, -1, -1]]]
    heads = plot_occupancy(filled(3, lj.Static(4, track=True))[0])
    assert shown(heads) == [[[0, 1, 2, -1]] * 2]
    with pytest.raises(ValueError, match=r"row must be in \[0, 2\), got 2"):
        plot_occupancy(state, row=2)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lucid-jax\[plots\]'"):
        plot_occupancy(make())
