"""Arena-Hard: its question files, two games per question over five verdicts, and the win rate over the baseline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dno_jax.annotation.judges.suite import FiveWayJudge
from dno_jax.annotation.question import PreferenceFunction
from dno_jax.config import AnnotationSection
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.evaluation import arena_hard
from dno_jax.records import Judgement
from dno_jax.stages.suite import Item, Judged, Wanted, text_of

OUTPUTS: str = "model_answer.jsonl"
ANNOTATIONS: str = "model_judgment.jsonl"
_LABELS = {1.0: "A>>B", 0.75: "A>B", 0.5: "A=B", 0.25: "B>A", 0.0: "B>>A"}


def read_items(wanted: Wanted) -> list[Item]:
    """Read question.jsonl, rows of {question_id, category, turns: [{content}]}, and the baseline's answers.

    Raises:
        DnoError: a row is no question of one turn, or no answer.
    """
    answers: dict[str, tuple[str, str]] = {}
    for row, place in read_rows(wanted.reference) if wanted.reference is not None else ():
        choices = row.get("choices")
        turns = (
            choices[0].get("turns") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        )
        name, found = text_of(row, place, "question_id"), (_turn(turns, place), str(row.get("model_id", "baseline")))
        if answers.setdefault(name, found) != found:
            raise DnoError(f"{place}: a second answer to question {name!r}; give the file of one baseline")
    items = []
    for row, place in read_rows(wanted.prompts):
        name = text_of(row, place, "question_id")
        items.append(
            Item(_turn(row.get("turns"), place), str(row.get("category", "")), *answers.get(name, ("", "")), name)
        )
    if not items:
        raise DnoError(f"{wanted.prompts}: holds no questions; expected rows of {{question_id, turns}}")
    return items


def _turn(turns: Any, place: str) -> str:
    """The words of the only turn, as Arena-Hard has it ({content}) or as MT-Bench has it (a text)."""
    turn = turns[0] if isinstance(turns, list) and len(turns) == 1 else None
    words = turn.get("content") if isinstance(turn, Mapping) else turn
    if not isinstance(words, str) or not words.strip():
        raise DnoError(f"{place}: expected `turns` with one turn, {{content: a text}}; Arena-Hard's have no second one")
    return words


def write_outputs(items: Sequence[Item], answers: Sequence[str], generator: str) -> str:
    rows = [
        {
            "question_id": item.name,
            "answer_id": item.prompt.prompt_id,
            "model_id": generator,
            "choices": [{"index": 0, "turns": [{"content": answer}]}],
        }
        for item, answer in zip(items, answers, strict=True)
    ]
    return _lines(rows)


def read_outputs(text: str) -> list[str]:
    return [json.loads(line)["choices"][0]["turns"][0]["content"] for line in text.split("\n") if line]


def make_judge(section: AnnotationSection, wanted: Wanted, *, place: str, seed: int) -> PreferenceFunction:
    """Arena-Hard's five verdicts, in both orders.

    Raises:
        DnoError: no endpoint of form=pairwise, or options of another suite.
    """
    if wanted.template is not None or wanted.tables is not None:
        raise DnoError(
            "--template and --tables are of --suite alpaca_eval; arena_hard has its own rubric: leave them out"
        )
    if section.kind != "openai" or section.openai.form != "pairwise":
        form = f", form={section.openai.form}" if section.kind == "openai" else ""
        raise DnoError(
            f"--suite arena_hard is judged by words, a pair at a time, and {place}.kind={section.kind}{form}: set "
            "evaluation.annotation.kind=openai, evaluation.annotation.openai.form=pairwise and .model"
        )
    return FiveWayJudge(section.openai, seed=seed, place=f"{place}.openai")


def settle(wanted: Wanted, judged: Judged) -> tuple[str, dict[str, Any]]:
    rows, games = [], []
    for index, item in enumerate(judged.items):
        shown = _games(judged.judgements.get(index))
        rows.append(
            {
                "question_id": item.name,
                "model": judged.generator,
                "judge": judged.judge,
                "games": [{"judgment": words, "score": _LABELS[first]} for words, first in shown],
            }
        )
        # The baseline is shown first in the first game, the model in the second.
        games.append([1.0 - shown[0][1], shown[1][1]] if shown else [])
    if not any(games):
        raise DnoError(f"--suite arena_hard: none of the {len(games)} answers has a verdict")
    score = arena_hard.score(games)
    return _lines(rows), {
        **dataclasses.asdict(score),
        "avg_length": float(np.mean([len(answer) for answer in judged.answers])),
        "length_controlled_winrate": None,
        "lc_is_official": True,  # there is none
        "template": None,
        "without_verdict": sum(not own for own in games),
    }


def _games(found: Judgement | None) -> list[tuple[str, float]]:
    """Of each game what the judge said, and how much it was for the one shown first; equal answers tie in both."""
    if found is None:
        return [("the answers are the same", 0.5)] * 2
    if found.state != "ok":
        return []
    first = [answer.scores[0] for answer in found.answers if answer.scores is not None]
    return list(zip(json.loads(found.raw), first, strict=True))


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
