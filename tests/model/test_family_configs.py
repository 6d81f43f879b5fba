"""config.json of every family: published files mean what they should, and what is not understood is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.attention import NO_WINDOW
from dno_jax.model.config import ModelConfig
from dno_jax.model.hf.config_json import parse_config, read_json
from tests.model.families import CASES, FACTORS, rope


def published(model_type: str, **tree: Any) -> dict[str, Any]:
    """A config.json as it lies on the hub, written by some version 4 of transformers: the keys that matter."""
    return {"model_type": model_type, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", **tree}


def sizes(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, positions: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = (hidden, mlp, layers, heads, kv, vocab, positions)
    return dict(zip((*names, "vocab_size", "max_position_embeddings"), numbers, strict=True))


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG_FACTORS = {"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0 + i / 64 for i in range(48)]}
LFM2_KEYS = {
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-5,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "conv_dim_out": 2048,
    "conv_use_xavier_init": True,
    "norm_eps": 1e-5,
    "num_heads": 32,
    "use_pos_enc": True,
}
LFM2_LAYERS = ["full_attention" if layer in (2, 5, 8, 10, 12, 14) else "conv" for layer in range(16)]
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
    "Seed-OSS-36B": published(
        "seed_oss",
        **sizes(5120, 27648, 64, 80, 8, 155136, 524288),
        head_dim=128,
        attention_bias=True,
        attention_out_bias=False,
        attention_dropout=0.1,
        residual_dropout=0.1,
        mlp_bias=False,
        pretraining_tp=1,
        rope_theta=10000000.0,
        rope_scaling={"rope_type": "default"},
    ),
    "EXAONE-4.0-32B": published(
        "exaone4",
        **sizes(5120, 27392, 64, 40, 8, 102400, 131072),
        head_dim=128,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 16,
        rope_scaling={**LLAMA_3, "factor": 16.0, "rope_type": "llama3"},
        rope_theta=1000000,
        sliding_window=4096,
        sliding_window_pattern="LLLG",
    ),
    "EXAONE-4.0-1.2B": published(
        "exaone4",
        **sizes(2048, 4096, 30, 32, 8, 102400, 65536),
        head_dim=64,
        layer_types=["full_attention"] * 30,
        rope_scaling={**LLAMA_3, "factor": 16.0, "rope_type": "llama3"},
        rope_theta=1000000,
        sliding_window=None,
        sliding_window_pattern=None,
        tie_word_embeddings=True,
    ),
    "ERNIE-4.5-0.3B": published(
        "ernie4_5",
        **sizes(1024, 3072, 18, 16, 2, 103424, 131072),
        head_dim=128,
        rope_scaling=None,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        use_bias=False,
    ),
    "LFM2-1.2B": published(
        "lfm2",
        **{key: value for key, value in sizes(2048, 0, 16, 32, 8, 65536, 128000).items() if key != "intermediate_size"},
        **LFM2_KEYS,
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
        rope_theta=1000000.0,
        theta=1000000.0,
        tie_embedding=True,
    ),
    "LFM2.5-1.2B": published(
        "lfm2",
        **sizes(2048, 12288, 16, 32, 8, 65536, 128000),
        **LFM2_KEYS,
        layer_types=LFM2_LAYERS,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
        tie_embedding=True,
        tie_word_embeddings=True,
    ),
    "Qwen3.5-9B's text": published(
        "qwen3_5_text",
        **sizes(4096, 12288, 32, 16, 4, 248320, 262144),
        attention_bias=False,
        attention_dropout=0.0,
        attn_output_gate=True,
        full_attention_interval=4,
        head_dim=256,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_value_head_dim=128,
        mamba_ssm_dtype="float32",
        mlp_only_layers=[],
        mtp_num_hidden_layers=1,
        mtp_use_dedicated_embeddings=False,
        partial_rotary_factor=0.25,
        rms_norm_eps=1e-6,
        rope_parameters={
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    ),
    "glm-4-9b-chat": published(
        "glm",
        **sizes(4096, 13696, 40, 32, 2, 151552, 131072),
        attention_bias=True,
        head_dim=128,
        partial_rotary_factor=0.5,
        rms_norm_eps=1.5625e-07,
    ),
    "GLM-4-9B-0414": published(
        "glm4",
        **sizes(4096, 13696, 40, 32, 2, 151552, 32768),
        attention_bias=False,
        head_dim=128,
        partial_rotary_factor=0.5,
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
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
    exaone = read("EXAONE-4.0-32B")
    assert exaone.windows == (4096, 4096, 4096, NO_WINDOW) * 16
    assert exaone.layer_ropes is not None
    assert [exaone.ropes[i].rope_type for i in exaone.layer_ropes[:4]] == ["llama3"] * 3 + ["none"]
    assert read("EXAONE-4.0-1.2B").layer_ropes is None  # without windows every layer rotates
    assert (read("Seed-OSS-36B").attention_bias, read("Seed-OSS-36B").output_bias) == (True, False)
    assert (read("glm-4-9b-chat").attention_bias, read("glm-4-9b-chat").output_bias) == (True, False)
    assert read("GLM-4-9B-0414").rotary_dim == 64
    liquid, qwen = read("LFM2-1.2B"), read("Qwen3.5-9B's text")
    assert liquid == read("LFM2.5-1.2B")  # one model_type, in the words of the first files and of later ones
    assert (liquid.intermediate_size, liquid.conv_kernel, liquid.head_dim) == (8192, 3, 64)
    assert [layer for layer in range(16) if liquid.layer_mixers[layer] == "attention"] == [2, 5, 8, 10, 12, 14]
    assert liquid.tie_word_embeddings
    assert qwen.layer_mixers == ("gated_delta", "gated_delta", "gated_delta", "attention") * 8
    assert (qwen.rotary_dim, qwen.attention_gate, qwen.norm_offset) == (64, True, 1.0)
    assert [model.attends_everywhere for model in (liquid, qwen, gemma)] == [False, False, True]


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
    (changed("gemma3", model_type="gemma4"), "model_type is 'gemma4'; supported are .*, gemma3, mistral3"),
    (changed("llama", model_type=...), "model_type is None"),
    (changed("mistral", layer_types=["full_attention"] * 4), "key 'layer_types'"),
    (changed("mistral", attention_bias=True), "attention_bias is True; supported is only False"),
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
    (changed("qwen2", attention_dropout=1.5), "attention_dropout is 1.5; expected a share"),
    (changed("qwen2", use_mrope=True), "use_mrope is True"),
    (changed("qwen2", layer_types=["sliding_attention"] * 4), "layers slide but there is no sliding_window"),
    (changed("qwen2_window", layer_types=["sliding_attention"]), "layer_types is .* for each of 4 layers"),
    (changed("qwen2_window", layer_types=["chunked_attention"] * 4), "layer_types is"),
    (changed("qwen2_window", max_window_layers="2"), "max_window_layers is '2'; expected int"),
    (changed("qwen2_window", use_sliding_window=1), "use_sliding_window is 1; expected bool"),
    (changed("gemma3", sliding_window_pattern=0), "sliding_window_pattern is 0; expected at least 1"),
    (changed("phi3", lm_head_bias=True), "lm_head_bias is True"),
    (changed("phi3", resid_pdrop="0.1"), "resid_pdrop is '0.1'; expected a share"),
    (changed("smollm3", no_rope_layers=[1, 0]), r"no_rope_layers is \[1, 0\]; expected a 0 or 1 for each of 4"),
    (
        changed("granite4", layer_types=["linear_attention"] * 4),
        "layer_types is .* supported is attention for each of 4",
    ),
    (changed("granite4", layer_types=...), "layer_types is None; supported is attention"),
    (changed("granite4", layer_types=[["attention"]] * 4), "layer_types is"),
    (changed("granite4", num_local_experts=8), "num_local_experts is 8; supported is only 0"),
    (changed("granite4", position_embedding_type="alibi"), "position_embedding_type is 'alibi'; supported are rope"),
    (changed("ministral3", **rope("default", llama_4_scaling_beta=0.1)), "no original_max_position_embeddings"),
    (changed("ministral3", max_position_embeddings=99), "has max_position_embeddings = 320, but .* is 99"),
    (changed("granite", logits_scaling=0.0), "logits_scaling is 0.0; expected a positive number"),
    (changed("llama3", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; supported is only 1.0"),
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
    (changed("gemma3", rope_theta=1e4), "full_attention has rope_theta = 5000.0, but rope_theta is 10000.0"),
    (changed("gemma3", rope_parameters={**GEMMA_ROPES, "chunked_attention": {}}), "has chunked_attention"),
    (changed("qwen3_5", layer_types=["sliding_attention"] * 4), "layer_types is .* full_attention or linear_attention"),
    (changed("qwen3_5", layer_types=["linear_attention"] * 3), "layer_types is .* for each of 4 layers"),
    (changed("qwen3_5", layer_types="linear_attention"), "layer_types is 'linear_attention'; expected"),
    (changed("qwen3_5", layer_types=[["linear_attention"]] * 4), "layer_types is"),
    (changed("qwen3_5", full_attention_interval=0), "full_attention_interval is 0; expected at least 1"),
    (changed("qwen3_5", full_attention_interval=2.5), "full_attention_interval is 2.5; expected"),
    (changed("qwen3_5", attn_output_gate=False), "attn_output_gate is False; supported is only True"),
    (changed("qwen3_5", linear_num_key_heads=4), "linear_num_key_heads 4 does not divide linear_num_value_heads 6"),
    (changed("qwen3_5", linear_num_value_heads=0), "linear_num_value_heads is 0; expected at least 1"),
    (changed("qwen3_5", linear_key_head_dim="24"), "linear_key_head_dim is '24'; expected int"),
    (changed("qwen3_5", linear_value_head_dim=1 << 30), "linear_value_head_dim is 1073741824; expected at most"),
    (changed("qwen3_5", linear_conv_kernel_dim=1), "linear_conv_kernel_dim is 1; expected at least 2"),
    (changed("qwen3_5", linear_conv_kernel_dim=1 << 40), "linear_conv_kernel_dim is 1099511627776; expected at most"),
    (changed("qwen3_5", num_key_value_heads=4), "num_key_value_heads 4 does not divide num_attention_heads 6"),
    (changed("qwen3_5", hidden_act="gelu"), "hidden_act is 'gelu'; supported is only 'silu'"),
    (changed("qwen3_5", mlp_only_layers=[0]), r"mlp_only_layers is \[0\]; supported is only"),
    (changed("qwen3_5", num_experts=8), "key 'num_experts' .value 8. is not understood"),
    (changed("qwen3_5", model_type="qwen3_next"), "model_type is 'qwen3_next'; supported are .*lfm2.*qwen3_5"),
    (changed("qwen3_5", partial_rotary_factor=0.75), "has partial_rotary_factor = 0.5, but .* is 0.75"),
    (changed("lfm2", layer_types=["conv"] * 3), "layer_types is .*; expected full_attention or conv for each of 4"),
    (changed("lfm2", layer_types=["linear_attention"] * 4), "layer_types is"),
    (changed("lfm2", full_attn_idxs=[4]), r"full_attn_idxs is \[4\]; expected numbers of 4 layers, from 0"),
    (changed("lfm2", full_attn_idxs=[-1]), "full_attn_idxs is"),
    (changed("lfm2", full_attn_idxs=[True]), "full_attn_idxs is"),
    (changed("lfm2", full_attn_idxs="2"), "full_attn_idxs is '2'"),
    (changed("lfm2", conv_L_cache=0), "conv_L_cache is 0; expected at least 2"),
    (changed("lfm2", conv_bias="no"), "conv_bias is 'no'; expected bool"),
    (changed("lfm2", norm_eps=-1.0), "norm_eps is -1.0; expected a positive number"),
    (changed("lfm2", block_dim=95), "block_dim is 95, but hidden_size is 96; make them equal"),
    (changed("lfm2", conv_dim=95), "conv_dim is 95, but hidden_size is 96"),
    (changed("lfm2", conv_dim_out=95), "conv_dim_out is 95, but hidden_size is 96"),
    (changed("lfm2", num_heads=3), "num_heads is 3, but num_attention_heads is 6"),
    (changed("lfm2", block_norm_eps=1e-5), "block_norm_eps is 1e-05, but norm_eps is 0.01"),
    (changed("lfm2", theta=5000.0), "theta is 5000.0, but rope_theta is 1000000.0; make them equal"),
    (changed("lfm2", tie_embedding="yes"), "tie_word_embeddings is 'yes'; expected bool"),
    (changed("lfm2", use_pos_enc=False), "use_pos_enc is False; supported is only True"),
    (changed("lfm2", block_use_swiglu=False), "block_use_swiglu is False"),
    (changed("lfm2", block_auto_adjust_ff_dim="yes"), "block_auto_adjust_ff_dim is 'yes'; expected bool"),
    (changed("lfm2", block_multiple_of=0), "block_multiple_of is 0; expected at least 1"),
    (changed("lfm2", block_ffn_dim_multiplier=-1), "block_ffn_dim_multiplier is -1; expected a positive number"),
    (changed("lfm2", block_ffn_dim_multiplier=None), "block_ffn_dim_multiplier is None; expected a positive number"),
    (changed("lfm2", block_ff_dim="big"), "intermediate_size is 'big'; expected int"),
    (changed("lfm2", intermediate_size=..., block_ff_dim=None), "'intermediate_size' is missing"),
    (changed("lfm2", num_attention_heads=5), "num_attention_heads 5 does not divide hidden_size 96"),
    (changed("olmo3", rope_parameters=..., rope_theta=1e4), "rope_theta is 10000.0; versions of transformers differ"),
]


@pytest.mark.parametrize(("tree", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_configs_not_understood_are_refused(tree, words):
    with pytest.raises(DnoError, match=words) as error:
        parse_config(tree, place="where/config.json")
    assert str(error.value).startswith("where/config.json: ")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"block_ff_dim": 96}, {"intermediate_size": 64}),  # whatever intermediate_size says
        ({"intermediate_size": ..., "block_ff_dim": 95}, {"intermediate_size": 64}),
        ({"block_ff_dim": 96, "block_ffn_dim_multiplier": 1.3}, {"intermediate_size": 88}),
        ({"block_ff_dim": 97, "block_auto_adjust_ff_dim": False}, {"intermediate_size": 97}),
        ({"tie_embedding": False, "tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({"full_attn_idxs": None}, {"mixers": None}),
        ({"full_attn_idxs": [0, 3]}, {"mixers": ("attention", "short_conv", "short_conv", "attention")}),
        ({"layer_types": ["conv"] * 4}, {"mixers": ("short_conv",) * 4}),  # before full_attn_idxs
    ],
)
def test_what_lfm2s_first_files_say_is_what_transformers_makes_of_it(tmp_path, changes, fields):
    pytest.importorskip("torch")
    from transformers import AutoConfig

    tree = changed("lfm2", **changes)
    AutoConfig.for_model(**copy.deepcopy(tree)).save_pretrained(tmp_path)
    found, again = parse_config(tree, place="x"), hf.read_config(tmp_path)
    assert found == again
    assert {name: getattr(found, name) for name in fields} == fields


def test_a_granite_of_attention_alone_rotates_or_does_not():
    """The words of its first files: transformers 5 says full_attention."""
    tree = changed("granite4", layer_types=["attention"] * 4)
    assert parse_config(tree, place="x") == CASES["granite4"].config()
    for kind in ("nope", None, ...):
        assert parse_config(changed("granite4", position_embedding_type=kind), place="x").ropes[0].rope_type == "none"


@pytest.mark.parametrize("place", ["gs://bucket/model", "s3://me:hunter2@bucket/model", "gs:/bucket/model"])
def test_a_checkpoint_is_read_from_no_url(place):
    with pytest.raises(
        DnoError, match=r"is read from a folder, or from the Hub by its id, not by a URL; copy it"
    ) as told:
        read_json(place, "config.json")
    assert "hunter2" not in str(told.value)
