"""What is trained where not all parameters are: low-rank adapters beside a checkpoint that stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field, field_validator

from dno_jax.config.base import TRAINED, Count, PathStr, Section, contents
from dno_jax.config.training import TrainingSection

# As PEFT calls them. Those behind the first line are of Qwen 3.5 and LFM2.
Target = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj",
    "in_proj", "conv.out_proj", "self_attn.out_proj", "w1", "w2", "w3",
]  # fmt: skip


class AdapterSection(Section):
    """LoRA: a matrix becomes W + alpha / rank * A B, of which A and B alone are trained. One adapter serves all
    iterations. Left out, every parameter is trained.
    """

    rank: Count = Field(default=64, description="columns of A, rows of B", json_schema_extra=TRAINED)
    alpha: float = Field(
        default=64.0, gt=0.0, description="over rank, it multiplies A B: PEFT's lora_alpha", json_schema_extra=TRAINED
    )
    targets: Literal["all"] | tuple[Target, ...] = Field(
        default="all",
        description="which matrices of every layer have an adapter: all, or a list, as in [q_proj, v_proj]",
        json_schema_extra=TRAINED,
    )
    path: PathStr | None = Field(
        default=None,
        description="a folder of PEFT's with the adapter that policy 0 has, of this rank, alpha and these targets; "
        "null: a new one, whose A is zero and whose B is drawn by the seed",
        json_schema_extra=contents("sample", "score", "train", "evaluate", "sft"),
    )

    @field_validator("targets")
    @classmethod
    def _some_and_once(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError("an empty list; expected all, or the names of some matrices, as in [q_proj, v_proj]")
        if isinstance(targets, tuple) and len(set(targets)) < len(targets):
            raise ValueError(f"{list(targets)} names a matrix twice; name each once")
        return targets if isinstance(targets, str) else tuple(name for name in get_args(Target) if name in targets)

    if TYPE_CHECKING:  # as in LossSection

        def __hash__(self) -> int: ...


def refuse_rounded_adapters(adapter: AdapterSection | None, training: TrainingSection) -> None:
    """Raise ValueError where adapters would be trained in bfloat16: nothing reads the dtype of parameters then."""
    if adapter is not None and training.param_dtype != "float32":
        raise ValueError(
            f"training.param_dtype={training.param_dtype} with adapter: adapters are trained in float32, and the "
            "weights beside them are held in model.dtype; leave training.param_dtype out"
        )
