"""Rows as people have them, each with what it means: as a prompt with gold and candidates, and as examples."""

import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dno_jax.data.prompts import load_prompts, read_prompts
from dno_jax.data.reading import Reading, examples_of, words_of
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError

Q, A, B = "Why is the sea salt?", "Rivers carry salt.", "It is not."
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", Q), ("assistant", A), ("assistant", B)))
SYSTEM = {"role": "system", "content": "Be brief."}


def written(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def examples(path, **options):
    reading = Reading(path)
    return [example for example, _ in examples_of(read_rows(path), reading, **options)], reading


def said(messages):
    return [(message.role, message.content) for message in messages]


ASKED = [("user", Q)]
BRIEF = [("system", "Be brief."), ("user", Q)]


@pytest.mark.parametrize(
    ("row", "asked", "gold", "candidates"),
    [
        pytest.param({"prompt": Q, "gold": A}, ASKED, A, [], id="own"),
        pytest.param({"prompt_id": 3, "messages": [SYSTEM, USER]}, BRIEF, None, [], id="integer-id"),
        pytest.param({"prompt": Q, "completion": A}, ASKED, A, [], id="trl-plain"),
        pytest.param({"prompt": [USER], "completion": [GOOD]}, ASKED, A, [], id="trl-conversational"),
        pytest.param({"messages": [SYSTEM, USER, GOOD]}, BRIEF, A, [], id="trl-messages"),
        pytest.param({"prompt": Q, "prompt_id": "x", "messages": [USER, GOOD]}, ASKED, A, [], id="no-robots"),
        pytest.param({"prompt": [SYSTEM, USER]}, BRIEF, None, [], id="trl-prompt-only"),
        pytest.param({"prompt": Q, "completion": A, "label": False}, ASKED, None, [], id="trl-unpaired-bad"),
        pytest.param({"prompt": Q, "chosen": A, "rejected": B}, ASKED, A, [(A, 1), (B, 0)], id="preference-plain"),
        pytest.param(
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "score_chosen": 8.5, "score_rejected": 2},
            ASKED, A, [(A, 8.5), (B, 2)], id="preference-conversational",
        ),
        pytest.param(
            {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            BRIEF, A, [(A, 1), (B, 0)], id="preference-implicit-prompt",
        ),
        pytest.param(
            {"prompt": Q, "prompt_id": "f" * 64, "chosen": [USER, GOOD], "rejected": [USER, BAD],
             "messages": [USER, GOOD], "score_chosen": 8.0, "score_rejected": 7.0},
            ASKED, A, [(A, 8), (B, 7)], id="ultrafeedback-binarized",
        ),
        pytest.param(
            {"chosen": f"\n\nHuman: One?\n\nAssistant: 1\n\nHuman: {Q}\n\nAssistant: {A}",
             "rejected": f"\n\nHuman: One?\n\nAssistant: 1\n\nHuman: {Q}\n\nAssistant: {B}"},
            [("user", "One?"), ("assistant", "1"), *ASKED], A, [(A, 1), (B, 0)], id="hh-rlhf",
        ),
        pytest.param(
            {"instruction": Q, "chosen_response": A, "rejected_response": B, "chosen_avg_rating": 5.0,
             "rejected_avg_rating": 3.75},
            ASKED, A, [(A, 5), (B, 3.75)], id="argilla",
        ),
        pytest.param(
            {"source": "evol", "instruction": Q, "models": ["m", "n"], "correct_answers": ["None"], "completions": [
                {"model": "m", "response": B, "overall_score": 2.0, "critique": "c"},
                {"model": "n", "response": A, "overall_score": "8.5"},
                {"model": "o", "response": "?", "overall_score": "N/A"}]},
            ASKED, A, [(B, 2), (A, 8.5), ("?", None)], id="ultrafeedback",
        ),
        pytest.param(
            {"id": "i", "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": Q},
                                          {"from": "gpt", "value": A}]},
            BRIEF, A, [], id="sharegpt",
        ),
        pytest.param(
            {"conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": Q}]},
            ASKED, None, [], id="sharegpt-that-begins-with-the-model",
        ),
        pytest.param({"instruction": "Translate.", "input": "mer", "output": A}, [("user", "Translate.\n\nmer")], A,
                     [], id="alpaca"),
        pytest.param({"instruction": Q, "input": "", "output": A, "system": "Be brief."}, BRIEF, A, [], id="alpaca-2"),
        pytest.param({"instruction": Q, "context": "", "response": A, "category": "qa"}, ASKED, A, [], id="dolly"),
        pytest.param(
            {"instruction": "And now?", "output": A, "history": [["One?", "1"]]},
            [("user", "One?"), ("assistant", "1"), ("user", "And now?")], A, [], id="alpaca-history",
        ),
        pytest.param({"question_id": 81, "category": "w", "turns": [Q, "Again."]}, ASKED, None, [], id="mt-bench"),
        pytest.param({"question_id": "a", "cluster": "c", "turns": [{"content": Q}]}, ASKED, None, [], id="arena"),
        pytest.param(
            {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "name": "bob", "content": [
                {"type": "text", "text": "Why is "}, {"type": "text", "text": "the sea salt?"}]}]},
            BRIEF, None, [], id="content-parts",
        ),
        pytest.param({"messages": [{"role": "system", "content": None}, USER]}, ASKED, None, [], id="null-system"),
        pytest.param({"prompt": Q, "gold": [GOOD], "candidates": [A, {"text": B, "model": "m", "score": "3"}]},
                     ASKED, A, [(A, None), (B, 3)], id="gold-as-messages"),
    ],
)  # fmt: skip
def test_a_row_of_a_known_form_is_a_prompt(tmp_path, row, asked, gold, candidates):
    (prompt,) = load_prompts(written(tmp_path, row))
    assert (said(prompt.messages), prompt.gold) == (asked, gold)
    assert [(item.text, item.score) for item in prompt.candidates] == candidates
    if "prompt_id" in row:
        assert prompt.prompt_id == str(row["prompt_id"])
    if gold is not None:
        ((example,), _) = examples(written(tmp_path, row))
        assert (said(example.messages), example.response) == (asked, gold)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": f"{Q}\n{A}"}, "columns 'text': text alone does not say where the answer begins"),
        ({"question": Q}, "columns 'question': of no form that is read; expected prompt or messages"),
        ({}, "columns none: of no form"),
        ({"messages": [USER, {"role": "tool", "content": "42"}]}, r"messages\[1\]: role 'tool'; expected system, user"),
        ({"messages": [USER, GOOD | {"tool_calls": [{}]}]}, r"messages\[1\]: calls a tool"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: expected a text, got null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "type image_url"),
        ({"messages": [USER] * 5000}, "messages: 5,000 messages; expected a chat of at most 4,000"),
        ({"messages": "hello"}, "messages: expected a list of messages, got 'hello'"),
        ({"prompt": Q, "messages": [{"role": "user", "content": "Other."}]}, "prompt and messages differ"),
        ({"prompt": "Other.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt and chosen differ"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "chosen and rejected answer different chats"),
        ({"chosen": A, "rejected": B}, "chosen without a prompt"),
        ({"prompt": Q, "chosen": [GOOD, USER], "rejected": B}, "chosen: ends with the user's turn"),
        ({"prompt": Q, "chosen": A, "rejected": B, "score_chosen": float("nan"), "score_rejected": 1}, "got nan"),
        ({"prompt": Q, "candidates": [{"text": A, "score": float("nan")}]}, "finite number"),
        ({"prompt": Q, "candidates": [{"text": A, "score": "N/A"}]}, "valid number"),
        ({"instruction": Q, "completions": [{"model": "m"}]}, r"completions\[0\]: expected an object with the text"),
        ({"prompt": " "}, "the last message is empty"),
        ({"messages": [GOOD], "gold": A}, "goes into assistant_prefix"),
    ],
)
def test_a_row_that_means_nothing_is_named_in_few_words(tmp_path, row, why):
    with pytest.raises(DnoError, match=rf"rows\.jsonl:2: not a valid prompt: .*{why}") as caught:
        load_prompts(written(tmp_path, {"prompt": "first"}, row))
    assert len(str(caught.value)) < 700


