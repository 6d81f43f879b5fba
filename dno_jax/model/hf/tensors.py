"""Where every parameter lies in a checkpoint: the only place that knows both layouts.

Hugging Face stores one [out, in] matrix per layer with heads merged; we store [in, out], heads apart, layers stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dno_jax.model.config import Mixer, ModelConfig
from dno_jax.model.hf.families import FAMILIES
from dno_jax.model.stack import layer_groups


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
        layers: the numbers of the layers that are stacked; (): all, from 0.
        merges: our axes (after the stack) that each axis of Hugging Face's tensor merges; None: as `inputs` says.
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
    layers: tuple[int, ...] = ()
    merges: tuple[tuple[int, ...], ...] | None = None
    first_row: int = 0
    total_rows: int | None = None
    interleaved: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(self.name, np.ndindex(*self.stack)))

    def name(self, index: Sequence[int]) -> str:
        """The name of the tensor at an index of the stack."""
        if self.layers:
            index = (self.layers[index[0]], *index[1:])
        return self.template.format(*index)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Our axes (after the stack) that each axis of Hugging Face's tensor merges."""
        axes = tuple(range(len(self.shape)))
        if self.merges is not None:
            return self.merges
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
            name = self.name([row[i] for row, i in zip(rows, place, strict=True)])
            out[place] = self._read_one(files, name, bounds)
        return out

    def _read_one(self, files: SliceReader, name: str, bounds: list[tuple[int, int]]) -> np.ndarray:
        merged, apart, rest = [], [], []
        for group in self.groups:
            # Slice the file along the outermost axis of each group; what lies inside comes whole and is cut in memory.
            if not group:  # an axis of one entry, which ours has not
                merged.append(slice(0, 1))
                continue
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
    family, D, V = FAMILIES[config.family], config.hidden_size, config.vocab_size
    table = [Tensor(("embed",), "model.embed_tokens.weight", 0, (V, D), ())]
    if config.norm == "rms":
        table.append(Tensor(("final_norm",), f"model.{family.final_norm}.weight", 0, (D,), ()))
    if config.head == "reward":
        table.append(Tensor(("score",), "score.weight", 1, (D, 1), ()))
    elif not config.tie_word_embeddings:
        table.append(Tensor(("head",), "lm_head.weight", 1, (D, V), ()))
    rotary = (config.rotary_dim or config.head_dim) if family.interleaved else 0
    for path, layers in layer_groups(config).items():
        for leaf in _leaves(config, config.layer_mixers[layers[0]]):
            name = family.names[leaf.name]
            bare = leaf.name in _BARE
            table.append(
                Tensor(
                    ("layers", *path, f"{leaf.name}_bias" if leaf.is_bias else leaf.name),
                    f"model.layers.{{}}.{name}" + ("" if bare else ".bias" if leaf.is_bias else ".weight"),
                    leaf.inputs,
                    leaf.shape,
                    (len(layers), config.num_experts) if "{}" in name else (len(layers),),
                    layers=layers if path else (),
                    merges=leaf.merges,
                    interleaved=rotary if leaf.name in ("q", "k") else 0,
                )
            )
    return _share_rows(table)


# Of tensors whose names end with no kind.
_BARE = ("delta_rate", "delta_shift")


@dataclass(frozen=True)
class _Leaf:
    """One parameter of a layer; see Tensor."""

    name: str
    shape: tuple[int, ...]
    inputs: int = 0
    is_bias: bool = False
    merges: tuple[tuple[int, ...], ...] | None = None


def _leaves(config: ModelConfig, mixer: Mixer) -> Iterator[_Leaf]:
    """Yield what a layer with a mixer has."""
    D, F = config.hidden_size, config.intermediate_size
    if config.norm == "rms":
        for name, present in (
            ("attention_norm", config.pre_norm),
            ("attention_post_norm", config.post_norm),
            ("mlp_norm", config.pre_norm),
            ("mlp_post_norm", config.post_norm),
        ):
            if present:
                yield _Leaf(name, (D,))
    yield from _MIXERS[mixer](config)
    if config.num_experts:
        yield _Leaf("router", (D, config.num_experts), 1)
    for name, shape in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D))):
        yield from _matrix(name, shape, inputs=1, bias=config.mlp_bias)


