"""What the judges of a run will be asked, and what that costs, before anybody is: `dno plan`'s part on annotation.

The preference functions themselves say what they ask: their rounds are run over a pool of empty texts of the size and
shape in question, with a tie for every verdict. To what such questions take by themselves (the rubric, the fences), the
tokens of the real prompts and responses are added, as the run's own tokenizer counts them; a judge's counts some 10 %
fewer or more. Responses that are not written yet count as the longest that may be, and so do the judges' replies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dno_jax.annotation.judges.functions import build_function
from dno_jax.annotation.ledger.budget import Usage, cost, most_usage
from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.annotation.quality.calibration import read_calibration
from dno_jax.annotation.question import Question, Verdict, advance
from dno_jax.config import AnnotationSection, ChatSection, QualitySection, RunConfig, TeacherSection
from dno_jax.data.prompts import PromptSplit, TokenizedPrompt
from dno_jax.records import Judgement, Message, Prompt, Role

CountTokens = Callable[[str], int]
Length = Callable[[TokenizedPrompt], int]  # tokens of a response to a prompt

_NOTHING = "."  # the shortest text that a prompt may have
# Beside the configured one: how the same model could be asked.
_OTHERS = {
    "list-wise": {"form": "listwise", "num_orders": 1},
    "pairwise, all pairs": {"form": "pairwise", "schedule": "all_pairs", "both_orders": True},
    "pairwise, tournament": {"form": "pairwise", "schedule": "tournament", "both_orders": True},
    "logprob, all pairs": {"form": "logprob", "schedule": "all_pairs", "both_orders": True},
    "logprob, tournament": {"form": "logprob", "schedule": "tournament", "both_orders": True},
}


@dataclass(frozen=True)
class Shape:
    """What of a pool decides which questions are asked about it.

    Attributes:
        roles: of the prompt's messages.
        num_candidates: C.
        known: a pool of this many of the candidates was judged before: what it asked is answered already.
    """

    roles: tuple[Role, ...]
    num_candidates: int
    known: int = 0


@dataclass(frozen=True)
class Load:
    """Pools of one shape, all together.

    Attributes:
        prompt_tokens: of all prompts.
        response_tokens: of all candidates of all pools.
    """

    pools: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.pools + other.pools,
            self.prompt_tokens + other.prompt_tokens,
            self.response_tokens + other.response_tokens,
        )


Loads = Mapping[Shape, Load]


@dataclass(frozen=True)
class Demand:
    """What is asked of one model.

    Attributes:
        tokens_out: at most.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Demand) -> Demand:
        return Demand(
            self.requests + other.requests, self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out
        )

    def hours(self, chat: ChatSection) -> float | None:
        """Return how long the configured limits make it take; None where there are none."""
        minutes = []
        if chat.requests_per_minute is not None:
            minutes.append(self.requests / chat.requests_per_minute)
        if chat.tokens_per_minute is not None:
            minutes.append((self.tokens_in + self.tokens_out) / chat.tokens_per_minute)
        return max(minutes) / 60.0 if minutes else None


@dataclass(frozen=True)
class Estimate:
    """One row of the plan.

    Attributes:
        demands: by the section that says whom and how.
        usd, batch_usd: dollars, live and by the Batch API; None where a model has no price, and where `batch` does not
            change what is asked live.
        hours: at the configured limits, of the model that takes longest; None where none has limits.
    """

    demands: Mapping[ChatSection, Demand]
    usd: float | None
    batch_usd: float | None
    hours: float | None

    @classmethod
    def of(
        cls, demands: Mapping[ChatSection, Demand], section: AnnotationSection, *, always_live: bool = False
    ) -> Estimate:
        hours = [found for chat, demand in demands.items() if (found := demand.hours(chat)) is not None]
        usd: dict[bool, float | None] = {}
        for batch in (False, True):
            known = [
                cost(section.prices[chat.model], Usage(demand.tokens_in, demand.tokens_out), batch=batch)
                for chat, demand in demands.items()
                if chat.model in section.prices
            ]
            usd[batch] = sum(known) if len(known) == len(demands) else None
        return cls(demands, usd[False], None if always_live else usd[True], max(hours, default=None))

    @property
    def total(self) -> Demand:
        return sum(self.demands.values(), Demand())


@dataclass(frozen=True)
class AnnotationPlan:
    """
    Attributes:
        parts: what the configuration asks for, by iteration, on held-out prompts, of the teacher.
        others: the same pools of all iterations, asked about in other ways.
    """

    section: AnnotationSection
    parts: Mapping[str, Estimate]
    others: Mapping[str, Estimate]


