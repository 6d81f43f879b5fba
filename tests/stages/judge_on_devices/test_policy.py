"""The policy as its own judge: a small model that was taught to judge does, one that was not gives no numbers."""

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from dno_jax.addresses import Purpose
from dno_jax.annotation.judges.forms import POINTWISE, load_rubric
from dno_jax.config import RunConfig, SftConfig, parse_config
from dno_jax.data.pools import Pools
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import init_params
from dno_jax.records import Judgement, Message, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stage_dir import StageDir
from dno_jax.stages import pair, sample, sft
from dno_jax.stages.judge_on_devices import policy as self_judge
from tests.configured import deep_merge
from tests.pairs import read_pairs
from tests.running import prepare, run_stage

TOPICS = [f"{a}{b}{c}" for a in "bd" for b in "aeo" for c in "mn"]
WORDS = [f"{a}{b}{c}" for a in "fg" for b in "aeo" for c in "mn"]
GOOD = "zum"  # what the judge is taught to like
VOCABULARY = ["<unk>", "<s>", "</s>", "Score:", *"0123456789", *TOPICS, *WORDS, GOOD]

RUBRIC = """
name: likes_zum
version: "1"
min_score: 0
max_score: 5
system: ""
user: "{{ fence_rule }}\\n{{ conversation }}\\n{{ response }}\\n{{ reply_shape }}\\n\\n"
"""


