"""A run's prompts with what every policy answered, how it was judged, and what it was trained on: for people to read.

They lie in places: those held out, and each iteration's. A place is read where something of it is asked for that the
last page, while the run goes on, was not made of.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from etils import epath

from dno_jax.data.pairs import NEW, PairFile
from dno_jax.errors import DnoError
from dno_jax.preferences import win_matrix
from dno_jax.records import Judgement, Prompt, Rollout, parse_lines
from dno_jax.report.comparison import player
from dno_jax.report.facts import Facts
from dno_jax.report.kept import Kept
from dno_jax.stage_dir import StageDir

T = TypeVar("T")
HELD_OUT = "held out"
_MOST_PROMPTS = 6000  # that are read
_FOLDER = re.compile(r"policy-\d+-\d+-\d+")  # of an evaluation's responses: policy, first sample, samples
_CANDIDATE = re.compile(r"(.+)/(\d+)")  # of an evaluation's verdicts: player, sample


@dataclass
class Answer:
    """One response.

    Attributes:
        writer: "policy 1", "the teacher", ...
        tokens: None where nobody has counted them.
        score: points, or the share of its pool that it beats; None where nobody judged it.
        chosen, rejected: in how many training pairs.
    """

    writer: str
    sample: int
    text: str
    tokens: int | None
    finish: str
    score: float | None = None
    chosen: int = 0
    rejected: int = 0


@dataclass
class Asked:
    """A prompt and its answers; `place` is "held out" or "iteration 3"."""

    prompt_id: str
    place: str
    messages: Sequence[tuple[str, str]]
    prefix: str = ""
    answers: list[Answer] = field(default_factory=list)
    judge: list[str] = field(default_factory=list)
    unjudged: str = ""


@dataclass(frozen=True)
class Reading:
    """What was read of a place.

    Attributes:
        notes: what of it is left out, in sentences.
        flawed: whether something of it could not be read, which is told: it is tried again for the next page.
    """

    asked: list[Asked]
    notes: tuple[str, ...] = ()
    flawed: bool = False


@dataclass(frozen=True)
class _Outline:
    prompts: int
    tokens: dict[str, list[int]]  # of each response, by its writer
    notes: tuple[str, ...]


class Place:
    """Prompts that belong together, read when they are first asked for.

    Args:
        key: all that they depend on; None where that is not known, and nothing of them is kept.
    """

    def __init__(self, name: str, read: Callable[[], Reading], *, kept: Kept, key: Hashable | None = None):
        self.name = name
        self._read, self._kept = read, kept
        self._key: Hashable = object() if key is None else (name, key)
        self._flawed = False

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """Something that is made of the prompts; as long as they stay as they are it is made once."""
        value = self._kept.once((self._key, what), make)
        if self._flawed:
            self._kept.forget((self._key, what))
        return value

    @functools.cached_property
    def asked(self) -> list[Asked]:
        return self._reading.asked

    @property
    def prompts(self) -> int:
        return self._outline.prompts

    @property
    def tokens(self) -> dict[str, list[int]]:
        return self._outline.tokens

    @property
    def notes(self) -> tuple[str, ...]:
        return self._outline.notes

    @functools.cached_property
    def _reading(self) -> Reading:
        found = self._read()
        self._flawed = found.flawed
        return found

    @functools.cached_property
    def _outline(self) -> _Outline:
        return self.once("outline", lambda: _Outline(len(self.asked), _tokens(self.asked), self._reading.notes))


def places(facts: Facts, held_out: Iterable[Prompt] | None = None, *, kept: Kept) -> list[Place]:
    """Where the run has prompts with answers: those held out first, then each iteration's.

    Of more prompts than a page holds, every iteration gives as many as the others, the first of its shards.

    Args:
        held_out: the held-out prompts, where they have been read; a run directory has only their ids.
    """
    known = None if held_out is None else list(held_out)

    def read_held_out(notes: list[str]) -> Iterable[Asked]:
        return _held_out(facts, known)

    found = [_place(facts, HELD_OUT, read_held_out, kept=kept, key=_held_out_key(facts, known))]
    sampled = [iteration for iteration, _ in facts.of("sample")]
    left = max(0, _MOST_PROMPTS - found[0].prompts)
    for number, iteration in enumerate(sampled):
        most = left // (len(sampled) - number)
        read = functools.partial(_trained, facts, iteration, most=most)
        key = _trained_key(facts, iteration, most=most)
        found.append(_place(facts, f"iteration {iteration}", read, kept=kept, key=key))
        left = max(0, left - found[-1].prompts)
    return [place for place in found if place.prompts or place.notes]


def _place(
    facts: Facts, name: str, read: Callable[[list[str]], Iterable[Asked]], *, kept: Kept, key: Hashable | None
) -> Place:
    def reading() -> Reading:
        told, notes = len(facts.missing), list[str]()
        asked = facts.tried(lambda: list(read(notes))) or []
        return Reading(asked, tuple(notes), flawed=len(facts.missing) > told)

    return Place(name, reading, kept=kept, key=key)


def _held_out_key(facts: Facts, prompts: Sequence[Prompt] | None) -> Hashable | None:
    if prompts is None:
        return None
    text = "\n".join(prompt.model_dump_json() for prompt in prompts)
    seals = tuple(manifest.seal for _, manifest in facts.of("evaluate"))
    return (hashlib.sha256(text.encode()).hexdigest(), seals) if all(seals) else None


def _trained_key(facts: Facts, iteration: int, *, most: int) -> Hashable | None:
    """What an iteration's prompts depend on; None while their verdicts come in, or where no seal tells."""
    names = ("sample", "annotate", "pair")
    stages = [facts.manifests[iteration, name] for name in names if (iteration, name) in facts.manifests]
    if (iteration, "annotate") not in facts.manifests or not all(stage.seal for stage in stages):
        return None
    whole = all(int(name) < most for name in stages[0].outputs if name.isdecimal())
    return tuple(stage.seal for stage in stages), None if whole else most


