"""What a reward model reads of a prompt and its responses: the same in training as where it judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dno_jax.errors import DnoError
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Message


@dataclass(frozen=True)
class ChatsToScore:
    """The chats of some responses to one prompt.

    Attributes:
        ids: of each, up to the token that its reward is read off.
        longest: tokens of the longest, with the padding that stands behind.
    """

    ids: tuple[tuple[int, ...], ...]
    longest: int


def chats_to_score(
    tokenizer: ChatTokenizer, messages: Sequence[Message], texts: Sequence[str], *, pad_id: int | None
) -> ChatsToScore | str:
    """Return the ids of each response's chat, or why there are none.

    Args:
        pad_id: the token that transformers takes for padding, wherever it stands at the end of a text; or None.
    """
    everything = [*(message.content for message in messages), *texts]
    if spelt := tokenizer.control_tokens(*everything):
        # The tokenizer would make an id of it, and the model would read a chat that nobody held.
        return f"the text to judge spells the control token {spelt[0]!r}"
    if held := tokenizer.rowless_tokens(*everything):
        return f"the text to judge holds {held[0]!r}, of which the reward model has no embedding"
    try:
        chats = [tokenizer.chat_ids(messages, text) for text in texts]
    except DnoError as error:
        return str(error)
    return ChatsToScore(tuple(_without_padding(ids, pad_id) for ids in chats), max(map(len, chats)))


def _without_padding(ids: tuple[int, ...], pad_id: int | None) -> tuple[int, ...]:
    # Where padding is the end token too, transformers reads the reward off the token before: in training already.
    kept = len(ids)
    while kept > 1 and ids[kept - 1] == pad_id:
        kept -= 1
    return ids[:kept]
