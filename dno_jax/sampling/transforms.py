"""Drawing one token a row: temperature, then top-k, then top-p, then min-p.

The keys name the row and the position.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

# Width of the second level of the cumulative sum: one cache-friendly row.
_BLOCK = 128


@dataclass(frozen=True)
class Truncation:
    """The sampling distribution, in the order in which it is applied (Hugging Face's).

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: keep tokens at least as likely as the k-th likeliest; 0 keeps all.
        top_p: of those, keep a token iff the mass of strictly likelier ones is below p (so the likeliest always stays).
        min_p: of those, keep tokens with at least min_p times the probability of the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def address(
    *, seed: int, iteration: int | Int[Array, ""], prompt: UInt[Array, " B"], sample: Int[Array, " B"]
) -> Array:
    """Return one key a row, made of nothing but the row's address.

    Args:
        seed, iteration: of the run.
        prompt: 32 bits that name the prompt.
        sample: index of the sample.
    """
    base = jax.random.fold_in(jax.random.key(seed), iteration)
    return jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(base, p), s))(prompt, sample)


def without_padding(logits: Float[Array, "B V"], *, num_ids: int | None) -> Float[Array, "B V"]:
    """Make ids from `num_ids` on impossible: no token belongs to these rows of the embedding. None leaves all."""
    if num_ids is None or num_ids >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1])[None, :] < num_ids, logits, -jnp.inf)


def sample_token(
    row_key: Array, logits: Float[Array, "B V"], *, step: Int[Array, ""], truncation: Truncation
) -> Int[Array, " B"]:
    """Draw token number `step` of each row.

    Exact without a sort: a draw from everything that top-k and min-p keep is inside the nucleus iff the mass of
    strictly likelier tokens is below p; rows outside draw again under the next key. A row's token depends on its own
    key and logits only, however often its neighbours draw.

    Args:
        row_key: one key a row (`address`).
        logits: float32, unnormalised; -inf is never drawn.
        step: index of the token in the response.

    Returns:
        Token ids, int32.
    """
    if truncation.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / truncation.temperature
    kept = top_k_mask(scaled, truncation.top_k)
    mass = jnp.where(kept, jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True)), 0.0)  # the likeliest has mass 1
    drawable = jnp.where(mass >= truncation.min_p, mass, 0.0)
    key = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_key, step)
    draw = _inverse_cdf(drawable)

    def try_again(trial: Int[Array, ""]) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, trial)))(key)
        token = draw(uniform)
        return token, inside_nucleus(mass, token, top_p=truncation.top_p)

    token, accepted = try_again(jnp.int32(0))
    if truncation.top_p >= 1.0:
        return token

    def again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        trial, token, accepted = carry
        redrawn, inside = try_again(trial)
        return trial + 1, jnp.where(accepted, token, redrawn), accepted | inside

    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), again, (jnp.int32(1), token, accepted))[1]


def top_k_mask(logits: Float[Array, "B V"], top_k: int) -> Bool[Array, "B V"]:
    """Return which tokens are at least as likely as the k-th likeliest (ties at the cut stay); 0 keeps all."""
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return jnp.ones(logits.shape, bool)
    return logits >= jax.lax.top_k(logits, top_k)[0][:, -1:]


def inside_nucleus(mass: Float[Array, "B V"], token: Int[Array, " B"], *, top_p: float) -> Bool[Array, " B"]:
    """Return whether the mass of tokens strictly likelier than `token` is below top_p of the whole.

    Args:
        mass: unnormalised probabilities after top-k, zero where cut.
    """
    chosen = jnp.take_along_axis(mass, token[:, None], axis=-1)
    likelier = jnp.sum(jnp.where(mass > chosen, mass, 0.0), axis=-1)
    return likelier < top_p * jnp.sum(mass, axis=-1)


def _inverse_cdf(mass: Float[Array, "B V"]):
    """Return u in [0, 1) -> token with probability mass / sum(mass), by a cumulative sum of blocks, then within one."""
    batch, vocabulary = mass.shape
    blocks = -(-vocabulary // _BLOCK)
    mass_BNW = jnp.pad(mass, ((0, 0), (0, blocks * _BLOCK - vocabulary))).reshape(batch, blocks, _BLOCK)
    ends_BN = jnp.cumsum(jnp.sum(mass_BNW, axis=-1), axis=-1)

    def draw(uniform: Float[Array, " B"]) -> Int[Array, " B"]:
        goal = uniform * ends_BN[:, -1]
        block = _first_above(ends_BN, goal)
        before = jnp.where(
            block > 0, jnp.take_along_axis(ends_BN, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0
        )
        inside_BW = jnp.take_along_axis(mass_BNW, block[:, None, None], axis=1)[:, 0]
        token = _first_above(jnp.cumsum(inside_BW, axis=-1), goal - before)
        return (block * _BLOCK + token).astype(jnp.int32)

    return draw


def _first_above(ends: Float[Array, "B N"], goal: Float[Array, " B"]) -> Int[Array, " B"]:
    """Index of the first cumulative sum above the goal.

    Never past the last bin that has mass: rounding can ask for that.
    """
    index = jnp.sum(ends <= goal[:, None], axis=-1)
    last = jnp.argmax(ends >= ends[:, -1:], axis=-1)
    return jnp.minimum(index, last)
