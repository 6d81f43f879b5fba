"""Every family and rope type against transformers: tiny checkpoints with random weights, written by transformers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.attention import NO_WINDOW
from dno_jax.model.cache import grow_cache, init_cache
from dno_jax.model.config import ModelConfig, RopeConfig
from dno_jax.model.decoder import Decoder, abstract_params, logits
from dno_jax.model.hf.config_json import parse_config
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.step import score_step
from tests.model.conftest import run

# The window is passed within the short text, the original context of stretched rotations in the long one only.
SHORT, LONG, WINDOW, ORIGINAL = 64, 112, 12, 80

# Logits are of order one and pass through four layers of float32, whose unit there is 1.2e-7: some forty of them.
TOLERANCE = 5e-6

SIZES = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 320,
    "rms_norm_eps": 1e-2,  # so large that another one shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FACTORS = [1.0 + 0.3 * i for i in range(6)]


@dataclass(frozen=True)
class Case:
    """A config.json, in words that both transformers and we read, without the sizes that all have."""

    model_type: str
    tree: dict[str, Any] = field(default_factory=dict)

    @property
    def config_json(self) -> dict[str, Any]:
        sizes = {k: v for k, v in SIZES.items() if k != "rms_norm_eps" or self.model_type != "olmo"}
        return {"model_type": self.model_type, **sizes, **self.tree}

    def config(self, length: int | None = None) -> ModelConfig:
        return parse_config(self.config_json, place="case", rope_length=length)


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **numbers}}


CASES = {
    "llama": Case("llama", {"attention_bias": True, "mlp_bias": True, "rope_theta": 5000.0}),
    "llama_gelu": Case("llama", {"hidden_act": "gelu", "tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama3": Case(
        "llama",
        rope(
            "llama3", factor=8.0, low_freq_factor=1.5, high_freq_factor=5.0, original_max_position_embeddings=ORIGINAL
        ),
    ),
    "linear": Case("llama", rope("linear", factor=4.0)),
    "dynamic": Case("llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": ORIGINAL}),
    "yarn": Case(
        "llama", rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=4.0, beta_slow=0.25)
    ),
    "yarn_exact": Case(
        "qwen2",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=ORIGINAL,
            truncate=False,
            mscale=2.0,
            mscale_all_dim=0.5,
        ),
    ),
    "mistral": Case("mistral", {"sliding_window": WINDOW, "head_dim": 12}),
    "nemo": Case("mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": Case("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": Case(
        "qwen3",
        {
            "head_dim": 20,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 3,
        },
    ),
    "gemma": Case("gemma", {"head_dim": 20, "num_key_value_heads": 1}),
    "gemma2": Case(
        "gemma2",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "final_logit_softcapping": 1.5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": Case("phi3", {"sliding_window": WINDOW, "partial_rotary_factor": 0.5}),
    "phi4": Case(
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": ORIGINAL,
            **rope(
                "longrope",
                partial_rotary_factor=0.75,
                short_factor=FACTORS,
                long_factor=[2.0 * x for x in FACTORS],
                original_max_position_embeddings=ORIGINAL,
            ),
        },
    ),
    "olmo": Case("olmo", {"clip_qkv": 0.5}),
    "olmo2": Case("olmo2", {"rope_theta": 5000.0}),
    "olmo3": Case(
        "olmo3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 5000.0,
                    "original_max_position_embeddings": ORIGINAL,
                    "attention_factor": 1.3,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "smollm3": Case("smollm3", {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layer_interval": 2}),
    "smollm3_biased": Case("smollm3", {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [0, 1, 1, 0]}),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.4,
            "logits_scaling": 1.7,
            "attention_bias": True,
        },
    ),
}


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
                weight.copy_(noise / weight.shape[1] ** 0.5)


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
    ours = run(config, params, found.token)
    np.testing.assert_allclose(ours, found.exact[LONG], atol=TOLERANCE, rtol=0)
    if config.rope_length is not None:  # the rotation depends on it
        config = hf.read_config(found.path, rope_length=SHORT)
        ours = run(config, params, found.token[:, :SHORT])
    np.testing.assert_allclose(ours[:, :SHORT], found.exact[SHORT], atol=TOLERANCE, rtol=0)
    assert 0.2 < found.exact[LONG].std() < 1


# Not switches: names of tensors; and the context where a rotation names none of its own.
NOT_SWITCHES = {"family", "max_position_embeddings"}
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


@pytest.mark.parametrize(("name", "switch"), SWITCHES, ids=[f"{name}-{switch}" for name, switch in SWITCHES])
def test_every_switch_counts(reference, name, switch):
    """Parity fails by a hundred times its tolerance with any one number of the config set back to Llama's."""
    found = reference(name)
    _, params = hf.load(found.path)

    def difference(length: int) -> float:
        sabotaged = switches(hf.read_config(found.path, rope_length=length))[switch]
        whole = overlay(init_params_once(sabotaged), params)
        with jax.disable_jit():  # a fifth of the time of a compilation
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


