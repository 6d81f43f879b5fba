"""A checkpoint small enough to run the whole loop in seconds: random weights, a tokenizer of whole words."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeo" for c in "mnst"]  # 72 words that mean nothing
SPECIAL = ["<unk>", "<s>", "</s>", "."]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
)


def write_checkpoint(path: Path, *, seed: int = 0, template: str | None = None) -> Path:
    """Write a Hugging Face checkpoint of 40 thousand parameters whose random weights make peaked distributions."""
    from dno_jax.model import hf
    from dno_jax.model.config import ModelConfig
    from dno_jax.model.params import init_params

    source = path.parent / f"{path.name}-source"
    source.mkdir(parents=True)
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is None:  # a base model's tokenizer begins every text with <s>; a template writes its own
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 64,
    }
    if template is not None:
        settings["chat_template"] = template
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ModelConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64,
        tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    tree = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(tree))
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2]}))
    params = init_params(config, jax.random.key(seed))
    params = jax.tree.map(lambda leaf: np.asarray(leaf * (5.0 if leaf.ndim > 2 else 1.0)), params)
    params["embed"] = params["embed"] * 12.0  # tied: what was just said is likely, the rest is left to chance
    hf.save(path, config, params, source=source)
    return path


def write_prompts(path: Path, count: int, *, seed: int = 0, gold: bool = True) -> Path:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        words = rng.choice(WORDS, size=rng.integers(2, 9), replace=False).tolist()
        row = {"prompt_id": f"p{seed}-{index:03d}", "messages": [{"role": "user", "content": " ".join(words)}]}
        if gold:
            row["gold"] = " ".join(words[:3] + rng.choice(WORDS, size=5, replace=False).tolist()) + " ."
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return path


def small_tree(folder: Path, *, run_dir: str = "run", prompts: int = 12) -> dict:
    """A configuration over files that this makes in `folder` (once)."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
        write_prompts(folder / "prompts.jsonl", prompts)
        write_prompts(folder / "held_out.jsonl", 4, seed=1)
    return {
        "run_dir": str(folder / run_dir),
        "seed": 3,
        "iterations": 2,
        "model": {"path": str(checkpoint), "chat_template": "raw"},
        "prompts": {
            "path": str(folder / "prompts.jsonl"),
            "held_out_path": str(folder / "held_out.jsonl"),
            "max_length": 16,
        },
        "sampling": {"num_samples": 4, "max_new_tokens": 16, "shard_prompts": 8, "temperature": 1.0},
        "annotation": {"kind": "oracle", "oracle": {"target_words": 6}},
        # So small a model seldom ends by itself.
        "pairing": {"reward": "win_rate", "positive_floor": 0.5, "margin": 0.2, "student_margin": 0.2, "cut": "keep"},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "training": {"batch_size": 8, "save_every": 1},
        "evaluation": {"num_samples": 2},
        "report": {"tensorboard": False},
    }
