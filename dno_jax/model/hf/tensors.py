"""Where every parameter lies in a checkpoint: the only place that knows both layouts.

Hugging Face stores one [out, in] matrix a layer with heads merged; we store [in, out], heads apart, layers stacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dno_jax.model.config import ModelConfig


@runtime_checkable
class SliceReader(Protocol):
    """Reads a part of a named tensor as float32."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclass(frozen=True)
class Tensor:
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

    def read(self, files: SliceReader, index: tuple[slice, ...]) -> np.ndarray:
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

    def _read_one(self, files: SliceReader, name: str, bounds: list[tuple[int, int]]) -> np.ndarray:
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


def tensor_table(config: ModelConfig) -> list[Tensor]:
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    N, K, H, L = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    table = [
        Tensor(("embed",), "model.embed_tokens.weight", 0, (V, D), None),
        Tensor(("final_norm",), "model.norm.weight", 0, (D,), None),
    ]
    if not config.tie_word_embeddings:
        table.append(Tensor(("head",), "lm_head.weight", 1, (D, V), None))

    def layer(name: str, hf_name: str, inputs: int, *shape: int) -> None:
        table.append(Tensor(("layers", name), f"model.layers.{{}}.{hf_name}", inputs, shape, L))

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
