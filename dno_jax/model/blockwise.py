"""Attention over packed rows in blocks, of which those that nobody sees are skipped: what a CPU packs with.

A row may hold many texts, so most of its square is dark. Which blocks are not depends on the batch, so the compiled
program goes through a list of them whose length it is told at run time. That cannot be differentiated, so the backward
pass is written out (Dao et al., arXiv 2205.14135: scores are computed again from the logarithm of each row's sum).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dno_jax.model.places import Places, visible

_BLOCK = 64
_UNSEEN = -0.7 * float(np.finfo(np.float32).max)


def blockwise_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    places: Places,
    *,
    window: Any,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """The `Attention` of packed rows on a CPU: one row after another, its visible blocks alone, in float32."""
    _, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    padding = -T % _BLOCK

    def one_row(row: tuple[Array, Array, Array, Places]) -> Array:
        q, k, v, own = row
        q_KGTH = _pad(q, padding).astype(jnp.float32).reshape(T + padding, K, N // K, H).transpose(1, 2, 0, 3)
        k_KTH, v_KTH = (_pad(array, padding).astype(jnp.float32).transpose(1, 0, 2) for array in (k, v))
        own = jax.tree.map(lambda array: jnp.pad(array, (0, padding), constant_values=-1)[None], own)
        mixed: Array = _mix(q_KGTH, k_KTH, v_KTH, own, jnp.asarray(window, jnp.int32), scale, softcap)
        return mixed.transpose(2, 0, 1, 3)[:T].reshape(T, N, H)

    return jax.lax.map(one_row, (q_BTNH, k_BTKH, v_BTKH, places)).astype(q_BTNH.dtype)


def _pad(array: Array, padding: int) -> Array:
    return jnp.pad(array, ((0, padding), (0, 0), (0, 0)))


def visible_blocks(places: Places, *, block: int) -> Bool[Array, "Q K"]:
    """Say which block of keys some query of a block may see; too many rather than too few.

    Args:
        places: of one row, [1, T], T a multiple of `block`.
    """

    def ends(array: Any) -> tuple[Array, Array]:
        blocks = array.reshape(-1, block)
        return jnp.min(blocks, axis=1), jnp.max(blocks, axis=1)

    count = places.position.shape[1] // block
    index = jnp.arange(count)
    seen = index[None] <= index[:, None]
    real = jnp.max(places.position.reshape(-1, block), axis=1) >= 0
    seen &= real[:, None] & real[None]
    if places.segment is not None:
        low, high = ends(places.segment)
        seen &= (low[None] <= high[:, None]) & (high[None] >= low[:, None])
        if places.branch is not None:
            least, most = ends(places.branch)
            # A block of one branch of one text is dark to a block of another branch of it.
            one = (low == high) & (least == most) & (least > 0)
            seen &= ~(one[:, None] & one[None] & (least[:, None] != least[None]))
    return seen


def _list_of(places: Places) -> tuple[Int[Array, " L"], Int[Array, " L"], Int[Array, ""]]:
    """Return (block of queries, block of keys) of each visible block, row-major, and their number."""
    seen = visible_blocks(places, block=_BLOCK)
    count = seen.shape[0]
    query, key = jnp.nonzero(seen, size=count * (count + 1) // 2, fill_value=0)
    return query.astype(jnp.int32), key.astype(jnp.int32), jnp.sum(seen).astype(jnp.int32)


def _at(array: Array, index: Array, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, index * _BLOCK, _BLOCK, axis=axis)


def _put(array: Array, part: Array, index: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, part, index * _BLOCK, axis=axis)


def _scores(
    q_KGQH: Array, k_KSH: Array, mask_QS: Array, scale: float, softcap: float | None
) -> tuple[Array, Array | None]:
    """Return masked scores [K, G, Q, S], and what the soft cap's tanh gave."""
    score = jnp.einsum("kgqh,ksh->kgqs", q_KGQH, k_KSH, precision=jax.lax.Precision.HIGHEST) * scale
    bent = None
    if softcap is not None:
        bent = jnp.tanh(score / softcap)
        score = softcap * bent
    return jnp.where(mask_QS, score, _UNSEEN), bent


