"""What others wrote never acts on a terminal, and a key in the place of its variable's name is never shown."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dno_jax.config import RunConfig, load_config
from dno_jax.console import Meter, PlainConsole
from dno_jax.display import hide_keys, is_variable_name, printable
from dno_jax.endpoint import Endpoint
from dno_jax.errors import DnoError

# ANSI, OSC (title, link, clipboard), CR, C1, bidi, line separators, invisible tags, halves of pairs, backspaces.
HOSTILE = [
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]8;;http://x\x1b\\here\x1b]8;;\x1b\\",
    "\x1b]52;c;cm0gLXJm\x07",
    "done\rdno: all is well",
    "\x9b31mred",
    "\u202etxt.exe\u202c",
    "\u2066isolate\u2069",
    "a\u2028b\x85c\x0bd\x0ce",
    "\U000e0041\U000e007f",
    "\ud800",
    "rm\x08\x08ls\x7f",
    "\x00",
]
each_hostile = pytest.mark.parametrize("text", HOSTILE)
ACTING = {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x202E, 0x2066, 0xE0041, 0xD800)}


@each_hostile
def test_control_sequences_are_spelt_out(text):
    shown = printable(f"a\tb\n{text}")
    assert not ACTING.intersection(shown)
    assert shown.startswith("a\tb\n")
    assert printable(shown) == shown
    assert sum(char in ACTING for char in text) <= shown.count("\\")


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂👩‍🚀", "می‌خواهم", "a\tb\n", "\\x1b[0m", "café"])
def test_words_stay_as_they_are(text):
    assert printable(text) == text


@each_hostile
@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_reaches_a_terminal_through_the_console(text, terminal):
    def shown(content):
        out = io.StringIO()
        console = PlainConsole(file=out, force_terminal=terminal, color_system=None, width=60)
        table = Table(title=content)
        table.add_column(content)
        table.add_row(content)
        for item in (content, Text(content), table, f"[bold]{content}[/bold] :smile:"):
            console.print(item)
        return out.getvalue()

    said = shown(text)
    assert not ACTING.intersection(said)
    assert "[bold]" in said
    assert ":smile:" in said  # others' words are no markup


@pytest.mark.parametrize("width", [60, 140])
def test_no_word_beside_what_is_spelt_out_is_lost(width):
    """It is wider than what it stands for: a line that was laid out before would be cut."""
    words = [f"word{i}" for i in range(60)]
    text = " ".join(f"{word}\x1b\u202e" for word in words)
    styled = Text("begin ", style="bold").append(text, style="red").append("\x9bend")
    table = Table("", "")
    table.add_row("a", text)
    table.add_row(styled, "b")
    for item in (text, Text(text), styled, table, Group(Text("a"), Text(text))):
        out = io.StringIO()
        PlainConsole(file=out, force_terminal=True, color_system="truecolor", width=width).print(item)
        said = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
        lines = [line.rstrip() for line in said.splitlines()]
        assert max(map(len, lines)) <= width
        found = said.replace("\n", "").replace(" ", "")
        assert item is table or all(f"{word}\\x1b\\u202e" in found for word in words)
        assert not ACTING.intersection(said)


def test_styles_stay_on_their_words():
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, color_system="standard", width=80)
    console.print(Text("\x1b\x1b").append("red", style="red").append(" plain"))
    assert out.getvalue() == "\\x1b\\x1b\x1b[31mred\x1b[0m plain\n"


def test_a_live_bar_shows_no_raw_text(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("dno_jax.console.console", PlainConsole(file=out, force_terminal=True, width=100))
    with Meter("\x1b]0;evil\x07[red]sample", total=2, unit="prompts") as meter:
        meter.advance(1, note="\u202enote")
    assert "\x1b]0" not in out.getvalue()
    assert "\u202e" not in out.getvalue()
    assert "[red]sample" in out.getvalue()


@each_hostile
def test_an_endpoints_words_are_one_plain_line(text):
    endpoint = Endpoint(who="the judge", place="p", url="http://a/v1", api_key_env=None, timeout=1.0)
    trouble = endpoint.trouble(500, {"error": {"message": f"oh {text} no", "param": text}}, headers={})
    for said in (endpoint.words(text), trouble.detail, trouble.parameter):
        assert not {"\n", "\t", *ACTING}.intersection(said or "")


def test_errors_logs_and_arguments_of_a_process_are_plain():
    """Logs and warnings of libraries, wrong options, file names and defects: all that a process writes, end to end."""
    evil = "\x1b]0;evil\x07\u202e"
    code = f"""
import logging, warnings
from dno_jax.cli import process
from dno_jax.cli.main import app
from dno_jax.errors import DnoError
evil = {evil!r}
def wrong(standalone_mode):
    logging.getLogger("library").warning("it says %s", evil)
    warnings.warn("careful " + evil)
    raise DnoError(evil)
def interrupted(standalone_mode):
    raise KeyboardInterrupt
def broken(standalone_mode):
    raise OSError(2, "none", evil)
