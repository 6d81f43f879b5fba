"""Where a token stands: its position in its own text, and which text of its row it belongs to."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

# The window of a layer without one: wider than any text.
NO_WINDOW = int(np.iinfo(np.int32).max)


@flax.struct.dataclass
class Places:
    """The places of the tokens of B rows; fields are loosely typed, as they carry arrays, shapes and shardings alike.

    Attributes:
        position: [B, T] int32 index of each token in its own text; -1 is padding, seen by nobody.
        segment: [B, T] int32, which text of its row, ascending along the row; None where a row is one text. Texts see
            nothing of each other, although each one's positions begin at 0.
        branch: [B, T] int32; 0 is seen by all of its segment that come later, any other number by its own branch
            alone: a prompt (0) with several responses (1, 2, ...), each continuing its positions. None: all are 0.
    """

    position: Any
    segment: Any = None
    branch: Any = None

    def columns(self, start: int, end: int) -> Places:
        """Cut the tokens from `start` to `end` out of every row."""
        return jax.tree.map(lambda array: array[:, start:end], self)


def as_places(places: Places | jax.Array | np.ndarray) -> Places:
    """Take positions alone for the places of rows that are one text each."""
    return places if isinstance(places, Places) else Places(jnp.asarray(places))


def visible(query: Places, key: Places, window: Any = NO_WINDOW) -> Bool[Array, "B T S"]:
    """Say which key a query sees.

    One of its own text, of its own branch or of none, that is no padding, at 0 <= query - key < window.
    """
    position, other = query.position[:, :, None], key.position[:, None, :]
    seen = (other >= 0) & (other <= position) & (position - other < window)
    if query.segment is not None:
        seen &= query.segment[:, :, None] == key.segment[:, None, :]
    if query.branch is not None:
        branch = key.branch[:, None, :]
        seen &= (branch == 0) | (branch == query.branch[:, :, None])
    return seen
