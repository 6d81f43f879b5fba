"""`dno chat` and `dno generate`: read what a policy says."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dno_jax import stopping
from dno_jax.display import is_text, printable

if TYPE_CHECKING:
    from dno_jax.records import Message
    from dno_jax.stages.speak import Said, Speakers

Place = Annotated[
    str,
    typer.Argument(help="a run directory, or a Hugging Face checkpoint", show_default=False, metavar="RUN|CHECKPOINT"),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="fields to set, such as sampling.temperature=0", show_default=False)
]
Policy = Annotated[int | None, typer.Option(help="which policy of a run; the best on held-out prompts by default")]

_NUMBER = re.compile("[0-9]{1,9}")
_HELP = """/regen            another answer to the last message
/policy [N]       let policy N answer from now on; without N: which there are
/beside [N|off]   let policy N (0) answer beside it, for you to compare
/system TEXT      a system message, in a new conversation
/new              a new conversation
/quit             or Ctrl-D; Ctrl-C stops an answer"""


def chat(
    place: Place,
    overrides: Overrides = None,
    policy: Policy = None,
    beside: Annotated[int | None, typer.Option(help="another policy that answers beside it, such as 0")] = None,
) -> None:
    """Talk to a policy, through the run's template and sampler; /help lists what can be typed."""
    from dno_jax.stages.speak import Speakers

    speakers = Speakers.open(place, overrides=overrides or [])
    talk = Talk(speakers, speakers.default if policy is None else speakers.check(policy))
    talk.beside = None if beside is None else speakers.check(beside)
    talk.say(
        f"policy {talk.policy} of {place}; /help lists what can be typed"
        if speakers.is_run
        else "/help lists what can be typed"
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is told, and the next one heard
    with stopping.conversing():
        while talk.hear() and not stopping.asked():
            pass
    if stopping.asked():
        raise KeyboardInterrupt


def generate(
    place: Place,
    prompts: Annotated[Path, typer.Argument(help="prompts, as a run reads them", show_default=False)],
    overrides: Overrides = None,
    policy: Policy = None,
    num_samples: Annotated[int, typer.Option(min=1, help="answers to each prompt")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="a JSONL file, one answer per line, in place of the terminal")
    ] = None,
) -> None:
    """Answer a file of prompts, in their order."""
    import json

    from dno_jax.console import Meter, say
    from dno_jax.data.prompts import load_prompts
    from dno_jax.errors import DnoError
    from dno_jax.files import write_lines_atomically
    from dno_jax.stages.speak import Speakers

    if out is not None and out.exists():
        raise DnoError(f"{out} exists: give another name, or remove it first")
    asked = load_prompts(str(prompts))
    speakers = Speakers.open(place, overrides=overrides or [])
    number = speakers.default if policy is None else speakers.check(policy)
    found: dict[str, tuple[Said, ...]] = {}
    with Meter(f"policy {number}", total=len(asked), unit="prompts", enabled=out is not None) as meter:
        for prompt, answers in speakers.answer_all(number, asked, num_samples=num_samples):
            found[prompt.prompt_id] = answers
            meter.advance(1)
    rows = [
        {
            "prompt_id": prompt.prompt_id,
            "policy": number,
            "sample": sample,
            "response": said.text,
            "finish": said.finish,
        }
        for prompt in asked
        for sample, said in enumerate(found[prompt.prompt_id])
    ]
    if out is not None:
        count = write_lines_atomically(out, (json.dumps(row, ensure_ascii=False) for row in rows))
        say(f"{count:,} answers of policy {number} written to {out}")
        return
    for prompt in asked:
        for said in found[prompt.prompt_id]:
            for message in prompt.messages:
                typer.echo(printable(f"{message.role}: {message.content.strip()}"))
            cut = " [cut at sampling.max_new_tokens]" if said.finish == "length" else ""
            typer.echo(printable(f"policy {number}: {prompt.assistant_prefix}{said.text.strip()}{cut}\n"))


@dataclass
class Talk:
    """A conversation with one policy, or two side by side: what was said, and what is typed next."""

    speakers: Speakers
    policy: int
    beside: int | None = None
    messages: list[Message] = field(default_factory=list)
    draw: int = 0  # /regen takes the next

    def hear(self) -> bool:
        """Take a line, and do what it says; return whether to go on."""
        from dno_jax.errors import DnoError

        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return False
        if not line:
            return True
        if not is_text(line):
            self.say("that line is no UTF-8, and was not asked")
            return True
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if command.startswith("/"):
                self._obey(command, rest.strip())
            else:
                self.draw = 0
                self._ask(line)
        except DnoError as error:
            self.say(str(error))
        return True

    def say(self, text: str) -> None:
        """Say something of one's own: on standard error, where it is no answer."""
        typer.echo(printable(text), err=True)

    def _obey(self, command: str, rest: str) -> None:
        from dno_jax.records import Message

        match command, rest:
            case "/regen", "" if any(message.role == "user" for message in self.messages):
                question = next(message for message in reversed(self.messages) if message.role == "user")
                del self.messages[self.messages.index(question) :]
                self.draw += 1
                self._ask(question.content)
            case "/regen", "":
                self.say("nothing has been asked yet")
            case "/policy", number if _NUMBER.fullmatch(number):
                self.policy = self.speakers.check(int(number))
                self.say(f"policy {self.policy} answers from now on")
            case "/policy", "":
                there = ", ".join(map(str, self.speakers.numbers))
                self.say(f"policy {self.policy} answers; there are {there}")
            case "/beside", "off":
                self.beside = None
            case "/beside", number if _NUMBER.fullmatch(number) or not number:
                self.beside = self.speakers.check(int(number or 0))
                self.say(f"policy {self.beside} answers beside policy {self.policy}, which leads the conversation")
            case "/system", text:
                self.messages = [Message(role="system", content=text)] if text else []
            case "/new", "":
                self.messages = self.messages[:1] if self.messages and self.messages[0].role == "system" else []
            case _:
                self.say(_HELP)

    def _ask(self, question: str) -> None:
        from dno_jax.records import Message

        asked = [*self.messages, Message(role="user", content=question)]
        answers: dict[int, Said] = {}
        for policy in dict.fromkeys(number for number in (self.beside, self.policy) if number is not None):
            if self.beside is not None:
                typer.echo(printable(f"policy {policy}: "), nl=False)
            shown = _Stream()
            try:
                answers[policy] = self.speakers.answer(policy, asked, draw=self.draw, show=shown)
            except KeyboardInterrupt:
                shown.end(" [stopped]")
                return
            shown.end(" [cut at sampling.max_new_tokens]" if answers[policy].finish == "length" else "")
        if forgotten := answers[self.policy].num_forgotten:
            self.say(f"the oldest {forgotten} messages no longer fit, and were left out")
        self.messages = [*asked, Message(role="assistant", content=answers[self.policy].text)]


class _Stream:
    """Prints a growing text; what may still change (a character that is not whole) waits."""

    def __init__(self) -> None:
        self._shown = ""
        self._text = ""

    def __call__(self, text: str) -> None:
        self._text = text
        self._print(text.rstrip("\ufffd"))

    def end(self, note: str) -> None:
        self._print(self._text)
        typer.echo(printable(note))

    def _print(self, text: str) -> None:
        if text.startswith(self._shown):
            typer.echo(printable(text[len(self._shown) :]), nl=False)
            sys.stdout.flush()
            self._shown = text
