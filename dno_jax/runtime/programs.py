"""Every compiled program of a run, made from its configuration, the model's shape and a mesh alone.

The mesh may be abstract: nothing here asks for devices, weights or a tokenizer, so that what is planned ahead of time
is the very construction that the stages run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dno_jax.config import AnyConfig, RunConfig
from dno_jax.errors import DnoError
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.model.params import abstract_adapters, abstract_params, adapter_axes, computing_params, param_axes
from dno_jax.parallel.attention import Backend, choose_backend, make_attention
from dno_jax.parallel.cache import ShardedWrite
from dno_jax.parallel.experts import sharded_experts
from dno_jax.parallel.mesh import Submesh, abstract_mesh, make_mesh, own_submesh
from dno_jax.parallel.sharding import DECODE, TRAIN, AnyMesh, Constrain, Layout, num_row_shards
from dno_jax.runtime.fit import trained_adapter
from dno_jax.training.objectives import RowLoss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.packing import Packing, Plan, TextLengths, plan_batches
from dno_jax.training.state import adapter_shardings, param_shardings
from dno_jax.training.step import StepConfig

_COMPILING = 4e11  # floating-point operations that a CPU does in the time that it takes to compile a training step

ConfigT = TypeVar("ConfigT", bound=AnyConfig)


@dataclass(frozen=True)
class Programs(Generic[ConfigT]):
    """What is computed, and where: equal arguments give equal, hence jit-cached, programs.

    Attributes:
        mesh: of devices; or abstract, of devices that need not be here.
    """

    config: ConfigT
    model_config: ModelConfig
    mesh: AnyMesh

    @cached_property
    def attention_backend(self) -> Backend:
        """The attention of whole sequences; on an abstract mesh what is asked for, and plain XLA for "auto".

        Raises:
            DnoError: the back-end that was asked for cannot compute this model on these devices.
        """
        section = self.config.model
        if not isinstance(self.mesh, Mesh):
            return "xla" if section.attention == "auto" else section.attention
        return choose_backend(
            section.attention,
            device=self.mesh.devices.flat[0],
            dtype=section.dtype,
            head_dim=self.model_config.head_dim,
            softcap=self.model_config.attention_softcap,
        )

    @cached_property
    def decode_mesh(self) -> AnyMesh:
        """The same devices laid out for decoding: `sampling.mesh`, or else the run's own."""
        section = self.config.sampling.mesh if isinstance(self.config, RunConfig) else None
        if section is None:
            return self.mesh
        try:
            if not isinstance(self.mesh, Mesh):
                return abstract_mesh(section, self.mesh.size)
            return make_mesh(section, list(self.mesh.devices.flat))
        except DnoError as error:
            raise DnoError(re.sub(r"\bmesh(?=\.| \()", "sampling.mesh", str(error))) from None

    def mesh_of(self, layout: Layout) -> AnyMesh:
        return self.decode_mesh if layout == DECODE else self.mesh

    @cached_property
    def adapter(self) -> AdapterConfig | None:
        """The adapters that are trained; None where all parameters are."""
        return trained_adapter(self.config, self.model_config)

    def model(self, layout: Layout, *, mesh: AnyMesh | None = None) -> Decoder:
        """The decoder with activations pinned to a layout. Adapters are apart in TRAIN, and merged in DECODE.

        Args:
            mesh: a submesh of the layout's own; None is the whole.
        """
        section, mesh = self.config.model, self.mesh_of(layout) if mesh is None else mesh
        return Decoder(
            self.model_config,
            dtype=jnp.dtype(section.dtype),
            remat=section.remat,
            constrain=Constrain(mesh, layout),
            experts=sharded_experts(mesh),
            attention=make_attention(
                self.attention_backend, mesh=mesh, layout=layout, windows=self.model_config.windows
            ),
            write=ShardedWrite(mesh, layout),
            adapter=self.adapter if layout == TRAIN else None,
        )

    @cached_property
    def packing(self) -> Packing:
        """How the texts of a batch are laid out in rows.

        Raises:
            DnoError: they are to be packed, and the attention cannot keep them apart.
        """
        backend, section = self.attention_backend, self.config.training
        if section.packing == "on" and backend == "cudnn":
            raise DnoError(
                "training.packing is on, but this run attends by cuDNN, which jax gives no segments to keep texts "
                "apart; set training.packing to auto, or model.attention to xla"
            )
        on_cpu = not isinstance(self.mesh, Mesh) or self.mesh.devices.flat[0].platform == "cpu"
        longest = self.config.max_length
        # A sixteenth of the longest text leaves few shapes; splash attention's tiles are of 128.
        granule = 128 if backend == "splash" else max(8, 1 << (max(longest // 16, 1).bit_length() - 1))
        return Packing(
            packed=section.packing == "on" or (section.packing == "auto" and backend != "cudnn"),
            share_prompt=backend == "xla" and self.model_config.attends_everywhere,
            skips=backend == "xla" and on_cpu,
            row_shards=num_row_shards(self.mesh),
            granule=min(granule, 128),
            program_tokens=round(_COMPILING / (6 * self.num_parameters)) if on_cpu else 1_000_000,
        )

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in the model's arrays."""
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(self.model_config)))

    @property
    def texts_in_step(self) -> int:
        """What the texts of a micro-batch have to be a multiple of."""
        return 1 if self.packing.packed else num_row_shards(self.mesh)

    def plan_batches(self, lengths: TextLengths, batches: Sequence[np.ndarray]) -> Plan:
        """Choose the shapes of a training's batches."""
        section = self.config.training
        return plan_batches(
            lengths,
            batches,
            self.packing,
            batch_size=section.batch_size,
            parts=section.batch_size // (section.micro_batch_size or section.batch_size),
            max_length=self.config.max_length,
        )

    def param_shardings(self, layout: Layout, *, mesh: AnyMesh | None = None) -> Any:
        """The tree of shardings of the parameters."""
        return param_shardings(self.model_config, self.mesh_of(layout) if mesh is None else mesh, layout)

    @property
    def trained_params(self) -> Any:
        """The parameters as shapes and in the dtypes that they are trained in."""
        return computing_params(self.model_config, jnp.dtype(self.config.training.param_dtype))

    @property
    def trained_shardings(self) -> Any:
        """The tree of shardings of what is trained: parameters, or adapters."""
        if self.adapter is None:
            return self.param_shardings(TRAIN)
        return adapter_shardings(self.model_config, self.adapter, self.mesh, TRAIN)

    @property
    def trained_axes(self) -> Any:
        """The tree of names of axes of what is trained."""
        config, adapter = self.model_config, self.adapter
        return param_axes(config) if adapter is None else adapter_axes(config, adapter)

    @property
    def adapter_params(self) -> int | None:
        """Numbers in the adapters' arrays; None where all parameters are trained."""
        if self.adapter is None:
            return None
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_adapters(self.model_config, self.adapter)))

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What updates what is trained, at a learning rate of 1."""
        return make_optimizer(self.config.optimizer, self.trained_axes)

    def step_config(self, row_loss: RowLoss, *, load_balance_weight: float = 0.0) -> StepConfig:
        """The compiled optimiser step's identity."""
        section = self.config.training
        return StepConfig(
            model=self.model(TRAIN),
            optimizer=self.optimizer,
            row_loss=row_loss,
            chunk=section.logprob_chunk,
            load_balance_weight=load_balance_weight,
            skips=section.skip_nonfinite > 0,
        )

    @cached_property
    def submesh(self) -> Submesh:
        """The rows of the mesh that this process samples with; needs devices."""
        assert isinstance(self.decode_mesh, Mesh)
        return own_submesh(self.decode_mesh)
