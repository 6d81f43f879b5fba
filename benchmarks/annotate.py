"""What the host costs beside the judge: `python benchmarks/annotate.py rate|memory|overlap`.

rate     requests per second of the annotate stage (shards, prompts, limits, parsing, store, judgements and the figures
         of the judge's quality included) and of the bare AsyncOpenAI client, in turn, against one `dno fake-judge`,
         list-wise and pairwise, without limits of ours and with all of them
memory   the stage's peak memory over ever more candidates, in a process of its own each
overlap  wall time of sampling and annotating side by side against the longer of the two alone, with a judge that takes
         half as long as sampling: of a sampler on this machine's cores, and of one that waits as for an accelerator
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from dno_jax.annotation.judges.functions import build_function
from dno_jax.config import RunConfig, load_config, parse_config
from dno_jax.data.pools import by_prompt, pools_of
from dno_jax.files import write_atomically
from dno_jax.records import Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stages import annotate

_TALE = "a tale of the small red fox who went over the hill to find what lay there and came home late"
_SHARD = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rate", "memory", "overlap"))
    parser.add_argument("--pools", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--words", type=int, default=100, help="of a candidate")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", default="configs/demo.yaml", help="of overlap: model, prompts and sampling")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="of overlap: over the config")
    parser.add_argument("--copies", type=int, default=8, help="of overlap: each prompt so often")
    parser.add_argument("--seconds", type=float, default=30.0, help="of overlap: that the sampler on a clock takes")
    parser.add_argument("--stage-alone", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.stage_alone:
            stage_alone(Path(options.stage_alone), options)
        elif options.what == "rate":
            rate(Path(folder), options)
        elif options.what == "memory":
            memory(Path(folder), options)
        else:
            overlap(Path(folder), options)
            overlap_on_a_clock(Path(folder), options)


def rate(folder: Path, options: argparse.Namespace) -> None:
    """By form, and with every limit that there is, none of which is met."""
    limits = {"requests_per_minute": 10**9, "tokens_per_minute": 10**9}
    money = {"prices": {"fake": {"input": 1e-3, "output": 1e-3}}, "max_usd": 1e9}
    for form in ("listwise", "pairwise"):
        for limited in (False, True):
            openai = {"form": form, **(limits if limited else {})}
            annotation = {"openai": openai, **(money if limited else {})}
            requests = 1 if form == "listwise" else options.candidates * (options.candidates - 1)
            few = argparse.Namespace(**vars(options) | {"pools": max(1, options.pools // requests)})
            rate_of(folder / f"{form}-{limited}", few, annotation, form=form, limited=limited)


def rate_of(folder: Path, options: argparse.Namespace, annotation: Mapping[str, Any], **named: Any) -> None:
    bare_rates, stage_rates = [], []
    with fake_judge() as url:
        for repeat in range(options.repeats):
            config = sampled(folder / str(repeat), options, url=url, annotation=annotation)
            bodies = bodies_of(config)
            requests = len(bodies)
            start = time.perf_counter()
            asyncio.run(ask_bare(url, bodies, in_flight=options.in_flight))
            bare_rates.append(requests / (time.perf_counter() - start))
            del bodies
            start = time.perf_counter()
            manifest = annotate.run(config, RunDir(config.run_dir), 0)
            stage_rates.append(requests / (time.perf_counter() - start))
            assert manifest.details["states"] == {"ok": options.pools}
    ratios = [own / bare for own, bare in zip(stage_rates, bare_rates, strict=True)]
    report(
        "annotate rate",
        **named,
        pools=options.pools,
        candidates=options.candidates,
        in_flight=options.in_flight,
        bare_requests_a_second=[round(found, 1) for found in bare_rates],
        stage_requests_a_second=[round(found, 1) for found in stage_rates],
        candidates_a_second=round(max(stage_rates) * options.pools / requests * options.candidates, 1),
        ratios=[round(ratio, 3) for ratio in ratios],
    )


def memory(folder: Path, options: argparse.Namespace) -> None:
    with fake_judge() as url:
        for factor in (1, 4, 16):
            pools = options.pools * factor // 4
            config = sampled(folder / str(factor), argparse.Namespace(**vars(options) | {"pools": pools}), url=url)
            write_atomically(folder / str(factor) / "config.json", config.model_dump_json())
            command = [sys.executable, __file__, "memory", "--stage-alone", str(folder / str(factor))]
            subprocess.run(command, check=True)


def stage_alone(folder: Path, options: argparse.Namespace) -> None:
    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    before = peak_mib()
    start = time.perf_counter()
    manifest = annotate.run(config, RunDir(config.run_dir), 0)
    report(
        "annotate memory",
        pools=manifest.rows,
        seconds=round(time.perf_counter() - start, 1),
        peak_before_mib=before,
        peak_mib=peak_mib(),
    )


def overlap(folder: Path, options: argparse.Namespace) -> None:
    """A judge whose answers take half of what sampling takes: then both together are nearly free."""
    from dno_jax.runtime.runtime import Runtime
    from dno_jax.stages import sample
    from dno_jax.stages.overlap import sample_and_annotate
    from dno_jax.stages.preflight import prepared

    def config_of(name: str, **openai: Any) -> RunConfig:
        config = load_config(RunConfig, options.config, options.set)
        tree = config.model_dump(mode="json", exclude_unset=True)
        prompts = folder / "prompts.jsonl"
        if not prompts.exists():
            write_atomically(prompts, _copied(Path(config.prompts.path), options.copies))
        tree["run_dir"] = str(folder / name)
        tree["prompts"] |= {"path": str(prompts), "split": "shared"}
        tree["sampling"] |= {"shard_prompts": _SHARD}
        tree["annotation"] = {"kind": "openai", "openai": {"model": "fake", "api_key_env": None, **openai}}
        tree["pairing"] = {"reward": "score", "positive_floor": 3, "margin": 1, "student_margin": 1}
        return parse_config(RunConfig, tree, place="the benchmark")

    nobody = "http://127.0.0.1:9/v1"
    warm = config_of("warm", base_url=nobody)
    with prepared(Runtime.start(warm)):
        sample.run(Runtime.start(warm), 0)  # compiles
    for repeat in range(options.repeats):
        alone = config_of(f"alone-{repeat}", base_url=nobody)
        runtime = Runtime.start(alone)
        with prepared(runtime):
            start = time.perf_counter()
            rows = sample.run(runtime, 0).rows
        sampling = time.perf_counter() - start
        pools = len(by_prompt(list(RunDir(alone.run_dir).stage("sample", 0).read(Rollout))))
        latency = 0.5 * sampling * options.in_flight / pools
        with fake_judge(f"delay={latency:.4f}") as url:
            judged = config_of(f"alone-{repeat}", base_url=url, max_concurrency=options.in_flight)
            start = time.perf_counter()
            annotate.run(judged, RunDir(judged.run_dir), 0)
            annotating = time.perf_counter() - start
            both = config_of(f"both-{repeat}", base_url=url, max_concurrency=options.in_flight)
            runtime = Runtime.start(both)
            with prepared(runtime):
                start = time.perf_counter()
                sample_and_annotate(runtime, 0)
                together = time.perf_counter() - start
        report(
            "annotate overlap",
            rollouts=rows,
            pools=pools,
            in_flight=options.in_flight,
            judge_latency=round(latency, 3),
            sampling_seconds=round(sampling, 2),
            annotating_seconds=round(annotating, 2),
            together_seconds=round(together, 2),
            over_the_longer=round(together / max(sampling, annotating), 3),
        )


def overlap_on_a_clock(folder: Path, options: argparse.Namespace) -> None:
    """What overlap itself costs: a sampler that writes its shards on time, and needs the host for nothing else."""
    latency = 0.5 * options.seconds * options.in_flight / options.pools
    for repeat in range(options.repeats):
        with fake_judge(f"delay={latency:.4f}") as url:
            config = sampled(folder / f"clock-alone-{repeat}", options, url=url)
            start = time.perf_counter()
            annotate.run(config, RunDir(config.run_dir), 0)
            annotating = time.perf_counter() - start
        with fake_judge(f"delay={latency:.4f}") as url:
            together = _together_on_a_clock(folder / f"clock-{repeat}", options, url=url)
        report(
            "annotate overlap on a clock",
            pools=options.pools,
            in_flight=options.in_flight,
            judge_latency=round(latency, 3),
            sampling_seconds=options.seconds,
            annotating_seconds=round(annotating, 2),
            together_seconds=round(together, 2),
            over_the_longer=round(together / max(options.seconds, annotating), 3),
        )


def _together_on_a_clock(folder: Path, options: argparse.Namespace, *, url: str) -> float:
    """Seconds of sampling and annotating side by side, where sampling is waiting for the time of the next shard."""
    from unittest import mock

    from dno_jax.runtime.runtime import Runtime
    from dno_jax.stages import sample
    from dno_jax.stages.overlap import sample_and_annotate

    config = to_sample(folder, options, url=url)
    shards = list(shards_of(options))

    def on_a_clock(*_: Any, **__: Any) -> None:
        stage = RunDir(config.run_dir).stage("sample", 0)
        for number, (name, rollouts) in enumerate(shards, start=1):
            time.sleep(max(0.0, start + options.seconds * number / len(shards) - time.perf_counter()))
            stage.write_shard(name, rollouts)
        stage.finish(config, inputs={}, rows=options.pools * options.candidates, seconds=0.0)

    runtime = Runtime.start(config)
    with mock.patch.object(sample, "run", on_a_clock):
        start = time.perf_counter()
        sample_and_annotate(runtime, 0)
        return time.perf_counter() - start


def _copied(path: Path, copies: int) -> str:
    """Every prompt of a file several times, under names of its own."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    named = [row | {"prompt_id": f"{row['prompt_id']}-{copy}"} for copy in range(copies) for row in rows]
    return "".join(json.dumps(row) + "\n" for row in named)


