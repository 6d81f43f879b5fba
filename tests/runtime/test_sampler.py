"""The sample stage over its engines: stop strings, records, a server's answers, and what a mesh is cut into."""

import contextlib
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.parallel.mesh import AXES, make_mesh, own_submesh, submeshes_of
from dno_jax.records import Judgement, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime import sampler, slots
from dno_jax.runtime.runtime import Runtime
from dno_jax.stage_dir import StageDir
from dno_jax.stages import annotate, pair, sample
from tests.pairs import read_pairs
from tests.running import prepare, run_iteration, run_stage
from tests.sampling.completion_server import CompletionServer


def drawn(config):
    prepare(config)
    manifest = run_stage(sample, config, 0)
    rows = RunDir(config.run_dir).stage("sample", 0).read(Rollout)
    return manifest, {row.rollout_id: row for row in rows}


def test_stop_strings_end_responses_in_text_and_ids(make_config, tmp_path):
    _, whole = drawn(make_config(sampling={"audit_prompts": 0}))
    words = [word for row in whole.values() if row.source == "policy" for word in row.text.split()[1:]]
    stop = max(set(words), key=words.count)
    changes = {"sampling": {"stop": [stop, "no such word"]}, "run_dir": str(tmp_path / "cut")}
    manifest, found = drawn(make_config(**changes))  # the audit holds for what is left of them
    cut = 0
    for name, row in found.items():
        before = whole[name]
        if row.source != "policy" or stop not in before.text:
            assert row == before
            continue
        cut += 1
        assert row.text == before.text[: before.text.index(stop)]
        assert row.finish == "stop"
        assert row.token_ids == before.token_ids[: len(row.token_ids)]
        assert row.logprob is not None
        assert before.logprob is not None
        assert row.logprob >= before.logprob  # fewer tokens
    assert cut > 3
    assert manifest.details["audit"]["error"] < 1e-4


def test_what_was_drawn_from_is_recorded_on_request(make_config):
    manifest, found = drawn(make_config(sampling={"record_drawn_logprob": True, "temperature": 0.7, "top_p": 0.8}))
    own = [row for row in found.values() if row.source == "policy"]
    assert own
    for row in own:
        assert row.drawn_logprob is not None
        assert row.logprob is not None
        assert row.logprob < row.drawn_logprob <= 0.0  # the truncated distribution has its mass on fewer tokens
    assert all(row.drawn_logprob is None for row in found.values() if row.source == "gold")
    slots = manifest.details["slots"]
    assert 0 < slots["utilisation"] <= 1
    assert slots["slots"] >= 1


@pytest.mark.soak
def test_the_longest_text_is_bounded(make_config):
    """Prompt and response together, the teacher's too; also where it is shorter than what a prompt may have."""
    config = make_config(prompts={"max_length": 80}, sampling={"max_total_tokens": 12})
    _, found = drawn(config)
    for source in ("policy", "gold"):
        own = [row for row in found.values() if row.source == source]
        assert max(len(row.prompt_token_ids) + len(row.token_ids) for row in own) == 12
    cut = [row for row in found.values() if row.source == "gold" and row.finish == "length"]
    assert cut
    assert all(len(row.text.split()) == len(row.token_ids) for row in cut)  # the judge reads what is trained on
    run_iteration(config, 0)  # training takes rows of 12 tokens at most


@pytest.mark.parametrize("total", [5, 12, None])
def test_candidates_of_the_data_are_cut_where_a_response_would_be(make_config, tmp_path, total):
    given = [{"text": "das det " * 6}, {"text": "gam"}]
    rows = [{"prompt": f"bam ban {last}", "candidates": given} for last in ("bat", "bes")]
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = drawn(
        make_config(
            prompts={"path": str(path), "held_out_path": None},
            sampling={"source": "data", "max_new_tokens": 10, "max_total_tokens": total},
        )
    )
    limit = {5: 1, 12: 8, None: 10}[total]  # a prompt has four tokens
    long, short = (next(row for row in found.values() if row.sample == sample) for sample in (0, 1))
    assert (len(long.prompt_token_ids), len(long.token_ids), long.finish) == (4, limit, "length")
    assert long.text.split() == ("das det " * 6).split()[:limit]
    assert (len(short.token_ids), short.finish) == ((1, "length") if limit == 1 else (2, "stop"))


