"""Drawing one token per row: repetition penalty, temperature, top-k, top-p, min-p, in this order.

The keys name the row and the position. Tokens of equal mass share their fate: top-k, top-p and min-p keep all of them
or none, where a sort would part them by the accident of their ids. Mass is float32, relative to the likeliest token:
one below about 1e-38 of it is never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from dno_jax.addresses import Purpose, key_data
from dno_jax.config import MIN_TEMPERATURE

# Width of the second level of the cumulative sum: one cache-friendly row.
_BLOCK = 128
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@dataclass(frozen=True)
class Truncation:
    """The sampling distribution, applied in Hugging Face's order: repetition, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: logits are divided by it (from 1e-6 on); 0 takes the likeliest token, of several the lowest id.
        top_k: keep tokens at least as likely as the k-th likeliest (more than k where some tie with it); 0 keeps all.
        top_p: of those, keep a token iff the mass of strictly likelier ones is below p (so the likeliest always stays).
        min_p: of those, keep tokens with at least min_p times the probability of the likeliest.
        repetition_penalty: first of all, the logit l of every id seen in the prompt or the response so far becomes
            l / penalty where l > 0 and l * penalty elsewhere (CTRL, arXiv 1909.05858, 4.1, as Hugging Face has it).

    Raises:
        ValueError: a number is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # Written so that NaN fails every one of them.
        for name, valid, expected in (
            (
                "temperature",
                self.temperature == 0.0 or MIN_TEMPERATURE <= self.temperature < math.inf,
                f"at least {MIN_TEMPERATURE} and finite, or 0, which takes the likeliest token",
            ),
            ("top_k", self.top_k >= 0, "at least 0; 0 keeps every token"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1; 1 keeps every token, temperature 0 is greedy"),
            ("min_p", 0.0 <= self.min_p < 1.0, "at least 0 and below 1; 0 keeps every token"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "above 0 and finite; 1 penalises nothing"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")


def address(
    *,
    purpose: Purpose,
    seed: int,
    iteration: int | Int[Array, ""],
    prompt: UInt[Array, " B"],
    sample: Int[Array, " B"],
) -> Array:
    """Return one key per row, uint32 [B, 2], made of nothing but the row's address.

    Args:
        seed, iteration: of the run.
        prompt: 32 bits that name the prompt.
        sample: index of the sample.
    """
    base = jax.random.wrap_key_data(jnp.asarray(key_data(purpose, seed)), impl="threefry2x32")
    base = jax.random.fold_in(base, iteration)
    return jax.random.key_data(
        jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(base, p), s))(prompt, sample)
    )


def uniform(row_key: UInt[Array, "B 2"], *, step: Int[Array, " B"], trial: Int[Array, ""]) -> Float[Array, " B"]:
    """Return one number per row in [0, 1), a multiple of 2^-24: Threefry-2x32-20 of (step, trial) under the row's key.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011). jax.random would take three blocks where one
    does, each in a loop of small kernels on a CPU: a fifth of a small model's step.
    """
    count = step.astype(jnp.uint32), jnp.broadcast_to(trial, step.shape).astype(jnp.uint32)
    bits, _ = _threefry2x32((row_key[:, 0], row_key[:, 1]), count)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _threefry2x32(key: tuple[Array, Array], count: tuple[Array, Array]) -> tuple[Array, Array]:
    """Hash two words under two key words, 20 rounds."""
    words = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = count[0] + words[0], count[1] + words[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def without_padding(logits: Float[Array, "B V"], *, num_ids: int | None) -> Float[Array, "B V"]:
    """Make ids from `num_ids` on impossible: no token belongs to these rows of the embedding. None leaves all."""
    if num_ids is None or num_ids >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1])[None, :] < num_ids, logits, -jnp.inf)


