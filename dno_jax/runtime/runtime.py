"""What every device stage starts from: the mesh, the model and the tokenizer of a configuration, checked together."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from dno_jax.config import ModelConfigSection, RunConfig, SftConfig, config_digest
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.model.hf import read_config
from dno_jax.model.params import abstract_params, computing_params, unstack_layers
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.parallel.attention import Backend, choose_backend, make_attention
from dno_jax.parallel.cache import ShardedWrite
from dno_jax.parallel.experts import sharded_experts
from dno_jax.parallel.mesh import Submesh, make_mesh, own_submesh
from dno_jax.parallel.sharding import DECODE, TRAIN, Constrain, Layout, num_row_shards, on_submesh, reshard_donated
from dno_jax.run_dir import RunDir
from dno_jax.training.checkpoint import load_policy, policy_fingerprint
from dno_jax.training.state import param_shardings

ConfigT = TypeVar("ConfigT", bound=RunConfig | SftConfig)


@dataclass(frozen=True)
class Runtime(Generic[ConfigT]):
    """A configuration brought to life on the devices of this process and its peers."""

    config: ConfigT
    run_dir: RunDir
    mesh: Mesh
    model_config: ModelConfig
    tokenizer: ChatTokenizer

    @classmethod
    def start(cls, config: ConfigT) -> Runtime[ConfigT]:
        """Read the model's shape and tokenizer and lay out the devices.

        Raises:
            DnoError: whatever does not fit together, before anything is computed.
        """
        use_compilation_cache()
        model_config, tokenizer = read_shape(config), load_tokenizer(config.model)
        runtime = cls(
            config=config,
            run_dir=RunDir(config.run_dir),
            mesh=make_mesh(config.mesh),
            model_config=model_config,
            tokenizer=tokenizer,
        )
        _ = runtime.attention_backend
        check_fit(config, model_config=model_config, tokenizer=tokenizer, row_shards=num_row_shards(runtime.mesh))
        return runtime

    @cached_property
    def attention_backend(self) -> Backend:
        """The attention of this run; said and refused at its start."""
        section = self.config.model
        return choose_backend(
            section.attention,
            device=self.mesh.devices.flat[0],
            dtype=section.dtype,
            head_dim=self.model_config.head_dim,
            softcap=self.model_config.attention_softcap,
        )

    @cached_property
    def config_digest(self) -> str:
        return config_digest(self.config)

    def model(self, layout: Layout, *, mesh: Mesh | None = None) -> Decoder:
        """The decoder with activations pinned to a layout; equal calls give equal (hence jit-cached) modules."""
        section, mesh = self.config.model, self.mesh if mesh is None else mesh
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
        )

    @cached_property
    def submesh(self) -> Submesh:
        """The rows of the mesh that this process samples with."""
        return own_submesh(self.mesh)

    def param_shardings(self, layout: Layout) -> Any:
        return param_shardings(self.model_config, self.mesh, layout)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's, which is trained, and all that generation_config.json names."""
        return self.tokenizer.end_ids

    @property
    def own_template(self) -> str | None:
        """The chat template that the run was given in a file; None where it is the tokenizer's own, or none at all."""
        return None if self.config.model.chat_template == "tokenizer" else self.tokenizer.template

    def policy_inputs(self, *policies: epath.Path) -> dict[str, str]:
        """Entries of a manifest's `inputs` that name policies by their fingerprints."""
        return {f"policies/{path.name}": policy_fingerprint(path) or "missing" for path in policies}

    def load_policy(self, policy: epath.Path, layout: Layout) -> Any:
        """Read a policy, float32, into arrays of a layout."""
        return load_policy(
            policy,
            shapes=abstract_params(self.model_config),
            shardings=self.param_shardings(layout),
        )

    def load_for_decoding(self, policy: epath.Path) -> Any:
        """Read a policy as it is computed with and lay it out for decoding; no token's step casts weights again.

        All processes call this together; each gets the weights on its own part of the mesh. They are read in the TRAIN
        layout, so that each byte is read by one host and not by all, and cast there: no device ever holds the float32
        weights, which may not fit where these do. From there they move to the DECODE layout on the devices.
        """
        shapes = computing_params(self.model_config, jnp.dtype(self.config.model.dtype))
        read = load_policy(policy, shapes=shapes, shardings=self.param_shardings(TRAIN))
        params = reshard_donated(read, self.param_shardings(DECODE))
        own = on_submesh(params, param_shardings(self.model_config, self.submesh.mesh, DECODE))
        return unstack_layers(own, donate=True)


