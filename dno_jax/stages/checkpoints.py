"""In and out: a Hugging Face checkpoint becomes policy 0, a policy becomes a Hugging Face checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from dno_jax.addresses import Purpose, integer
from dno_jax.config import AnnotationSection, AnyConfig, RunConfig
from dno_jax.config.base import hub_id
from dno_jax.console import Meter, say
from dno_jax.errors import DnoError
from dno_jax.files import digest_of, read_note, write_atomically
from dno_jax.model import hf
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.config import Head
from dno_jax.model.hf import peft
from dno_jax.parallel.cluster import barrier, is_primary
from dno_jax.parallel.sharding import TRAIN, to_device
from dno_jax.report.answers import shown_answers
from dno_jax.run_dir import RunDir
from dno_jax.runtime.exhausted import explained, weight_settings
from dno_jax.runtime.runtime import ConfigT, Runtime
from dno_jax.stage_dir import is_lookahead
from dno_jax.training.adapted import Destination, adapter_of, load_adapter
from dno_jax.training.checkpoint import policy_fingerprint, save_policy
from dno_jax.training.notes import adapter_note
from dno_jax.training.rounding import widened

ADAPTER_FOLDER = "adapter"  # of an export: what PEFT loads on top of the base
_BLOCKS, _BLOCK_BYTES = 64, 4096  # of each file of weights, that tell its contents from another's


def import_initial(runtime: Runtime[RunConfig]) -> str:
    """Make policy 0 of the run directory from `model.path`, once; return its fingerprint.

    With `adapter.path` it is that adapter, and the weights beside which it stands are put into a folder of their own.

    Raises:
        DnoError: policy 0 is there, and of another checkpoint or adapter.
    """
    config, run_dir = runtime.config, runtime.run_dir
    source, path, given = config.model.path, run_dir.policy(0), config.adapter and config.adapter.path
    found = policy_fingerprint(path)
    if found is not None:
        if is_primary():
            check_source(run_dir, source)
            _check_adapter(run_dir, given)
        return found
    adapters = read_adapter(runtime, given) if given else None  # refused before weights are read
    base = run_dir.base_path if given else path
    digest = policy_fingerprint(base)
    if digest is None:
        with explained("import of policy 0", weight_settings(runtime.programs)):
            programs = runtime.programs
            # Rounded once, here, to what is trained: each training then starts from the very policy that it is held to.
            dtypes = jax.tree.map(lambda leaf: leaf.dtype, programs.trained_params)
            params = widened(read_checkpoint(source, shardings=programs.param_shardings(TRAIN), dtype=dtypes))
            digest = save_policy(base, params)
            del params
    if adapters is not None:
        digest = runtime.save_trained(path, adapters, previous=base)
    if is_primary():
        write_atomically(run_dir.source_path, json.dumps(_source_note(source, given), indent=2) + "\n")
        say(f"imported {source}{f' and the adapter {given}' if given else ''} as policy 0 ({digest[:12]})")
    return digest


def read_adapter(runtime: Runtime[ConfigT], path: str) -> Any:
    """Read the adapter of a folder of PEFT's into sharded arrays, float32.

    Raises:
        DnoError: it is not the adapter that the configuration describes, or not supported.
    """
    assert runtime.programs.adapter is not None
    return to_device(
        peft.load(path, runtime.model_config, runtime.programs.adapter), runtime.programs.trained_shardings
    )


def check_source(run_dir: RunDir, source: str) -> None:
    """Raise DnoError if a checkpoint is not the one that policy 0 was imported from."""
    note = _source_note(source, None)
    if not run_dir.source_path.exists():  # stopped between the weights and the note
        write_atomically(run_dir.source_path, json.dumps(note, indent=2) + "\n")
        return
    noted = read_note(run_dir.source_path)
    if noted["digest"] != note["digest"]:
        raise DnoError(
            f"model.path {source}: not the checkpoint that policy 0 of {run_dir.path} was imported from "
            f"({noted['path']}): its configuration or weights differ. Give that one, or another run_dir"
        )


def _check_adapter(run_dir: RunDir, given: str | None) -> None:
    """Raise DnoError if policy 0 was made with another adapter, or with none."""
    noted = read_note(run_dir.source_path)
    was_given = adapter_note(run_dir.policy(0)) is not None
    if was_given and "adapter" not in noted and given:  # stopped between the adapter and the note
        noted |= _source_note(noted["path"], given)
        write_atomically(run_dir.source_path, json.dumps(noted, indent=2) + "\n")
    if was_given != bool(given) or (given and noted["adapter_digest"] != adapter_digest(given)):
        now = f"is {given}" if given else "is not set"
        before = f"with {noted.get('adapter')}" if was_given else "without one"
        raise DnoError(
            f"adapter.path {now}, and policy 0 of {run_dir.path} was made {before}, or what it held was another; set "
            "it back, or give another run_dir"
        )


def _source_note(source: str, adapter: str | None) -> dict[str, str]:
    note = {"path": source, "digest": checkpoint_digest(source)}
    return note | ({"adapter": adapter, "adapter_digest": adapter_digest(adapter)} if adapter else {})


def adapter_digest(path: str) -> str:
    """Tell a folder of PEFT's by its contents."""
    return " ".join(digest_of(epath.Path(path) / name) for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE))


