"""`dno prompts check`: what a file is taken for."""

import json
import sys

import pytest

from dno_jax.cli import main as cli


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    def run(rows, *options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        monkeypatch.setattr(sys, "argv", ["dno", "prompts", "check", str(path), *map(str, options)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out + captured.err

    return run


def test_form_counts_lengths_and_what_is_left_out_are_shown(check):
    preference = {"prompt": "Why is the sea salt?", "chosen": "Rivers.", "rejected": "No.", "origin": "here"}
    rows = [
        preference,
        preference | {"prompt": "Two words?"},
        preference,
        {"instruction": "Say no.", "output": "I can't help with that."},
    ]
    code, said = check(rows)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert code == 0, said
    assert lines[:6] == [
        "rows 4: 3 x chosen and rejected, 1 x Alpaca",
        "ignored origin",
        "prompts 3, 3 with gold; 4 candidates, 4 with points",
        "examples 4 for dno sft",
        "left out 1 x repeats another's words",
        "dropped 1 x gold: refuses in words",
    ]
    assert lines[6:] == [
        "prompt words 2 to 5, median 2, 95 % up to 5",
        "answer words 1 to 5, median 1, 95 % up to 5",
        "user 'Why is the sea salt?'",
        "gold 'Rivers.'",
    ]


def test_every_bad_row_is_named_and_control_characters_stay_off_the_terminal(check):
    rows = [{"prompt": "\x1b]0;title\x07 \u202eodd"}, {"x": 1}, {"prompt": [{"role": "tool"}]}, {"prompt": "fine"}]
    code, said = check(rows)
    assert code == 2
    assert said.count("WRONG") == 2
    assert "rows.jsonl:2: not a valid prompt: columns 'x'" in " ".join(said.split())
    assert not [character for character in said if not character.isprintable() and character != "\n"]
    code, said = check([{"prompt": "a"}, '{"prompt": "cut'])
    assert (code, "prompts         1" in said, "rows.jsonl:2: not valid JSON" in " ".join(said.split())) == (
        2,
        True,
        True,
    )
    assert check([])[0] == 2


def test_leaks_are_listed(check, tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "is it so"}\n{"prompt": "other"}\n')
    code, said = check([{"prompt": "Is it so?"}], "--held-out", tmp_path / "held_out.jsonl")
    assert (code, said.count("LEAK")) == (2, 1)


def test_with_a_recipe_tokens_are_counted_and_control_tokens_found(check, tmp_path, small_folder):
    import yaml

    from tests.small import small_tree

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_tree(small_folder)))
    rows = [{"prompt": "bam"}, {"prompt": "bam " * 20}, {"prompt": "bam </s>"}]
    code, said = check(rows, "--config", tmp_path / "config.yaml")
    assert code == 0, said
    assert "prompt tokens   2 to 21" in said
    assert "1 x prompt: above 16 tokens" in said
    assert "1 x prompt: spells a control token" in said


def test_the_version_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dno", "--version"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("dno_jax 0.")
