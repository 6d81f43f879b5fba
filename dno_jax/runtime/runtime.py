"""A run brought to life: its programs, its directory, its tokenizer and its prompts, made once and handed on."""

from __future__ import annotations

import datetime
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from dno_jax.addresses import Purpose, key_data
from dno_jax.config import MeshSection, ModelConfigSection, RunConfig
from dno_jax.data.prompts import PromptSet
from dno_jax.errors import DnoError
from dno_jax.files import cache_folder
from dno_jax.model.config import ModelConfig
from dno_jax.model.hf import folder, head_of, read_config
from dno_jax.model.params import abstract_params, computing_params, unstack_layers
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.parallel.mesh import Submesh, make_mesh
from dno_jax.parallel.sharding import DECODE, TRAIN, Layout, on_submesh, reshard_donated
from dno_jax.run_dir import RunDir
from dno_jax.runtime.capacity import known_capacity
from dno_jax.runtime.decode_mesh import with_decode_mesh
from dno_jax.runtime.fit import check_fit, read_shape, warn_of_dropout
from dno_jax.runtime.pinning import pinned
from dno_jax.runtime.programs import ConfigT, Programs
from dno_jax.training.adapted import Destination, adapter_of, first_key, load_apart, load_merged, save_adapter
from dno_jax.training.checkpoint import load_policy, policy_fingerprint, save_policy


@dataclass(frozen=True)
class Runtime(Generic[ConfigT]):
    """What every stage that uses devices is handed; the command line or the loop makes it once."""

    programs: Programs[ConfigT]
    run_dir: RunDir
    tokenizer: ChatTokenizer

    @classmethod
    def start(cls, config: ConfigT) -> Runtime[ConfigT]:
        """Read the model's shape and tokenizer and lay out the devices.

        Raises:
            DnoError: whatever does not fit together, before anything is computed.
        """
        use_compilation_cache()
        run_dir = RunDir(config.run_dir)
        run_dir.fetch()
        config = pinned(config)
        model_config, tokenizer = read_shape(config), load_tokenizer(config.model)
        mesh = make_mesh(config.mesh)
        if mesh.devices.flat[0].platform != "cpu" and (capacity := known_capacity(mesh.local_devices)) is not None:
            config = with_decode_mesh(config, model_config, mesh=mesh, capacity=capacity)
        programs = Programs(config, model_config, mesh)
        _ = programs.attention_backend, programs.decode_mesh
        warn_of_dropout(config)
        check_fit(config, model_config=model_config, tokenizer=tokenizer, row_shards=programs.texts_in_step)
        return cls(programs, run_dir, tokenizer)

    @classmethod
    def reading(cls, config: ConfigT) -> Runtime[ConfigT]:
        """Make a runtime that policies are read by, and nothing is computed with, on whatever devices there are.

        Raises:
            DnoError: the checkpoint at model.path is missing or cannot be read.
        """
        use_compilation_cache()
        config = pinned(config)
        model_config = read_shape(config)
        return cls(_on_any_devices(config, model_config), RunDir(config.run_dir), load_tokenizer(config.model))

    @property
    def config(self) -> ConfigT:
        return self.programs.config

    @property
    def model_config(self) -> ModelConfig:
        return self.programs.model_config

    @property
    def mesh(self) -> Mesh:
        assert isinstance(self.programs.mesh, Mesh)
        return self.programs.mesh

    @property
    def submesh(self) -> Submesh:
        """The rows of the mesh that this process samples with."""
        return self.programs.submesh

    @cached_property
    def prompts(self) -> PromptSet:
        """The run's prompts: read when they are first asked for, and each tokenised once."""
        config = self.config
        assert isinstance(config, RunConfig)  # supervised fine-tuning has examples
        return PromptSet(config, self.tokenizer)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's, which is trained, and all that generation_config.json names."""
        return self.tokenizer.end_ids

    def policy_inputs(self, *policies: epath.Path) -> dict[str, str]:
        """Entries of a manifest's `inputs` that name policies by their fingerprints."""
        return {f"policies/{path.name}": policy_fingerprint(path) or "missing" for path in policies}

    def load_policy(self, policy: epath.Path, layout: Layout, *, shapes: Any = None) -> Any:
        """Read a policy's weights into arrays of a layout, an adapter merged into those that it stands beside.

        Args:
            shapes: with the dtypes that are wanted; None: float32.
        """
        shapes = abstract_params(self.model_config) if shapes is None else shapes
        if adapter_of(policy) is None:
            return load_policy(policy, shapes=shapes, shardings=self.programs.param_shardings(layout))
        return load_merged(policy, Destination(self.model_config, self.mesh, layout), shapes=shapes)

    def load_trained(self, policy: epath.Path, *, exact: bool = False) -> tuple[Any, Any]:
        """Read a policy as training and scoring have it: what is trained, and the weights that stand, or None.

        Where adapters are trained these are float32, and the weights are held as they are computed with.

        Args:
            exact: whether all parameters, where they are trained, are to be in `training.param_dtype`; else float32.

        Raises:
            DnoError: they hold numbers that this dtype cannot show.
        """
        programs = self.programs
        if programs.adapter is not None:
            to, key = Destination(self.model_config, self.mesh, TRAIN), first_key(self.config.seed)
            return load_apart(policy, to, programs.adapter, key=key, shapes=self.computing_shapes)
        if not exact:
            return self.load_policy(policy, TRAIN), None
        shapes, shardings = programs.trained_params, programs.param_shardings(TRAIN)
        return load_policy(policy, shapes=shapes, shardings=shardings, exact=True), None

    @property
    def computing_shapes(self) -> Any:
        """The parameters as jax.ShapeDtypeStruct, in the dtypes that they are computed with in."""
        return computing_params(self.model_config, jnp.dtype(self.config.model.dtype))

    def save_trained(self, policy: epath.Path, trained: Any, *, previous: epath.Path) -> str:
        """Write the policy that training made of another; return its fingerprint."""
        if self.programs.adapter is None:
            return save_policy(policy, trained)
        return save_adapter(policy, trained, self.programs.adapter, beside=previous)

    def load_for_decoding(self, policy: epath.Path) -> Any:
        """Read a policy as it is computed with and lay it out for decoding; no token's step casts weights again.

        All processes call this together; each gets the weights on its own submesh. They are read in the TRAIN
        layout, so that each byte is read by one host and not by all, and cast there, one array at a time: no device
        ever holds all float32 weights, which may not fit where these do. From there they move to the DECODE layout on
        the devices.
        """
        read = self.load_policy(policy, TRAIN, shapes=self.computing_shapes)
        params = reshard_donated(read, self.programs.param_shardings(DECODE))
        own = on_submesh(params, self.programs.param_shardings(DECODE, mesh=self.submesh.mesh))
        return unstack_layers(own, donate=True)


