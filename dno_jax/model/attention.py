"""Attention: which key a query sees, and how values are mixed. One masking rule for every back-end: positions.

A back-end mixes whole sequences (training, scoring, the first call that fills a cache): any callable of the form of
`Attention`, injected into the decoder. Calls that see a cache take `attend`, whose operands lie as the cache does.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dno_jax.logprobs import einsum_float32

# Finite, so that a row that sees nothing becomes a mean over everything instead of NaN, in the backward pass too.
_UNSEEN = -0.7 * float(np.finfo(np.float32).max)

# Measured on a CPU at T = 256 and 512: blocks of 32 to 128 queries are within 15 % of each other,
# all twice as fast as none.
_QUERY_BLOCKS, _SHORTEST_BLOCK = 8, 64

# The window of a layer without one: wider than any text.
NO_WINDOW = int(np.iinfo(np.int32).max)


@runtime_checkable
class Attention(Protocol):
    """Mixes values over a whole sequence."""

    def __call__(
        self,
        q_BTNH: Any,
        k_BTKH: Any,
        v_BTKH: Any,
        *,
        position_BT: Any,
        window: Any,
        scale: float,
        softcap: float | None,
    ) -> Any:
        """Return [B, T, N, H] in the dtype of q.

        Args:
            q_BTNH, k_BTKH, v_BTKH: queries, keys and values of the same tokens, rotated already; each group of N/K
                query heads shares one key head.
            position_BT: int32; -1 is padding, seen by nobody. Tokens stand in order of position along a row; what
                padding gives is finite and means nothing.
            window: int32 scalar, this layer's: a query at p sees keys at p - window + 1 .. p; NO_WINDOW for all.
            scale: scores are multiplied by it.
            softcap: scores s become softcap * tanh(s / softcap); None leaves them.
        """
        ...


def visible(query: Int[Array, "B T"], key: Int[Array, "B S"], window: Any = NO_WINDOW) -> Bool[Array, "B T S"]:
    """Say which key a query sees, from positions alone: 0 <= query - key < window, and no key that is padding."""
    query, key = query[:, :, None], key[:, None, :]
    return (key >= 0) & (key <= query) & (query - key < window)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Mix values by scaled dot products, each group of N/K query heads over one key head; softmax in float32.

    Keys lie with slots innermost: a decode step then reads both caches in the order in which they lie in memory.
    A query that sees no key gives a finite value that means nothing.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = einsum_float32("btkgh,bkhs->bkgts", q_BTKGH, k_BKHS) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, _UNSEEN)
    weight = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    mixed = einsum_float32("bkgts,bksh->btkgh", weight, v_BKSH)
    return mixed.reshape(B, T, N, H).astype(q_BTNH.dtype)


def xla_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    position_BT: Int[Array, "B T"],
    window: Any,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """The `Attention` that runs everywhere: blocks of queries, each against the keys up to its own end.

    Half of the work of the whole square, and scores that fit a processor's cache.
    """
    k_BKHS, v_BKSH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)
    length = q_BTNH.shape[1]
    block = max(_SHORTEST_BLOCK, -(-length // _QUERY_BLOCKS))
    mixed = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = visible(position_BT[:, start:end], position_BT[:, :end], window)
        mixed.append(
            attend(q_BTNH[:, start:end], k_BKHS[..., :end], v_BKSH[:, :, :end], mask, scale=scale, softcap=softcap)
        )
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=1)
