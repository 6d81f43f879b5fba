"""Published suites asked of a policy: answers in the suite's own files, judged and counted by its own rules.

What is of one suite alone stands in its module, suite_alpaca_eval or suite_arena_hard.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath

from dno_jax.annotation.build import open_client
from dno_jax.annotation.endpoint_annotator import EndpointAnnotator
from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.annotation.receipts import closing
from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.config import RunConfig
from dno_jax.console import Meter, say
from dno_jax.errors import DnoError
from dno_jax.files import digest_of, read_note, write_atomically
from dno_jax.reasoning import split_thought
from dno_jax.records import Judgement
from dno_jax.run_dir import RunDir
from dno_jax.stages import suite_alpaca_eval, suite_arena_hard
from dno_jax.stages.annotate import judge_late, judge_pools
from dno_jax.stages.speak import Speakers, check_policy, policies_of
from dno_jax.stages.suite import Item, Judged, Suite, Wanted
from dno_jax.training.checkpoint import policy_fingerprint

SUITES: dict[str, Suite] = {"alpaca_eval": suite_alpaca_eval, "arena_hard": suite_arena_hard}
RESULTS, MADE = "results.json", "made_of.json"


def _suite(name: str) -> Suite:
    if name not in SUITES:
        raise DnoError(f"--suite is {name!r}; known: {', '.join(SUITES)}")
    return SUITES[name]


def sample(config: RunConfig, wanted: Wanted) -> epath.Path:
    """Answer a suite's prompts and write them in its own format; what is there already is not drawn again.

    Raises:
        DnoError: no such suite, no prompts or no run; or the outputs there are of another policy or other prompts.
    """
    suite = _suite(wanted.suite)
    items = suite.read_items(wanted)
    numbers, best = policies_of(config)
    number = best if wanted.policy is None else check_policy(wanted.policy, numbers)
    folder = folder_of(RunDir(config.run_dir), wanted.suite, number)
    made_of = _made_of(config, wanted, number)
    if (folder / suite.OUTPUTS).exists():
        found = read_note(folder / MADE) if (folder / MADE).exists() else {}
        if changed := [name for name, value in made_of.items() if found.get(name) != value]:
            raise DnoError(
                f"{folder / suite.OUTPUTS}: made from another {', '.join(changed)} than now given; move the folder "
                "away to answer anew, or restore what it was made from"
            )
        return folder
    prompts = [item.prompt for item in items]
    answers: dict[str, str] = {}
    speakers = Speakers.of_run(config)
    with Meter(f"{wanted.suite} {number}", total=len(prompts), unit="prompts") as meter:
        for prompt, (said,) in speakers.answer_all(number, prompts, num_samples=1):
            answers[prompt.prompt_id] = split_thought(said.text).answer or said.text
            meter.advance(1)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MADE, json.dumps(made_of, indent=2) + "\n")
    texts = [answers[prompt.prompt_id] for prompt in prompts]
    write_atomically(folder / suite.OUTPUTS, suite.write_outputs(items, texts, _generator(folder, number)))
    say(f"{len(texts):,} answers of policy {number} written to {folder / suite.OUTPUTS}")
    return folder


def evaluate(config: RunConfig, wanted: Wanted) -> dict[str, Any]:
    """Answer a suite's prompts where that is not done, judge the answers, and return the leaderboard's row.

    Raises:
        DnoError: as `sample` does; the judge is none that the suite can ask, or its key is missing; or more answers
            than `max_failed` allows have no verdict.
    """
    suite = _suite(wanted.suite)
    asyncio.run(_judge_of(config, wanted).close())  # what is wrong shows before anything is drawn
    items = suite.read_items(wanted)
    if missing := [item for item in items if not item.reference]:
        raise DnoError(
            f"{wanted.prompts}: {len(missing)} rows have no output of the reference to compare with; give --reference "
            "FILE, the suite's file of them"
        )
    folder, judge = sample(config, wanted), _judge_of(config, wanted)
    answers = suite.read_outputs((folder / suite.OUTPUTS).read_text())
    judgements = _judgements(config, judge, items, answers, folder)
    policy = int(folder.name.split("-")[1])
    judged = Judged(items, answers, _generator(folder, policy), judgements, judge.identity)
    annotations, found = suite.settle(wanted, judged)
    write_atomically(folder / suite.ANNOTATIONS, annotations)
    results = found | {"policy": policy, "annotator": judge.identity}
    write_atomically(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    return results


def _generator(folder: epath.Path, policy: int) -> str:
    """What a suite's files call a policy: by its run."""
    return f"{folder.parent.parent.parent.name}-policy-{policy}"


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


def _judge_of(config: RunConfig, wanted: Wanted) -> EndpointAnnotator:
    section = config.evaluation_judge
    place = "annotation" if config.evaluation.annotation is None else "evaluation.annotation"
    function = _suite(wanted.suite).make_judge(section, wanted, place=place, seed=config.seed)
    return EndpointAnnotator(function, open_client(section, store_path=str(RunDir(config.run_dir).annotations_path)))


def _judgements(
    config: RunConfig, judge: EndpointAnnotator, items: Sequence[Item], outputs: Sequence[str], folder: epath.Path
) -> dict[int, Judgement]:
    """The verdict on (reference, answer) by the item's place; nobody is asked about equal ones."""
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
    return judgements
