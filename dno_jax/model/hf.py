"""Hugging Face checkpoints in and out: safetensors files to and from our parameter tree.

Hugging Face stores one [out, in] matrix a layer with heads merged; we store [in, out], heads apart, layers stacked. The
table in `_tensors` is the only place that knows both.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, abstract_params, logits
from dno_jax.model.hf_config import parse_config, read_config, read_end_token_ids, read_json
from dno_jax.model.tokenizer import TOKENIZER_FILES

__all__ = ["load", "read_config", "read_end_token_ids", "save"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")
# Buffers that old checkpoints carry; they follow from config.json.
_IGNORED_SUFFIXES = (".self_attn.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class _Tensor:
    """Where one parameter lies in a checkpoint.

    Attributes:
        path: keys in our tree.
        template: Hugging Face name; {} is the layer for stacked parameters.
        inputs: how many leading axes of ours (after the layer axis) are the matrix's inputs. 0: the axes keep their
            order; otherwise Hugging Face's matrix is [merged outputs, merged inputs].
        shape: of one layer, in our order.
        num_layers: None for a parameter that is not stacked.
    """

    path: tuple[str, ...]
    template: str
    inputs: int
    shape: tuple[int, ...]
    num_layers: int | None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.template,) if self.num_layers is None else tuple(map(self.template.format, range(self.num_layers)))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Our axes (of one layer) that each axis of Hugging Face's tensor merges."""
        axes = tuple(range(len(self.shape)))
        if self.inputs:
            return axes[self.inputs :], axes[: self.inputs]
        # A bias merges its axes; a table keeps them.
        return tuple((axis,) for axis in axes) if self.path == ("embed",) else (axes,)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        return tuple(int(np.prod([self.shape[axis] for axis in group])) for group in self.groups)

    def read(self, files: _Files, index: tuple[slice, ...]) -> np.ndarray:
        """Return float32 [layers..., axes...] of the part that `index` names, reading no more than it must."""
        layers, index = (range(1), index) if self.num_layers is None else (index[0], index[1:])
        if isinstance(layers, slice):
            layers = range(*layers.indices(self.num_layers or 1))
        bounds = [s.indices(size)[:2] for s, size in zip(index, self.shape, strict=True)]
        shape = tuple(stop - start for start, stop in bounds)
        out = np.empty((len(layers), *shape), np.float32)
        for row, layer in enumerate(layers):
            out[row] = self._read_one(files, self.names[layer], bounds)
        return out[0] if self.num_layers is None else out

    def _read_one(self, files: _Files, name: str, bounds: list[tuple[int, int]]) -> np.ndarray:
        merged, apart, rest = [], [], []
        for group in self.groups:
            # Slice the file along the outermost axis of each group; what lies inside comes whole and is cut in memory.
            first, inner = group[0], [self.shape[axis] for axis in group[1:]]
            stride = int(np.prod(inner)) if inner else 1
            start, stop = bounds[first]
            merged.append(slice(start * stride, stop * stride))
            apart += [stop - start, *inner]
            rest += [slice(None), *(slice(*bounds[axis]) for axis in group[1:])]
        part = files.read(name, tuple(merged)).reshape(apart)[tuple(rest)]
        return part.transpose(np.argsort([axis for group in self.groups for axis in group]))

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Return one layer's parameter in Hugging Face's layout."""
        return array.transpose([axis for group in self.groups for axis in group]).reshape(self.hf_shape)


def _tensors(config: ModelConfig) -> list[_Tensor]:
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    N, K, H, L = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    table = [
        _Tensor(("embed",), "model.embed_tokens.weight", 0, (V, D), None),
        _Tensor(("final_norm",), "model.norm.weight", 0, (D,), None),
    ]
    if not config.tie_word_embeddings:
        table.append(_Tensor(("head",), "lm_head.weight", 1, (D, V), None))

    def layer(name: str, hf_name: str, inputs: int, *shape: int) -> None:
        table.append(_Tensor(("layers", name), f"model.layers.{{}}.{hf_name}", inputs, shape, L))

    layer("attention_norm", "input_layernorm.weight", 0, D)
    layer("mlp_norm", "post_attention_layernorm.weight", 0, D)
    projections = [
        ("q", "self_attn.q_proj", config.attention_bias, 1, (D, N, H)),
        ("k", "self_attn.k_proj", config.attention_bias, 1, (D, K, H)),
        ("v", "self_attn.v_proj", config.attention_bias, 1, (D, K, H)),
        ("o", "self_attn.o_proj", config.attention_bias, 2, (N, H, D)),
        ("gate", "mlp.gate_proj", config.mlp_bias, 1, (D, F)),
        ("up", "mlp.up_proj", config.mlp_bias, 1, (D, F)),
        ("down", "mlp.down_proj", config.mlp_bias, 1, (F, D)),
    ]
    for name, hf_name, bias, inputs, shape in projections:
        layer(name, f"{hf_name}.weight", inputs, *shape)
        if bias:
            layer(f"{name}_bias", f"{hf_name}.bias", 0, *shape[inputs:])
    return table


class _Files:
    """The safetensors files of a checkpoint, open for reading slices."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._tensor_file: dict[str, Any] = {}
        self._place: dict[str, Path] = {}
        self._stack = contextlib.ExitStack()
        for file in _shards(path):
            try:
                opened = self._stack.enter_context(safe_open(str(file), framework="numpy"))
            except FileNotFoundError:
                self.close()
                raise DnoError(f"{file}: no such file; the checkpoint is incomplete, fetch it again") from None
            except (SafetensorError, OSError) as error:
                self.close()
                raise DnoError(f"{file}: truncated or corrupt safetensors file ({error}); fetch it again") from None
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in self._place:
                    self.close()
                    raise DnoError(f"{file}: tensor {name} stands in {self._place[name].name} too")
                self._tensor_file[name], self._place[name] = opened, file

    def close(self) -> None:
        self._stack.close()

    def check(self, table: list[_Tensor], *, tied: bool, place: Path) -> None:
        """Compare names, shapes and dtypes of everything before anything is read."""
        expected = {name: tensor.hf_shape for tensor in table for name in tensor.names}
        for name in sorted(expected.keys() - self._place.keys()):
            raise DnoError(f"{place}: tensor {name} is missing; expected shape {expected[name]}")
        for name in sorted(self._place.keys() - expected.keys()):
            if tied and name == "lm_head.weight":
                self._check_tied()
            elif not name.endswith(_IGNORED_SUFFIXES):
                raise DnoError(
                    f"{self._place[name]}: unexpected tensor {name}; config.json describes a model without it "
                    "(biases are declared by attention_bias and mlp_bias, a head by tie_word_embeddings)"
                )
        for name, shape in expected.items():
            view = self._tensor_file[name].get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise DnoError(
                    f"{self._place[name]}: tensor {name} has shape {tuple(view.get_shape())}; config.json says {shape}"
                )
            if view.get_dtype() not in _DTYPES:
                raise DnoError(
                    f"{self._place[name]}: tensor {name} has dtype {view.get_dtype()}; expected {', '.join(_DTYPES)}"
                )

    def _check_tied(self) -> None:
        # Some exporters write the tied head a second time; a head that differs would be dropped in silence.
        name, file = "lm_head.weight", self._tensor_file["lm_head.weight"]
        embed = self._tensor_file["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")
        if not np.array_equal(file.get_tensor(name), embed):
            raise DnoError(
                f"{self._place[name]}: tie_word_embeddings is true but {name} differs from model.embed_tokens.weight; "
                "set tie_word_embeddings to false in config.json or remove the tensor"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._tensor_file[name].get_slice(name)[index].astype(np.float32)


def _shards(path: Path) -> list[Path]:
    if (path / _SINGLE).exists():
        return [path / _SINGLE]
    if not (path / _INDEX).exists():
        raise DnoError(f"{path}: neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints can be read")
    file, tree = read_json(path, _INDEX)
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DnoError(f"{file}: no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise DnoError(f"{file}: shard {name!r} is not a file name in this directory")
    return [path / name for name in names]


def load(path: str | Path, *, shardings: Any = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        path: directory with config.json and model.safetensors, or its index and shards (bfloat16, float16 or float32).
        shardings: tree of jax.sharding.Sharding like the parameters; each device's slice is then read from the files
            alone, so that no host ever holds the model. None returns numpy arrays.

    Returns:
        (config, params), params float32 in the tree of decoder.abstract_params(config).

    Raises:
        DnoError: a file is missing, truncated or corrupt; a tensor is missing, unexpected, or of another shape or dtype
            than config.json says; or config.json is not understood.
    """
    path = Path(path)
    config = read_config(path)
    table = _tensors(config)
    with contextlib.closing(_Files(path)) as files:
        files.check(table, tied=config.tie_word_embeddings, place=path)
        params: dict[str, Any] = {}
        for tensor in table:
            stack = () if tensor.num_layers is None else (tensor.num_layers,)
            shape = stack + tensor.shape
            if shardings is None:
                array: Any = tensor.read(files, (slice(None),) * len(shape))
            else:
                sharding = _leaf(shardings, tensor.path)
                read = _Reader(tensor, files)
                array = jax.make_array_from_callback(shape, sharding, read)
                array.block_until_ready()
            _put(params, tensor.path, array)
    return config, params


@dataclass(frozen=True)
class _Reader:
    tensor: _Tensor
    files: _Files

    def __call__(self, index: Any) -> np.ndarray:
        return self.tensor.read(self.files, index)


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


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
        _write_tensors(temporary / _SINGLE, config, params, dtype=dtype)
        _prove(temporary, config, params, dtype=dtype)
        _rename_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config_text(config: ModelConfig, *, source: Path, dtype: np.dtype) -> str:
    file, tree = read_json(source, "config.json")
    theirs = parse_config(tree, place=str(file))
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
    for tensor in _tensors(config):
        array = _leaf(params, tensor.path)
        layers = [array] if tensor.num_layers is None else array
        for name, layer in zip(tensor.names, layers, strict=True):
            tensors[name] = np.ascontiguousarray(tensor.to_hf(layer).astype(dtype))
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
