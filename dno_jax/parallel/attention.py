"""Which attention a run uses, and the kernels among them put on a mesh."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dno_jax.errors import DnoError
from dno_jax.model.attention import Attention, CudnnAttention, SplashAttention, xla_attention
from dno_jax.model.places import NO_WINDOW, Places
from dno_jax.parallel.cluster import is_primary
from dno_jax.parallel.sharding import AnyMesh, Layout, map_shards

_LOG = logging.getLogger(__name__)

Backend = Literal["xla", "cudnn", "splash"]
_PLATFORM: dict[str, Backend] = {"gpu": "cudnn", "tpu": "splash"}


@dataclass(frozen=True)
class ShardedAttention:
    """Runs an attention on each device's own rows and heads; the compiler cannot split a kernel by itself.

    Rows and heads lie as the layout says. Key heads are split as query heads are, so that each device's groups are
    whole; a mesh that does not divide them is refused where the weights are placed.
    """

    mesh: AnyMesh
    layout: Layout
    attention: Attention

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
        spec = self.layout.activation_spec
        heads = spec(("batch", "length", "heads", "head_dim"))
        kv_heads = spec(("batch", "length", "kv_heads", "head_dim"))

        def local(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, window: jax.Array) -> jax.Array:
            return self.attention(q, k, v, places=places, window=window, scale=scale, softcap=softcap)

        mapped = map_shards(
            local,
            mesh=self.mesh,
            in_specs=(heads, kv_heads, kv_heads, spec(("batch", "length")), PartitionSpec()),
            out_specs=heads,
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return mapped(q_BTNH, k_BTKH, v_BTKH, places, jnp.asarray(window, jnp.int32))


def choose_backend(
    name: Literal["auto", "xla", "cudnn", "splash"],
    *,
    device: Any,
    dtype: str,
    head_dim: int,
    softcap: float | None,
) -> Backend:
    """Return the back-end of a run: the one that was asked for, or by "auto" the platform's kernel where it fits.

    Args:
        device: any device of the mesh.
        dtype: of activations.
        softcap: of the attention scores.

    Raises:
        DnoError: the back-end that was asked for cannot compute this model here.
    """
    own = _PLATFORM.get(device.platform, "xla")
    backend = own if name == "auto" else name
    reason = _obstacle(backend, device=device, dtype=dtype, head_dim=head_dim, softcap=softcap)
    if reason is None:
        return backend
    if name == "auto":
        if is_primary():
            _LOG.warning("model.attention auto: xla instead of %s, because %s", own, reason)
        return "xla"
    raise DnoError(f"model.attention is {name!r}, but {reason}; or set model.attention to auto or xla")


def _obstacle(backend: Backend, *, device: Any, dtype: str, head_dim: int, softcap: float | None) -> str | None:
    """Say why a back-end cannot run, and what would let it; None if it can."""
    if backend == "xla":
        return None
    platform = {"cudnn": "gpu", "splash": "tpu"}[backend]
    if device.platform != platform:
        return f"it runs on {platform}s and this run's devices are {device.platform}s"
    if dtype != "bfloat16":
        return f"it would not compute in {dtype}, only in bfloat16: set model.dtype to bfloat16"
    if backend == "splash":
        return None
    try:
        capability = float(device.compute_capability)
    except ValueError:
        return f"it needs an NVIDIA GPU, not {device.device_kind}"
    if softcap is not None:
        return f"it has no soft cap of scores, and this model has one ({softcap:g})"
    largest = 256 if capability >= 9.0 else 128
    if head_dim > largest or head_dim % 8:
        return f"it takes a head_dim of a multiple of 8 up to {largest} on this GPU, and this model's is {head_dim}"
    return None


def make_attention(
    backend: Backend, *, mesh: AnyMesh, layout: Layout, windows: tuple[int, ...] | None = None
) -> Attention:
    """Return the decoder's attention on a mesh; equal arguments give equal (hence jit-cached) values.

    Args:
        windows: of each layer, or None where all see everything.
    """
    distinct = tuple(sorted(set(windows or (NO_WINDOW,))))
    if backend == "cudnn":
        return ShardedAttention(mesh, layout, CudnnAttention(distinct))
    if backend == "splash":
        return ShardedAttention(mesh, layout, SplashAttention(distinct))
    # The list of blocks that a row shows is its own, so on a CPU plain XLA runs row by row, too.
    return xla_attention if mesh.size == 1 else ShardedAttention(mesh, layout, xla_attention)
