"""The guard: every policy answers the same checkable questions, and a fall is told."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.data.prompts import TokenizedPrompt, refuse_leaks, tokenize_prompts
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.evaluation.guard import CHECKS, Check, check_of, final, guard_figures, is_right
from dno_jax.parallel.cluster import is_primary
from dno_jax.reasoning import split_thought
from dno_jax.records import Message, Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.sampler import SampleSpec
from dno_jax.stage_dir import StageDir
from dno_jax.stages.draw import Draws, sample_to_shards
from dno_jax.training.checkpoint import is_pruned, policy_fingerprint, policy_remedy


@dataclass(frozen=True)
class Question:
    """A question, what is right, and how that is seen."""

    prompt: Prompt
    answers: tuple[str, ...]
    check: Check


def run(runtime: Runtime[RunConfig], *, newest: int) -> dict[str, Any] | None:
    """Have policies 0 to the newest answer where they have not, and return the figures.

    Policies without weights that have not answered are left out; without a guard, or where the newest is one of them,
    there is nothing to return.

    Raises:
        DnoError: the file cannot be read, a row is no question with an answer, or a question is trained on.
    """
    section = runtime.config.evaluation.guard
    if section is None:
        return None
    questions = read_questions(section.path)
    split = runtime.prompts.split
    trained = [prompt for part in dict.fromkeys(split.training) for prompt in part]
    refuse_leaks([question.prompt for question in questions], trained, place=section.path, trained="the prompts")
    kept, dropped = tokenize_prompts(
        [question.prompt for question in questions], tokenizer=runtime.tokenizer, config=runtime.config
    )
    for reason, count in dropped.items() if is_primary() else ():
        say(f"warning: {section.path}: {count} questions are left out: {reason}")
    if not kept:
        raise DnoError(f"{section.path}: none of its {len(questions)} questions can be asked ({dict(dropped)})")
    by_id = {question.prompt.prompt_id: question for question in questions}
    there = [policy for policy in range(newest + 1) if _can_answer(runtime, kept, policy)]
    gone = [policy for policy in range(newest + 1) if policy not in there]
    for policy in gone if is_primary() else ():
        path = runtime.run_dir.policy(policy)
        figures = "; this evaluation has no figures of the guard" if policy == newest else ""
        say(
            f"warning: {path}: policy {policy} is not asked the guard's questions, as its weights are not there "
            f"(training.keep_policies){figures}. To have it asked, {policy_remedy(path)}"
        )
    if newest in gone:
        return None
    right = {policy: dict(_answers(runtime, kept, by_id, policy)) for policy in there}
    if not right.get(newest):
        raise DnoError(f"{section.path}: policy {newest} has no answer to any of its {len(kept)} questions; run again")
    figures = guard_figures({policy: own for policy, own in right.items() if own})
    for sentence in figures["warnings"] if is_primary() else ():
        say(f"warning: {sentence}")
    return {"questions": len(kept), **figures, **({"not_asked": gone} if gone else {})}


def _can_answer(runtime: Runtime[RunConfig], kept: Sequence[TokenizedPrompt], policy: int) -> bool:
    """Whether a policy has answered all questions, or its weights are there: old ones may be pruned before a guard."""
    path, section = runtime.run_dir.policy(policy), runtime.config.evaluation.guard
    assert section is not None
    if policy_fingerprint(path) is not None and not is_pruned(path):
        return True
    shards = -(-len(kept) // runtime.config.sampling.shard_prompts)
    return len(answers_of(runtime.run_dir, kept, policy, num_samples=section.num_samples).shard_paths()) == shards


def _answers(
    runtime: Runtime[RunConfig], kept: Sequence[TokenizedPrompt], by_id: dict[str, Question], policy: int
) -> Iterator[tuple[str, list[bool]]]:
    section = runtime.config.evaluation.guard
    assert section is not None
    folder = answers_of(runtime.run_dir, kept, policy, num_samples=section.num_samples)
    sample_to_shards(
        runtime,
        kept,
        Draws((SampleSpec("policy", section.num_samples),), {"policy": runtime.run_dir.policy(policy)}, policy),
        out=folder,
        description=f"guard     {policy}",
    )
    found: dict[str, list[bool]] = {}
    for row in folder.read(Rollout):
        question = by_id[row.prompt_id]
        said = split_thought(row.text, row.in_thought)
        found.setdefault(row.prompt_id, []).append(
            said.is_answer and is_right(said.answer, question.answers, question.check)
        )
    yield from found.items()


def answers_of(run_dir: RunDir, kept: Sequence[TokenizedPrompt], policy: int, *, num_samples: int) -> StageDir:
    """Where a policy's answers to these very questions lie: with the iteration that trained it."""
    asked = hashlib.sha256("".join(item.prompt.model_dump_json() for item in kept).encode()).hexdigest()[:8]
    return run_dir.stage("evaluate", max(policy - 1, 0)).sub(f"guard-{policy:03d}-{asked}-{num_samples}")


def read_questions(path: str) -> list[Question]:
    """Read questions with their answers.

    Args:
        path: rows of {question or prompt, answer}, `answer` a text, a number or a list of either, and maybe
            {check: number, choice, exact or contains}. Of GSM8K's answers the number after #### counts.

    Raises:
        DnoError: no such file, no rows, or a row that is no question.
    """
    found: dict[str, Question] = {}
    for row, place in read_rows(path):
        asked, answers = row.get("question", row.get("prompt")), row.get("answer")
        told = [_answer(one) for one in (answers if isinstance(answers, list) else [answers])]
        texts = tuple(text for text in told if text)
        check = row.get("check") or (check_of(texts) if texts else "contains")
        if not isinstance(asked, str) or not asked.strip() or not texts or len(texts) < len(told):
            raise DnoError(
                f"{place}: expected a question (a text) and its answer (a text, a number, or a list of them)"
            )
        if check not in CHECKS or (check == "number" and check_of(texts) != "number"):
            raise DnoError(f"{place}: check is {check!r} of the answer {texts[0][:40]!r}; known: {', '.join(CHECKS)}")
        name = "guard-" + hashlib.sha256(asked.encode()).hexdigest()[:16]
        if name in found:
            raise DnoError(f"{place}: a second row with the question {asked[:40]!r}; leave one of the two")
        found[name] = Question(Prompt(prompt_id=name, messages=(Message(role="user", content=asked),)), texts, check)
    if not found:
        raise DnoError(f"{path}: holds no questions; expected rows of {{question, answer}}")
    return list(found.values())


def _answer(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float):
        return f"{Decimal(repr(value)):f}" if math.isfinite(value) else ""
    return final(str(value)).strip()
