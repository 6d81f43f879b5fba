"""Attention: which key a query sees, and how values are mixed. One masking rule for every back-end: `visible`.

A back-end mixes whole sequences (training, scoring, the first call that fills a cache): any callable of the form of
`Attention`, injected into the decoder. Calls that see a cache take `attend`, whose operands lie as the cache does.

`xla_attention` runs everywhere and reads places themselves. The kernels, `CudnnAttention` and `SplashAttention`,
count slots instead, which is the same because a row's tokens lie side by side in order, with padding only before and
after them. They know nothing of meshes: parallel/attention.py puts them on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dno_jax.logprobs import einsum_float32
from dno_jax.model.blockwise import blockwise_attention
from dno_jax.model.places import NO_WINDOW, Places, visible

# Finite, so that a row that sees nothing becomes a mean over everything instead of NaN, in the backward pass too.
_UNSEEN = -0.7 * float(np.finfo(np.float32).max)

# Measured on a CPU at T = 256 and 512: blocks of 32 to 128 queries are within 15 % of each other,
# all twice as fast as none.
_QUERY_BLOCKS, _SHORTEST_BLOCK = 8, 64

# Up to so many tokens a row that is one text has nothing to skip that would pay for the list of what is not.
_WORTH_SKIPPING = 128

# Columns of a cache that are summed side by side: some vectors of any CPU, and what `reaches` are multiples of.
_RUN = 64


@runtime_checkable
class Attention(Protocol):
    """Mixes values over a whole sequence."""

    def __call__(
        self,
        q_BTNH: Any,
        k_BTKH: Any,
        v_BTKH: Any,
        *,
        places: Places,
        window: Any,
        scale: float,
        softcap: float | None,
    ) -> Any:
        """Return [B, T, N, H] in the dtype of q.

        Args:
            q_BTNH, k_BTKH, v_BTKH: queries, keys and values of the same tokens, rotated already; each group of N/K
                query heads shares one key head.
            places: of the tokens. A text's tokens lie side by side in order of position, its branches one after the
                other, with padding before all texts of a row or after; what padding gives is finite and means nothing.
            window: int32 scalar, this layer's: a query at p sees keys at p - window + 1 .. p; NO_WINDOW for all.
            scale: scores are multiplied by it.
            softcap: scores s become softcap * tanh(s / softcap); None leaves them.
        """
        ...


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKHS: Array,
    v_BKHS: Array,
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    k_scale_BKS: Float[Array, "B K S"] | None = None,
    v_scale_BKS: Float[Array, "B K S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Mix values by scaled dot products, each group of N/K query heads over one key head; softmax in float32.

    Keys and values [B, K, H, S] lie with slots innermost: a decode step then reads both caches in the order in which
    they lie in memory. A query that sees no key gives a finite value that means nothing.

    Args:
        k_scale_BKS, v_scale_BKS: what the columns of a quantised cache are multiplied by; they multiply scores and
            weights instead, a number a column in place of H.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    # One matrix a key head, the queries of its group below each other: a plain batched product on every platform. With
    # group and length as two axes a decode step on a CPU took four to ten times as long.
    q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = _by_platform(_scores, _scores_in_place, T)(q_BKMH, k_BKHS)
    if k_scale_BKS is not None:
        scores = scores * k_scale_BKS[:, :, None]
    scores = scores.reshape(B, K, N // K, T, S) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, _UNSEEN)
    weight = jax.nn.softmax(scores, axis=-1).reshape(B, K, -1, S)
    if v_scale_BKS is not None:
        weight = weight * v_scale_BKS[:, :, None]
    mixed = _by_platform(_mixed, _mixed_in_place, T)(weight.astype(q_BTNH.dtype), v_BKHS).reshape(B, K, N // K, T, H)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _by_platform(products: Callable[..., Array], sums: Callable[..., Array], length: int) -> Callable[..., Array]:
    """Choose how queries meet a cache: one query a row by sums on a CPU, all else by products.

    XLA's CPU products take whole arrays, so that the part of a cache that is read would be copied for each. Elementwise
    sums read it where it lies, and take a third to a fifth of the time (docs/benchmarks.md).
    """

    def chosen(*operands: Array) -> Array:
        return jax.lax.platform_dependent(*operands, cpu=sums, default=products)

    return products if length > 1 else chosen


def _scores(q_BKMH: Array, k_BKHS: Array) -> Array:
    return einsum_float32("bkmh,bkhs->bkms", q_BKMH, k_BKHS.astype(q_BKMH.dtype))


def _mixed(weight_BKMS: Array, v_BKHS: Array) -> Array:
    return einsum_float32("bkms,bkhs->bkmh", weight_BKMS, v_BKHS.astype(weight_BKMS.dtype))


# The sums are written out term by term: XLA's CPU reductions go number by number, or by way of a copy. Jitted, so that
# layers share one trace.
@jax.jit
def _scores_in_place(q_BKMH: Array, k_BKHS: Array) -> Array:
    q, terms = q_BKMH.astype(jnp.float32), range(q_BKMH.shape[3])
    return reduce(jnp.add, (q[..., h, None] * k_BKHS[:, :, None, h].astype(jnp.float32) for h in terms))


@jax.jit
def _mixed_in_place(weight_BKMS: Array, v_BKHS: Array) -> Array:
    """Add runs of columns one onto the other, then what lies side by side: many sums at a time fill a CPU's vectors."""

    def term(first: int) -> Array:
        run = slice(first, min(first + _RUN, v_BKHS.shape[3]))
        product = weight_BKMS[:, :, :, None, run].astype(jnp.float32) * v_BKHS[:, :, None, :, run].astype(jnp.float32)
        return jnp.pad(product, [(0, 0)] * 4 + [(0, _RUN - (run.stop - run.start))])

    mixed = reduce(jnp.add, map(term, range(0, v_BKHS.shape[3], _RUN)))
    while (half := mixed.shape[-1] // 2) > 0:
        mixed = mixed[..., :half] + mixed[..., half:]
    return mixed[..., 0]


def xla_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    places: Places,
    window: Any,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """The `Attention` that runs everywhere, in XLA's own operations; a CPU takes blocks that nobody sees out of it."""
    settings = {"window": window, "scale": scale, "softcap": softcap}
    everywhere = partial(_against_prefixes, **settings)
    if places.segment is None and q_BTNH.shape[1] <= _WORTH_SKIPPING:
        return everywhere(q_BTNH, k_BTKH, v_BTKH, places)
    skipping = partial(blockwise_attention, **settings)
    return jax.lax.platform_dependent(q_BTNH, k_BTKH, v_BTKH, places, cpu=skipping, default=everywhere)


def _against_prefixes(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, places: Places, *, window: Any, scale: float, softcap: float | None
) -> Array:
    """Mix in blocks of queries, each against the keys up to its own end: half of the work of the whole square."""
    k_BKHS, v_BKHS = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 3, 1)
    length = q_BTNH.shape[1]
    block = max(_SHORTEST_BLOCK, -(-length // _QUERY_BLOCKS))
    starts = range(0, length, block)
    ends = tuple(min(start + block, length) for start in starts)
    mixed = []
    for start, end, keys, values in zip(starts, ends, _prefixes(k_BKHS, ends), _prefixes(v_BKHS, ends), strict=True):
        mask = visible(places.columns(start, end), places.columns(0, end), window)
        mixed.append(attend(q_BTNH[:, start:end], keys, values, mask, scale=scale, softcap=softcap))
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _prefixes(array_BKHS: Array, ends: tuple[int, ...]) -> tuple[Array, ...]:
    """Return the first columns of an array up to each end, ascending; their gradients are added up in place.

    Left alone, each gradient is padded to the whole first, which took a fifth of a layer's backward pass on a CPU.
    """
    return tuple(array_BKHS[..., :end] for end in ends)


def _prefixes_forward(array_BKHS: Array, ends: tuple[int, ...]) -> tuple[tuple[Array, ...], None]:
    return _prefixes(array_BKHS, ends), None


def _prefixes_backward(ends: tuple[int, ...], _: None, cotangents: tuple[Array, ...]) -> tuple[Array]:
    total = cotangents[-1]
    for end, own in zip(ends[-2::-1], cotangents[-2::-1], strict=True):
        total = jax.lax.dynamic_update_slice(total, total[..., :end] + own, (0,) * total.ndim)
    return (jax.lax.optimization_barrier(total),)  # or it is fused, slice by slice, with what transposes it


_prefixes.defvjp(_prefixes_forward, _prefixes_backward)


def _with_window(
    mix: Callable[..., jax.Array], *operands: jax.Array, windows: Sequence[int], window: Any, length: int
) -> jax.Array:
    """Return mix(*operands, reach=...) for this layer's window: the kernels want it static, the layer scan traces it.

    A window is cut to the length of the sequence, so that one that nobody notices makes no branch of its own.
    """
    reaches = sorted({min(one, length) for one in windows})
    if len(reaches) == 1:
        return mix(*operands, reach=reaches[0])
    index = jnp.searchsorted(jnp.asarray(reaches, jnp.int32), jnp.minimum(window, length).astype(jnp.int32))
    return jax.lax.switch(index, [partial(mix, reach=reach) for reach in reaches], *operands)


@dataclass(frozen=True)
class CudnnAttention:
    """The `Attention` of NVIDIA GPUs: cuDNN's flash attention through jax.nn.dot_product_attention.

    The kernel gets neither a mask (which would cost [B, T, T] and its gradient) nor lengths: causal order alone hides
    padding after the tokens, and rows with padding before them are rotated until it comes after. That is done only in
    calls that have such rows; batches for training and prompts for sampling have none.

    Attributes:
        windows: every window among the model's layers; `window` must be one of them.
        implementation: jax's name of the kernel; "xla" computes the same call anywhere.
    """

    windows: tuple[int, ...] = (NO_WINDOW,)
    implementation: Literal["cudnn", "xla"] = "cudnn"

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        *,
        places: Places,
        window: Any,
        scale: float,
        softcap: float | None,
    ) -> Float[Array, "B T N H"]:
        if softcap is not None:
            raise ValueError(f"softcap is {softcap}: cuDNN's attention has none; use xla_attention")
        if places.segment is not None:
            raise ValueError("packed rows: jax gives cuDNN's attention no segments; use xla_attention")
        length = q_BTNH.shape[1]
        first = jnp.argmax(places.position >= 0, axis=1)
        padded = jnp.any(first > 0)

        def mix(q: jax.Array, k: jax.Array, v: jax.Array, *, reach: int) -> jax.Array:
            # jax counts the keys before the query: (left, right) = (window - 1, 0).
            window_size = None if reach == length else (reach - 1, 0)
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, scale=scale, local_window_size=window_size, implementation=self.implementation
            )

        rotated = _rotate_if(padded, q_BTNH, k_BTKH, v_BTKH, shift=-first)
        mixed = _with_window(mix, *rotated, windows=self.windows, window=window, length=length)
        return _rotate_if(padded, mixed, shift=first)[0]


