"""Tokens per second of a training step: `python benchmarks/train.py --model CHECKPOINT|llama25m [--pairs PAIRS.json]`.

PAIRS.json is a list of {prompt_ids, chosen_ids, rejected_ids}; without it, pairs are random ids. Tokens are counted
without padding; the figures are the fastest and the median of --steps steps after the first.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import load_model, random_ids, report

from dno_jax.config import LossSection, OptimizerSection
from dno_jax.model.decoder import Decoder
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import TrainState
from dno_jax.training.step import StepConfig, score_step, train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=384)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--remat", default="full", choices=["none", "full", "dots"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=512)
    options = parser.parse_args()

    config, params = load_model(options.model)
    rng = np.random.default_rng(0)
    if options.pairs:
        found = json.loads(options.pairs.read_text())
        rows = [
            TrainingRow((tuple(row["prompt_ids"]),) * 2, (tuple(row["chosen_ids"]), tuple(row["rejected_ids"])))
            for row in found
        ]
    else:
        rows = [
            TrainingRow(
                (random_ids(rng, options.prompt, config.vocab_size),) * 2,
                tuple(random_ids(rng, options.response, config.vocab_size) for _ in range(2)),
            )
            for _ in range(options.batch * 2)
        ]
    length = max(row.length for row in rows)
    length += -length % 8
    batches = [
        make_batch(rows[first : first + options.batch], batch_size=options.batch, max_length=length)
        for first in range(0, len(rows) - options.batch + 1, options.batch)
    ]
    model = Decoder(config, dtype=jnp.dtype(options.dtype), remat=options.remat)
    optimizer = make_optimizer(OptimizerSection())
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    step_config = StepConfig(model, optimizer, preference_loss(LossSection(beta=0.1)), chunk=options.chunk)
    rate = jnp.float32(1e-6)
    start = time.perf_counter()
    compiled = train_step.lower(state, batches[0], rate, config=step_config).compile()
    compile_seconds = time.perf_counter() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes

    batches = [
        batch.replace(previous_logprob=score_step(params, batch, model=model, chunk=options.chunk)) for batch in batches
    ]
    rates, seconds = [], []
    for step in range(options.steps + 1):
        batch = batches[step % len(batches)]
        start = time.perf_counter()
        state, metrics = train_step(state, batch, rate, config=step_config)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
        rates.append(int(np.sum(np.asarray(batch.position) >= 0)) / seconds[-1])
    report(
        "train",
        model=Path(options.model).name,
        batch_pairs=options.batch,
        length=batches[0].token.shape[-1],
        remat=options.remat,
        dtype=options.dtype,
        tokens_per_second_best=max(rates[1:]),
        tokens_per_second_median=float(np.median(rates[1:])),
        seconds_per_step_median=float(np.median(seconds[1:])),
        compile_seconds=compile_seconds,
        temporary_mib=temporary / 2**20,
    )


if __name__ == "__main__":
    main()
