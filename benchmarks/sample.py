"""Useful generated tokens a second: `python benchmarks/sample.py --model CHECKPOINT|llama25m [--prompts FILE.json]`.

FILE.json is a list of id lists; without it there are --num-prompts random prompts of --prompt tokens. Tokens after a
response's end are not counted. The time is the fastest of --repeats passes over all prompts after a warm-up pass.
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

from dno_jax.model.decoder import Decoder
from dno_jax.model.hf import read_end_token_ids
from dno_jax.sampling.engine import Generation, PromptBatch, generate, prompt_bucket
from dno_jax.sampling.transforms import Truncation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="prompts a call")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    config, params = load_model(options.model)
    dtype = jnp.dtype(options.dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    rng = np.random.default_rng(2)
    if options.prompts:
        prompts = [tuple(ids) for ids in json.loads(options.prompts.read_text())]
    else:
        prompts = [random_ids(rng, options.prompt, config.vocab_size) for _ in range(options.num_prompts)]
    prompts.sort(key=len)
    ends = read_end_token_ids(options.model) if Path(options.model).is_dir() else ()
    generation = Generation(
        num_samples=options.samples,
        max_new_tokens=options.new,
        end_ids=ends or (config.vocab_size,),  # an id that is never drawn
        truncation=Truncation(temperature=options.temperature, top_p=options.top_p),
        seed=0,
    )
    model = Decoder(config, dtype=dtype)

    def batches():
        for first in range(0, len(prompts), options.batch):
            part = prompts[first : first + options.batch]
            width = prompt_bucket(max(map(len, part)), max_length=config.max_position_embeddings)
            token = np.zeros((options.batch, width), np.int32)
            position = np.full((options.batch, width), -1, np.int32)
            for row, ids in enumerate(part):
                token[row, : len(ids)], position[row, : len(ids)] = ids, np.arange(len(ids))
            name = np.arange(first, first + options.batch, dtype=np.uint32)
            yield PromptBatch(token=jnp.asarray(token), position=jnp.asarray(position), name=jnp.asarray(name))

    def once(iteration: int) -> tuple[int, int]:
        found = [
            generate(params, batch, model=model, generation=generation, iteration=jnp.int32(iteration))
            for batch in batches()
        ]
        lengths = [np.asarray(responses.length) for responses in found]
        return sum(int(part.sum()) for part in lengths), sum(int(part.max()) * len(part) for part in lengths)

    start = time.perf_counter()
    once(0)
    warm_up = time.perf_counter() - start
    rates, shares = [], []
    for repeat in range(options.repeats):
        start = time.perf_counter()
        useful, steps = once(repeat + 1)
        rates.append(useful / (time.perf_counter() - start))
        shares.append(useful / steps)
    report(
        "sample",
        model=Path(options.model).name,
        prompts=len(prompts),
        samples=options.samples,
        new=options.new,
        batch_prompts=options.batch,
        dtype=options.dtype,
        useful_tokens_per_second_best=max(rates),
        useful_tokens_per_second_median=float(np.median(rates)),
        useful_share_of_slot_steps=float(np.median(shares)),
        warm_up_seconds=warm_up,
        compiled_programs=generate._cache_size(),
    )


if __name__ == "__main__":
    main()