def test_what_was_understood_is_one_line_with_foreign_columns_once(tmp_path):
    row = {"source": "evol", "instruction": Q, "models": ["m"], "completions": [{"response": A, "overall_score": 1}]}
    rows = [row, row | {"instruction": "Other?"}, row | {"instruction": "", "x\x1b[31m": 1}]
    prompts, line = read_prompts(written(tmp_path, *rows))
    assert [prompt.source for prompt in prompts] == ["evol", "evol"]
    assert line.endswith(
        "rows.jsonl: 2 prompts (2 with gold) from 3 rows (UltraFeedback); left out: 1 x no question; "
        r"ignored: models, 'x\x1b[31m'"
    )
    assert not read_prompts(written(tmp_path, *rows), candidates=False)[0][0].candidates  # nobody would read them


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Tell a story.", "tell  a\nSTORY", True),
        ("Is it «so»?", "is it so", True),
        ("What is 3+4?", "What is 3-4?", False),
        ("x > .5", "x > 5", False),
        ("C#", "C", False),
        ("a b", "ab", False),
    ],
)
def test_words_are_equal_but_for_case_blanks_and_marks_around_them(tmp_path, one, other, same):
    prompts = load_prompts(written(tmp_path, {"prompt": one, "prompt_id": "a"}, {"prompt": other, "prompt_id": "b"}))
    first, second = prompts  # rows with ids of their own are kept: somebody may ask one question often
    assert (words_of(first) == words_of(second)) is same
    assert len(load_prompts(written(tmp_path, {"prompt": one}, {"prompt": other}))) == 2 - same


