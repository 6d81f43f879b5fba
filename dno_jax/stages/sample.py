"""The candidates of an iteration: K samples per prompt, or those of the data, and the teacher's response."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from etils import epath

from dno_jax.annotation.refusals import is_refusal
from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.data.pools import by_prompt
from dno_jax.data.prompts import TokenizedPrompt
from dno_jax.data.sources import named
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.parallel.cluster import barrier, is_primary, wait_until
from dno_jax.reasoning import split_thought
from dno_jax.records import Prompt, Rollout, Source
from dno_jax.run_dir import RunDir
from dno_jax.runtime.exhausted import explained, training_settings
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.sampler import SampleSpec
from dno_jax.runtime.scheme import initial_policy, mixture_weight
from dno_jax.stage_dir import Manifest, StageDir
from dno_jax.stages import audit
from dno_jax.stages.cut import CutShares
from dno_jax.stages.draw import Draws, sample_to_shards
from dno_jax.stages.teach import taught

_MUCH_LONGER = 1.5  # times the tokens of the iteration before


def run(runtime: Runtime[RunConfig], iteration: int, *, after_shard: Callable[[], None] = lambda: None) -> Manifest:
    """Draw iteration t's candidates; rows already in closed shards are not drawn again.

    Args:
        after_shard: called whenever this process has closed a shard; what it raises ends sampling there.
    """
    start = time.perf_counter()
    config, run_dir = runtime.config, runtime.run_dir
    stage = run_dir.stage("sample", iteration)
    part = runtime.prompts.training(iteration)
    gold = taught(config, run_dir, iteration=iteration)
    prompts = [gold.add(prompt) for prompt in runtime.prompts.split.training[iteration]]
    tokenized = [replace(item, prompt=gold.add(item.prompt)) for item in part.kept]
    dropped = Counter(part.dropped)
    prompts_path = run_dir.prompts_path(iteration)
    if is_primary():
        stage.start(config)
        # The judge reads what was sampled from, also where that was truncated.
        shown = {item.prompt.prompt_id: item.prompt for item in tokenized}
        _keep_prompts(prompts_path, [shown.get(prompt.prompt_id, prompt) for prompt in prompts])
    barrier(f"prompts {iteration}")
    weight = mixture_weight(config, iteration)
    policies = {"policy": run_dir.policy(iteration)}
    if config.sampling.source == "mixture" or config.sampling.num_opponents:
        policies["initial"] = initial_policy(config, run_dir, iteration)
    inputs = stage.input_digest(prompts_path) | runtime.policy_inputs(*policies.values())
    previous = _Previous(run_dir, config, iteration)
    inputs |= previous.inputs()
    if manifest := stage.finished(config, inputs):
        return manifest
    drawn: dict[str, Any] = {}
    if config.sampling.source == "data":
        if is_primary():
            _data_to_shards(runtime, tokenized, out=stage, iteration=iteration)
    else:
        specs = _specs(config, weight)
        drawn = sample_to_shards(
            runtime,
            tokenized,
            Draws(specs, policies, policy=iteration),
            out=stage,
            description=f"sample    {iteration}",
            also=lambda shard, item: [
                *_gold(runtime, item, iteration=iteration),
                *previous.read(shard, item.prompt.prompt_id),
            ],
            after_shard=after_shard,
        )
    counted = _Counted()
    for shard in stage.shard_names() if is_primary() or config.sampling.audit_prompts else ():
        counted.add(stage.read_shard(Rollout, shard), policy=iteration, audited=config.sampling.audit_prompts)
    with explained(f"audit of iteration {iteration}'s samples", training_settings(runtime.programs)):
        audited = audit.run(runtime, counted.audited, policy=iteration, place=stage.path)
    if is_primary():
        answered = [item for item in tokenized if item.prompt.prompt_id in counted.prompts]
        dropped.update(_gold_drops(counted.gold, answered))  # without responses it has no rows at all
        if left_out := len(tokenized) - len(answered):
            dropped["no usable response from the server"] = left_out
        truncated = sum(item.truncated for item in tokenized)
        counted.cut.tell(f"sample {iteration}", limit=config.sampling.max_new_tokens)
        stage.finish(
            config,
            inputs=inputs,
            rows=counted.rows,
            dropped=dropped,
            seconds=time.perf_counter() - start,
            details=counted.lengths.figures()
            | _growth(run_dir, iteration, counted.lengths.figures())
            | counted.cut.figures()
            | drawn
            | ({"truncated_prompts": truncated} if truncated else {})
            | ({"audit": audited} if audited else {}),
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


class _Previous:
    """The samples of policy t-1, as iteration t-1 drew them, for the schemes that meet them; else nothing.

    Prompts are shared, in one order, so that a shard of either iteration has the same ones.
    """

    def __init__(self, run_dir: RunDir, config: RunConfig, iteration: int):
        self._stage = run_dir.stage("sample", iteration - 1) if config.meets_previous(iteration) else None
        self._first = config.sampling.num_samples + config.sampling.num_opponents
        self._shard = ""
        self._held: dict[str, list[Rollout]] = {}

    def inputs(self) -> dict[str, str]:
        """What the manifest names of it.

        Raises:
            DnoError: iteration t-1 is not sampled.
        """
        if self._stage is None:
            return {}
        self._stage.require()
        return self._stage.input_digest(self._stage.manifest_path)

    def read(self, shard: str, prompt_id: str) -> list[Rollout]:
        if self._stage is None:
            return []
        if shard != self._shard:
            rows = self._stage.read_shard(Rollout, shard)
            self._shard, self._held = shard, by_prompt([row for row in rows if row.source == "policy"])
        found = self._held.get(prompt_id, [])
        return [
            row.model_copy(update={"source": "previous", "sample": self._first + number})
            for number, row in enumerate(found)
        ]


def _growth(run_dir: RunDir, iteration: int, figures: Mapping[str, Any]) -> dict[str, float]:
    """How much longer the policy's responses are than an iteration ago; a word where that runs away."""
    before = run_dir.stage("sample", iteration - 1).manifest() if iteration else None
    if before is None or not before.details.get("mean_tokens") or not figures:
        return {}
    growth = figures["mean_tokens"] / before.details["mean_tokens"]
    if growth > _MUCH_LONGER:
        say(
            f"warning: sample {iteration}: responses have {figures['mean_tokens']:.0f} tokens on average, {growth:.2g} "
            f"times as many as an iteration ago ({before.details['mean_tokens']:.0f}): does the judge like length? "
            "loss.length_penalty, loss.length_normalised and the report's length figures are for that"
        )
    return {"length_growth": round(growth, 4)}


