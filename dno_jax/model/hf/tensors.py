"""Where every parameter lies in a checkpoint: the only place that knows both layouts.

Hugging Face stores one [out, in] matrix per layer with heads merged; we store [in, out], heads apart, layers stacked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from dno_jax.model.config import ModelConfig
from dno_jax.model.hf.families import FAMILIES


@runtime_checkable
class SliceReader(Protocol):
    """Reads a part of a named tensor as float32."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclass(frozen=True)
class Tensor:
    """Where one parameter lies in a checkpoint.

    Attributes:
        path: keys in our tree.
        template: Hugging Face name; a {} for each axis of the stack.
        inputs: how many leading axes of ours (after the stack) are the matrix's inputs. 0: the axes keep their
            order; otherwise Hugging Face's matrix is [merged outputs, merged inputs].
        shape: of one tensor, in our order.
        stack: leading axes of ours along which tensors are stacked: (), (layers,) or (layers, experts).
        first_row, total_rows: where several parameters share one tensor, where this one's begin on its axis 0, and
            how many there are in all. None: the tensor is this one's own.
        interleaved: leading entries of our last axis that stand in pairs (i, i + half) in ours, and side by side in
            the file (Family.interleaved).
    """

    path: tuple[str, ...]
    template: str
    inputs: int
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    first_row: int = 0
    total_rows: int | None = None
    interleaved: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.template.format(*index) for index in np.ndindex(*self.stack))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Our axes (after the stack) that each axis of Hugging Face's tensor merges."""
        axes = tuple(range(len(self.shape)))
        if self.inputs:
            return axes[self.inputs :], axes[: self.inputs]
        # A bias merges its axes; a table keeps them.
        return tuple((axis,) for axis in axes) if self.path == ("embed",) else (axes,)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of this parameter in Hugging Face's layout, by itself."""
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor in the file."""
        return self.part_shape if self.total_rows is None else (self.total_rows, *self.part_shape[1:])

    @property
    def rows(self) -> slice | None:
        """This parameter's rows of a shared tensor; None: all."""
        return None if self.total_rows is None else slice(self.first_row, self.first_row + self.part_shape[0])

    def read(self, files: SliceReader, index: tuple[slice, ...]) -> np.ndarray:
        """Return float32 [stack..., axes...] of the part that `index` names, reading no more than it must."""
        stack, index = index[: len(self.stack)], index[len(self.stack) :]
        rows = [range(*s.indices(size)) for s, size in zip(stack, self.stack, strict=True)]
        bounds = [s.indices(size)[:2] for s, size in zip(index, self.shape, strict=True)]
        out = np.empty((*map(len, rows), *(stop - start for start, stop in bounds)), np.float32)
        for place in np.ndindex(*map(len, rows)):
            name = self.template.format(*(row[i] for row, i in zip(rows, place, strict=True)))
            out[place] = self._read_one(files, name, bounds)
        return out

    def _read_one(self, files: SliceReader, name: str, bounds: list[tuple[int, int]]) -> np.ndarray:
        merged, apart, rest = [], [], []
        for group in self.groups:
            # Slice the file along the outermost axis of each group; what lies inside comes whole and is cut in memory.
            first, inner = group[0], [self.shape[axis] for axis in group[1:]]
            stride = math.prod(inner)
            start, stop = bounds[first]
            merged.append(slice(start * stride, stop * stride))
            apart += [stop - start, *inner]
            rest += [slice(None), *(self._cut(axis, *bounds[axis]) for axis in group[1:])]
        merged[0] = slice(self.first_row + merged[0].start, self.first_row + merged[0].stop)
        part = files.read(name, tuple(merged)).reshape(apart)[tuple(rest)]
        return part.transpose(np.argsort([axis for group in self.groups for axis in group]))

    def _cut(self, axis: int, start: int, stop: int) -> slice | np.ndarray:
        """Where the entries from `start` to `stop` of our axis lie along the file's."""
        if not self.interleaved or axis != len(self.shape) - 1:
            return slice(start, stop)
        return self._order[start:stop]

    @property
    def _order(self) -> np.ndarray:
        """Of each entry of our last axis, its place in the file."""
        turning = np.arange(self.interleaved).reshape(-1, 2).T.ravel()
        return np.concatenate([turning, np.arange(self.interleaved, self.shape[-1])])

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Return one tensor's parameter in Hugging Face's layout: its rows alone, where the tensor is shared."""
        if self.interleaved:
            array = array[..., np.argsort(self._order)]
        return array.transpose([axis for group in self.groups for axis in group]).reshape(self.part_shape)


@dataclass(frozen=True)
class Stored:
    """One tensor of the files: the parts that its rows are made of, in order.

    Attributes:
        parts: parameters, each with its index in the stack.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Tensor, tuple[int, ...]], ...]


