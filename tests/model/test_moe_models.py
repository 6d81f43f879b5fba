"""Mixtral and Qwen3-MoE against transformers: tiny checkpoints with random weights, written by transformers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.model import hf, moe
from dno_jax.model.block import LOAD
from dno_jax.model.cache import init_cache
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.hf.config_json import parse_config
from dno_jax.model.hf.tensors import stored_tensors, tensor_table
from dno_jax.model.params import abstract_params
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN
from dno_jax.training.state import param_shardings
from tests.model.conftest import run

LENGTH = 64
# Logits are of order one and pass through three layers of float32, whose unit there is 1.2e-7: some forty of them.
TOLERANCE = 5e-6
COMMON = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"model_type": "mixtral", "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "intermediate_size": 88, "moe_intermediate_size": 40, "head_dim": 10,
        "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "attention_bias": True,
    },
    "qwen3_moe_unnormed": {
        "model_type": "qwen3_moe", "intermediate_size": 88, "moe_intermediate_size": 40, "head_dim": 10,
        "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False, "tie_word_embeddings": True,
    },
}  # fmt: skip


def stir(model):
    """Weights under which every part counts, and tokens that differ enough to go to every expert."""
    import torch

    random = torch.Generator().manual_seed(1)
    table = 0.12 if model.config.tie_word_embeddings else 0.2  # as a head too it must give logits of order one
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim == 1:
                weight.add_((0.05 if name.endswith("bias") else 0.3) * noise)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                weight.copy_((0.06 if name.startswith("lm_head") else table) * noise)
            else:
                weight.copy_(noise / weight.shape[-1] ** 0.5)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What transformers wrote and computes from it, on a whole row and one padded at its end."""

    path: Path
    token: np.ndarray  # [2, LENGTH]
    position: np.ndarray  # [2, LENGTH], -1 is padding
    logits: np.ndarray  # [2, LENGTH, V] float32
    bfloat16: np.ndarray  # the same computed in bfloat16
    load_balance: float
    margin: float  # of router logits, between the last expert chosen and the first one left out, smallest of all

    @property
    def real(self) -> np.ndarray:
        return self.position >= 0


def theirs(path, token, mask, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(token), attention_mask=torch.tensor(mask), output_router_logits=True)


@pytest.fixture(scope="session", params=FAMILIES)
def reference(request, tmp_path_factory) -> Reference:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    tree = FAMILIES[request.param]
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**COMMON, **tree))
    stir(made)
    made.save_pretrained(path)
    token, mask = np.random.default_rng(0).integers(97, size=(2, LENGTH)), np.ones((2, LENGTH), np.int64)
    mask[1, 40:] = 0
    exact, rough = theirs(path, token, mask), theirs(path, token, mask, "bfloat16")
    top = -np.sort(-np.stack(exact.router_logits)[:, mask.reshape(-1) > 0], axis=-1)
    k = tree["num_experts_per_tok"]
    return Reference(
        path=path,
        token=token,
        position=np.where(mask, np.arange(LENGTH), -1),
        logits=exact.logits.numpy(),
        bfloat16=rough.logits.float().numpy(),
        load_balance=float(exact.aux_loss),
        margin=float((top[..., k - 1] - top[..., k]).min()),
    )


@pytest.fixture(scope="session")
def model(reference):
    return hf.load(reference.path)


def ours(reference, config, params, **kwargs):
    """Logits of the tokens that are no padding, [tokens, V]."""
    return run(config, params, reference.token, reference.position, **kwargs)[reference.real]


@pytest.mark.parametrize("experts", [moe.dense_experts, moe.ragged_experts])
def test_logits_equal_those_of_transformers(reference, model, experts):
    assert reference.margin > 1e-4  # router logits are exact to some 1e-6: nobody chooses another expert
    found = ours(reference, *model, experts=experts)
    np.testing.assert_allclose(found, reference.logits[reference.real], atol=TOLERANCE, rtol=0)


def test_load_balance_equals_transformers(reference, model):
    config, params = model
    token, position = (jnp.asarray(a, jnp.int32) for a in (reference.token, reference.position))
    _, left = Decoder(config).apply({"params": params}, token, position, mutable=["intermediates"])
    load = left["intermediates"]["layers"][LOAD][0]
    assert load.assigned.shape == (3, config.num_experts)
    assert float(moe.load_balance_loss(load)) == pytest.approx(reference.load_balance, abs=1e-6)
    np.testing.assert_array_equal(load.num_tokens, [reference.real.sum()] * 3)
    assert (np.asarray(load.assigned) > 0).all()  # every expert takes part in the comparisons of this file


def test_bfloat16_is_as_near_as_transformers_is_to_itself(reference, model):
    """Where rounding sends a token to another expert its logits jump, here and there: no bound on the worst token.

    The median token's worst logit is within 0.06 of the logits' deviation of transformers in bfloat16, and our mean
    error against float32 at most 1.5 times that of transformers in bfloat16.
    """
    found = ours(reference, *model, dtype=jnp.bfloat16)
    exact, rough = reference.logits[reference.real], reference.bfloat16[reference.real]
    assert np.median(np.abs(found - rough).max(-1)) < 0.06 * exact.std()
    assert np.abs(found - exact).mean() < 1.5 * np.abs(rough - exact).mean()