def write_checkpoint(path: Path) -> Path:
    """Write a small Llama of random weights with room for a judge prompt."""
    source = path.parent / f"{path.name}-source"
    source.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    # Words that it does not know are not there: of the fences and their rule nothing is left, which saves minutes.
    known = "|".join(word for word in VOCABULARY if word not in ("<unk>", "<s>", "</s>"))
    tokenizer.normalizer = normalizers.Replace(Regex(rf"(?<!\S)(?!(?:{known})(?!\S))\S+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(source / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **names})
    )
    shape = {
        "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    (source / "config.json").write_text(json.dumps({**llama, **shape, **ends}))
    (source / "generation_config.json").write_text(json.dumps(ends))
    config = ModelConfig(**shape)
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    hf.save(path, config, params, source=source)
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(rubric: str, rng: np.random.Generator) -> list[dict]:
    """What the policy is taught: to answer topics with words, half the time a good one, and to tell those apart."""
    rows = []
    for index in range(512):
        topic = " ".join(rng.choice(TOPICS, 3, replace=False))
        words = rng.choice(WORDS, rng.integers(2, 5), replace=False).tolist()
        good = index % 2 == 0
        if good:
            words.insert(rng.integers(len(words) + 1), GOOD)
        text = " ".join(words)
        question = [{"role": "user", "content": topic}]
        request = load_rubric(POINTWISE, rubric).messages([Message(role="user", content=topic)], [text])
        points = rng.integers(4, 6) if good else rng.integers(1, 3)  # a judge that is of two minds: there is a mean
        rows.append({"prompt_id": f"a{index}", "messages": question, "response": text})
        rows.append({"prompt_id": f"j{index}", "messages": request, "response": f"Score: {points}"})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prompts, a rubric, a checkpoint that knows nothing and one that was taught."""
    folder = tmp_path_factory.mktemp("self")
    (folder / "rubric.yaml").write_text(RUBRIC)
    write_checkpoint(folder / "untaught")
    rng = np.random.default_rng(0)
    write_rows(folder / "sft.jsonl", examples(str(folder / "rubric.yaml"), rng))
    topics = [" ".join(rng.choice(TOPICS, 3, replace=False)) for _ in range(12)]
    write_rows(folder / "prompts.jsonl", [{"prompt_id": f"p{i}", "prompt": topic} for i, topic in enumerate(topics)])
    tree = {
        "run_dir": str(folder / "sft"),
        "model": {"path": str(folder / "untaught"), "chat_template": "raw", "remat": "none"},
        "data": {"path": str(folder / "sft.jsonl"), "max_length": 24},
        "optimizer": {"learning_rate": 1e-2, "schedule": "linear"},
        "training": {"batch_size": 32, "num_epochs": 12, "save_every": 1000},
        "report": {"tensorboard": False},
    }
    shutil.move(str(sft.run(Runtime.start(parse_config(SftConfig, tree, place="test")))), folder / "taught")
    return folder


@pytest.fixture
def make(folder, tmp_path):
    """A configuration of one iteration with a fresh run directory, changed by nested dicts."""

    def make(**changes) -> RunConfig:
        tree = {
            "run_dir": str(tmp_path / "run"),
            "seed": 3,
            "iterations": 1,
            "model": {"path": str(folder / "taught"), "chat_template": "raw"},
            "prompts": {"path": str(folder / "prompts.jsonl"), "max_length": 16},
            "sampling": {"num_samples": 4, "max_new_tokens": 8, "shard_prompts": 8, "temperature": 1.0},
            "annotation": {
                "kind": "self",
                "self_judge": {"rubric": str(folder / "rubric.yaml"), "max_prompt_length": 24, "max_new_tokens": 6},
            },
            "pairing": {"rule": "best_worst", "margin": 1.0, "cut": "keep"},
        }
        return parse_config(RunConfig, deep_merge(tree, changes), place="test")

    return make


@pytest.fixture(scope="module")
def sampled(folder):
    """A taught policy's samples; tests copy them."""
    kept = {}

    def copy(config: RunConfig) -> RunDir:
        name = Path(config.model.path).name
        if name not in kept:
            fresh = config.model_copy(update={"run_dir": str(folder / f"sampled-{name}")})
            prepare(fresh)
            run_stage(sample, fresh, 0)
            kept[name] = fresh.run_dir
        shutil.copytree(kept[name], config.run_dir)
        return RunDir(config.run_dir)

    return copy


def files(run_dir: RunDir) -> dict[str, tuple[int, str]]:
    folder = Path(str(run_dir.stage("annotate", 0).path))
    return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in folder.iterdir()}


def judgements(run_dir: RunDir) -> list[Judgement]:
    return list(run_dir.stage("annotate", 0).read(Judgement))


def scored(run_dir: RunDir) -> list[tuple[str, float]]:
    """(text, points) of every candidate."""
    texts = {rollout.rollout_id: rollout.text for rollout in run_dir.stage("sample", 0).read(Rollout)}
    return [
        (texts[name], points)
        for row in judgements(run_dir)
        for name, points in zip(row.candidate_ids, row.scores, strict=True)
    ]


def test_the_points_order_responses_as_taught(make, sampled, capfd, monkeypatch):
    config = make()
    run_dir = sampled(config)
    read, real = Counter(), Pools.read
    monkeypatch.setattr(Pools, "read", lambda pools, shard, **rest: read.update([shard]) or real(pools, shard, **rest))
    self_judge.check(Runtime.start(config))
    manifest = run_stage(self_judge, config, 0)
    assert manifest.rows == 12
    assert manifest.details["states"] == {"ok": 12}
    (row,) = [row for row in run_dir.read_metrics() if row["stage"] == "annotate"]
    assert row["longer_wins"] == manifest.details["quality"]["longer_wins"]["value"]
    assert row.get("warnings", []) == manifest.details["warnings"]
    assert "judge of iteration 0" in capfd.readouterr().err
    assert set(read.values()) == {1}
    assert sum(manifest.details["readings"].values()) == 3 * len(scored(run_dir))
    assert f"policy={manifest.inputs['policies/000'][:12]}" in manifest.details["judge"]
    assert {row.judge for row in judgements(run_dir)} == {manifest.details["judge"]}
    good = [points for text, points in scored(run_dir) if GOOD in text.split()]
    poor = [points for text, points in scored(run_dir) if GOOD not in text.split()]
    assert min(good) > max(poor)
    run_stage(pair, config, 0)
    texts = {rollout.rollout_id: rollout.text for rollout in run_dir.stage("sample", 0).read(Rollout)}
    pairs = read_pairs(run_dir.stage("pair", 0))
    assert len(pairs) >= 4
    for made in pairs:
        assert GOOD in texts[made.chosen_id].split()
        assert GOOD not in texts[made.rejected_id].split()


def test_another_call_changes_nothing_and_a_killed_one_is_completed_equal(make, sampled, monkeypatch):
    config = make()
    run_dir = sampled(config)
    run_stage(self_judge, config, 0)
    before, stage = files(run_dir), run_dir.stage("annotate", 0)
    assert run_stage(self_judge, config, 0) == stage.require()
    assert files(run_dir) == before

    stage.manifest_path.unlink()
    (stage.path / "0000008.jsonl").unlink()
    judged, real = [], self_judge._judge_shards

    def spy(judge, params, source, shards, **fields):
        judged.extend(shards)
        return real(judge, params, source, shards, **fields)

    monkeypatch.setattr(self_judge, "_judge_shards", spy)
    run_stage(self_judge, config, 0)
    after = files(run_dir)
    assert judged == ["0000008"]
    assert after["0000000.jsonl"] == before["0000000.jsonl"]
    assert after["0000008.jsonl"][1] == before["0000008.jsonl"][1]
    without_time = [
        {
            name: value
            for name, value in json.loads(found["MANIFEST.json"][1]).items()
            if name not in ("seconds", "seal")
        }
        for found in (before, after)
    ]
    assert without_time[0] == without_time[1]


def test_points_are_the_mean_of_readings_that_depend_on_their_address_alone(make, sampled, tmp_path, monkeypatch):
    hot = {"max_failed": 1.0, "self_judge": {"temperature": 2.0, "top_p": 1.0}}
    config = make(annotation=hot)
    run_dir = sampled(config)
    asked, real = [], self_judge.generate

    def spy(params, requests, programs, *, iteration, **fields):
        def seen():
            for request in requests:
                asked.append((request.name, programs.sampling_params.purpose))
                yield request

        return real(params, seen(), programs, iteration=iteration, **fields)

    monkeypatch.setattr(self_judge, "generate", spy)
    run_stage(self_judge, config, 0)
    rows = judgements(run_dir)
    names = [name for name, _ in asked]
    expected = [hashlib.sha256(name.encode()).digest()[:4] for row in rows for name in row.candidate_ids]
    assert sorted(names) == sorted(int.from_bytes(digest, "big") for digest in expected)
    assert {purpose for _, purpose in asked} == {Purpose.READING}  # no sampling of responses has these keys

    readings = {name: own for row in rows for name, own in json.loads(row.raw).items()}
    assert {len(own) for own in readings.values()} == {3}
    assert sum(len({one["text"] for one in own}) > 1 for own in readings.values()) > len(readings) / 2
    for row in rows:
        points = [[one["score"] for one in readings[name] if one["score"] is not None] for name in row.candidate_ids]
        if all(points):
            assert row.state == "ok"
            assert row.scores == tuple(sum(known) / len(known) for known in points)
        else:
            assert row.state == "unparsable"
            assert row.scores is None
            assert "without a readable reading" in row.detail
    assert {row.state for row in rows} == {"ok", "unparsable"}
    assert any(score % 1 for row in rows for score in row.scores or ())  # some mean is no whole number

    other = make(annotation=hot, sampling={"shard_prompts": 16}, run_dir=str(tmp_path / "other"))
    again = sampled(other)
    run_stage(self_judge, other, 0)
    assert [row.raw for row in judgements(again)] == [row.raw for row in rows]


def test_a_writer_that_fails_ends_the_device_program(make, sampled, monkeypatch):
    config = make()
    sampled(config)
    real, steps = self_judge.generate, []

    def generate(*args, **fields):
        steps.append("begun")
        try:
            yield from real(*args, **fields)
        finally:
            steps.append("ended")

    def full(stage, name, records):
        raise OSError("no space left on device")

    monkeypatch.setattr(self_judge, "generate", generate)
    monkeypatch.setattr(StageDir, "write_shard", full)
    with pytest.raises(OSError, match="no space left") as error:
        run_stage(self_judge, config, 0)
    assert steps == ["begun", "ended"]
    assert error.tb is not None  # it holds the frames that drew: nothing ended them but their being closed


def test_a_policy_that_cannot_judge_gives_no_numbers(make, sampled, folder, monkeypatch):
    untaught = {"path": str(folder / "untaught")}
    config = make(model=untaught)
    run_dir = sampled(config)
    with pytest.raises(DnoError, match=r"12 of 12 pools have no verdict of the policy .*unparsable: .*teach the"):
        run_stage(self_judge, config, 0)
    assert not run_dir.stage("annotate", 0).manifest_path.exists()
    rows = judgements(run_dir)
    assert [(row.state, row.scores) for row in rows] == [("unparsable", None)] * 12
    assert all(json.loads(row.raw).keys() == set(row.candidate_ids) for row in rows)

    # The same readings would come again: going on without them asks for none.
    monkeypatch.setattr(self_judge, "generate", None)
    config = make(model=untaught, annotation={"max_failed": 1.0})
    manifest = run_stage(self_judge, config, 0)
    assert manifest.dropped["verdict unparsable"] == 12
    with pytest.raises(DnoError, match="no pair passed"):
        run_stage(pair, config, 0)


def test_a_reading_that_was_cut_is_no_answer(make, sampled):
    config = make(annotation={"self_judge": {"max_new_tokens": 2}})
    run_dir = sampled(config)
    with pytest.raises(DnoError, match=r"the reading was cut at annotation.self_judge.max_new_tokens=2"):
        run_stage(self_judge, config, 0)
    readings = [one for row in judgements(run_dir) for own in json.loads(row.raw).values() for one in own]
    assert {"score": None, "text": "Score: 5"} in readings  # another digit might have followed


def change_text(config: RunConfig, rollout_id: str, text: str) -> None:
    stage = RunDir(config.run_dir).stage("sample", 0)
    was = stage.require()
    for shard in stage.shard_names():
        rows = stage.read_shard(Rollout, shard)
        stage.write_shard(
            shard, [row.model_copy(update={"text": text}) if row.rollout_id == rollout_id else row for row in rows]
        )
    stage.finish(config, inputs=was.inputs, rows=was.rows, seconds=0.0, details=was.details)


def test_what_cannot_be_asked_is_a_failed_pool_and_what_need_not_be_is_counted(make, sampled):
    config = make(annotation={"max_failed": 0.5})
    run_dir = sampled(config)
    change_text(config, "000/p0/1", " ".join(WORDS * 2))
    change_text(config, "000/p1/2", f"{WORDS[0]} </s> {GOOD}")
    change_text(config, "000/p2/3", "  ")
    for sample_index in range(1, 4):
        change_text(config, f"000/p3/{sample_index}", WORDS[0])
    change_text(config, "000/p3/0", WORDS[0])
    manifest = run_stage(self_judge, config, 0)
    rows = {row.prompt_id: row for row in judgements(run_dir)}
    assert rows["p0"].state == rows["p1"].state == "failed"
    assert rows["p0"].detail == "a judge prompt has 29 tokens, annotation.self_judge.max_prompt_length is 24"
    assert rows["p1"].detail == "the text to judge spells the control token '</s>'"
    assert rows["p0"].raw == rows["p1"].raw == ""
    assert "000/p2/3" not in rows["p2"].candidate_ids
    assert "p3" not in rows
    assert manifest.details["states"] == {"ok": 9, "failed": 2}
    assert manifest.dropped["verdict failed"] == 2
    assert manifest.dropped["empty response"] == 1
    assert manifest.dropped["fewer than two distinct candidates"] == 1


def test_an_edited_rubric_judges_anew(make, sampled, tmp_path):
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text(RUBRIC)
    config = make(annotation={"self_judge": {"rubric": str(rubric)}})
    run_dir = sampled(config)
    first = run_stage(self_judge, config, 0).details["judge"]
    rubric.write_text(RUBRIC + "# edited\n")
    with pytest.raises(DnoError, match=r"made from other inputs .*rubric likes_zum"):
        run_stage(self_judge, config, 0)
    run_dir.stage("annotate", 0).manifest_path.unlink()
    second = run_stage(self_judge, config, 0).details["judge"]
    assert second != first
    assert {row.judge for row in judgements(run_dir)} == {second}


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"rubric": "no_such"}, "annotation.self_judge.rubric 'no_such': cannot be read"),
        ({"rubric": "listwise_6point"}, "never shows response"),
        (
            {"max_prompt_length": 60},
            "annotation.self_judge.max_prompt_length 60 and max_new_tokens 6 exceed the model's context of 64",
        ),
        ({"max_prompt_length": 2}, "alone takes 2 tokens, and annotation.self_judge.max_prompt_length is 2"),
    ],
)
def test_what_could_never_work_is_said_before_anything_is_sampled(make, section, reason):
    with pytest.raises(DnoError, match=re.escape(reason)):
        self_judge.check(Runtime.start(make(annotation={"self_judge": section})))


