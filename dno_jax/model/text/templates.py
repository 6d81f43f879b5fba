"""What a chat template does to chats: one example laid out as tokens, and a lint of what goes wrong in training.

The lint renders a few chats of its own. It asks nothing of the network, the clock or the data.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dno_jax.errors import DnoError
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Message

Level = Literal["error", "warning", "note"]

QUESTION = "What colour is the sky?"
ANSWER = "It is blue."
_ANSWERS = (
    ANSWER,
    "def f(a):\n    return a ** 2",
    "Größe, naïve, 東京, 🙂",
    " A blank before.",
    "\nA line break before.",
)
_SYSTEM = "Answer like a sailor."
_PADDED = "  Two blanks on either side.  "
_REASONING = "Light scatters."
_THOUGHT = f"<think>\n{_REASONING}\n</think>\n\n{ANSWER}"
# Spelt like this, a piece of a template is meant to be one token.
_TOKEN_LIKE = re.compile("<([|\uff5c])[^\\s<>]+?\\1>|<(?:start|end)_of_turn>")


@dataclass(frozen=True)
class Finding:
    """One thing that a reader of a template should know.

    Attributes:
        level: "error" stops a run, "warning" is printed at its start, "note" is only written down.
        name: what was looked at, one word or two.
        text: what was found.
    """

    level: Level
    name: str
    text: str


@dataclass(frozen=True)
class TemplateStrip:
    """One chat as the model sees it, and the part the loss covers.

    Attributes:
        ids: prompt and response.
        tokens: the same, as the vocabulary spells them.
        loss_start, loss_end: the loss covers ids[loss_start:loss_end].
        control: of each token, whether it structures the text (a special token).
        bos_count: begin tokens in `ids`; more than one is a fault of the template.
        end_trained: whether the last id under the loss ends a response, so that the model learns to stop.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    loss_start: int
    loss_end: int
    control: tuple[bool, ...]
    bos_count: int
    end_trained: bool


def template_strip(
    tokenizer: ChatTokenizer, messages: Sequence[Message], response: str, assistant_prefix: str = ""
) -> TemplateStrip:
    """Lay out one chat for `dno inspect`.

    Raises:
        DnoError: as ChatTokenizer.response_ids.
    """
    prompt = tokenizer.prompt_ids(messages, assistant_prefix)
    ids = prompt + tokenizer.response_ids(
        messages, response, end_id=tokenizer.end_ids[0], assistant_prefix=assistant_prefix
    )
    return TemplateStrip(
        ids=ids,
        tokens=tuple(tokenizer.strip(ids)),
        loss_start=len(prompt),
        loss_end=len(ids),
        control=tuple(i in tokenizer.control_ids for i in ids),
        bos_count=0 if tokenizer.bos_id is None else ids.count(tokenizer.bos_id),
        end_trained=ids[-1] in tokenizer.end_ids,
    )


def lint(tokenizer: ChatTokenizer) -> tuple[Finding, ...]:
    """Say what a tokenizer and its chat template do to chats, the worst first."""
    try:
        tokenizer.prompt_ids(_chat(QUESTION))
        tokenizer.chat_ids(_chat(QUESTION), ANSWER)
    except DnoError as error:
        return (Finding("error", "question", str(error)),)
    looks = (_bos, _concatenation, _end, _system, _turns, _contents, _prefix, _date, _round_trip, _tokens)
    found = [finding for look in looks for finding in look(tokenizer)]
    order = ("error", "warning", "note")
    return tuple(sorted(found, key=lambda finding: order.index(finding.level)))


def _chat(*contents: str, system: str = "") -> list[Message]:
    """User and assistant in turns, after a system message where one is given."""
    head = [Message(role="system", content=system)] if system else []
    return head + [
        Message(role="assistant" if index % 2 else "user", content=content) for index, content in enumerate(contents)
    ]


