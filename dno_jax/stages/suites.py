"""Published suites asked of a policy: AlpacaEval 2.0, in its own files and by its own rules.

Prompts, the reference's outputs, the judge's template and the tables of the length-controlled rate are the suite's and
are read from where the user has them; none of them is part of this package.
"""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from dno_jax.annotation.build import open_client
from dno_jax.annotation.endpoint_annotator import EndpointAnnotator
from dno_jax.annotation.judges.suite import SuiteJudge
from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.annotation.receipts import closing
from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.config import RunConfig
from dno_jax.console import Meter, say
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.evaluation import alpaca_eval
from dno_jax.files import digest_of, read_note, write_atomically
from dno_jax.reasoning import split_thought
from dno_jax.records import Judgement, Message, Prompt
from dno_jax.run_dir import RunDir
from dno_jax.stages.annotate import judge_late, judge_pools
from dno_jax.stages.speak import Speakers, check_policy, policies_of
from dno_jax.training.checkpoint import policy_fingerprint

SUITES = ("alpaca_eval",)
OUTPUTS, ANNOTATIONS, RESULTS, MADE = "model_outputs.json", "annotations.json", "results.json", "made_of.json"
DIFFICULTY, GAMED = "instruction_difficulty.csv", "df_gamed.csv"


@dataclass(frozen=True)
class Wanted:
    """What is asked of a suite.

    Attributes:
        suite: its name.
        prompts: rows of {instruction, output}, the output being the reference's; without it `reference` has them.
        reference: the reference's outputs, rows of {instruction, output}.
        policy: None: the best on held-out prompts.
        template: the judge's own text; None: the rubric of the configuration.
        tables: folder of instruction_difficulty.csv and df_gamed.csv; None: length is controlled without them.
    """

    suite: str
    prompts: str
    reference: str | None = None
    policy: int | None = None
    template: str | None = None
    tables: str | None = None


@dataclass(frozen=True)
class _Item:
    instruction: str
    dataset: str
    reference: str
    generator: str

    @property
    def prompt(self) -> Prompt:
        name = hashlib.sha256(self.instruction.encode()).hexdigest()[:16]
        return Prompt(prompt_id=name, messages=(Message(role="user", content=self.instruction),))


