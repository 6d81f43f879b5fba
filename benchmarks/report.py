"""How large the report of a large run is, and how long it takes to open: `python benchmarks/report.py`.

A run directory of 5,000 prompts is made up: three iterations, five samples a prompt of some 150 to 300 words that are
as often and as long as English ones, 500 held-out prompts answered by all four policies. Its reports are written as a
run writes them, three an iteration, keeping what they are made of, and each from nothing. The last page is opened in
headless Chromium (Debian's package), where it is installed: until the samples can be read, and until all plots are
drawn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dno_jax.config import RunConfig
from dno_jax.data.prompts import load_prompts
from dno_jax.report import plots
from dno_jax.report.kept import Kept
from dno_jax.report.page import write_report
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import stage_names
from tests.report.chromium import DRAWN, SHOWN, chromium, opened
from tests.report.synthetic import build


async def _open(program: str, page: Path, *, times: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds, each in a browser of its own, until samples are shown, plots are drawn, and all samples are unpacked.

    By the clock, and of the page's process alone, which other work on the machine does not lengthen.
    """
    first = "document.querySelectorAll('#list li').length > 0"
    found: dict[str, list[tuple[float, float]]] = {"first_samples": [], "plots": [], "all_samples": []}
    for _ in range(times):
        for name, until in (("first_samples", first), ("plots", DRAWN), ("all_samples", SHOWN)):
            if name == "plots" and not plots.installed():
                continue
            async with opened(program) as tab:
                await tab.look()
                await tab.call("Performance.enable")
                seconds = await tab.open(page, until=until)
                metrics = {one["name"]: one["value"] for one in (await tab.call("Performance.getMetrics"))["metrics"]}
                found[name].append((round(seconds, 2), round(metrics["ProcessTime"], 2)))
    return found


def _written(config: RunConfig, run_dir: RunDir, *, keeps: bool) -> list[float]:
    """Seconds of processor time of every report of a run, stage by stage."""
    held_out = load_prompts(str(config.prompts.held_out_path))
    stages = [run_dir.stage(name, t) for t in range(config.iterations) for name in stage_names(config, t)]
    manifests = {stage: stage.manifest_path.read_text() for stage in stages}
    for stage in stages:
        stage.manifest_path.unlink()
    kept, found = Kept(), []
    for stage, manifest in manifests.items():
        stage.manifest_path.write_text(manifest)
        if stage.stage in ("annotate", "train", "evaluate"):
            start = time.process_time()
            write_report(run_dir, config, pictures=False, held_out=held_out, kept=kept if keeps else None)
            found.append(round(time.process_time() - start, 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--words", type=int, default=300, help="of the longest answers; the shortest have half as many")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config, run_dir = build(
            Path(folder) / "run",
            prompts=options.prompts,
            held_out=options.prompts // 10,
            iterations=3,
            samples=options.samples,
            words=40,
            answer_words=options.words,
            steps=500,
        )
        texts = sum(path.stat().st_size for path in Path(run_dir.path).rglob("rollouts/*.jsonl"))
        plots.library() if plots.installed() else None
        by_stage = {
            "kept": _written(config, run_dir, keeps=True),
            "from_nothing": _written(config, run_dir, keeps=False),
        }
        start, cpu = time.perf_counter(), time.process_time()
        page = Path(write_report(run_dir, config))
        written = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        program = chromium()
        found = asyncio.run(_open(program, page, times=options.times)) if program else "chromium is not installed"
        print(
            json.dumps(
                {
                    "prompts": options.prompts,
                    "rollouts_mb": round(texts / 1e6, 1),
                    "page_mb": round(page.stat().st_size / 1e6, 2),
                    "written_by_stage_cpu": by_stage,
                    "written": written,
                    "opened_seconds_and_cpu": found,
                    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    "plots": plots.installed(),
                    "machine": platform.processor() or platform.machine(),
                }
            )
        )


if __name__ == "__main__":
    main()