@pytest.mark.parametrize("name", CASES)
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
    assert distance(ours, theirs) < 0.04


@pytest.mark.parametrize("name", CASES)
def test_cached_decoding_equals_the_full_forward_pass(reference, name):
    """A prefill, several tokens at once on top of it, then single tokens, past the window and the original context."""
    found = reference(name)
    config, params = hf.read_config(found.path, rope_length=LONG), hf.load(found.path)[1]
    model, token = Decoder(config), jnp.asarray(found.token, jnp.int32)
    cache, parts = init_cache(config, batch_size=2, num_slots=70), []
    with jax.disable_jit():
        for start, stop in ((0, 70), (70, 100), (100, 101), (101, 102)):
            if start == 70:
                cache = grow_cache(cache, 102)
            position = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))
            hidden, cache = model.apply({"params": params}, token[:, start:stop], position, cache)
            parts.append(logits(config, params, hidden))
    # Against transformers' whole forward pass, hence with its tolerance.
    np.testing.assert_allclose(np.concatenate(parts, axis=1), found.exact[LONG][:, :102], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
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


def published(model_type: str, **tree: Any) -> dict[str, Any]:
    """A config.json as it lies on the hub, written by some version 4 of transformers: the keys that matter."""
    return {"model_type": model_type, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", **tree}


def sizes(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, positions: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = (hidden, mlp, layers, heads, kv, vocab, positions)
    return dict(zip((*names, "vocab_size", "max_position_embeddings"), numbers, strict=True))


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG_FACTORS = {"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0 + i / 64 for i in range(48)]}
PUBLISHED = {
    "Llama-2-7b": published(
        "llama", **sizes(4096, 11008, 32, 32, 32, 32000, 4096), rms_norm_eps=1e-5, pretraining_tp=1, rope_scaling=None
    ),
    "Llama-3.1-8B": published(
        "llama",
        **sizes(4096, 14336, 32, 32, 8, 128256, 131072),
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={**LLAMA_3, "rope_type": "llama3"},
    ),
    "Mistral-7B-v0.1": published(
        "mistral", **sizes(4096, 14336, 32, 32, 8, 32000, 32768), rms_norm_eps=1e-5, sliding_window=4096
    ),
    "Mistral-Nemo": published(
        "mistral",
        **sizes(5120, 14336, 40, 32, 8, 131072, 1024000),
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
    ),
    "Qwen2.5-7B": published(
        "qwen2",
        **sizes(3584, 18944, 28, 28, 4, 152064, 131072),
        max_window_layers=28,
        rope_theta=1e6,
        sliding_window=131072,
        use_sliding_window=False,
        use_mrope=False,
    ),
    "Qwen2.5-7B-yarn": published(
        "qwen2",
        **sizes(3584, 18944, 28, 28, 4, 152064, 32768),
        rope_theta=1e6,
        use_sliding_window=False,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "Qwen3-8B": published(
        "qwen3",
        **sizes(4096, 12288, 36, 32, 8, 151936, 40960),
        head_dim=128,
        attention_bias=False,
        rope_scaling=None,
        rope_theta=1000000,
        max_window_layers=36,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "gemma-7b": published("gemma", **sizes(3072, 24576, 28, 16, 16, 256000, 8192), head_dim=256, hidden_act="gelu"),
    "gemma-2-9b": published(
        "gemma2",
        **sizes(3584, 14336, 42, 16, 8, 256000, 8192),
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        sliding_window=4096,
        sliding_window_size=4096,
        cache_implementation="hybrid",
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gemma-3-1b": published(
        "gemma3_text",
        **sizes(1152, 6912, 26, 4, 1, 262144, 32768),
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        rope_local_base_freq=10000,
        rope_theta=1000000,
        rope_scaling=None,
        sliding_window=512,
        sliding_window_pattern=6,
        cache_implementation="hybrid",
    ),
    "gemma-3-4b's text": published(
        "gemma3_text",
        **sizes(2560, 10240, 34, 8, 4, 262208, 131072),
        head_dim=256,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        sliding_window=1024,
    ),
    "Phi-3-mini-4k": published(
        "phi3",
        **sizes(3072, 8192, 32, 32, 32, 32064, 4096),
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        original_max_position_embeddings=4096,
        rope_scaling=None,
        sliding_window=2047,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        rms_norm_eps=1e-5,
    ),
    "Phi-3-mini-128k": published(
        "phi3",
        **sizes(3072, 8192, 32, 32, 32, 32064, 131072),
        original_max_position_embeddings=4096,
        rope_scaling={**LONG_FACTORS, "type": "longrope"},
        sliding_window=262144,
        attention_bias=False,
    ),
    "Phi-4-mini": published(
        "phi3",
        **sizes(3072, 8192, 32, 24, 8, 200064, 131072),
        partial_rotary_factor=0.75,
        original_max_position_embeddings=4096,
        rope_scaling={**LONG_FACTORS, "type": "longrope"},
        sliding_window=262144,
        tie_word_embeddings=True,
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        mlp_bias=False,
    ),
    "OLMo-7B": published("olmo", **sizes(4096, 11008, 32, 32, 32, 50304, 2048), clip_qkv=None),
    "OLMo-2-7B": published("olmo2", **sizes(4096, 11008, 32, 32, 32, 100352, 4096), rope_theta=500000),
    "Olmo-3-7B": published(
        "olmo3",
        **sizes(4096, 11008, 32, 32, 32, 100278, 65536),
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8,
        rope_theta=500000,
        rope_scaling={
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        sliding_window=4096,
    ),
    "SmolLM3-3B": published(
        "smollm3",
        **sizes(2048, 11008, 36, 16, 4, 128256, 65536),
        layer_types=["full_attention"] * 36,
        max_window_layers=28,
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9,
        pretraining_tp=2,
        rope_theta=5000000.0,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "granite-3.3-8b": published(
        "granite",
        **sizes(4096, 12800, 40, 32, 8, 49159, 131072),
        attention_multiplier=0.0078125,
        embedding_multiplier=12.0,
        logits_scaling=16.0,
        residual_multiplier=0.22,
        rope_theta=10000000.0,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_versions_of_transformers_are_read_alike(tmp_path, name):
    """A file of transformers 4, and what transformers 5 makes of it."""
    pytest.importorskip("torch")
    from transformers import AutoConfig

    tree = PUBLISHED[name]
    AutoConfig.for_model(**copy.deepcopy(tree)).save_pretrained(tmp_path)
    assert hf.read_config(tmp_path, rope_length=5000) == parse_config(tree, place=name, rope_length=5000)


def test_published_configs_mean_what_their_papers_say():
    def read(name: str, length: int | None = None) -> ModelConfig:
        return parse_config(PUBLISHED[name], place=name, rope_length=length)

    assert read("Mistral-7B-v0.1").windows == (4096,) * 32
    assert read("Mistral-Nemo").head_dim == 128 != 5120 // 32
    assert read("Qwen2.5-7B").windows is None
    assert (read("Qwen2.5-7B").attention_bias, read("Qwen2.5-7B").output_bias) == (True, False)
    assert read("Qwen2.5-7B-yarn").context == 131072
    assert read("gemma-7b").hidden_act == "gelu_tanh"
    assert read("gemma-2-9b").windows == (4096, NO_WINDOW) * 21
    gemma = read("gemma-3-1b")
    assert gemma.windows is not None
    assert gemma.layer_ropes is not None
    assert [i for i in range(26) if gemma.windows[i] == NO_WINDOW] == [5, 11, 17, 23]
    assert [gemma.ropes[i].theta or gemma.rope_theta for i in gemma.layer_ropes[4:6]] == [1e4, 1e6]
    assert read("Phi-3-mini-128k").context == 131072
    assert read("Phi-3-mini-128k").ropes[0].attention_factor == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)
    assert read("Phi-4-mini").rotary_dim == 96
    assert read("Phi-4-mini", 4097).rope_length == 4097
    assert read("Llama-3.1-8B", 4097).rope_length is None  # nothing depends on it
    assert read("granite-3.3-8b").logit_scale == 1 / 16


@pytest.mark.parametrize("names", [{"type": "su"}, {"type": "yarn"}, {"type": "su", "rope_type": "longrope"}])
def test_old_names_of_longrope_are_read(names):
    tree = PUBLISHED["Phi-3-mini-128k"]
    old = {**tree, "rope_scaling": {**LONG_FACTORS, **names}}
    assert parse_config(old, place="old") == parse_config(tree, place="new")


def changed(name: str, **changes: Any) -> dict[str, Any]:
    tree = {**CASES[name].config_json, **changes}
    return {key: value for key, value in tree.items() if value is not ...}


GEMMA_ROPES = CASES["gemma3"].tree["rope_parameters"]
BAD = [
    (changed("llama", num_experts=8), "key 'num_experts' .value 8. is not understood"),
    (changed("qwen3", moe_intermediate_size=64), "key 'moe_intermediate_size'"),
    (changed("gemma3", vision_config={}), "key 'vision_config'"),
    (changed("gemma3", model_type="gemma3"), "model_type is 'gemma3'; supported are"),
    (changed("llama", model_type=...), "model_type is None"),
    (changed("mistral", layer_types=["full_attention"] * 4), "key 'layer_types'"),
    (changed("mistral", attention_bias=True), "key 'attention_bias'"),
    (changed("olmo", rms_norm_eps=1e-5), "key 'rms_norm_eps'"),
    (changed("llama", num_hidden_layers=...), "key 'num_hidden_layers' is missing"),
    (changed("llama", hidden_act="relu2"), "hidden_act is 'relu2'; supported are silu"),
    (changed("gemma", hidden_act="silu"), "hidden_act is 'silu'; supported is only 'gelu_pytorch_tanh'"),
    (changed("gemma2", hidden_act="silu"), "hidden_act is 'silu', but hidden_activation is 'gelu_pytorch_tanh'"),
    (changed("gemma2", sliding_window_size=99), "sliding_window_size is 99, but sliding_window is 12"),
    (changed("gemma2", sliding_window=None), "layers slide but there is no sliding_window"),
    (changed("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention is True"),
    (changed("gemma3", attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0; supported is only None"),
    (changed("gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar is 0; expected a positive number"),
    (changed("gemma2", final_logit_softcapping=-1.0), "final_logit_softcapping is -1.0"),
    (changed("llama", quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    (changed("qwen2", attention_dropout=0.1), "attention_dropout is 0.1"),
    (changed("qwen2", use_mrope=True), "use_mrope is True"),
    (changed("qwen2", layer_types=["sliding_attention"] * 4), "layers slide but there is no sliding_window"),
    (changed("qwen2_window", layer_types=["sliding_attention"]), "layer_types is .* for each of 4 layers"),
    (changed("qwen2_window", layer_types=["chunked_attention"] * 4), "layer_types is"),
    (changed("qwen2_window", max_window_layers="2"), "max_window_layers is '2'; expected int"),
    (changed("qwen2_window", use_sliding_window=1), "use_sliding_window is 1; expected bool"),
    (changed("gemma3", sliding_window_pattern=0), "sliding_window_pattern is 0; expected at least 1"),
    (changed("phi3", lm_head_bias=True), "lm_head_bias is True"),
    (changed("phi3", resid_pdrop=0.1), "resid_pdrop is 0.1"),
    (changed("smollm3", no_rope_layers=[1, 0]), r"no_rope_layers is \[1, 0\]; expected a 0 or 1 for each of 4"),
    (changed("granite", logits_scaling=0.0), "logits_scaling is 0.0; expected a positive number"),
    (changed("llama3", partial_rotary_factor=0.5), "key 'partial_rotary_factor'"),
    (changed("llama", **rope("proportional")), "has rope_type = 'proportional'; supported are default"),
    (changed("llama", rope_theta=..., **rope("linear")), "has rope_type = 'linear' but no factor"),
    (changed("linear", **rope("linear", factor=2.0, mystery=1)), "has mystery = 1, which rope_type 'linear'"),
    (changed("linear", **rope("linear", factor="2")), "has factor = '2'; expected a positive number"),
    (changed("linear", rope_theta=1e4), "rope_parameters has rope_theta = 5000.0, but rope_theta is 10000.0"),
    (changed("linear", rope_parameters=[1]), r"rope_parameters is \[1\]; expected an object"),
    (changed("llama3", **rope("llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0)), "must exceed"),
    (changed("phi4", original_max_position_embeddings=99), "original_max_position_embeddings = 80, but .* is 99"),
    (changed("phi4", **rope("longrope", short_factor=[1.0], long_factor=[1.0])), "have 1 numbers; expected 8"),
    (changed("phi4", **rope("longrope", short_factor=FACTORS, long_factor=5)), "long_factor = 5; expected a list"),
    (changed("yarn", **rope("yarn", factor=2.0, original_max_position_embeddings=1)), "expected at least 2"),
    (changed("gemma3", rope_parameters={"rope_type": "default"}), "rope_parameters has rope_type = 'default'"),
    (changed("gemma3", rope_theta=1e4), "rope_theta and rope_parameters are both given"),
    (changed("gemma3", rope_parameters={**GEMMA_ROPES, "chunked_attention": {}}), "has chunked_attention"),
    (changed("olmo3", rope_parameters=..., rope_theta=1e4), "rope_theta is 10000.0; versions of transformers differ"),
]


@pytest.mark.parametrize(("tree", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_configs_not_understood_are_refused(tree, words):
    with pytest.raises(DnoError, match=words) as error:
        parse_config(tree, place="where/config.json")
    assert str(error.value).startswith("where/config.json: ")
