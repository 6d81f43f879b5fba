"""Tokens per second of a training step: `python benchmarks/train.py --model CHECKPOINT|llama25m [--pairs PAIRS.json]`.

PAIRS.json is a list of {prompt_ids, chosen_ids, rejected_ids} (benchmarks/real_pairs.py makes one of real lengths);
without it, pairs are random ids of one length. --devices 2 makes two devices of a CPU's cores and splits rows and
parameters over them (mesh.fsdp), as JAX_NUM_CPU_DEVICES=2 does for `dno run`.

An epoch is planned as training plans it, and its first --steps batches are timed after one that is not. Tokens are
those of every text with its own prompt, padding not counted, however rows are laid out. Seconds are of one process on
an otherwise idle machine; CPU seconds, of all its threads, repeat better.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import load_model, random_ids, report

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.model.decoder import Decoder
from dno_jax.parallel.attention import make_attention
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN, Constrain
from dno_jax.training.batches import TrainingRow, batch_order, make_batch, text_lengths
from dno_jax.training.flops import peak_flops, train_flops, work_of
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.packing import Packing, plan_batches
from dno_jax.training.state import TrainState, param_shardings, state_shardings
from dno_jax.training.step import StepConfig, score_step, train_step

SETTINGS = {"granule": 32, "program_tokens": 2000}
LAYOUTS = {
    "shared": Packing(packed=True, share_prompt=True, skips=True, **SETTINGS),
    "packed": Packing(packed=True, skips=True, **SETTINGS),
    "by_length": Packing(**SETTINGS),  # batches of like lengths, each text a row of its own
    "padded": Packing(**SETTINGS),
}


def read_rows(options: argparse.Namespace, vocab_size: int) -> list[TrainingRow]:
    if options.pairs:
        found = json.loads(options.pairs.read_text())
        return [TrainingRow((row["prompt_ids"],) * 2, (row["chosen_ids"], row["rejected_ids"])) for row in found]
    rng, rows = np.random.default_rng(0), []
    for _ in range(options.batch * (options.steps + 1)):
        prompt = random_ids(rng, options.prompt, vocab_size)
        responses = tuple(random_ids(rng, options.response, vocab_size) for _ in range(2))
        rows.append(TrainingRow((prompt, prompt), responses))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--layout", default="shared", choices=LAYOUTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--parts", type=int, default=1, help="micro-batches, were all texts of the longest's length")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=384)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--devices", type=int, help="of a CPU; by default one")
    parser.add_argument("--remat", default="full", choices=["none", "full", "dots"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument(
        "--attention", default="xla", choices=["xla", "cudnn", "splash", "own"], help="own: the device's"
    )
    options = parser.parse_args()
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)

    config, params = load_model(options.model)
    rows = read_rows(options, config.vocab_size)
    lengths = text_lengths(rows)
    texts = lengths.prompt + lengths.response
    mesh = make_mesh(MeshSection(data=1, fsdp=-1), jax.devices()[: options.devices or 1])
    packing, longest = replace(LAYOUTS[options.layout], row_shards=mesh.size), int(texts.max())
    order = list(
        batch_order(
            len(rows), batch_size=options.batch, num_epochs=1, seed=0, iteration=0,
            lengths=texts.max(axis=1) if options.layout == "by_length" else None,
        )
    )  # fmt: skip
    start = time.perf_counter()
    plan = plan_batches(lengths, order, packing, batch_size=options.batch, parts=options.parts, max_length=longest)
    plan_seconds = time.perf_counter() - start
    computed = sum(plan.lay_out(lengths.take(own))[1].num_tokens for own in order)
    needed = sum(plan.lay_out(lengths.take(own))[0].num_tokens for own in order)

    own = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")
    backend = own if options.attention == "own" else options.attention
    attention = make_attention(backend, mesh=mesh, layout=TRAIN, windows=config.windows)
    model = Decoder(
        config, dtype=jnp.dtype(options.dtype), remat=options.remat, attention=attention,
        constrain=Constrain(mesh, TRAIN),
    )  # fmt: skip
    optimizer = make_optimizer(OptimizerSection())
    places = state_shardings(optimizer, param_shardings(config, mesh, TRAIN), params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    state = jax.device_put(state, places)
    del params  # as training holds them once
    step_config = StepConfig(
        model,
        optimizer,
        preference_loss(LossSection(beta=0.1)),
        chunk=options.chunk,
        places=tuple(jax.tree.leaves(places)),
    )
    rate = jnp.float32(1e-6)
    host, batches = time.process_time(), []
    for own in order[: options.steps + 1]:
        batches.append(make_batch([rows[i] for i in own], batch_size=options.batch, max_length=longest, plan=plan))
    host = (time.process_time() - host) / len(batches)
    batches = [jax.device_put(batch, batch.shardings(mesh)) for batch in batches]
    compile_seconds, temporary, predicted = time.perf_counter(), 0, 0
    for shape in {batch.token.shape + batch.source.shape: batch for batch in batches}.values():
        compiled = train_step.lower(state, shape, rate, config=step_config).compile()
        memory = compiled.memory_analysis()
        temporary = max(temporary, memory.temp_size_in_bytes)
        predicted = max(predicted, memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    compile_seconds = time.perf_counter() - compile_seconds
    if options.parts == 1:
        scored = [score_step(state.params, batch, model=model, chunk=options.chunk) for batch in batches]
        batches = [batch.replace(previous_logprob=own[None]) for batch, own in zip(batches, scored, strict=True)]
    for batch in {batch.token.shape + batch.source.shape: batch for batch in batches}.values():
        state, _ = train_step(state, batch, rate, config=step_config)  # loads the program
    jax.block_until_ready(state)  # what was begun before is not to be timed
    seconds, cpu = [], []
    for batch in batches[1:]:
        start, before = time.perf_counter(), time.process_time()
        state, metrics = train_step(state, batch, rate, config=step_config)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
    tokens = np.asarray([sum(rows[i].num_tokens for i in own) for own in order[1 : len(batches)]])
    work = work_of(config, lengths.take(np.concatenate(order[1 : len(batches)])), share_prompt=packing.share_prompt)
    flops, peak = train_flops(config, work) / sum(seconds), peak_flops(jax.devices()[0].device_kind)
    report(
        "train",
        model=Path(options.model).name,
        layout=options.layout,
        attention=backend,
        batch_pairs=options.batch,
        shapes=[[shape.parts, shape.rows, shape.length, shape.window] for shape in plan.shapes],
        padding_share=1 - needed / computed,
        remat=options.remat,
        dtype=options.dtype,
        tokens_per_second=float(tokens.sum() / sum(seconds)),
        tokens_per_second_best=float((tokens / np.asarray(seconds)).max()),
        tokens_per_cpu_second=float(tokens.sum() / sum(cpu)),
        seconds_per_step=float(np.mean(seconds)),
        host_cpu_seconds_per_batch=host,
        plan_seconds=plan_seconds,
        compile_seconds=compile_seconds,
        temporary_mib=temporary / 2**20,
        predicted_mib=predicted / 2**20,
        tflops_per_second=flops / 1e12,
        mfu=None if peak is None else flops / peak,
    )


if __name__ == "__main__":
    main()
