"""Adapters to and from the folders that PEFT writes: adapter_config.json and adapter_model.safetensors.

A key of the configuration that is neither understood nor known to change nothing is refused, as in config_json.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.adapters import LINEAR, TARGETS, AdapterConfig, shown_target, target_of
from dno_jax.model.config import ModelConfig
from dno_jax.model.hf.config_json import loads_alone, read_json
from dno_jax.model.hf.exporter import gather, on_host, on_primary
from dno_jax.model.hf.files import ITEM_BYTES, Header, read_header, read_whole
from dno_jax.model.hf.importer import put_leaf
from dno_jax.model.hf.settings import shown
from dno_jax.model.hf.tensors import Tensor, tensor_table

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "merge it into its base with PEFT's merge_and_unload, and give the result as model.path, without adapter.path"
_PREFIX = "base_model.model."
_IN_TOWER = f"{_PREFIX}model.language_model."
_MAX_LINES = 8
# Keys that change nothing of what an adapter adds once it is trained.
_HARMLESS = frozenset({"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"})
_HARMLESS |= {"target_modules", "exclude_modules", "layers_pattern", "megatron_core", "qalora_group_size"}
_HARMLESS |= {"ensure_weight_tying", "runtime_config", "lora_dropout", "init_lora_weights", "eva_config", "task_type"}
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "bias", "fan_in_fan_out"})
# Starts that take something out of the base's weights: what was trained stands beside others than the checkpoint's.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


class NotForPeft(DnoError):
    """PEFT has no adapters that are those of this model."""


@dataclass(frozen=True)
class Given:
    """What a folder holds.

    Attributes:
        rank, alpha: alpha over rank is what A B is multiplied by, with use_rslora too.
        targets: of LINEAR, in its order.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    headers: Mapping[str, Header]


def adapter_table(config: ModelConfig, adapter: AdapterConfig) -> list[Tensor]:
    """Return where each leaf of the adapters lies in PEFT's file.

    Raises:
        NotForPeft: the family's checkpoints hold several of our matrices in one, whose adapter PEFT has one of.
    """
    table: list[Tensor] = []
    for tensor in tensor_table(config):
        name, target = tensor.path[-1], target_of(tensor.path[-1])
        if tensor.path[0] != "layers" or target not in adapter.targets:
            continue
        module = tensor.template.removesuffix(".weight")
        if tensor.total_rows is not None and len(TARGETS[target]) == 1:
            raise NotForPeft(
                f"{config.family}'s checkpoints have one matrix {module.rpartition('.')[2]} in place of {name}_proj "
                "and others, and PEFT one adapter for it, where we have several: they are neither written for PEFT nor "
                "read from it; a merged checkpoint holds the policy"
            )
        inputs, outputs = tensor.shape[: tensor.inputs], tensor.shape[tensor.inputs :]
        a = replace(
            tensor,
            path=(*tensor.path[:-1], f"{target}_a"),
            template=f"{_PREFIX}{module}.lora_A.weight",
            shape=(*inputs, adapter.rank),
            first_row=0,
            total_rows=None,
            interleaved=0,
        )
        if a not in table:  # matrices that checkpoints hold in one have one A
            table.append(a)
        path, template = (*tensor.path[:-1], f"{name}_b"), f"{_PREFIX}{module}.lora_B.weight"
        table.append(replace(tensor, path=path, template=template, inputs=1, shape=(adapter.rank, *outputs)))
    return table


def _stored(table: list[Tensor]) -> dict[str, list[tuple[Tensor, tuple[int, ...]]]]:
    """Return, by the name of each tensor of the file, what its rows are made of, in order."""
    found: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}
    for tensor in table:
        for index, name in zip(np.ndindex(*tensor.stack), tensor.names, strict=True):
            found.setdefault(name, []).append((tensor, index))
    return found


