"""A judge in this process with planted preferences, which sees no more than what a request shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.annotation.question import PreferenceFunction, Question, Reply, Unparsable, Verdict
from dno_jax.records import Judgement, Message, Prompt

Mind = Callable[[str, list[str], Question], str | Reply]
"""(prompt, candidates as shown, question) -> the reply."""


def careful_reader(messages: Sequence[dict[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Read a request line by line, as a judge that was told the rule.

    The rule comes first in the request, before any text of others, and only lines with its code count.

    Returns:
        (role, text) of the messages and (name, text) of the candidates.
    """
    request = "\n".join(message["content"] for message in messages)
    code = request.split("<<<TITLE ", 1)[1][:16]
    assert len(code) == 16
    assert set(code) <= set("0123456789abcdef")
    conversation, candidates = [], []
    title, inside = "", []
    for line in request.split("\n"):
        if title:
            if line == f"<<<END {title} {code}>>>":
                kind, _, name = title.partition(" ")
                {"MESSAGE": conversation, "CANDIDATE": candidates}[kind].append((name.strip("()"), "\n".join(inside)))
                title, inside = "", []
            else:
                inside.append(line)
        elif line.startswith("<<<") and line.endswith(f" {code}>>>"):
            title = line[3 : -len(f" {code}>>>")]
    assert not title
    return conversation, candidates


def shown_by(question: Question) -> tuple[str, list[str]]:
    """The last message of the prompt and the candidates as they are shown."""
    conversation, candidates = careful_reader(question.body["messages"])
    return conversation[-1][1], [text for _, text in candidates]


def answer(question: Question, mind: Mind) -> Verdict:
    """Ask a mind, and read what it says as the question reads it."""
    prompt, candidates = shown_by(question)
    said = mind(prompt, candidates, question)
    reply = said if isinstance(said, Reply) else Reply(text=said, finish="stop")
    try:
        scores = question.read(reply)
    except Unparsable as error:
        return Verdict("unparsable", raw=reply.text or "", detail=str(error))
    tie = question.asked.form != "listwise" and scores[0] == scores[1]
    return Verdict("tie" if tie else "ok", scores=scores, raw=reply.text or "")


def run(function: PreferenceFunction, pool: Pool, mind: Mind, *, repeat: int = 0) -> tuple[Judgement, list[list[Any]]]:
    """Lead a function's rounds to their end: the judgement, and the questions by round."""
    return run_with(function, pool, lambda question: answer(question, mind), repeat=repeat)


def run_with(
    function: PreferenceFunction, pool: Pool, verdict: Callable[[Question], Verdict], *, repeat: int = 0
) -> tuple[Judgement, list[list[Any]]]:
    rounds = function.rounds(pool, repeat=repeat)
    asked = [list(next(rounds))]
    while True:
        try:
            asked.append(list(rounds.send([verdict(question) for question in asked[-1]])))
        except StopIteration as end:
            return end.value, asked


def pool_of(texts: Sequence[str], *, prompt_id: str = "p", prompt: str = "What is it?") -> Pool:
    candidates = tuple(Candidate(f"0/{prompt_id}/{index}", text) for index, text in enumerate(texts))
    return Pool(Prompt(prompt_id=prompt_id, messages=(Message(role="user", content=prompt),)), candidates)


def graded(scores: Sequence[int], justification: str = "because") -> str:
    """A list-wise reply."""
    entries = {str(i): {"justification": justification, "score": score} for i, score in enumerate(scores, 1)}
    return json.dumps(entries, ensure_ascii=False)


def decided(verdict: str, justification: str = "because") -> str:
    """A pairwise reply."""
    return json.dumps({"justification": justification, "verdict": verdict}, ensure_ascii=False)


def weighed(preference: float, names: tuple[str, str] = ("m", "M")) -> Reply:
    """A one-token reply with P(first shown); a probability of 0 is not among the likeliest tokens."""
    chances = {names[0]: preference, names[1]: 1.0 - preference}
    logprobs = {name: math.log(chance) for name, chance in chances.items() if chance > 0.0}
    return Reply(text=max(chances, key=chances.__getitem__), finish="length", first_logprobs=logprobs)