def test_repetitions_are_left_out_and_counted_and_ids_are_unique(tmp_path):
    rows = [{"prompt": Q}, {"prompt": "Other."}, {"prompt": Q.upper()}, {"prompt": Q, "prompt_id": "own"}]
    prompts, line = read_prompts(written(tmp_path, *rows))
    assert [prompt.messages[0].content for prompt in prompts] == [Q, "Other.", Q]
    assert "left out: 1 x repeats another's words; 1 repeat another's words" in line
    pair = {"prompt": Q, "prompt_id": "f", "chosen": A, "rejected": B}
    assert len(load_prompts(written(tmp_path, pair, pair))) == 1
    with pytest.raises(DnoError, match=r"rows\.jsonl:2: prompt_id 'p' comes 2 times"):
        load_prompts(written(tmp_path, {"prompt": Q, "prompt_id": "p"}, {"prompt": Q, "prompt_id": "p"}))


def test_every_turn_of_the_assistant_can_be_an_example(tmp_path):
    turns = [USER, GOOD, {"role": "user", "content": "And lakes?"}, BAD, {"role": "user", "content": "Thanks"}]
    path = written(tmp_path, {"messages": turns}, {"messages": [USER, GOOD | {"weight": 0}, USER, BAD]})
    found, _ = examples(path)
    assert [(len(example.messages), example.response) for example in found] == [(3, B), (3, B)]
    found, _ = examples(path, turns="all")
    assert [(len(example.messages), example.response) for example in found] == [(1, A), (3, B), (3, B)]
    assert said(found[1].messages) == [*ASKED, ("assistant", A), ("user", "And lakes?")]


def test_rows_without_an_answer_are_left_out_of_published_forms_and_an_error_in_ones_own(tmp_path):
    rows = [
        {"instruction": Q, "output": ""},
        {"instruction": Q, "output": A},
        {"conversations": []},
        {"prompt": Q, "completion": B, "label": False},
    ]
    found, reading = examples(written(tmp_path, *rows))
    assert [example.response for example in found] == [A]
    assert reading.left_out == {"no answer": 1, "undesired completion": 1} | {"no answer": 2}
    for row in ({"prompt": Q}, {"prompt": Q, "response": ""}):
        with pytest.raises(DnoError, match=r"rows\.jsonl:1: not a valid example: "):
            examples(written(tmp_path, row))


