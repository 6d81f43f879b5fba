"""What one card can say of this project, in one JSON file; see accelerator.sh, which calls this.

Each part is a process of its own, with a time limit: one that fails, or does not fit, leaves the others' figures. What
is over --minutes is not begun, and is said to be left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# A part may take this long at most; the first are the most important.
_LIMIT_SECONDS = 150.0


@dataclass(frozen=True)
class Part:
    name: str
    arguments: tuple[str, ...]  # of the interpreter


def parts(*, small: bool, folder: Path) -> list[Part]:
    """What is run, in this order, until the time is over."""

    def bench(name: str, script: str, *arguments: str) -> Part:
        return Part(name, (str(ROOT / "benchmarks" / f"{script}.py"), *arguments))

    demo = ("-m", "dno_jax", "run", str(ROOT / "configs" / "demo.yaml"), f"run_dir={folder / 'demo'}", "iterations=1")
    if small:
        train = ("--dtype", "float32", "--batch", "2", "--prompt", "32", "--response", "32", "--steps", "2")
        sample = ("--num-prompts", "4", "--samples", "2", "--new", "16", "--slots", "8", "--repeats", "1")
        kernel = ("--batch", "2", "--length", "128", "--heads", "4", "--kv-heads", "2", "--dtype", "float32")
        return [
            bench("attention", "attention", *kernel, "--repeats", "2"),
            bench("train 25M", "train", "--model", "llama25m", *train),
            bench("decode 25M", "sample", "--model", "llama25m", *sample),
            Part("demo", (*demo, "sampling.num_samples=2")),
        ]
    narrow = ("--dtype", "bfloat16")
    train = (
        *narrow,
        "--layout",
        "padded",
        "--attention",
        "own",
        "--prompt",
        "256",
        "--response",
        "768",
        "--steps",
        "6",
        "--chunk",
        "8192",
    )
    sample = (*narrow, "--prompt", "256", "--new", "256", "--samples", "4", "--repeats", "2", "--top-p", "0.95")
    return [
        bench("attention", "attention", "--batch", "8", "--length", "2048", "--window", "1024"),
        bench("train 1B", "train", "--model", "1b", "--batch", "16", *train),
        bench("decode 1B", "sample", "--model", "1b", "--num-prompts", "64", "--slots", "256", *sample),
        bench("train 7B", "train", "--model", "7b", "--batch", "4", *train),
        bench("decode 7B", "sample", "--model", "7b", "--num-prompts", "32", "--slots", "128", *sample),
        Part("demo", demo),
    ]


def run(part: Part, *, seconds: float) -> dict[str, Any]:
    """Run one part; return its JSON lines, and how it ended where that was not well."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"seconds": round(time.monotonic() - start, 1), "failed": f"not at an end after {seconds:.0f} s"}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        found["figures"] = lines
    if done.returncode:
        found["failed"] = f"exit status {done.returncode}: {done.stderr.strip()[-1500:]}"
    return found


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that are asked for first."""
    told: dict[str, Any] = {}
    for name, part in found.items():
        for line in part.get("figures", []):
            if line["bench"] == "train":
                told[name] = {
                    key: line[key] for key in ("mfu", "tokens_per_second", "predicted_mib", "peak_device_mib")
                }
            if line["bench"] == "sample":
                floor, step = line["floor_milliseconds_a_step"], line["milliseconds_a_step"]
                told[name] = {
                    "mbu_of_copying": floor / step,  # of the bandwidth that copying a large array reaches here
                    "tokens_per_second": line["useful_tokens_per_second_best"],
                    "copy_gigabytes_per_second": line["copy_gigabytes_per_second"],
                }
            if line["bench"] == "attention":
                told[f"attention {line['backend']}"] = {
                    "milliseconds": line["milliseconds_best"], "largest_error": max(line["error"].values()),
                }  # fmt: skip
        if name == "demo" and "failed" not in part:
            told[name] = {"seconds": part["seconds"]}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--small", action="store_true", help="shapes that a CPU goes through")
    parser.add_argument("--minutes", type=float, default=7.5)
    options = parser.parse_args()

    start, found = time.monotonic(), {}
    folder = Path(tempfile.mkdtemp(prefix="dno-accelerator-"))
    try:
        for part in parts(small=options.small, folder=folder):
            left = 60.0 * options.minutes - (time.monotonic() - start)
            if left < 10.0:
                found[part.name] = {"failed": "left out: the time was over"}
                continue
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            found[part.name] = run(part, seconds=left if options.small else min(_LIMIT_SECONDS, left))
            told = {"summary": summary(found), "seconds": round(time.monotonic() - start, 1), "parts": found}
            options.out.write_text(json.dumps(told, indent=1) + "\n")  # after each: a session may end at any time
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(told["summary"], indent=1))
    if failed := [name for name, part in found.items() if "failed" in part]:
        raise SystemExit(f"without figures: {', '.join(failed)}; {options.out} says why")


if __name__ == "__main__":
    main()