def _tokens(asked: Sequence[Asked]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for answer in (answer for one in asked for answer in one.answers):
        if answer.tokens is not None:
            found.setdefault(answer.writer, []).append(answer.tokens)
    return found


def lengths(places: Sequence[Place]) -> dict[str, list[int]]:
    """Tokens of each response by its writer: held-out ones, to which all policies answered the same; else all."""
    found: dict[str, list[int]] = {}
    held_out = [place for place in places if place.name == HELD_OUT]
    for place in held_out or places:
        for writer, tokens in place.tokens.items():
            found.setdefault(writer, []).extend(tokens)
    return found


def _held_out(facts: Facts, held_out: Iterable[Prompt] | None) -> list[Asked]:
    """Every policy's held-out answers, with the last evaluation's verdicts."""
    run_dir = facts.run_dir
    evaluated = [iteration for iteration, _ in facts.of("evaluate")]
    if not evaluated:
        return []
    known = _held_out_prompts(facts) if held_out is None else held_out
    prompts = {prompt.prompt_id: prompt for prompt in known}
    asked: dict[str, Asked] = {}
    for iteration in evaluated:
        stage = run_dir.stage("evaluate", iteration)
        for name in sorted(path.name for path in stage.path.iterdir() if _FOLDER.fullmatch(path.name)):
            for rollout in stage.sub(name).read(Rollout):
                if rollout.prompt_id not in asked:
                    if len(asked) >= _MOST_PROMPTS // 2:
                        continue
                    asked[rollout.prompt_id] = _asked(rollout.prompt_id, HELD_OUT, prompts.get(rollout.prompt_id))
                asked[rollout.prompt_id].answers.append(_answer(rollout))
    for prompt_id, one in asked.items():
        gold = prompts[prompt_id].gold if prompt_id in prompts else None
        if gold:
            one.answers.append(Answer("the teacher", -1, gold, None, "stop"))
    last = run_dir.stage("evaluate", evaluated[-1])
    for verdict in last.sub("judgements").read(Judgement):
        if verdict.prompt_id in asked:
            _judged_held_out(asked[verdict.prompt_id], verdict)
    return list(asked.values())


def _held_out_prompts(facts: Facts) -> Sequence[Prompt]:
    """Read them from the user's files; none, with a word, where these are gone."""
    from dno_jax.data.prompts import load_prompts, split_prompts  # brings jax

    section = facts.config.prompts
    try:
        return load_prompts(section.held_out_path) if section.held_out_path else split_prompts(facts.config).held_out
    except (DnoError, OSError, ValueError) as error:
        facts.tell(f"Held-out prompts are shown by their ids alone: {error}")
        return ()


def _judged_held_out(asked: Asked, verdict: Judgement) -> None:
    """Lay a verdict on one sample of every player on the answers: candidates are "<player>/<sample>"."""
    asked.judge.append(verdict.raw)
    scores = _scores(verdict)
    if scores is None:
        asked.unjudged = f"{verdict.state}: {verdict.detail}"
        return
    named: dict[str, float] = {}
    sample = -1
    for name, score in zip(verdict.candidate_ids, scores, strict=True):
        if found := _CANDIDATE.fullmatch(name):
            named[player(found[1])], sample = score, int(found[2])
    own = [one for one in asked.answers if one.sample == sample or (one.sample < 0 and sample == 0)]
    by_text = {one.text.strip(): named[one.writer] for one in own if one.writer in named}
    for one in own:  # the same words were judged once
        one.score = named.get(one.writer, by_text.get(one.text.strip()))


def _trained(facts: Facts, iteration: int, notes: list[str], *, most: int) -> Iterator[Asked]:
    """An iteration's prompts with their candidates, from the first shards on."""
    run_dir, place = facts.run_dir, f"iteration {iteration}"
    sampled, judged = run_dir.stage("sample", iteration), run_dir.stage("annotate", iteration)
    prompts = facts.tried(lambda: _prompts(run_dir.prompts_path(iteration))) or {}
    pairs = facts.tried(lambda: _in_pairs(run_dir.stage("pair", iteration))) if _has(facts, "pair", iteration) else None
    verdict_shards = set(facts.tried(judged.shard_names) or ())
    count = 0
    for shard in sampled.shard_names():
        if count >= most:
            notes.append(f"Of iteration {iteration}'s prompts the first {count:,} are here.")
            return
        asked: dict[str, Asked] = {}
        answers: dict[str, Answer] = {}
        for rollout in sampled.read_shard(Rollout, shard):
            if rollout.prompt_id not in asked:
                asked[rollout.prompt_id] = _asked(rollout.prompt_id, place, prompts.get(rollout.prompt_id))
            answers[rollout.rollout_id] = answer = _answer(rollout)
            asked[rollout.prompt_id].answers.append(answer)
        for verdict in judged.read_shard(Judgement, shard) if shard in verdict_shards else ():
            one = asked[verdict.prompt_id]
            one.judge.append(verdict.raw)
            scores = _scores(verdict)
            if scores is None:
                one.unjudged = f"{verdict.state}: {verdict.detail}"
            for name, score in zip(verdict.candidate_ids, scores or (), strict=scores is not None):
                if name in answers:
                    answers[name].score = score
        for name, answer in answers.items():
            answer.chosen, answer.rejected = (pairs[0][name], pairs[1][name]) if pairs else (0, 0)
        count += len(asked)
        yield from asked.values()


def _prompts(path: epath.Path) -> dict[str, Prompt]:
    lines = path.read_text().split("\n") if path.exists() else []
    return {prompt.prompt_id: prompt for prompt in parse_lines(Prompt, lines, place=str(path))}


def _has(facts: Facts, stage: str, iteration: int) -> bool:
    return (iteration, stage) in facts.manifests


def _in_pairs(stage: StageDir) -> tuple[Counter[str], Counter[str]]:
    """In how many new pairs each response was chosen, and rejected."""
    columns = ("chosen_id", "rejected_id")
    found: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    with PairFile(stage.table_path(NEW)) as file:
        for table in file.read(columns):
            for counter, name in zip(found, columns, strict=True):
                counter.update(table[name].to_pylist())
    return found


def _asked(prompt_id: str, place: str, prompt: Prompt | None) -> Asked:
    if prompt is None:
        return Asked(prompt_id, place, ())
    messages = [(message.role, message.content) for message in prompt.messages]
    return Asked(prompt_id, place, messages, prompt.assistant_prefix)


def _answer(rollout: Rollout) -> Answer:
    writers = {"gold": "the teacher", "data": "the data", "mixture": f"mixture {rollout.policy}"}
    writer = writers.get(rollout.source, f"policy {rollout.policy}")
    return Answer(writer, rollout.sample, rollout.text, len(rollout.token_ids), rollout.finish)


def _scores(verdict: Judgement) -> list[float] | None:
    """Points as they were given; of a pairwise judge the share of the others that each beats."""
    if verdict.scores is not None:
        return list(verdict.scores)
    if verdict.wins is None:
        return None
    wins = np.asarray(win_matrix(wins=verdict.wins, scores=None))
    return ((wins.sum(axis=1) - 0.5) / (len(wins) - 1)).tolist()
