"""Pictures of a cache: `plot_occupancy` shows which slot holds which token.

matplotlib is an optional extra and is imported when a picture is asked for. Figures are made without
pyplot: nothing is shown, kept or configured globally.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache.layer import Layer
from lucid_jax.cache.ring import Ring
from lucid_jax.cache.state import CacheState
from lucid_jax.report import check_concrete
from lucid_jax.tables import short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_occupancy(state: CacheState, layer_idx: int | None = None, row: int = 0) -> Figure:
    """Which absolute position each physical slot holds.

    A band per layer: slots from left to right, coloured by the position of the token in them, light
    grey where none is live. What a ring keeps for rollback is live, if outside the window. A dashed
    line parts the pinned slots of sinks from the ring. Below a layer whose codec has a residual, a
    thin band shows the residual's slots. If heads hold different tokens, each has a line in the band.

    Args:
        state: the cache, not traced.
        layer_idx: the model's layer to show; by default all that store tokens.
        row: the row of the batch to show.

    Returns:
        A `matplotlib.figure.Figure`; a notebook that has run `%matplotlib inline` shows it.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for a layer or row out of range.
        TypeError: inside `jit`.
        RuntimeError: if the state was donated.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Sliding(8, sinks=2), num_layers=2, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> plot_occupancy(state).axes[0].get_title(loc="left")
        'layer 0: Sliding(window=8, sinks=2), Identity, length 0 / 10'
    """
    check_concrete(state, "plot_occupancy")
    if not 0 <= row < state.batch_size:
        raise ValueError(f"row must be in [0, {state.batch_size}), got {row}")
    if layer_idx is None:
        shown = list(zip(state.owners, state.layers, strict=True))
    else:
        shown = [(layer_idx, state.layer(layer_idx))]
    return _draw([band for index, layer in shown for band in _bands(index, layer, row)])


class _Band(NamedTuple):
    title: str
    positions: np.ndarray  # int32 [1, S], or [H, S] where heads differ; -1 if dead
    boundary: float | None  # where the sinks end
    height: float


def _bands(index: int, layer: Layer, row: int) -> list[_Band]:
    """The slots of a layer, and of its residual if it has one."""
    length = np.broadcast_to(np.asarray(layer.length), layer.batch_size)[row]
    layout, codec = short_name(layer.spec, leave_out="codec"), short_name(layer.packing.codec)
    title = f"layer {index}: {layout}, {codec}, length {length} / {layer.capacity}"
    boundary = layer.pinned - 0.5 if isinstance(layer, Ring) and layer.pinned else None
    slots, *residual = (_of_row(positions, row) for positions in _positions(layer))
    return [
        _Band(title, slots, boundary, height=1.0),
        *(_Band("residual, full precision", each, None, height=0.4) for each in residual),
    ]


@jax.jit
def _positions(layer: Layer) -> list[jax.Array]:
    """Of each part, the positions its slots hold, -1 if dead: int32 [S], [B, S] or [B, H, S]."""
    return [part.positions(jnp.int32(0), part.size) for part in layer.parts()]


def _of_row(positions: jax.Array, row: int) -> np.ndarray:
    """One row's positions, [1, S] or [H, S]."""
    host = np.asarray(positions)
    return np.atleast_2d(host if host.ndim == 1 else host[row])


def _draw(bands: list[_Band]) -> Figure:
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_occupancy draws with matplotlib, which could not be imported; "
            "install it with: pip install 'lucid-jax[plots]'",
            name=error.name,
        ) from error

    heights = [band.height for band in bands]
    figure = Figure(figsize=(9, 0.8 + 0.7 * sum(heights) + 0.3 * len(bands)), layout="constrained")
    grid: Any = figure.subplots(
        len(bands), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    colours = colormaps["viridis"].with_extremes(bad="lightgrey")
    # One scale for all bands, so that a colour means the same token everywhere.
    newest = max(1, *(int(band.positions.max()) for band in bands))
    for axes, band in zip(grid[:, 0], bands, strict=True):
        image = axes.imshow(
            np.ma.masked_less(band.positions, 0),
            cmap=colours,
            vmin=0,
            vmax=newest,
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_title(band.title, loc="left", fontsize=9)
        axes.set_yticks([])
        if len(band.positions) > 1:
            axes.set_ylabel("head")
        if band.boundary is not None:
            axes.axvline(band.boundary, color="black", linestyle="--", linewidth=1)
    grid[-1, 0].set_xlabel("slot")
    figure.colorbar(image, ax=list(grid[:, 0]), label="position")
    return figure