def _specs(config: RunConfig, weight: float) -> tuple[SampleSpec, ...]:
    section = config.sampling
    if section.source == "mixture":
        return (SampleSpec("mixture", section.num_samples, weight=weight),)
    own = SampleSpec("policy", section.num_samples)
    if not section.num_opponents:
        return (own,)
    return own, SampleSpec("mixture", section.num_opponents, first_sample=section.num_samples, weight=weight)


def _keep_prompts(path: epath.Path, prompts: Sequence[Prompt]) -> None:
    """Write the iteration's prompts, once: what was sampled from must not change under its samples."""
    text = "".join(prompt.model_dump_json() + "\n" for prompt in prompts)
    if not path.exists():
        write_atomically(path, text)
    elif path.read_text() != text:
        raise DnoError(
            f"{path}: the prompt file has changed since this iteration began; restore it, or start another run_dir (or "
            "remove this copy, where it is the one that has changed)"
        )


def _data_to_shards(
    runtime: Runtime[RunConfig], prompts: Sequence[TokenizedPrompt], *, out: StageDir, iteration: int
) -> None:
    """Turn the candidates that come with the data into rollouts: offline methods sample nothing.

    Raises:
        DnoError: a prompt without candidates.
    """
    size = runtime.config.sampling.shard_prompts
    for first in range(0, len(prompts), size):
        rollouts: list[Rollout] = []
        for item in prompts[first : first + size]:
            if not item.prompt.candidates:
                place = named(runtime.config.prompts.path)
                raise DnoError(
                    f"prompt {item.prompt.prompt_id!r} of {place} has no candidates, which "
                    'sampling.source=data trains on: give {"candidates": [{"text": ..., "score": ...}, ...]}'
                )
            name = f"{iteration:03d}/{item.prompt.prompt_id}"
            rollouts += [
                _fixed_rollout(
                    runtime, item, text=given.text, rollout_id=f"{name}/{sample}", source="data", sample=sample
                )
                for sample, given in enumerate(item.prompt.candidates)
            ]
            rollouts += _gold(runtime, item, iteration=iteration)
        out.write_shard(f"{first:07d}", rollouts)


