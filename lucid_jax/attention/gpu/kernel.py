"""The kernel: a softmax of a few queries over those blocks of slots that hold what they see.

Flash decoding (Dao et al. 2023) for Hopper GPUs: the blocks of a row are dealt out to several
programs, whose softmaxes are joined after it. Shapes: rows (B, H, R, D), R a multiple of 8; leaves
(B, H, S, ...), or (L, B, H, S, ...) of a stack.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from lucid_jax.attention.gpu.pieces import Cut, Piece
from lucid_jax.attention.gpu.plan import AHEAD, Plan
from lucid_jax.attention.gpu.program import Program
from lucid_jax.attention.gpu.seen import Seen


@partial(jax.jit, static_argnums=0)
def softmax(
    plan: Plan,
    queries: jax.Array,
    sums: jax.Array,
    key: Piece,
    value: Piece,
    seen: Seen,
    number: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The softmax of rows over what they see, of each program apart.

    Args:
        plan: static facts.
        queries: (B, H, parts, R, D), of 16 bits; some rows may lack where R is 8.
        sums: float32 (B, H, groups, 64), of queries over the channels that share an offset.
        key: the arrays of keys, (B, H, S, ...), before them the stack's axis.
        value: those of values.
        seen: what rows see.
        number: int32 [1], which layer of a stack.

    Returns:
        What `Running` holds, of each program: (B, H, splits, R) twice and (B, H, splits, R, Dv).
    """
    lead = (plan.batch, plan.heads, plan.splits, plan.rows)
    varying = jax.typeof(queries).mat
    out = [
        jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
        for shape in (lead, lead, (*lead, plan.value.form.dim))
    ]

    def merged(arrays: Piece) -> Piece:  # layers, rows and heads on one axis
        axes = arrays["numbers"].ndim - 2
        return {name: x.reshape(-1, *x.shape[axes:]) for name, x in arrays.items()}

    given = (queries, sums, merged(key), merged(value), seen, number)
    leaves, tree = jax.tree.flatten(given)

    def body(*refs: Any, **scratch: Any) -> None:
        refs, outs = refs[: len(leaves)], refs[len(leaves) :]
        Program(plan, scratch, outs, *jax.tree.unflatten(tree, refs))()

    found: tuple[jax.Array, jax.Array, jax.Array] = plgpu.kernel(
        body,
        out_type=out,
        grid=(plan.splits, plan.heads, plan.batch),
        grid_names=("split", "head", "row"),
        kernel_name="lucid_jax_decode",
        num_threads=plan.threads if plan.threads > 1 else None,
        thread_name="half" if plan.threads > 1 else None,
        scratch_types=_scratch(plan),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plan.interpret,
    )(*leaves)
    return found


def _scratch(plan: Plan) -> dict[str, Any]:
    """What a program holds beside registers."""
    stages, arrays = plan.stages, plan.arrays(plan.stages)
    multiplied = {
        "query": plan.key,
        "weights": plan.value,  # laid out as what it is multiplied with
        **{
            f"{name}_wide" if cut.staged else f"{name}_read": cut
            for name, cut in (("key", plan.key), ("value", plan.value))
        },
    }

    def shared(name: str) -> Any:
        transforms: tuple[Any, ...] = ()
        if name in multiplied:
            swizzle = plgpu.find_swizzle(multiplied[name].width * 16)
            tiling = plgpu.TilingTransform((8, swizzle // 2))
            transforms = (tiling, plgpu.SwizzleTransform(swizzle))
        return plgpu.SMEM(*arrays[name], transforms=transforms)

    def copies(cut: Cut) -> int:
        return 1 if cut.staged else cut.count

    places: dict[str, Any] = {name: shared(name) for name in arrays}
    for one, other in plan.same_place(stages):
        places[f"{one}, {other}"] = plgpu.RefUnion(places.pop(one), places.pop(other))
    return {
        **places,
        **({"both_here": plgpu.Barrier(num_arrivals=2)} if plan.threads > 1 else {}),
        "query_here": plgpu.Barrier(num_arrivals=plan.parts * plan.key.count),
        **({} if plan.between else {"alive_here": plgpu.Barrier(num_barriers=AHEAD * stages)}),
        "key_here": plgpu.Barrier(num_arrivals=copies(plan.key) + plan.many, num_barriers=stages),
        "value_here": plgpu.Barrier(num_arrivals=copies(plan.value), num_barriers=stages),
    }
