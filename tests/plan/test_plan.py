"""`dno plan`: on the devices that are here and on those that are not."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import pytest
import yaml

from dno_jax.annotation import Candidate, Pool
from dno_jax.annotation.judges.functions import build_function
from dno_jax.annotation.judges.schedules import num_questions
from dno_jax.annotation.question import Verdict, advance
from dno_jax.cli import main as cli
from dno_jax.cli.quantities import read_bytes
from dno_jax.config import RunConfig, parse_config
from dno_jax.data.prompts import split_prompts, tokenize_prompts
from dno_jax.errors import DnoError
from dno_jax.plan.annotation import Demand
from dno_jax.plan.run import plan_run
from dno_jax.records import Judgement
from dno_jax.runtime.capacity import device_capacity
from dno_jax.runtime.runtime import load_tokenizer
from dno_jax.sampling.memory import show_bytes
from tests.small import WORDS, small_tree, write_prompts

# Mistral-7B-v0.1's config.json.
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 4096,
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
POD = ("--devices", "256", "--memory", "16GiB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def small(folder):
    """A configuration like the demo's, over 12 prompts."""
    return small_tree(folder)


@pytest.fixture(scope="module")
def seven(folder, small):
    """A 7B model of which there is a config.json and a tokenizer, and no weights."""
    path = folder / "seven"
    path.mkdir()
    for file in Path(small["model"]["path"]).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, path)
    (path / "config.json").write_text(json.dumps(MISTRAL))
    prompts = write_prompts(folder / "many.jsonl", 200, seed=2)
    return {
        "run_dir": str(folder / "seven-run"),
        "iterations": 2,
        "model": {"path": str(path), "chat_template": "raw", "dtype": "bfloat16"},
        "mesh": {"data": 1, "fsdp": -1, "tensor": 8},
        "prompts": {"path": str(prompts), "max_length": 1024},
        "sampling": {"num_samples": 5, "max_new_tokens": 1024, "shard_prompts": 64},
        "annotation": {"kind": "oracle"},
        "pairing": {"reward": "win_rate", "positive_floor": 0.5, "margin": 0.2, "student_margin": 0.2},
        "training": {"batch_size": 64},
    }


