"""The sampler with models whose layers do not all attend: what slots hold of a text goes wherever the text goes."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import MeshSection
from dno_jax.model import hf
from dno_jax.model.decoder import Decoder, logits
from dno_jax.parallel.cache import ShardedWrite
from dno_jax.parallel.mesh import make_mesh, one_device_mesh
from dno_jax.parallel.sharding import DECODE, Constrain
from dno_jax.sampling.engine import generate
from dno_jax.sampling.requests import Request, SamplingParams
from dno_jax.sampling.state import CompiledPrograms, EngineShape
from dno_jax.sampling.transforms import Truncation
from dno_jax.training.state import param_shardings
from tests.model.families import CASES
from tests.model.hybrids import HYBRIDS, hybrid_params
from tests.model.test_families import stir
from tests.sampling.test_engine import REQUESTS, SIZES, assert_own_logprobs, flat, ids, run

each = pytest.mark.parametrize("name", HYBRIDS)
first = pytest.mark.parametrize("name", ["qwen3_5", pytest.param("lfm2", marks=pytest.mark.soak)])


@cache
def reader(name):
    config = HYBRIDS[name]

    @jax.jit
    def read(params, token):
        hidden, _ = Decoder(config).apply({"params": params}, token, jnp.arange(token.shape[1], dtype=jnp.int32)[None])
        return logits(config, params, hidden)[0]

    return read


@cache
def params_of(name):
    return jax.tree.map(jnp.asarray, hybrid_params(name))


@cache
def responses_of(name):
    return run(params_of(name), model=Decoder(HYBRIDS[name]))


@first
def test_recorded_logprobs_are_the_models(name):
    """24 responses through 5 slots: all but the first five were drawn in refilled ones."""
    found = responses_of(name)
    assert_own_logprobs(params_of(name), found, read=reader(name))
    assert {one.finish for one in flat(found)} == {"stop", "length"}


@first
def test_slots_and_pieces_of_prompts_change_no_text(name):
    """Prompts go through the model 4 tokens at a time, the state from piece to piece; other slots, other chunks."""
    shape = dataclasses.replace(SIZES, slots=3, entries=5, fill_rows=3, prefill_chunk=4, chunk_steps=3)
    found = run(params_of(name), model=Decoder(HYBRIDS[name]), shape=shape)
    assert ids(found) == ids(responses_of(name))


@pytest.mark.soak
@each
def test_quantised_keys_and_values_leave_states_whole(name):
    shape = dataclasses.replace(SIZES, kv_dtype="int8")
    found = run(params_of(name), model=Decoder(HYBRIDS[name]), shape=shape)
    for item, own in zip(REQUESTS, found, strict=True):
        for one in own:
            token = jnp.asarray([[*item.token_ids, *one.token_ids]], jnp.int32)
            scores = jax.nn.log_softmax(reader(name)(params_of(name), token))[len(item.token_ids) - 1 : -1]
            expected = np.asarray(scores)[np.arange(len(one.token_ids)), list(one.token_ids)]
            np.testing.assert_allclose(one.logprobs, expected, atol=0.3)


@pytest.mark.soak
@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "tensor": 2}], ids=str)
@each
def test_a_mesh_draws_the_same_texts(name, axes):
    config, mesh = HYBRIDS[name], make_mesh(MeshSection(**axes), jax.devices()[:4])
    model = Decoder(config, constrain=Constrain(mesh, DECODE), write=ShardedWrite(mesh, DECODE))
    params = jax.device_put(params_of(name), param_shardings(config, mesh, DECODE))
    found = run(params, model=model, mesh=mesh)
    same = [a.token_ids == b.token_ids for a, b in zip(flat(found), flat(responses_of(name)), strict=True)]
    assert np.mean(same) > 0.9  # rounding of sums over devices may turn a draw
    assert_own_logprobs(params_of(name), found, read=reader(name))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_greedy_text_is_transformers_for_100_tokens(tmp_path, name):
    """Three prompts of unlike lengths, through two slots."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tree = AutoConfig.for_model(**CASES[name].config_json)
    model = AutoModelForCausalLM.from_config(tree, attn_implementation="eager")
    stir(model, 0)
    model.save_pretrained(tmp_path)
    model.eval()
    config, params = hf.load(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, 97, size=length).tolist()) for length in (5, 16, 11)]
    greedy = SamplingParams(
        num_samples=1, max_new_tokens=100, end_ids=(96,), truncation=Truncation(temperature=0.0), seed=0
    )
    shape = EngineShape(slots=2, prompt_length=16, entries=2, fill_rows=1, prefill_chunk=8, chunk_steps=16)
    programs = CompiledPrograms(Decoder(config), greedy, shape, one_device_mesh())
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    found = {one.index: one.responses[0].token_ids for one in generate(params, requests, programs)}
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            text = model.generate(
                torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=96, pad_token_id=0
            )
        assert found[number] == tuple(text[0, len(prompt) :].tolist())
    assert max(map(len, found.values())) == 100