def plan_annotation(
    config: RunConfig,
    *,
    split: PromptSplit,
    tokenize: Callable[[tuple[Prompt, ...]], Sequence[TokenizedPrompt]],
    count: CountTokens,
    response_tokens: int | None = None,
    reply_tokens: int | None = None,
) -> AnnotationPlan | None:
    """Count what a run asks of the models that it pays for; None where there are none.

    Args:
        tokenize: keeps the prompts that the run keeps.
        count: tokens of a text.
        response_tokens: of a sampled response; None takes the longest possible.
        reply_tokens: of a judge's reply; None takes the longest possible.

    Raises:
        DnoError: an unreadable rubric.
    """
    section, evaluation = config.annotation, config.evaluation_judge
    if not (section.chats or evaluation.judges or section.openai.model in section.prices):
        return None

    def length(item: TokenizedPrompt) -> int:
        return response_tokens or config.sampling.response_limit(len(item.token_ids))

    counter = _Counter(count=count, reply_tokens=reply_tokens, seed=config.seed)
    # The teacher's response is cut where the students' are, but for the held-out prompts.
    taught = section.teacher and (response_tokens or section.teacher.max_tokens)
    parts: dict[str, Estimate] = {}
    loads = [
        _training_loads(config, iteration, tokenize(part), count=count, length=length, taught=taught)
        for iteration, part in enumerate(split.training)
    ]
    whole = _sum(loads)
    if section.judges:
        for iteration, load in enumerate(loads):
            parts[f"iteration {iteration}"] = Estimate.of(counter.demands(section, load), section)
        if section.quality.repeat:
            again = {
                chat: Demand(*(math.ceil(section.quality.repeat * n) for n in (d.requests, d.tokens_in, d.tokens_out)))
                for chat, d in counter.demands(section, whole).items()
            }
            parts["asked again"] = Estimate.of(again, section)
        if section.quality.calibration:
            labelled = _labelled_loads(section.quality, count=count, seed=config.seed)
            parts["labelled pairs"] = Estimate.of(counter.demands(section, labelled), section, always_live=True)
    if evaluation.judges and split.held_out:
        held_out = _held_out_loads(config, tokenize(split.held_out), count=count, length=length, taught=taught)
        parts["held out"] = Estimate.of(counter.demands(evaluation, held_out), evaluation, always_live=True)
        if evaluation.quality.calibration and config.evaluation.annotation is not None:  # else they are asked once
            labelled = _labelled_loads(evaluation.quality, count=count, seed=config.seed)
            asked = Estimate.of(counter.demands(evaluation, labelled), evaluation, always_live=True)
            parts["labelled pairs, held out"] = asked
    if section.teacher is not None:
        teacher = _teacher_demand(section.teacher, split, count=count)
        parts["teacher"] = Estimate.of(teacher, section, always_live=True)
    others = {}
    for name, fields in _OTHERS.items():
        judges = section.judges or (section.openai,)
        asked = dict.fromkeys(judge.model_copy(update={"rubric": None, **fields}) for judge in judges)
        other = section.model_copy(update={"kind": "ensemble", "ensemble": tuple(asked)})
        others[name] = Estimate.of(counter.demands(other, whole), other)
    return AnnotationPlan(section=section, parts=parts, others=others)


@dataclass(frozen=True)
class _Outline:
    """What is asked of one model about one pool, its texts aside.

    Attributes:
        tokens_in: of the questions without the texts that they show.
        shown: candidates shown, over all questions.
    """

    questions: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    shown: int = 0


class _Counter:
    """Runs preference functions over pools that are nothing but their shape."""

    def __init__(self, *, count: CountTokens, reply_tokens: int | None, seed: int):
        self._count = count
        self._reply_tokens = reply_tokens
        self._seed = seed
        self._outlines: dict[tuple[AnnotationSection, Shape], dict[ChatSection, _Outline]] = {}

    def demands(self, section: AnnotationSection, loads: Loads) -> dict[ChatSection, Demand]:
        """Return what a configuration asks of its models about pools."""
        found: dict[ChatSection, Demand] = dict.fromkeys(section.judges, Demand())
        for shape, load in loads.items():
            for chat, outline in self._outline(section, shape).items():
                # Every candidate is shown as often as any other, or at random: the mean response stands for all.
                responses = outline.shown * load.response_tokens / shape.num_candidates
                prompts = outline.questions * load.prompt_tokens
                found[chat] += Demand(
                    requests=outline.questions * load.pools,
                    tokens_in=outline.tokens_in * load.pools + prompts + math.ceil(responses),
                    tokens_out=outline.tokens_out * load.pools,
                )
        return found

    def _outline(self, section: AnnotationSection, shape: Shape) -> dict[ChatSection, _Outline]:
        before = {}
        if shape.known > 1:
            before = self._questions(section, Shape(shape.roles, shape.known))
        outlines: dict[ChatSection, _Outline] = {}
        for what, question in self._questions(section, shape).items():
            if what in before:
                continue
            so_far = outlines.get(question.asked, _Outline())
            texts = [str(message["content"]) for message in question.body["messages"]]
            texts += [json.dumps(question.schema)] if question.schema is not None else []
            nothing = (len(shape.roles) + len(question.order)) * self._count(_NOTHING)
            longest = most_usage(question).tokens_out
            outlines[question.asked] = _Outline(
                questions=so_far.questions + 1,
                tokens_in=so_far.tokens_in + sum(map(self._count, texts)) - nothing,
                tokens_out=so_far.tokens_out + min(longest, self._reply_tokens or longest),
                shown=so_far.shown + len(question.order),
            )
        return outlines

    def _questions(self, section: AnnotationSection, shape: Shape) -> dict[tuple[str, tuple[int, ...]], Question]:
        """Return what is asked about a pool, by judge and candidates shown: the same is asked once."""
        function = build_function(section, seed=self._seed)
        messages = tuple(Message(role=role, content=_NOTHING) for role in shape.roles)
        pool = Pool(
            Prompt(prompt_id="plan", messages=messages),
            tuple(Candidate(f"plan/{number}", _NOTHING) for number in range(shape.num_candidates)),
        )
        found: dict[tuple[str, tuple[int, ...]], Question] = {}
        rounds, verdicts = function.rounds(pool), None
        while not isinstance(questions := advance(rounds, verdicts), Judgement):
            verdicts = [Verdict("tie", (0.5,) * len(question.order)) for question in questions]
            found |= {(question.judge, question.order): question for question in questions}
        return found


