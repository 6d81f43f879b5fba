"""Adapters to and from PEFT's folders, compared with PEFT itself where it is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dno_jax.config.adapter import AdapterSection
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.adapters import AdapterConfig, merging, shown_target, targets_of
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.hf import peft as ours
from dno_jax.model.params import abstract_adapters
from tests.model.checkpoints import same, torch_logits
from tests.model.conftest import hf_config, run, write_json
from tests.model.families import CASES
from tests.model.test_families import stir
from tests.model.test_towers import save_theirs as save_composite

TOKEN = np.random.default_rng(0).integers(3, 97, size=(2, 24))
# What transformers itself, and PEFT by what it calls of it, warn of.
QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def random_adapters(config, adapter, size=0.2):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (size * rng.normal(size=leaf.shape)).astype(np.float32), abstract_adapters(config, adapter)
    )


def apart(config, params, adapter, adapters):
    token = jnp.asarray(TOKEN, jnp.int32)
    position = jnp.broadcast_to(jnp.arange(token.shape[1], dtype=jnp.int32), token.shape)
    variables = {"params": params, "adapters": adapters}
    hidden, _ = Decoder(config, adapter=adapter).apply(variables, token, position)
    return np.asarray(logits(config, params, hidden))


def merged(params, adapters, adapter):
    change, arrays = merging(jax.tree.map(jnp.asarray, adapters), adapter), jax.tree.map(jnp.array, params)
    return jax.tree.map_with_path(lambda path, leaf: change([key.key for key in path], leaf), arrays)


def by_peft(checkpoint, folder, *, merge=False):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    if merge:
        model = model.merge_and_unload()
    with torch.no_grad():
        return model(torch.tensor(TOKEN)).logits.numpy()


@pytest.fixture
def adapter(config):
    return AdapterConfig.of(config, rank=3, alpha=4.5)


@pytest.fixture
def folder(tmp_path, config, adapter):
    source = tmp_path / "source-of-adapter"  # of which its configuration alone is looked at
    source.mkdir()
    write_json(source / "config.json", hf_config(config))
    adapters = random_adapters(config, adapter)
    ours.save(tmp_path / "adapter", config, adapter, adapters, source=source, base=("base", None))
    return tmp_path / "adapter"


def test_a_folder_reads_back_bit_for_bit_and_is_what_peft_writes(config, adapter, folder):
    same(ours.load(folder, config, adapter), random_adapters(config, adapter))
    assert sorted(path.name for path in folder.iterdir()) == [ours.CONFIG_FILE, ours.WEIGHTS_FILE]
    tensors = load_file(folder / ours.WEIGHTS_FILE)
    prefix = "base_model.model.model.layers.2.self_attn"
    assert tensors[f"{prefix}.o_proj.lora_A.weight"].shape == (3, 48)
    assert tensors[f"{prefix}.k_proj.lora_B.weight"].shape == (16, 3)
    assert len(tensors) == 2 * 7 * 3
    tree = json.loads((folder / ours.CONFIG_FILE).read_text())
    assert (tree["r"], tree["lora_alpha"], tree["base_model_name_or_path"]) == (3, 4.5, "base")
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert tree["target_modules"] == modules


@QUIET
def test_peft_on_transformers_gives_our_logits(config, params, adapter, folder, checkpoint, tmp_path):
    found = apart(config, params, adapter, random_adapters(config, adapter))
    assert np.abs(found - run(config, params, TOKEN)).max() > 0.5
    np.testing.assert_allclose(found, by_peft(checkpoint, folder), atol=1e-4)
    # And so does the merged checkpoint, in transformers alone.
    whole = merged(params, random_adapters(config, adapter), adapter)
    hf.save(tmp_path / "merged", config, whole, source=checkpoint)
    np.testing.assert_allclose(torch_logits(tmp_path / "merged", TOKEN), found, atol=1e-4)
    np.testing.assert_allclose(by_peft(checkpoint, folder, merge=True), found, atol=1e-4)


def save_theirs(name, path):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CASES[name].config_json))
    stir(model, 0)
    model.save_pretrained(path)
    return model


# ERNIE's rows of q and k lie in another order in files: those of an adapter as well. In the others some layers are no
# attention, and matrices of ours lie in one.
@QUIET
@pytest.mark.parametrize(
    "name", ["ernie4_5", *(pytest.param(name, marks=pytest.mark.soak) for name in ("qwen3_5", "lfm2"))]
)
def test_matrices_that_lie_otherwise_in_files_have_adapters_that_lie_so(tmp_path, name):
    theirs = save_theirs(name, tmp_path / "base")
    config, params = hf.load(tmp_path / "base")
    adapter = AdapterConfig.of(config, rank=3, alpha=4.5)
    adapters = random_adapters(config, adapter)
    ours.save(tmp_path / "adapter", config, adapter, adapters, source=tmp_path / "base", base=("base", None))
    same(ours.load(tmp_path / "adapter", config, adapter), adapters)
    stored = load_file(tmp_path / "adapter" / ours.WEIGHTS_FILE)
    linear = {key for key, module in theirs.named_modules() if type(module).__name__ == "Linear"} - {"lm_head"}
    assert {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in stored} == linear
    found = apart(config, params, adapter, adapters)
    assert np.abs(found - run(config, params, TOKEN)).max() > 0.01
    np.testing.assert_allclose(found, by_peft(tmp_path / "base", tmp_path / "adapter"), atol=1e-4)
    np.testing.assert_allclose(run(config, merged(params, adapters, adapter), TOKEN), found, atol=1e-4)


# Targets in PEFT's words -> ours.
NAMED = {
    "qwen3_5": {
        "in_proj_qkv": "delta_qkv",
        "in_proj_z": "delta_gate",
        "in_proj_b": "delta_strength",
        "in_proj_a": "delta_decay",
        "out_proj": "delta_out",
        "o_proj": "o",
        "down_proj": "down",
    },
    "lfm2": {"in_proj": "conv_in", "w1": "gate", "w3": "up", "w2": "down", "self_attn.out_proj": "o", "k_proj": "k"},
}


@QUIET
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("qwen3_5", [*NAMED["qwen3_5"]]),
        pytest.param("lfm2", [*NAMED["lfm2"]], marks=pytest.mark.soak),
        pytest.param("qwen3_5", ["out_proj", "in_proj_a"], marks=pytest.mark.soak),
        pytest.param("lfm2", ["out_proj"], marks=pytest.mark.soak),
        pytest.param("lfm2", ["conv.out_proj", "q_proj"], marks=pytest.mark.soak),
        pytest.param("qwen3_5", "all-linear", marks=pytest.mark.soak),
        pytest.param("lfm2", "all-linear", marks=pytest.mark.soak),
    ],
)
def test_an_adapter_that_peft_made_of_layers_that_do_not_attend_is_read(tmp_path, name, targets):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = save_theirs(name, tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    for key, weight in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "made")
    config, params = hf.load(tmp_path / "base")
    wanted = "all" if targets == "all-linear" else targets
    adapter = AdapterConfig.of(config, rank=4, alpha=6.0, targets=wanted)
    if set(wanted) == NAMED[name].keys():
        assert set(adapter.targets) == set(NAMED[name].values())
    adapters = ours.load(tmp_path / "made", config, adapter)
    found = apart(config, params, adapter, adapters)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(TOKEN)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - run(config, params, TOKEN)).max() > 0.01
    # Written again it is theirs, and names no more modules than it has.
    ours.save(tmp_path / "again", config, adapter, adapters, source=tmp_path / "base", base=("base", None))
    theirs, again = (load_file(tmp_path / part / ours.WEIGHTS_FILE) for part in ("made", "again"))
    same(again, theirs)
    tree = json.loads((tmp_path / "again" / ours.CONFIG_FILE).read_text())
    anew = peft.get_peft_model(
        save_theirs(name, tmp_path / "base"), peft.LoraConfig(r=4, target_modules=tree["target_modules"])
    )
    assert set(peft.get_peft_model_state_dict(anew)) == set(theirs)


@QUIET
@pytest.mark.soak
def test_adapters_of_a_qwen_that_sees_stand_beside_its_text(tmp_path):
    """As it is published; transformers loads it with the tower or without."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText

    save_composite("qwen3_5", tmp_path / "base")
    config, params = hf.load(tmp_path / "base")
    adapter = AdapterConfig.of(config, rank=3, alpha=4.5)
    adapters = random_adapters(config, adapter)
    ours.save(tmp_path / "adapter", config, adapter, adapters, source=tmp_path / "base", base=("base", None))
    found = apart(config, params, adapter, adapters)
    np.testing.assert_allclose(found, by_peft(tmp_path / "base", tmp_path / "adapter"), atol=1e-4)

    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    within = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=r".*language_model.*(in_proj_z|q_proj)")
    model = peft.get_peft_model(whole, within)
    for key, weight in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "made")
    adapter = AdapterConfig.of(config, rank=3, alpha=4.5, targets=["in_proj_z", "q_proj"])
    found = apart(config, params, adapter, ours.load(tmp_path / "made", config, adapter))
    with torch.no_grad():
        expected = model.eval()(torch.tensor(TOKEN)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_targets_that_a_model_has_not_are_named():
    qwen, lfm, llama = (CASES[name].config() for name in ("qwen3_5", "lfm2", "llama"))
    for config, name, words in (
        (lfm, "in_proj_qkv", "'in_proj_qkv'; expected all, or some of q_proj, .*in_proj, conv.out_proj"),
        (qwen, "conv.out_proj", "'conv.out_proj'; expected .*in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj"),
        (qwen, "conv1d", "'conv1d'"),
        (llama, "out_proj", "'out_proj'; expected all, or some of q_proj, k_proj, v_proj, o_proj, gate_proj"),
        (llama, "in_proj", "'in_proj'"),
    ):
        with pytest.raises(DnoError, match=f"adapter.targets has {words}"):
            AdapterConfig.of(config, rank=2, alpha=2.0, targets=["q_proj", name])
    for config in (lfm, qwen, llama):  # what is shown can be given, and a configuration takes it
        shown = tuple(map(shown_target, targets_of(config)))
        assert set(AdapterSection(targets=shown).targets) == set(shown)
        assert AdapterConfig.of(config, rank=2, alpha=2.0, targets=shown).targets == targets_of(config)
    for named in NAMED.values():
        assert set(AdapterSection(targets=tuple(named)).targets) == named.keys()
    assert AdapterConfig.of(lfm, rank=2, alpha=2.0, targets=["out_proj"]).targets == ("o", "conv_out")


@QUIET
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_made_is_read(config, params, checkpoint, tmp_path, rslora):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    made = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["v_proj", "down_proj", "q_proj"], use_rslora=rslora, lora_dropout=0.1,
        init_lora_weights="gaussian", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base, made)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "made")
    adapter = AdapterConfig.of(config, rank=4, alpha=12.0 if rslora else 6.0, targets=["q_proj", "v_proj", "down_proj"])
    found = apart(config, params, adapter, ours.load(tmp_path / "made", config, adapter))
    np.testing.assert_allclose(found, by_peft(checkpoint, tmp_path / "made"), atol=1e-4)
    assert np.abs(found - run(config, params, TOKEN)).max() > 0.5
    with pytest.raises(DnoError, match=r"rank 4, alpha .*Set adapter\.rank=4 .*targets=\[q_proj,v_proj,down_proj\]"):
        ours.load(tmp_path / "made", config, AdapterConfig.of(config, rank=8, alpha=6.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"layers_to_transform": [0]}, "layers_to_transform is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"target_parameters": ["experts"]}, "target_parameters is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"of_next_year": {"a": 1}}, "of_next_year is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(folder, config, adapter, changes, words):
    file = folder / ours.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(DnoError, match=words) as caught:
        ours.load(folder, config, adapter)
    assert str(file) in str(caught.value)
    assert any(fix in str(caught.value) for fix in ("merge_and_unload", "expected", "supported is only"))


