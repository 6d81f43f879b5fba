"""Policy t+1 on held-out prompts against every policy before it and the teacher; which one is best so far."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.data.pools import shown_prefix, shown_text
from dno_jax.data.prompts import TokenizedPrompt
from dno_jax.data.responses import read_responses as responses_from
from dno_jax.errors import DnoError
from dno_jax.evaluation.audit import audit
from dno_jax.evaluation.comparisons import Row
from dno_jax.evaluation.judge_errors import JudgeErrors
from dno_jax.evaluation.matrix import win_rate_matrix
from dno_jax.evaluation.win_rates import best_policy, rate_over
from dno_jax.files import digest_of
from dno_jax.parallel.cluster import barrier, is_primary, wait_until
from dno_jax.reasoning import split_thought
from dno_jax.records import Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.sampler import SampleSpec
from dno_jax.stage_dir import Manifest, StageDir
from dno_jax.stages import guard, redo
from dno_jax.stages.checkpoints import pool_member
from dno_jax.stages.draw import Draws, sample_to_shards
from dno_jax.stages.held_out import GOLD, Asked, Compared, Players, compare
from dno_jax.stages.sample import ResponseLengths
from dno_jax.stages.teach import taught

_SHOWN_CHARACTERS = 2000  # of a message or an answer
AVERAGE = "average"  # the mixture of all policies before the newest


def run(runtime: Runtime[RunConfig], iteration: int) -> Manifest:
    """Sample the held-out prompts from policy t+1 and judge them beside policies 0..t and the teacher.

    Without held-out prompts nothing is judged and the newest policy counts as the best. Where the configuration of
    evaluation has changed, earlier results are set aside: responses that are there stay, and so do verdicts.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict; run again to ask for those.
    """
    start = time.perf_counter()
    config, run_dir, newest = runtime.config, runtime.run_dir, iteration + 1
    stage = run_dir.stage("evaluate", iteration)
    gold = taught(config, run_dir, iteration=None)
    held_out = [gold.add(prompt) for prompt in runtime.prompts.split.held_out]
    shown = "".join(prompt.model_dump_json() for prompt in held_out)
    inputs = {"held-out prompts": hashlib.sha256(shown.encode()).hexdigest()}
    inputs |= _files(config)
    inputs |= runtime.policy_inputs(*(run_dir.policy(policy) for policy in range(newest + 1)))
    if is_primary():
        redo.set_evaluation_aside(run_dir, config, iteration)
    barrier(f"evaluate {iteration}")
    if manifest := stage.finished(config, inputs):
        return manifest
    if is_primary():
        stage.start(config)
    part = runtime.prompts.held_out
    tokenized = [replace(item, prompt=gold.add(item.prompt)) for item in part.kept]
    dropped = Counter(part.dropped)
    for policy in range(newest + 1) if tokenized else ():
        _answer(runtime, tokenized, policy=policy)
    guarded = guard.run(runtime, newest=newest)
    if is_primary():
        judged = _judge(config, run_dir, [item.prompt for item in tokenized], stage=stage, newest=newest)
        stage.finish(
            config,
            inputs=inputs,
            rows=len(judged.compared.rows),
            dropped=dropped + judged.dropped,
            seconds=time.perf_counter() - start,
            details=_figures(judged, config, newest=newest) | ({"guard": guarded} if guarded else {}),
        )
        for sentence in stage.require().details.get("warnings", ()):
            say(f"warning: {sentence}")
    wait_until(stage.manifest_path.exists)
    return stage.require()


def _files(config: RunConfig) -> dict[str, str]:
    """Entries of a manifest's inputs for the files that evaluation alone reads.

    Raises:
        DnoError: one of them cannot be read.
    """
    section = config.evaluation
    files = {f"evaluation.external.{name}": path for name, path in section.external.items()}
    if section.guard is not None:
        files["evaluation.guard"] = section.guard.path
    if (labels := config.evaluation_judge.quality.calibration) is not None and config.evaluation_judge.is_judge:
        files["labelled pairs"] = labels
    try:
        return {name: digest_of(path) for name, path in files.items()}
    except OSError as error:
        raise DnoError(f"evaluation: {error.filename}: cannot be read ({error.strerror})") from None


def _answer(runtime: Runtime[RunConfig], prompts: Sequence[TokenizedPrompt], *, policy: int) -> None:
    """Draw what is missing of a policy's held-out responses; samples of an earlier, smaller number stay as they are."""
    run_dir = runtime.run_dir
    for first, count in sample_ranges(run_dir, policy, num_samples=runtime.config.evaluation.num_samples):
        sample_to_shards(
            runtime,
            prompts,
            Draws((SampleSpec("policy", count, first_sample=first),), {"policy": run_dir.policy(policy)}, policy),
            out=rollouts_of(run_dir, policy, first, count),
            description=f"held out  {policy}",
        )


