"""`CacheState`, a tuple of layer states, and the verbs: pure functions from state to state.

Every verb works three ways. Inside `jit` it traces into the caller's program. Called eagerly it is
compiled already and the old state stays valid. Called eagerly with `donate=True` it updates in place
and the old state's buffers are gone. Eager calls check everything and raise; a traced call that asks
for what cannot be done changes nothing and sets the state's sticky `overflowed` flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike, DTypeLike

from lucid_jax.cache.checks import (
    as_array,
    as_integers,
    as_layer_index,
    check_alive,
    check_count,
    check_indices,
    is_traced,
)
from lucid_jax.cache.inputs import (
    absolute_positions,
    as_counts,
    as_places,
    check_places_possible,
    check_reach,
    check_tokens,
    make_room,
    no_room,
)
from lucid_jax.cache.layer import Layer, LayerSpec
from lucid_jax.cache.slots import span


@dataclasses.dataclass(frozen=True)
class Shared:
    """Stands in a list of specs for a layer that reads another's tokens and stores none itself.

    Cross-layer sharing (Brandon et al. 2024; Gemma 3n): `[Static(64), Shared(0)]`.

    Attributes:
        layer_idx: the layer to read, one that stores tokens.
    """

    layer_idx: int


@struct.dataclass
class CacheState:
    """The cache of a whole model: one layer state per layer that stores tokens, each free to differ.

    `reads[i]` says which of `layers` the model's layer i reads: itself, or a layer it shares.
    """

    layers: tuple[Layer, ...]
    reads: tuple[int, ...] = struct.field(pytree_node=False)
    owners: tuple[int, ...] = struct.field(pytree_node=False)  # the model's layer of each state

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> CacheState:
            """A copy with some fields changed; flax adds it."""

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self.reads)

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self.layers[0].batch_size

    @property
    def ragged(self) -> bool:
        """Whether each row has its own length."""
        return self.layers[0].ragged

    def layer(self, layer_idx: Any) -> Layer:
        """What the model's layer reads.

        Raises:
            ValueError: for an index out of range.
            RuntimeError: if its buffers were donated.
        """
        layer = self.layers[self.reads[as_layer_index(layer_idx, self.num_layers)]]
        check_alive(layer)
        return layer

    def owns(self, layer_idx: Any) -> bool:
        """Whether the model's layer stores tokens, rather than read another's."""
        index = as_layer_index(layer_idx, self.num_layers)
        return self.owners[self.reads[index]] == index

    def own_layer(self, layer_idx: Any) -> Layer:
        """`layer`, for one that is about to be written.

        Raises:
            ValueError: also if the layer only reads another's tokens.
        """
        layer, index = self.layer(layer_idx), int(layer_idx)
        owner = self.owners[self.reads[index]]
        if not self.owns(index):
            raise ValueError(
                f"layer {index} shares the tokens of layer {owner} and stores none itself; "
                f"update layer {owner} only"
            )
        return layer

    def with_layer(self, layer_idx: int, layer: Layer) -> CacheState:
        """This state with one layer replaced; the other layers are shared, not copied."""
        index = self.reads[layer_idx]
        return self.with_layers((*self.layers[:index], layer, *self.layers[index + 1 :]))

    def with_layers(self, layers: Iterable[Layer]) -> CacheState:
        """This state with other layer states in the same places."""
        return self.replace(layers=tuple(layers))


def of_layers(*layers: Layer) -> CacheState:
    """A state of layers that share nothing."""
    each = tuple(range(len(layers)))
    return CacheState(tuple(layers), reads=each, owners=each)


def init_cache(
    spec: LayerSpec | Sequence[LayerSpec | Shared],
    *,
    batch_size: int,
    num_kv_heads: int | Sequence[int],
    head_dim: int | Sequence[int],
    num_layers: int | None = None,
    value_head_dim: int | Sequence[int] | None = None,
    dtype: DTypeLike = jnp.float32,
    ragged: bool = False,
) -> CacheState:
    """An empty cache.

    Args:
        spec: one spec for all layers, or a list with one per layer; `Shared(i)` in it makes a layer
            read what layer i stores.
        batch_size: B, rows.
        num_kv_heads: H, key/value heads; or a list with one number per layer.
        head_dim: D, of keys; of values too unless `value_head_dim` says otherwise. Or one per layer.
        num_layers: number of layers; may be left out when `spec` is a list.
        value_head_dim: Dv, if values are not as wide as keys. Or one per layer.
        dtype: dtype of the tokens.
        ragged: give each row its own length (batches of unequal prompts, speculative decoding).

    Raises:
        ValueError: for a size below 1, or a list that disagrees with the number of layers.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(16), num_layers=2, batch_size=1, num_kv_heads=4, head_dim=8
        ... )
        >>> state.layers[0].key.shape, lj.nbytes(state)
        ((1, 4, 16, 8), 8218)
    """
    if isinstance(spec, Sequence):
        specs = list(spec)
        if num_layers is not None and num_layers != len(specs):
            raise ValueError(
                f"num_layers={num_layers} but {len(specs)} specs were given; "
                "give one spec for all layers, or one per layer"
            )
    else:
        if num_layers is None:
            raise ValueError("num_layers is needed when one spec stands for all layers")
        specs = [spec] * check_count(num_layers, "num_layers", 1)
    if not specs:
        raise ValueError("a cache needs at least one layer, got an empty list of specs")
    batch_size = check_count(batch_size, "batch_size", 1)
    dims = _each_layer(head_dim, "head_dim", len(specs))
    sizes = {
        "num_kv_heads": _each_layer(num_kv_heads, "num_kv_heads", len(specs)),
        "head_dim": dims,
        "value_head_dim": dims
        if value_head_dim is None
        else _each_layer(value_head_dim, "value_head_dim", len(specs)),
    }
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    layers: list[Layer] = []
    owners: list[int] = []
    reads: list[int] = []
    for index, one in enumerate(specs):
        if isinstance(one, Shared):
            target = check_count(one.layer_idx, "layer_idx of Shared")
            if target not in owners:
                raise ValueError(
                    f"layer {index} is Shared({target}), but layer {target} is not an earlier layer "
                    f"that stores tokens; those are {owners}"
                )
            for name, values in sizes.items():
                if values[index] != values[target]:
                    raise ValueError(
                        f"layer {index} is Shared({target}), so its {name} must be that of layer "
                        f"{target}, {values[target]}, got {values[index]}"
                    )
            reads.append(owners.index(target))
            continue
        reads.append(len(layers))
        owners.append(index)
        shape = {name: values[index] for name, values in sizes.items()}
        layers.append(one.init(batch_size=batch_size, **shape, dtype=dtype, ragged=ragged))
    return CacheState(tuple(layers), reads=tuple(reads), owners=tuple(owners))


def checked(state: CacheState, on: bool = True) -> CacheState:
    """The state, whose traced operations also tell `jax.experimental.checkify` what did not fit.

    Errors then name the call, where the sticky `overflowed` flag tells only that there was one. Not the
    default, as jit takes the slow way through Python for programs that hold such checks: 0.3 ms more a
    call. Like a codec it is static: a loop or a branch must carry one kind. `save` does not keep it.

    Args:
        state: a cache; of an encoder and decoder, `state.decoder`.
        on: False takes the checks out again.

    Raises:
        TypeError: if `state` is not a `CacheState`.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> from jax.experimental import checkify
        >>> state = lj.init_cache(
        ...     lj.Static(2), num_layers=1, batch_size=1, num_kv_heads=1, head_dim=4
        ... )
        >>> tokens = jnp.ones((1, 1, 2, 4))
        >>> step = checkify.checkify(jax.jit(lambda s: lj.update(s, tokens, tokens, 0)))
        >>> _, state = step(lj.checked(state))
        >>> error, _ = step(state)
        >>> print(error.get().split("; ")[0])
        append past the capacity of 2
    """
    if not isinstance(state, CacheState):
        raise TypeError(
            f"checked takes a CacheState, got {type(state).__name__}; of an EncoderDecoderState give "
            "it the decoder"
        )
    return state.replace(layers=tuple(layer.replace(checked=on) for layer in state.layers))


def _each_layer(size: Any, name: str, num_layers: int) -> list[int]:
    """A size given once, or once per layer, as a list."""
    sizes = list(size) if isinstance(size, Sequence) else [size] * num_layers
    if len(sizes) != num_layers:
        raise ValueError(
            f"{name} has {len(sizes)} entries for {num_layers} layers; give one number, or one "
            "per layer"
        )
    return [check_count(one, name, 1) for one in sizes]


# --- writing ---------------------------------------------------------------------------------------


def update(
    state: CacheState,
    key: ArrayLike,
    value: ArrayLike,
    layer_idx: int,
    cache_position: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    *,
    donate: bool = False,
) -> CacheState:
    """Appends T tokens to one layer, or writes them at given places.

    Cost is O(T), whatever the capacity. All or nothing: tokens that do not fit raise when called
    eagerly; traced, nothing is written (per row, if ragged) and `overflowed` is set. A dynamic layer
    grows when called eagerly.

    Args:
        state: the cache.
        key: (B, H, T, D), in the cache's dtype.
        value: (B, H, T, Dv).
        layer_idx: which layer, a Python int.
        cache_position: where the tokens go, counted from the oldest stored token: None appends; an
            integer places one token; `[T]` places each token; `[B, T]` places them row by row. The
            length becomes `max(length, largest + 1)`, slots skipped on the way read as zeros, and of
            duplicates the last wins.
        lengths: int32 [B], ragged caches only: how many of each row's T tokens are real. The rest of
            a right-padded chunk writes nothing; a row with 0 sits this step out.
        donate: eager calls only: reuse this layer's buffers; the old state must not be used again.

    Returns:
        The new state.

    Raises:
        ValueError: for a wrong rank, batch size, head count or head_dim, a layer index or position
            out of range, or (eager) tokens that do not fit.
        TypeError: for a dtype that is not the cache's, or positions that are not integers.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> tokens = jnp.ones((1, 2, 3, 8))
        >>> state = lj.update(state, tokens, tokens, 0)
        >>> int(lj.seq_length(state))
        3
        >>> lj.update(state, tokens, tokens, 0)
        Traceback (most recent call last):
        ValueError: 3 stored + 3 new tokens need 6 slots, but the capacity is 4; ...
    """
    layer = state.own_layer(layer_idx)
    key, value = as_array(key), as_array(value)
    check_tokens(layer, key, value)
    tokens = key.shape[2]
    counts = as_counts(lengths, layer, tokens)
    places = as_places(cache_position, layer.batch_size, tokens, counts)
    check_places_possible(layer, places)
    if tokens == 0:
        return state
    if is_traced(layer, key, value, places, counts):
        check_reach(layer, tokens, places, counts)
        return state.with_layer(layer_idx, _update_layer(layer, key, value, places, counts))
    roomy = make_room(layer, tokens, places, counts)
    # A layer that just grew is ours alone, so its buffers are free to reuse.
    run = _update_donated if donate or roomy is not layer else _update_kept
    return state.with_layer(layer_idx, run(roomy, key, value, places, counts))


def _update_layer(
    layer: Layer, key: jax.Array, value: jax.Array, places: Any, counts: Any
) -> Layer:
    counts = None if counts is None else jnp.asarray(counts)
    if places is None:
        return layer.append(key, value, counts)
    return layer.write(key, value, jnp.asarray(places), counts)


_update_kept = jax.jit(_update_layer)
_update_donated = jax.jit(_update_layer, donate_argnums=0)


# --- reading ---------------------------------------------------------------------------------------


def get(state: CacheState, layer_idx: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Everything one layer stores, oldest token first, padded to the full capacity.

    Reading the whole capacity costs O(capacity); `attend` does not.

    Returns:
        keys (B, H, C, D) and values (B, H, C, Dv), zero where nothing is stored, and `valid`, bool
        [C], or [B, C] if ragged.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> keys, values, valid = lj.get(state, 0)
        >>> keys.shape, valid.any().item()
        ((1, 2, 4, 8), False)
    """
    layer = state.layer(layer_idx)
    return _read(layer) if is_traced(layer) else _read_jit(layer)