def _bos(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    if tokenizer.bos_id is None:
        yield Finding("note", "BOS", "the tokenizer has no begin token")
        return
    name = tokenizer.strip([tokenizer.bos_id])[0]
    ids = tokenizer.chat_ids(_chat(QUESTION), ANSWER)
    count = ids.count(tokenizer.bos_id)
    if count > 1:
        yield Finding("error", "BOS", f"{count} begin tokens {name!r} in one chat; one is right, at its start")
    elif count and ids[0] != tokenizer.bos_id:
        yield Finding("error", "BOS", f"the begin token {name!r} stands at token {ids.index(tokenizer.bos_id)}, not 0")
    elif not count and tokenizer.text_ids(QUESTION)[:1] == (tokenizer.bos_id,):
        yield Finding("warning", "BOS", f"the tokenizer begins a text with {name!r}, the template does not")
    else:
        yield Finding("note", "BOS", f"{count} begin token {name!r}")


def _concatenation(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    """Whether prompt and response ids are the whole chat's, which training on sampled ids rests upon."""

    def parting(answer: str, system: str = "") -> str:
        chat = _chat(QUESTION, system=system)
        try:
            prompt, whole = tokenizer.prompt_ids(chat), tokenizer.chat_ids(chat, answer)
            if tokenizer.template is None:
                return "" if whole[: len(prompt)] == prompt else "the prompt's last token merges with the response"
            tokenizer.response_ids(chat, answer, end_id=tokenizer.end_ids[0])
        except DnoError as error:
            return str(error)
        return ""

    if found := parting(ANSWER):
        yield Finding("error", "concatenation", found)
        return
    apart = {answer: found for answer in _ANSWERS[1:] if (found := parting(answer))}
    for answer, found in apart.items():
        yield Finding("warning", "concatenation", f"with a response such as {answer!r}: {found}")
    if not apart:
        yield Finding("note", "concatenation", f"prompt and response ids are the whole chat's ({len(_ANSWERS)} tried)")
    if not _refusal(tokenizer, _chat(QUESTION, system=_SYSTEM)) and (found := parting(ANSWER, _SYSTEM)):
        yield Finding("warning", "concatenation", f"with a system message: {found}")


def _end(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    ends = ", ".join(map(repr, tokenizer.strip(tokenizer.end_ids)))
    prompt, whole = tokenizer.prompt_ids(_chat(QUESTION)), tokenizer.chat_ids(_chat(QUESTION), ANSWER)
    tail = whole[len(prompt) :]
    at = next((index for index, token in enumerate(tail) if token in tokenizer.end_ids), None)
    if at is not None:
        rest = f"; what follows is cut: {tokenizer.strip(tail[at + 1 :])}" if tail[at + 1 :] else ""
        yield Finding("note", "end", f"{tokenizer.strip(tail)[at]!r} is trained once, of the end ids {ends}{rest}")
        return
    closing = [token for token in tail if token in tokenizer.control_ids]
    if closing:
        name = tokenizer.strip(closing)[0]
        yield Finding(
            "error",
            "end",
            f"the template closes a response with {name!r} (id {closing[0]}), which ends nothing: the end ids are "
            f"{ends}. Add it to eos_token_id in generation_config.json",
        )
        return
    level: Level = "note" if tokenizer.template is None else "warning"
    written = tokenizer.strip([tokenizer.end_ids[0]])[0]
    yield Finding(level, "end", f"no end token is written after a response: {written!r} is put there and trained")


def _system(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    chat = _chat(QUESTION, system=_SYSTEM)
    if refusal := _refusal(tokenizer, chat):
        yield Finding("warning", "system", f"system messages are refused: {refusal}")
        return
    text = tokenizer.prompt_text(chat)
    if _SYSTEM not in text:
        yield Finding("warning", "system", "system messages are left out of the text")
        return
    start, stop = sorted((text.index(_SYSTEM), text.index(QUESTION)))
    turns = bool(tokenizer.control_tokens(text[start:stop]))
    yield Finding("note", "system", "a turn of its own" if turns else "merged into the user's turn, or before it")


def _turns(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    chat = _chat("And yesterday?", ANSWER, QUESTION)
    if refusal := _refusal(tokenizer, chat):
        level: Level = "note" if tokenizer.template is None else "warning"
        yield Finding(level, "turns", f"chats of several turns are refused: {refusal}")
        return
    text = tokenizer.prompt_text(chat)
    if lost := [message.content for message in chat if message.content not in text]:
        yield Finding("warning", "turns", f"earlier turns are changed: {lost[0]!r} is not in the text")
    if tokenizer.bos_id is not None and (count := tokenizer.prompt_ids(chat).count(tokenizer.bos_id)) > 1:
        yield Finding("warning", "turns", f"{count} begin tokens in a chat of two questions")
    if _REASONING not in tokenizer.prompt_text(_chat("And yesterday?", _THOUGHT, QUESTION)):
        yield Finding("note", "turns", "the reasoning (<think>) of earlier turns is left out")


def _contents(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    """Whether words are altered on their way; sampled responses are kept as ids and are not."""
    if _PADDED not in tokenizer.prompt_text(_chat(_PADDED)):
        yield Finding("note", "contents", "blanks at the ends of the user's words are trimmed")
    if _PADDED not in tokenizer.chat_text(_chat(QUESTION), _PADDED):
        yield Finding("note", "contents", "blanks at the ends of given responses (gold, sft) are trimmed")
    if _REASONING not in tokenizer.chat_text(_chat(QUESTION), _THOUGHT):
        text = "the reasoning (<think>) of given responses (gold, sft) is left out, and so not trained"
        yield Finding("warning", "contents", text)


def _prefix(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    try:
        prompt = tokenizer.prompt_ids(_chat(QUESTION), "It is")
        whole = tokenizer.chat_ids(_chat(QUESTION), ANSWER)
    except DnoError as error:
        yield Finding("note", "prefix", f"an assistant prefix is refused: {error}")
        return
    fits = whole[: len(prompt)] == prompt
    yield Finding("note", "prefix", "an assistant prefix " + ("is kept" if fits else "parts from the whole chat"))


def _date(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    other = replace(tokenizer, date=tokenizer.date + datetime.timedelta(days=400))
    if tokenizer.prompt_text(_chat(QUESTION)) != other.prompt_text(_chat(QUESTION)):
        yield Finding(
            "warning",
            "date",
            f"the template writes today's date into the prompt; this run says {tokenizer.date.isoformat()} throughout "
            "(model.template_date)",
        )


def _round_trip(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    for answer in _ANSWERS[:3]:
        try:
            ids = tokenizer.response_ids(_chat(QUESTION), answer, end_id=tokenizer.end_ids[0])
            said = tokenizer.decode(ids)
            again = tokenizer.response_ids(_chat(QUESTION), said, end_id=tokenizer.end_ids[0])
        except DnoError:  # said by _concatenation
            continue
        if said.strip() != answer or again != ids:
            # What a vocabulary has no character for is lost whatever the template does.
            unknown = set(answer) - set(said)
            kept = "".join(char for char in answer if char not in unknown)
            level: Level = "note" if unknown and said.strip() == kept else "warning"
            yield Finding(level, "round trip", f"{answer!r} comes back as {said!r}")
            return
    yield Finding("note", "round trip", "ids -> text -> ids gives the same ids")


def _tokens(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    text = tokenizer.chat_text(_chat(QUESTION), ANSWER) + tokenizer.prompt_text(_chat(QUESTION))
    written = {match[0] for match in _TOKEN_LIKE.finditer(text)}
    if missing := sorted(name for name in written if not tokenizer.has_token(name)):
        names = ", ".join(map(repr, missing))
        yield Finding("warning", "tokens", f"the template writes {names}, which this tokenizer reads as plain text")


def _refusal(tokenizer: ChatTokenizer, chat: Sequence[Message]) -> str:
    """The template's own words where it refuses a chat; empty where it does not."""
    try:
        tokenizer.prompt_ids(chat)
    except DnoError as error:
        return str(error)
    return ""