def _mask(places: Places, query: Array, key: Array, window: Any) -> Array:
    return visible(
        jax.tree.map(lambda array: _at(array, query, 1), places),
        jax.tree.map(lambda array: _at(array, key, 1), places),
        window,
    )[0]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _mix(
    q_KGTH: Array, k_KTH: Array, v_KTH: Array, places: Places, window: Any, scale: float, softcap: float | None
) -> Array:
    return _forward(q_KGTH, k_KTH, v_KTH, places, window, scale, softcap)[0]


def _forward(
    q_KGTH: Array, k_KTH: Array, v_KTH: Array, places: Places, window: Any, scale: float, softcap: float | None
) -> tuple[Array, tuple[Any, ...]]:
    queries, keys, count = _list_of(places)

    def step(index: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, largest, total = carry
        i, j = queries[index], keys[index]
        score, _ = _scores(_at(q_KGTH, i, 2), _at(k_KTH, j, 1), _mask(places, i, j, window), scale, softcap)
        before = _at(largest, i, 2)
        now = jnp.maximum(before, jnp.max(score, axis=-1))
        weight = jnp.exp(score - now[..., None])
        shrink = jnp.exp(before - now)
        added = jnp.einsum("kgqs,ksh->kgqh", weight, _at(v_KTH, j, 1), precision=jax.lax.Precision.HIGHEST)
        mixed = _put(mixed, _at(mixed, i, 2) * shrink[..., None] + added, i, 2)
        total = _put(total, _at(total, i, 2) * shrink + jnp.sum(weight, axis=-1), i, 2)
        return mixed, _put(largest, now, i, 2), total

    start = (jnp.zeros_like(q_KGTH), jnp.full(q_KGTH.shape[:3], _UNSEEN), jnp.zeros(q_KGTH.shape[:3]))
    mixed, largest, total = jax.lax.fori_loop(0, count, step, start)
    total = jnp.maximum(total, 1e-30)
    mixed = mixed / total[..., None]
    logsum = largest + jnp.log(total)
    return mixed, (q_KGTH, k_KTH, v_KTH, places, window, mixed, logsum)


def _backward(scale: float, softcap: float | None, kept: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    q_KGTH, k_KTH, v_KTH, places, window, mixed, logsum = kept
    queries, keys, count = _list_of(places)
    delta = jnp.sum(mixed * cotangent, axis=-1)
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(index: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = carry
        i, j = queries[index], keys[index]
        q, k, v, g = _at(q_KGTH, i, 2), _at(k_KTH, j, 1), _at(v_KTH, j, 1), _at(cotangent, i, 2)
        mask = _mask(places, i, j, window)
        score, bent = _scores(q, k, mask, scale, softcap)
        weight = jnp.where(mask, jnp.exp(score - _at(logsum, i, 2)[..., None]), 0.0)
        dscore = weight * (exact("kgqh,ksh->kgqs", g, v) - _at(delta, i, 2)[..., None]) * scale
        if bent is not None:
            dscore = dscore * (1.0 - bent * bent)
        dq = _put(dq, _at(dq, i, 2) + exact("kgqs,ksh->kgqh", dscore, k), i, 2)
        dk = _put(dk, _at(dk, j, 1) + exact("kgqs,kgqh->ksh", dscore, q), j, 1)
        dv = _put(dv, _at(dv, j, 1) + exact("kgqs,kgqh->ksh", weight, g), j, 1)
        return dq, dk, dv

    grads = jax.lax.fori_loop(0, count, step, tuple(jnp.zeros_like(array) for array in (q_KGTH, k_KTH, v_KTH)))
    nothing = jax.tree.map(lambda array: np.zeros(array.shape, jax.dtypes.float0), (places, window))
    return (*grads, *nothing)


_mix.defvjp(_forward, _backward)
