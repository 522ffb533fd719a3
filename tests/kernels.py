"""What tests of attention's kernels have in common: masks, and what a kernel is held against."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import lucid_jax as lj
from lucid_jax.tools import targets


def options_of(slots, heads):
    """What `attend` may be asked for, by name, of so many slots and query heads."""
    drawn = np.random.default_rng(0)
    return {
        "plain": {},
        "window": {"window": 20},
        "softcap and sinks": {
            "softcap": 2.0, "sink_logits": np.float32([0.5, -1.0, 2.0, -np.inf]),
        },
        "mask": {"mask": drawn.random(slots) > 0.3},
        "bias by head": {"bias": drawn.standard_normal((heads, 1, slots)).astype(np.float32)},
        "not causal": {"causal": False},
    }  # fmt: skip


def cases_of(layouts, codecs, options, everyday):
    """Layout, ragged, codec, queries and option; but for those `everyday`, by number, drawn."""
    every = [
        (layout, ragged, codec, count, option)
        for layout in layouts
        for ragged in (False, True)
        for codec in codecs
        for count in (1, 3)
        for option in options
    ]
    return [
        pytest.param(
            layout, ragged, codec, count, option,
            id=f"{layout}-{'ragged' if ragged else 'aligned'}-{codec}-{count}-{option}",
            # A few tens of these take as long as all else here.
            marks=() if everyday(number, codec, option) else pytest.mark.exhaustive,
        )
        for number, (layout, ragged, codec, count, option) in enumerate(every)
    ]  # fmt: skip


def for_layout(options, layout, count):
    """Options that a layout can take: a mask of one that drops tokens is the same for all of them."""
    if layout != "static" and {"mask", "bias"} & set(options):
        if count > 1 and layout != "dynamic":
            pytest.skip("slots of get() stand for other tokens before and after a chunk")
        return {name: x[..., :1] for name, x in options.items()}
    return options


def both(state, query, **options):
    """Output and log-sum-exp of the kernel, and of the walk, as float32."""
    return [
        jax.tree.map(
            lambda x: np.asarray(x, np.float32),
            lj.attend(state, query, 0, implementation=name, return_lse=True, **options),
        )
        for name in ("kernel", "walk")
    ]


def agree(got, expected, rtol, atol):
    """Arrays are the same up to rounding."""
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# --- compiled for machines that need not be there ---------------------------------------------------

# What copies, converts or re-tiles an array.
MOVES = {"copy", "convert", "transpose", "dynamic-slice", "reshape", "pad"}
# How a call of a kernel may differ from one of eight rows and heads, each of one query.
CALLS = [
    {"ragged": True}, {"stacked": True}, {"static": False, "ragged": True}, {"count": 4},
    {"count": 4, "group": 16}, {"batch": 1, "heads": 1}, {"batch": 1, "heads": 1, "group": 16},
    {"heads": 32, "group": 1}, {"heads": 12, "group": 1}, {"heads": 2, "ragged": True},
    {"window": 1000, "softcap": 30.0}, {"batch": 64, "heads": 2},
]  # fmt: skip


def compiled(target, spec, *, dim, group, count=1, batch=8, heads=8, dtype="bfloat16", stacked=False,
             ragged=False, **options):  # fmt: skip
    """`attend` of a layer, compiled, and the bytes of its cache and of its largest leaf."""
    device = targets.open_target(target).devices[0]

    def there(tree):
        where = SingleDeviceSharding(device)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def make():
        return lj.init_cache(
            spec, num_layers=2, batch_size=batch, num_kv_heads=heads, head_dim=dim, dtype=dtype,
            stacked=stacked, ragged=ragged,
        )  # fmt: skip

    state = there(jax.eval_shape(make))
    query = there(jax.ShapeDtypeStruct((batch, heads * group, count, dim), jnp.dtype(dtype)))
    with jax.default_device(device):
        run = jax.jit(lambda s, q: lj.attend(s, q, 1, return_lse=True, **options))
        program = run.lower(state, query).compile()
    leaves = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    return program, sum(leaves), max(leaves) // (2 if stacked else 1)


def moved(computations, least):
    """The instructions that copy, convert or re-tile an array of at least so many bytes."""
    return [
        instruction
        for computation in computations
        for instruction in computation.instructions.values()
        if instruction.opcode in MOVES
        and any(shape.nbytes >= least for shape in instruction.shapes)
    ]


def some_of(*axes, few=10):
    """All combinations, of which everyday runs try a few."""
    every = list(itertools.product(*axes))
    tried = every[:: len(every) // few]
    return [
        pytest.param(*case, marks=() if case in tried else pytest.mark.exhaustive) for case in every
    ]