@pytest.fixture
def dno_plan(folder, monkeypatch, capsys):
    """Run the command on a tree; return its exit status and what it said, in one line where it was wrapped."""

    def run(tree, *arguments):
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        monkeypatch.setattr(sys, "argv", ["dno", "plan", str(config), *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        said = captured.err + captured.out
        assert "Traceback" not in said
        return caught.value.code or 0, " ".join(said.split())

    return run


def planned(tree, *, memory=None, num_devices=None, **changes):
    config = parse_config(RunConfig, {**tree, **changes}, place="test")
    return plan_run(config, memory=memory, num_devices=num_devices)


def test_the_plan_of_a_small_run_on_the_devices_that_are_here(small, dno_plan):
    code, said = dno_plan(small)
    assert code == 0
    assert "model: llama, " in said
    assert "mesh: data=8 fsdp=1 expert=1 tensor=1; devices: 8; row shards: 8" in said
    assert "(the host's free memory, shared by 8 devices)" in said
    # Six prompts an iteration on eight row shards: each has one at most, of which four responses are drawn.
    assert "slots on each row shard 4 2 decided by responses to draw responses to draw" in said
    assert "rows decoded at once 32 16" in said
    found = planned(small)
    assert f"one slot {show_bytes(found.sampling['sample'].slot_bytes)}" in said
    assert not Path(small["run_dir"]).exists()


def test_tokens_of_an_iteration_are_those_of_its_prompts(small, dno_plan):
    config = parse_config(RunConfig, small, place="test")
    split, tokenizer = split_prompts(config), load_tokenizer(config.model)
    counts = planned(small).counts
    assert list(counts) == ["iteration 0", "iteration 1", "held out"]
    for name, part, samples in zip(counts, (*split.training, split.held_out), (4, 4, 2), strict=True):
        kept, _ = tokenize_prompts(part, tokenizer=tokenizer, config=config)
        count = counts[name]
        assert count.prompts == len(kept) == len(part)
        assert count.prompt_tokens == sum(len(item.token_ids) for item in kept)
        assert count.responses == samples * len(part)
        assert count.response_tokens == 16 * count.responses
        assert count.shards == math.ceil(len(part) / 8)
        row = f"{name} {count.prompts} 0 {count.prompt_tokens} {count.responses} {count.response_tokens} {count.shards}"
        assert row in dno_plan(small)[1]


def test_the_longest_response_leaves_its_prompt_room_in_the_total(small):
    config = parse_config(RunConfig, small, place="test")
    split, tokenizer = split_prompts(config), load_tokenizer(config.model)
    found = planned(small, sampling={**small["sampling"], "max_total_tokens": 14})
    kept, _ = tokenize_prompts(split.training[0], tokenizer=tokenizer, config=config)
    lengths = [len(item.token_ids) for item in kept]
    assert max(lengths) < 14
    assert found.counts["iteration 0"].response_tokens == 4 * sum(14 - length for length in lengths)
    assert found.sampling["sample"].programs.num_slots == 14


def test_prompts_that_are_too_long_are_not_counted(small):
    section = {**small["prompts"], "max_length": 5, "too_long": "drop"}
    counts = planned(small, prompts=section).counts["iteration 0"]
    assert counts.dropped > 0
    assert counts.prompts + counts.dropped == 6
    assert counts.prompt_tokens <= 5 * counts.prompts


def test_a_7b_model_on_a_pod_that_is_not_here(seven, dno_plan):
    code, said = dno_plan(seven, *POD)
    assert code == 0
    assert "model: mistral, 7,241,732,096 parameters, computed in bfloat16" in said
    assert "mesh: data=1 fsdp=32 expert=1 tensor=8; devices: 256; row shards: 32" in said
    assert "on devices of 16.00 GiB (--memory)" in said
    assert "layers x key heads x head_dim 32 x 1 x 128" in said
    slots = planned(seven, memory=16 * 2**30, num_devices=256).sampling["sample"]
    # An eighth of every matrix, two bytes a number; norms are whole on every device, and float32.
    matrices = 2 * 32000 * 4096 + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert slots.weight_bytes == 2 * matrices // 8 + 4 * (2 * 32 + 1) * 4096
    assert slots.slot_bytes == 2 * (2 * 32 * 1 * 128 * 2048) + 2 * 4096 + 24  # keys, values, hidden state, counters
    assert f"one slot {show_bytes(slots.slot_bytes)}" in said
    # 100 prompts an iteration, 4 of them on a row shard, 5 responses each.
    assert (slots.slots, slots.chosen_by) == (20, "responses to draw")
    assert "slots on each row shard 20 decided by responses to draw" in said
    assert slots.most_slots > 256


def test_overrides_change_the_plan(seven, dno_plan):
    bare = planned(seven, memory=16 * 2**30, num_devices=256).sampling["sample"]
    code, said = dno_plan(seven, "sampling.slots=100", "sampling.kv_dtype=int8", "sampling.max_new_tokens=3072", *POD)
    assert code == 0
    assert "slots on each row shard 100 decided by sampling.slots" in said
    assert "keys and values in int8 tokens of a slot 4,096" in said
    # A byte a number and four for every 128 of them, twice as many tokens.
    assert f"one slot {show_bytes(bare.slot_bytes * (128 + 4) // 128)} tokens" in said


def test_what_does_not_fit_says_how_many_would(seven, dno_plan):
    """A quarter of the weights, 3.37 GiB, on devices of which 14.4 GiB are used: slots of 64 MiB do not fill 11 GiB."""
    overrides = ("training.batch_size=64", "mesh.tensor=4", "mesh.fsdp=64", "training.micro_batch_size=64")
    code, said = dno_plan(seven, "sampling.slots=400", *overrides, *POD)
    assert code == 2
    assert "dno: sample: sampling.slots is 400, but 400 slots of 2048 tokens on each row shard would take" in said
    assert "weights of a policy 3.37 GiB, slots 25.0" in said
    assert "14.40 GiB are available: 16.00 GiB (--memory) less a reserve of 1.60 GiB" in said
    most = int(said.partition(" would fit: set sampling.slots to at most ")[0].split()[-1])
    # Each takes 64 MiB, a fifth of a queued prompt of 32 MiB, and five copies of 32,000 logits.
    assert 100 < most < 11.03 * 1024 / (64 + 32 / 5 + 0.6)
    assert dno_plan(seven, f"sampling.slots={most}", *overrides, *POD)[0] == 0
    assert dno_plan(seven, f"sampling.slots={most + 1}", *overrides, *POD)[0] == 2
    code, smaller = dno_plan(seven, "sampling.slots=400", "sampling.kv_dtype=float8_e4m3fn", *overrides, *POD)
    assert code == 2
    assert int(smaller.partition(" would fit")[0].split()[-1]) > 1.8 * most


def test_a_policy_that_does_not_fit_leaves_no_slot(seven, dno_plan):
    # Adapters leave training room; decoding splits weights over its tensor axis alone.
    adapters = ("mesh.tensor=1", "mesh.fsdp=8", "adapter.rank=4", "training.micro_batch_size=8")
    eight = ("--devices", "8", "--memory", "8 GiB")
    code, said = dno_plan(seven, *adapters, "sampling.mesh={tensor: 1}", *eight)
    assert code == 2
    assert "sample: not even one sampling slot fits" in said
    code, said = dno_plan(seven, *adapters, *eight)
    assert code == 0
    assert "decoding mesh: data=2 fsdp=1 expert=1 tensor=4" in said
    code, said = dno_plan(seven, "mesh.tensor=1", "mesh.fsdp=8", *eight)
    assert code == 2
    assert "training does not fit: a step takes at least" in said


def test_all_that_samples_is_planned(small):
    held_out = {"held_out_path": None}
    mixture = {
        "sampling": {**small["sampling"], "source": "mixture", "mixture_weight": 0.5},
        "pairing": {**small["pairing"], "opponents": "mixture"},
    }
    one, two = planned(small).sampling, planned(small, **mixture).sampling
    assert [plan.num_policies for plan in one.values()] == [1, 1]
    assert [plan.num_policies for plan in two.values()] == [2, 1]  # held-out responses are one policy's
    # Opponents are drawn in turn with the policy's own samples: two states, over the same two policies.
    turns = planned(small, **mixture | {"sampling": {**small["sampling"], "num_opponents": 1, "mixture_weight": 0.5}})
    both = turns.sampling["sample"]
    assert [(one.programs.sampling_params.num_samples, one.num_policies) for one in (both, *both.beside)] == [
        (4, 1),
        (1, 2),
    ]
    assert both.parts["weights"] == 2 * both.weight_bytes
    judge = {"kind": "self", "self_judge": {"max_prompt_length": 40, "max_new_tokens": 8}}
    judged = planned(small, annotation=judge, prompts={**small["prompts"], **held_out}).sampling
    assert list(judged) == ["sample", "annotate"]
    assert (judged["annotate"].programs.shape.prompt_length, judged["annotate"].programs.num_slots) == (40, 48)
    assert judged["annotate"].programs.sampling_params.num_samples == 3
    data = {"sampling": {**small["sampling"], "source": "data"}}
    found = planned(small, **data)
    assert list(found.sampling) == ["evaluate"]
    assert found.counts["iteration 0"].responses == 0


def test_where_nothing_samples_there_is_no_table_of_slots(small, dno_plan):
    tree = {
        **small,
        "sampling": {**small["sampling"], "source": "data"},
        "prompts": {**small["prompts"], "held_out_path": None},
    }
    code, said = dno_plan(tree)
    assert code == 0
    assert "iteration 0 6 " in said
    assert "sampling, on devices" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "12 parsecs"), r"--memory is '12 parsecs'; expected a number above 0 and a unit, such as"),
        (("--memory", "16"), "--memory is '16'; expected"),
        (("--memory", "0GiB"), "--memory is '0GiB'; expected a number above 0"),
        (("--memory", "-1GiB"), "--memory is '-1GiB'; expected"),
        (("--devices", "0", "--memory", "1GiB"), "--devices is 0; expected at least 1"),
        (("--devices", "256"), "--devices 256 are not asked for their memory: add --memory"),
        (("mesh.data=7",), "mesh (data=7, fsdp=1, expert=1, tensor=1) does not divide the 8 cpu devices"),
        (
            ("mesh.data=7", "--devices", "256", "--memory", "1GiB"),
            "mesh (data=7, fsdp=1, expert=1, tensor=1) does not divide the 256 planned devices",
        ),
        (("mesh.tensor=4",), "size 2 cannot be split over tensor=4 devices"),
        (("sampling.slots=0",), "sampling.slots: Input should be greater than or equal to 1"),
        (("sampling.kv_dtype=int4",), "sampling.kv_dtype: Input should be 'auto', 'float32'"),
        (("prompts.max_length=2048",), "sequences of up to 2064 tokens exceed the model's context of 64"),
        (
            ("training.packing=off", "training.micro_batch_size=2"),
            "training.micro_batch_size is 2 pairs of 2 texts, which the mesh's data*fsdp*expert=8",
        ),
        (("prompts.path=nowhere.jsonl",), "nowhere.jsonl: no such file"),
        (("model.path=nowhere",), "nowhere"),
    ],
)
def test_bad_input_is_named(small, dno_plan, arguments, message):
    code, said = dno_plan(small, *arguments)
    assert code == 2
    assert said.startswith("dno: ")
    assert message in said