def _read(layer: Layer) -> tuple[jax.Array, jax.Array, jax.Array]:
    valid = layer.valid()
    mask = valid.reshape(-1, 1, layer.capacity, 1)
    # where, not a product: what is not live may be NaN, and 0 * NaN is NaN.
    forms = zip(layer.packing.raw_forms, layer.tokens(), strict=True)
    # As bits: to choose between narrow floats XLA may widen them, which alters some NaNs.
    key, value = (
        form.decode(jnp.where(mask, bits := form.encode(x), jnp.zeros((), bits.dtype)))
        for form, x in forms
    )
    return key, value, valid


_read_jit = jax.jit(_read)


def valid(state: CacheState, layer_idx: int = 0) -> jax.Array:
    """Which slots of `get` hold a live token: bool [C], or [B, C] if ragged."""
    return state.layer(layer_idx).valid()


def seq_length(state: CacheState, layer_idx: int = 0) -> jax.Array:
    """Tokens stored now: int32 [], or [B] if ragged."""
    return state.layer(layer_idx).length


def positions(
    state: CacheState, n: int, layer_idx: int = 0, cache_position: ArrayLike | None = None
) -> jax.Array:
    """Absolute positions of the next `n` tokens, for RoPE: int32 [n], or [B, n] if ragged.

    They continue from the tokens ever seen, not from the length: crop lowers the length only. With
    `cache_position`, as `update` takes it, they are the positions of the places named.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> tokens = jnp.ones((1, 2, 5, 8))
        >>> state = lj.crop(lj.update(state, tokens, tokens, 0), 2)
        >>> int(lj.seq_length(state)), lj.positions(state, 2).tolist()
        (2, [5, 6])
    """
    layer = state.layer(layer_idx)
    count = check_count(n, "n")
    places = as_places(cache_position, layer.batch_size, count)
    if places is None:
        return span(layer.position, count)
    check_places_possible(layer, places)
    return absolute_positions(layer, places)


