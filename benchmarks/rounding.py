"""What rounding decides in sampled text: `python benchmarks/rounding.py --model CHECKPOINT --prompts FILE.json`.

Samples the same responses (seed, prompt, sample) in several ways and counts those whose text differs from the first
way's, and those whose log-probabilities have other bits; and compares recorded log-probabilities with those of the
whole text read at once in float32 with float32 caches.
Needs two devices for the meshes: XLA_FLAGS=--xla_force_host_platform_device_count=2 makes them of a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import load_model, report

from dno_jax.config import MeshSection
from dno_jax.model.decoder import Decoder, head_logprobs
from dno_jax.model.hf import read_end_token_ids
from dno_jax.parallel.cache import ShardedWrite
from dno_jax.parallel.mesh import make_mesh, one_device_mesh
from dno_jax.parallel.sharding import DECODE, Constrain
from dno_jax.sampling.engine import generate
from dno_jax.sampling.requests import Request, Response, SamplingParams
from dno_jax.sampling.state import CompiledPrograms, EngineShape
from dno_jax.sampling.transforms import Truncation
from dno_jax.training.state import param_shardings

Sampled = dict[tuple[int, int], Response]  # (prompt, sample) -> response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    options = parser.parse_args()

    config, params = load_model(options.model)
    prompts = sorted((tuple(ids) for ids in json.loads(options.prompts.read_text())), key=len)
    requests = [Request(ids, name) for name, ids in enumerate(prompts)]
    sampling_params = SamplingParams(
        num_samples=options.samples,
        max_new_tokens=options.new,
        end_ids=read_end_token_ids(options.model),
        truncation=Truncation(temperature=options.temperature, top_p=options.top_p),
        seed=0,
    )
    shape = EngineShape(slots=64, prompt_length=max(map(len, prompts)), entries=32)

    def sampled(
        asked: list[Request] = requests, *, dtype: str = "float32", mesh: MeshSection | None = None, **changes: object
    ) -> Sampled:
        own = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        changes = {"kv_dtype": dtype, **changes}
        model, devices = Decoder(config, dtype=jnp.dtype(dtype)), one_device_mesh()
        if mesh is not None:
            devices = make_mesh(mesh)
            model = dataclasses.replace(
                model, constrain=Constrain(devices, DECODE), write=ShardedWrite(devices, DECODE)
            )
            own = jax.device_put(own, param_shardings(config, devices, DECODE))
        programs = CompiledPrograms(model, sampling_params, dataclasses.replace(shape, **changes), devices)
        found = generate(own, asked, programs)
        return {(asked[one.index].name, k): r for one in found for k, r in enumerate(one.responses)}

    def exact(one: Sampled) -> list[np.ndarray]:
        return [read_whole(config, params, prompts[name], r.token_ids) for (name, _), r in one.items()]

    def compare(way: str, found: Sampled, base: Sampled | None) -> None:
        errors = [
            np.abs(np.asarray(response.logprobs) - own)
            for response, own in zip(found.values(), exact(found), strict=True)
        ]
        every, sums = np.concatenate(errors), [own.sum() for own in errors]
        fields = {}
        if base is not None:
            fields["texts_that_differ"] = sum(found[name].token_ids != base[name].token_ids for name in base)
            fields["bits_that_differ"] = sum(found[name].logprobs != base[name].logprobs for name in base)
        report(
            "rounding",
            way=way,
            responses=len(found),
            tokens=len(every),
            mean_error_nats=float(every.mean()),
            max_error_nats=float(every.max()),
            max_error_of_a_response=float(max(sums)),
            **fields,
        )

    for dtype in ("float32", "bfloat16"):
        base = sampled(dtype=dtype)
        compare(f"{dtype}, 64 slots", base, None)
        for slots in (96, 32, 5):
            compare(f"{dtype}, {slots} slots", sampled(dtype=dtype, slots=slots), base)
        compare(
            f"{dtype}, reversed order, 7 tokens per call", sampled(requests[::-1], dtype=dtype, chunk_steps=7), base
        )
        if len(jax.devices()) >= 2:
            compare(f"{dtype}, data=2", sampled(dtype=dtype, mesh=MeshSection(data=2)), base)
            compare(f"{dtype}, tensor=2", sampled(dtype=dtype, mesh=MeshSection(data=1, tensor=2)), base)
    for kv_dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        compare(f"float32, cache in {kv_dtype}", sampled(kv_dtype=kv_dtype), sampled())


def read_whole(config: object, params: object, prompt: tuple[int, ...], response: tuple[int, ...]) -> np.ndarray:
    """log pi(token | prefix) of a response, the whole text at once, in float32, padded to few lengths."""
    ids = np.asarray([*prompt, *response], np.int32)
    width = -(-len(ids) // 128) * 128
    token = np.zeros((1, width), np.int32)
    token[0, : len(ids)] = ids
    scores = np.asarray(_whole(config, params, jnp.asarray(token)))[0]
    return scores[len(prompt) - 1 : len(ids) - 1].astype(np.float64)


def _whole_text(config: object, params: object, token: jax.Array) -> jax.Array:
    position = jnp.arange(token.shape[1], dtype=jnp.int32)[None]
    hidden, _ = Decoder(config).apply({"params": params}, token, position)
    following = jnp.concatenate([token[:, 1:], jnp.zeros((1, 1), jnp.int32)], axis=1)
    return head_logprobs(config, params, hidden, following, chunk=512)


_whole = jax.jit(_whole_text, static_argnums=0)


if __name__ == "__main__":
    main()
