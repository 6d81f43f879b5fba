"""What an import costs: `python benchmarks/load.py [--layers 16] [--hidden 2048] [--directory DIR]`.

Writes a random bfloat16 checkpoint in shards (1.7 GB as it stands), reads it as float32 by one process, by each of two
processes (fsdp=2), and by transformers, writes it again, and prints one JSON line for each. "over final" is the peak of
the process's anonymous memory less what it was before and less the arrays it ends with; the file's own pages are cache.
The files have just been written: what is measured is reading from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODES = (("dno_jax", 1), ("dno_jax", 2), ("transformers", 1), ("export", 1))  # what is done, by how many processes


def write_checkpoint(path: Path, *, layers: int, hidden: int, vocab: int, shard_bytes: int = 400_000_000) -> int:
    """Write a Llama of random bfloat16 weights in shards with an index; return the bytes of its largest tensor."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from dno_jax.model.hf.config_json import parse_config
    from dno_jax.model.hf.tensors import tensor_table

    heads, width = hidden // 64, hidden * 11 // 4
    tree = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 8, 2), "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(tree))
    rng = np.random.default_rng(0)
    shapes = {n: t.hf_shape for t in tensor_table(parse_config(tree, place="benchmark")) for n in t.names}
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        # Half a million draws, repeated: drawing them all would take longer than what is measured.
        drawn = (0.02 * rng.standard_normal(1 << 19, np.float32)).astype(ml_dtypes.bfloat16)
        shard[name] = np.resize(drawn, shape)
        if sum(a.nbytes for a in shard.values()) >= shard_bytes or number + 1 == len(shapes):
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return max(2 * int(np.prod(shape)) for shape in shapes.values())


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Sample the anonymous memory; the figures are whole when the block ends."""
    found: dict[str, Any] = {}
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - start
        found["cpu_seconds"] = time.process_time() - cpu
        done.set()
        thread.join()
        found["growth_bytes"] = max(peak, anonymous_bytes()) - before


def load_ours(path: Path) -> dict[str, Any]:
    """Load into the training layout of all devices of all processes."""
    import jax

    jax.devices()  # the back-end's own memory is not the import's
    read = 0

    def count(num_bytes: int, total: int) -> None:
        nonlocal read
        read += num_bytes

    with watched() as found:
        _, params = _placed(path, progress=count)
    final = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    return {**found, "final_bytes": final, "read_bytes": read}


def _placed(path: Path, **options: Any) -> Any:
    from dno_jax.config import MeshSection
    from dno_jax.model import hf
    from dno_jax.parallel.mesh import make_mesh
    from dno_jax.parallel.sharding import TRAIN
    from dno_jax.training.state import param_shardings

    mesh = make_mesh(MeshSection(data=1, fsdp=-1))
    return hf.load(path, shardings=param_shardings(hf.read_config(path), mesh, TRAIN), **options)


def export_ours(path: Path) -> dict[str, Any]:
    """Write what was loaded; of the peak, the probe's second model is no part."""
    from dno_jax.model.hf import exporter

    config, params = _placed(path)
    target = path.parent / "exported"
    plan = exporter.plan_tensors(config, source=path, dtype=None)
    target.mkdir()
    try:
        with watched() as written:
            exporter._write_tensors(target, plan, params, max_shard_bytes=400_000_000)
        shutil.copy(path / "config.json", target)
        with watched() as compared:
            exporter._compare_tensors(target, config, plan, params)
    finally:
        shutil.rmtree(target)
    growth = max(written["growth_bytes"], compared["growth_bytes"])
    return {**written, "growth_bytes": growth, "compare_seconds": compared["seconds"]}


def load_transformers(path: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with watched() as found:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {**found, "final_bytes": sum(p.numel() * p.element_size() for p in model.parameters())}


def child(options: argparse.Namespace) -> None:
    """Load once and print the figures: what the parent starts, so that every load has a process of its own."""
    from dno_jax.parallel.cluster import initialize

    initialize(coordinator=options.coordinator, num_processes=options.num_processes, process_id=options.process_id)
    act = {"dno_jax": load_ours, "transformers": load_transformers, "export": export_ours}[options.child]
    print(json.dumps(act(options.directory)))


def run(mode: str, path: Path, *, processes: int = 1) -> list[dict[str, Any]]:
    """Start processes that load the checkpoint together; return each one's figures."""
    command = [sys.executable, __file__, "--directory", str(path), "--child", mode]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command += ["--coordinator", address, "--num-processes", str(processes), "--process-id"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    started = [
        subprocess.Popen(
            command + ([str(i)] if processes > 1 else []), env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{mode}: a process failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def measure(path: Path, *, largest: int, modes: tuple[tuple[str, int], ...] = MODES) -> Iterator[dict[str, Any]]:
    """Yield one line for each process of each way of loading, and of the export."""
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for mode, processes in modes:
        for i, found in enumerate(run(mode, path, processes=processes)):
            line = {
                "bench": "load", "by": mode, "process": f"{i + 1} of {processes}", "file_gb": size / 1e9,
                "seconds": found["seconds"], "cpu_seconds": found["cpu_seconds"],
                "gb_per_second": size / 1e9 / found["seconds"], "largest_tensor_mb": largest / 1e6,
            }  # fmt: skip
            if mode == "export":
                line |= {"over_before_mb": found["growth_bytes"] / 1e6, "compare_seconds": found["compare_seconds"]}
            else:
                line["over_final_mb"] = (found["growth_bytes"] - found["final_bytes"]) / 1e6
            if "read_bytes" in found:
                line["read_share"] = found["read_bytes"] / size
            yield {name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 1024")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--directory", type=Path, help="where the checkpoint is written (and removed from)")
    parser.add_argument("--child", choices=sorted(dict(MODES)), help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--num-processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    folder = Path(tempfile.mkdtemp(dir=options.directory, prefix="load-"))
    try:
        path = folder / "checkpoint"
        largest = write_checkpoint(path, layers=options.layers, hidden=options.hidden, vocab=options.vocab)
        for line in measure(path, largest=largest):
            print(json.dumps(line), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