def _matrix(name: str, shape: tuple[int, ...], *, inputs: int, bias: bool = False) -> Iterator[_Leaf]:
    yield _Leaf(name, shape, inputs)
    if bias:
        yield _Leaf(name, shape[inputs:], is_bias=True)


def _attention(config: ModelConfig) -> Iterator[_Leaf]:
    D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if config.qk_norm is not None and config.norm == "rms":
        yield _Leaf("q_norm", (N, H) if config.qk_norm == "all" else (H,))
        yield _Leaf("k_norm", (K, H) if config.qk_norm == "all" else (H,))
    width = 2 * H if config.attention_gate else H
    for name, shape in (("q", (D, N, width)), ("k", (D, K, H)), ("v", (D, K, H))):
        yield from _matrix(name, shape, inputs=1, bias=config.attention_bias)
    yield from _matrix("o", (N, H, D), inputs=2, bias=config.output_bias)


def _gated_delta(config: ModelConfig) -> Iterator[_Leaf]:
    D, W, V, P = config.hidden_size, config.conv_kernel, config.linear_num_value_heads, config.linear_value_head_dim
    key, value = (config.linear_num_key_heads, config.linear_key_head_dim), (V, P)
    heads = (("delta_q", key), ("delta_k", key), ("delta_v", value))
    for name, shape in heads:
        yield _Leaf(name, (D, *shape), 1)
    for name, shape in heads:  # [channels, 1, taps] in the file
        yield _Leaf(f"{name}_conv", (*shape, W), merges=((0, 1), (), (2,)))
    yield _Leaf("delta_gate", (D, *value), 1)
    yield _Leaf("delta_strength", (D, V), 1)
    yield _Leaf("delta_decay", (D, V), 1)
    yield _Leaf("delta_rate", (V,))
    yield _Leaf("delta_shift", (V,))
    yield _Leaf("delta_norm", (P,))
    yield _Leaf("delta_out", (*value, D), 2)


def _short_conv(config: ModelConfig) -> Iterator[_Leaf]:
    D, bias = config.hidden_size, config.conv_bias
    for name in ("conv_in_gate", "conv_out_gate", "conv_value"):
        yield from _matrix(name, (D, D), inputs=1, bias=bias)
    yield _Leaf("conv_taps", (D, config.conv_kernel), merges=((0,), (), (1,)))
    if bias:
        yield _Leaf("conv_taps", (D,), is_bias=True)
    yield from _matrix("conv_out", (D, D), inputs=1, bias=bias)


_MIXERS: dict[Mixer, Callable[[ModelConfig], Iterator[_Leaf]]] = {
    "attention": _attention,
    "gated_delta": _gated_delta,
    "short_conv": _short_conv,
}


def _share_rows(table: list[Tensor]) -> list[Tensor]:
    """Give each of the parameters that name one tensor its rows of it, in the order of the table."""

    def key(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
        return tensor.template, tensor.layers

    sizes: dict[Any, list[int]] = {}
    for tensor in table:
        sizes.setdefault(key(tensor), []).append(tensor.part_shape[0])
    start = dict.fromkeys(sizes, 0)
    shared = []
    for tensor in table:
        own = key(tensor)
        if len(sizes[own]) > 1:
            first, count = start[own], tensor.part_shape[0]
            start[own] += count
            tensor = replace(tensor, first_row=first, total_rows=sum(sizes[own]))
        shared.append(tensor)
    return shared


def stored_tensors(config: ModelConfig) -> list[Stored]:
    """Return the tensors that a checkpoint's files hold, each with the parameters that it is made of."""
    parts: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}
    for tensor in tensor_table(config):
        for index, name in zip(np.ndindex(*tensor.stack), tensor.names, strict=True):
            parts.setdefault(name, []).append((tensor, index))
    return [Stored(name, own[0][0].hf_shape, tuple(own)) for name, own in parts.items()]
