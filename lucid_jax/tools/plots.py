"""Pictures: `plot_occupancy` shows which slot holds which token, `plot_beam_tree` a beam search.

matplotlib is an optional extra and is imported when a picture is asked for. Figures are made without
pyplot: nothing is shown, kept or configured globally.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache.reading import slot_runs
from lucid_jax.cache.shown import short_name
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.decode.beam import BeamResult
from lucid_jax.tools.report import check_concrete

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_occupancy(state: CacheState, layer_idx: int | None = None, row: int = 0) -> Figure:
    """Which absolute position each physical slot holds.

    A band per layer: slots from left to right, coloured by the position of the token in them, light
    grey where none is live. What a ring keeps for rollback is live, if outside the window. A dashed
    line parts the pinned slots of sinks from the ring. Below a layer whose codec has a tail, a
    thin band shows the tail's slots. If heads hold different tokens, each has a line in the band.

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
        shown = [(owner, state.layer(owner)) for owner in state.owners]
    else:
        shown = [(layer_idx, state.layer(layer_idx))]
    return _draw([band for index, layer in shown for band in _bands(index, layer, row)])


class _Band(NamedTuple):
    title: str
    positions: np.ndarray  # int32 [1, S], or [H, S] where heads differ; -1 if dead
    boundary: float | None  # where the sinks end
    height: float


def _bands(index: int, layer: TokenLayer, row: int) -> list[_Band]:
    """The slots of a layer, and of its tail if it has one."""
    length = np.broadcast_to(np.asarray(layer.length), layer.batch_size)[row]
    layout, codec = short_name(layer.spec, leave_out="codec"), short_name(layer.packing.codec)
    title = f"layer {index}: {layout}, {codec}, length {length} / {layer.capacity}"
    boundary = layer.layout.pinned - 0.5 if layer.layout.pinned else None
    slots, *tail = (_of_row(positions, row) for positions in _positions(layer))
    return [
        _Band(title, slots, boundary, height=1.0),
        *(_Band("tail, full precision", each, None, height=0.4) for each in tail),
    ]


@jax.jit
def _positions(layer: TokenLayer) -> list[jax.Array]:
    """Of each part, the positions its slots hold, -1 if dead: int32 [S], [B, S] or [B, H, S]."""
    parts = slot_runs(layer)
    return [part.positions(jnp.int32(0), part.slots.layout.slots) for part in parts]


def _of_row(positions: jax.Array, row: int) -> np.ndarray:
    """One row's positions, [1, S] or [H, S]."""
    host = np.asarray(positions)
    return np.atleast_2d(host if host.ndim == 1 else host[row])


def _draw(bands: list[_Band]) -> Figure:
    heights = [band.height for band in bands]
    figure = _figure("plot_occupancy", 9, 0.8 + 0.7 * sum(heights) + 0.3 * len(bands))
    from matplotlib import colormaps

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


def plot_beam_tree(result: BeamResult, tokenizer: Any = None, row: int = 0) -> Figure:
    """How the beams of one prompt grew: a line per live beam, which branches where another died.

    Steps from left to right, and at each the token that a beam took. Returned hypotheses are coloured,
    the best with the thickest line and first in the legend, with their scores; each ends in a square, a
    little above the beam that it went on from.

    Args:
        result: what `beam_search` returned.
        tokenizer: has `decode([id])`; without one, ids are shown.
        row: the prompt to show.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for a row out of range.
    """
    batch, returned = result.lengths.shape
    if not 0 <= row < batch:
        raise ValueError(f"row must be in [0, {batch}), got {row}")
    steps, width = int(result.lengths[row].max()), result.tokens.shape[2]
    figure = _figure("plot_beam_tree", 1.5 + 0.6 * steps, 1.2 + 0.6 * width)
    axes = figure.subplots()

    def label(step: int, beam: float, token: int) -> None:
        text = str(token) if tokenizer is None else repr(tokenizer.decode([token]))[1:-1]
        axes.text(step, beam + 0.12, text, fontsize=7, ha="center")

    tokens, parents, sums = (x[:, row] for x in (result.tokens, result.parents, result.sums))
    # The last step of the longest hypothesis only finishes.
    for step, beam in np.argwhere(np.isfinite(sums[: steps - 1])):
        label(step, beam, tokens[step, beam])
        before = parents[step, beam] if step else (width - 1) / 2
        axes.plot([step - 1, step], [before, beam], color="lightgrey", marker=".", zorder=1)
    for index in range(returned):
        length, beam = int(result.lengths[row, index]), result.ends[row, index]
        if not length:
            continue
        siblings = (result.lengths[row, :index] == length) & (result.ends[row, :index] == beam)
        end = float(beam) + 0.3 * (1 + siblings.sum())
        path = [end]
        for step in range(length - 2, -1, -1):
            path.insert(0, float(beam))
            beam = parents[step, beam]
        label(length - 1, end, int(result.sequences[row, index, length - 1]))
        (line,) = axes.plot(
            range(-1, length),
            [(width - 1) / 2, *path],
            linewidth=4 - 3 * index / returned,
            zorder=2 + index,
            label=f"{result.scores[row, index]:.3f}",
        )
        axes.plot(length - 1, end, "s", color=line.get_color())
    axes.set_xticks(range(-1, steps), ["prompt", *range(1, steps + 1)])
    axes.set_yticks(range(width))
    axes.set(xlabel="new token", ylabel="beam")
    axes.legend(title="score", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _figure(asked: str, width: float, height: float) -> Figure:
    """An empty figure of so many inches for the function that was asked for."""
    try:
        from matplotlib import figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{asked} draws with matplotlib, which could not be imported; "
            "install it with: pip install 'lucid-jax[plots]'",
            name=error.name,
        ) from error
    return figure.Figure(figsize=(width, height), layout="constrained")
