"""The preference function P(y > y' | x): rank pools of candidates. Never imports jax, nor openai until used."""

from dno_jax.annotation.annotator import Annotator, Candidate, Pool, build_annotator, prompt_text

__all__ = ["Annotator", "Candidate", "Pool", "build_annotator", "prompt_text"]
