"""Gold responses from a teacher behind real HTTP: bought once, refused ones dropped and counted."""

import asyncio
import contextlib
import json
from collections import Counter

import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.data.prompts import split_prompts
from dno_jax.errors import DnoError
from dno_jax.fake_judge import FakeJudge
from dno_jax.records import TaughtResponse
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import stage_names
from dno_jax.stages import teach
from tests.annotation.scripted import Scripted, after_probe, completion, fault
from tests.running import run_stage
from tests.stages.judged import judged_tree, paid


def taught(folder, url, *, prompts=20, **teacher):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt_id": f"p{i:02d}", "prompt": f"Question {i}?"} for i in range(prompts)]
    rows[3]["gold"] = "The data's own."
    rows[4]["gold"] = ""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"model": "teacher", "base_url": url, "api_key_env": None, "timeout": 5.0, "max_outage": 5.0, **teacher}
    tree = judged_tree(folder, url, prompts={"held_out": 4}, annotation={"teacher": section})
    return parse_config(RunConfig, tree, place="test")


def gold_of(config):
    split, run_dir = split_prompts(config), RunDir(config.run_dir)
    training = map(teach.taught(config, run_dir, iteration=0).add, split.training[0])
    held_out = map(teach.taught(config, run_dir, iteration=None).add, split.held_out)
    return {prompt.prompt_id: prompt.gold for prompt in (*training, *held_out)}


def test_prompts_without_gold_get_it_once(tmp_path):
    with FakeJudge() as server:
        config = taught(tmp_path, server.url)
        assert stage_names(config, 0)[0] == "teach"
        with pytest.raises(DnoError, match="dno teach"):
            gold_of(config)
        manifest = run_stage(teach, config, 0)
        asked = server.counts.answered.total()
        assert asked == manifest.rows == 18
        assert run_stage(teach, config, 0) == manifest
        assert server.counts.answered.total() == asked
    found = gold_of(config)
    assert found.pop("p03") == "The data's own."
    assert found.pop("p04") == ""
    assert len(found) == 18
    assert all(text.strip() for text in found.values())
    assert len(set(found.values())) > 1
    assert paid(config)["models"]["teacher"]["requests"] == 18 + server.counts.forms["probe"]


def test_refused_empty_and_cut_responses_are_dropped_and_counted(tmp_path):
    with FakeJudge(fraction=0.5, faults=("refusal", "empty", "length")) as server:
        config = taught(tmp_path, server.url, prompts=40, max_tries=1)
        manifest = run_stage(teach, config, 0)
    rows = list(RunDir(config.run_dir).stage("teach", 0).read(TaughtResponse))
    assert manifest.dropped.keys() == {"gold response refused", "gold response unparsable"}
    lost = sum(manifest.dropped.values())
    assert 8 < lost < 30
    assert all((row.text != "") == (row.state == "ok") for row in rows)
    assert sum(not gold for gold in gold_of(config).values()) == lost + 1  # the data's own empty one


def test_failures_stop_the_stage_and_only_they_are_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)
    with FakeJudge(fraction=0.5, faults=("500",)) as server:
        config = taught(tmp_path, server.url, max_tries=1)
        with pytest.raises(DnoError, match=r"of 18 prompts have no response \(\d+ x failed: HTTP 500"):
            run_stage(teach, config, 0)
        runs = 1
        while RunDir(config.run_dir).stage("teach", 0).manifest() is None:
            runs += 1
            assert runs < 12
            with contextlib.suppress(DnoError):
                run_stage(teach, config, 0)
        assert server.duplicates == 0
    assert all(gold_of(config)[f"p{i:02d}"] for i in range(20) if i != 4)


