"""Which drafts a target model accepts, row by row: greedily, by rejection sampling, along a tree.

Shapes: target logits (B, K + 1, V), the first from the token before the drafts; drafts (B, K). Each
rule gives tokens (B, K + 1) and how many drafts were accepted, int32 (B,): a row's `accepted + 1` first
tokens are its next ones, the last of them the target's own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.decode.sampling import likeliest
from lucid_jax.decode.topology import Topology


def accept_greedy(
    logits: jax.Array, drafts: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Accepts drafts for as long as each is the target's likeliest token.

    Args:
        logits: (B, K + 1, V), of the target.
        drafts: int32 (B, K).
        counts: int32 (B,), how many of a row's drafts are real.

    Example:
        >>> logits = jax.nn.one_hot(jnp.array([[3, 1, 2]]), 4)
        >>> tokens, accepted = accept_greedy(logits, jnp.array([[3, 0]]), jnp.array([2]))
        >>> tokens.tolist(), accepted.tolist()
        ([[3, 1, 2]], [1])
    """
    best = likeliest(logits)
    return best, _leading(best[:, :-1] == drafts, counts)


def accept_sampled(
    logits: jax.Array, probs: jax.Array, drafts: jax.Array, counts: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Accepts drafts so that the tokens are distributed as if the target had drawn them alone.

    A draft d drawn from q is accepted with probability min(1, p(d) / q(d)); in place of the first that
    is not, the target draws from what p has more than q (Leviathan et al. 2023; Chen et al. 2023).

    Args:
        logits: (B, K + 1, V), of the target, after all filters; softmax gives p.
        probs: (B, K, V): q, what each draft was drawn from, after the same filters.
        drafts: int32 (B, K).
        counts: int32 (B,), how many of a row's drafts are real.
        keys: (B,) PRNG keys, one a row.
    """
    p = jax.nn.softmax(logits, axis=-1)
    count = drafts.shape[1]

    def of_draft(probs: jax.Array) -> jax.Array:
        return jnp.take_along_axis(probs, drafts[..., None], axis=-1)[..., 0]

    coin_keys, draw_keys = jnp.swapaxes(jax.vmap(jax.random.split)(keys), 0, 1)
    coins = jax.vmap(lambda key: jax.random.uniform(key, (count,), probs.dtype))(coin_keys)
    # Not a division: a q of 0 cannot have been drawn, and a p of 0 is never accepted.
    accepted = _leading(coins * of_draft(probs) < of_draft(p[:, :-1]), counts)

    at = accepted[:, None, None]
    p_here = jnp.take_along_axis(p, at, axis=1)[:, 0]
    q_here = jnp.take_along_axis(probs, jnp.minimum(at, count - 1), axis=1)[:, 0]
    refused = (accepted < counts)[:, None]
    rest = jnp.where(refused, jnp.maximum(p_here - q_here, 0), p_here)
    # Where p equals q up to rounding, a refusal has probability 0 up to rounding too.
    rest = jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p_here)
    last = jax.vmap(jax.random.categorical)(draw_keys, jnp.log(rest)).astype(jnp.int32)
    here = jnp.arange(count + 1, dtype=jnp.int32)[None] == accepted[:, None]
    return jnp.where(here, last[:, None], jnp.pad(drafts, ((0, 0), (0, 1)))), accepted


def accept_tree(
    logits: jax.Array, drafts: jax.Array, counts: jax.Array, tree: Topology
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Walks from the root to the child that is the target's likeliest token, as long as there is one.

    Args:
        logits: (B, M + 1, V), of the target, for the root and the M nodes.
        drafts: int32 (B, M).
        counts: int32 (B,), how many of a row's nodes are real.
        tree: how the nodes hang together.

    Returns:
        Tokens (B, depth + 1), how many drafts were accepted, (B,), and the path of nodes,
        (B, depth + 1), the root first.
    """
    best = likeliest(logits)
    children = jnp.asarray(tree.children)
    node = jnp.zeros_like(counts)
    going, path, accepted = counts >= 0, [node], jnp.zeros_like(counts)
    for _ in range(tree.depth):
        wanted = jnp.take_along_axis(best, node[:, None], axis=1)
        below = jnp.take(children, node, axis=0)  # [B, W], -1 where there is none
        token = jnp.take_along_axis(drafts, jnp.maximum(below - 1, 0), axis=1)
        hit = (token == wanted) & (below >= 1) & (below <= counts[:, None])
        going = going & jnp.any(hit, axis=1)
        next_node = jnp.take_along_axis(below, jnp.argmax(hit, axis=1)[:, None], axis=1)[:, 0]
        node = jnp.where(going, next_node, node)
        accepted = accepted + going.astype(jnp.int32)
        path.append(node)
    nodes = jnp.stack(path, axis=1)
    return jnp.take_along_axis(best, nodes, axis=1), accepted, nodes


def _leading(good: jax.Array, counts: jax.Array) -> jax.Array:
    """How many of a row's `counts` first entries are good before the first that is not, (B,)."""
    real = jnp.arange(good.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    so_far = jnp.cumprod(good & real, axis=1, dtype=jnp.int32)
    return jnp.sum(so_far, axis=1, dtype=jnp.int32)