def _gold(runtime: Runtime[RunConfig], item: TokenizedPrompt, *, iteration: int) -> list[Rollout]:
    """The teacher's response as a candidate like any other, where there is one that can be ranked and tokenised."""
    gold = item.prompt.gold
    if not gold or not split_thought(gold).is_answer or is_refusal(split_thought(gold).answer):
        return []
    texts = {given.text.strip() for given in item.prompt.candidates}
    if runtime.config.annotation.kind == "given" and gold.strip() not in texts:
        return []  # nobody gave it points
    rollout_id = f"{iteration:03d}/{item.prompt.prompt_id}/gold"
    with contextlib.suppress(DnoError):  # counted in _gold_drops: one teacher's response is not worth a run
        return [_fixed_rollout(runtime, item, text=gold, rollout_id=rollout_id, source="gold", sample=-1)]
    return []


def _fixed_rollout(
    runtime: Runtime[RunConfig], item: TokenizedPrompt, *, text: str, rollout_id: str, source: Source, sample: int
) -> Rollout:
    """A response that no policy of this run wrote: tokenised once, cut where the student's would be."""
    config = runtime.config
    ids = runtime.tokenizer.response_ids(
        item.prompt.messages, text, end_id=runtime.end_ids[0], assistant_prefix=item.prompt.assistant_prefix
    )
    limit = config.sampling.response_limit(len(item.token_ids))
    whole = len(ids) <= limit
    ids = ids[:limit]
    # The judge reads what is trained on, also where that was cut; points that came with the data are for all of it.
    keep = whole or config.annotation.kind == "given"
    return Rollout(
        rollout_id=rollout_id,
        prompt_id=item.prompt.prompt_id,
        sample=sample,
        source=source,
        policy=None,
        text=text if keep else runtime.tokenizer.decode(ids, after=item.text_ids_before),
        token_ids=ids,
        prompt_token_ids=item.token_ids,
        logprob=None,
        finish="stop" if whole else "length",
    )


@dataclass
class ResponseLengths:
    """Lengths and endings of the policy's own responses."""

    tokens: array = field(default_factory=lambda: array("i"))
    words: array = field(default_factory=lambda: array("i"))
    stopped: int = 0

    def add(self, rollout: Rollout) -> None:
        """Count a response, if a policy gave it."""
        if rollout.policy is not None and rollout.source != "previous":
            self.tokens.append(len(rollout.token_ids))
            self.words.append(len(rollout.text.split()))
            self.stopped += rollout.finish == "stop"

    def figures(self) -> dict[str, Any]:
        """For a manifest; empty where there are no responses."""
        if not self.tokens:
            return {}
        tokens, words = np.asarray(self.tokens, np.int64), np.asarray(self.words)
        return {
            "responses": len(tokens),
            "tokens": int(tokens.sum()),
            "mean_tokens": round(float(tokens.mean()), 2),
            "mean_words": round(float(words.mean()), 2),
            "std_words": round(float(words.std()), 2),
            "stopped": round(self.stopped / len(tokens), 4),
        }


@dataclass
class _Counted:
    """What is said of an iteration's rows and what is audited of them, from one reading, shard by shard."""

    rows: int = 0
    prompts: set[str] = field(default_factory=set)
    gold: set[str] = field(default_factory=set)  # prompts with a teacher's response
    lengths: ResponseLengths = field(default_factory=ResponseLengths)
    cut: CutShares = field(default_factory=CutShares)
    audited: list[Rollout] = field(default_factory=list)

    def add(self, shard: Sequence[Rollout], *, policy: int, audited: int) -> None:
        for rollout in shard:
            self.rows += 1
            (self.gold if rollout.is_gold else self.prompts).add(rollout.prompt_id)
            self.lengths.add(rollout)
        self.cut.add(shard)
        self.audited += audit.audited(shard, policy=policy, count=audited)


def _gold_drops(have: Set[str], prompts: Sequence[TokenizedPrompt]) -> Counter[str]:
    def reason(item: TokenizedPrompt, gold: str) -> str:
        if not split_thought(gold).is_answer:
            return "gold response empty"
        if is_refusal(split_thought(gold).answer):
            return "gold response refuses"
        if item.opens_thought and not split_thought(gold, opened=True).is_answer:
            return "gold response without the thought that its prompt opens"
        return "gold response without points or ids"

    lost = [(item, item.prompt.gold) for item in prompts if item.prompt.prompt_id not in have]
    return Counter(reason(item, gold) for item, gold in lost if gold is not None)
