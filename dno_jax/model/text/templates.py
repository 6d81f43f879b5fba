"""What a chat template does to chats: one example laid out as tokens, and a lint of what goes wrong in training.

The lint renders a few chats of its own. It asks nothing of the network, the clock or the data.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dno_jax.errors import DnoError
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.reasoning import without_thought_at_end
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
        bos_count: begin tokens in `ids`; side by side at the start they are a fault of the template.
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


def lint(tokenizer: ChatTokenizer, *, untrained: Collection[int] = ()) -> tuple[Finding, ...]:
    """Say what a tokenizer and its chat template do to chats, the worst first.

    Args:
        untrained: ids of the template's own tokens whose rows of the embedding no training has touched.
    """
    try:
        tokenizer.prompt_ids(_chat(QUESTION))
        tokenizer.chat_ids(_chat(QUESTION), ANSWER)
    except DnoError as error:
        return (Finding("error", "question", str(error)),)
    looks = (_bos, _concatenation, _thinking, _system, _turns, _contents, _prefix, _date, _round_trip, _tokens)
    found = [finding for look in (*looks, _vocabulary) for finding in look(tokenizer)]
    found += [*_end(tokenizer, untrained), *_untrained(tokenizer, untrained)]
    order = ("error", "warning", "note")
    return tuple(sorted(found, key=lambda finding: order.index(finding.level)))


def _chat(*contents: str, system: str = "") -> list[Message]:
    """User and assistant in turns, after a system message where one is given."""
    head = [Message(role="system", content=system)] if system else []
    return head + [
        Message(role="assistant" if index % 2 else "user", content=content) for index, content in enumerate(contents)
    ]


def _given(tokenizer: ChatTokenizer, answer: str, chat: Sequence[Message]) -> str:
    """A response as it would be given for a chat: with its thought where the prompt opens one."""
    return f"{_REASONING}\n</think>\n\n{answer}" if tokenizer.opens_thought(tokenizer.prompt_ids(chat)) else answer


def _bos(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    """Two begin tokens side by side are a fault, and so is what stands before the first.

    One that ends, pads or opens turns too stands wherever it does that: the model was trained so.
    """
    if tokenizer.bos_id is None:
        yield Finding("note", "BOS", "the tokenizer has no begin token")
        return
    name = tokenizer.strip([tokenizer.bos_id])[0]
    ids = tokenizer.chat_ids(_chat(QUESTION), ANSWER)
    count = ids.count(tokenizer.bos_id)
    at = ids.index(tokenizer.bos_id) if count else 0
    together = next((number for number, token in enumerate(ids[at:]) if token != tokenizer.bos_id), len(ids) - at)
    if together > 1 and not tokenizer.spelled(ids[:at]).strip():
        yield Finding("error", "BOS", f"{together} begin tokens {name!r} side by side; one is right, at the start")
    elif at and _is_late(tokenizer, tokenizer.spelled(ids[:at])):
        yield Finding("error", "BOS", f"the begin token {name!r} stands at token {at}, not 0")
    elif ids[:1] != (tokenizer.bos_id,) == tokenizer.text_ids(QUESTION)[:1]:
        yield Finding("warning", "BOS", f"the tokenizer begins a text with {name!r}, the template does not")
    else:
        yield Finding("note", "BOS", f"{count} begin token{'s' * (count > 1)} {name!r}")


def _is_late(tokenizer: ChatTokenizer, before: str) -> bool:
    """Whether the text before the first begin token should not be there."""
    if len(tokenizer.around_begins(_chat(QUESTION))) > 1:  # the template means it to begin the chat
        return tokenizer.bos_only_begins or QUESTION not in before
    if not tokenizer.bos_only_begins:
        return False
    turns = _chat("And yesterday?", ANSWER, QUESTION)
    opens_turns = not _refusal(tokenizer, turns) and tokenizer.prompt_ids(turns).count(tokenizer.bos_id) > 1
    return not opens_turns or not before.strip()


def _concatenation(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    """Whether prompt and response ids are the whole chat's, which training on sampled ids rests upon."""

    def parting(answer: str, system: str = "") -> str:
        chat = _chat(QUESTION, system=system)
        try:
            answer = _given(tokenizer, answer, chat)
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


