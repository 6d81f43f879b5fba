"""What the trainings that are no iteration of a run have in common: `dno sft` and `dno reward`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
from etils import epath

from dno_jax.addresses import Purpose
from dno_jax.config import RewardConfig, SftConfig, changes, deciding
from dno_jax.errors import DnoError
from dno_jax.files import digest_of, read_note, write_atomically
from dno_jax.model import hf
from dno_jax.model.params import init_params
from dno_jax.parallel.cluster import barrier, is_primary
from dno_jax.parallel.sharding import TRAIN
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime, draw_key
from dno_jax.stages.checkpoints import adapter_digest, checkpoint_digest
from dno_jax.stages.disk import refuse_apart

AnyRuntime = Runtime[SftConfig] | Runtime[RewardConfig]


def note_path(run_dir: RunDir, stage: str) -> epath.Path:
    """Where what decides the result is noted, before anything is trained."""
    return run_dir.path / f"{stage.upper()}.json"


def started(runtime: AnyRuntime, stage: str, *, examples: str) -> dict[str, Any]:
    """Return what decides the result, after a check that states in the run directory are of the same.

    Args:
        examples: digest of what is trained on.

    Raises:
        DnoError: they are of something else.
    """
    config, place = runtime.config, note_path(runtime.run_dir, stage)
    source = config.model.init_config or config.model.path
    now = deciding(config, stage) | {
        "examples": examples,
        "tokenizer": runtime.tokenizer.digest,
        "weights": digest_of(hf.folder(source) / "config.json")
        if config.model.init_config
        else checkpoint_digest(source),
    }
    if config.adapter is not None and config.adapter.path is not None:
        now["adapter"] = adapter_digest(config.adapter.path)
    if place.exists() and (changed := changes(read_note(place), now)):
        lines = "\n  ".join(changed)
        raise DnoError(
            f"run_dir {runtime.run_dir.path} was made by another configuration:\n  {lines}\nset these back, or give "
            "another run_dir"
        )
    return now


@contextmanager
def held(runtime: AnyRuntime, stage: str, noted: dict[str, Any]) -> Iterator[None]:
    """Keep the run directory for this training, its configuration and what decides the result written down."""
    with runtime.run_dir.held() if is_primary() else nullcontext():
        if is_primary():
            runtime.run_dir.create(runtime.config)
            write_atomically(note_path(runtime.run_dir, stage), json.dumps(noted, indent=2) + "\n")
        barrier(f"{stage} config")
        refuse_apart(runtime.run_dir)
        yield


def fresh_params(runtime: AnyRuntime) -> Any:
    """Draw weights in the TRAIN layout and the dtypes that are trained."""
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, runtime.programs.trained_params)
    key = draw_key(Purpose.INITIAL_WEIGHTS, runtime.config.seed)
    place = runtime.programs.param_shardings(TRAIN)
    fresh = jax.jit(init_params, static_argnums=0, out_shardings=place)(runtime.model_config, key)
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), fresh, dtypes)
