"""Labelled pairs: read, drawn, and put to judges."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from dno_jax.annotation.build import build_annotator
from dno_jax.annotation.quality.calibration import read_calibration
from dno_jax.annotation.quality.figures import Quality
from dno_jax.annotation.quality.warnings import warnings
from dno_jax.config import AnnotationSection, QualitySection
from dno_jax.errors import DnoError
from dno_jax.records import Judgement

ROW = {"prompt": "Why?", "first": "Because.", "second": "No.", "preference": 1}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_become_pools_of_two(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello\u2028there"}]
    raw = json.dumps({**ROW, "prompt": chat, "preference": 0.25}, ensure_ascii=False)
    (first, label), (second, soft) = read_calibration(write(tmp_path / "c", ROW, "", raw), limit=9, seed=0)
    assert first.candidate_ids == ("calibration/1/first", "calibration/1/second")
    assert [candidate.text for candidate in first.candidates] == ["Because.", "No."]
    assert [(message.role, message.content) for message in first.prompt.messages] == [("user", "Why?")]
    assert (first.prompt.prompt_id, label) == ("calibration/1", 1.0)
    assert (second.prompt.prompt_id, soft) == ("calibration/3", 0.25)  # its line in the file
    assert second.prompt.messages[1].content == "Hello\u2028there"


def test_a_draw_is_the_seeds(tmp_path):
    path = write(tmp_path / "c", *({**ROW, "first": str(i)} for i in range(50)))
    drawn = read_calibration(path, limit=10, seed=3)
    assert drawn == read_calibration(path, limit=10, seed=3)
    lines = [int(pool.prompt.prompt_id.split("/")[1]) for pool, _ in drawn]
    assert len(set(lines)) == 10
    assert lines == sorted(lines)
    assert [pool.candidates[0].text for pool, _ in drawn] == [str(line - 1) for line in lines]
    assert drawn != read_calibration(path, limit=10, seed=4)
    assert len(read_calibration(path, limit=50, seed=3)) == 50
    assert drawn == [row for row in read_calibration(path, limit=20, seed=3) if row in drawn]  # more add to fewer


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ({**ROW, "preference": 1.5}, "preference: .*less than or equal to 1"),
        ({**ROW, "preference": -0.1}, "preference: .*greater than or equal to 0"),
        ({**ROW, "preference": "first"}, "preference: .*valid number"),
        ({**ROW, "preference": True}, "preference: .*valid number"),
        ({**ROW, "preference": float("nan")}, "preference"),
        ({"prompt": "Why?", "first": "a", "second": "b"}, "preference: Field required"),
        ({**ROW, "label": 1}, "label: Extra inputs"),
        ({**ROW, "first": None}, "first: "),
        ({**ROW, "prompt": " "}, "the last message is empty"),
        ({**ROW, "prompt": []}, "messages: "),
        ({**ROW, "prompt": 3}, "prompt"),
        ({**ROW, "prompt": [{"role": "assistant", "content": "Yes."}]}, "the last message is the assistant's"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, what):
    path = write(tmp_path / "labels.jsonl", ROW, row)
    with pytest.raises(DnoError, match=what) as error:
        read_calibration(path, limit=1, seed=0)  # whether it is drawn or not
    assert str(error.value).startswith(f"{path}:2: not a valid labelled pair: ")
    assert "expected prompt (a text or messages)" in str(error.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(DnoError, match=r"annotation\.quality\.calibration: .*none.* cannot be read"):
        read_calibration(tmp_path / "none", limit=1, seed=0)
    with pytest.raises(DnoError, match="cannot be read"):
        read_calibration(tmp_path, limit=1, seed=0)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(DnoError, match="cannot be read"):
        read_calibration(tmp_path / "bytes", limit=1, seed=0)
    with pytest.raises(DnoError, match="holds no labelled pairs"):
        read_calibration(write(tmp_path / "c", "", "  "), limit=1, seed=0)


@pytest.fixture(scope="session")
def labelled_pairs(shared_data, tmp_path_factory):
    """2,138 real pairs that people or GPT-4 labelled, in the form of a calibration file."""

    def preference(row):
        if "scores" in row:
            first, second = row["scores"]
            return 0.5 * (1 + (first > second) - (first < second))
        labels = row["label"] if isinstance(row["label"], list) else [row["label"]]
        return sum({1: 1.0, 2: 0.0, 0: 0.5}[label] for label in labels) / len(labels)

    path = tmp_path_factory.mktemp("calibration") / "pairs.jsonl"
    with gzip.open(shared_data / "prompts" / "pairs_all.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    return write(
        path,
        *(
            {
                "prompt": row["prompt"],
                "first": str(row["response_1"]),  # six of them are the JSON value true
                "second": str(row["response_2"]),
                "preference": preference(row),
            }
            for row in rows
        ),
    )


def test_real_labels_agree_with_a_judge_that_knows_them_and_not_with_its_opposite(labelled_pairs):
    pairs = read_calibration(labelled_pairs, limit=10_000, seed=0)
    assert len(pairs) == 2138
    decided = sum(label != 0.5 for _, label in pairs)
    for right in (True, False):
        quality = Quality()
        for pool, label in pairs:
            p = label if right else 1.0 - label
            wins = ((0.5, p), (1.0 - p, 0.5))
            judged = Judgement(
                prompt_id=pool.prompt.prompt_id, candidate_ids=pool.candidate_ids, judge="j", state="ok", wins=wins
            )
            quality.add_label(judged, label)
        found = quality.figures()
        assert (found["calibration_agreement"]["value"], found["calibration_agreement"]["n"]) == (right, decided)
        assert found["calibration_error"]["n"] == 2138
        assert (found["calibration_error"]["value"] == 0.0) == right
        named = [sentence.split(" is ")[0] for sentence in warnings(found, QualitySection())]
        assert named == ([] if right else ["agreement with labelled pairs"])


def test_a_judge_of_surface_features_is_told_apart_from_people_on_real_pairs(labelled_pairs, tmp_path):
    """The embedded oracle, which reads no meaning, agrees with people more than a coin does, and far from well."""
    judge = build_annotator(AnnotationSection(), store_path=tmp_path / "store", seed=0)
    quality = Quality()

    async def ask():
        for pool, label in read_calibration(labelled_pairs, limit=1000, seed=0):
            quality.add_label(await judge.judge(pool), label)

    asyncio.run(ask())
    found = quality.figures()
    assert found["calibration_error"]["n"] == 1000
    assert 0.5 < found["calibration_agreement"]["low"] < found["calibration_agreement"]["high"] < 0.7
    assert warnings(found, QualitySection()) == []
    (sentence,) = warnings(found, QualitySection(min_calibration_agreement=0.7))
    assert sentence.startswith("agreement with labelled pairs is 0.")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"prompt": "' + "a" * (9 << 20), r"labels\.jsonl:1: a line of more than 8,388,608 bytes"),
        ('{"a":' * 100_000, r"labels\.jsonl:1: not a valid labelled pair: .*recursion limit"),
        ("", "holds no labelled pairs"),
    ],
    ids=["long", "deep", "empty"],
)
def test_a_file_far_beyond_any_labels_is_refused_at_once(tmp_path, text, what):
    (tmp_path / "labels.jsonl").write_text(text)
    with pytest.raises(DnoError, match=what):
        read_calibration(tmp_path / "labels.jsonl", limit=1, seed=0)
