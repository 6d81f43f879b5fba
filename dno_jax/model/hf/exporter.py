"""Parameters to a checkpoint that transformers loads, proved by reading it back.

One tensor of the files is in host memory at a time. Every process takes part in bringing it together; process 0 writes:
the tensors are replicated on the way anyway, and one writer needs no agreement about who closes which file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, logits, rewards
from dno_jax.model.hf.card import LICENCE_FILES, ExportFacts, model_card
from dno_jax.model.hf.config_json import PROCESSOR_FILES, TOKENIZER_FILES
from dno_jax.model.hf.files import INDEX_FILE, TensorFiles, read_whole
from dno_jax.model.hf.importer import THREADS, Reader, load, pieces, put_leaf, slices, tree_leaf
from dno_jax.model.hf.rewritten import config_text, write_tokenizer
from dno_jax.model.hf.tensors import Tensor, tensor_table
from dno_jax.model.hf.writer import Planned, ShardFile, plan_shards, plan_tensors
from dno_jax.model.params import abstract_params

MAX_SHARD_BYTES = 5_000_000_000


def save(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    source: str | Path,
    tokenizer: str | Path | None = None,
    chat_template: str | None = None,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    facts: ExportFacts | None = None,
    overwrite: bool = False,
    pad_token_id: int | None = None,
) -> None:
    """Write a checkpoint that transformers loads, and prove it by reading it back before it gets its name.

    config.json is the source's, with the dtype of the file and in words that other programs read alike
    (rewritten.py). The same parameters give the same bytes. Every process calls this; several need a file system that
    all of them see. What an interrupted call left beside `path` (.NAME.partial) is removed by the next one.

    Args:
        path: directory to create.
        config: the shape of `params`; must agree with the source's config.json.
        params: numpy or jax arrays in our tree, sharded in any way.
        source: the checkpoint directory that training started from.
        tokenizer: directory of the tokenizer and generation files that are copied; None is the source.
        chat_template: Jinja text that the model was trained with; None is the tokenizer's own.
        dtype: of the file, float32 or bfloat16; None keeps what each tensor has in the source (or its config.json
            names, where the source has no weights).
        max_shard_bytes: several files and an index are written where one file would be larger.
        facts: what the model card says of the run.
        overwrite: replace a directory that is empty or holds an exported checkpoint.
        pad_token_id: of a reward model, whose source may be a language model; None: the source's.

    Raises:
        DnoError: the target exists and may not be replaced, or cannot be written; the source disagrees with `config`; a
            parameter is missing, unexpected or of another shape; or the checkpoint read back holds other values or
            gives other logits.
    """
    path, source = Path(os.path.realpath(path)), Path(source)  # "." has no name that could be given to another
    if dtype is not None and np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        raise DnoError(f"dtype of a checkpoint is {np.dtype(dtype)}; expected float32 or bfloat16")
    if max_shard_bytes < 1:
        raise DnoError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number of bytes")
    text = config_text(config, source=source, dtype=dtype, pad_token_id=pad_token_id)
    _check_params(config, params)
    plan = plan_tensors(config, source=source, dtype=dtype)
    temporary, beside = path.parent / f".{path.name}.partial", Path(tokenizer or source)

    def begin() -> None:
        _recover(path)
        if path.exists() or path.is_symlink():
            if not overwrite:
                raise DnoError(f"{path}: exists already; choose another directory or allow overwriting")
            check_replaceable(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "config.json").write_text(text, encoding="utf-8")
        (temporary / "README.md").write_text(model_card(source, facts=facts, head=config.head), encoding="utf-8")
        for file in _side_files(beside):
            shutil.copyfile(file, temporary / file.name)
        write_tokenizer(beside, temporary, chat_template=chat_template)

    try:
        on_primary(begin, path=path)
        _write_tensors(temporary, plan, params, max_shard_bytes=max_shard_bytes)
        _compare_tensors(temporary, config, plan, params)
        _compare_logits(temporary, config, plan, params)
        on_primary(lambda: _rename_into_place(temporary, path), path=path)
    finally:
        if _is_primary():
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: str | Path) -> None:
    """Raise DnoError unless nothing is lost with a directory but an export: what is replaced is deleted."""
    try:
        names = os.listdir(path)
    except OSError as error:
        raise DnoError(f"{path}: cannot be overwritten ({error.strerror or error}); give another path") from None
    if names and not ("config.json" in names and any(name.endswith(".safetensors") for name in names)):
        raise DnoError(
            f"{path}: not overwritten, as it is neither empty nor an exported checkpoint (config.json and "
            "*.safetensors); give another path, or remove it first"
        )


def _check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    wanted = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(abstract_params(config))}
    given = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(dict(params))}
    for name in sorted(wanted.keys() ^ given.keys()):
        state = "missing" if name in wanted else "unexpected"
        raise DnoError(f"parameter {name} is {state}; the config describes {', '.join(sorted(wanted))}")
    for name, leaf in wanted.items():
        if tuple(given[name].shape) != leaf.shape:
            raise DnoError(f"parameter {name} has shape {tuple(given[name].shape)}; the config says {leaf.shape}")


def _name(path: Any) -> str:
    return "/".join(str(key.key) for key in path)


def _side_files(folder: Path) -> Iterator[Path]:
    names = [*TOKENIZER_FILES, *PROCESSOR_FILES, "generation_config.json", *LICENCE_FILES]
    yield from (folder / name for name in names if (folder / name).is_file())


def _is_primary() -> bool:
    return jax.process_index() == 0


def _agree(error: Exception | None) -> None:
    """Raise the error of process 0 on every process: none may wait for another that has given up."""
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if error is not None:
        raise error
    if failed:
        raise DnoError("export: process 0 gave up; its message says why")


def on_primary(act: Callable[[], None], *, path: Path) -> None:
    error: Exception | None = None
    if _is_primary():
        try:
            act()
        except OSError as caught:
            error = DnoError(f"{path}: the checkpoint cannot be written ({caught}); give a directory that can")
        except Exception as caught:
            error = caught
    _agree(error)


def _write_tensors(directory: Path, plan: list[Planned], params: Mapping[str, Any], *, max_shard_bytes: int) -> None:
    shards = plan_shards(plan, max_bytes=max_shard_bytes)
    error: Exception | None = None
    for file, tensors in shards.items():
        with ExitStack() as stack:
            opened: ShardFile | None = None
            for tensor in tensors:
                parts = [gather(params, part) for part in tensor.parts]
                # After an error all keep bringing tensors together: whoever stopped would leave the others waiting.
                if _is_primary() and error is None:
                    try:
                        opened = opened or stack.enter_context(closing(ShardFile(directory / file, tensors)))
                        opened.append(tensor, tensor.compose([on_host(part) for part in parts]))
                    except Exception as caught:
                        error = caught
                del parts  # before the next ones come
    if len(shards) > 1 and error is None and _is_primary():
        weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        tree = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in plan)}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _agree(error)


@partial(jax.jit, static_argnames="everywhere")
def _take(leaf: jax.Array, index: tuple[jax.Array, ...], *, everywhere: NamedSharding | None) -> jax.Array:
    """Return one layer of a leaf. The index is traced: one program serves all layers."""
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False)
    # A copy: the caller's own array would keep the host copy that is made of it.
    leaf = jnp.copy(leaf)
    return leaf if everywhere is None else jax.lax.with_sharding_constraint(leaf, everywhere)


def gather(params: Mapping[str, Any], part: tuple[Any, tuple[int, ...]]) -> Any:
    """Return one layer of one leaf, where process 0 can read it; with several processes it is on every device."""
    tensor, index = part
    leaf = tree_leaf(params, tensor.path)
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[index]
    everywhere = None if leaf.is_fully_addressable else _everywhere(leaf)
    return _take(leaf, tuple(np.int32(i) for i in index), everywhere=everywhere).block_until_ready()


def _everywhere(leaf: jax.Array) -> NamedSharding:
    if not isinstance(leaf.sharding, NamedSharding):
        raise DnoError(f"an array of several processes has {leaf.sharding}; expected a NamedSharding")
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


def on_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = array.addressable_data(0)
    return np.asarray(array)


def _compare_tensors(directory: Path, config: ModelConfig, plan: list[Planned], params: Mapping[str, Any]) -> None:
    """Read every tensor back as import does and compare it with what was meant, bit for bit."""
    differ: list[str] = []
    error: Exception | None = None
    with ExitStack() as stack:
        files: TensorFiles | None = None
        try:
            if _is_primary():
                files = stack.enter_context(closing(TensorFiles(directory)))
                files.check(tensor_table(config), tied=config.tie_word_embeddings, place=directory)
        except Exception as caught:
            error = caught
        _agree(error)
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        for planned in plan:
            if files is not None and planned.carried is not None and error is None:
                written, meant = read_whole(files.headers[planned.name]), read_whole(planned.carried)
                if written.dtype != meant.dtype or written.tobytes() != meant.tobytes():
                    differ.append(planned.name)
            for tensor, index in planned.parts:
                gathered = gather(params, (tensor, index))
                if files is not None and error is None:
                    try:
                        meant = on_host(gathered).reshape((1,) * len(index) + tensor.shape)
                        if not _equal(Reader(files, pool, np.dtype(np.float32)), tensor, index, meant, planned.dtype):
                            differ.append(f"{'/'.join(tensor.path)} ({planned.name})")
                    except Exception as caught:
                        error = caught
                gathered = meant = None
    if differ and error is None:
        error = DnoError(
            f"{directory}: the checkpoint read back holds other values than those meant: {', '.join(differ)}. "
            "Nothing was put in place."
        )
    _agree(error)


def _equal(reader: Reader, tensor: Tensor, index: tuple[int, ...], meant: np.ndarray, dtype: np.dtype) -> bool:
    for start, size in pieces(tensor, meant.shape):
        written = reader.read(tensor, (*index, *start[len(index) :]), size)
        part = meant[slices(start, size)].astype(dtype).astype(np.float32)
        if not np.array_equal(written.view(np.uint32), part.view(np.uint32)):
            return False
    return True


def _compare_logits(directory: Path, config: ModelConfig, plan: list[Planned], params: Mapping[str, Any]) -> None:
    """Compare the logits of what was written with those of what was meant, in the shardings of the parameters."""
    # A tree: load reads each leaf as the file holds it, so that the second copy is no larger than it must be.
    dtypes = _dtypes(plan)
    on_devices = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(dict(params)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, dict(params)) if on_devices else None
    written = _probe(config, load(directory, head=config.head, shardings=shardings, dtype=dtypes, finite=False)[1])
    meant = _probe(config, jax.tree.map(_as_stored, dict(params), dtypes))
    if not (np.array_equal(written, meant) and np.all(np.isfinite(meant))):
        raise DnoError(
            f"{directory}: the checkpoint read back gives other logits, or some that are not finite. "
            "Nothing was put in place."
        )


def _dtypes(plan: list[Planned]) -> dict[str, Any]:
    """The dtype that each parameter has in the files, in our tree."""
    dtypes: dict[str, Any] = {}
    for planned in plan:
        for tensor, _ in planned.parts:
            put_leaf(dtypes, tensor.path, planned.dtype)
    return dtypes


def stored_shapes(config: ModelConfig, *, source: str | Path, dtype: Any = None) -> dict[str, Any]:
    """Return the parameter tree as jax.ShapeDtypeStruct, with the dtypes in which `save` would write it."""
    dtypes = _dtypes(plan_tensors(config, source=Path(source), dtype=dtype))
    return jax.tree.map(lambda leaf, kind: jax.ShapeDtypeStruct(leaf.shape, kind), abstract_params(config), dtypes)


def _as_stored(leaf: Any, dtype: np.dtype) -> Any:
    if leaf.dtype == dtype:
        return leaf
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf).astype(dtype)
    return _cast(leaf, dtype)


@partial(jax.jit, static_argnums=1)
def _cast(leaf: jax.Array, dtype: np.dtype) -> jax.Array:
    return leaf.astype(dtype)


@partial(jax.jit, static_argnames=("config", "everywhere"))
def _probe_logits(params: Any, *, config: ModelConfig, everywhere: NamedSharding | None) -> jax.Array:
    length = min(16, config.max_position_embeddings)
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    token = jnp.asarray(np.random.default_rng(0).integers(config.vocab_size, size=(2, length)), jnp.int32)
    hidden, _ = Decoder(config).apply({"params": params}, token, position)
    found = rewards(params, hidden, position) if config.head == "reward" else logits(config, params, hidden)
    return found if everywhere is None else jax.lax.with_sharding_constraint(found, everywhere)


def _probe(config: ModelConfig, params: Mapping[str, Any]) -> np.ndarray:
    leaf = jax.tree.leaves(dict(params))[0]
    everywhere = _everywhere(leaf) if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable else None
    return on_host(_probe_logits(params, config=config, everywhere=everywhere))


def _recover(path: Path) -> None:
    """Put back what an overwriting export had set aside when it was killed."""
    aside = _aside(path)
    if aside.exists() and not path.exists():
        os.rename(aside, path)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _rename_into_place(temporary: Path, path: Path) -> None:
    for place in (*sorted(temporary.iterdir()), temporary):
        _flush(place)  # the rename must not overtake the bytes
    if not path.exists():
        os.rename(temporary, path)
    else:
        os.rename(path, _aside(path))
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(_aside(path), path)
            raise
        shutil.rmtree(_aside(path), ignore_errors=True)
    _flush(path.parent)


def _flush(place: Path) -> None:
    opened = os.open(place, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