def read_shape(config: RunConfig | SftConfig) -> ModelConfig:
    """Read the model's shape: once for the whole run, so that sampling, scoring, training and judging rotate alike."""
    shape_from = getattr(config.model, "init_config", None) or config.model.path
    return read_config(shape_from, rope_length=longest_text(config))


def check_fit(
    config: RunConfig | SftConfig, *, model_config: ModelConfig, tokenizer: ChatTokenizer, row_shards: int
) -> None:
    """Check lengths, ids and batches of a run against its model, tokenizer and mesh.

    Raises:
        DnoError: naming the first that does not fit.
    """
    longest, context = _longest_example(config), model_config.context
    if longest > context:
        remedy = "lower data.max_length"
        if isinstance(config, RunConfig):
            remedy = (
                "lower prompts.max_length or sampling.max_new_tokens, or bound both together by "
                f"sampling.max_total_tokens={context}"
            )
        raise DnoError(
            f"sequences of up to {longest} tokens exceed the model's context of "
            f"{context} (max_position_embeddings of {config.model.path}); {remedy}"
        )
    if isinstance(config, RunConfig) and config.loss.load_balance_weight and not model_config.num_experts:
        raise DnoError(
            f"loss.load_balance_weight is {config.loss.load_balance_weight}, but {config.model.path} is no mixture "
            "of experts; set it to 0"
        )
    check_ids(tokenizer, model_config)
    _check_ends(config, tokenizer)
    rows = {"training.micro_batch_size": config.training.micro_batch_size or config.training.batch_size}
    for name, count in rows.items():
        if count % row_shards:
            raise DnoError(
                f"{name} is {count}, which the mesh's data*fsdp*expert={row_shards} devices do not divide; "
                "make it a multiple"
            )


def check_ids(tokenizer: ChatTokenizer, model_config: ModelConfig) -> None:
    """Raise DnoError if a tokenizer makes ids for which a model has no embedding."""
    ids, embeddings = tokenizer.vocab_size, model_config.vocab_size
    place = tokenizer.path
    if ids > embeddings:
        raise DnoError(
            f"{place}: the tokenizer has {ids} ids, the model's embedding {embeddings} rows (vocab_size of its "
            "config.json); give the tokenizer that the model was trained with, or a model with a larger embedding"
        )
    if max(tokenizer.end_ids) >= embeddings:
        raise DnoError(
            f"{place}: eos_token_id names {max(tokenizer.end_ids)}, the model's embedding has {embeddings} rows; "
            "correct generation_config.json"
        )


def _check_ends(config: RunConfig | SftConfig, tokenizer: ChatTokenizer) -> None:
    """Raise DnoError if no response could be ended by what is to end responses: an end id or a stop string."""
    if (last := max(tokenizer.end_ids)) >= tokenizer.vocab_size:
        raise DnoError(
            f"{tokenizer.path}: eos_token_id names {last}, the tokenizer has {tokenizer.vocab_size} ids, and no other "
            "is ever drawn; give the tokenizer that the model was trained with, or correct generation_config.json"
        )
    for stop in config.sampling.stop if isinstance(config, RunConfig) else ():
        for name in tokenizer.control_tokens(stop):
            raise DnoError(
                f"sampling.stop has {stop!r}, which holds the control token {name!r}: control tokens are not text, so "
                "no response would be found to hold it; remove it, and name the token's id in eos_token_id of "
                f"{tokenizer.path / 'generation_config.json'} if it is to end responses"
            )


def longest_text(config: RunConfig | SftConfig) -> int:
    """Return the tokens of the longest text that the run puts through the model, what it judges by itself included."""
    longest = _longest_example(config)
    if isinstance(config, RunConfig) and config.annotation.kind == "self":
        judge = config.annotation.self_judge
        longest = max(longest, judge.max_prompt_length + judge.max_new_tokens)
    return longest


def _longest_example(config: RunConfig | SftConfig) -> int:
    return config.max_length if isinstance(config, RunConfig) else config.data.max_length


def load_tokenizer(section: ModelConfigSection) -> ChatTokenizer:
    """Read the tokenizer and chat template that a configuration names."""
    date = datetime.date.fromisoformat(section.template_date)
    return ChatTokenizer.load(section.path, section.chat_template, date=date)


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next start pays nothing.

    JAX's own variables are heeded: JAX_COMPILATION_CACHE_DIR, and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS.
    """
    options: Any = jax.config  # its attributes are made at run time
    if options.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "dno_jax", "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