LINES = b'{"prompt": "a\xe2\x80\xa8b"}\n{"prompt": "c"}\n'


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(b"\xef\xbb\xbf" + LINES, id="BOM"),
        pytest.param(LINES.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(LINES.replace(b"\n", b"\r"), id="CR"),
        pytest.param(LINES.decode().encode("utf-16"), id="UTF-16"),
        pytest.param(LINES.decode().encode("utf-16-be"), id="UTF-16-BE"),
        pytest.param(LINES.decode().encode("utf-32"), id="UTF-32"),
        pytest.param(gzip.compress(LINES), id="gzip"),
        pytest.param(gzip.compress(LINES[:17]) + gzip.compress(LINES[17:]), id="two-gzips"),
        pytest.param(pa.compress(LINES, "zstd", asbytes=True), id="zstd"),
        pytest.param(b"\n\n  \n" + LINES + b"\n\n", id="blank-lines"),
        pytest.param(LINES.replace(b"}", b"},"), id="commas"),
        pytest.param(b"[" + LINES.strip().replace(b"\n", b",") + b"]", id="array"),
        pytest.param(json.dumps([{"prompt": "a\u2028b"}, {"prompt": "c"}], indent=2).encode(), id="pretty-array"),
        pytest.param(b'{\n "prompt": "a\xe2\x80\xa8b"\n}\n{\n "prompt": "c"\n}', id="pretty-objects"),
    ],
)
def test_files_of_every_make_give_the_same_rows(tmp_path, contents):
    path = tmp_path / "rows"
    path.write_bytes(contents)
    assert [prompt.messages[0].content for prompt in load_prompts(str(path))] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        pytest.param(b"", "holds no prompts", id="empty"),
        pytest.param(b"[]", "holds no prompts", id="empty-array"),
        pytest.param(b'{"prompt": "a"}\n{"prompt": "Tell a', ":2: .*the file may be cut short", id="cut"),
        pytest.param(b'[{"prompt": "a"},\n{"prompt": "b"}', "is not closed: it is cut short", id="cut-array"),
        pytest.param(b'[{"prompt": "a"}]\n{}', r":2: text after the array's end", id="after-array"),
        pytest.param(b'{"prompt": "a"\n{"prompt": "b"}\n', r":2: .*item 1, which begins in line 1", id="open"),
        pytest.param(b'[1, {"prompt": "a"}]', r":1 \(item 1\): expected a JSON object, got int", id="number"),
        pytest.param(b"null", ":1: expected a JSON object, got NoneType", id="null"),
        pytest.param(b"prompt,gold\na,b\n", ":1: .*expected UTF-8 JSON lines, a JSON array or", id="csv"),
        pytest.param(b'{"prompt": "Erz\xe4hle"}', r"\(line 1, character 16: can't decode byte 0xe4\)", id="latin-1"),
        pytest.param(b'{"prompt": "a"}\n\x00\x00\x00', ":2: not valid JSON", id="NUL"),
        pytest.param(gzip.compress(LINES * 99)[:-9], r"cannot be read \(", id="cut-gzip"),
        pytest.param(b"PAR1\x15\x04\x15 PAR1", r"cannot be read \(.*Parquet", id="parquet"),
        pytest.param(b"PK\x03\x04", "a zip archive", id="zip"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", id="lfs"),
        pytest.param(b"<!DOCTYPE html>", "a web page", id="html"),
        pytest.param(b"[" * 200_000, "not valid JSON: maximum recursion depth", id="deep-array"),
        pytest.param(b'{"a":' * 200_000, "not valid JSON: maximum recursion depth", id="deep-object"),
        pytest.param(b'{"prompt": "' + b"a" * (9 << 20) + b'"}', ":1: a row of more than 8,388,608 char", id="long"),
        pytest.param(b'[{"prompt": "' + b"a" * (9 << 20) + b'"}]', r":1 .*a row of more than", id="long-item"),
        pytest.param(gzip.compress(b" " * (9 << 20)), "a row of more than 8,388,608 characters", id="blank-line"),
        pytest.param(b"\n" * 70_000, "blank characters and no row", id="blank-lines"),
    ],
)  # fmt: skip
def test_files_that_are_no_rows_are_refused_in_few_words(tmp_path, contents, why):
    path = tmp_path / "rows"
    path.write_bytes(contents)
    with pytest.raises(DnoError, match=rf"(?s)rows.*{why}") as caught:
        load_prompts(str(path))
    assert len(str(caught.value).splitlines()) <= 3
    assert len(str(caught.value)) < 700


