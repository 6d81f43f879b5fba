"""`dno export`: a policy of a run, or the model of one training (`dno sft`, `dno reward`), on any devices."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from dno_jax.bucket.work import bring
from dno_jax.config import RewardConfig, RunConfig
from dno_jax.config.base import absolute, hub_id, model_place
from dno_jax.console import say
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.hf import hub
from dno_jax.parallel.cluster import is_primary
from dno_jax.report.summary import best_policy_of
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import checkpoints

# Of lm-evaluation-harness, by its names; what the Open LLM Leaderboard asked, and the paper's tables have.
_TASKS = ("arc_challenge", "gsm8k", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande")


@dataclass(frozen=True)
class Wanted:
    """What an export is to be.

    Attributes:
        policy: which; None: the best on held-out prompts.
        base: where the checkpoint that training started from lies now; None: where the configuration says.
        dtype, max_shard_bytes, overwrite: as hf.save takes them.
        push: repository on the Hub that it is uploaded to; None: nowhere.
        public: whether a repository that is made for it is for all to see.
    """

    policy: int | None = None
    base: str | None = None
    dtype: str | None = None
    max_shard_bytes: int = hf.MAX_SHARD_BYTES
    overwrite: bool = False
    push: str | None = None
    public: bool = False


def run(folder: RunDir, path: str, wanted: Wanted) -> None:
    """Write what `wanted` says to `path`, and upload it if it says so.

    Raises:
        DnoError: there is no such policy or base, or the target or the repository does not take it.
    """
    if wanted.push is not None and is_primary():  # refused now, not after the work
        hub.create(wanted.push, private=not wanted.public)
    kind = folder.kind()
    export = _policy if kind is RunConfig else _trained
    say(f"{export(folder, path, wanted)} exported to {path}")
    if kind is not RewardConfig:  # which writes nothing
        template = folder.load_config(kind).model.chat_template
        say(f"benchmarks of lm-evaluation-harness: {harness_command(path, template=template)}")
    if wanted.push is not None and is_primary():
        try:
            commit = hub.push(path, wanted.push)
        except DnoError as error:
            raise DnoError(f"{error}\nThe export is whole in {path}; to try again, export with --overwrite") from None
        say(f"uploaded to {wanted.push} as commit {commit}")


def harness_command(path: str, *, template: str) -> str:
    """The command of lm-evaluation-harness that asks an export what the paper's policies were asked.

    Args:
        template: the run's `model.chat_template`: a base model's "raw" has none to apply.
    """
    chat = [] if template == "raw" else ["--apply_chat_template"]
    model = json.dumps({"pretrained": path})  # a list of name=value would break at a comma in the path
    words = ["lm_eval", "--model", "hf", "--model_args", model, "--tasks", ",".join(_TASKS), *chat]
    return shlex.join([*words, "--batch_size", "auto"])


def _policy(folder: RunDir, path: str, wanted: Wanted) -> str:
    # The directory may have been copied or moved since its config.yaml was written.
    settings: RunConfig = folder.load_config().model_copy(update={"run_dir": absolute(str(folder.path))})
    policy = wanted.policy
    if policy is None:
        policy = best_policy_of(folder, iterations=settings.iterations)
    if wanted.base is not None:
        model = settings.model.model_copy(update={"path": model_place(wanted.base)})
        settings = settings.model_copy(update={"model": model})
        checkpoints.check_source(folder, settings.model.path)
    elif hub_id(settings.model.path) is None and not os.path.isdir(settings.model.path):
        raise DnoError(
            f"model.path {settings.model.path}: not on this machine, and an export takes its tokenizer and the names "
            "of its tensors; say where it lies here: --base FOLDER (or its id on the Hub)"
        )
    checkpoints.export(
        Runtime.reading(settings),
        policy=policy,
        path=path,
        dtype=wanted.dtype,
        max_shard_bytes=wanted.max_shard_bytes,
        overwrite=wanted.overwrite,
    )
    return f"policy {policy}"


def _trained(folder: RunDir, path: str, wanted: Wanted) -> str:
    if wanted.policy is not None or wanted.base is not None:
        raise DnoError(f"{folder.path}: a directory of one training has one model; leave --policy and --base out")
    bring(folder.export_path)
    source = Path(folder.export_path)
    if not source.exists():
        raise DnoError(f"{folder.path}: the training is not finished; run its command on its configuration to its end")
    config, params = hf.load(source, head=hf.head_of(source))
    hf.save(
        path,
        config,
        params,
        source=source,
        dtype=wanted.dtype,
        max_shard_bytes=wanted.max_shard_bytes,
        overwrite=wanted.overwrite,
    )
    shutil.copyfile(source / "README.md", Path(path) / "README.md")  # it names the base and the examples
    if (source / checkpoints.ADAPTER_FOLDER).exists():
        shutil.copytree(source / checkpoints.ADAPTER_FOLDER, Path(path) / checkpoints.ADAPTER_FOLDER)
    return "the trained model"
