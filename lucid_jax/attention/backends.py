"""The backends of attention: which there are, and in which order a platform tries them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax

from lucid_jax.attention.gpu.backend import mosaic_gpu
from lucid_jax.attention.mask import Mask
from lucid_jax.attention.prefix import dense, dense_if_small
from lucid_jax.attention.protocol import Backend, NotMe, platform
from lucid_jax.attention.softmax import Query, Scores
from lucid_jax.attention.tpu.backend import pallas_tpu
from lucid_jax.attention.walk import walk
from lucid_jax.cache.reading import SlotRun

PLATFORMS = ("cpu", "gpu", "tpu")
_BY_NAME: dict[str, Backend] = {
    "walk": walk,
    "dense": dense,
    "pallas_tpu": pallas_tpu,
    "mosaic_gpu": mosaic_gpu,
}
_TRIED: dict[str, tuple[Backend, ...]] = {
    "cpu": (walk,),  # of a short cache it is the product
    "gpu": (mosaic_gpu, dense_if_small, walk),
    "tpu": (pallas_tpu, dense_if_small, walk),
}
OWN = frozenset[Backend]().union(*_TRIED.values(), _BY_NAME.values())  # known to run in `shard_map`


def register(name: str, backend: Backend, *, platforms: Collection[str] = ()) -> None:
    """Adds a backend of `attend` and `extend`.

    Args:
        name: what `implementation=` calls it.
        backend: a function `(query, runs, mask, scores) -> (out, lse)`, or `NotMe`; see `Backend`. It
            must be hashable, and one that is equal must do the same: programs are compiled for it once.
        platforms: "cpu", "gpu" or "tpu": where calls that name no backend try it, before all others. On
            none by default.

    Raises:
        ValueError: if the name is taken, or there is no such platform.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> def of_one_token(query, runs, mask, scores):
        ...     if query.shape[2] > 1:
        ...         return lj.attention.NotMe("takes one query at a time")
        ...     ...  # a kernel
        >>> lj.attention.register("of one token", of_one_token)
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=4
        ... )
        >>> lj.attend(state, jnp.ones((1, 2, 3, 4)), 0, implementation="of one token")
        Traceback (most recent call last):
        ValueError: ... it takes one query at a time; ...
    """
    if name in _BY_NAME:
        raise ValueError(f"there is a backend {name!r} already; choose another name")
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown:
        raise ValueError(f"platforms must be among {PLATFORMS}, got {unknown}")
    _BY_NAME[name] = backend
    for name in platforms:
        _TRIED[name] = (backend, *_TRIED[name])


def to_try(implementation: str | None) -> tuple[Backend, ...]:
    """The backend of a name, or those of the platform in force, in order.

    Raises:
        ValueError: if none has the name.
    """
    if implementation is None:
        return _TRIED.get(platform(), (walk,))
    if implementation not in _BY_NAME:
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, _BY_NAME))}, or None for this "
            f"platform's choice, got {implementation!r}; others come by lucid_jax.attention.register"
        )
    return (_BY_NAME[implementation],)


def first_that_takes(
    backends: tuple[Backend, ...],
    query: Query,
    slot_runs: Sequence[SlotRun],
    mask: Mask,
    scores: Scores,
) -> tuple[jax.Array, jax.Array]:
    """The result of the first backend that takes the call.

    Raises:
        ValueError: if none does, which says what each lacks.
    """
    lacks = []
    for backend in backends:
        result = backend(query, slot_runs, mask, scores)
        if not isinstance(result, NotMe):
            return result
        lacks.append(result.lacks)
    raise ValueError(
        f"the backend of implementation= does not take this call: it {'; it '.join(lacks)}; drop "
        "implementation= for one that does"
    )