def test_shards_of_other_prompts_are_written_anew(tmp_path, monkeypatch):
    """Prompts that come in front move all that follow into other shards."""
    monkeypatch.setattr(teach, "_SHARD_PROMPTS", 4)
    with FakeJudge(schedule=["ok"] * 11 + ["400"] * 100) as server:
        config = taught(tmp_path, server.url, max_tries=1)
        with pytest.raises(DnoError, match="have no response"):
            run_stage(teach, config, 0)
        closed = RunDir(config.run_dir).stage("teach", 0).shard_names()
        assert closed
        server.schedule = []
        rows = [json.dumps({"prompt_id": f"n{i}", "prompt": f"New {i}?"}) for i in range(3)]
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n".join(rows) + "\n" + prompts.read_text())
        assert run_stage(teach, config, 0).rows == 21
        assert server.duplicates == 0
    assert [name for name, text in gold_of(config).items() if not text] == ["p04"]


def test_a_tolerated_share_of_failures_goes_on_without_gold(tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)
    with FakeJudge(fraction=0.3, faults=("500",)) as server:
        config = taught(tmp_path, server.url, max_tries=1)
        annotation = config.annotation.model_copy(update={"max_failed": 0.9})
        manifest = run_stage(teach, config.model_copy(update={"annotation": annotation}), 0)
    lost = manifest.dropped["gold response failed"]
    assert 0 < lost < 18
    assert sum(gold is None for gold in gold_of(config).values()) == lost


def test_refusals_in_words_are_no_gold_and_are_asked_once_a_call(tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(
        "dno_jax.fake_judge.completion.teach", lambda *_, **__: "I'm sorry, but I can't help with that."
    )
    with FakeJudge(fraction=0.3, faults=("500", "refusal")) as server:
        config = taught(tmp_path, server.url, max_tries=1)
        annotation = config.annotation.model_copy(update={"max_failed": 0.9})
        manifest = run_stage(teach, config.model_copy(update={"annotation": annotation}), 0)
        assert server.counts.answered.total() <= 18  # a second pass asks nobody again
    assert manifest.dropped == {"gold response refused": 18}  # what failed was asked once more at the end
    assert not any(gold_of(config)[f"p{i:02d}"] for i in range(20) if i != 3)


def test_words_that_only_look_like_keys_stay_in_what_is_trained_on(tmp_path, monkeypatch):
    text = "Bearer authentication sends a token; sk-learning-rate is none."
    monkeypatch.setattr("dno_jax.fake_judge.completion.teach", lambda *_, **__: text)
    with FakeJudge() as server:
        config = taught(tmp_path, server.url)
        run_stage(teach, config, 0)
    assert set(gold_of(config).values()) == {text, "The data's own.", ""}


def test_a_teacher_is_told_the_prefix(tmp_path):
    prompt = split_prompts(taught(tmp_path, "http://127.0.0.1:1/v1")).training[0][0]
    begun = prompt.model_copy(update={"assistant_prefix": "Sure, "})
    own = {"role": "user", "content": prompt.messages[0].content}
    asked = "Begin your response with exactly these words, and go on from there:\nSure, "
    assert teach._messages(prompt, system="") == [own]
    assert teach._messages(prompt, system="Be kind.") == [{"role": "system", "content": "Be kind."}, own]
    assert teach._messages(begun, system="") == [{"role": "system", "content": asked}, own]
    assert teach._messages(begun, system="Be kind.") == [{"role": "system", "content": f"Be kind.\n\n{asked}"}, own]


def test_the_prefix_that_a_turn_began_with_is_no_part_of_the_gold(tmp_path):
    reader = teach._reader("Sure, ")
    assert reader(teach.Reply("Sure, it is blue.", finish="stop")) == ()
    for reply in (teach.Reply("It is blue.", finish="stop"), teach.Reply("Sure, ", finish="stop")):
        with pytest.raises(teach.Unparsable):
            reader(reply)


def test_an_interrupt_keeps_what_is_in_flight(tmp_path, monkeypatch):
    run = asyncio.run

    def interrupted(work):
        """What Ctrl-C does to a program: its first task is cancelled."""

        async def both():
            task = asyncio.ensure_future(work)
            while server.counts.answered.total() < 6:
                await asyncio.sleep(0.01)
            task.cancel()
            await task

        with contextlib.suppress(asyncio.CancelledError):
            run(both())
        raise KeyboardInterrupt

    with FakeJudge(delay=0.5) as server:
        config = taught(tmp_path, server.url, max_concurrency=8)
        monkeypatch.setattr(asyncio, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_stage(teach, config, 0)
        monkeypatch.undo()
        sent = server.counts.answered.total()
        assert 6 <= sent <= 8
        assert paid(config)["models"]["teacher"]["requests"] == sent + server.counts.forms["probe"]
        assert run_stage(teach, config, 0).rows == 18
        assert server.counts.answered.total() == 18


def end(text, finish="stop"):
    return completion(text, finish_reason=finish)


@pytest.mark.parametrize("finish", ["abort", "error", "MAX_TOKENS", "length", "tool_calls", "model_length"])
def test_what_does_not_end_by_itself_is_tried_again_then_dropped_and_counted(finish, tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)

    def script(asked):
        return end("The sky is", finish) if "Question 1?" in json.dumps(asked.body) else end("It is blue.")

    with Scripted(after_probe(script)) as server:
        config = taught(tmp_path, server.url, prompts=8, max_tries=3)
        manifest = run_stage(teach, config, 0)
        asked = [one.body["seed"] for one in server.chats if "Question 1?" in json.dumps(one.body)]
    assert manifest.dropped == {"gold response unparsable": 1}
    assert len(asked) == 3
    assert gold_of(config)["p01"] is None
    assert manifest.details["cut"] == (finish in ("MAX_TOKENS", "length", "model_length"))


@pytest.mark.parametrize("finish", ["stop", "STOP", None])
def test_what_ends_by_itself_or_does_not_say_how_is_gold(finish, tmp_path):
    with Scripted(after_probe(lambda _: end("It is blue.", finish))) as server:
        config = taught(tmp_path, server.url, prompts=8)
        assert not run_stage(teach, config, 0).dropped
    assert gold_of(config)["p01"] == "It is blue."


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("<think>Rayleigh scattering.</think>\n\nIt is blue.", "It is blue."),
        ("Rayleigh scattering.\n</think>\n\nIt is blue.", "It is blue."),
        ("[THINK]hm[/THINK]It is blue.", "It is blue."),
        ("It is blue; <think> is a tag.", "It is blue; <think> is a tag."),
        ("<think>Rayleigh scattering, for", None),
        ("<think>It is blue.</think>", None),
        ("  ", None),
    ],
)
def test_a_thought_is_no_part_of_the_gold(said, gold):
    reply = teach.Reply(said, finish="stop")
    if gold is None:
        with pytest.raises(teach.Unparsable):
            teach._reader("")(reply)
        return
    assert teach._reader("")(reply) == ()
    assert teach._response(said, prefix="") == gold