def tensor_table(config: ModelConfig) -> list[Tensor]:
    """Return where each leaf of the parameter tree lies. Leaves that share a tensor stand in the order of its rows."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    N, K, H, L = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    names = FAMILIES[config.family].names
    rotary = (config.rotary_dim or H) if FAMILIES[config.family].interleaved else 0
    table = [Tensor(("embed",), "model.embed_tokens.weight", 0, (V, D), ())]
    if config.norm == "rms":
        table.append(Tensor(("final_norm",), "model.norm.weight", 0, (D,), ()))
    if config.head == "reward":
        table.append(Tensor(("score",), "score.weight", 1, (D, 1), ()))
    elif not config.tie_word_embeddings:
        table.append(Tensor(("head",), "lm_head.weight", 1, (D, V), ()))

    def layer(leaf: str, hf_name: str, inputs: int, *shape: int) -> None:
        stack = (L, config.num_experts) if "{}" in hf_name else (L,)
        turns = rotary if leaf.removesuffix("_bias") in ("q", "k") else 0
        name = f"model.layers.{{}}.{hf_name}"
        table.append(Tensor(("layers", leaf), name, inputs, shape, stack, interleaved=turns))

    norms: list[tuple[str, bool, tuple[int, ...]]] = [
        ("attention_norm", config.pre_norm, (D,)),
        ("attention_post_norm", config.post_norm, (D,)),
        ("mlp_norm", config.pre_norm, (D,)),
        ("mlp_post_norm", config.post_norm, (D,)),
        ("q_norm", config.qk_norm is not None, (N, H) if config.qk_norm == "all" else (H,)),
        ("k_norm", config.qk_norm is not None, (K, H) if config.qk_norm == "all" else (H,)),
    ]
    for leaf, present, shape in norms:
        if present and config.norm == "rms":
            layer(leaf, f"{names[leaf]}.weight", 0, *shape)
    if config.num_experts:
        layer("router", f"{names['router']}.weight", 1, D, config.num_experts)
    projections = [
        ("q", config.attention_bias, 1, (D, N, H)),
        ("k", config.attention_bias, 1, (D, K, H)),
        ("v", config.attention_bias, 1, (D, K, H)),
        ("o", config.output_bias, 2, (N, H, D)),
        ("gate", config.mlp_bias, 1, (D, F)),
        ("up", config.mlp_bias, 1, (D, F)),
        ("down", config.mlp_bias, 1, (F, D)),
    ]
    for leaf, bias, inputs, shape in projections:
        layer(leaf, f"{names[leaf]}.weight", inputs, *shape)
        if bias:
            layer(f"{leaf}_bias", f"{names[leaf]}.bias", 0, *shape[inputs:])
    return _share_rows(table)


def _share_rows(table: list[Tensor]) -> list[Tensor]:
    """Give each of the parameters that name one tensor its rows of it, in the order of the table."""
    sizes: dict[str, list[int]] = {}
    for tensor in table:
        sizes.setdefault(tensor.template, []).append(tensor.part_shape[0])
    start = dict.fromkeys(sizes, 0)
    shared = []
    for tensor in table:
        if len(sizes[tensor.template]) > 1:
            first, count = start[tensor.template], tensor.part_shape[0]
            start[tensor.template] += count
            tensor = replace(tensor, first_row=first, total_rows=sum(sizes[tensor.template]))
        shared.append(tensor)
    return shared


def stored_tensors(config: ModelConfig) -> list[Stored]:
    """Return the tensors that a checkpoint's files hold, each with the parameters that it is made of."""
    parts: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}
    for tensor in tensor_table(config):
        for index, name in zip(np.ndindex(*tensor.stack), tensor.names, strict=True):
            parts.setdefault(name, []).append((tensor, index))
    return [Stored(name, own[0][0].hf_shape, tuple(own)) for name, own in parts.items()]