print(process.run(wrong), process.run(interrupted))
print(process.run(lambda standalone_mode: app(["--" + evil], standalone_mode=False)))
print(process.run(lambda standalone_mode: app(["status", evil], standalone_mode=False)))
process.run(broken)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    said = done.stderr.decode()
    assert not ACTING.intersection(said)
    assert said.count("]0;evil") == 6, said
    assert "Traceback" in said
    assert done.stdout.split() == [b"2", b"130", b"2", b"2"]
    assert done.returncode == 1


KEYS = [
    "sk-proj-abcdefghij",
    "sk-ant-api03-abc",
    "gsk_abcdefghijklmnopqrstuvwx",
    "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "xai-1234567890abcdef",
    "nvapi-abcdefghijk",
    "AIzaSyA1234567890abcdefghijk",
    "AKIAIOSFODNN7EXAMPLE",
    "0123456789abcdef0123456789abcdef",
    "aB3dE5gH7jK9mN1pQ3sT5vW7yZ",
    "github_pat_11ABCDEFG0123456789_abcdefghij",
    "550e8400-e29b-41d4-a716-446655440000",
    "eyJhbGciOi.eyJzdWIiOi.c2ln",
    "Bearer abcdefgh",
    "my key",
    "",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_place_of_its_variables_name_is_neither_shown_nor_written(key, tmp_path):
    places = {
        "openai": {"api_key_env": key},
        "teacher": {"api_key_env": key},
        "openai ": {"more_endpoints": [{"base_url": "http://a/v1", "api_key_env": key}]},
        "openai  ": {"more_endpoints": {"base_url": "http://a/v1", "api_key_env": key}},
        "teacher ": {"api_key_env": [key]},
    }
    for section, fields in places.items():
        tree = {"run_dir": str(tmp_path / "run"), "model": {"path": "m"}, "prompts": {"path": "p"}}
        tree["annotation"] = {section.strip(): fields}
        with pytest.raises(DnoError) as error:
            load_config(RunConfig, _written(tmp_path, tree))
        assert not key or key not in str(error.value)
        assert "api_key_env" in str(error.value) or "more_endpoints" in str(error.value)
    assert not (tmp_path / "run").exists()
    assert not is_variable_name(key)


@pytest.mark.parametrize("override", ["annotation.openai.api_key_env={0}: x", "{0}", "a.b={0}: [", "annotation.k={0}"])
def test_overrides_with_a_key_are_not_echoed(override, tmp_path):
    key = "sk-proj-abcdefghij"
    tree = {"run_dir": str(tmp_path / "run"), "model": {"path": "m"}, "prompts": {"path": "p"}}
    with pytest.raises(DnoError) as error:
        load_config(RunConfig, _written(tmp_path, tree), [override.format(key)])
    assert key not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["OPENAI_API_KEY", "my_key", "JUDGE_KEY_2", "_x", "AZUREOPENAIAPIKEYPRODUCTION", "skeleton_key_variable",
     "hf_token", "DNO_TEST_KEY_OF_2024", "MyOpenAIKeyForProduction", "SK_LIVE_ACCOUNT_OF_THE_JUDGES"],
)  # fmt: skip
def test_names_of_variables_are_taken(name):
    assert is_variable_name(name)
    assert hide_keys(f"the variable {name} is not set") == f"the variable {name} is not set"


def _written(folder, tree):
    import yaml

    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_numbers_are_never_cut_in_tables():
    """Eight wide numbers beside long names, on 40 columns: the names fold, the numbers stay whole, on one line each."""
    numbers = [f"{10**12 + step:,}" for step in range(8)]
    table = Table(title="what was served")
    table.add_column("name", overflow="fold")
    for step in range(8):
        table.add_column(f"figure {step}", justify="right", no_wrap=True)
    table.add_row("a judge with a long name " * 5, *numbers)
    out = io.StringIO()
    console = PlainConsole(file=out, width=40)
    for item in (table, Group(Text("before"), table)):
        out.truncate(out.seek(0))
        console.print(item)
        assert all(number in out.getvalue() for number in numbers)
        assert "\u2026" not in out.getvalue()
        assert "a judge with" in out.getvalue()
    assert console.width == 40
    narrow = Table("name", "text")
    narrow.add_row("words " * 20, "more words " * 20)
    out.truncate(out.seek(0))
    console.print(narrow)
    assert max(map(len, out.getvalue().splitlines())) <= 40


def test_columns_of_numbers_do_not_wrap():
    """`PlainConsole` folds what may wrap: no table of ours lets a column of numbers."""
    package = Path(__file__).parents[1] / "dno_jax"
    for path in package.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_column":
                options = {keyword.arg for keyword in call.keywords}
                assert "justify" not in options or "no_wrap" in options, f"{path}:{call.lineno}"


def test_whatever_is_written_to_a_terminal_is_made_fit_for_it():
    """All goes through the console, which sees to it, or through `printable`; JSON for another process is ASCII."""
    for path in (Path(__file__).parents[1] / "dno_jax").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            assert name not in ("Console", "rich.print") or path.name == "console.py", f"{path}:{call.lineno}: {name}"
            if name in ("print", "typer.echo", "click.echo", "sys.stdout.write", "sys.stderr.write"):
                said = ast.unparse(call.args[0]) if call.args else "printable()"
                assert said.startswith(("printable(", "json.dumps(")), f"{path}:{call.lineno}: {name}({said})"
