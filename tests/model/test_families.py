"""Every family and rope type against transformers: tiny checkpoints with random weights, written by transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dno_jax.model import hf
from dno_jax.model.cache import init_cache
from dno_jax.model.config import ModelConfig, RopeConfig
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.params import abstract_params
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.step import score_step
from tests.model.conftest import grow, run
from tests.model.families import CASES, LONG, SHORT, SIZES

# Logits are of order one and pass through four layers of float32, whose unit there is 1.2e-7: some forty of them.
TOLERANCE = 5e-6
# One case of each family; what another one has besides, logits show, and for the rest there is the soak.
ONE_EACH = {case.model_type: name for name, case in reversed(CASES.items())}.values()
CACHED = (
    "llama",
    "mistral",
    "gemma2",
    "phi4",
    "smollm3",
    "ernie4_5",
    "qwen3_5",
    "lfm2",
)  # windows, soft caps, rotations of each kind
FEW = [name if name in CACHED else pytest.param(name, marks=pytest.mark.soak) for name in CASES]
EACH = [name if name in ONE_EACH else pytest.param(name, marks=pytest.mark.soak) for name in CASES]


@dataclass(frozen=True)
class Reference:
    """What transformers wrote, and what it computes from it on the same texts."""

    path: Path
    token: np.ndarray  # [B, LONG]
    exact: dict[int, np.ndarray]  # length of the texts -> float32 logits [B, length, V]
    rough: np.ndarray  # those of the long texts in bfloat16


def torch_model(path: Path, dtype: str = "float32") -> Any:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager").eval()


def torch_logits(model: Any, token: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(token)).logits.float().numpy()


def stir(model: Any, seed: int) -> None:
    """Make every part of a model count: attention far from uniform, norms and biases far from what they start as."""
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim == 1:
                weight.add_(0.3 * noise)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                weight.copy_(0.04 * noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    @functools.cache
    def make(name: str) -> Reference:
        seed = sorted(CASES).index(name)
        path = tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        tree = CASES[name].config_json
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree), attn_implementation="eager")
        stir(model, seed)
        model.save_pretrained(path)
        token = np.random.default_rng(seed).integers(SIZES["vocab_size"], size=(2, LONG))
        model = torch_model(path)
        exact = {length: torch_logits(model, token[:, :length]) for length in (SHORT, LONG)}
        return Reference(path, token, exact, torch_logits(torch_model(path, "bfloat16"), token))

    return make


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(reference, name):
    """Texts of 64 tokens, beyond the window, and longer ones, beyond the original context."""
    found = reference(name)
    _, params = hf.load(found.path)
    config = hf.read_config(found.path, rope_length=LONG)
    assert config == CASES[name].config(LONG)
    ours, tolerance = run(config, params, found.token), CASES[name].rougher * TOLERANCE
    np.testing.assert_allclose(ours, found.exact[LONG], atol=tolerance, rtol=0)
    if config.rope_length is not None:  # the rotation depends on it
        config = hf.read_config(found.path, rope_length=SHORT)
        ours = run(config, params, found.token[:, :SHORT])
    np.testing.assert_allclose(ours[:, :SHORT], found.exact[SHORT], atol=tolerance, rtol=0)
    assert 0.2 < found.exact[LONG].std() < 1


# Not switches: names of tensors, what stands on the hidden states, and the context of a rotation that names none.
NOT_SWITCHES = {"family", "max_position_embeddings", "head"}
# Sizes of parameters: another one is another model's, and cannot be loaded.
NOT_SWITCHES |= {"attention_gate", "conv_kernel"} | {
    f"linear_{name}" for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
}
# Mixtures have a file of their own, test_moe_models.py.
NOT_SWITCHES |= {"num_experts", "num_experts_per_tok", "expert_norm"}


def switches(config: ModelConfig) -> dict[str, ModelConfig]:
    """Every way to set one number of a config back to Llama's; those that contradict the rest are left out."""
    found = {}

    def add(name: str, **change: Any) -> None:
        with contextlib.suppress(ValueError):
            found[name] = dataclasses.replace(config, **change)

    for each in fields(ModelConfig):
        neutral, value = each.default, getattr(config, each.name)
        if neutral is dataclasses.MISSING or value == neutral or each.name in {"ropes", *NOT_SWITCHES}:
            continue
        add(each.name, **{each.name: neutral})
    for index, one in enumerate(config.ropes):
        for each in fields(RopeConfig):
            if getattr(one, each.name) != each.default:
                ropes = list(config.ropes)
                ropes[index] = dataclasses.replace(one, **{each.name: each.default})
                add(f"ropes[{index}].{each.name}", ropes=tuple(ropes))
    return found


