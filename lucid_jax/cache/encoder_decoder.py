"""`EncoderDecoderState`: the decoder's own tokens, which grow, and the encoder's, which never change.

The two are kept apart, each a `CacheState` that every verb takes as it is. A decode loop carries the
decoder's alone, so nothing it does (append, reorder, roll back, grow) can reach the encoder's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from flax import struct

from lucid_jax.cache.state import CacheState


@struct.dataclass
class EncoderDecoderState:
    """The pure counterpart of `lucid_jax.nn.EncoderDecoderCache`: a frozen pytree.

    The decoder may have several rows per source, as the beams of beam search are, one after the other;
    the encoder's keys stay one row per source, see `by_source`.

    Example:
        >>> import lucid_jax as lj
        >>> sizes = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 8, "ragged": True}
        >>> state = lj.EncoderDecoderState(
        ...     decoder=lj.init_cache(lj.Static(16), batch_size=6, **sizes),
        ...     encoder=lj.init_cache(lj.Static(32), batch_size=2, **sizes),
        ... )
        >>> state.rows_per_source(6)
        3
        >>> state = state.replace(decoder=lj.reorder(state.decoder, [0, 0, 2, 3, 3, 3]))
    """

    decoder: CacheState | None  # self-attention, B * W rows; None: nothing of the past is kept
    encoder: CacheState  # cross-attention, B rows: one per source

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> EncoderDecoderState:
            """A copy with some fields changed; flax adds it."""

    def rows_per_source(self, rows: int) -> int:
        """W, if the decoder has `rows` rows.

        Raises:
            ValueError: if they are not a multiple of the sources.
        """
        sources = self.encoder.batch_size
        if rows % sources:
            raise ValueError(
                f"the decoder needs a multiple of {sources} rows, one or several for each source, "
                f"those of a source one after the other; got {rows}"
            )
        return rows // sources

    def by_source(self, hidden: jax.Array) -> jax.Array:
        """Rows (B * W, T, E) of the decoder as (B, W * T, E), one row per source.

        Cross-attention knows no order, so the queries of all rows of a source can ask its keys in one
        row, and the keys are never repeated.

        Raises:
            ValueError: if the rows are not a multiple of the sources.
        """
        batch, tokens, width = hidden.shape
        each = self.rows_per_source(batch)
        return hidden.reshape(self.encoder.batch_size, each * tokens, width)