def sample_ranges(run_dir: RunDir, policy: int, *, num_samples: int) -> list[tuple[int, int]]:
    """Return how a policy's held-out samples lie: (first sample, number of samples) of each folder, in order.

    What an earlier call began stays as it was cut; what is missing of `num_samples` is one more range. The last may go
    beyond, where an earlier call drew more.
    """
    folder = rollouts_of(run_dir, policy, 0, 0).path.parent
    named = f"policy-{policy:03d}-"
    names = [path.name for path in folder.iterdir() if path.name.startswith(named)] if folder.exists() else []
    found = {int(first): int(count) for first, count in (name.removeprefix(named).split("-") for name in names)}
    ranges: list[tuple[int, int]] = []
    first = 0
    while first < num_samples:
        ranges.append((first, found.get(first, num_samples - first)))
        first += ranges[-1][1]
    return ranges


def rollouts_of(run_dir: RunDir, policy: int, first: int, count: int) -> StageDir:
    """Where `count` held-out responses of a policy from sample `first` on lie: with the iteration that trained it.

    Policy 0's lie with iteration 0.
    """
    return run_dir.stage("evaluate", max(policy - 1, 0)).sub(f"policy-{policy:03d}-{first}-{count}")


def read_responses(run_dir: RunDir, policy: int, *, num_samples: int) -> Iterator[Rollout]:
    """Read the first samples per held-out prompt of a policy."""
    for first, count in sample_ranges(run_dir, policy, num_samples=num_samples):
        rows = rollouts_of(run_dir, policy, first, count).read(Rollout)
        yield from (row for row in rows if row.sample < num_samples)


@dataclass
class _Judged:
    compared: Compared
    dropped: Counter[str]
    lengths: dict[str, dict[str, Any]]  # of each policy's responses
    shown: dict[str, Any] | None = None  # one prompt and all policies' answers, for people to read
    others: tuple[str, ...] = ()  # players that are no policies: gold, and responses from elsewhere


def _judge(config: RunConfig, run_dir: RunDir, prompts: Sequence[Prompt], *, stage: StageDir, newest: int) -> _Judged:
    """Judge one pool per prompt and sample: that sample of every policy, the teacher's response, and those of others.

    Whoever has one response per prompt stands with it beside every sample.
    """
    responses: dict[tuple[str, int], dict[str, str]] = {}
    lengths: dict[str, dict[str, Any]] = {}
    reasoning, unanswered = config.evaluation_judge.shows_reasoning, 0
    for policy in range(newest + 1):
        own = ResponseLengths()
        for rollout in read_responses(run_dir, policy, num_samples=config.evaluation.num_samples):
            responses.setdefault((rollout.prompt_id, rollout.sample), {})[str(policy)] = shown_text(
                rollout, reasoning=reasoning
            )
            unanswered += not split_thought(rollout.text, rollout.in_thought).is_answer
            own.add(rollout)
        lengths[str(policy)] = own.figures()
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    external = _external(config, prompts)
    players: list[Players] = []
    left_out = set(by_id) - {prompt_id for prompt_id, _ in responses}
    for (prompt_id, sample), texts in sorted(responses.items()):
        if prompt_id in by_id and len(texts) <= newest and config.sampling.engine == "openai":
            left_out.add(prompt_id)  # a server had no usable answer for one policy: it is compared with none
            continue
        if prompt_id not in by_id or len(texts) <= newest:
            raise DnoError(
                f"{run_dir.path}: the held-out prompts are not those that earlier policies answered "
                f"(prompt {prompt_id!r}); restore the file, or remove the evaluation folders of all iterations"
            )
        gold = by_id[prompt_id].gold
        for name, text in ((GOLD, gold), *((name, own.get(prompt_id)) for name, own in external.items())):
            if text and split_thought(text).is_answer:
                texts = texts | {name: text if reasoning else split_thought(text).answer}
        if config.outer.scheme == "average":
            member = pool_member(prompt_id, seed=config.seed, sample=sample, size=newest)
            texts = texts | {AVERAGE: texts[str(member)]}
        players.append(Players(by_id[prompt_id], sample, texts, reasoning))
    judge = "annotation" if config.evaluation.annotation is None else "evaluation.annotation"
    asked = Asked(config.evaluation_judge, judge, str(stage.path), f"judge     {newest}", config.seed)
    compared = compare(players, asked, run_dir)
    stage.sub("judgements").write_shard("0000000", compared.judgements)
    dropped = {
        "held-out pool without verdict": compared.missing,
        "no usable response from the server": len(left_out),
        "held-out response without an answer": unanswered,
        **{f"held-out prompt without a response of {name}": len(by_id) - len(own) for name, own in external.items()},
    }
    shown = _shown(players, newest=newest)
    return _Judged(compared, +Counter(dropped), lengths, shown, others=(GOLD, *external))