@pytest.mark.parametrize("dialect", ["vllm", "plain"])
def test_a_server_gives_the_same_records(make_config, dialect):
    """Our checkpoint, decoded behind HTTP: the run samples from it, and the audit compares what it says."""
    config = make_config()
    path = config.model.path
    model_config, params = hf.load(path)
    tokenizer = ChatTokenizer.load(path, "raw")

    @jax.jit
    def read(token):
        hidden, _ = Decoder(model_config).apply({"params": params}, token, jnp.arange(48, dtype=jnp.int32)[None])
        return logits(model_config, params, hidden)[0]

    def row(ids):
        padded = jnp.asarray([[*ids, *[0] * (48 - len(ids))]], jnp.int32)
        return np.asarray(read(padded))[len(ids) - 1].astype(np.float64)

    with CompletionServer(
        row,
        text_of=tokenizer.decode,
        ids_of=lambda text: tokenizer.text_ids(text)[1:],
        end_ids=tokenizer.end_ids,
        dialect=dialect,
    ) as server:
        section = {"base_url": server.url, "max_tries": 20, "logprobs": "raw"}
        served = make_config(sampling={"engine": "openai", "server": section})
        manifest, found = drawn(served)
        asked = len(server.sampled)
        assert run_stage(sample, served, 0) == manifest
        assert len(server.sampled) == asked  # nothing is asked for twice
    own = [row for row in found.values() if row.source == "policy"]
    assert len(own) == 6 * 4  # 12 prompts in two iterations, K = 4
    assert {row.sample for row in own} == {0, 1, 2, 3}
    assert all(row.policy == 0 and (row.logprob is None) == (dialect == "plain") for row in own)
    assert manifest.details["server"]["responses"] == len(own)
    if dialect == "vllm":
        assert manifest.details["audit"]["error"] < 1e-4
    assert any(row.source == "gold" for row in found.values())


def test_a_server_that_is_not_there_leaves_nothing(make_config):
    config = make_config(sampling={"engine": "openai", "server": {"base_url": "http://127.0.0.1:9/v1", "max_tries": 1}})
    prepare(config)
    with pytest.raises(DnoError, match="completion server"):
        run_stage(sample, config, 0)
    stage = RunDir(config.run_dir).stage("sample", 0)
    assert stage.manifest() is None
    assert not stage.shard_names()


@contextlib.contextmanager
def filtering_server(config, *, prompts):
    """Serve any policy, and filter, always, what it says to the first prompts that it is asked."""
    tokenizer = ChatTokenizer.load(config.model.path, "raw")
    num_ids, lost = tokenizer.vocab_size, []

    def alter(reply):
        prompt = server.sampled[-1]["prompt"]
        if len(lost) < prompts and prompt not in lost:
            lost.append(prompt)
        if prompt in lost:
            reply["choices"][0]["finish_reason"] = "content_filter"
        return reply

    with CompletionServer(
        lambda ids: np.where(np.arange(num_ids) < 4, -1e9, 0.0),
        text_of=tokenizer.decode,
        ids_of=lambda text: tokenizer.text_ids(text)[1:],
        end_ids=tokenizer.end_ids,
        alter=alter,
    ) as server:
        yield server


def test_a_restart_plans_slots_for_the_whole_list(make_config, monkeypatch):
    """As many rows as before: products of fewer may round otherwise."""
    planned, real = [], sampler.plan
    monkeypatch.setattr(sampler, "plan", lambda runtime, wanted: planned.append(wanted) or real(runtime, wanted))
    config = make_config(sampling={"shard_prompts": 1})
    prepare(config)
    run_stage(sample, config, 0)
    stage = RunDir(config.run_dir).stage("sample", 0)
    stage.manifest_path.unlink()
    for name in stage.shard_names()[1:]:
        (stage.path / f"{name}.jsonl").unlink()
    run_stage(sample, config, 0)
    before, after = planned
    assert before == after
    assert before.num_prompts > 1


def asking(make_config, server, *, max_refused):
    """A run that asks one thing at a time; a shard of it is a prompt."""
    section = {"base_url": server.url, "max_concurrency": 1, "max_tries": 2, "max_refused": max_refused}
    return make_config(
        sampling={"engine": "openai", "server": section, "shard_prompts": 1, "audit_prompts": 0, "num_samples": 2}
    )