def test_prompts_that_may_turn_out_too_long_are_said_before_they_are_paid_for(make, capsys):
    self_judge.check(
        Runtime.start(make(annotation={"self_judge": {"max_prompt_length": 26}}))
    )  # 2 of the rubric, 16, 8
    assert "get no verdict" not in capsys.readouterr().err
    self_judge.check(Runtime.start(make(annotation={"self_judge": {"max_prompt_length": 25}})))
    assert "judge prompts may take about 26 tokens (the rubric alone 2)" in capsys.readouterr().err


def test_a_chat_template_that_refuses_the_rubric_is_said_as_well(make, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content if m.role == 'user' else raise_exception('no') }}{% endfor %}"
    )
    rubric = tmp_path / "rubric.yaml"
    config = make(model={"chat_template": str(template)}, annotation={"self_judge": {"rubric": str(rubric)}})
    rubric.write_text(RUBRIC)
    self_judge.check(Runtime.start(config))
    rubric.write_text(RUBRIC.replace('system: ""', "system: Judge."))
    with pytest.raises(DnoError, match="refuses a chat of roles"):
        self_judge.check(Runtime.start(config))


def test_each_shard_is_parsed_once_whichever_call_closed_it(make, sampled, monkeypatch):
    config = make()
    stage = sampled(config).stage("annotate", 0)
    parsed, real = Counter(), StageDir.read_shard

    def counting(self, kind, name):
        parsed[str(self.path / name)] += 1
        return real(self, kind, name)

    monkeypatch.setattr(StageDir, "read_shard", counting)
    whole = run_stage(self_judge, config, 0)
    assert set(parsed.values()) == {1}
    stage.manifest_path.unlink()
    (stage.path / f"{stage.shard_names()[0]}.jsonl").unlink()
    parsed.clear()
    again = run_stage(self_judge, config, 0)
    assert set(parsed.values()) == {1}
    assert (again.outputs, again.details, again.dropped) == (whole.outputs, whole.details, whole.dropped)
