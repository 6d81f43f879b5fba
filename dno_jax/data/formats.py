"""Other people's rows: what the columns of each well-known form mean, as a chat, its answer and given responses.

docs/data.md has the table. A form is told by its columns, row by row; columns that mean nothing here are ignored, and
listed once (data/reading.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dno_jax.data.chats import ROLE, Chat, Understood, Unreadable, read_chat, read_number, read_text

_OWN = ("prompt_id", "source", "assistant_prefix")
_ANSWERS = ("response", "completion", "output", "gold")  # the first that a row has is what is trained on
_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"), ("chosen_avg_rating", "rejected_avg_rating"),
)  # fmt: skip
_POINTS = ("overall_score", "score", "fine-grained_score")
COLUMNS = frozenset(
    {
        *_OWN, *_ANSWERS, *(name for pair in _SCORES for name in pair), "prompt", "messages", "candidates", "chosen",
        "rejected", "question", "instruction", "input", "context", "history", "instances", "completions", "turns",
        "conversations", "conversation", "system", "system_prompt", "label", "text", "chosen_response",
        "rejected_response",
    }
)  # fmt: skip


def understand(row: Mapping[str, Any]) -> Understood:
    """Say what a row means.

    Raises:
        Unreadable: it is of no form, or its form's columns do not hold what they should.
    """
    given = {name: value for name, value in row.items() if value is not None}
    for needed, read in _FORMS:
        if all(name in given for name in needed):
            found = read(given)
            break
    else:
        raise Unreadable(_unknown(given))
    found.own = {name: given[name] for name in _OWN if name in given}
    if isinstance(found.own.get("prompt_id"), int) and not isinstance(found.own["prompt_id"], bool):
        found.own["prompt_id"] = str(found.own["prompt_id"])
    if not isinstance(found.own.get("source"), str):
        found.own.pop("source", None)
    for name in ("system", "system_prompt"):
        if isinstance(given.get(name), str):
            found.used.add(name)
            if given[name].strip() and [message["role"] for message in found.messages[:1]] != ["system"]:
                found.messages = [{"role": "system", "content": given[name]}, *found.messages]
                found.untrained = {place + 1 for place in found.untrained}
    found.used.update(_OWN)
    return found


def _unknown(row: Mapping[str, Any]) -> str:
    names = ", ".join(repr(str(name)[:40]) for name in list(row)[:8]) + (", ..." if len(row) > 8 else "")
    why = "text alone does not say where the answer begins" if "text" in row else "of no form that is read"
    return (
        f"columns {names or 'none'}: {why}; expected prompt or messages, or the columns of UltraFeedback, TRL, "
        "ShareGPT, Alpaca, arena-hard or MT-bench (docs/data.md)"
    )


def _prompt(row: Mapping[str, Any]) -> Understood:
    """{prompt, gold | response | completion ...}: this project's own, and TRL's."""
    found = Understood("prompt", strict=True, used={"prompt"})
    found.messages = _asked(row["prompt"], "prompt", found)
    _own_answers(row, found)
    return found


def _messages_row(row: Mapping[str, Any]) -> Understood:
    """{messages, ...}: this project's own, and TRL's, where the assistant's last turn is the answer."""
    found = Understood("messages", strict=True, used={"messages", "prompt"})
    found.messages = read_chat(row["messages"], "messages", found)
    if "prompt" in row:
        _check_prompt(row["prompt"], found.messages, "messages", found)
    _own_answers(row, found)
    if found.answer is None and found.gold is None:
        _answer_of_last_turn(found)
    return found


def _preference(row: Mapping[str, Any]) -> Understood:
    """{prompt, chosen, rejected}: TRL's, plain or of messages, ultrafeedback_binarized, and hh-rlhf's dialogues."""
    found = Understood("chosen and rejected", used={"chosen", "rejected", "messages"})
    asked = next((name for name in ("prompt", "question", "instruction") if name in row), "prompt")
    prompt = row.get(asked)
    found.used.add(asked)
    found.messages, chosen = _continued(prompt, row["chosen"], "chosen", found)
    chat, rejected = _continued(prompt, row["rejected"], "rejected", found)
    if chat != found.messages:
        raise Unreadable("chosen and rejected answer different chats; expected two answers to one")
    points: tuple[float | None, float | None] = (1.0, 0.0)  # which is all that the row says
    for names in _SCORES:
        if all(name in row for name in names):
            points = read_number(row[names[0]], names[0]), read_number(row[names[1]], names[1])
            found.used.update(names)
            break
    found.gold = found.answer = chosen
    texts = (chosen, rejected)
    found.candidates = [
        {"text": text, "score": score} for text, score in zip(texts, points, strict=True) if text.strip()
    ]
    return found


