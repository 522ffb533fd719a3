"""What the compiled programs cost, in counts and bytes, never in seconds."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.cache.codecs import default_codec
from tests.helpers import USERS_XLA, make

B, HEADS, DIM = 1, 2, 16
CAPACITIES = (4096, 65536)
KILOBYTE = 1024


def _state(capacity, ragged=False, **options):
    sizes = {"batch": B, "heads": HEADS, "dim": DIM, "value_dim": DIM}
    codec = options.pop("codec", lj.codecs.Identity())
    return make(lj.Static(capacity, codec), ragged=ragged, **{**sizes, **options})


def _new(count=1, batch=B, dtype=jnp.float32):
    return jnp.ones((batch, HEADS, count, DIM), dtype)


def _temporaries(run, state, *args):
    """Bytes of scratch memory of `run` compiled with the state donated."""
    compiled = jax.jit(run, donate_argnums=0).lower(state, *args).compile(USERS_XLA)
    return compiled.memory_analysis().temp_size_in_bytes


def append(state, batch=B):
    new = _new(batch=batch)
    return lj.update(state, new, new, 0)


def append_chunk(state, batch=B):
    new = _new(7, batch)
    return lj.update(state, new, new, 0)


def append_padded(state, batch=B):
    lengths = jnp.full(state.batch_size, 2) if state.ragged else None
    new = _new(3, batch)
    return lj.update(state, new, new, 0, lengths=lengths)


def place(state):
    return lj.update(state, _new(2), _new(2), 0, lj.seq_length(state).max() + jnp.arange(3, 5))


def append_and_attend(state):
    state = append(state)
    return state, lj.attend(state, _new(), 0)


def append_and_attend_a_window(state):
    state = append(state)
    return state, lj.attend(state, _new(), 0, window=512, softcap=5.0)


def prefill(state):
    state = lj.update(state, _new(16), _new(16), 0)
    return state, lj.attend(state, _new(16), 0)


def crop(state):
    return lj.crop(state, 5)


def rollback(state):
    return lj.rollback(state, 5)


def select(state):
    return lj.select(state, jnp.zeros(state.batch_size, jnp.int32))


def decode_loop(state):
    def step(carry):
        state, out = carry
        state = lj.update(state, out, out, 0)
        return state, lj.attend(state, out, 0)

    return jax.lax.while_loop(lambda c: jnp.all(lj.seq_length(c[0]) < 40), step, (state, _new()))


def decode_loop_with_rollback(state):
    def step(carry):
        state, out = carry
        state = lj.rollback(lj.update(state, _new(4), _new(4), 0), 3)
        return state, lj.attend(state, out, 0)

    return jax.lax.while_loop(lambda c: jnp.all(lj.seq_length(c[0]) < 40), step, (state, _new()))


def decode_loop_by_place(state):
    def step(state, _):
        return lj.update(state, _new(), _new(), 0, lj.seq_length(state).max()), None

    return jax.lax.scan(step, state, length=9)[0]


def beam_loop(state):
    def step(state, rows):
        return lj.select(append(state), rows), None

    return jax.lax.scan(step, state, jnp.zeros((4, state.batch_size), jnp.int32))[0]


PROGRAMS = [append, append_chunk, append_padded, place, append_and_attend,
            append_and_attend_a_window, prefill, crop, rollback, select, decode_loop,
            decode_loop_with_rollback, decode_loop_by_place, beam_loop]  # fmt: skip


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_temporaries_do_not_grow_with_the_capacity(program, ragged):
    """Scratch memory at 65536 slots is what it is at 4096: far below one buffer."""
    small, large = (_temporaries(program, _state(c, ragged)) for c in CAPACITIES)
    assert large <= small + KILOBYTE
    # Of a prefill there are the scores of a block, for the walk and for the one that looks for NaN.
    assert large < lj.nbytes(_state(CAPACITIES[0])) / 2


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 2), (2, 1), (2, 2)])
def test_a_short_cache_is_not_copied(batch, heads, ragged):
    """One that a single block holds: a decode loop copied its keys four times a step."""
    state = make(lj.Static(256), ragged=ragged, batch=batch, heads=heads, dim=DIM, value_dim=DIM)

    def step(carry, _):
        state, token = carry
        rows = jnp.full(batch, 1) if ragged else None
        key = token @ jnp.ones((DIM, DIM))
        out, state = lj.extend(state, token, key, token, 0, lengths=rows)
        return (state, out), None

    def loop(state, token):
        return jax.lax.scan(step, (state, token), length=9)[0]

    token = jnp.ones((batch, heads, 1, DIM))
    text = jax.jit(loop, donate_argnums=0).lower(state, token).compile(USERS_XLA).as_text()
    leaf = f"f32[{batch},{heads},256,{DIM}]"
    assert leaf in text
    assert not [line for line in text.splitlines() if leaf in line and " copy(" in line]


@pytest.mark.parametrize("program", [append, append_and_attend, decode_loop],
                         ids=lambda p: p.__name__)  # fmt: skip
def test_narrow_dtypes_need_no_widened_copy_of_the_buffer(program):
    """bfloat16 is stored and read without converting the whole of it; on CPU, as bits."""

    def run(state):
        narrow = jnp.ones((B, HEADS, 1, DIM), jnp.bfloat16)
        if program is append:
            return lj.update(state, narrow, narrow, 0)

        def step(carry):
            state, out = carry
            state = lj.update(state, out, out, 0)
            return state, lj.attend(state, out, 0)

        if program is append_and_attend:
            return step((state, narrow))
        return jax.lax.while_loop(lambda c: lj.seq_length(c[0]) < 40, step, (state, narrow))

    codec = default_codec(jnp.bfloat16)
    small, large = (
        _temporaries(run, _state(c, dtype=jnp.bfloat16, codec=codec)) for c in CAPACITIES
    )
    assert large <= small + KILOBYTE


def test_a_state_of_many_layers_is_updated_without_copying_any():
    """Each layer's buffer is its own leaf, so a whole model's step needs no whole buffer."""

    def step(state):
        outs = []
        for i in range(state.num_layers):
            state = lj.update(state, _new(), _new(), i)
            outs.append(lj.attend(state, _new(), i))
        return state, outs

    small, large = (_temporaries(step, _state(c, layers=4)) for c in CAPACITIES)
    assert large <= small + KILOBYTE


def test_a_donated_program_aliases_every_buffer():
    """Input and output of a donated step share all their memory."""
    state = _state(4096)
    compiled = jax.jit(append, donate_argnums=0).lower(state).compile(USERS_XLA)
    buffers = sum(leaf.nbytes for leaf in (state.layers[0].key, state.layers[0].value))
    assert compiled.memory_analysis().alias_size_in_bytes >= buffers


def test_one_program_serves_every_step(compilations):
    """A host loop of a donated step compiles once, however many tokens there are."""
    step = jax.jit(append_and_attend, donate_argnums=0)
    state, _ = step(_state(64))
    before = compilations()
    for _ in range(40):
        state, _ = step(state)
    assert compilations() == before and lj.seq_length(state) == 41


def test_one_program_serves_every_place_count_and_row(compilations):
    """Positions, lengths, rollback counts, crops and rows are data, not shapes: eager too."""
    state = _state(64, ragged=True, batch=2)
    new = _new(3, batch=2)

    def round_of(state, i):
        state = lj.update(state, new, new, 0, lengths=[i % 4, 3], donate=True)
        state = lj.update(state, new, new, 0, [i, i + 1, i + 2], donate=True)
        state = lj.rollback(state, [i % 2, 1], donate=True)
        state = lj.crop(state, 20 - i, donate=True)
        return lj.select(state, [i % 2, 1], donate=True)

    state = round_of(state, 0)
    before = compilations()
    for i in range(1, 9):
        state = round_of(state, i)
    assert compilations() == before


def test_a_growing_cache_compiles_a_program_per_doubling(compilations):
    """300 eager appends see the capacities 64, 128, 256, 512, and compile for these alone."""
    state = make(lj.Dynamic(), batch=1)
    key, value = np.ones((1, 2, 1, 4), np.float32), np.ones((1, 2, 1, 3), np.float32)
    seen, steps_that_compiled = [], 0
    for _ in range(300):
        before = compilations()
        state = lj.update(state, key, value, 0, donate=True)
        steps_that_compiled += compilations() > before
        seen.append(lj.capacity(state))
    assert sorted(set(seen)) == [64, 128, 256, 512]
    assert steps_that_compiled <= len(set(seen))


def test_ensure_capacity_makes_a_compiled_chunk_fit(compilations):
    """Room for a whole chunk of steps is made once, then no step grows or compiles."""
    state = lj.ensure_capacity(make(lj.Dynamic(), batch=1), 200)
    new = [jnp.ones((1, 2, 1, d)) for d in (4, 3)]
    step = jax.jit(lambda s: lj.update(s, *new, 0), donate_argnums=0)
    state = step(state)
    before = compilations()
    for _ in range(199):
        state = step(state)
    assert compilations() == before
    assert lj.seq_length(state) == 200 and not lj.overflowed(state)
    assert lj.ensure_capacity(state, 1) is not None and lj.capacity(state) == 256


def test_growth_and_updates_share_what_they_do_not_change():
    """Layers with room enough are the same objects after `grow`, not copies."""
    state = make([lj.Dynamic(), lj.Static(128)], batch=1)
    grown = lj.grow(state, 100)
    assert lj.capacity(grown, 0) == 128 and grown.layers[1] is state.layers[1]
    assert lj.nbytes(grown) > lj.nbytes(state)


@pytest.mark.parametrize(
    "spec", [lj.Static(64), lj.Sliding(40, 2, 6)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("program", [append, append_chunk, append_padded], ids=lambda p: p.__name__)
def test_a_ragged_append_reads_no_slots(program, spec):
    """On TPU a leaf that is read row by row gets another layout, and so is copied whole."""
    state = make(spec, batch=3, heads=HEADS, dim=DIM, value_dim=DIM, ragged=True)
    text = jax.jit(functools.partial(program, batch=3)).lower(state).as_text()
    reads = [line for line in text.splitlines() if "gather" in line or "dynamic_slice" in line]
    assert text.count('"stablehlo.scatter"') == 2  # keys and values
    assert not reads


def _outside_of_choices(jaxpr):
    """Names of the primitives that a TPU runs whatever is chosen, and however often loops turn."""
    by_platform = set()  # what says which platform's branch is taken; a TPU's is the first
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "platform_index" or not by_platform.isdisjoint(map(id, equation.invars)):
            by_platform.update(map(id, equation.outvars))
            if name == "cond":
                yield from _outside_of_choices(equation.params["branches"][0].jaxpr)
                continue
        yield name
        if name not in ("cond", "while"):
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from _outside_of_choices(inner)


@pytest.mark.parametrize("layout", [lj.Static(64), lj.Sliding(40)], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_an_append_that_completes_no_group_quantizes_and_writes_none(ragged, layout):
    """Of KIVI's appends one in a group has that to do; on TPU it was most of what each of them cost."""
    state = make(layout.but(codec=lj.codecs.KIVI(16, 8)), ragged=ragged, heads=HEADS, dim=DIM,
                 value_dim=DIM, batch=B)  # fmt: skip
    new = _new()
    ran = list(
        _outside_of_choices(jax.make_jaxpr(lambda s: lj.update(s, new, new, 0))(state).jaxpr)
    )
    assert "cond" in ran and not {*ran} & {"round", "reduce_min", "reduce_max"}
    writes = ("scatter", "dynamic_update_slice")
    assert sum(map(ran.count, writes)) == 2  # to the tail


@pytest.mark.whole
@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize(("dtype", "exact"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_float32_tokens_are_multiplied_as_such_on_a_tpu(dtype, exact, by_index):
    """By default a TPU rounds both sides of a product to bfloat16."""
    state = _state(64, dtype=dtype)
    query = _new(dtype=dtype)
    options = {"implementation": "walk", "rope_theta": 1e4 if by_index else None}

    def loss(state, query):
        return lj.attend(state, query, 0, **options).astype(jnp.float32).sum()

    for step in (loss, jax.grad(loss, argnums=1)):
        lowered = jax.jit(step).trace(state, query).lower(lowering_platforms=("tpu",))
        products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
        assert products and all(("HIGHEST" in line) == exact for line in products)