def _rotate_if(needed: jax.Array, *arrays: jax.Array, shift: jax.Array) -> tuple[jax.Array, ...]:
    """Rotate each row of arrays [B, T, ...] by its own shift along T, if needed at all."""
    rotate = jax.vmap(partial(jnp.roll, axis=0))
    return jax.lax.cond(
        needed, lambda *arrays: tuple(rotate(array, shift) for array in arrays), lambda *same: same, *arrays
    )


# Splash attention's blocks of queries and keys: the largest that divides the length. All its tiles are of 128 lanes.
_SPLASH_BLOCKS = (512, 256, 128)


@dataclass(frozen=True)
class SplashAttention:
    """The `Attention` of TPUs: jax's Pallas kernel, which holds no [T, T] scores and skips blocks that nobody sees.

    Texts are segments, and padding is one of its own. Lengths are padded to multiples of 128; head_dim is free. The
    kernel has no scale: queries are multiplied by it, and rounded to their dtype once more.

    Attributes:
        windows: every window among the model's layers; `window` must be one of them.
        interpret: compute the kernel by plain XLA operations, on any device.
    """

    windows: tuple[int, ...] = (NO_WINDOW,)
    interpret: bool = False

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        *,
        places: Places,
        window: Any,
        scale: float,
        softcap: float | None,
    ) -> Float[Array, "B T N H"]:
        # Imported here: Pallas takes a second to load, and only TPUs use it.
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        length, num_heads = q_BTNH.shape[1:3]
        padded = length + -length % _SPLASH_BLOCKS[-1]
        block = next(block for block in _SPLASH_BLOCKS if padded % block == 0)
        sizes = splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        )

        def lay(array_BTXH: jax.Array) -> jax.Array:
            array = jnp.pad(array_BTXH, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
            return array.transpose(0, 2, 1, 3)

        def mix(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, *, reach: int) -> jax.Array:
            # The mask counts the keys before the query; every query sees itself, padding too.
            mask = masks.LocalMask((padded, padded), (None if reach == length else reach - 1, 0), 0)
            kernel = splash.make_splash_mha(
                masks.MultiHeadMask([mask] * num_heads),
                block_sizes=sizes,
                head_shards=1,
                q_seq_shards=1,
                attn_logits_soft_cap=softcap,
                interpret=self.interpret,
            )
            return cast(jax.Array, jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment, segment)))

        q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
        if places.branch is not None:
            raise ValueError("texts that share a prompt: splash attention knows segments alone; use xla_attention")
        segment = 0 if places.segment is None else places.segment
        segment = jnp.where(places.position >= 0, segment, -1).astype(jnp.int32)
        segment = jnp.pad(segment, ((0, 0), (0, padded - length)), constant_values=-1)
        operands = (lay(q_BTNH), lay(k_BTKH), lay(v_BTKH), segment)
        mixed = _with_window(mix, *operands, windows=self.windows, window=window, length=length)
        return mixed.transpose(0, 2, 1, 3)[:, :length]