def draw_key(purpose: Purpose, *address: Any) -> jax.Array:
    """The key of draws on devices, of a purpose and an address."""
    return jax.random.wrap_key_data(jnp.asarray(key_data(purpose, *address)), impl="threefry2x32")


def _on_any_devices(config: ConfigT, model_config: ModelConfig) -> Programs[ConfigT]:
    """Lay weights out as the run does, where these are its devices; else over all of them, or else on one."""
    if isinstance(config, RunConfig):  # where texts are drawn, that is on one device or some
        config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"mesh": None})})
    for section in (config.mesh, MeshSection(data=1, fsdp=-1)):
        with suppress(DnoError):
            programs = Programs(config, model_config, make_mesh(section))
            programs.param_shardings(TRAIN)
            return programs
    return Programs(config, model_config, make_mesh(MeshSection(), jax.local_devices()[:1]))


def load_tokenizer(section: ModelConfigSection) -> ChatTokenizer:
    """Read the tokenizer and chat template that a configuration names, beside the model's vocabulary."""
    shape_from = folder(getattr(section, "init_config", None) or section.path)
    return ChatTokenizer.load(
        folder(section.path),
        section.chat_template,
        date=datetime.date.fromisoformat(section.template_date),
        options=section.template_options,
        num_rows=read_config(shape_from, head=head_of(shape_from)).vocab_size,
    )


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next start pays nothing.

    JAX's own variables are heeded: JAX_COMPILATION_CACHE_DIR, and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS.
    """
    options: Any = jax.config  # its attributes are made at run time
    if options.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