def test_prompts_without_usable_answers_are_counted_and_not_asked_again(make_config, monkeypatch):
    """A shard of which nothing could be kept is closed all the same; what comes after does without its prompts."""
    with filtering_server(make_config(), prompts=1) as server:
        config = asking(make_config, server, max_refused=0.5)
        prepare(config)
        real = StageDir.finish
        monkeypatch.setattr(StageDir, "finish", lambda *_, **__: 1 / 0)  # a kill before the manifest
        with pytest.raises(ZeroDivisionError):
            run_stage(sample, config, 0)
        monkeypatch.setattr(StageDir, "finish", real)
        asked = len(server.sampled)
        manifest = run_stage(sample, config, 0)
        assert len(server.sampled) == asked
    stage = RunDir(config.run_dir).stage("sample", 0)
    assert len(stage.shard_names()) == 6
    assert sum(not stage.read_shard(Rollout, name) for name in stage.shard_names()) == 1
    assert manifest.dropped == {"no usable response from the server": 1}  # its gold response was good
    run_stage(annotate, config, 0)
    judged = {judgement.prompt_id for judgement in RunDir(config.run_dir).stage("annotate", 0).read(Judgement)}
    assert len(judged) == 5
    run_stage(pair, config, 0)
    assert {row.prompt_id for row in read_pairs(RunDir(config.run_dir).stage("pair", 0))} <= judged


class Killed(Exception):
    pass


def kill_after(shards):
    """What ends a run when it has closed so many shards."""
    left = iter(range(shards - 1))

    def closed():
        if next(left, None) is None:
            raise Killed

    return closed


def test_a_share_of_refused_prompts_is_one_of_all_prompts_also_after_a_restart(make_config):
    with filtering_server(make_config(), prompts=1) as server:
        config = asking(make_config, server, max_refused=0.2)
        prepare(config)
        with pytest.raises(Killed):
            run_stage(sample, config, 0, after_shard=kill_after(4))
        # What is left is the prompt that was refused and one more: half of them, and a sixth of all.
        manifest = run_stage(sample, config, 0)
        assert manifest.dropped["no usable response from the server"] == 1
        assert manifest.rows == 5 * 3  # two of the policy and the teacher's


def test_refused_prompts_of_closed_shards_count(make_config):
    with filtering_server(make_config(), prompts=2) as server:
        config = asking(make_config, server, max_refused=0.4)
        prepare(config)
        with pytest.raises(Killed):
            run_stage(sample, config, 0, after_shard=kill_after(5))  # one of the two that have no rows
        stage = RunDir(config.run_dir).stage("sample", 0)
        assert sum(not stage.read_shard(Rollout, name) for name in stage.shard_names()) == 1
        asked = len(server.sampled)
        with pytest.raises(DnoError, match=r"no usable response to 1 of 6 prompts.*max_refused=0\.1 allows; raise it"):
            run_stage(sample, asking(make_config, server, max_refused=0.1), 0)
        assert len(server.sampled) == asked
        with pytest.raises(DnoError, match=r"no usable response to 2 of 6 prompts.*'refused: content filter': 4"):
            run_stage(sample, asking(make_config, server, max_refused=0.2), 0)
        assert run_stage(sample, config, 0).dropped["no usable response from the server"] == 2


def refuse_to_write(monkeypatch, *, shard):
    """Make the disk full when a shard is to be written."""
    write = StageDir.write_shard

    def full(stage, name, records):
        if name == shard:
            raise OSError("no space left on device")
        write(stage, name, records)

    monkeypatch.setattr(StageDir, "write_shard", full)