SWITCHES = [(name, switch) for name, case in CASES.items() for switch in switches(case.config(LONG))]
# Each switch in the first family that has it; what mixes tokens cannot go unseen, and takes long.
FIRST = {switch: (name, switch) for name, switch in reversed(SWITCHES) if switch != "mixers"}


@pytest.mark.parametrize(
    ("name", "switch"),
    [pytest.param(*one, marks=() if one in FIRST.values() else pytest.mark.soak) for one in SWITCHES],
    ids=[f"{name}-{switch}" for name, switch in SWITCHES],
)
def test_every_switch_counts(reference, name, switch):
    """Parity fails by a hundred times its tolerance with any one number of the config set back to Llama's."""
    found = reference(name)
    _, params = hf.load(found.path)

    def difference(length: int) -> float:
        sabotaged = switches(hf.read_config(found.path, rope_length=length))[switch]
        whole = overlay(init_params_once(sabotaged), params)
        with jax.disable_jit(sabotaged.attends_everywhere):  # a fifth of the time of a compilation
            return float(np.abs(run(sabotaged, whole, found.token[:, :length]) - found.exact[length]).max())

    # The short text tells only what the long one cannot: longrope's short factors.
    assert difference(LONG) > 100 * TOLERANCE or difference(SHORT) > 100 * TOLERANCE


def overlay(fresh: Any, loaded: Any) -> Any:
    """The loaded tree, with fresh leaves where a sabotaged config has some that the file has not."""
    if not isinstance(fresh, dict):
        return loaded
    return {key: overlay(fresh[key], loaded[key]) if key in loaded else fresh[key] for key in fresh}


@functools.cache
def init_params_once(config: ModelConfig) -> Any:
    shapes = abstract_params(config)
    random = np.random.default_rng(0)

    def fresh(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name.endswith("norm"):
            return np.full(leaf.shape, 1.0 - config.norm_offset, np.float32)
        return np.asarray(0.02 * random.standard_normal(leaf.shape), np.float32)

    return jax.tree.map_with_path(fresh, shapes)


def test_no_switch_is_forgotten():
    """Every field with a default, of configs and of rotations, is off it in some case and sabotaged there."""
    sabotaged = {switch.split(".")[-1] for _, switch in SWITCHES}
    expected = {each.name for each in fields(ModelConfig) if each.default is not dataclasses.MISSING} - {"ropes"}
    assert expected | {each.name for each in fields(RopeConfig)} == sabotaged | NOT_SWITCHES


@pytest.mark.parametrize("name", [name for name in EACH if name != "qwen3_5"])  # qwen3_5_odd is in the soak
def test_bfloat16_is_as_near_as_transformers(reference, name):
    """Both round at every step, in places that differ in part, so that each is compared with float32.

    Each lies 1 to 2.5 % of the logits' scale away from float32: half a unit of 8 bits (0.2 %) for each of some eight
    roundings in each of four layers, adding like a random walk, and more where norms amplify it. Bounds: ours is at
    most a quarter further away than theirs, and the two part by no more than 4 %, as errors of that size may.
    """
    found = reference(name)
    config, params = hf.read_config(found.path, rope_length=LONG), hf.load(found.path)[1]
    exact, theirs = found.exact[LONG], found.rough
    with jax.disable_jit():
        ours = run(config, params, found.token, dtype=jnp.bfloat16)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).mean()) / exact.std())

    assert distance(ours, exact) < 1.25 * distance(theirs, exact)
    assert distance(ours, theirs) < 0.04 * CASES[name].rougher