def without(name):
    return lambda tensors: tensors.pop(name)


def with_one(name, shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


LAYERS = "base_model.model.model.layers"
A = f"{LAYERS}.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without(A), rf"tensor {A} is missing"),
        (with_one(A, (5, 36)), rf"tensor {A} has shape \(5, 36\); this model and r=3 want \(3, 36\)"),
        (with_one("base_model.model.lm_head.lora_A.weight", (3, 36)), r"unexpected tensor .*lm_head"),
        (with_one(f"{LAYERS}.0.mlp.up_proj.lora_B.bias", (56,)), r"unexpected tensor .*lora_B\.bias"),
        (with_one(f"{LAYERS}.9.mlp.up_proj.lora_A.weight", (3, 36)), r"unexpected tensor .*layers\.9"),
        (lambda tensors: tensors[A].__setitem__((0, 0), np.nan), "holds NaN or infinity"),
        (lambda tensors: tensors.clear(), "no adapter of this model"),
    ],
    ids=["missing", "shape", "head", "bias", "layer", "nan", "empty"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(folder, config, adapter, edit, words):
    tensors = {name: array.copy() for name, array in load_file(folder / ours.WEIGHTS_FILE).items()}
    edit(tensors)
    save_file(tensors, folder / ours.WEIGHTS_FILE)
    with pytest.raises(DnoError, match=words):
        ours.load(folder, config, adapter)


def test_a_pickle_and_a_place_without_an_adapter_are_refused(folder, config, adapter, tmp_path):
    with pytest.raises(DnoError, match=r"no such directory; expected one of PEFT's"):
        ours.load(tmp_path / "nowhere", config, adapter)
    (folder / ours.WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(DnoError, match=r"holds a pickle .*safe_serialization=True"):
        ours.load(folder, config, adapter)


def test_where_matrices_are_fused_the_merged_checkpoint_alone_is_written():
    config = CASES["phi3"].config()
    with pytest.raises(ours.NotForPeft, match=r"phi3's checkpoints have one matrix qkv_proj in place of q_proj"):
        ours.adapter_table(config, AdapterConfig.of(config, rank=2, alpha=2.0))
    # A matrix that has a tensor of its own has an adapter of its own.
    found = ours.adapter_table(config, AdapterConfig.of(config, rank=2, alpha=2.0, targets=["o_proj", "down_proj"]))
    assert [tensor.path[1] for tensor in found] == ["o_a", "o_b", "down_a", "down_b"]
