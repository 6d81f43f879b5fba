"""Shorten a chat from its left until it fits, so that everything which makes it a chat stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dno_jax.records import Message


def shorten_chat(
    messages: Sequence[Message], *, max_length: int, count: Callable[[Sequence[Message]], int]
) -> tuple[Message, ...] | None:
    """Return the messages that are left when a prompt is cut to at most `max_length` tokens.

    Cut are, in this order: the oldest turns, whole, up to a later question of the user's; then the beginning of the
    last question, character by character. Kept are system messages before the first turn, the end of the last question,
    and whatever the template writes around them: the begin token, the assistant's header, an assistant prefix.

    Args:
        count: tokens of the prompt that these messages become.

    Returns:
        The messages themselves where they fit; None where not even one character of the last question does.
    """
    messages = tuple(messages)
    if count(messages) <= max_length:
        return messages
    first = next((index for index, message in enumerate(messages) if message.role != "system"), len(messages) - 1)
    system, turns = messages[:first], messages[first:]
    questions = [index for index, message in enumerate(turns) if message.role == "user"] or [len(turns) - 1]
    for start in questions:
        if count(system + turns[start:]) <= max_length:
            return system + turns[start:]
    last = turns[questions[-1] :]

    def cut(at: int) -> tuple[Message, ...]:
        return (*system, last[0].model_copy(update={"content": last[0].content[at:]}), *last[1:])

    # Longer texts have more tokens but for a merge here and there: bisect, then step over those.
    content = last[0].content
    stop = len(content.rstrip())
    low, high = 0, stop - 1
    while low < high:
        middle = (low + high) // 2
        if count(cut(middle)) <= max_length:
            high = middle
        else:
            low = middle + 1
    for at in range(low, min(low + 8, stop)):
        if count(cut(at)) <= max_length:
            return cut(at)
    return None
