"""The gated delta rule: a state of fixed size that a text writes into and reads from, in place of keys and values.

Token t of a head, with key k and query q [H], value v [P], decay a = exp(g) and strength b, changes the state S [H, P]
and reads it (Gated Delta Networks, arXiv 2412.06464, Eq. 10):

    S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T        o_t = S_t^T q_t

`delta_step` is that, for one token. `delta_rule` does a chunk of tokens at once by the same paper's section 3.3: with
c the decays of a chunk added up and D_ij = exp(c_i - c_j) for j <= i, what tokens write, U - W S_0, follows from

    (I + tril(b K K^T * D, -1)) [U, W] = [b V, b exp(c) K]

Keys and queries are brought to unit length first, and queries divided by sqrt(H). S is float32, as are all products:
what is written stays, rounding too.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 64
_EPS = 1e-6  # of the norm of queries and keys
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def unit(x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
    """Return x / sqrt(sum x^2 + 1e-6), float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)


def delta_rule(
    q_BTKH: Float[Array, "B T K H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTVP: Float[Array, "B T V P"],
    *,
    log_decay: Float[Array, "B T V"],
    strength: Float[Array, "B T V"],
    begins: Bool[Array, "B T"],
    state: Float[Array, "B V H P"],
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T V P"], Float[Array, "B V H P"]]:
    """Run tokens through the rule, a chunk at a time.

    Args:
        q_BTKH, k_BTKH: of any length and dtype; each of K heads serves V / K consecutive value heads.
        log_decay: g, at most 0; with strength 0, a token of log_decay 0 leaves the state as it is.
        strength: b, in [0, 1].
        begins: whether a text begins with a token; what came before it in its row is forgotten there.
        state: before the first token.

    Returns:
        (o in float32, the state after the last token). Only states between chunks are kept for a backward pass.
    """
    B, T, K, H = q_BTKH.shape
    V, P = v_BTVP.shape[2:]
    chunk = min(chunk, 1 << max(T - 1, 0).bit_length())
    padding = -T % chunk

    def chunks(array: Array, *heads: int) -> Array:
        """[B, T, heads..., rest...] -> [T / C, B, heads..., C, rest...]."""
        array = jnp.pad(array, [(0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)])
        rest = array.shape[3:] if heads else array.shape[2:]
        array = array.reshape(B, -1, chunk, *heads, *rest)
        return jnp.moveaxis(jnp.moveaxis(array, 1, 0), 2, 2 + len(heads))

    parts = (
        chunks(q_BTKH, K),
        chunks(k_BTKH, K),
        chunks(v_BTVP, K, V // K),
        chunks(log_decay, K, V // K),
        chunks(strength, K, V // K),
        chunks(begins),
    )
    state, out = jax.lax.scan(jax.checkpoint(_chunk), state.reshape(B, K, V // K, H, P), parts)
    out = jnp.moveaxis(jnp.moveaxis(out, 4, 2), 0, 1).reshape(B, -1, V, P)
    return out[:, :T], state.reshape(B, V, H, P)


def _chunk(state: Array, parts: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk: state [B, K, G, H, P]; q, k [B, K, C, H], v [B, K, G, C, P], g, b [B, K, G, C], begins [B, C]."""
    q, k, v, log_decay, strength, begins = parts
    # Widened here: a whole text's would lie in memory twice as large.
    q, k, v = unit(q) * q.shape[-1] ** -0.5, unit(k), v.astype(jnp.float32)
    # Which text of the chunk a token is of; 0 is the one that the state has read.
    text = jnp.cumsum(begins, axis=-1)[:, None, None]
    joined = jnp.tril(text[..., :, None] == text[..., None, :])
    # Added up within each text by itself: not even in rounding does one depend on what stands before it in its row.
    total = _einsum("bkgd,bcd->bkgc", log_decay, joined[:, 0, 0].astype(jnp.float32))
    # Chosen before the exponential: above the diagonal it might be infinite, and its gradient no number.
    decay = jnp.exp(jnp.where(joined, total[..., :, None] - total[..., None, :], -jnp.inf))
    since_state = jnp.where(text == 0, jnp.exp(total), 0)
    last, of_last = total[..., -1:], text == text[..., -1:]
    until_end = jnp.where(of_last, jnp.exp(jnp.where(of_last, last - total, 0)), 0)

    keys = _einsum("bkch,bkdh->bkcd", k, k)[:, :, None] * decay * strength[..., None]
    inverse = unit_lower_inverse(jnp.tril(keys, -1))
    read = _einsum("bkch,bkghp->bkgcp", k, state) * since_state[..., None]
    written = _einsum("bkgcd,bkgdp->bkgcp", inverse, strength[..., None] * (v - read))
    seen = _einsum("bkch,bkdh->bkcd", q, k)[:, :, None] * decay
    out = _einsum("bkch,bkghp->bkgcp", q, state) * since_state[..., None]
    out = out + _einsum("bkgcd,bkgdp->bkgcp", seen, written)
    kept = state * since_state[..., -1][..., None, None]
    return kept + _einsum("bkch,bkgcp->bkghp", k, written * until_end[..., None]), out


@jax.custom_vjp
def unit_lower_inverse(below: Float[Array, "*rows C C"]) -> Float[Array, "*rows C C"]:
    """Return (I + below)^-1 of strictly lower triangular matrices, C a power of 2, by products alone.

    The inverse of twice a block follows from those of both halves: [[X, 0], [-Y Z X, Y]]. A triangular solver would do
    the same number by number, and no partitioner cuts it by heads.
    """
    size = below.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=below.dtype), below.shape)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, below.shape, below.ndim - 2 + axis) for axis in (0, 1))
    half = 1
    while half < size:
        across = (row // (2 * half) == column // (2 * half)) & (row // half != column // half)
        inverse = inverse - _einsum("...cd,...de,...ef->...cf", inverse, jnp.where(across, below, 0), inverse)
        half *= 2
    return inverse


def _inverse_forward(below: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(below)
    return inverse, inverse


def _inverse_backward(inverse: Array, cotangent: Array) -> tuple[Array]:
    return (jnp.tril(-_einsum("...dc,...de,...fe->...cf", inverse, cotangent, inverse), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def delta_step(
    q_BKH: Float[Array, "B K H"],
    k_BKH: Float[Array, "B K H"],
    v_BVP: Float[Array, "B V P"],
    *,
    log_decay: Float[Array, "B V"],
    strength: Float[Array, "B V"],
    begins: Bool[Array, " B"],
    state: Float[Array, "B V H P"],
) -> tuple[Float[Array, "B V P"], Float[Array, "B V H P"]]:
    """Run one token through the rule; arguments and results as those of `delta_rule`."""
    B, K, H = q_BKH.shape
    V, P = v_BVP.shape[1:]
    grouped = state.reshape(B, K, V // K, H, P)
    kept = jnp.where(begins[:, None], 0, jnp.exp(log_decay)).reshape(B, K, V // K, 1, 1)
    grouped = grouped * kept
    # Sums that read the state where it lies: as products of one row, each would copy it first.
    q, k = (array[:, :, None, :, None] for array in (unit(q_BKH) * H**-0.5, unit(k_BKH)))
    read = jnp.sum(grouped * k, axis=3)
    strength = strength.reshape(B, K, V // K, 1)
    written = strength * (v_BVP.astype(jnp.float32).reshape(B, K, V // K, P) - read)
    grouped = grouped + k * written[..., None, :]
    return jnp.sum(grouped * q, axis=3).reshape(B, V, P), grouped.reshape(B, V, H, P)
