"""Supervised fine-tuning, the step before DNO: prompt tokens are masked, each response trains its one end token."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from pydantic import ValidationError

from dno_jax.addresses import Purpose, key_data
from dno_jax.config import SftConfig, changes, deciding
from dno_jax.console import say
from dno_jax.data.prompts import read_rows, with_messages
from dno_jax.errors import DnoError
from dno_jax.files import digest_of, write_atomically
from dno_jax.model import hf
from dno_jax.model.params import init_params
from dno_jax.parallel.cluster import barrier, is_primary
from dno_jax.parallel.sharding import TRAIN
from dno_jax.records import Example, explain
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages.checkpoints import checkpoint_digest, read_checkpoint
from dno_jax.stages.template import refuse_template, save_template
from dno_jax.stages.train import Training, train
from dno_jax.training.batches import TrainingRow
from dno_jax.training.checkpoint import remove_states
from dno_jax.training.objectives import supervised_loss

_STARTED = "SFT.json"


def run(runtime: Runtime[SftConfig]) -> epath.Path:
    """Fine-tune (or train from random weights) and export a Hugging Face checkpoint; return where it lies.

    Raises:
        DnoError: the directory was made by another configuration, or from other examples or weights.
    """
    start = time.perf_counter()
    config = runtime.config
    refuse_template(runtime)
    with runtime.run_dir.held() if is_primary() else nullcontext():
        if is_primary():
            _open(runtime, config)
            save_template(runtime)
        barrier("sft config")
        return _fine_tune(runtime, config, start=start)


def _open(runtime: Runtime[SftConfig], config: SftConfig) -> None:
    """Make the run directory, or check that states in it are of this configuration, these examples and weights."""
    place = runtime.run_dir.path / _STARTED
    source = config.model.init_config or config.model.path
    now = deciding(config, "sft") | {
        "examples": digest_of(config.data.path),
        "tokenizer": runtime.tokenizer.digest,
        "weights": digest_of(hf.folder(source) / "config.json")
        if config.model.init_config
        else checkpoint_digest(source),
    }
    if place.exists() and (changed := changes(json.loads(place.read_text()), now)):
        lines = "\n  ".join(changed)
        raise DnoError(
            f"run_dir {runtime.run_dir.path} was made by another configuration:\n  {lines}\nset these back, or give "
            "another run_dir"
        )
    runtime.run_dir.create(config)
    write_atomically(place, json.dumps(now, indent=2) + "\n")


def _fine_tune(runtime: Runtime[SftConfig], config: SftConfig, *, start: float) -> epath.Path:
    target = runtime.run_dir.export_path
    if target.exists():
        if is_primary():
            say(f"{target} is there already: nothing to do")
        return target
    rows = supervised_rows(runtime, config)
    result = train(
        runtime,
        _initial(runtime, config),
        rows,
        runtime.programs.step_config(supervised_loss),
        Training("sft", 0, runtime.run_dir.path / "states", max_length=config.data.max_length, guard=False),
    )
    hf.save(
        str(target),
        runtime.model_config,
        result.params,
        source=hf.folder(config.model.init_config or config.model.path, weights=config.model.init_config is None),
        tokenizer=hf.folder(config.model.path),
        chat_template=runtime.tokenizer.template,
        facts=hf.ExportFacts(
            method="supervised fine-tuning"
            + (" of random weights of its shape" if config.model.init_config is not None else ""),
            loss="cross-entropy of the responses",
            num_examples=len(rows),
            template_options=config.model.template_options,
        ),
    )
    if is_primary():
        remove_states(runtime.run_dir.path / "states")
        loss = result.metrics["loss"]
        say(f"sft: {result.num_steps} steps, loss {loss:.4f}, {time.perf_counter() - start:.0f} s; checkpoint {target}")
    barrier("sft export")
    return target


def supervised_rows(runtime: Runtime[SftConfig], config: SftConfig) -> list[TrainingRow]:
    """Read and tokenise the examples.

    Raises:
        DnoError: a malformed row, no rows, or an example longer than data.max_length (its place is named).
    """
    rows = []
    for row, place in read_rows(config.data.path):
        try:
            example = Example.model_validate(with_messages(row))
        except ValidationError as error:
            raise DnoError(f"{place}: not a valid example: {explain(error)}") from None
        prompt, response = _ids(runtime, example, place=place)
        if len(prompt) + len(response) > config.data.max_length:
            raise DnoError(
                f"{place}: {len(prompt) + len(response)} tokens exceed data.max_length {config.data.max_length}; "
                "raise it or remove the example"
            )
        ids = (np.asarray(prompt, np.int32),), (np.asarray(response, np.int32),)
        rows.append(TrainingRow(*ids, previous_logprob=(0.0,), weight=float(len(response))))
    if not rows:
        raise DnoError(f"{config.data.path}: holds no examples")
    return rows


def _ids(runtime: Runtime[SftConfig], example: Example, *, place: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return prompt and response ids."""
    tokenizer, prefix = runtime.tokenizer, example.assistant_prefix
    if spelt := tokenizer.control_tokens(*example.texts):
        raise DnoError(
            f"{place}: the prompt spells the control token {spelt[0]!r}, which would pass for the structure of the "
            "chat; remove it from the data"
        )
    if held := tokenizer.rowless_tokens(*example.texts):
        raise DnoError(f"{place}: the prompt holds {held[0]!r}, of which the model has no embedding; remove it")
    try:
        prompt = tokenizer.prompt_ids(example.messages, prefix)
        return prompt, tokenizer.response_ids(
            example.messages, example.response, end_id=runtime.end_ids[0], assistant_prefix=prefix
        )
    except DnoError as error:
        raise DnoError(f"{place}: {error}") from None


def _initial(runtime: Runtime[SftConfig], config: SftConfig) -> Any:
    shardings = runtime.programs.param_shardings(TRAIN)
    if config.model.init_config is None:
        return read_checkpoint(config.model.path, shardings=shardings)
    return jax.jit(init_params, static_argnums=0, out_shardings=shardings)(
        runtime.model_config,
        jax.random.wrap_key_data(jnp.asarray(key_data(Purpose.INITIAL_WEIGHTS, config.seed)), impl="threefry2x32"),
    )
