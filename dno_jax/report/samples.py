"""A run's prompts with what every policy answered, how it was judged, and what it was trained on: for people to read.

Texts are cut until all of them fit into a page, and lie in it compressed, so many prompts to a chunk.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from dno_jax.data.pairs import NEW, PairFile
from dno_jax.display import printable
from dno_jax.errors import DnoError
from dno_jax.preferences import win_matrix
from dno_jax.records import Judgement, Prompt, Rollout, parse_lines
from dno_jax.report.comparison import player
from dno_jax.report.facts import Facts
from dno_jax.stage_dir import StageDir

HELD_OUT = "held out"
_MOST_PROMPTS = 6000  # that are read
_MOST_BYTES = 8_000_000  # of the page that texts may take
_CHUNK = 100  # prompts
_TRIED = 8  # chunks by which it is told whether all would fit
# How much of a prompt is shown: (answers of one writer, characters of an answer). The first that fits is taken.
_LEVELS = ((16, 4000), (8, 2000), (4, 1500), (2, 1000), (1, 1000), (1, 500), (1, 250), (1, 100))
_WORDS_OF_A_JUDGE = 1200
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
class Browser:
    """What the page holds of the samples.

    Attributes:
        chunks: base64 of gzip of JSON, each a list of `_CHUNK` prompts.
        note: what is left out of them, in a sentence.
    """

    chunks: tuple[str, ...]
    prompts: int
    note: str


def read_samples(facts: Facts, held_out: Iterable[Prompt] | None = None) -> list[Asked]:
    """Read prompts with all their answers: those held out first, then each iteration's.

    Of more prompts than a page holds, every iteration gives as many as the others, the first of its shards.

    Args:
        held_out: the held-out prompts, where they have been read; a run directory has only their ids.
    """
    found = facts.tried(lambda: _held_out(facts, held_out, most=_MOST_PROMPTS // 2)) or []
    sampled = [iteration for iteration, _ in facts.of("sample")]
    for number, iteration in enumerate(sampled):
        left = max(0, _MOST_PROMPTS - len(found)) // (len(sampled) - number)
        found += facts.tried(lambda i=iteration, most=left: list(_trained(facts, i, most=most))) or []
    return found


def browser(asked: Sequence[Asked], *, most_bytes: int = _MOST_BYTES) -> Browser:
    """Compress prompts and answers, as much of each as fits into so many bytes together."""
    groups = [asked[first : first + _CHUNK] for first in range(0, len(asked), _CHUNK)]
    some = groups[:: max(1, len(groups) // _TRIED)]
    for most, characters in _LEVELS:
        cut, last = Counter[str](), (most, characters) == _LEVELS[-1]
        tried = sum(len(_packed(group, most=most, characters=characters, cut=Counter())) for group in some)
        if tried * len(groups) > most_bytes * len(some) and not last:
            continue
        chunks = tuple(_packed(group, most=most, characters=characters, cut=cut) for group in groups)
        if last or sum(map(len, chunks)) <= most_bytes:
            return Browser(chunks, len(asked), _note(cut, most=most, characters=characters))
    raise AssertionError("the last level takes all")


def _packed(asked: Sequence[Asked], *, most: int, characters: int, cut: Counter[str]) -> str:
    rows = [_row(one, most=most, characters=characters, cut=cut) for one in asked]
    packed = gzip.compress(json.dumps(rows, ensure_ascii=False).encode(), compresslevel=6, mtime=0)
    return base64.b64encode(packed).decode()


def _note(cut: Counter[str], *, most: int, characters: int) -> str:
    said = []
    if cut["texts"]:
        said.append(f"texts are cut after {characters:,} characters ({cut['texts']:,} of them)")
    if cut["answers"]:
        said.append(f"answers beyond {most} a writer are left out ({cut['answers']:,})")
    return f"To keep the page small, {' and '.join(said)}; the run's rollouts/ folders have all." if said else ""


def _row(asked: Asked, *, most: int, characters: int, cut: Counter[str]) -> dict[str, Any]:
    """A prompt as the page reads it; keys are short, since there are many."""

    def shown(text: str, limit: int = characters) -> str:
        if len(text) <= limit:
            return printable(text)
        cut["texts"] += 1
        return f"{printable(text[:limit])} … {len(text) - limit:,} more characters"

    answers = []
    of_writer: Counter[str] = Counter()
    for one in asked.answers:
        of_writer[one.writer] += 1
        if of_writer[one.writer] > most:
            cut["answers"] += 1
            continue
        row: dict[str, Any] = {"w": one.writer, "t": shown(one.text)}
        row |= {"k": one.tokens} if one.tokens is not None else {}
        row |= {"n": one.sample} if one.sample > 0 else {}
        row |= {"s": round(one.score, 3)} if one.score is not None else {}
        row |= {"f": 1} if one.finish == "length" else {}
        row |= {"c": one.chosen} if one.chosen else {}
        row |= {"r": one.rejected} if one.rejected else {}
        answers.append(row)
    found: dict[str, Any] = {"i": printable(asked.prompt_id), "p": asked.place, "a": answers}
    found["m"] = [[role, shown(text, max(characters, 400))] for role, text in asked.messages]
    found |= {"b": shown(asked.prefix)} if asked.prefix else {}
    words = [shown(text, min(characters, _WORDS_OF_A_JUDGE)) for text in asked.judge[:most] if text.strip()]
    found |= {"j": words} if words else {}
    return found | ({"u": printable(asked.unjudged[:300])} if asked.unjudged else {})


def _held_out(facts: Facts, held_out: Iterable[Prompt] | None, *, most: int) -> list[Asked]:
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
                    if len(asked) >= most:
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


def _trained(facts: Facts, iteration: int, *, most: int) -> Iterator[Asked]:
    """An iteration's prompts with their candidates, from the first shards on."""
    run_dir, place = facts.run_dir, f"iteration {iteration}"
    sampled, judged = run_dir.stage("sample", iteration), run_dir.stage("annotate", iteration)
    prompts = facts.tried(lambda: _prompts(run_dir.prompts_path(iteration))) or {}
    pairs = facts.tried(lambda: _in_pairs(run_dir.stage("pair", iteration))) if _has(facts, "pair", iteration) else None
    verdict_shards = set(facts.tried(judged.shard_names) or ())
    count = 0
    for shard in sampled.shard_names():
        if count >= most:
            facts.notes.append(f"Of iteration {iteration}'s prompts the first {count:,} are here.")
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


def lengths(asked: Sequence[Asked]) -> dict[str, list[int]]:
    """Tokens of each response by its writer: held-out ones, to which all policies answered the same; else all."""
    found: dict[str, list[int]] = {}
    held_out = any(one.place == HELD_OUT for one in asked)
    for one in asked:
        for answer in one.answers if not held_out or one.place == HELD_OUT else ():
            if answer.tokens is not None:
                found.setdefault(answer.writer, []).append(answer.tokens)
    return found
