"""Useful generated tokens per second: `python benchmarks/sample.py --model CHECKPOINT|llama25m [--prompts FILE.json]`.

FILE.json is a list of id lists; without it there are --num-prompts random prompts of --prompt tokens. Each is asked
--copies times under names of its own. Tokens after a response's end are not counted. Rates are of --repeats passes over
all prompts after a warm-up pass.

--lengths heavy gives every prompt a limit of its own that its responses run into: log-normal, half of them within a
tenth of --new, a few as long as it. The share of useful slot-steps of static batches, of the same lengths in the same
order and number of rows, stands beside the measured one.

--devices N draws over a mesh with data=N, whose row shards have --slots / N slots each. Of a CPU,
XLA_FLAGS=--xla_force_host_platform_device_count=N makes as many devices.

The floor of a step is what it has to read, all weights but a table of embeddings and what the slots' texts hold of the
cache (the mean over a response), over the bandwidth of copying a large array.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import load_model, random_ids, report

from dno_jax.config import MeshSection
from dno_jax.model.cache import init_cache
from dno_jax.model.decoder import Decoder
from dno_jax.model.hf import read_end_token_ids
from dno_jax.parallel.cache import ShardedWrite
from dno_jax.parallel.mesh import make_mesh, one_device_mesh
from dno_jax.parallel.sharding import DECODE, Constrain
from dno_jax.sampling.decode import decode, fill
from dno_jax.sampling.engine import Statistics, generate
from dno_jax.sampling.memory import queue_length
from dno_jax.sampling.requests import Finished, Request, SamplingParams
from dno_jax.sampling.state import CompiledPrograms, EngineShape
from dno_jax.sampling.transforms import Truncation
from dno_jax.training.state import param_shardings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=32, help="tokens per call")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--kv-dtype", choices=["float32", "bfloat16", "int8", "float8_e4m3fn"])
    parser.add_argument("--lengths", default="real", choices=["real", "heavy"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.slots % options.devices:
        parser.error(f"--slots is {options.slots}; expected a multiple of --devices, {options.devices}")

    config, params = load_model(options.model)
    dtype = jnp.dtype(options.dtype)
    params = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    rng = np.random.default_rng(2)
    if options.prompts:
        prompts = [tuple(ids) for ids in json.loads(options.prompts.read_text())]
    else:
        prompts = [random_ids(rng, options.prompt, config.vocab_size) for _ in range(options.num_prompts)]
    prompts = sorted(prompts * options.copies, key=len)
    heavy = options.lengths == "heavy"
    limits = np.clip(np.exp(rng.normal(np.log(options.new / 10), 1.0, size=len(prompts))), 1, options.new).astype(int)
    requests = [Request(ids, name, int(limits[name]) if heavy else None) for name, ids in enumerate(prompts)]
    ends = () if heavy else read_end_token_ids(options.model) if Path(options.model).is_dir() else ()
    sampling_params = SamplingParams(
        num_samples=options.samples,
        max_new_tokens=options.new,
        end_ids=ends or (config.vocab_size,),  # an id that is never drawn
        truncation=Truncation(temperature=options.temperature, top_p=options.top_p),
        seed=0,
    )
    shape = EngineShape(
        slots=options.slots // options.devices,
        prompt_length=max(map(len, prompts)),
        entries=queue_length(options.slots // options.devices, num_samples=options.samples, fill_rows=4),
        chunk_steps=options.chunk,
        kv_dtype=options.kv_dtype or options.dtype,
    )
    model, mesh = Decoder(config, dtype=dtype), one_device_mesh()
    if options.devices > 1:
        mesh = make_mesh(MeshSection(data=options.devices))
        model = dataclasses.replace(model, constrain=Constrain(mesh, DECODE), write=ShardedWrite(mesh, DECODE))
        params = jax.device_put(params, param_shardings(config, mesh, DECODE))

    programs = CompiledPrograms(model, sampling_params, shape, mesh)

    def once(iteration: int) -> tuple[Statistics, list[Finished]]:
        statistics = Statistics()
        found = generate(params, requests, programs, iteration=iteration, statistics=statistics)
        return statistics, list(found)

    begin = time.perf_counter()
    once(0)
    warm_up = time.perf_counter() - begin
    rates, shares, static, steps = [], [], [], []
    for repeat in range(options.repeats):
        begin = time.perf_counter()
        statistics, found = once(repeat + 1)
        seconds = time.perf_counter() - begin
        rates.append(statistics.tokens / seconds)
        steps.append(seconds / (statistics.slot_steps / options.slots))
        shares.append(statistics.utilisation)
        by_prompt = sorted(found, key=lambda finished: finished.index)
        static.append(static_share([len(r.token_ids) for f in by_prompt for r in f.responses], rows=options.slots))
    columns, mean = shape.prompt_length + options.new, statistics.tokens / (len(requests) * options.samples)
    cache = init_cache(config, batch_size=1, num_slots=columns, dtype=jnp.dtype(shape.kv_dtype))
    slot_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    live = (np.mean([len(ids) for ids in prompts]) + mean / 2) / columns
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.tie_word_embeddings:
        weights -= params["embed"].nbytes  # of which a step reads one row per slot
    read = weights + options.slots * slot_bytes * live
    bandwidth = copy_bandwidth()
    report(
        "sample",
        model=Path(options.model).name,
        responses=len(requests) * options.samples,
        new=options.new,
        lengths=options.lengths,
        slots=options.slots,
        chunk=options.chunk,
        devices=options.devices,
        dtype=options.dtype,
        kv_dtype=shape.kv_dtype,
        mean_tokens=mean,
        useful_tokens_per_second_best=max(rates),
        useful_tokens_per_second_median=float(np.median(rates)),
        utilisation=float(np.median(shares)),
        utilisation_of_static_batches=float(np.median(static)),
        bytes_a_slot=slot_bytes,
        milliseconds_a_step=1e3 * float(np.median(steps)),
        floor_milliseconds_a_step=1e3 * read / bandwidth,
        copy_gigabytes_per_second=bandwidth / 1e9,
        warm_up_seconds=warm_up,
        compiled_programs=fill._cache_size() + decode._cache_size(),
    )


def copy_bandwidth(megabytes: int = 256) -> float:
    """Return bytes per second, read and written, of copying an array that no cache holds; the fastest of a few."""
    source = jnp.ones(megabytes * 2**18, jnp.float32)
    copy = jax.jit(lambda array: array + 1.0)
    jax.block_until_ready(copy(source))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(copy(source))
        seconds.append(time.perf_counter() - begin)
    return 2 * source.nbytes / min(seconds)


def static_share(lengths: list[int], *, rows: int) -> float:
    """Return the useful share of slot-steps of batches that run until their longest row has ended."""
    batches = [lengths[first : first + rows] for first in range(0, len(lengths), rows)]
    return sum(lengths) / sum(max(batch) * rows for batch in batches)


if __name__ == "__main__":
    main()
