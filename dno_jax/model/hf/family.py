"""What one entry of families.py says of a model_type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dno_jax.model.config import Mixer

Values = Mapping[str, Any]
# (key of config.json, field of ModelConfig, type in the file, conversion or None)
Meaning = tuple[str, str, type, Callable[[Any], Any] | None]

LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Family:
    """How one model_type is read and named.

    Attributes:
        architecture: the only class of its checkpoints that is supported.
        reward: that of its reward models; None where transformers has none.
        keys: keys that are understood beside those of every family -> transformers' default.
        only: keys that are understood at these values alone.
        harmless: keys that its published checkpoints have and its forward pass does not read.
        same: key -> key that it must repeat where both are given.
        instead: key -> key whose place it takes where it is given, as transformers has it.
        meaning: what keys mean beside what they mean everywhere.
        fixed: fields of ModelConfig that follow from the family.
        layer_kinds: names that layer_types must have, one for each layer, of which none slides; (): it is not read.
        rope_extra: entries of rope_parameters beyond those of the rotation.
        sliding: (values, layer) -> whether a layer has the sliding window where layer_types does not say.
        theta: transformers' default of rope_theta.
        local_theta: that of layers with a sliding window, where these have a rotation of their own.
        mixers: names that layer_types may have -> what mixes tokens there; {}: attention everywhere.
        kinds: values -> the names of all layers where layer_types is absent.
        derived: values -> fields of ModelConfig that several keys decide together; raises ValueError.
        carried: beginning of the names of tensors that no text's logits depend on; they go through an export untouched.
        final_norm: Hugging Face's name of the norm behind all layers.
        rotates_in_windows: where there is a sliding window, the layers without one have no rotation.
        interleaved: dimensions 2i and 2i + 1 of a head rotate together, not i and i + half. In our tree they lie in
            Llama's order: the rows of q and k are put so on the way in, and back on the way out.
        names: our leaf -> Hugging Face's name within a layer, with {} for the expert. Leaves of one name share a
            tensor, in our order.
    """

    architecture: str
    keys: Values
    reward: str | None = None
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    same: Mapping[str, str] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    meaning: tuple[Meaning, ...] = ()
    fixed: Values = field(default_factory=dict)
    layer_kinds: tuple[str, ...] = ()
    rope_extra: frozenset[str] = frozenset()
    sliding: Callable[[Values, int], bool] | None = None
    theta: float = 10_000.0
    local_theta: float | None = None
    mixers: Mapping[str, Mixer] = field(default_factory=dict)
    kinds: Callable[[Values], list[str]] | None = None
    derived: Callable[[Values], Values] | None = None
    carried: str | None = None
    final_norm: str = "norm"
    rotates_in_windows: bool = False
    interleaved: bool = False
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