def checkpoint_digest(path: str) -> str:
    """Tell a checkpoint by its contents, wherever it lies, without reading all of it.

    Returns:
        sha256 of config.json and, of each file of weights, its size and 64 evenly spaced blocks of 4 KiB.
    """
    source = hf.folder(path, weights=True)
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for file in hf.weight_files(source):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for place in np.linspace(0, max(size - _BLOCK_BYTES, 0), _BLOCKS).astype(np.int64).tolist():
                opened.seek(place)
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def read_checkpoint(
    path: str,
    *,
    shardings: Any,
    head: Head = "logits",
    dtype: Any = np.float32,
    change: Callable[[tuple[str, ...], Any], Any] | None = None,
) -> Any:
    """Read a checkpoint's parameters into sharded arrays; process 0 shows how far it is.

    Args:
        head, dtype, change: as hf.load takes them.
    """
    source = hf.folder(path, weights=True)
    with Meter(f"import {Path(path).name}", total=0, unit="GB", scale=10**9, enabled=is_primary()) as meter:

        def show(count: int, total: int) -> None:
            meter.expect(total)
            meter.advance(count)

        return hf.load(source, head=head, shardings=shardings, dtype=dtype, progress=show, change=change)[1]


def export(
    runtime: Runtime[RunConfig],
    *,
    policy: int,
    path: str,
    dtype: str | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a policy as a Hugging Face checkpoint that reloads to the same values and logits.

    Raises:
        DnoError: the policy does not exist, the target does and may not be replaced, it is no place for an export, or
            what was written does not reload to the same model.
    """
    config, run_dir = runtime.config, runtime.run_dir
    _check_target(config, run_dir, path)
    if epath.Path(path).exists():
        if not overwrite:
            raise DnoError(f"{path} exists; give another path, or --overwrite")
        hf.check_replaceable(path)
    if dtype not in (None, "float32", "bfloat16"):
        raise DnoError(f"dtype of an export is {dtype!r}; expected float32 or bfloat16, or nothing for the base's own")
    source = hf.folder(config.model.path, weights=True)
    with explained(f"export of policy {policy}", weight_settings(runtime.programs)):
        # An adapter is merged in float32 and each array cast at once: no device need hold all of them in float32.
        note = adapter_of(run_dir.policy(policy))
        shapes = None if note is None else hf.stored_shapes(runtime.model_config, source=source, dtype=dtype)
        hf.save(
            path,
            runtime.model_config,
            runtime.load_policy(run_dir.policy(policy), TRAIN, shapes=shapes),
            source=source,
            chat_template=runtime.tokenizer.template,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            facts=export_facts(config, run_dir, policy=policy),
            overwrite=overwrite,
        )
        if note is not None:
            to = Destination(runtime.model_config, runtime.mesh, TRAIN)
            adapters = load_adapter(run_dir.policy(policy), to, note.adapter)
            export_adapter(runtime, note.adapter, adapters, path)
    barrier(f"export {policy}")


def export_adapter(runtime: Runtime[ConfigT], adapter: AdapterConfig, adapters: Any, path: str) -> None:
    """Write adapters for PEFT into a folder inside of the merged checkpoint; say so where PEFT has no such adapters."""
    source, place = runtime.config.model.path, os.fspath(epath.Path(path) / ADAPTER_FOLDER)
    base = hub_id(source) or (source, None)
    try:
        peft.save(place, runtime.model_config, adapter, adapters, source=hf.folder(source), base=base)
    except peft.NotForPeft as error:
        if is_primary():
            say(f"{path} holds the merged checkpoint, and no folder for PEFT: {error}")


def _check_target(config: RunConfig, run_dir: RunDir, path: str) -> None:
    """Raise DnoError where an export would take the place of what it is made from, or lie among it."""
    target, source = _resolved(path), os.fspath(hf.folder(config.model.path))
    for name, kept in (("the run directory", os.fspath(run_dir.path)), ("model.path", source)):
        if _resolved(kept).is_relative_to(target):
            raise DnoError(f"{path}: an export there would replace {name}, {kept}; give a directory of its own")
    for folder in (run_dir.path / name for name in ("policies", "iterations")):
        if target.is_relative_to(_resolved(os.fspath(folder))):
            raise DnoError(f"{path}: lies in {folder}, which is the run's own; give a directory outside of it")


def _resolved(path: str) -> Path:
    """Follow the links of a path; one in an object store has none, and is in no local directory."""
    return Path(path if "://" in path else os.path.realpath(path))


def export_best(runtime: Runtime[RunConfig], *, policy: int) -> None:
    """Write the best policy to the run's own export, in place of an earlier one of another policy."""
    run_dir = runtime.run_dir
    what = {"policy": policy, "fingerprint": policy_fingerprint(run_dir.policy(policy))}
    exists = run_dir.export_path.exists()
    if exists and run_dir.exported_path.exists() and what.items() <= read_note(run_dir.exported_path).items():
        return
    export(runtime, policy=policy, path=os.fspath(run_dir.export_path), overwrite=exists)
    if is_primary():
        root = run_dir.export_path
        folders = [folder for folder in (root, root / ADAPTER_FOLDER) if folder.exists()]
        found = [path for folder in folders for path in sorted(folder.iterdir())]
        files = {os.path.relpath(path, root): digest_of(path) for path in found if path.is_file()}
        write_atomically(run_dir.exported_path, json.dumps({**what, "files": files}) + "\n")


def export_facts(config: RunConfig, run_dir: RunDir, *, policy: int) -> hf.ExportFacts:
    """Gather what the run directory knows of a policy."""
    trained = [policy - 1] if policy and is_lookahead(config, policy - 1) else range(policy)
    paired = [run_dir.stage("pair", iteration).manifest() for iteration in trained]
    evaluated = run_dir.stage("evaluate", policy - 1).manifest() if policy else None
    rates = evaluated.details["win_rates"] if evaluated is not None else {}
    shown = shown_answers(run_dir, iterations=config.iterations, policy=policy)
    dno = config.loss.name == "dno"
    return hf.ExportFacts(
        method=("Direct Nash Optimization" if dno else "iterated preference optimization")
        + " (arXiv 2404.03715)"
        + by_adapters(config),
        loss=config.loss.name,
        scheme=config.outer.scheme,
        policy=policy,
        iterations=policy,
        annotator=annotator_name(config.annotation),
        held_out_judge=annotator_name(config.evaluation_judge) if rates else None,
        num_pairs=sum(manifest.rows for manifest in paired if manifest is not None),
        win_rates=tuple(
            hf.HeldOutRate(f"policy {opponent}" if opponent.isdigit() else opponent, **found)
            for opponent, found in rates.items()
        ),
        template_options=config.model.template_options,
        messages=shown.messages if shown else (),
        answers=tuple((f"policy {number}", text) for number, text in shown.answers) if shown else (),
    )


def by_adapters(config: AnyConfig) -> str:
    """What a model card adds to how a model was trained."""
    return "" if config.adapter is None else f", by adapters of rank {config.adapter.rank}"


def annotator_name(section: AnnotationSection) -> str:
    """Say who judges, in words that mean something outside this run directory."""
    if section.judges:
        return " and ".join(f"{judge.model}, rubric {Path(judge.rubric_name).name}" for judge in section.judges)
    if section.kind == "reward_model" and section.reward_model is not None:
        return f"reward model {Path(section.reward_model.path).name}"
    if section.kind == "self":
        return f"the policy itself, rubric {Path(section.self_judge.rubric).name}"
    names = {
        "python": f"the function {section.python.function}" if section.python else "",
        "oracle": f"embedded oracle ({', '.join(section.oracle.criteria)})",
        "table": "embedded table of preferences",
        "given": "points that came with the data",
        "gold": "the prompts' own responses win by definition",
    }
    return names[section.kind]


def export_pool(runtime: Runtime[RunConfig], *, path: str) -> None:
    """Write the mixture that Algorithm 1 returns: policies 0 .. T-1, of which each prompt draws one.

    `mixture.json`, written last, marks the pool whole and says how `pool_member` draws.
    """
    size = runtime.config.iterations
    names = [f"policy-{policy:03d}" for policy in range(size)]
    whole = epath.Path(path) / "mixture.json"
    if whole.exists() and read_note(whole)["policies"] == names:
        return
    for policy, name in enumerate(names):
        if not (epath.Path(path) / name).exists():
            export(runtime, policy=policy, path=str(epath.Path(path) / name))
    if is_primary():
        rule = (
            f"int(sha256(json.dumps(['{Purpose.MIXTURE_MEMBER}', seed, prompt_id, 0]))[:8 bytes], big endian) mod the "
            "number of policies, for each prompt"
        )
        text = json.dumps({"policies": names, "seed": runtime.config.seed, "draw": rule}, indent=2)
        write_atomically(epath.Path(path) / "mixture.json", text + "\n")
    barrier("export pool")


def pool_member(prompt_id: str, *, seed: int, size: int, sample: int = 0) -> int:
    """Draw the policy that answers a prompt, uniformly of `size`: unif(pi_1 .. pi_T), Algorithm 1, line 6."""
    return integer(Purpose.MIXTURE_MEMBER, seed, prompt_id, sample, below=size)
