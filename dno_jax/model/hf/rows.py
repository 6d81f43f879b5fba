"""Whether training has touched rows of an embedding, told from the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.hf.files import EMBED, TensorFiles

_COMPARED = 256  # rows of words, and of other added tokens, that are looked at besides
_NEAR_ZERO = 0.01  # of the norm of a word's row
_NEAR = 1e-4  # likewise, of the distance between two rows that are the same


def untrained_rows(path: str | Path, ids: Collection[int], *, added: Collection[int]) -> frozenset[int]:
    """Return the ids whose rows of the embedding no training has touched: near zero, or equal to another token's.

    A base model reserves rows for tokens that only its chat model has learned. Two that were trained are never equal.

    Args:
        path: checkpoint directory; where its weights cannot be read, whoever reads them says so, and here is nothing.
        ids: tokens that are asked about.
        added: tokens with which their rows are compared.
    """
    try:
        with contextlib.closing(TensorFiles(Path(path))) as files:
            num_rows = files.headers[EMBED].shape[0]
            words = np.linspace(0, num_rows - 1, min(_COMPARED, num_rows)).astype(int)
            others = sorted({*ids, *sorted(added)[:_COMPARED]})
            rows = {
                i: files.read(EMBED, (slice(i, i + 1), slice(None)))[0]
                for i in {*words.tolist(), *others}
                if i < num_rows
            }
    except (DnoError, KeyError, OSError):
        return frozenset()
    scale = float(np.median([np.linalg.norm(rows[i]) for i in words.tolist()]))

    def is_untrained(token: int) -> bool:
        row = rows[token]
        same = (
            np.linalg.norm(row - rows[other]) <= _NEAR * scale for other in others if other in rows and other != token
        )
        return bool(np.linalg.norm(row) <= _NEAR_ZERO * scale) or any(same)

    return frozenset(token for token in ids if token in rows and is_untrained(token))