def sample(config: RunConfig, wanted: Wanted) -> epath.Path:
    """Answer a suite's prompts and write them in its own format; what is there already is not drawn again.

    Raises:
        DnoError: no such suite, no prompts or no run; or the outputs there are of another policy or other prompts.
    """
    items = _items(wanted)
    numbers, best = policies_of(config)
    number = best if wanted.policy is None else check_policy(wanted.policy, numbers)
    folder = folder_of(RunDir(config.run_dir), wanted.suite, number)
    made_of = _made_of(config, wanted, number)
    if (folder / OUTPUTS).exists():
        found = read_note(folder / MADE) if (folder / MADE).exists() else {}
        if changed := [name for name, value in made_of.items() if found.get(name) != value]:
            raise DnoError(
                f"{folder / OUTPUTS}: made from another {', '.join(changed)} than now given; move the folder away to "
                "answer anew, or restore what it was made from"
            )
        return folder
    prompts = [item.prompt for item in items]
    answers: dict[str, str] = {}
    speakers = Speakers.of_run(config)
    with Meter(f"{wanted.suite} {number}", total=len(prompts), unit="prompts") as meter:
        for prompt, (said,) in speakers.answer_all(number, prompts, num_samples=1):
            answers[prompt.prompt_id] = split_thought(said.text).answer or said.text
            meter.advance(1)
    rows = [
        {
            "dataset": item.dataset,
            "instruction": item.instruction,
            "output": answers[prompt.prompt_id],
            "generator": f"{folder.parent.parent.parent.name}-policy-{number}",
        }
        for item, prompt in zip(items, prompts, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MADE, json.dumps(made_of, indent=2) + "\n")
    write_atomically(folder / OUTPUTS, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    say(f"{len(rows):,} answers of policy {number} written to {folder / OUTPUTS}")
    return folder


def evaluate(config: RunConfig, wanted: Wanted) -> dict[str, Any]:
    """Answer a suite's prompts where that is not done, judge the answers, and return the leaderboard's row.

    Raises:
        DnoError: as `sample` does; the judge is no endpoint of form=logprob, or its key is missing; or more answers
            than `max_failed` allows have no verdict.
    """
    asyncio.run(_judge_of(config, wanted).close())  # what is wrong shows before anything is drawn
    items = _items(wanted)
    if missing := [item for item in items if not item.reference]:
        raise DnoError(
            f"{wanted.prompts}: {len(missing)} rows have no output of the reference to compare with; give --reference "
            "FILE, rows of {instruction, output}"
        )
    folder = sample(config, wanted)
    outputs = json.loads((folder / OUTPUTS).read_text())
    judge = _judge_of(config, wanted)
    preferences = _preferences(config, judge, items, [row["output"] for row in outputs], folder)
    annotations = [
        {
            "instruction": item.instruction,
            "generator_1": item.generator,
            "output_1": item.reference,
            "generator_2": row["generator"],
            "output_2": row["output"],
            "dataset": item.dataset,
            "annotator": judge.identity,
            "preference": None if math.isnan(preference) else preference,
        }
        for item, row, preference in zip(items, outputs, preferences, strict=True)
    ]
    write_atomically(folder / ANNOTATIONS, json.dumps(annotations, indent=2, ensure_ascii=False) + "\n")
    results = _results(wanted, annotations) | {"policy": int(folder.name.split("-")[1]), "annotator": judge.identity}
    write_atomically(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    return results


def folder_of(run_dir: RunDir, suite: str, policy: int) -> epath.Path:
    """Where a policy's outputs, annotations and results of a suite lie."""
    return run_dir.path / "suites" / suite / f"policy-{policy:03d}"


def results_of(run_dir: RunDir) -> list[dict[str, Any]]:
    """Read the results of all suites that a run's policies were asked, in order."""
    root = run_dir.path / "suites"
    paths = sorted(root.glob(f"*/policy-*/{RESULTS}"), key=os.fspath) if root.exists() else []
    return [read_note(path) | {"suite": path.parent.parent.name} for path in paths]


def _made_of(config: RunConfig, wanted: Wanted, policy: int) -> dict[str, Any]:
    sampling = config.sampling.model_dump(
        mode="json", include={"temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop"}
    )
    return {
        "prompts": digest_of(wanted.prompts),
        "policy": policy_fingerprint(RunDir(config.run_dir).policy(policy)) or "missing",
        "sampling": json.loads(json.dumps(sampling)),
    }


def _items(wanted: Wanted) -> list[_Item]:
    if wanted.suite not in SUITES:
        raise DnoError(f"--suite is {wanted.suite!r}; known: {', '.join(SUITES)}")
    references = {}
    if wanted.reference is not None:
        references = {_text(row, place, "instruction"): row for row, place in read_rows(wanted.reference)}
    items = []
    for row, place in read_rows(wanted.prompts):
        instruction = _text(row, place, "instruction")
        other = references.get(instruction, row)
        output = other.get("output", other.get("reference", ""))
        if not isinstance(output, str):
            raise DnoError(f"{place}: output is no text; expected the reference's output")
        told = str(row.get("dataset", "")), output, str(other.get("generator", "reference"))
        items.append(_Item(instruction, *told))
    if not items:
        raise DnoError(f"{wanted.prompts}: holds no prompts; expected rows of {{instruction, output}}")
    return items


def _text(row: Mapping[str, Any], place: str, name: str) -> str:
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise DnoError(f"{place}: expected a text in {name!r}; it has {', '.join(map(str, row)) or 'nothing'}")
    return row[name]


def _judge_of(config: RunConfig, wanted: Wanted) -> EndpointAnnotator:
    section = config.evaluation_judge
    place = "annotation" if config.evaluation.annotation is None else "evaluation.annotation"
    if section.kind != "openai" or section.openai.form != "logprob":
        form = f", form={section.openai.form}" if section.kind == "openai" else ""
        raise DnoError(
            f"--suite {wanted.suite} is judged by the probabilities of one token, and {place}.kind={section.kind}{form}"
            ": set evaluation.annotation.kind=openai, evaluation.annotation.openai.form=logprob and .model (AlpacaEval "
            "2.0's is gpt-4-1106-preview); `dno sample --suite` writes the outputs alone"
        )
    store = str(RunDir(config.run_dir).annotations_path)
    function = SuiteJudge(
        section.openai,
        seed=config.seed,
        place=f"{place}.openai",
        shown=lambda pool: (1, 0) if alpaca_eval.shows_model_first(pool.prompt.messages[-1].content) else (0, 1),
        template=wanted.template,
    )
    return EndpointAnnotator(function, open_client(section, store_path=store))


def _preferences(
    config: RunConfig, judge: EndpointAnnotator, items: Sequence[_Item], outputs: Sequence[str], folder: epath.Path
) -> list[float]:
    """AlpacaEval's preference of each item: 1.5 of equal outputs, which nobody is asked about; nan where none is."""
    run_dir = RunDir(config.run_dir)
    pools = {
        index: Pool(item.prompt, (Candidate("reference", item.reference), Candidate("model", output)))
        for index, (item, output) in enumerate(zip(items, outputs, strict=True))
        if item.reference != output
    }

    async def ask() -> list[Judgement]:
        async with closing(judge, run_dir):
            if pools and any(judge.recall(pool) is None for pool in pools.values()):
                await judge.probe()
            with Meter("judge", total=len(pools), unit="answers") as meter:
                found = await judge_pools(judge, list(pools.values()), meter=meter)
                found = await judge_late(judge, list(pools.values()), found)
            judge.refuse_over_budget(sum(row.state == "over budget" for row in found))
            return found

    judgements = dict(zip(pools, asyncio.run(ask()), strict=True))
    missing = [row for row in judgements.values() if row.state != "ok"]
    section = config.evaluation_judge
    refuse_shortfall(
        str(folder),
        Counter(f"{row.state}: {row.detail}" for row in missing),
        total=len(items),
        missing="answers have no verdict",
        remedy="Verdicts that were given are kept: run again and only these are asked anew, or raise max_failed of the "
        "judge to leave them out",
        max_failed=section.max_failed,
    )

    def preference(index: int) -> float:
        row = judgements.get(index)
        if row is None:
            return 1.5
        return 1.0 + row.wins[1][0] if row.wins is not None else math.nan

    return [preference(index) for index in range(len(items))]


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
