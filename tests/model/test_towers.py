"""Models that see: their text part is what transformers computes, and their tower goes through an export untouched."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.hf.config_json import parse_config
from tests.model.checkpoints import edit_tensors, torch_logits
from tests.model.conftest import run, write_json
from tests.model.families import CASES, LONG, SHORT, SIZES
from tests.model.test_families import TOLERANCE, stir

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
TOWERS = {
    "gemma3": {
        "text_config": CASES["gemma3"].config_json | {"final_logit_softcapping": None},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": CASES["ministral3"].config_json,
        "vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION},
        "image_token_index": 10,
    },
    "mistral3 of old": {
        "text_config": {"model_type": "mistral", **SIZES, "head_dim": 12, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION},
        "image_token_index": 10,
    },
    "qwen3_5": {
        "text_config": CASES["qwen3_5"].config_json,
        "vision_config": {
            **{key: VISION[key] for key in ("hidden_size", "intermediate_size")},
            "depth": 1,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 96,
            "num_position_embeddings": 16,
        },
        **{f"{what}_token_id": 3 + index for index, what in enumerate(("image", "video", "vision_start"))},
    },
}
# As published files name them; transformers skips them.
NEXT_TOKENS = {"mtp.fc.weight": (96, 192), "mtp.norm.weight": (96,), "mtp.layers.0.self_attn.q_norm.weight": (16,)}


def config_json(name: str) -> dict:
    tied = name == "gemma3"
    return {"model_type": name.split()[0], **TOWERS[name], "tie_word_embeddings": tied}


def their_logits(path, token, dtype: str = "float32") -> np.ndarray:
    import torch
    from transformers import AutoModelForImageTextToText

    kind = getattr(torch, dtype)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=kind, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(token)).logits.float().numpy()


def add_next_tokens(path) -> None:
    """Put a head that predicts further tokens beside a model, in a dtype of its own."""
    random = np.random.default_rng(1)
    added = {name: random.standard_normal(shape).astype(np.float16) for name, shape in NEXT_TOKENS.items()}
    edit_tensors(path, lambda tensors: tensors.update(added))


def save_theirs(name: str, path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config_json(name)))
    stir(model, 0)
    model.save_pretrained(path)
    if name == "qwen3_5":
        add_next_tokens(path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if name == "mistral3 of old" else ()) for name in TOWERS]
)
def test_text_is_computed_and_the_tower_is_carried(tmp_path, name):
    pytest.importorskip("torch")
    source = tmp_path / "source"
    save_theirs(name, source)
    token = np.random.default_rng(0).integers(11, SIZES["vocab_size"], size=(2, LONG))
    expected = their_logits(source, token)
    config, params = hf.load(source)
    with jax.disable_jit():
        tolerance = TOLERANCE * (CASES[name].rougher if name in CASES else 1.0)
        np.testing.assert_allclose(run(config, params, token), expected, atol=tolerance, rtol=0)
    hf.save(tmp_path / "out", config, params, source=source)
    original, written = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert original.keys() == written.keys()
    beginnings = ("model.visual.", "mtp.") if name == "qwen3_5" else ("vision_tower.",)
    assert all(any(key.startswith(beginning) for key in written) for beginning in beginnings)
    for key, tensor in original.items():
        assert tensor.tobytes() == written[key].tobytes(), key
    np.testing.assert_array_equal(their_logits(tmp_path / "out", token), expected)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == (5000.0 if "rope_parameters" in TOWERS[name]["text_config"] else 10_000.0)


def test_other_layouts_of_names_and_dtypes_keep_theirs(tmp_path, params, config):
    """As transformers 4.5x saved them, the tower in two dtypes of its own; --dtype is for the language model."""
    del params, config
    tree = {"model_type": "gemma3", "text_config": TOWERS["gemma3"]["text_config"]}
    write_json(tmp_path / "config.json", tree)
    shape = hf.read_config(tmp_path)
    from dno_jax.model.hf.tensors import stored_tensors

    random = np.random.default_rng(0)
    tensors = {
        s.name.replace("model.", "model.language_model.", 1): random.standard_normal(s.shape).astype("f4") * 0.1
        for s in stored_tensors(shape)
    }
    tower = {"model.vision_tower.w": np.ones(3, np.float16), "model.multi_modal_projector.i": np.arange(3)}
    save_file(tensors | tower, tmp_path / "model.safetensors", metadata={"format": "pt"})
    import ml_dtypes

    hf.save(tmp_path / "out", shape, hf.load(tmp_path)[1], source=tmp_path, dtype=ml_dtypes.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys() | tower.keys()
    for name, tensor in tower.items():
        assert (written[name].dtype, written[name].tobytes()) == (tensor.dtype, tensor.tobytes())
    assert {written[name].dtype.name for name in tensors} == {"bfloat16"}


def tensors_of(path) -> dict[str, np.ndarray]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.soak
def test_a_model_in_half_precision_keeps_each_tensors_dtype_over_shards(tmp_path):
    """As published: bfloat16, decay rates in float32, and a head for further tokens in shards of their own."""
    pytest.importorskip("torch")
    import ml_dtypes

    whole, source = tmp_path / "whole", tmp_path / "source"
    save_theirs("qwen3_5", whole)

    def narrow(tensors):
        for name, tensor in tensors.items():
            if not name.endswith(("A_log", "linear_attn.norm.weight")) and not name.startswith("mtp."):
                tensors[name] = tensor.astype(ml_dtypes.bfloat16)

    edit_tensors(whole, narrow)
    config, params = hf.load(whole)
    for path, given in ((source, whole), (tmp_path / "out", source)):  # of one file, and of shards
        hf.save(path, config, params, source=given, max_shard_bytes=60_000)
    original, written = (tensors_of(path) for path in (whole, tmp_path / "out"))
    assert {key: (t.dtype, t.tobytes()) for key, t in original.items()} == {
        key: (t.dtype, t.tobytes()) for key, t in written.items()
    }
    assert {t.dtype.name for t in written.values()} == {"bfloat16", "float32", "float16"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    assert len(set(index["weight_map"].values())) > 3
    token = np.random.default_rng(0).integers(11, SIZES["vocab_size"], size=(1, SHORT))
    for dtype in ("float32", "bfloat16"):
        np.testing.assert_array_equal(*(their_logits(path, token, dtype) for path in (whole, tmp_path / "out")))


@pytest.mark.soak
def test_what_stands_beside_a_text_alone_is_carried_too(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CASES["qwen3_5_odd"].config_json))
    model.save_pretrained(tmp_path / "source")
    add_next_tokens(tmp_path / "source")
    config, params = hf.load(tmp_path / "source")
    hf.save(tmp_path / "out", config, params, source=tmp_path / "source")
    original, written = (load_file(tmp_path / part / "model.safetensors") for part in ("source", "out"))
    assert NEXT_TOKENS.keys() < written.keys() == original.keys()
    for key, tensor in original.items():
        assert (tensor.dtype, tensor.tobytes()) == (written[key].dtype, written[key].tobytes()), key
    token = np.arange(20)[None]
    np.testing.assert_array_equal(*(torch_logits(tmp_path / part, token) for part in ("source", "out")))
    # Nothing else passes for it.
    edit_tensors(tmp_path / "source", lambda tensors: tensors.update({"mtpx.weight": np.ones(3, np.float32)}))
    with pytest.raises(DnoError, match=r"unexpected tensor mtpx\.weight"):
        hf.load(tmp_path / "source")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": None}, "text_config is None; expected the object of a gemma3_text"),
        ({"architectures": ["Gemma3ForCausalLM"]}, "gemma3 supports .'Gemma3ForConditionalGeneration'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"text_config": CASES["gemma3"].config_json}, "final_logit_softcapping = 1.5; .* does not apply it"),
        ({"audio_config": {}}, "'audio_config' is not understood in a gemma3"),
        ({"text_config": {"model_type": "llama"}}, "text_config has model_type 'llama'; a gemma3 supports gemma3_text"),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, "the opposite; make them equal"),
    ],
    ids=range(7),
)
def test_what_is_not_understood_around_a_text_is_refused(changes, words):
    with pytest.raises(DnoError, match=words):
        parse_config({**config_json("gemma3"), **changes}, place="x")
    with pytest.raises(DnoError, match="has no reward models"):
        parse_config(config_json("gemma3"), place="x", head="reward")