def sample_token(
    row_key: UInt[Array, "B 2"],
    logits: Float[Array, "B V"],
    *,
    step: Int[Array, " B"] | Int[Array, ""],
    truncation: Truncation,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Draw one token per row, in the row's own step of its response.

    Exact without a sort: a draw from everything that top-k and min-p keep is inside the nucleus iff the mass of
    strictly likelier tokens is below p; rows outside draw again, under the next key and among strictly likelier tokens
    only, since all others are outside too. A rejection thus removes at least one token and never the likeliest, so the
    loop ends, whatever the logits are. A row's token depends on its own key, logits, step and seen ids only, however
    often its neighbours draw. Probabilities are right to 2^-24, the step of the uniform number.

    Args:
        row_key: one key per row (`address`).
        logits: float32, unnormalised; -inf is never drawn. A row that holds NaN or +inf, or nothing but -inf, gets an
            id that means nothing, at the first trial.
        step: index of the token in its response, one per row or one for all rows.
        seen: ids of the prompt and the response so far; needed where there is a repetition penalty.

    Returns:
        Token ids, int32.

    Raises:
        ValueError: a repetition penalty without `seen`.
    """
    logits = penalised(logits, seen, penalty=truncation.repetition_penalty)
    if truncation.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    mass = relative_mass(logits, truncation=truncation)
    drawable = jnp.where(mass < truncation.min_p, 0.0, mass)
    step = jnp.broadcast_to(step, (logits.shape[0],))

    def draw(drawable: Array, trial: Int[Array, ""]) -> Int[Array, " B"]:
        return _inverse_cdf(drawable)(uniform(row_key, step=step, trial=trial))

    token = draw(drawable, jnp.int32(0))
    if truncation.top_p >= 1.0:
        return token

    def again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        trial, token, accepted = carry
        likelier = jnp.where(mass > _of(mass, token)[:, None], drawable, 0.0)
        token = jnp.where(accepted, token, draw(likelier, trial))
        return trial + 1, token, accepted | inside_nucleus(mass, _of(mass, token), top_p=truncation.top_p)

    accepted = inside_nucleus(mass, _of(mass, token), top_p=truncation.top_p)
    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), again, (jnp.int32(1), token, accepted))[1]


def drawn_logprobs(
    logits: Float[Array, "B V"],
    token: Int[Array, " B"],
    *,
    truncation: Truncation,
    seen: Bool[Array, "B V"] | None = None,
) -> Float[Array, " B"]:
    """Return the log-probability of each row's token under the distribution that `sample_token` draws it from.

    Args:
        logits, truncation, seen: as `sample_token` had them.
        token: one id per row.

    Returns:
        float32, nats: log(mass of the token / mass of all that is kept), -inf for a token that is not kept, NaN where
        the row holds NaN or +inf. At temperature 0 all mass is on the token that is taken: 0 for it, -inf for others.
    """
    logits = penalised(logits, seen, penalty=truncation.repetition_penalty)
    if truncation.temperature == 0.0:
        return jnp.where(token == jnp.argmax(logits, axis=-1), 0.0, -jnp.inf)
    mass = relative_mass(logits, truncation=truncation)
    drawable = jnp.where(mass < truncation.min_p, 0.0, mass)
    chosen = _of(drawable, token)
    if truncation.top_p >= 1.0:
        return jnp.log(chosen) - jnp.log(jnp.sum(drawable, axis=-1))
    # Two programs may add the same mass in another order. A token that rounding puts on the border was drawn if it is
    # asked for, so it counts as kept; the errors of V roundings add up to about sqrt(V) of one.
    slack = 1.0 + float(jnp.finfo(mass.dtype).eps) * math.sqrt(mass.shape[-1])
    drawn = inside_nucleus(mass, chosen, top_p=truncation.top_p * slack)
    border = _least(partial(inside_nucleus, mass, top_p=truncation.top_p), len(mass))
    least = jnp.minimum(border, chosen)
    kept = jnp.sum(jnp.where(mass < least[:, None], 0.0, drawable), axis=-1)
    return jnp.where(drawn, jnp.log(chosen) - jnp.log(kept), -jnp.inf)


def penalised(logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, *, penalty: float) -> Float[Array, "B V"]:
    """Apply the repetition penalty to the ids that were seen.

    Raises:
        ValueError: there is a penalty but no `seen`.
    """
    if penalty == 1.0:
        return logits
    if seen is None:
        raise ValueError(f"repetition_penalty is {penalty} but seen is None; pass the ids of prompt and response")
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def relative_mass(logits: Float[Array, "B V"], *, truncation: Truncation) -> Float[Array, "B V"]:
    """Return each token's probability over that of the likeliest, in [0, 1], after temperature and top-k.

    NaN stays NaN here and in every later cut, so that a sum tells a broken row; a maximum need not (on a CPU).
    """
    # The difference first: dividing large logits by a small temperature would overflow.
    distance = jnp.max(logits, axis=-1, keepdims=True) - logits
    mass = jnp.exp(-distance / truncation.temperature)
    if truncation.top_k == 0:
        return mass

    def enough(level: Float[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.sum(distance <= level[:, None], axis=-1) >= min(truncation.top_k, logits.shape[-1])

    return jnp.where(distance > _least(enough, len(logits))[:, None], 0.0, mass)


def inside_nucleus(mass: Float[Array, "B V"], level: Float[Array, " B"], *, top_p: float) -> Bool[Array, " B"]:
    """Return whether tokens of this mass are kept by top-p: those strictly likelier have less than top_p of the whole.

    Args:
        mass: unnormalised probabilities after top-k, zero where cut.
        level: mass of the token in question.
    """
    likelier = jnp.sum(jnp.where(mass > level[:, None], mass, 0.0), axis=-1)
    # "Not too much" instead of "little enough" lets a row of NaN in, which would be drawn for ever; nothing likelier is
    # inside even where top_p is so small that its product is 0.
    return ~(likelier >= top_p * jnp.sum(mass, axis=-1)) | (likelier == 0.0)


def _least(holds: Callable[[Float[Array, " B"]], Bool[Array, " B"]], batch: int) -> Float[Array, " B"]:
    """Return each row's least level, from 0, at which a condition holds that holds from some level on.

    Bisection over the bits of a float, which are in the order of the floats: 31 passes over the logits find the k-th
    likeliest or the border of the nucleus exactly, where a sort takes ten times as long on a CPU.
    """

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bounds
        middle = below + (above - below) // 2
        found = holds(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(found, below, middle), jnp.where(found, middle, above)

    infinity = jnp.full(batch, 0x7F800000, jnp.int32)
    bits = jax.lax.fori_loop(0, 31, halve, (jnp.full(batch, -1, jnp.int32), infinity))[1]
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _of(mass: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.take_along_axis(mass, token[:, None], axis=-1)[:, 0]


def _inverse_cdf(mass: Float[Array, "B V"]) -> Callable[[Float[Array, " B"]], Int[Array, " B"]]:
    """Return u in [0, 1) -> token with probability mass / sum(mass), by a cumulative sum of blocks, then within one."""
    batch, vocabulary = mass.shape
    blocks = -(-vocabulary // _BLOCK)
    mass_BNW = jnp.pad(mass, ((0, 0), (0, blocks * _BLOCK - vocabulary))).reshape(batch, blocks, _BLOCK)
    mass_BN = jnp.sum(mass_BNW, axis=-1)
    ends_BN = jnp.cumsum(mass_BN, axis=-1)

    def draw(uniform: Float[Array, " B"]) -> Int[Array, " B"]:
        goal = uniform * ends_BN[:, -1]
        block = _first_above(mass_BN, ends_BN, goal)
        before = jnp.where(block > 0, _of(ends_BN, jnp.maximum(block - 1, 0)), 0.0)
        inside_BW = jnp.take_along_axis(mass_BNW, block[:, None, None], axis=1)[:, 0]
        token = _first_above(inside_BW, jnp.cumsum(inside_BW, axis=-1), goal - before)
        return (block * _BLOCK + token).astype(jnp.int32)

    return draw


def _first_above(mass: Float[Array, "B N"], ends: Float[Array, "B N"], goal: Float[Array, " B"]) -> Int[Array, " B"]:
    """Index of the first bin with mass whose cumulative sum is above the goal; the last with mass where none is.

    A bin without mass is never it, though sums that are made in parallel can rise there, and fall elsewhere, by a
    rounding. Without any mass it is 0.
    """
    place = jnp.arange(mass.shape[-1])[None, :]
    last = jnp.max(jnp.where(mass > 0, place, 0), axis=-1)
    first = jnp.min(jnp.where((mass > 0) & (ends > goal[:, None]), place, mass.shape[-1]), axis=-1)
    return jnp.minimum(first, last)
