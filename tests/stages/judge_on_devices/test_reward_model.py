"""A reward model as the judge: a whole annotate over a tiny checkpoint that transformers wrote and computes too."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.cli.main import app
from dno_jax.config import MeshSection, RunConfig, dump_config, parse_config
from dno_jax.data.pools import Pools, PromptFile
from dno_jax.errors import DnoError
from dno_jax.parallel.mesh import make_mesh
from dno_jax.records import Judgement, Message, Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import checkpoints, pair, sample
from dno_jax.stages.judge_on_devices import reward_model
from dno_jax.stages.judge_on_devices.reward_model import length_bucket
from tests.configured import deep_merge
from tests.model.checkpoints import edit_config, edit_tensors
from tests.pairs import read_pairs
from tests.running import prepare, run_stage, sample_and_annotate
from tests.small import WORDS, write_checkpoint

# Rewards are of order one and pass through two layers of float32, whose unit there is 1.2e-7: some forty of them.
TOLERANCE = 5e-6
# Not the policy's, which is raw: turns have names, and a text ends with the token that is padding too.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '. ' if m.role == 'assistant' else 'bam ' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
)
TEMPERATURE = 0.25


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A reward model beside a tokenizer and a template of its own."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    path = write_checkpoint(tmp_path_factory.mktemp("reward") / "rm", template=TEMPLATE)
    (path / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(path, num_labels=1, pad_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape) / weight.shape[1] ** 0.5)
    model.save_pretrained(path)
    return path


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def make(make_config, checkpoint):
    def make(**changes) -> RunConfig:
        judge = {"path": str(checkpoint), "temperature": TEMPERATURE, "max_length": 64, "batch_size": 8}
        tree = {
            "iterations": 1,
            "prompts": {"held_out_path": None},
            "annotation": {"kind": "reward_model", "reward_model": judge},
        }
        return make_config(**deep_merge(tree, changes))

    return make


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The policy's samples; tests copy them."""
    kept: list[str] = []

    def copy(config: RunConfig) -> RunDir:
        if not kept:
            fresh = config.model_copy(update={"run_dir": str(tmp_path_factory.mktemp("sampled") / "run")})
            prepare(fresh)
            run_stage(sample, fresh, 0)
            kept.append(fresh.run_dir)
        shutil.copytree(kept[0], config.run_dir)
        return RunDir(config.run_dir)

    return copy


def judgements(run_dir: RunDir) -> list[Judgement]:
    return list(run_dir.stage("annotate", 0).read(Judgement))


def files(run_dir: RunDir) -> dict[str, tuple[int, str]]:
    folder = Path(str(run_dir.stage("annotate", 0).path))
    return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in folder.iterdir()}


def pools_of_run(run_dir: RunDir) -> list[Pool]:
    source = Pools(run_dir.stage("sample", 0), run_dir.prompts_path(0))
    return [pool for shard in source.sampled.shard_names() for pool in source.read(shard).pools]


