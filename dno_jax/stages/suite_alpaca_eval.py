"""AlpacaEval 2.0: its files, its judge of one token, and the leaderboard's row.

Prompts, the reference's outputs, the judge's template and the tables of the length-controlled rate are the suite's and
are read from where the user has them; none of them is part of this package.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dno_jax.annotation.judges.suite import SuiteJudge
from dno_jax.annotation.question import PreferenceFunction
from dno_jax.config import AnnotationSection
from dno_jax.console import say
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.evaluation import alpaca_eval
from dno_jax.records import Judgement
from dno_jax.stages.suite import Item, Judged, Wanted, text_of

OUTPUTS: str = "model_outputs.json"
ANNOTATIONS: str = "annotations.json"
DIFFICULTY, GAMED = "instruction_difficulty.csv", "df_gamed.csv"


def read_items(wanted: Wanted) -> list[Item]:
    references = {}
    if wanted.reference is not None:
        for row, place in read_rows(wanted.reference):
            before = references.setdefault(text_of(row, place, "instruction"), row)
            if before.get("output") != row.get("output"):
                raise DnoError(f"{place}: a second output for {row['instruction'][:40]!r}; leave one of the two")
    items = []
    for row, place in read_rows(wanted.prompts):
        instruction = text_of(row, place, "instruction")
        other = references.get(instruction, row)
        output = other.get("output", other.get("reference", ""))
        if not isinstance(output, str):
            raise DnoError(f"{place}: output is no text; expected the reference's output")
        told = str(row.get("dataset", "")), output, str(other.get("generator", "reference"))
        items.append(Item(instruction, *told))
    if not items:
        raise DnoError(f"{wanted.prompts}: holds no prompts; expected rows of {{instruction, output}}")
    return items


def write_outputs(items: Sequence[Item], answers: Sequence[str], generator: str) -> str:
    rows = [
        {"dataset": item.dataset, "instruction": item.instruction, "output": answer, "generator": generator}
        for item, answer in zip(items, answers, strict=True)
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def read_outputs(text: str) -> list[str]:
    return [row["output"] for row in json.loads(text)]


def make_judge(section: AnnotationSection, wanted: Wanted, *, place: str, seed: int) -> PreferenceFunction:
    """AlpacaEval's: one token's probabilities, in the order that the suite draws per instruction.

    Raises:
        DnoError: no endpoint of form=logprob.
    """
    if section.kind != "openai" or section.openai.form != "logprob":
        form = f", form={section.openai.form}" if section.kind == "openai" else ""
        raise DnoError(
            f"--suite {wanted.suite} is judged by the probabilities of one token, and {place}.kind={section.kind}{form}"
            ": set evaluation.annotation.kind=openai, evaluation.annotation.openai.form=logprob and .model (AlpacaEval "
            "2.0's is gpt-4-1106-preview); `dno sample --suite` writes the outputs alone"
        )
    return SuiteJudge(
        section.openai,
        seed=seed,
        place=f"{place}.openai",
        shown=lambda pool: (1, 0) if alpaca_eval.shows_model_first(pool.prompt.messages[-1].content) else (0, 1),
        template=wanted.template,
    )


def settle(wanted: Wanted, judged: Judged) -> tuple[str, dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    for index, (item, answer) in enumerate(zip(judged.items, judged.answers, strict=True)):
        preference = _preference(judged.judgements.get(index))
        annotations.append(
            {
                "instruction": item.instruction,
                "generator_1": item.generator,
                "output_1": item.reference,
                "generator_2": judged.generator,
                "output_2": answer,
                "dataset": item.dataset,
                "annotator": judged.judge,
                "preference": None if math.isnan(preference) else preference,
            }
        )
    return json.dumps(annotations, indent=2, ensure_ascii=False) + "\n", _results(wanted, annotations)


def _preference(row: Judgement | None) -> float:
    """AlpacaEval's: 1.5 of equal outputs, which nobody is asked about; nan where there is no verdict."""
    if row is None:
        return 1.5
    return 1.0 + row.wins[1][0] if row.wins is not None else math.nan


def _results(wanted: Wanted, annotations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told = [(place, row) for place, row in enumerate(annotations) if row["preference"] is not None]
    if not told:
        raise DnoError(f"--suite {wanted.suite}: none of the {len(annotations)} answers has a verdict")
    found = alpaca_eval.scores([row["preference"] for _, row in told])
    place = np.asarray([place for place, _ in told], np.int64)
    longer = np.asarray([len(row["output_1"]) - len(row["output_2"]) for _, row in told], np.float64)
    difficulty, gamed = _tables(wanted.tables, count=len(annotations))
    rows = alpaca_eval.Rows(
        place, np.asarray([row["preference"] for _, row in told], np.float64), longer, difficulty[place]
    )
    controlled = alpaca_eval.length_controlled(rows, gamed)
    return {
        **{name: None if value != value else value for name, value in dataclasses.asdict(found).items()},
        "avg_length": float(np.mean([len(row["output_2"]) for row in annotations])),
        "length_controlled_winrate": controlled.win_rate,
        "lc_standard_error": None if math.isnan(controlled.standard_error) else controlled.standard_error,
        "lc_strength": controlled.strength,
        "lc_is_official": wanted.tables is not None,
        "template": None if wanted.template is None else Path(wanted.template).name,
        "without_verdict": len(annotations) - len(told),
    }


def _tables(folder: str | None, *, count: int) -> tuple[np.ndarray, list[alpaca_eval.Rows]]:
    """The difficulty of each instruction, and the rows of the baselines gamed by length; zeros and none without."""
    if folder is None:
        return np.zeros(count), []
    difficulty = np.asarray(
        [_number(row, "instruction_difficulty", place) for row, place in _csv(Path(folder) / DIFFICULTY)], np.float64
    )
    if len(difficulty) < count:
        raise DnoError(f"{Path(folder) / DIFFICULTY}: {len(difficulty)} instructions, and the suite has {count}")
    if len(difficulty) > count:
        say(
            f"warning: {Path(folder) / DIFFICULTY} has {len(difficulty)} instructions, --prompts {count}: each prompt "
            f"is taken to be as hard as the instruction at its place, which holds of the suite's first {count} alone"
        )
    by_model: dict[str, list[tuple[dict[str, str], str]]] = {}
    for row, place in _csv(Path(folder) / GAMED):
        by_model.setdefault(row.get("model") or row.get("generator_2") or "gamed", []).append((row, place))
    gamed = []
    for own in by_model.values():
        places = np.asarray([int(_number(row, "index", place)) for row, place in own], np.int64)
        if places.min() < 0 or places.max() >= len(difficulty):
            raise DnoError(f"{Path(folder) / GAMED}: an index outside the {len(difficulty)} instructions")
        preference = np.asarray([_number(row, "preference", place) for row, place in own], np.float64)
        longer = [_number(row, "len_1", place) - _number(row, "len_2", place) for row, place in own]
        gamed.append(alpaca_eval.Rows(places, preference, np.asarray(longer, np.float64), difficulty[places]))
    return difficulty, gamed


def _csv(path: Path) -> list[tuple[dict[str, str], str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            found = [(row, f"{path}:{number}") for number, row in enumerate(csv.DictReader(file), start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DnoError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not found:
        raise DnoError(f"{path}: holds no rows")
    return found


def _number(row: Mapping[str, str], name: str, place: str) -> float:
    try:
        found = float(row[name])
    except (KeyError, TypeError, ValueError):
        found = math.nan
    if math.isnan(found):
        raise DnoError(f"{place}: expected a number in {name!r}; it has {', '.join(filter(None, row))}")
    return found
