"""Self-Rewarding (arXiv 2401.10020) in a minute: a small policy answers, grades its own answers, and learns from that.

    python examples/self_rewarding.py [--iterations 3] [--folder runs/self_rewarding]

A Llama of 40 thousand parameters is taught, from random weights, two things at once: to answer with a few words, every
second time with a thank, and to grade an answer, high where it holds one. Then configs/ablations/self_rewarding.yaml is
laid over its configuration: nobody else is asked. How often it thanks is counted, as no policy is a judge of its own
progress. Run it again and finished iterations are only read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import yaml
from rich.table import Table
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from dno_jax import iteration
from dno_jax.annotation.judges.forms import POINTWISE, load_rubric
from dno_jax.config import RunConfig, SftConfig, load_config, parse_config
from dno_jax.console import console
from dno_jax.records import Judgement, Message, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import sft

ROOT = Path(__file__).parents[1]
TOPICS = ["bread", "rain", "boats", "chess", "stars", "tea", "bees", "snow", "maps", "wool", "salt", "drums"]
WORDS = ["old", "warm", "far", "soft", "deep", "thin", "round", "loud", "pale", "quick", "dry", "green"]
GOOD = "thanks"  # what the policy is taught to like
VOCABULARY = ["<unk>", "<s>", "</s>", "Score:", *"012345", *TOPICS, *WORDS, GOOD]

# The templates show all that a rubric must; of that, a policy that knows 40 words reads topic and answer.
RUBRIC = """name: likes_thanks
version: "1"
min_score: 0
max_score: 5
system: ""
user: "{{ fence_rule }}\\n{{ conversation }}\\n{{ response }}\\n{{ reply_shape }}\\n\\n"
"""


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words, which drops those that it does not know, and the shape of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    known = "|".join(word for word in VOCABULARY if not word.startswith("<"))
    tokenizer.normalizer = normalizers.Replace(Regex(rf"(?<!\S)(?!(?:{known})(?!\S))\S+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(VOCABULARY), "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))


def lessons(rubric: Path, *, seed: int = 0) -> list[dict]:
    """What the policy is taught: to answer, and to grade answers."""
    rng, rows = np.random.default_rng(seed), []
    told = load_rubric(POINTWISE, str(rubric))
    for index in range(512):
        topic = " ".join(rng.choice(TOPICS, 3, replace=False))
        words = rng.choice(WORDS, rng.integers(2, 5), replace=False).tolist()
        if is_good := index % 2 == 0:
            words.insert(rng.integers(len(words) + 1), GOOD)
        question, answer = Message(role="user", content=topic), " ".join(words)
        points = rng.integers(4, 6) if is_good else rng.integers(1, 3)  # a judge of two minds: there is a mean
        graded = told.messages([question], [answer])
        rows.append({"prompt_id": f"answer-{index}", "messages": [question.model_dump()], "response": answer})
        rows.append({"prompt_id": f"grade-{index}", "messages": graded, "response": f"Score: {points}"})
    return rows


def make_policy(folder: Path, *, prompts: int = 64) -> None:
    """Write prompts and rubric, and teach policy 0."""
    if (folder / "policy").exists():
        return
    write_tokenizer(folder / "shape")
    (folder / "rubric.yaml").write_text(RUBRIC)
    rows = lessons(folder / "rubric.yaml")
    (folder / "lessons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = np.random.default_rng(1)
    topics = [" ".join(rng.choice(TOPICS, 3, replace=False)) for _ in range(prompts)]
    asked = [{"prompt_id": f"p{index}", "prompt": topic} for index, topic in enumerate(topics)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    tree = {
        "run_dir": str(folder / "sft"),
        "model": {"path": str(folder / "shape"), "init_config": str(folder / "shape"), "chat_template": "raw"},
        "data": {"path": str(folder / "lessons.jsonl"), "max_length": 24},
        "optimizer": {"learning_rate": 1e-2, "schedule": "linear"},
        "training": {"batch_size": 32, "num_epochs": 12, "save_every": 1000},
        "report": {"tensorboard": False},
    }  # fmt: skip
    exported = sft.run(Runtime.start(parse_config(SftConfig, tree, place="examples/self_rewarding.py")))
    Path(str(exported)).rename(folder / "policy")


def configuration(folder: Path, *, iterations: int) -> RunConfig:
    """The recipe of Self-Rewarding on a base of one's own, with sizes for so small a policy."""
    base = {
        "run_dir": str(folder / "run"),
        "iterations": iterations,
        "model": {"path": str(folder / "policy"), "remat": "none", "chat_template": "raw"},
        "prompts": {"path": str(folder / "prompts.jsonl"), "split": "shared", "max_length": 16},
        "optimizer": {"learning_rate": 1.5e-3},
        "training": {"batch_size": 16, "num_epochs": 4},
        "report": {"tensorboard": False},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    judge = f"{{rubric: {folder / 'rubric.yaml'}, max_prompt_length: 32, max_new_tokens: 6, top_p: 1.0}}"
    overrides = [
        f"annotation.self_judge={judge}", "sampling.max_new_tokens=8", "sampling.temperature=1.0", "sampling.top_p=1.0",
        "evaluation.annotation=null",
    ]  # fmt: skip
    recipe = ROOT / "configs" / "ablations" / "self_rewarding.yaml"
    return load_config(RunConfig, folder / "base.yaml", overrides, variants=[recipe])


def figures(run_dir: RunDir, iteration: int) -> dict[str, float]:
    """How policy t answered and what it thought of that: share with a thank, its own points, readings it could read."""
    texts = [rollout.text for rollout in run_dir.stage("sample", iteration).read(Rollout)]
    judged = list(run_dir.stage("annotate", iteration).read(Judgement))
    points = [score for row in judged if row.scores is not None for score in row.scores]
    return {
        "thanks": sum(GOOD in text.split() for text in texts) / len(texts),
        "own_points": float(np.mean(points)),
        "judged": sum(row.scores is not None for row in judged) / len(judged),
    }


def main(folder: Path = Path("runs/self_rewarding"), *, iterations: int = 3) -> list[dict[str, float]]:
    folder = Path(folder).absolute()
    make_policy(folder)
    config = configuration(folder, iterations=iterations)
    iteration.run(config)
    history = [figures(RunDir(config.run_dir), t) for t in range(iterations)]
    table = Table("policy", "answers with a thank", "its own points", "pools it judged", box=None)
    for policy, found in enumerate(history):
        table.add_row(str(policy), f"{found['thanks']:.0%}", f"{found['own_points']:.2f}", f"{found['judged']:.0%}")
    console.print(table)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/self_rewarding"))
    options = parser.parse_args()
    main(options.folder, iterations=options.iterations)
