"""One held-out prompt answered by policy 0 beside another, as the last evaluation kept it."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from dno_jax.run_dir import RunDir


class ShownAnswers(NamedTuple):
    """A prompt, as (role, text), and the answers to it, as (policy, text)."""

    messages: tuple[tuple[str, str], ...]
    answers: tuple[tuple[int, str], ...]


def shown_answers(run_dir: RunDir, *, iterations: int, policy: int) -> ShownAnswers | None:
    """Return how policy 0 and another answered a held-out prompt; None where nothing was held out or evaluated."""
    manifests = (run_dir.stage("evaluate", t).manifest() for t in range(iterations - 1, -1, -1))
    kept = next((manifest.details.get("shown") for manifest in manifests if manifest is not None), None)
    if kept is None or str(policy) not in kept["answers"]:
        return None
    messages = tuple((message["role"], message["content"]) for message in kept["messages"])
    return ShownAnswers(messages, tuple((number, kept["answers"][str(number)]) for number in sorted({0, policy})))


def answers_text(found: ShownAnswers) -> RenderableType:
    """For a terminal: the prompt, and the answers below each other."""
    parts: list[Text] = [Text("a held-out prompt, and the first answers to it", style="italic")]
    for role, text in found.messages:
        parts.append(Text(f"{role}: ", style="bold").append(text.strip(), style="not bold"))
    for policy, text in found.answers:
        parts.append(Text(f"policy {policy}: ", style="bold cyan").append(text.strip(), style="not bold default"))
    return Group(*parts)
