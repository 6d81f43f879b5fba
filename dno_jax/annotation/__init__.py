"""The preference function P(y > y' | x): rank pools of candidates. Never imports jax, nor openai until used."""

from typing import TYPE_CHECKING, Any

from dno_jax.annotation.pool import Annotator, Candidate, Pool, prompt_text

if TYPE_CHECKING:
    from dno_jax.annotation.build import build_annotator

__all__ = ["Annotator", "Candidate", "Pool", "build_annotator", "prompt_text"]


def __getattr__(name: str) -> Any:
    """Load what builds annotators, and all that they stand on, only for who builds one."""
    if name == "build_annotator":
        from dno_jax.annotation.build import build_annotator

        return build_annotator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