def _ultrafeedback(row: Mapping[str, Any]) -> Understood:
    """{instruction, completions}: several models' answers, with points; the one with the most is the answer."""
    found = Understood("UltraFeedback", used={"instruction", "prompt", "completions"})
    found.messages = _asked(row.get("instruction", row.get("prompt")), "instruction", found)
    if not isinstance(row["completions"], list):
        raise Unreadable(f"completions: expected a list, got {type(row['completions']).__name__}")
    for place, completion in enumerate(row["completions"]):
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            raise Unreadable(f"completions[{place}]: expected an object with the text `response`")
        name = next((name for name in _POINTS if completion.get(name) is not None), None)
        score = None if name is None else read_number(completion[name], f"completions[{place}].{name}")
        if completion["response"].strip():
            found.candidates.append({"text": completion["response"], "score": score})
    scored = [item for item in found.candidates if item["score"] is not None]
    if scored:
        found.gold = found.answer = max(scored, key=lambda item: item["score"])["text"]
    return found


def _sharegpt(row: Mapping[str, Any]) -> Understood:
    """{conversations: [{from, value}]}; turns before the first question are none that anybody asked for."""
    name = "conversations" if "conversations" in row else "conversation"
    found = Understood("ShareGPT", used={name})
    found.messages = read_chat(row[name], name, found) if row[name] else []
    first = next((at for at, message in enumerate(found.messages) if message["role"] != "assistant"), None)
    if first:
        found.messages = found.messages[first:]
        found.untrained = {place - first for place in found.untrained}
    _answer_of_last_turn(found)
    return found