@contextmanager
def fake_judge(*settings: str) -> Iterator[str]:
    """Serve a judge in a process of its own, and yield its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dno_jax", "fake-judge", "prefers=longest", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def sampled(
    folder: Path, options: argparse.Namespace, *, url: str, annotation: Mapping[str, Any] | None = None
) -> RunConfig:
    """Write a run directory whose sampling is finished; return its configuration, with the fake judge as its judge."""
    config = to_sample(folder, options, url=url, annotation=annotation)
    stage = RunDir(config.run_dir).stage("sample", 0)
    for name, rollouts in shards_of(options):
        stage.write_shard(name, rollouts)
    stage.finish(config, inputs={}, rows=options.pools * options.candidates, seconds=0.0)
    return config


def to_sample(
    folder: Path, options: argparse.Namespace, *, url: str, annotation: Mapping[str, Any] | None = None
) -> RunConfig:
    """Write a run directory with prompts that are still to be sampled."""
    fields = dict(annotation or {})
    asked = {"model": "fake", "base_url": url, "api_key_env": None, "max_concurrency": options.in_flight}
    config = RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": str(folder)},
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "sampling": {"shard_prompts": _SHARD},
            "annotation": {"kind": "openai", **fields, "openai": {**asked, **fields.get("openai", {})}},
            "pairing": {"reward": "win_rate", "rule": "all"},
        }
    )
    lines: list[str] = []
    for names in _prompt_names(options):
        for name in names:
            messages = ({"role": "user", "content": f"Question {name}: {_text(name, 30)}?"},)
            lines.append(Prompt.model_validate({"prompt_id": name, "messages": messages}).model_dump_json() + "\n")
    write_atomically(RunDir(config.run_dir).prompts_path(0), "".join(lines))
    return config


def shards_of(options: argparse.Namespace) -> Iterator[tuple[str, list[Rollout]]]:
    """Yield shards by name."""
    for number, names in enumerate(_prompt_names(options)):
        rollouts = [_rollout(name, k, options.words) for name in names for k in range(options.candidates)]
        yield f"{number * _SHARD:07d}", rollouts


def _prompt_names(options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the prompts of each shard."""
    for first in range(0, options.pools, _SHARD):
        yield [f"p{number:07d}" for number in range(first, min(first + _SHARD, options.pools))]