def _external(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, dict[str, str]]:
    """Responses from elsewhere to the held-out prompts: name -> prompt id -> text."""
    files = config.evaluation.external if prompts else {}
    return {name: responses_from(path, prompts, place=f"evaluation.external.{name}") for name, path in files.items()}


def _shown(players: Sequence[Players], *, newest: int) -> dict[str, Any] | None:
    """One prompt with the first answer of every policy: the first whose answers differ, as report.answers shows it."""
    first = [group for group in players if group.sample == 0]
    found = next((group for group in first if group.texts["0"] != group.texts[str(newest)]), next(iter(first), None))
    if found is None:
        return None
    asked = [{"role": message.role, "content": _cut(message.content)} for message in found.prompt.messages]
    prefix = shown_prefix(found.prompt, reasoning=found.reasoning)
    answers = {str(policy): _cut(prefix + found.texts[str(policy)]) for policy in range(newest + 1)}
    return {"prompt_id": found.prompt.prompt_id, "messages": asked, "answers": answers}


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."


def _figures(judged: _Judged, config: RunConfig, *, newest: int) -> dict[str, Any]:
    """The manifest's details: win rates of the newest policy, the matrix over all players, lengths, the best."""
    lengths, rows = judged.lengths, judged.compared.rows
    if not rows:
        why = "no verdict on any held-out pool" if judged.dropped else "no held-out prompts"
        return {
            "policy": newest,
            "win_rates": {},
            "lengths": lengths,
            "best": newest,
            "why": f"the newest: {why}",
        }
    policies = [str(policy) for policy in range(newest + 1)]
    met = {name for row in rows for name in (row.player, row.opponent)}
    others = [name for name in judged.others if name in met]
    matrix = win_rate_matrix([row for row in rows if AVERAGE not in row[1:3]], policies=policies, others=others)

    def rates(player: str, opponents: Sequence[str]) -> dict[str, Any]:
        found = {name: rate_over(rows, player, name) for name in opponents}
        return {name: one.as_dict() for name, one in found.items() if one is not None}

    average = rates(AVERAGE, [*policies, *others])
    errors = judged.compared.errors
    opponents = (*policies[:-1], *others)
    labels = _labels(errors, rows, str(newest), opponents) if errors else None
    among = np.asarray(matrix.rates, np.float64)[: newest + 1, : newest + 1]
    quality = judged.compared.quality
    return {
        "policy": newest,
        "judge": judged.compared.judge,
        "win_rates": rates(str(newest), opponents),
        **({"labels": labels} if labels else {}),
        **({AVERAGE: average} if average else {}),
        "matrix": np.round(among, 4).tolist(),
        "comparison": matrix.as_dict(),
        "quality": quality,
        "warnings": audit(matrix, quality, config.evaluation_judge.quality, config.evaluation),
        "lengths": lengths,
        **({"shown": judged.shown} if judged.shown else {}),
        "best": best_policy(among),
        "why": "highest mean win rate over the other policies on held-out prompts",
    }


def _labels(errors: JudgeErrors, rows: Sequence[Row], newest: str, opponents: Sequence[str]) -> dict[str, Any]:
    """What labelled pairs say of the judge, and the newest policy's win rates corrected by them, where that can be."""
    found = {name: one for name in opponents if (one := errors.correct(rows, newest, name))}
    beyond = [name for name, one in found.items() if one.value in (0.0, 1.0)]
    return errors.as_dict() | {"corrected": {name: one.as_dict() for name, one in found.items()}, "beyond": beyond}