@pytest.mark.parametrize("name", FEW)
def test_cached_decoding_equals_the_full_forward_pass(reference, name):
    """A prefill, several tokens at once on top of it, then single tokens, past the window and the original context."""
    found = reference(name)
    config, params = hf.read_config(found.path, rope_length=LONG), hf.load(found.path)[1]
    model, token = Decoder(config), jnp.asarray(found.token, jnp.int32)
    cache, parts = init_cache(config, batch_size=2, num_slots=70), []
    with jax.disable_jit(config.attends_everywhere):  # the scan of a delta rule would be one in Python
        for start, stop in ((0, 70), (70, 100), (100, 101), (101, 102)):
            if start == 70:
                cache = grow(cache, 102)
            position = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))
            hidden, cache = model.apply({"params": params}, token[:, start:stop], position, cache)
            parts.append(logits(config, params, hidden))
    # Against transformers' whole forward pass, hence with its tolerance.
    tolerance = CASES[name].rougher * TOLERANCE
    np.testing.assert_allclose(np.concatenate(parts, axis=1), found.exact[LONG][:, :102], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_export_is_the_original(tmp_path, reference, name):
    """Names, shapes and bytes of every tensor; transformers computes the same bits from it, with tied heads tied."""
    found = reference(name)
    config, params = hf.load(found.path)
    hf.save(tmp_path / "out", config, params, source=found.path)
    original, written = (load_file(path / "model.safetensors") for path in (found.path, tmp_path / "out"))
    assert original.keys() == written.keys()
    for key, tensor in original.items():
        assert tensor.dtype == written[key].dtype
        np.testing.assert_array_equal(tensor, written[key])
    model = torch_model(tmp_path / "out")
    np.testing.assert_array_equal(torch_logits(model, found.token[:, :SHORT]), found.exact[SHORT])
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings == ("lm_head.weight" not in written)


@pytest.mark.parametrize("name", ["phi4", "gemma3", "olmo2"])
def test_export_in_bfloat16_is_the_original(tmp_path, reference, name):
    found = reference(name)
    torch_model(found.path, "bfloat16").save_pretrained(tmp_path / "half")
    config, params = hf.load(tmp_path / "half")
    hf.save(tmp_path / "out", config, params, source=tmp_path / "half", dtype=ml_dtypes.bfloat16)
    original, written = (load_file(tmp_path / part / "model.safetensors") for part in ("half", "out"))
    assert original.keys() == written.keys()
    for key, tensor in original.items():
        assert tensor.dtype == written[key].dtype == ml_dtypes.bfloat16
        assert tensor.tobytes() == written[key].tobytes()


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_scored_logprobs_are_those_of_the_logits(reference, name):
    """Scaling and soft-cap of logits reach training and scoring, which never see whole logits."""
    found = reference(name)
    config, params = hf.load(found.path)
    assert config.logit_softcap is not None or config.logit_scale != 1
    ids = tuple(int(i) for i in found.token[0, :40])
    rows = [TrainingRow((ids[:10], ids[:10]), (ids[10:30], ids[30:]))]
    scores = score_step(params, make_batch(rows, batch_size=1, max_length=40), model=Decoder(config), chunk=16)
    for score, response in zip(np.asarray(scores)[0], (ids[10:30], ids[30:]), strict=True):
        text = np.array([ids[:10] + response])
        logprob = np.asarray(jax.nn.log_softmax(run(config, params, text)))[0]
        expected = sum(logprob[place - 1, text[0, place]] for place in range(10, text.shape[1]))
        # 2e-5: twenty log-probabilities of 5 nats, each known to 5e-7.
        assert float(score) == pytest.approx(expected, abs=2e-5)


def test_longest_text_of_a_run_selects_the_rotation_for_all_of_it(reference):
    """A token's log-probability depends on no later token, not even where transformers' would."""
    found = reference("phi4")
    config, params = hf.read_config(found.path, rope_length=LONG), hf.load(found.path)[1]
    short, long = run(config, params, found.token[:, :SHORT]), run(config, params, found.token)
    np.testing.assert_allclose(short, long[:, :SHORT], atol=TOLERANCE)
    assert np.abs(found.exact[SHORT] - found.exact[LONG][:, :SHORT]).max() > 100 * TOLERANCE


def test_the_family_names_tensors_and_nothing_else(reference):
    found = reference("gemma2")
    config, params = hf.load(found.path)
    renamed = dataclasses.replace(config, family="llama")
    token = found.token[:, :8]
    np.testing.assert_array_equal(run(renamed, params, token), run(config, params, token))