def _thinking(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    """Whether samples and given responses think alike."""
    prompt = tokenizer.prompt_text(_chat(QUESTION))
    if tokenizer.template is None:
        return
    if tokenizer.opens_thought(tokenizer.prompt_ids(_chat(QUESTION))):
        text = "the prompt opens a thought: given responses (gold, sft) must carry theirs, those without are dropped"
        yield Finding("note", "thinking", text)
    elif without_thought_at_end(prompt) != prompt:
        yield Finding("note", "thinking", "the prompt has an empty thought: responses answer at once")
    else:
        whole = tokenizer.chat_text(_chat(QUESTION), ANSWER)
        written = whole.removeprefix(prompt).rpartition(ANSWER)[0]
        if whole.startswith(prompt) and without_thought_at_end(written) != written:
            text = (
                "given responses (gold, sft) are trained with an empty thought before them, which no prompt writes, "
                "while samples think: give responses with their thoughts, or have the template write it into prompts "
                "too (for many models: model.template_options: {enable_thinking: false})"
            )
            yield Finding("warning", "thinking", text)


def _end(tokenizer: ChatTokenizer, untrained: Collection[int]) -> Iterator[Finding]:
    ends = ", ".join(map(repr, tokenizer.strip(tokenizer.end_ids)))
    chat = _chat(QUESTION)
    prompt, whole = tokenizer.prompt_ids(chat), tokenizer.chat_ids(chat, ANSWER)
    tail = whole[len(prompt) :]
    if tokenizer.opens_thought(prompt):
        tail = tokenizer.continued_ids(chat, "", _given(tokenizer, ANSWER, chat))
    at = next((index for index, token in enumerate(tail) if token in tokenizer.end_ids), None)
    if at is not None:
        rest = f"; what follows is cut: {tokenizer.strip(tail[at + 1 :])}" if tail[at + 1 :] else ""
        yield Finding("note", "end", f"{tokenizer.strip(tail)[at]!r} is trained once, of the end ids {ends}{rest}")
        return
    closing = [token for token in tail if token in tokenizer.control_ids]
    if closing:
        name = tokenizer.strip(closing)[0]
        advice = "Add it to eos_token_id in generation_config.json"
        if closing[0] in untrained:
            advice = (
                "No training has touched its row of the embedding: give the template that the model was trained with"
            )
        yield Finding(
            "error",
            "end",
            f"the template closes a response with {name!r} (id {closing[0]}), which ends nothing: the end ids are "
            f"{ends}. {advice}",
        )
        return
    level: Level = "note" if tokenizer.template is None else "warning"
    written = tokenizer.strip([tokenizer.end_ids[0]])[0]
    yield Finding(level, "end", f"no end token is written after a response: {written!r} is put there and trained")


def _untrained(tokenizer: ChatTokenizer, untrained: Collection[int]) -> Iterator[Finding]:
    if untrained:
        names = _few(tokenizer.strip(sorted(untrained)))
        text = (
            f"the template writes {names}, whose rows of the embedding no training has touched (near zero, or all "
            "equal): a chat template on a base model? Give the model that was trained with it, another template, or "
            "chat_template: raw; or train it first (dno sft)"
        )
        yield Finding("warning", "rows", text)


def _vocabulary(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    """Whether every id has a row of the embedding, where the model is known."""
    rows, ids = tokenizer.num_rows, tokenizer.vocab_size
    if rows is None:
        return
    lacking = tokenizer.rowless_ids
    if needed := lacking & {*tokenizer.written_ids, *tokenizer.end_ids}:
        names = _few(tokenizer.strip(sorted(needed)))
        yield Finding(
            "error", "vocabulary", f"the template writes {names}, and the embedding ({rows} rows) has no row for it"
        )
    elif lacking - tokenizer.added_ids:
        yield Finding("error", "vocabulary", f"{ids} ids of the tokenizer, {rows} rows of the embedding")
    elif lacking:
        names = _few(tokenizer.strip(sorted(lacking)))
        text = f"no row of the embedding ({rows} rows) for {names}: texts that hold one are dropped and counted"
        yield Finding("warning", "vocabulary", text)
    else:
        padding = f"; the {rows - ids} rows above are padding and never sampled" if ids < rows else ""
        yield Finding("note", "vocabulary", f"{ids} ids of the tokenizer, {rows} rows of the embedding{padding}")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


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
    if tokenizer.bos_only_begins and (count := len(tokenizer.around_begins(chat)) - 1) > 1:
        yield Finding("warning", "turns", f"{count} begin tokens in a chat of two questions")
    if _REASONING not in tokenizer.prompt_text(_chat("And yesterday?", _THOUGHT, QUESTION)):
        yield Finding("note", "turns", "the reasoning (<think>) of earlier turns is left out")


def _contents(tokenizer: ChatTokenizer) -> Iterator[Finding]:
    """Whether words are altered on their way; sampled responses are kept as ids and are not."""
    if _PADDED not in tokenizer.prompt_text(_chat(_PADDED)):
        yield Finding("note", "contents", "blanks at the ends of the user's words are trimmed")
    if _PADDED not in tokenizer.chat_text(_chat(QUESTION), _PADDED):
        yield Finding("note", "contents", "blanks at the ends of given responses (gold, sft) are trimmed")
    opened = tokenizer.opens_thought(tokenizer.prompt_ids(_chat(QUESTION)))  # responses bypass the template then
    if not opened and _REASONING not in tokenizer.chat_text(_chat(QUESTION), _THOUGHT):
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
    for answer in (_given(tokenizer, answer, _chat(QUESTION)) for answer in _ANSWERS[:3]):
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
        # A model's own template was trained so, whatever it looks like (OLMo 2's roles).
        level: Level = "note" if tokenizer.template_place == tokenizer.path else "warning"
        yield Finding(level, "tokens", f"the template writes {names}, which this tokenizer reads as plain text")


def _refusal(tokenizer: ChatTokenizer, chat: Sequence[Message]) -> str:
    """The template's own words where it refuses a chat; empty where it does not."""
    try:
        tokenizer.prompt_ids(chat)
    except DnoError as error:
        return str(error)
    return ""
