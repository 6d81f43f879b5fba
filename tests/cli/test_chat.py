"""What is typed in `dno chat`, and what comes of it; the policies here only say who they are."""

from __future__ import annotations

import sys

import pytest

from dno_jax.cli.chat import Talk
from dno_jax.errors import DnoError
from dno_jax.stages.speak import Said, Speakers


class Scripted(Speakers):
    """Policies 0 to 2, which answer with their number, the draw and all that they were asked."""

    def __init__(self):
        self.numbers, self.default, self.is_run = (0, 1, 2), 2, True
        self.asked = []
        self.answers = {}

    def answer(self, policy, messages, *, draw, show=lambda text: None):
        self.asked.append((policy, draw, [(message.role, message.content) for message in messages]))
        said = self.answers.get(messages[-1].content, f"{policy}.{draw} of {len(messages)}")
        if isinstance(said, BaseException):
            raise said
        if isinstance(said, str):
            said = Said(said, "stop")
        for end in range(1, len(said.text), 3):
            show(said.text[:end])
        show(said.text)
        return said


@pytest.fixture
def talk(monkeypatch, capsys):
    def run(*lines, beside=None, **answers):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, None)
            if line is None:
                raise EOFError
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        speakers = Scripted()
        speakers.answers = answers
        talk = Talk(speakers, 2, beside)
        while talk.hear():
            pass
        captured = capsys.readouterr()
        return talk, captured.out, captured.err

    return run


def test_a_conversation_grows(talk):
    found, out, _ = talk("hello", "", "and then?")
    assert out == "2.0 of 1\n2.0 of 3\n"
    assert [(message.role, message.content) for message in found.messages] == [
        ("user", "hello"), ("assistant", "2.0 of 1"), ("user", "and then?"), ("assistant", "2.0 of 3"),
    ]  # fmt: skip


def test_regen_draws_again_and_replaces_the_last_answer(talk):
    found, out, err = talk("/regen", "hello", "/regen", "/regen", "more")
    assert out.splitlines() == ["2.0 of 1", "2.1 of 1", "2.2 of 1", "2.0 of 3"]
    assert [message.content for message in found.messages] == ["hello", "2.2 of 1", "more", "2.0 of 3"]
    assert "nothing has been asked yet" in err


def test_policies_take_turns_and_stand_beside_each_other(talk):
    found, out, err = talk(
        "/policy", "/policy 1", "a", "/beside", "b", "/beside 2", "c", "/beside off", "d", "/policy 7"
    )
    assert out.splitlines() == [
        "1.0 of 1", "policy 0: 1.0 of 3".replace("1.0", "0.0"), "policy 1: 1.0 of 3",
        "policy 2: 2.0 of 5", "policy 1: 1.0 of 5", "1.0 of 7",
    ]  # fmt: skip
    assert [message.content for message in found.messages][1::2] == ["1.0 of 1", "1.0 of 3", "1.0 of 5", "1.0 of 7"]
    assert "policy 2 answers; there are 0, 1, 2" in err
    assert "there is no policy 7; there are 0, 1, 2" in err


def test_beside_itself_it_answers_once(talk):
    _, out, _ = talk("a", beside=2)
    assert out == "policy 2: 2.0 of 1\n"


def test_systems_and_new_conversations(talk):
    found, _, _ = talk("a", "/system Be brief.", "b", "/new", "c", "/system", "d", "/new", "e")
    asked = [messages for _, _, messages in found.speakers.asked]
    assert asked == [
        [("user", "a")], [("system", "Be brief."), ("user", "b")], [("system", "Be brief."), ("user", "c")],
        [("user", "d")], [("user", "e")],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "/help",
        "/polcy 1",
        "/policy x",
        "/policy -1",
        "/policy \u00b2",
        f"/policy {'9' * 5000}",
        "/beside \u0663",
        "/new x",
        "/",
    ],
)
def test_what_is_no_command_lists_those_there_are(talk, line):
    found, out, err = talk(line)
    assert out == ""
    assert "/regen" in err
    assert found.speakers.asked == []


def test_a_line_that_is_no_text_is_told_and_the_next_one_heard(talk):
    found, out, err = talk("\udcff\udcfe", "/system \ud800", "hello")
    assert out == "2.0 of 1\n"
    assert err.count("no UTF-8") == 2
    assert found.speakers.asked == [(2, 0, [("user", "hello")])]


def test_errors_and_interrupts_leave_the_conversation_as_it_was(talk):
    answers = {"long": DnoError("the message has 99 tokens"), "slow": KeyboardInterrupt()}
    found, out, err = talk("hello", "long", "slow", "more", **answers)
    assert [message.content for message in found.messages] == ["hello", "2.0 of 1", "more", "2.0 of 3"]
    assert "the message has 99 tokens" in err
    assert " [stopped]" in out


@pytest.mark.parametrize("line", ["/quit", KeyboardInterrupt()])
def test_it_ends_where_it_is_told_to(talk, line):
    assert talk("a", line, "b")[1] == "2.0 of 1\n"


def test_answers_are_streamed_plain_and_whole(talk):
    said = {
        "evil": "\x1b[2Jgone\r\nnext\u202e",
        "half": Said("caf\u00e9 \ufffd", "length"),
        "old": Said("yes", "stop", num_forgotten=4),
    }
    _, out, err = talk("evil", "half", "old", **said)
    assert out == "\\x1b[2Jgone\nnext\\u202e\ncaf\u00e9 \ufffd [cut at sampling.max_new_tokens]\nyes\n"
    assert "the oldest 4 messages no longer fit" in err


def test_pieces_come_as_they_are_drawn(talk, monkeypatch):
    written = []
    monkeypatch.setattr("typer.echo", lambda text="", **options: written.append(text))
    talk("hello")
    assert [piece for piece in written if piece] == ["2", ".0 ", "of ", "1"]
    assert sys.stdout  # flushed after each