def _rollout(name: str, sample: int, words: int) -> Rollout:
    return Rollout(
        rollout_id=f"000/{name}/{sample}",
        prompt_id=name,
        sample=sample,
        source="policy",
        policy=0,
        text=_text(f"{name} {sample}", words - 2 * sample),
        token_ids=tuple(range(words)),
        prompt_token_ids=tuple(range(40)),
        logprob=-1.0,
        finish="stop",
    )


def _text(name: str, words: int) -> str:
    start, tale = sum(map(ord, name)), _TALE.split()
    return f"{name} " + " ".join(tale[(start + place) % len(tale)] for place in range(words))


def bodies_of(config: RunConfig) -> list[Mapping[str, Any]]:
    """The very requests that the stage sends, made beforehand."""
    function = build_function(config.annotation, seed=config.seed)
    run_dir = RunDir(config.run_dir)
    prompts = {
        prompt.prompt_id: prompt
        for prompt in map(Prompt.model_validate_json, run_dir.prompts_path(0).read_text().splitlines())
    }
    bodies: list[Mapping[str, Any]] = []
    for shard in run_dir.stage("sample", 0).shard_names():
        rollouts = run_dir.stage("sample", 0).read_shard(Rollout, shard)
        for pool in pools_of(rollouts, prompts, dropped=Counter()):
            bodies += [question.body for question in next(function.rounds(pool))]
    return bodies


async def ask_bare(url: str, bodies: Sequence[Mapping[str, Any]], *, in_flight: int) -> None:
    """What anyone would write: the client, a semaphore's worth of tasks, the reply's text."""
    import openai

    left = iter(bodies)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def work() -> None:
            for body in left:
                reply = await client.chat.completions.create(**body)
                assert reply.choices[0].message.content

        await asyncio.gather(*(work() for _ in range(in_flight)))


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def report(bench: str, **figures: Any) -> None:
    """Print one JSON line with the figures and the versions."""
    versions = {name: metadata.version(name) for name in ("openai", "pydantic")}
    line = {"bench": bench, **figures, "cores": os.cpu_count(), "python": platform.python_version(), **versions}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