def save(
    path: str | Path,
    config: ModelConfig,
    adapter: AdapterConfig,
    adapters: Mapping[str, Any],
    *,
    source: str | Path,
    base: tuple[str, str | None],
) -> None:
    """Write a folder that PEFT loads on top of `source`, and prove it by reading it back. Every process calls this.

    Args:
        path: of a folder; what lies there is replaced.
        adapters: numpy or jax arrays in our tree, sharded in any way.
        source: the checkpoint that the adapters stand beside.
        base: what its name is to be, and its revision.

    Raises:
        NotForPeft: PEFT has no such adapters for this model.
        DnoError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    if not loads_alone(source):
        raise NotForPeft(
            f"{source}: a model with a tower beside it, whose layers PEFT finds under other names in every version of "
            "transformers: no adapter is written for PEFT; the merged checkpoint holds the policy"
        )
    table = adapter_table(config, adapter)
    tensors: dict[str, np.ndarray] = {}
    for name, parts in _stored(table).items():
        gathered = [on_host(gather(adapters, part)).astype(np.float32) for part in parts]  # by all processes together
        rows = [tensor.to_hf(leaf) for (tensor, _), leaf in zip(parts, gathered, strict=True)]
        tensors[name] = np.ascontiguousarray(np.concatenate(rows))
    tree = _config_json(_modules(config, table), adapter, base)
    on_primary(lambda: _write(path, tree, tensors), path=path)
    on_primary(lambda: _compare(path, config, adapter, tensors), path=path)


def _modules(config: ModelConfig, table: list[Tensor]) -> list[str]:
    """Return the ends of names by which PEFT finds the matrices of a table, and no others."""
    own = {".".join(tensor.template.split(".")[-4:-2]) for tensor in table}
    names = {".".join(tensor.template.split(".")[-3:-1]) for tensor in tensor_table(config)}
    others = {name.rpartition(".")[2] for name in names - own}
    return sorted({name if (last := name.rpartition(".")[2]) in others else last for name in own})


def _config_json(modules: list[str], adapter: AdapterConfig, base: tuple[str, str | None]) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base[0],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "revision": base[1],
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _write(path: Path, tree: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    temporary = path.parent / f".{path.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / CONFIG_FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    save_file(dict(tensors), str(temporary / WEIGHTS_FILE), metadata={"format": "pt"})
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)


def _compare(path: Path, config: ModelConfig, adapter: AdapterConfig, meant: Mapping[str, np.ndarray]) -> None:
    given = read(path, config)
    same = given.targets == adapter.targets and given.headers.keys() == meant.keys()
    if not same or not all(np.array_equal(read_whole(given.headers[name]), meant[name]) for name in meant):
        raise DnoError(f"{path}: the adapter read back is not the one that was meant")


def read(path: str | Path, config: ModelConfig) -> Given:
    """Read what a folder of PEFT's holds, without its numbers.

    Raises:
        DnoError: it is no such folder, or holds what is not supported: which, and what to do.
    """
    path = Path(path)
    if not path.is_dir():
        raise DnoError(f"{path}: no such directory; expected one of PEFT's, with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (path / WEIGHTS_FILE).exists() and (path / "adapter_model.bin").exists():
        raise DnoError(
            f"{path}: holds a pickle (adapter_model.bin), which is code and is not read; save the adapter again with "
            "safe_serialization=True"
        )
    place, tree = read_json(path, CONFIG_FILE)
    _refuse(tree, place=place)
    rank: Any = tree.get("r")
    alpha: Any = tree.get("lora_alpha")
    if not _is_number(rank) or rank != int(rank) or rank < 1 or not _is_number(alpha) or not alpha > 0:
        raise DnoError(
            f"{place}: r is {shown(rank)}, lora_alpha is {shown(alpha)}; expected at least 1, and a number above 0"
        )
    if tree.get("use_rslora"):  # alpha / sqrt(r) is what it multiplies by
        alpha = alpha * rank**0.5
    stored = read_header(path / WEIGHTS_FILE)
    # Of a model with a tower beside it, whose language model has a name there.
    headers = {name.replace(_IN_TOWER, f"{_PREFIX}model.", 1): header for name, header in stored.items()}
    targets = tuple(name for name in LINEAR if any(_is_of(config, name, stored) for stored in headers))
    given = Given(int(rank), float(alpha), targets, headers)
    _check(given, config, place=path / WEIGHTS_FILE)
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_of(config: ModelConfig, target: str, stored: str) -> bool:
    """Whether a tensor of the file is of a matrix of ours, in any layer."""
    templates = [tensor.template for tensor in tensor_table(config) if tensor.path[-1] in TARGETS[target]]
    return any(stored.endswith(f".{name.split('{}.')[-1].removesuffix('weight')}lora_A.weight") for name in templates)


def _refuse(tree: Mapping[str, Any], *, place: Path) -> None:
    """Raise DnoError where a configuration has what we have not."""
    wanted = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False}
    for key, value in wanted.items():
        if (found := tree.get(key, value)) != value:
            raise DnoError(f"{place}: {key} is {shown(found)}; supported is only {value!r}: {_MERGE}")
    if (task := tree.get("task_type")) not in (None, "CAUSAL_LM"):
        raise DnoError(f"{place}: task_type is {shown(task)}; supported is only 'CAUSAL_LM'")
    for key in sorted(tree.keys() - _HARMLESS - _READ):
        if tree[key]:
            raise DnoError(f"{place}: {key} is {shown(tree[key])}; supported are only adapters without it: {_MERGE}")
    start = tree.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASES):
        raise DnoError(
            f"{place}: init_lora_weights is {start!r}, which changes the base's weights; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes a plain one of it, or " + _MERGE
        )


def _check(given: Given, config: ModelConfig, *, place: Path) -> None:
    """Compare names, shapes and dtypes with what the model takes; one error names all that is wrong."""
    adapter = AdapterConfig.of(config, rank=given.rank, alpha=given.alpha, targets=given.targets)
    expected = {name: tensor.hf_shape for tensor in adapter_table(config, adapter) for name in tensor.names}
    wrong = [f"tensor {name} is missing" for name in sorted(expected.keys() - given.headers.keys())]
    wrong += [
        f"unexpected tensor {name}: adapters are supported of the linear layers of blocks alone, one rank for all"
        for name in sorted(given.headers.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & given.headers.keys()):
        stored = given.headers[name]
        if stored.shape != expected[name]:
            wrong.append(f"tensor {name} has shape {stored.shape}; this model and r={given.rank} want {expected[name]}")
        if stored.dtype not in ITEM_BYTES:
            wrong.append(f"tensor {name} has dtype {stored.dtype}; expected {', '.join(ITEM_BYTES)}")
    if len(wrong) > _MAX_LINES:
        wrong[_MAX_LINES - 1 :] = [f"and {len(wrong) - _MAX_LINES + 1:,} more"]
    if wrong or not given.targets:
        raise DnoError("\n  ".join([f"{place}: no adapter of this model", *wrong, f"To use it all the same: {_MERGE}"]))


class _Whole:
    """Reads tensors whole, as `Tensor.read` asks for parts of them."""

    def __init__(self, headers: Mapping[str, Header]):
        self._headers = headers

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return read_whole(self._headers[name])[index].astype(np.float32)


def load(path: str | Path, config: ModelConfig, adapter: AdapterConfig) -> dict[str, Any]:
    """Read the adapters of a folder of PEFT's: float32 numpy arrays in our tree.

    Args:
        adapter: what the run trains; the folder's must be just that.

    Raises:
        DnoError: the folder is refused (`read`), holds adapters of another shape, or a number that is none.
    """
    given = read(path, config)
    if (given.rank, given.targets) != (adapter.rank, adapter.targets) or not np.isclose(given.alpha, adapter.alpha):
        theirs, mine = (", ".join(map(shown_target, targets)) for targets in (given.targets, adapter.targets))
        raise DnoError(
            f"adapter.path {path}: rank {given.rank}, alpha {given.alpha:g}, targets {theirs}; the configuration says "
            f"{adapter.rank}, {adapter.alpha:g} and {mine}. Set adapter.rank={given.rank} "
            f"adapter.alpha={given.alpha:g} adapter.targets=[{theirs.replace(' ', '')}]"
        )
    tree: dict[str, Any] = {}
    for tensor in adapter_table(config, adapter):
        leaf = tensor.read(_Whole(given.headers), (slice(None),) * (len(tensor.stack) + len(tensor.shape)))
        if not np.all(np.isfinite(leaf)):
            raise DnoError(
                f"adapter.path {path}: {tensor.template.format('N')} holds NaN or infinity; give a whole one"
            )
        put_leaf(tree, tensor.path, leaf)
    return tree
