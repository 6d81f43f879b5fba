"""How the devices are laid out for decoding where the configuration leaves it open."""

from __future__ import annotations

import jax.numpy as jnp

from dno_jax.config import MeshSection, RunConfig
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.parallel.mesh import abstract_mesh
from dno_jax.parallel.sharding import AnyMesh
from dno_jax.runtime.programs import ConfigT
from dno_jax.sampling.memory import Capacity, weight_bytes

# Of a device, for the weights of the policies that decode; the rest is for the texts.
_SHARE = 0.5


def with_decode_mesh(config: ConfigT, model_config: ModelConfig, *, mesh: AnyMesh, capacity: Capacity) -> ConfigT:
    """Return the configuration with `sampling.mesh` where the run's own mesh leaves texts too little memory.

    Decoding splits weights over the tensor axis alone. It becomes as wide as makes them half of a device, or, where
    nothing does, as wide as the model's heads allow.

    Args:
        mesh: the run's.
        capacity: of one device.
    """
    if not isinstance(config, RunConfig) or config.sampling.mesh is not None or config.sampling.engine != "jax":
        return config
    policies = 2 if config.mixes else 1
    own = mesh.shape
    widest: MeshSection | None = None
    tensor = own["tensor"]
    while tensor <= mesh.size:
        section = MeshSection(data=-1, expert=own["expert"], tensor=tensor)
        try:
            there = abstract_mesh(section, mesh.size)
            taken = policies * weight_bytes(model_config, mesh=there, dtype=jnp.dtype(config.model.dtype))
        except DnoError:  # the devices or the heads are not divided
            break
        widest = section
        if taken <= _SHARE * capacity.usable:
            break
        tensor *= 2
    if widest is None or widest.tensor == own["tensor"]:
        return config
    sampling = config.sampling.model_copy(update={"mesh": widest})
    return config.model_copy(update={"sampling": sampling})