def test_a_pod_is_planned_where_there_is_no_device_at_all(seven, folder):
    """With a platform that is not here, whatever touches a device fails."""
    config = folder / "pod.yaml"
    config.write_text(yaml.safe_dump(seven))
    environment = {**os.environ, "JAX_PLATFORMS": "rocm"}
    command = [sys.executable, "-m", "dno_jax", "plan", str(config)]
    with_pod = subprocess.run([*command, *POD], env=environment, capture_output=True, text=True)
    assert with_pod.returncode == 0, with_pod.stderr
    assert "devices: 256" in with_pod.stdout
    without = subprocess.run([*command, "--memory", "16GiB"], env=environment, capture_output=True, text=True)
    assert without.returncode == 1
    assert "Unable to initialize backend" in without.stderr


def fake_device(limit):
    device = mock.Mock(spec=jax.devices()[0])
    device.platform, device.device_kind = "gpu", "A Card"
    device.memory_stats.return_value = limit
    return device


def test_an_accelerator_has_what_its_allocator_may_take():
    devices = [fake_device({"bytes_limit": limit, "bytes_in_use": 3}) for limit in (900, 800, 900)]
    assert device_capacity(devices).bytes == 800
    assert device_capacity(devices).source == "what the gpu's allocator may take"
    for silent in ({}, None):
        with pytest.raises(DnoError, match="the gpu A Card does not say how much memory it has"):
            device_capacity([*devices, fake_device(silent)])


