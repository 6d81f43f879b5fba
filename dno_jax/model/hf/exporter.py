"""Parameters to a checkpoint that transformers loads, proved by reading it back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, abstract_params, logits
from dno_jax.model.hf.config_json import TOKENIZER_FILES, parse_config, read_json
from dno_jax.model.hf.files import SINGLE_FILE
from dno_jax.model.hf.importer import load, tree_leaf
from dno_jax.model.hf.tensors import stored_tensors


def save(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    source: str | Path,
    dtype: Any = np.float32,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that transformers loads, and prove it by reading it back before it gets its name.

    config.json is the source's, except for the entry that names the dtype of the file. The same parameters give the
    same bytes. One process must hold or reach all of `params`.

    Args:
        path: directory to create.
        config: the shape of `params`; must agree with the source's config.json.
        params: numpy or jax arrays in our tree.
        source: the checkpoint directory that training started from; its tokenizer and generation files are copied.
        dtype: of the file, float32 or bfloat16.
        overwrite: replace an existing directory.

    Raises:
        DnoError: the target exists, the source disagrees with `config`, a parameter is missing, unexpected or of
            another shape, or the checkpoint read back gives other logits.
    """
    path, source = Path(path), Path(source)
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise DnoError(f"{path}: exists already; choose another directory or allow overwriting")
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        raise DnoError(f"dtype of a checkpoint is {dtype}; expected float32 or bfloat16")
    text = _config_text(config, source=source, dtype=dtype)
    params = _host_params(config, params)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary.chmod(0o755)
        (temporary / "config.json").write_text(text, encoding="utf-8")
        for file in _side_files(source):
            shutil.copyfile(file, temporary / file.name)
        _write_tensors(temporary / SINGLE_FILE, config, params, dtype=dtype)
        _prove(temporary, config, params, dtype=dtype)
        _rename_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config_text(config: ModelConfig, *, source: Path, dtype: np.dtype) -> str:
    file, tree = read_json(source, "config.json")
    theirs = parse_config(tree, place=str(file), rope_length=config.rope_length)
    for field in fields(ModelConfig):
        mine, other = getattr(config, field.name), getattr(theirs, field.name)
        if mine != other:
            raise DnoError(f"{file}: {field.name} is {other!r}, but the parameters have {mine!r}; wrong source?")
    named = [key for key in ("dtype", "torch_dtype") if key in tree]
    if all(tree[key] == dtype.name for key in named):
        return file.read_text(encoding="utf-8")
    # transformers loads in the dtype that this entry names, whatever the file holds.
    return json.dumps({**tree, **dict.fromkeys(named, dtype.name)}, indent=2) + "\n"


def _host_params(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return float32 numpy arrays, after comparing the tree with the config."""
    wanted = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(abstract_params(config))}
    given = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(dict(params))}
    for name in sorted(wanted.keys() ^ given.keys()):
        state = "missing" if name in wanted else "unexpected"
        raise DnoError(f"parameter {name} is {state}; the config describes {', '.join(sorted(wanted))}")
    for name, leaf in wanted.items():
        if tuple(given[name].shape) != leaf.shape:
            raise DnoError(f"parameter {name} has shape {tuple(given[name].shape)}; the config says {leaf.shape}")
    return jax.tree.map(lambda a: np.asarray(a, np.float32), dict(params))


def _name(path: Any) -> str:
    return "/".join(str(key.key) for key in path)


def _side_files(source: Path) -> Iterator[Path]:
    names = [*TOKENIZER_FILES, "generation_config.json"]
    yield from (source / name for name in names if (source / name).is_file())


def _write_tensors(file: Path, config: ModelConfig, params: dict[str, Any], *, dtype: np.dtype) -> None:
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for stored in stored_tensors(config):
        parts = []
        for tensor, index in stored.parts:
            parts.append(tensor.to_hf(tree_leaf(params, tensor.path)[index]).astype(dtype))
        tensors[stored.name] = np.ascontiguousarray(np.concatenate(parts))
    # The library sorts by dtype and name, so equal tensors give equal bytes.
    save_file(tensors, file, metadata={"format": "pt"})


def _prove(directory: Path, config: ModelConfig, params: dict[str, Any], *, dtype: np.dtype) -> None:
    """Compare the logits of what was written with those of what was meant, bit for bit."""
    _, written = load(directory)
    meant = jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), params)
    if np.array_equal(_probe(config, written), _probe(config, meant)):
        return
    differ = [
        _name(path)
        for (path, a), b in zip(jax.tree.leaves_with_path(meant), jax.tree.leaves(written), strict=True)
        if not np.array_equal(a, b)
    ]
    raise DnoError(
        f"{directory}: the checkpoint read back gives other logits; differing or not finite: "
        f"{', '.join(differ) or 'the logits themselves'}. Nothing was put in place."
    )


def _probe(config: ModelConfig, params: dict[str, Any]) -> np.ndarray:
    length = min(16, config.max_position_embeddings)
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    token = jnp.asarray(np.random.default_rng(0).integers(config.vocab_size, size=(2, length)), jnp.int32)

    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden, _ = Decoder(config).apply({"params": params}, token, position)
        return logits(config, params, hidden)

    return np.asarray(run(params))


def _rename_into_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.rename(path, aside / "old")
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(aside / "old", path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