def transformers_reward(path: Path, chats: list[list[dict]]) -> list[float]:
    """What transformers makes of each chat by itself, through the directory's own tokenizer and template."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    with torch.no_grad():
        for chat in chats:
            ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            found.append(float(model(torch.tensor([ids])).logits[0, 0]))
    return found


def test_wins_are_sigma_of_the_rewards_that_transformers_computes(make, sampled, checkpoint, capfd):
    config = make(pairing={"degenerate_share": 1.0})  # repetition, which loses whatever the judge says, is left to it
    run_dir = sampled(config)
    reward_model.check(Runtime.start(config))
    manifest = run_stage(reward_model, config, 0)
    texts = {rollout.rollout_id: rollout.text for rollout in run_dir.stage("sample", 0).read(Rollout)}
    prompts = PromptFile(run_dir.prompts_path(0))
    rows = judgements(run_dir)
    assert manifest.rows == len(rows) == 12
    assert manifest.details["states"] == {"ok": 12}
    (row,) = [row for row in run_dir.read_metrics() if row["stage"] == "annotate"]
    assert row["longer_wins"] == manifest.details["quality"]["longer_wins"]["value"]
    assert row.get("warnings", []) == manifest.details["warnings"]
    assert "judge of iteration 0" in capfd.readouterr().err
    assert {row.judge for row in rows} == {manifest.details["judge"]}
    ours, theirs = [], []
    for row in rows:
        prompt = prompts.read([row.prompt_id])[row.prompt_id]
        asked = [{"role": message.role, "content": message.content} for message in prompt.messages]
        chats = [[*asked, {"role": "assistant", "content": texts[name]}] for name in row.candidate_ids]
        expected = np.asarray(transformers_reward(checkpoint, chats))
        kept = json.loads(row.raw)
        assert list(kept) == list(row.candidate_ids)
        ours, theirs = [*ours, *kept.values()], [*theirs, *expected]
        wins = np.asarray(row.wins)
        sigma = 1 / (1 + np.exp(-(expected[:, None] - expected[None, :]) / TEMPERATURE))
        # A probability moves by at most a quarter of what the difference of two rewards, over the temperature, does.
        np.testing.assert_allclose(wins, sigma, atol=2 * TOLERANCE / TEMPERATURE / 4, rtol=0)
        assert (wins + wins.T == 1).all()
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    assert np.std(theirs) > 0.1
    assert manifest.details["rewards"]["mean"] == pytest.approx(np.mean(ours))
    assert manifest.details["rewards"]["deviation"] == pytest.approx(np.std(ours))
    run_stage(pair, config, 0)
    for made in read_pairs(run_dir.stage("pair", 0)):
        kept = json.loads(next(row.raw for row in rows if row.prompt_id == made.prompt_id))
        assert made.chosen_reward > made.rejected_reward
        # Rates decide, not rewards: of two near ties the text that was sampled twice has one opponent like itself.
        assert kept[made.chosen_id] > kept[made.rejected_id] - 0.01


def test_the_words_that_a_response_was_begun_with_are_read_too(make, checkpoint):
    judge = reward_model.RewardModel.start(Runtime.start(make()))
    prompt = Prompt(prompt_id="p", messages=(Message(role="user", content="bet fos"),), assistant_prefix="lam bes ")
    pool = Pool(prompt=prompt, candidates=tuple(Candidate(name, f"lam bes {name}") for name in ("gat", "dom")))
    (row,) = judge.judge(judge.load(), [pool])
    chats = [
        [{"role": "user", "content": "bet fos"}, {"role": "assistant", "content": f"lam bes {name}"}]
        for name in ("gat", "dom")
    ]
    expected = transformers_reward(checkpoint, chats)
    np.testing.assert_allclose(list(json.loads(row.raw).values()), expected, atol=TOLERANCE, rtol=0)


def test_the_run_and_the_command_line_judge_on_the_devices(make, sampled, tmp_path):
    config = make()
    run_dir = sampled(config)
    prepare(config)
    sample_and_annotate(config, 0)
    before = files(run_dir)
    assert "reward model rm" in run_dir.stage("annotate", 0).require().inputs
    (tmp_path / "config.yaml").write_text(dump_config(config))
    result = CliRunner().invoke(app, ["annotate", str(tmp_path / "config.yaml")])
    assert result.exit_code == 0, result.exception
    assert files(run_dir) == before
    assert checkpoints.annotator_name(config.annotation) == "reward model rm"


def test_a_killed_run_goes_on_after_its_closed_shards(make, sampled, monkeypatch):
    config = make()
    run_dir = sampled(config)
    run_stage(reward_model, config, 0)
    before, stage = files(run_dir), run_dir.stage("annotate", 0)
    assert run_stage(reward_model, config, 0) == stage.require()
    assert files(run_dir) == before
    assert set(before) == {"0000000.jsonl", "0000008.jsonl", "MANIFEST.json", "STARTED.json"}

    stage.manifest_path.unlink()
    (stage.path / "0000008.jsonl").unlink()
    read, real = [], reward_model.RewardModel.judge

    def spy(self, params, pools):
        read.extend(pool.prompt.prompt_id for pool in pools)
        return real(self, params, pools)

    monkeypatch.setattr(reward_model.RewardModel, "judge", spy)
    run_stage(reward_model, config, 0)
    after = files(run_dir)
    assert len(read) == 4  # prompts of the second shard
    assert after["0000000.jsonl"] == before["0000000.jsonl"]
    assert after["0000008.jsonl"][1] == before["0000008.jsonl"][1]


def test_another_checkpoint_is_another_judge(make, sampled, copy):
    config = make(annotation={"reward_model": {"path": str(copy)}})
    run_dir = sampled(config)
    first = run_stage(reward_model, config, 0).details["judge"]

    def scale(tensors):
        tensors["score.weight"] *= 2

    edit_tensors(copy, scale)
    with pytest.raises(DnoError, match=r"made from other inputs .*reward model copy"):
        run_stage(reward_model, config, 0)
    before = [json.loads(row.raw) for row in judgements(run_dir)]
    run_dir.stage("annotate", 0).manifest_path.unlink()
    second = run_stage(reward_model, config, 0).details["judge"]
    assert first != second
    assert {row.judge for row in judgements(run_dir)} == {second}
    for row, old in zip(judgements(run_dir), before, strict=True):
        np.testing.assert_allclose(
            list(json.loads(row.raw).values()), 2 * np.asarray(list(old.values())), atol=2 * TOLERANCE
        )
    (copy / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert reward_model.RewardModel.start(Runtime.start(config)).identity != second


def test_a_chat_that_is_too_long_is_not_cut(make, sampled):
    config = make(annotation={"max_failed": 0.9, "reward_model": {"max_length": 24}})
    run_dir = sampled(config)
    manifest = run_stage(reward_model, config, 0)
    judge = reward_model.RewardModel.start(Runtime.start(config))
    longest = {}
    for pool in pools_of_run(run_dir):
        ids = [judge.runtime.tokenizer.chat_ids(pool.prompt.messages, one.text) for one in pool.candidates]
        longest[pool.prompt.prompt_id] = max(map(len, ids))
    assert min(longest.values()) <= 24 < max(longest.values())
    for row in judgements(run_dir):
        if longest[row.prompt_id] <= 24:
            assert row.state == "ok"
        else:
            assert (row.state, row.wins, row.raw) == ("failed", None, "")
            assert row.detail == f"a chat has {longest[row.prompt_id]} tokens, annotation.reward_model.max_length is 24"
    assert manifest.dropped["verdict failed"] == sum(length > 24 for length in longest.values())

    strict = make(annotation={"max_failed": 0.0, "reward_model": {"max_length": 24}})
    run_dir.stage("annotate", 0).manifest_path.unlink()
    with pytest.raises(DnoError, match=r"\d+ of 12 pools have no verdict of the reward model .*would compute the same"):
        run_stage(reward_model, strict, 0)


def test_texts_that_spell_control_tokens_and_rewards_that_are_no_numbers_fail(make):
    judge = reward_model.RewardModel.start(Runtime.start(make()))

    def pool(prompt_id: str, *texts: str) -> Pool:
        prompt = Prompt(prompt_id=prompt_id, messages=(Message(role="user", content="bet"),))
        return Pool(prompt=prompt, candidates=tuple(Candidate(f"{prompt_id}/{i}", t) for i, t in enumerate(texts)))

    params = judge.load()
    hostile, fine = judge.judge(params, [pool("a", "bam", "dom </s> bam gat"), pool("b", "bam", "dom")])
    assert (hostile.state, hostile.detail) == ("failed", "the text to judge spells the control token '</s>'")
    assert fine.state == "ok"

    word = 4 + WORDS.index("dom")
    # A checkpoint of such weights is refused; numbers that overflow on the way give the same.
    params = {**params, "embed": params["embed"].at[word].set(np.nan)}
    bad, good = judge.judge(params, [pool("a", "bam", "gat dom"), pool("b", "bam", "gat")])
    assert (bad.state, bad.wins, bad.detail) == ("failed", None, "the reward of a/1 is nan")
    assert good.state == "ok"


def test_each_part_of_the_mesh_closes_shards_of_its_own(make, sampled):
    config = make()
    run_dir = sampled(config)
    stage, source = run_dir.stage("annotate", 0), run_dir.stage("sample", 0)
    pools = Pools(source, run_dir.prompts_path(0))
    closed = []
    for index in (1, 0):
        runtime = Runtime.start(config)
        judge = reward_model.RewardModel.start(runtime)
        vars(judge.runtime.programs)["submesh"] = replace(runtime.submesh, index=index, count=2)
        shards = source.shard_names()
        reward_model._judge_shards(judge, pools, shards, close=lambda name, _, rows: stage.write_shard(name, rows))
        closed.append(stage.shard_names())
    assert closed == [["0000008"], ["0000000", "0000008"]]
    before = files(run_dir)
    assert run_stage(reward_model, config, 0).rows == 12  # nothing is left to do but the manifest
    assert {name: found for name, found in files(run_dir).items() if name.endswith(".jsonl")} == before


def random_texts(count: int, *, longest: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    lengths = [1, longest, *rng.integers(1, longest + 1, count - 2)]
    return [tuple(int(i) for i in rng.integers(3, 70, length)) for length in lengths]


def test_rows_and_heads_over_devices_and_batches_of_any_size_give_the_same(make):
    texts = random_texts(21, longest=64)
    found = []
    for axes, batch in (({}, 5), ({"data": 2}, 4), ({"fsdp": 2, "tensor": 2}, 8)):
        # A run takes all devices, a part of a mesh those of its process: here as few as wanted.
        runtime = Runtime.start(make(annotation={"reward_model": {"batch_size": 8 * batch}}))
        count = int(np.prod(list(axes.values()), dtype=int))
        mesh = make_mesh(MeshSection(**{"data": 1, **axes}), jax.devices()[:count])
        own = replace(runtime, programs=replace(runtime.programs, mesh=mesh))
        judge = reward_model.RewardModel.start(own)
        judge = replace(judge, section=judge.section.model_copy(update={"batch_size": batch}))
        found.append(judge.rewards(judge.load(), texts))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=TOLERANCE, rtol=0)
    assert found[0].std() > 0.1


def test_few_programs_serve_every_length(make):
    judge = reward_model.RewardModel.start(Runtime.start(make()))
    params = judge.load()
    reward_model.reward_step.clear_cache()
    judge.rewards(params, random_texts(100, longest=32))
    assert reward_model.reward_step._cache_size() == 1
    judge.rewards(params, random_texts(100, longest=64))
    assert reward_model.reward_step._cache_size() == 2  # lengths of 32 and of 64


def test_wins_are_exact_complements():
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 30.0, 1e4):
        wins = np.asarray(reward_model.bradley_terry((scale * rng.standard_normal(40)).tolist(), temperature=0.7))
        assert (wins + wins.T == 1).all()
    assert reward_model.bradley_terry([2.0, 1.0], temperature=0.5)[0][1] == pytest.approx(1 / (1 + np.exp(-2)))


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"max_length": 65}, "annotation.reward_model.max_length 65 exceeds the reward model's context of 64"),
        ({"batch_size": 12}, "annotation.reward_model.batch_size is 12, which the 8 row shards"),
        ({"path": "/no/such"}, "/no/such: no such directory"),
    ],
)
def test_what_could_never_work_is_said_before_anything_is_sampled(make, section, reason):
    with pytest.raises(DnoError, match=re.escape(reason)):
        reward_model.check(Runtime.start(make(annotation={"reward_model": section})))


def test_so_is_a_directory_that_is_no_reward_models(make, copy, small_folder):
    config = make(annotation={"reward_model": {"path": str(copy)}})
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(DnoError, match=r"annotation\.reward_model\.path: .*refuses a chat .*of this very directory"):
        reward_model.check(Runtime.start(config))
    edit_config(copy, id2label={"0": "A", "1": "B"}, label2id={"A": 0, "B": 1})
    with pytest.raises(DnoError, match="num_labels is 2; a reward model has 1"):
        reward_model.check(Runtime.start(config))
    policy = make(annotation={"reward_model": {"path": str(small_folder / "checkpoint")}})
    with pytest.raises(DnoError, match="num_labels is 2"):
        prepare(policy)


def test_chats_that_may_turn_out_too_long_are_said_before_they_are_sampled(make, capsys):
    reward_model.check(
        Runtime.start(make(annotation={"reward_model": {"max_length": 32}}))
    )  # 16 of a prompt and 16 of a response
    assert "get no verdict" not in capsys.readouterr().err
    reward_model.check(Runtime.start(make(annotation={"reward_model": {"max_length": 31}})))
    assert "may take 32 tokens" in capsys.readouterr().err


def test_the_configuration_asks_for_a_path_and_for_another_judge_of_held_out_prompts(make):
    tree = make().model_dump(mode="json")
    with pytest.raises(DnoError, match=r"kind=reward_model needs annotation\.reward_model\.path"):
        parse_config(RunConfig, deep_merge(tree, {"annotation": {"reward_model": None}}), place="test")
    with pytest.raises(DnoError, match="kind=reward_model cannot judge held-out responses"):
        parse_config(RunConfig, deep_merge(tree, {"prompts": {"held_out": 2}}), place="test")
    with pytest.raises(DnoError, match="gives pairwise verdicts, no scores"):
        parse_config(RunConfig, deep_merge(tree, {"pairing": {"reward": "score"}}), place="test")


def test_few_shapes():
    for max_length in (64, 96, 768, 4096, 1000):
        buckets = {length_bucket(n, max_length=max_length) for n in range(1, max_length + 1)}
        assert max(buckets) == max_length
        assert len(buckets) <= 8
        assert all(length_bucket(n, max_length=max_length) >= n for n in range(1, max_length + 1))