SABOTAGE = {
    "norm": lambda config, params: (dataclasses.replace(config, expert_norm=not config.expert_norm), params),
    "fewer experts": lambda config, params: (_with_top(config, -1), params),
    "more experts": lambda config, params: (_with_top(config, 1), params),
    "activation": lambda config, params: (dataclasses.replace(config, hidden_act="gelu"), params),
    "router in bfloat16": lambda config, params: (
        config,
        _with_leaf(params, "router", lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32)),
    ),
    "experts in another order": lambda config, params: (config, _with_leaf(params, "down", lambda a: a[:, ::-1])),
    "gate and up swapped": lambda config, params: (
        config,
        {**params, "layers": {**params["layers"], "gate": params["layers"]["up"], "up": params["layers"]["gate"]}},
    ),
}


def _with_top(config, change):
    return dataclasses.replace(config, num_experts_per_tok=config.num_experts_per_tok + change)


def _with_leaf(params, name, change):
    return {**params, "layers": {**params["layers"], name: change(params["layers"][name])}}


@pytest.mark.parametrize("switch", SABOTAGE)
def test_sabotage_shows(reference, model, switch):
    found = ours(reference, *SABOTAGE[switch](*model))
    assert np.abs(found - reference.logits[reference.real]).max() > 20 * TOLERANCE


def test_cached_decoding_equals_the_full_forward(reference, model):
    config, params = model
    decoder = Decoder(config)

    @jax.jit
    def step(token, position, cache):
        hidden, cache = decoder.apply({"params": params}, token, position, cache)
        return logits(config, params, hidden), cache

    token, position = (jnp.asarray(a, jnp.int32) for a in (reference.token, reference.position))
    cache, found = init_cache(config, batch_size=2, num_slots=LENGTH), []
    for piece in [slice(0, 48), *(slice(t, t + 1) for t in range(48, LENGTH))]:
        out, cache = step(token[:, piece], position[:, piece], cache)
        found.append(out)
    found = np.concatenate(found, axis=1)[reference.real]
    np.testing.assert_allclose(found, reference.logits[reference.real], atol=TOLERANCE, rtol=0)


def test_export_gives_back_the_files(reference, model, tmp_path):
    config, params = model
    path = tmp_path / "export"
    hf.save(path, config, params, source=reference.path)
    was, found = (load_file(folder / "model.safetensors") for folder in (reference.path, path))
    assert found.keys() == was.keys()
    for name in was:
        assert (found[name].dtype, found[name].shape) == (was[name].dtype, was[name].shape)
        assert found[name].tobytes() == was[name].tobytes(), name
    again = theirs(path, reference.token, (reference.position >= 0).astype(np.int64)).logits.numpy()
    np.testing.assert_array_equal(again, reference.logits)


def test_a_part_of_the_experts_is_read_alone(reference, model):
    """What a device of the expert axis reads: its experts' tensors and no others."""
    config, params = model
    asked = []

    class Files:
        def __init__(self):
            self.tensors = load_file(reference.path / "model.safetensors")

        def read(self, name, index):
            asked.append(name)
            return self.tensors[name][index]

    down = next(tensor for tensor in tensor_table(config) if tensor.path == ("layers", "down"))
    index = (slice(1, 3), slice(2, 4), slice(8, 24), slice(None))
    np.testing.assert_array_equal(down.read(Files(), index), params["layers"]["down"][index])
    assert asked == [down.template.format(layer, expert) for layer in (1, 2) for expert in (2, 3)]


def parse(family, **extra):
    return parse_config({**COMMON, **FAMILIES[family], **extra}, place="config.json")


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"num_local_experts": 5}),
        ("qwen3_moe", {"num_experts": None}),
        ("qwen3_moe", {"num_experts_per_tok": 7}),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}),
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("mixtral", {"num_local_experts": "4"}),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_name(family, extra):
    (key,) = extra
    with pytest.raises(DnoError, match=key):
        parse(family, **extra)


# config.json of Mixtral-8x7B-v0.1 and Qwen3-30B-A3B, and half of what their indices give as total_size in bfloat16.
PUBLISHED = {
    "mixtral": (
        {
            "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
            "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
            "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
        },
        93_405_585_408 // 2,
    ),
    "qwen3_moe": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
            "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
            "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
            "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        },
        61_064_245_248 // 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_checkpoints_are_understood(family):
    tree, num_parameters = PUBLISHED[family]
    config = parse_config(tree, place="config.json")
    assert config.expert_norm
    sizes = {stored.name: np.prod(stored.shape) for stored in stored_tensors(config)}
    assert sum(sizes.values()) == num_parameters
    shapes = jax.tree.leaves(abstract_params(config))
    assert sum(np.prod(leaf.shape) for leaf in shapes) == num_parameters


def test_the_number_of_experts_has_two_names():
    """Published files of Qwen3-MoE say num_experts where transformers 5 writes num_local_experts; both may agree."""
    config = parse("qwen3_moe", num_local_experts=6)
    tree = {**COMMON, **FAMILIES["qwen3_moe"]}
    assert parse_config(tree, place="config.json") == config
    tree["num_local_experts"] = tree.pop("num_experts")
    assert parse_config(tree, place="config.json") == config
    assert (config.num_experts, config.num_experts_per_tok, config.intermediate_size) == (6, 3, 40)
    assert not parse("qwen3_moe", norm_topk_prob=False).expert_norm


def test_a_checkpoint_is_read_into_an_expert_axis(reference, model):
    config, params = model
    mesh = make_mesh(MeshSection(data=1, fsdp=2, expert=2), jax.devices()[:4])
    _, placed = hf.load(reference.path, shardings=param_shardings(config, mesh, TRAIN))
    assert placed["layers"]["gate"].sharding.spec == PartitionSpec(None, "expert", "fsdp")
    for (path, a), b in zip(jax.tree.leaves_with_path(placed), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