def test_a_thought_comes_before_the_prefix_and_stays_where_the_prefix_opens_it():
    assert teach._response("<think>hm</think>Sure, it is blue.", prefix="Sure, ") == "it is blue."
    assert teach._response("<think>\nhm</think>It is blue.", prefix="<think>\n") == "hm</think>It is blue."


def test_many_cut_responses_are_a_warning(tmp_path, capsys):
    with Scripted(after_probe(lambda _: end("It is", "length"))) as server:
        run_stage(teach, taught(tmp_path, server.url, prompts=8, max_tries=1, max_tokens=3), 0)
    said = capsys.readouterr()
    assert "6 of 6 gold responses were cut at annotation.teacher.max_tokens=3 and are dropped" in said.out + said.err


def test_what_a_server_fails_with_is_asked_once_more_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("dno_jax.endpoint.BACKOFF_SECONDS", 0.001)
    tries = Counter()

    def script(asked):
        text = asked.body["messages"][-1]["content"]
        tries[text] += 1
        return fault(500, "index") if text == "Question 1?" and tries[text] <= 3 else end(f"About {text}")

    with Scripted(after_probe(script)) as server:
        config = taught(tmp_path, server.url, prompts=8, max_tries=3)
        assert not run_stage(teach, config, 0).dropped
    assert tries["Question 1?"] == 4
    assert set(tries.values()) == {1, 4}