def test_parquet_is_read_in_batches_and_only_what_is_understood(tmp_path):
    def row(number):
        asked = USER | {"content": f"q{number}"}
        return {"prompt_id": number, "chosen": [asked, GOOD], "rejected": [asked, BAD], "embedding": [0.5] * 4}

    rows = [row(number) for number in range(70)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=30)
    prompts, line = read_prompts(str(tmp_path / "rows.parquet"))
    assert [prompt.prompt_id for prompt in prompts] == [str(i) for i in range(70)]
    assert (said(prompts[7].messages), prompts[7].gold) == ([("user", "q7")], A)
    assert line.endswith("70 prompts (70 with gold) from 70 rows (chosen and rejected); ignored: embedding")
    pq.write_table(pa.table({"prompt": ["a" * (40 << 20)]}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 1 << 20
    with pytest.raises(DnoError, match=r"bomb\.parquet, row 1 or later: a row of more than 8,388,608"):
        load_prompts(str(tmp_path / "bomb.parquet"))


def test_several_files_and_patterns_are_read_in_order(tmp_path):
    for name in ("b", "a", "c"):
        written(tmp_path, {"prompt": name}, name=f"part-{name}.jsonl")
    assert [p.messages[0].content for p in load_prompts(str(tmp_path / "part-*.jsonl"))] == ["a", "b", "c"]
    both = [str(tmp_path / "part-c.jsonl"), str(tmp_path / "part-[ab].jsonl")]
    assert [p.messages[0].content for p in load_prompts(both)] == ["c", "a", "b"]
    written(tmp_path, {"prompt": "literal"}, name="part-[ab].jsonl")  # a file of that very name
    assert [p.messages[0].content for p in load_prompts(both)] == ["c", "literal"]
    with pytest.raises(DnoError, match=r"none-\*: no file fits this pattern"):
        load_prompts(str(tmp_path / "none-*"))


class _Dataset(list):
    column_names = ["prompt", "completion", "extra"]

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self]


def test_a_dataset_of_the_hub_is_read_by_its_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(DnoError, match=r"owner/name: no such file; .* pip install 'dno_jax\[data\]'"):
        load_prompts("owner/name")
    asked = []

    def load_dataset(name, subset, *, revision, split):
        asked.append((name, subset, revision, split))
        rows = _Dataset([{"prompt": Q, "completion": A, "extra": 1}])
        if name == "owner/gone":
            raise RuntimeError("401 Client Error.\n\nRepository not found")
        return rows if split else {"train": rows} if name == "owner/one" else {"test": rows, "train": rows}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    prompts, line = read_prompts("owner/name@v1:plain:train")
    assert (said(prompts[0].messages), prompts[0].gold) == (ASKED, A)
    assert (
        line == "owner/name@v1:plain:train: 1 prompts (1 with gold) from 1 rows (prompt and completion); ignored: extra"
    )
    assert load_prompts("owner/one")[0].gold == A
    assert asked == [("owner/name", "plain", "v1", "train"), ("owner/one", None, None, None)]
    with pytest.raises(DnoError, match=r"has the splits test, train; name one, such as owner/two:test"):
        load_prompts("owner/two")
    with pytest.raises(DnoError, match=r"owner/gone: the dataset cannot be loaded: RuntimeError: 401 Client Error\."):
        load_prompts("owner/gone")
    (tmp_path / "owner").mkdir()
    written(tmp_path / "owner", {"prompt": "a file"}, name="name")
    assert load_prompts("owner/name")[0].messages[0].content == "a file"
