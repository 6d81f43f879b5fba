"""Models with a tower beside the language model, such as one that sees: the text part is read, the tower is carried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.config import Head
from dno_jax.model.hf.settings import HARMLESS, is_class, shown


@dataclass(frozen=True)
class Composite:
    """A model_type with a tower beside the language model, which is in its text_config. The tower is carried along.

    Attributes:
        architecture: the only class of its checkpoints that is supported.
        texts: model_types that text_config may have; where it names none, the first.
        keys: what else its config.json holds: nothing that a text's logits depend on.
        towers: modules beside the language model.
        loads_alone: transformers loads the text alone from it, under the names that it has in a checkpoint of its own.
        unread: keys of text_config that its class does not apply, as that of the text alone does.
    """

    architecture: str
    texts: tuple[str, ...]
    keys: frozenset[str]
    unread: tuple[str, ...] = ()
    towers: tuple[str, ...] = ("vision_tower", "multi_modal_projector")
    loads_alone: bool = False


_TOWER = frozenset({"text_config", "vision_config", "image_token_index", "image_token_id", "tie_word_embeddings"})
COMPOSITES: dict[str, Composite] = {
    "qwen3_5": Composite(
        "Qwen3_5ForConditionalGeneration",
        ("qwen3_5_text",),
        _TOWER | {"video_token_id", "vision_start_token_id", "vision_end_token_id"},
        towers=("visual",),
        loads_alone=True,
    ),
    "gemma3": Composite(
        "Gemma3ForConditionalGeneration",
        ("gemma3_text",),
        _TOWER | {"boi_token_index", "eoi_token_index", "mm_tokens_per_image"},
        unread=("final_logit_softcapping",),
    ),
    "mistral3": Composite(
        "Mistral3ForConditionalGeneration",
        ("mistral", "ministral3"),
        _TOWER | {"multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer"},
    ),
}


def text_part(tree: dict[str, Any], *, head: Head, place: str) -> dict[str, Any]:
    """Return the language model's config.json inside that of a model with a tower beside it."""
    model_type, composite = tree["model_type"], COMPOSITES[tree["model_type"]]
    if head == "reward":
        raise DnoError(f"{place}: {model_type} has no reward models; those of a {composite.texts[0]} alone are read")
    if not is_class(tree.get("architectures"), composite.architecture, place=place):
        raise DnoError(
            f"{place}: architectures is {tree['architectures']!r}; {model_type} supports [{composite.architecture!r}]"
        )
    if tree.get("quantization_config") is not None:
        raise DnoError(f"{place}: quantization_config is {shown(tree['quantization_config'])}; supported is only None")
    if unknown := sorted(tree.keys() - composite.keys - HARMLESS - {"quantization_config"}):
        raise DnoError(f"{place}: {', '.join(map(repr, unknown[:6]))} is not understood in a {model_type}")
    inner = tree.get("text_config")
    if not isinstance(inner, dict):
        raise DnoError(f"{place}: text_config is {shown(inner)}; expected the object of a {composite.texts[0]}")
    inner = {"model_type": composite.texts[0]} | {k: v for k, v in inner.items() if k != "architectures"}
    if inner["model_type"] not in composite.texts:
        raise DnoError(
            f"{place}: text_config has model_type {inner['model_type']!r}; a {model_type} supports "
            f"{', '.join(composite.texts)}"
        )
    for key in composite.unread:
        if inner.get(key) is not None:
            raise DnoError(
                f"{place}: text_config has {key} = {shown(inner[key])}; supported is only None: transformers' "
                f"{composite.architecture} does not apply it"
            )
    tied = tree.get("tie_word_embeddings")
    if tied is not None and inner.setdefault("tie_word_embeddings", tied) != tied:
        raise DnoError(f"{place}: tie_word_embeddings is {tied!r}, in text_config the opposite; make them equal")
    return inner


def text_of(tree: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    inner = tree.get("text_config")
    return inner if isinstance(inner, dict) else tree