def test_processors_share_their_hosts_memory(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       32000 kB\nMemFree: 5 kB\nMemAvailable:   16000 kB\n")
    monkeypatch.setattr("dno_jax.runtime.capacity._MEMINFO", meminfo)
    one, eight = device_capacity(jax.devices()[:1]), device_capacity(jax.devices())
    assert (one.bytes, one.source) == (16000 * 1024, "the host's free memory")
    assert (eight.bytes, eight.source) == (2000 * 1024, "the host's free memory, shared by 8 devices")
    monkeypatch.setattr("dno_jax.runtime.capacity._MEMINFO", tmp_path / "none")  # as on a Mac
    elsewhere = device_capacity(jax.devices()[:1])
    assert elsewhere.source == "the host's memory"
    assert elsewhere.bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_sizes_are_read_in_decimal_and_binary_units():
    texts = {"1B": 1, "1.5kB": 1500, "2 MB": 2 * 10**6, "16GiB": 16 * 2**30, "1.5 KiB": 1536, "2TiB": 2**41}
    assert {text: read_bytes(text, option="--memory") for text in texts} == texts
    for text in ("", "GiB", "1", "1 gib", "1GiBs", "1e3GB", "1iB", "nan GiB"):
        with pytest.raises(DnoError, match="--memory is"):
            read_bytes(text, option="--memory")


JUDGE = {"model": "m", "api_key_env": None, "max_tokens": 200, "requests_per_minute": 60, "tokens_per_minute": 10**6}
PRICES = {"m": {"input": 10.0, "output": 20.0, "batch": 0.5}}


def judged(small, **changes):
    """The small configuration with a judge that is paid for."""
    annotation = {"kind": "openai", "openai": {**JUDGE, **changes.pop("openai", {})}, "prices": PRICES, **changes}
    return {**small, "annotation": annotation}


def recorded_demand(tree, section):
    """What a run would ask about pools of responses of 16 words: by every question itself, not by a plan."""
    config = parse_config(RunConfig, tree, place="test")
    tokenizer = load_tokenizer(config.model)
    function = build_function(section, seed=config.seed)
    requests = tokens = 0
    for part in split_prompts(config).training:
        for prompt in part:
            texts = [*[" ".join(WORDS[n : n + 16]) for n in range(4)], prompt.gold]
            pool = Pool(prompt, tuple(Candidate(str(n), text) for n, text in enumerate(texts)))
            rounds, verdicts = function.rounds(pool), None
            while not isinstance(questions := advance(rounds, verdicts), Judgement):
                verdicts = [Verdict("ok", (0.9, 0.1) if len(q.order) == 2 else (1.0,) * 5) for q in questions]
                requests += len(questions)
                for question in questions:
                    shown = [message["content"] for message in question.body["messages"]]
                    shown += [json.dumps(question.schema)] if question.schema else []
                    tokens += sum(map(tokenizer.num_tokens, shown))
    return requests, tokens


@pytest.mark.parametrize("form", ["listwise", "pairwise", "logprob"])
@pytest.mark.parametrize("schedule", ["all_pairs", "tournament"])
@pytest.mark.parametrize("more", [{}, {"both_orders": False}, {"num_orders": 3}])
def test_a_plan_counts_what_is_really_asked(small, form, schedule, more):
    tree = judged(small, openai={"form": form, "schedule": schedule, **more})
    tree["pairing"] = {**small["pairing"], "reward": "win_rate"}
    section = parse_config(RunConfig, tree, place="test").annotation
    parts = planned(tree).annotation.parts
    found = sum((parts[f"iteration {t}"].total for t in (0, 1)), Demand())
    requests, tokens = recorded_demand(tree, section)
    assert found.requests == requests == 12 * num_questions(section.openai, num_candidates=5)
    # The gold response of 9 words is shown as often as others only on average, and words at a text's ends may merge.
    assert found.tokens_in == pytest.approx(tokens, rel=0.02 if schedule == "tournament" else 0.002)
    assert found.tokens_out == requests * (1 if form == "logprob" else 200)


def test_dollars_and_hours_are_those_of_the_tokens_at_the_given_prices_and_limits(small):
    plan = planned(judged(small)).annotation
    one = plan.parts["iteration 0"]
    assert one.total.requests == 6
    assert one.usd == pytest.approx((one.total.tokens_in * 10.0 + one.total.tokens_out * 20.0) / 1e6)
    assert one.batch_usd == pytest.approx(0.5 * one.usd)
    assert one.hours == pytest.approx(6 / 60 / 60)
    slow = planned(judged(small, openai={"tokens_per_minute": 100})).annotation.parts["iteration 0"]
    assert slow.hours == pytest.approx((slow.total.tokens_in + slow.total.tokens_out) / 100 / 60)
    # two held-out samples of four prompts, every iteration
    assert plan.parts["held out"].total.requests == 2 * 4 * 2
    assert plan.parts["held out"].usd > 0.0
    assert plan.parts["held out"].batch_usd is None  # they are asked live
    pairs = plan.others["pairwise, all pairs"].total
    assert pairs.requests == 12 * 10 * 2
    assert plan.others["pairwise, tournament"].total.requests == 12 * 4 * 2
    assert plan.others["list-wise"].total.requests == 12
    assert plan.others["logprob, all pairs"].total.tokens_out == pairs.requests


def test_lengths_that_are_known_better_make_a_nearer_plan(small):
    config = parse_config(RunConfig, judged(small), place="test")
    most = plan_run(config).annotation.parts["iteration 0"].total
    near = plan_run(config, response_tokens=6, reply_tokens=50).annotation.parts["iteration 0"].total
    assert most.tokens_in - near.tokens_in == 6 * 4 * (16 - 6)
    assert (most.tokens_out, near.tokens_out) == (6 * 200, 6 * 50)


def test_everyone_who_is_paid_is_in_the_plan(small, folder):
    bare = write_prompts(folder / "bare.jsonl", 12, gold=False)
    judges = [{**JUDGE, "form": "pairwise"}, {**JUDGE, "model": "n", "form": "pairwise", "requests_per_minute": 6}]
    annotation = {
        "kind": "ensemble",
        "ensemble": judges,
        "teacher": {"model": "t", "api_key_env": None, "max_tokens": 30},
        "prices": {**PRICES, "n": {"input": 1.0, "output": 1.0}, "t": {"input": 0.0, "output": 1e6}},
        "quality": {"repeat": 0.5},
    }
    tree = {**small, "annotation": annotation, "prompts": {**small["prompts"], "path": str(bare)}}
    parts = planned(tree).annotation.parts
    assert list(parts) == ["iteration 0", "iteration 1", "asked again", "held out", "teacher"]
    # four samples and the teacher's response, ten pairs, two orders, two judges
    assert parts["iteration 0"].total.requests == 6 * 10 * 2 * 2
    assert parts["asked again"].total.requests == parts["iteration 0"].total.requests
    assert parts["iteration 0"].hours == pytest.approx(6 * 10 * 2 / 6 / 60)
    assert parts["teacher"].total.requests == 12
    assert parts["teacher"].usd == 12 * 30


def test_the_command_shows_what_judges_cost(small, dno_plan):
    code, said = dno_plan(judged(small, max_usd=3.0), "--response-tokens", "10")
    assert code == 0
    found = plan_run(parse_config(RunConfig, judged(small), place="test"), response_tokens=10).annotation
    total = found.parts["iteration 0"].total
    assert f"iteration 0 6 {total.tokens_in:,} 1,200 {found.parts['iteration 0'].usd:,.2f}" in said
    assert "pairwise, 240 " in said
    assert "annotation.max_usd is 3 dollars" in said
    unpriced = dno_plan(judged(small, prices={}))[1]
    assert "No price of m: give annotation.prices" in unpriced
    tokens = planned(judged(small)).annotation.parts["iteration 0"].total.tokens_in
    assert f"iteration 0 6 {tokens:,} 1,200 - -" in unpriced
    assert "dollars by batch" not in dno_plan(small)[1]
    assert dno_plan(small, "--reply-tokens", "0")[0] == 2
