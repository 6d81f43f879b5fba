"""Supervised fine-tuning, the step before DNO: prompt tokens are masked, each response trains its one end token."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from dno_jax import stopping
from dno_jax.config import SftConfig
from dno_jax.console import say
from dno_jax.data.reading import Reading, examples_of
from dno_jax.data.sources import named, read_rows
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.adapters import merging
from dno_jax.model.params import init_adapters
from dno_jax.model.text.truncation import shorten_chat
from dno_jax.parallel.cluster import barrier, described, is_primary
from dno_jax.parallel.sharding import TRAIN
from dno_jax.records import Example, Message
from dno_jax.runtime.capacity import known_capacity
from dno_jax.runtime.exhausted import explained, training_settings
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.training_memory import refuse_training
from dno_jax.stages import disk
from dno_jax.stages.checkpoints import (
    by_adapters,
    export_adapter,
    read_adapter,
    read_checkpoint,
)
from dno_jax.stages.one_training import fresh_params, held, started
from dno_jax.stages.template import refuse_template, save_template
from dno_jax.stages.train import Training, train
from dno_jax.training.adapted import first_key
from dno_jax.training.batches import TrainingRow
from dno_jax.training.checkpoint import remove_states
from dno_jax.training.objectives import supervised_loss


def run(runtime: Runtime[SftConfig]) -> epath.Path:
    """Fine-tune (or train from random weights) and export a Hugging Face checkpoint; return where it lies.

    Everything that may be refused is looked at before anything is written.

    Raises:
        DnoError: the directory was made by another configuration, or from other examples or weights.
    """
    start = time.perf_counter()
    config, target = runtime.config, runtime.run_dir.export_path
    refuse_template(runtime)
    refuse_training(runtime.programs, known_capacity(runtime.mesh.local_devices))
    examples = supervised_examples(runtime, config)
    if is_primary():
        say(described(runtime.mesh))
        say(examples.line)
    noted = started(runtime, "sft", examples=examples.digest)
    if target.exists():
        if is_primary():
            say(f"{target} is there already: nothing to do")
        return target
    if is_primary():
        disk.check(runtime)
    params, frozen = _initial(runtime, config)
    with held(runtime, "sft", noted):
        if is_primary():
            save_template(runtime)
        base = None if frozen is None else noted["weights"]
        return _fine_tune(runtime, examples.rows, params, start=start, frozen=frozen, base=base)


@stopping.finishing()
def _fine_tune(
    runtime: Runtime[SftConfig], rows: list[TrainingRow], params: Any, *, start: float, frozen: Any, base: str | None
) -> epath.Path:
    config, target = runtime.config, runtime.run_dir.export_path
    with explained("sft", training_settings(runtime.programs)):
        result = train(
            runtime,
            params,
            rows,
            runtime.programs.step_config(supervised_loss),
            Training("sft", 0, runtime.run_dir.path / "states", max_length=config.max_length, base=base),
            frozen=frozen,
        )
        for leaf in jax.tree.leaves(frozen):  # the base is read once more, to be merged with
            leaf.delete()
        whole = result.params if base is None else _merged(runtime, config, result.params)
    hf.save(
        str(target),
        runtime.model_config,
        whole,
        source=hf.folder(config.model.init_config or config.model.path, weights=config.model.init_config is None),
        tokenizer=hf.folder(config.model.path),
        chat_template=runtime.tokenizer.template,
        facts=hf.ExportFacts(
            method="supervised fine-tuning"
            + (" of random weights of its shape" if config.model.init_config is not None else "")
            + by_adapters(config),
            loss="cross-entropy of the responses",
            num_examples=len(rows),
            template_options=config.model.template_options,
        ),
    )
    if runtime.programs.adapter is not None:
        export_adapter(runtime, runtime.programs.adapter, result.params, str(target))
    if is_primary():
        remove_states(runtime.run_dir.path / "states")
        loss = result.metrics["loss"]
        say(f"sft: {result.num_steps} steps, loss {loss:.4f}, {time.perf_counter() - start:.0f} s; checkpoint {target}")
    barrier("sft export")
    return target


@dataclass(frozen=True)
class Examples:
    """What is trained on.

    Attributes:
        digest: sha256 of the examples' texts, wherever and in whatever form they lie.
        line: what the files were taken for.
    """

    rows: list[TrainingRow]
    digest: str
    line: str


def supervised_rows(runtime: Runtime[SftConfig], config: SftConfig) -> list[TrainingRow]:
    """Read and tokenise the examples; raises as `supervised_examples` does."""
    return supervised_examples(runtime, config).rows


def supervised_examples(runtime: Runtime[SftConfig], config: SftConfig) -> Examples:
    """Read and tokenise the examples.

    Raises:
        DnoError: a malformed row, no rows, or, unless data.too_long says otherwise, an example longer than
            data.max_length (its place is named).
    """
    section = config.data
    digest, reading, rows = hashlib.sha256(), Reading(section.path), []
    for example, place in examples_of(read_rows(section.path), reading, turns=section.turns):
        digest.update(example.model_dump_json().encode() + b"\n")
        if runtime.tokenizer.rowless_tokens(*example.texts, example.response):
            reading.left_out["a token without an embedding"] += 1
            continue
        ids = _ids(runtime, example, place=place)
        if len(ids[0]) + len(ids[1]) > section.max_length:
            if section.too_long == "error":
                raise DnoError(
                    f"{place}: {len(ids[0]) + len(ids[1])} tokens exceed data.max_length {section.max_length}; raise "
                    "it, remove the example, or set data.too_long=drop (or truncate)"
                )
            cut = None if section.too_long == "drop" else _shortened(runtime, example, section.max_length, place=place)
            reading.left_out["too long" if cut is None else "prompt cut (kept)"] += 1
            if cut is None:
                continue
            ids = cut
        prompt, response = (np.asarray(part, np.int32) for part in ids)
        weight = float(len(response))
        rows.append(TrainingRow((prompt,), (response,), previous_logprob=(0.0,), weight=weight, name=place))
    line = reading.line(f"{len(rows):,} examples")
    if not rows:
        raise DnoError(f"{named(section.path)}: holds no examples: {line}")
    return Examples(rows, digest.hexdigest(), line)


Ids = tuple[tuple[int, ...], tuple[int, ...]]  # of prompt and response


def _ids(runtime: Runtime[SftConfig], example: Example, *, place: str) -> Ids:
    tokenizer, prefix = runtime.tokenizer, example.assistant_prefix
    if spelt := tokenizer.control_tokens(*example.texts):
        raise DnoError(
            f"{place}: the prompt spells the control token {spelt[0]!r}, which would pass for the structure of the "
            "chat; remove it from the data"
        )
    try:
        prompt = tokenizer.prompt_ids(example.messages, prefix)
        return prompt, tokenizer.response_ids(
            example.messages, example.response, end_id=runtime.end_ids[0], assistant_prefix=prefix
        )
    except DnoError as error:
        raise DnoError(f"{place}: {error}") from None


def _shortened(runtime: Runtime[SftConfig], example: Example, longest: int, *, place: str) -> Ids | None:
    """Cut the prompt until prompt and response fit; None where they cannot."""

    def ids(messages: Sequence[Message]) -> Ids:
        return _ids(runtime, example.model_copy(update={"messages": tuple(messages)}), place=place)

    left = shorten_chat(example.messages, max_length=longest, count=lambda chat: sum(map(len, ids(chat))))
    return None if left is None else ids(left)


def _initial(runtime: Runtime[SftConfig], config: SftConfig) -> tuple[Any, Any]:
    """What is trained, in the dtypes that it is trained in, and the weights that stand beside it, or None."""
    shardings, adapter = runtime.programs.param_shardings(TRAIN), runtime.programs.adapter
    if config.model.init_config is not None:
        return fresh_params(runtime), None
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, runtime.programs.trained_params)
    if adapter is None or config.adapter is None:
        return read_checkpoint(config.model.path, shardings=shardings, dtype=dtypes), None
    if config.adapter.path is not None:
        adapters = read_adapter(runtime, config.adapter.path)
    else:
        adapters = jax.jit(init_adapters, static_argnums=(0, 1), out_shardings=runtime.programs.trained_shardings)(
            runtime.model_config, adapter, first_key(config.seed)
        )
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, runtime.computing_shapes)
    return adapters, read_checkpoint(config.model.path, shardings=shardings, dtype=dtypes)


def _merged(runtime: Runtime[SftConfig], config: SftConfig, adapters: Any) -> Any:
    """The adapters and their base in one, in the dtypes that are exported."""
    adapter, source = runtime.programs.adapter, hf.folder(config.model.path, weights=True)
    assert adapter is not None
    shapes, change = hf.stored_shapes(runtime.model_config, source=source), merging(adapters, adapter)

    def one(path: tuple[str, ...], leaf: Any) -> Any:  # merged in float32 and cast, before the next is read
        wanted: Any = shapes
        for key in path:
            wanted = wanted[key]
        return change(path, leaf).astype(wanted.dtype)

    return read_checkpoint(config.model.path, shardings=runtime.programs.param_shardings(TRAIN), change=one)