def _turns(row: Mapping[str, Any]) -> Understood:
    """{turns}: of arena-hard and MT-bench the user's alone, of which the first needs no answer before it."""
    found = Understood("turns (the first is asked)", used={"turns"})
    turns = row["turns"]
    if not isinstance(turns, list):
        raise Unreadable(f"turns: expected a list, got {type(turns).__name__}")
    if any(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
        found.form = "turns"
        found.messages = read_chat(turns, "turns", found)
        _answer_of_last_turn(found)
    elif turns:
        first = turns[0].get("content") if isinstance(turns[0], dict) else turns[0]
        found.messages = [{"role": "user", "content": read_text(first, "turns[0]")}]
    return found


def _alpaca(row: Mapping[str, Any]) -> Understood:
    """{instruction, input, output}: Alpaca's; Dolly's `context` and `response`; self-instruct's `instances`."""
    found = Understood("Alpaca", used={"instruction", "input", "context", "history", "instances", *_ANSWERS})
    if isinstance(instances := row.get("instances"), list) and instances and isinstance(instances[0], dict):
        row = {**row, **{name: instances[0].get(name, "") for name in ("input", "output")}}
    more = row.get("input", row.get("context", ""))
    instruction = read_text(row["instruction"], "instruction")
    asked = "\n\n".join(part for part in (instruction, read_text(more, "input")) if part.strip())
    for place, turn in enumerate(row.get("history") or []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise Unreadable(f"history[{place}]: expected a question and its answer")
        found.messages += [
            {"role": role, "content": read_text(text, f"history[{place}]")}
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    found.messages.append({"role": "user", "content": asked})
    _own_answers(row, found)
    return found


def _responses(row: Mapping[str, Any]) -> Understood:
    """{instruction, chosen_response, rejected_response}: Argilla's."""
    found = _preference({**row, "chosen": row["chosen_response"], "rejected": row["rejected_response"]})
    found.used |= {"chosen_response", "rejected_response"}
    return found


_FORMS = (
    (("chosen", "rejected"), _preference),
    (("chosen_response", "rejected_response"), _responses),
    (("instruction", "completions"), _ultrafeedback),
    (("prompt", "completions"), _ultrafeedback),
    (("conversations",), _sharegpt),
    (("conversation",), _sharegpt),
    (("messages",), _messages_row),
    (("prompt",), _prompt),
    (("instruction",), _alpaca),
    (("turns",), _turns),
)


def _own_answers(row: Mapping[str, Any], found: Understood) -> None:
    """Read the answer beside the question, and this project's own candidates."""
    texts: dict[str, str] = {}
    for name in _ANSWERS:
        if name in row:
            found.used.add(name)
            texts[name] = _answer(row[name], name, found)
    if names := [name for name in texts if name != "gold"]:
        found.answer = texts[names[0]]
        if found.form == "prompt" and names[0] == "completion":
            found.form = "prompt and completion"
    found.gold = texts.get("gold", found.answer)
    found.answer = found.gold if found.answer is None else found.answer
    if row.get("label") is False and "gold" not in texts:  # TRL's unpaired preferences
        found.gold, found.answer, found.undesired = None, None, True
    if isinstance(row.get("label"), bool):
        found.used.add("label")
    if "candidates" in row:
        found.used.add("candidates")
        found.candidates = _candidates(row["candidates"], found)


def _candidates(value: Any, found: Understood) -> list[Any]:
    if not isinstance(value, list):
        raise Unreadable(f"candidates: expected a list, got {type(value).__name__}")
    made: list[Any] = []
    for item in value:
        if isinstance(item, dict):
            found.inner.update(f"candidates.{name}" for name in item if name not in ("text", "score"))
            item = {name: item[name] for name in ("text", "score") if name in item}
        made.append({"text": item} if isinstance(item, str) else item)
    return made


def _answer_of_last_turn(found: Understood) -> None:
    """Take the assistant's last turn out of the chat as its answer; a question after it has none yet."""
    if found.messages and found.messages[-1]["role"] == "assistant":
        place = len(found.messages) - 1
        found.gold = found.messages[-1]["content"]
        found.answer = None if place in found.untrained else found.gold
        found.messages = found.messages[:-1]


def _continued(prompt: Any, answer: Any, name: str, found: Understood) -> tuple[Chat, str]:
    """Return the chat that an answer belongs to, and its text: the answer may bring the chat, or what is new of it."""
    if isinstance(answer, str) and prompt is None:
        answer = _dialogue(answer, name)
    if isinstance(answer, str):
        return _asked(prompt, "prompt", found), answer
    turns = read_chat(answer, name, found)
    if turns[-1]["role"] != "assistant":
        raise Unreadable(f"{name}: ends with the {turns[-1]['role']}'s turn; expected the assistant's")
    before, text = turns[:-1], turns[-1]["content"]
    if prompt is None:
        return before, text
    if not before or before[0]["role"] == "assistant":
        return [*_asked(prompt, "prompt", found), *before], text
    _check_prompt(prompt, before, name, found)
    return before, text


def _dialogue(text: str, name: str) -> Chat:
    """The turns of hh-rlhf's texts: a blank line, who speaks, a colon, what is said."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not parts:
        raise Unreadable(f"{name} without a prompt: expected the column prompt, or {name} as a list of messages")
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLE[who.lower()], "content": said.strip()} for who, said in spoken]


def _check_prompt(prompt: Any, chat: Chat, name: str, found: Understood) -> None:
    """Refuse a prompt that the chat beside it does not hold."""
    if isinstance(prompt, str):
        fits = any(message["content"].strip() == prompt.strip() for message in chat)
    else:
        asked = read_chat(prompt, "prompt", found)
        fits = chat[: len(asked)] == asked
    if not fits:
        raise Unreadable(f"prompt and {name} differ: the prompt is no part of the chat; expected one of them, or equal")


def _asked(value: Any, name: str, found: Understood) -> Chat:
    return [{"role": "user", "content": value}] if isinstance(value, str) else read_chat(value, name, found)


def _answer(value: Any, name: str, found: Understood) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        turns = read_chat(value, name, found)
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise Unreadable(f"{name}: expected a text, or one message of the assistant's")
        return turns[0]["content"]
    return read_text(value, name)