def test_a_writer_that_fails_stops_the_requests_to_the_server(make_config, monkeypatch):
    tokenizer = ChatTokenizer.load(make_config().model.path, "raw")
    num_ids, failed = tokenizer.vocab_size, threading.Event()

    def delay(body):
        if len(server.sampled) > 8:  # the third prompt is answered when the second could not be written
            failed.wait(60.0)
        return 0.0

    with CompletionServer(
        lambda ids: np.where(np.arange(num_ids) < 4, -1e9, 0.0),
        text_of=tokenizer.decode,
        ids_of=lambda text: tokenizer.text_ids(text)[1:],
        end_ids=tokenizer.end_ids,
        delay=delay,
    ) as server:
        section = {"base_url": server.url, "max_concurrency": 1}
        config = make_config(sampling={"engine": "openai", "server": section, "shard_prompts": 1})
        prepare(config)
        refuse_to_write(monkeypatch, shard="0000001")
        with pytest.raises(OSError, match="no space left") as error:
            run_stage(sample, config, 0)
        failed.set()
        assert not [thread for thread in threading.enumerate() if thread.name == "completions"]
    assert error.tb is not None  # it holds the frames that asked: nothing ended them but their being closed
    assert len(server.sampled) in (8, 9)  # of 24: six prompts, K = 4
    assert RunDir(config.run_dir).stage("sample", 0).shard_names() == ["0000000"]


def test_a_writer_that_fails_ends_the_device_programs_of_all_draws(make_config, monkeypatch):
    real, open_streams, sources = sampler.generate, [], []

    def generate(*args, mixture, **fields):
        source = "policy" if mixture is None else "mixture"
        sources.append(source)
        open_streams.append(source)
        try:
            yield from real(*args, mixture=mixture, **fields)
        finally:
            open_streams.remove(source)

    monkeypatch.setattr(sampler, "generate", generate)
    config = make_config(
        sampling={"shard_prompts": 1, "slots": 1, "num_opponents": 1, "mixture_weight": 0.5},
        pairing={"opponents": "mixture"},
    )
    prepare(config)
    refuse_to_write(monkeypatch, shard="0000001")
    with pytest.raises(OSError, match="no space left") as error:
        run_stage(sample, config, 0)
    assert sources == ["policy", "mixture"]
    assert not open_streams
    assert error.tb is not None  # as above


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_the_number_of_slots_is_free_within_a_run(make_config, tmp_path, slots):
    config = make_config()
    _, whole = drawn(config)
    other = make_config(sampling={"slots": slots, "chunk_steps": 5}, run_dir=str(tmp_path / "other"))
    manifest, found = drawn(other)
    assert manifest.details["slots"]["slots"] == slots
    assert {name: row.token_ids for name, row in found.items()} == {name: row.token_ids for name, row in whole.items()}


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        ([[0, 0], [0, 0], [1, 1], [1, 1]], [((0,), (0, 1)), ((1,), (2, 3))]),
        ([[0, 0], [1, 1], [0, 0], [1, 1]], [((0,), (0, 2)), ((1,), (1, 3))]),
        ([[0, 0, 1, 1]], [((0, 1), (0,))]),  # one model lies across two hosts
        ([[0, 1], [1, 2], [3, 3]], [((0, 1, 2), (0, 1)), ((3,), (2,))]),
    ],
)
def test_a_mesh_is_cut_where_no_model_is(process, expected):
    """Processes run apart where none of them has only a part of a model that another has the rest of."""
    assert submeshes_of(np.asarray(process)[:, None]) == expected


def test_one_process_has_the_whole_mesh():
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    submesh = own_submesh(mesh)
    assert (submesh.index, submesh.count, submesh.leads) == (0, 1, True)
    assert submesh.mesh.axis_names == AXES
    assert dict(submesh.mesh.shape) == {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2}
    assert list(submesh.mesh.devices.flat) == list(mesh.devices.flat)


def test_processes_that_share_a_model_decode_the_fewest_slots_that_one_of_them_found(make_config, monkeypatch):
    """All processes ask, as soon as two of them share a model: also this one, whose part is its own."""
    runtime = Runtime.start(make_config(sampling={"slots": 3}))
    wanted = slots.Wanted.responses(runtime.config, num_samples=4, num_prompts=6)
    asked = []

    def found_by_all(mine):
        asked.append(int(mine))
        return np.asarray([2, 1])  # the second process is none of this part's

    monkeypatch.setattr(slots, "gather_from_processes", found_by_all)
    assert slots.plan(runtime, wanted).slots == 3
    assert not asked
    monkeypatch.setattr(slots.jax, "process_count", lambda: 2)
    assert slots.plan(runtime, wanted).slots == 2
    assert asked == [3]