def _training_loads(
    config: RunConfig,
    iteration: int,
    prompts: Sequence[TokenizedPrompt],
    *,
    count: CountTokens,
    length: Length,
    taught: int | None,
) -> Loads:
    section = config.sampling
    drawn = 0 if section.source == "data" else config.num_candidates(iteration)
    stored = section.num_samples if config.meets_previous(iteration) else 0  # the policy before's, compared already

    def pools() -> Iterator[tuple[Prompt, list[int]]]:
        for item in prompts:
            prompt = item.prompt
            given = [count(response.text) for response in prompt.candidates] if section.source == "data" else []
            gold = _gold_tokens(prompt, count, taught and min(taught, length(item)))
            yield prompt, [length(item)] * drawn + given + gold

    return _loads(pools(), count=count, new=drawn - stored if stored else None)


def _held_out_loads(
    config: RunConfig, prompts: Sequence[TokenizedPrompt], *, count: CountTokens, length: Length, taught: int | None
) -> Loads:
    """Of all iterations: one pool per prompt and sample, in which every policy so far and the teacher have a response.

    From iteration to iteration a pool grows by the newest policy's; the pairs among the others are in the store.
    """

    def pools(iteration: int) -> Iterator[tuple[Prompt, list[int]]]:
        for item in prompts:
            gold = _gold_tokens(item.prompt, count, taught)
            for _ in range(config.evaluation.num_samples):
                others = [length(item)] * len(config.evaluation.external)
                yield item.prompt, [length(item)] * (iteration + 2) + gold + others

    return _sum([_loads(pools(t), count=count, new=1 if t else None) for t in range(config.iterations)])


def _labelled_loads(section: QualitySection, *, count: CountTokens, seed: int) -> Loads:
    """Pairs that people have judged: asked about once, whatever the number of iterations."""
    labelled = read_calibration(section.calibration or "", limit=section.calibration_pairs, seed=seed)
    pools = ((pool.prompt, [count(candidate.text) for candidate in pool.candidates]) for pool, _ in labelled)
    return _loads(pools, count=count)


def _loads(pools: Iterator[tuple[Prompt, list[int]]], *, count: CountTokens, new: int | None = None) -> Loads:
    """
    Args:
        new: candidates that were in no pool before; None: all.
    """
    found: dict[Shape, Load] = {}
    for prompt, candidates in pools:
        if len(candidates) >= 2:
            known = 0 if new is None else len(candidates) - new
            shape = Shape(tuple(message.role for message in prompt.messages), len(candidates), known)
            prefixes = len(candidates) * count(prompt.assistant_prefix) if prompt.assistant_prefix else 0
            texts = sum(count(message.content) for message in prompt.messages)
            found[shape] = found.get(shape, Load()) + Load(1, texts, sum(candidates) + prefixes)
    return found


def _gold_tokens(prompt: Prompt, count: CountTokens, taught: int | None) -> list[int]:
    if prompt.gold is None and taught:
        return [taught]
    return [count(prompt.gold)] if prompt.gold and prompt.gold.strip() else []


def _teacher_demand(teacher: TeacherSection, split: PromptSplit, *, count: CountTokens) -> dict[ChatSection, Demand]:
    """One response for every prompt that has no gold one; iterations may share their prompts."""
    demand = Demand()
    for prompt in (prompt for part in {*split.training, split.held_out} for prompt in part):
        if prompt.gold is None:
            system = [teacher.system] if teacher.system and prompt.messages[0].role != "system" else []
            demand += Demand(1, sum(count(text) for text in (*system, *prompt.texts)), teacher.max_tokens)
    return dict.fromkeys([teacher], demand)


def _sum(loads: Sequence[Loads]) -> Loads:
    total: dict[Shape, Load] = {}
    for load in loads:
        for shape, found in load.items():
            total[shape] = total.get(shape, Load()) + found
    return total