def stored_positions(state: CacheState, layer_idx: int = 0) -> jax.Array:
    """Absolute positions of the tokens that `get` gives, -1 where it gives none.

    Returns:
        int32 [C], [B, C] if ragged; (B, H, C) once heads may have evicted different tokens.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Sliding(2, sinks=1), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> tokens = jnp.ones((1, 2, 9, 8))
        >>> lj.stored_positions(lj.update(state, tokens, tokens, 0)).tolist()
        [0, 7, 8]
    """
    return state.layer(layer_idx).stored_positions()


def capacity(state: CacheState, layer_idx: int = 0) -> int:
    """C, the most tokens that each row of a layer holds: the seq axis of `get`."""
    return state.layer(layer_idx).capacity


def nbytes(state: CacheState) -> int:
    """Bytes reserved by all buffers of the state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def overflowed(state: CacheState) -> jax.Array:
    """Whether a traced operation asked for what could not be done: bool [], or [B] if ragged.

    The flag is sticky until `reset`. What was asked for did not happen: no token was overwritten.
    """
    check_alive(state)
    flags = jnp.stack([layer.overflowed for layer in state.layers])
    return jnp.any(flags, axis=0)


def check_overflow(state: CacheState) -> None:
    """Raises if the state's `overflowed` flag is set; for host loops, after a compiled call.

    Raises:
        OverflowError: naming the rows and layers where a traced operation was refused.
    """
    check_alive(state)
    for index, layer in zip(state.owners, state.layers, strict=True):
        flags = np.atleast_1d(np.asarray(layer.overflowed))
        if flags.any():
            rows = f", rows {np.flatnonzero(flags).tolist()}" if layer.ragged else ""
            raise OverflowError(
                f"layer {index}{rows}: a compiled step asked for more than the cache could do "
                f"(length {layer.length_on_host().tolist()}, capacity {layer.capacity}); nothing "
                "was overwritten, but those tokens are missing. Give the cache more room "
                "(Static(capacity), ensure_capacity) or check the positions and rows passed in"
            )


# --- all layers at once ----------------------------------------------------------------------------


def _per_layer(name: str) -> Callable[..., CacheState]:
    """A compiled verb that calls one method on each layer, and its in-place twin."""

    def run(state: CacheState, *args: jax.Array) -> CacheState:
        return state.with_layers(getattr(layer, name)(*args) for layer in state.layers)

    kept, donated = jax.jit(run), jax.jit(run, donate_argnums=0)

    def verb(state: CacheState, *args: Any, donate: bool) -> CacheState:
        args = tuple(jnp.asarray(arg) for arg in args)
        if is_traced(state, args):
            return run(state, *args)
        return (donated if donate else kept)(state, *args)

    return verb


_select, _crop, _rollback, _reset = (
    _per_layer(name) for name in ("select", "crop", "rollback", "reset")
)


def select(state: CacheState, indices: ArrayLike, *, donate: bool = False) -> CacheState:
    """Gathers batch rows: row i of the result is row `indices[i]`. Rows may repeat or be left out.

    Only stored tokens move, not the whole capacity. With as many rows as before, `donate=True` (or a
    loop carry) reorders in place.

    Args:
        state: the cache.
        indices: int32 [B'], each in [0, B).
        donate: eager calls only: the old state must not be used again. Another number of rows takes
            new buffers all the same.

    Raises:
        IndexError: for a concrete index out of range, negative ones included. A traced one is
            clamped and sets `overflowed`.
        ValueError: if indices are not 1-D.
        TypeError: if they are not integers.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8
        ... )
        >>> lj.select(state, [1, 1, 0]).batch_size
        3
    """
    check_alive(state)
    rows = check_indices(indices, state.batch_size)
    # Another number of rows needs other buffers: there would be nothing to reuse.
    return _select(state, rows, donate=donate and len(rows) == state.batch_size)


def reorder(
    state: CacheState,
    beam_idx: ArrayLike,
    *,
    since: ArrayLike | None = None,
    donate: bool = False,
) -> CacheState:
    """`select` under its beam-search name: row i goes on from row `beam_idx[i]`.

    Args:
        state: the cache.
        beam_idx: int32 [B'], each in [0, B).
        since: an absolute position, an integer or int32 [B]: before it, row i already holds the tokens
            of row `beam_idx[i]` (the prompt, and what came before those two beams parted), so
            contiguous layers move only what follows. Rings, which wrap, move whole.
        donate: eager calls only: the old state must not be used again.

    Raises:
        IndexError: as `select`.
        ValueError: as `select`; and, with `since`, if it is negative, past a row's position, of
            another shape, or if the number of rows changes. (Traced values are clamped.)
        TypeError: as `select`.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> prompt = jnp.ones((1, 2, 5, 8))
        >>> state = lj.repeat_interleave(lj.update(state, prompt, prompt, 0), 3)
        >>> tokens = jnp.arange(3.0)[:, None, None, None] * jnp.ones((1, 2, 1, 8))
        >>> state = lj.reorder(lj.update(state, tokens, tokens, 0), [2, 0, 0], since=5)
        >>> lj.get(state, 0)[0][:, 0, 4:6, 0].tolist()
        [[1.0, 2.0], [1.0, 0.0], [1.0, 0.0]]
    """
    if since is None:
        return select(state, beam_idx, donate=donate)
    check_alive(state)
    rows = check_indices(beam_idx, state.batch_size)
    return _select(state, rows, _as_since(state, rows, since), donate=donate)


def _as_since(state: CacheState, rows: Any, since: ArrayLike) -> Any:
    """Checks what `reorder` is told about shared tokens."""
    position = as_integers(since, "since")
    if len(rows) != state.batch_size:
        raise ValueError(
            f"since= leaves shared tokens where they are, so the number of rows must stay "
            f"{state.batch_size}, got {len(rows)} indices; leave since= out"
        )
    if position.ndim > 1 or (position.ndim == 1 and len(position) != state.batch_size):
        raise ValueError(
            f"since must be an integer or shape ({state.batch_size},), got {position.shape}"
        )
    if not is_traced(state, position):
        with jax.ensure_compile_time_eval():  # also where a concrete state is used inside jit
            newest = np.min([np.asarray(layer.position) for layer in state.layers], axis=0)
        if np.any(position < 0) or np.any(position > newest):
            raise ValueError(
                f"since must be an absolute position in [0, {np.min(newest)}], got "
                f"{np.asarray(position).tolist()}; rows share nothing beyond what they hold"
            )
    return position


def repeat_interleave(state: CacheState, n: int) -> CacheState:
    """Beam expansion: rows 0, 0, ..., 1, 1, ..., each `n` times.

    Raises:
        ValueError: if `n` is less than 1.
        TypeError: if `n` is not an integer known at trace time.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8
        ... )
        >>> lj.repeat_interleave(state, 4).batch_size
        8
    """
    repeats = check_count(n, "n", 1)
    return select(state, np.repeat(np.arange(state.batch_size, dtype=np.int32), repeats))


def crop(state: CacheState, max_length: ArrayLike, *, donate: bool = False) -> CacheState:
    """Keeps the latest `max_length` tokens of every layer and row; absolute positions go on.

    Args:
        state: the cache.
        max_length: an integer >= 0, or a traced int32 [].
        donate: eager calls only: the old state must not be used again.

    Raises:
        ValueError: if negative. (Traced: nothing is dropped and `overflowed` is set.)
        TypeError: if not an integer.
    """
    check_alive(state)
    limit = as_integers(max_length, "max_length")
    if limit.ndim:
        raise ValueError(f"max_length must be one integer, got shape {limit.shape}")
    if isinstance(limit, (np.ndarray, np.integer)) and limit < 0:
        raise ValueError(f"max_length must be at least 0, got {limit}")
    return _crop(state, limit, donate=donate)


def rollback(state: CacheState, n: ArrayLike, *, donate: bool = False) -> CacheState:
    """Drops the latest `n` tokens, as if they had never come: position goes back with length.

    For speculative decoding: append the drafts, then roll the rejected ones back.

    Args:
        state: the cache.
        n: an integer, or int32 [B] for a ragged cache: tokens to drop from each row.
        donate: eager calls only: the old state must not be used again.

    Raises:
        ValueError: if `n` is negative, more than is stored, or more than a layer can bring back
            exactly: a window that has wrapped its `slack`, KIVI its `residual`, and an evicted layer
            what came since. (Traced: nothing is dropped and `overflowed` is set, per row.)
        TypeError: if not integers.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8, ragged=True
        ... )
        >>> tokens = jnp.ones((2, 2, 5, 8))
        >>> state = lj.rollback(lj.update(state, tokens, tokens, 0), jnp.array([0, 3]))
        >>> lj.seq_length(state).tolist()
        [5, 2]
    """
    check_alive(state)
    drop = as_integers(n, "n")
    if drop.ndim == 1 and not state.ragged:
        raise ValueError(
            "rolling rows back by different amounts needs a ragged cache; "
            "make it with init_cache(..., ragged=True), or pass one integer"
        )
    if drop.ndim > 1 or (drop.ndim == 1 and drop.shape != (state.batch_size,)):
        raise ValueError(f"n must be an integer or shape ({state.batch_size},), got {drop.shape}")
    if not is_traced(state, drop):
        with jax.ensure_compile_time_eval():  # also where a concrete state is used inside jit
            possible = np.asarray(_can_rollback(state, drop))
        if not possible.all():
            raise ValueError(_no_way_back(state, np.asarray(drop), possible))
    return _rollback(state, drop, donate=donate)


@jax.jit
def _can_rollback(state: CacheState, n: jax.Array) -> jax.Array:
    """Which layers (and rows) can drop `n` tokens: bool [layers] or [layers, B]."""
    return jnp.stack([layer.can_rollback(n) for layer in state.layers])


def _no_way_back(state: CacheState, drop: np.ndarray, possible: np.ndarray) -> str:
    owner = int(np.flatnonzero(~possible.reshape(len(possible), -1).all(axis=1))[0])
    layer = state.layers[owner]
    stored = np.asarray(layer.position) - np.asarray(layer.start)
    asked = f"rollback({drop.tolist()}) of layer {state.owners[owner]}"
    if np.any(drop < 0) or np.any(drop > stored):
        return (
            f"{asked} needs 0 <= n <= tokens stored, or slid out of a window since they were, which "
            f"are {stored.tolist()}"
        )
    if not layer.has_places:
        return f"{asked} would reach tokens that were there at the latest compact; drop fewer"
    return (
        f"{asked} is more than {layer.spec} can bring back: it promises {layer.lookback} tokens, "
        "counted from the longest it has been. Give Sliding more slack=, or KIVI more residual="
    )


def reset(state: CacheState, *, donate: bool = False) -> CacheState:
    """Empties every layer and clears `overflowed`; buffers are kept, and what they held is unseen."""
    check_alive(state)
    return _reset(state, donate=donate)


# --- growth, on the host ---------------------------------------------------------------------------


def grow(state: CacheState, capacity: int) -> CacheState:
    """Gives every dynamic layer at least `capacity` slots (rounded up to a power of two).

    Runs on the host, between compiled calls, as the new capacity is a new shape. Stored tokens are
    copied; layers that are large enough already are shared with the old state.

    Raises:
        ValueError: if a layer is too small and its layout cannot grow.
    """
    need = check_count(capacity, "capacity", 1)
    return with_room(state, [need] * len(state.layers))


def with_room(state: CacheState, needs: Sequence[int]) -> CacheState:
    """`grow` with a number of its own for each of `state.layers`."""
    check_alive(state)
    layers = []
    for index, layer, need in zip(state.owners, state.layers, needs, strict=True):
        enough = need <= layer.capacity or not layer.bounded
        roomy = layer if enough else layer.with_room(need)
        if roomy is None:
            raise ValueError(no_room(f"layer {index} cannot grow: {need} tokens", need, layer))
        layers.append(roomy)
    return state.with_layers(layers)


def ensure_capacity(state: CacheState, n: int) -> CacheState:
    """Makes room for `n` more tokens in every row before a compiled chunk of steps; see `grow`.

    Sliding layers need none.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Dynamic(), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> lj.capacity(lj.ensure_capacity(state, 100))
        128
    """
    if is_traced(state):
        raise TypeError(
            "ensure_capacity needs a concrete state: a traced length cannot choose a shape; "
            "call it outside jit, before the compiled steps"
        )
    check_alive(state)
    more = check_count(n, "n")
    return with_room(state, [int(np.max(x.length_on_host())) + more for x in state.layers])


def room(state: CacheState) -> int | None:
    """Tokens that every row can still take without growing; None if there is no bound.

    Needs a concrete state.
    """
    check_alive(state)
    return min(
        (
            layer.capacity - int(np.max(layer.length_on_host()))
            for layer in state.layers
            if layer.bounded
        ),
        default=None,
    )
