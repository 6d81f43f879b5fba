"""A language model in a cyclic game: four ways to train it, by the ordinary stages, and how far each is from Nash.

    python examples/cyclic_game.py [--iterations 30] [--folder runs/cyclic_game]
                                   [--figure docs/figures/cyclic_language_model.png]
    python examples/cyclic_game.py --schemes --iterations 20     # outer schemes at one cost, over seeds

A Llama of some thousand parameters answers one question with rock, paper or scissors; the judge prefers them in a cycle
(configs/cyclic_game.yaml). Every policy's probabilities are read off the model itself, and held against what the exact
algorithm of `dno_jax.games` does from the same start. Run it again and finished variants are only drawn.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dno_jax import games, iteration
from dno_jax.config import RewardConfig, RunConfig, SftConfig, load_config, parse_config
from dno_jax.console import console
from dno_jax.parallel.sharding import TRAIN
from dno_jax.records import Message
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import reward, sft
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.step import score_step

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "cyclic_game.yaml"
FIGURES = Path("docs/figures")
QUESTION = "what wins ?"
START = {"rock": 0.5, "paper": 0.3, "scissors": 0.2}

# Name -> what it changes in the configuration, and the exact algorithm that it samples.
HARD = ["loss.target=hard", "loss.target_temperature=1.0"]
PROXIMAL = ["reference.kind=mixture", "reference.tau=0.1", "outer.scheme=proximal", "outer.every=10"]
VARIANTS: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    "soft_dno": ([], {"algorithm": "dno", "eta": 0.5}),
    "dno_prct": (
        [*HARD, "pairing.rule=large_margin", "pairing.opponents=pool", "pairing.positive_floor=0.5",
         "pairing.margin=0.1", "pairing.student_margin=0.1", "training.num_epochs=3", "loss.beta=2.0"],
        None,  # filtered hard labels have no finite minimiser: the learning rate and few epochs set the step
    ),
    "iterative_dpo": (
        [*HARD, "pairing.rule=verdict", "loss.beta=2.0"],
        {"algorithm": "iterative_dpo", "eta": 2.0},
    ),
    "proximal": (PROXIMAL, {"algorithm": "comal", "eta": 0.5, "tau": 0.1, "refresh": 10}),
    "optimistic": (["outer.scheme=optimistic"], {"algorithm": "onpo", "eta": 0.5}),
    "extragradient": (
        ["outer.scheme=extragradient", "loss.beta=0.25"],
        {"algorithm": "nash_mirror_prox", "eta": 0.25, "tau": 0.0},
    ),
    "reward_maximisation": (
        ["annotation.kind=reward_model", "pairing.rule=matching", "pairing.transform=logit", "loss.name=nash_md_pg",
         *HARD, "reference.kind=mixture", "reference.tau=0.1"],
        None,  # a policy gradient has no step in closed form; its end is pi_0 exp(r / tau)
    ),
}  # fmt: skip
TITLES = {
    "soft_dno": "DNO, soft targets (Eq. 8)",
    "dno_prct": "DNO-Prct (Eq. 13)",
    "iterative_dpo": "iterative DPO",
    "proximal": "proximal DNO (COMAL)",
    "optimistic": "optimistic",
    "extragradient": "extragradient",
    "reward_maximisation": "reward model, maximised",
}
FIGURE = ("soft_dno", "dno_prct", "iterative_dpo", "proximal")
# Outer schemes -> samples of a prompt with which each compares some 91 pairs of them per iteration. All take the same
# optimiser steps.
SCHEMES = {"soft_dno": 14, "optimistic": 8, "extragradient": 10, "proximal": 14}
SEEDS = (0, 1, 2)


def make_policy(folder: Path, *, prompts: int = 512) -> None:
    """Write the tokenizer, the prompts, and a policy that answers with the probabilities of START."""
    if (folder / "policy").exists():
        return
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    words = ["<unk>", "<s>", "</s>", *QUESTION.split(), *START]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(source / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(words), "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 32, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(shape))
    answers = [answer for answer, share in START.items() for _ in range(round(200 * share))]
    rows = [{"prompt_id": f"{i}", "prompt": QUESTION, "response": answer} for i, answer in enumerate(answers)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt_id": f"ask-{i:04d}", "prompt": QUESTION} for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    tree = {
        "run_dir": str(folder / "sft"),
        "model": {"path": str(source), "init_config": str(source), "remat": "none", "chat_template": "raw"},
        "data": {"path": str(folder / "answers.jsonl"), "max_length": 16},
        "optimizer": {"learning_rate": 1e-2, "schedule": "cosine"},
        "training": {"batch_size": 200, "num_epochs": 200, "save_every": 1000},
        "report": {"tensorboard": False},
    }
    exported = sft.run(Runtime.start(parse_config(SftConfig, tree, place="examples/cyclic_game.py")))
    Path(str(exported)).rename(folder / "policy")


def reward_config(folder: Path) -> RewardConfig:
    """The configuration of `dno reward` on what the judge said of policy 0's samples."""
    template = folder / "chat.jinja"
    template.write_text("{{ bos_token }}{% for message in messages %}{{ message.content }} {% endfor %}")
    tree = {
        "run_dir": str(folder / "reward_model"),
        "model": {"path": str(folder / "policy"), "remat": "none", "chat_template": str(template)},
        "pairs": {"run": str(folder / "verdicts"), "max_length": 8},
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-5, "schedule": "cosine"},
        "training": {"batch_size": 512, "num_epochs": 40, "save_every": 1000},
        "report": {"tensorboard": False},
    }
    return parse_config(RewardConfig, tree, place="examples/cyclic_game.py")


def make_reward_model(folder: Path) -> Path:
    """Have policy 0's samples judged, train a reward model on the verdicts, and return where it lies."""
    target = Path(reward_config(folder).run_dir) / "export"
    if not target.exists():
        iteration.run(variant_config(folder, "soft_dno", "iterations=1", run="verdicts"))
        reward.run(Runtime.start(reward_config(folder)))
    return target


def variant_config(folder: Path, name: str, *overrides: str, run: str | None = None) -> RunConfig:
    """The configuration of one variant, its files in `folder`; its run directory is called as the variant or `run`."""
    places = [
        f"run_dir={folder / (run or name)}",
        f"model.path={folder / 'policy'}",
        f"prompts.path={folder / 'prompts.jsonl'}",
    ]
    if name == "reward_maximisation":
        model = f"{{path: {folder / 'reward_model' / 'export'}, max_length: 32, batch_size: 64}}"
        places.append(f"annotation.reward_model={model}")
    return load_config(RunConfig, CONFIG, [*places, *VARIANTS[name][0], *overrides])


def probabilities(config: RunConfig) -> np.ndarray:
    """Return [T + 1, 3] P(answer, end of text) under every policy of a run, from the model's own log-probabilities."""
    runtime = Runtime.start(config)
    assert config.annotation.table is not None
    question = (Message(role="user", content=QUESTION),)
    prompt = runtime.tokenizer.prompt_ids(question)
    rows = [
        TrainingRow((prompt,), (runtime.tokenizer.response_ids(question, answer, end_id=runtime.end_ids[0]),))
        for answer in config.annotation.table.answers
    ]
    batch = make_batch(rows, batch_size=8, max_length=config.max_length)
    batch = batch.place(runtime.mesh)
    found = []
    for policy in range(config.iterations + 1):
        params = runtime.load_policy(runtime.run_dir.policy(policy), TRAIN)
        logprob = score_step(params, batch, model=runtime.programs.model(TRAIN), chunk=config.training.logprob_chunk)
        found.append(np.exp(np.asarray(logprob, np.float64)[: len(rows), 0]))
    return np.stack(found)


@dataclass(frozen=True)
class Played:
    """What a variant played: [T + 1, 3] probabilities over the answers, by the model and by the exact algorithm."""

    policies: np.ndarray
    exact: np.ndarray | None
    other: float  # largest probability of anything but an answer, in any policy

    @property
    def gaps(self) -> np.ndarray:
        return gaps(self.policies)

    @property
    def late(self) -> float:
        """Mean gap of the last third of the policies."""
        return late(self.policies)

    @property
    def average_gaps(self) -> np.ndarray:
        """Of the mixture of all policies up to each one."""
        counts = np.arange(1, len(self.policies) + 1)[:, None]
        return gaps(np.cumsum(self.policies, axis=0) / counts)


def gaps(policies: np.ndarray) -> np.ndarray:
    return np.asarray([games.duality_gap(games.cyclic_game(), policy) for policy in policies])


def late(policies: np.ndarray) -> float:
    return float(gaps(policies)[-(len(policies) // 3) :].mean())


def play(folder: Path, name: str, *overrides: str, run: str | None = None) -> Played:
    """Run a variant by the ordinary stages (or go on where it stopped) and read off what it played.

    Of extragradient steps, which take two iterations, the trial policies are left out.
    """
    config = variant_config(folder, name, *overrides, run=run)
    if config.annotation.kind == "reward_model":
        make_reward_model(folder)
    iteration.run(config)
    halves = 2 if config.outer.scheme == "extragradient" else 1
    raw = probabilities(config)[::halves]
    policies = raw / raw.sum(axis=1, keepdims=True)
    settings = VARIANTS[name][1]
    exact = None
    if settings:
        steps = config.iterations // halves
        exact = games.solve(games.cyclic_game(), initial=policies[0], iterations=steps, **settings).policies
    return Played(policies=policies, exact=exact, other=float(1.0 - raw.sum(axis=1).min()))


def comparisons(config: RunConfig) -> int:
    """Pairs of samples of one prompt that a run compares; those of the policy before were compared already."""
    known = math.comb(config.sampling.num_samples, 2)
    each = (math.comb(config.num_candidates(t), 2) - known * config.meets_previous(t) for t in range(config.iterations))
    return sum(each)


def play_schemes(folder: Path, *, iterations: int, seeds: Sequence[int]) -> dict[str, list[Played]]:
    """Run every outer scheme at one cost with every seed; say what it cost and how near it comes."""
    found = Table(
        title="outer schemes at one cost: duality gap over the last third of the policies, and what they took"
    )
    for column in ("", "K", "comparisons of a prompt", "optimiser steps", "gap", "95 % of seeds", "last", "exact"):
        found.add_column(column, justify="right" if column else "left")
    played: dict[str, list[Played]] = {}
    for name, count in SCHEMES.items():
        own = [f"iterations={iterations}", f"sampling.num_samples={count}"]
        own.append(f"loss.target_temperature={count / (count - 1)}")
        played[name] = [play(folder, name, *own, f"seed={seed}", run=f"{name}-{seed}") for seed in seeds]
        config = variant_config(folder, name, *own, run=f"{name}-{seeds[0]}")
        steps = sum(row.get("stage") == "train" and "step" in row for row in RunDir(config.run_dir).read_metrics())
        reached = np.asarray([one.late for one in played[name]])
        half = stats.t.ppf(0.975, len(seeds) - 1) * reached.std(ddof=1) / len(seeds) ** 0.5
        found.add_row(
            TITLES[name], str(count), f"{comparisons(config):,}", f"{steps:,}", f"{reached.mean():.4f}",
            f"{max(reached.mean() - half, 0.0):.4f} to {reached.mean() + half:.4f}",
            f"{np.mean([one.gaps[-1] for one in played[name]]):.4f}", f"{late(played[name][0].exact):.4f}",
        )  # fmt: skip
        console.print(f"{name}: {', '.join(f'{one:.4f}' for one in reached)}", markup=False)
    console.print(found)
    return played


def draw_schemes(played: Mapping[str, Sequence[Played]], path: Path) -> None:
    """The gap of every policy of every seed; dashes are the exact algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "dno_jax"
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for name, runs in played.items():
        every = 2 if name == "extragradient" else 1
        at = every * np.arange(len(runs[0].policies))
        color = None
        for number, one in enumerate(runs):
            (line,) = axes.semilogy(at, one.gaps, color=color, linewidth=1.0, label=None if number else TITLES[name])
            color = line.get_color()
        axes.semilogy(at, gaps(runs[0].exact), color=color, linewidth=0.8, linestyle="--", alpha=0.6)
    axes.set_xlabel("iteration")
    axes.set_ylabel("duality gap")
    axes.set_ylim(1e-3, 1.0)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def table(played: dict[str, Played]) -> Table:
    found = Table(title="duality gap of a language model in the cyclic game (0 is the Nash policy)")
    columns = (
        "",
        "last",
        "mean of last third",
        "of the average",
        "exact, last",
        "largest TV to exact",
        "not an answer",
    )
    for column in columns:
        found.add_column(column, justify="right" if column else "left")
    for name, one in played.items():
        tv = None if one.exact is None else 0.5 * np.abs(one.policies - one.exact).sum(axis=1).max()
        found.add_row(
            TITLES[name],
            f"{one.gaps[-1]:.4f}",
            f"{one.late:.4f}",
            f"{one.average_gaps[-1]:.4f}",
            "" if one.exact is None else f"{gaps(one.exact)[-1]:.4f}",
            "" if tv is None else f"{tv:.3f}",
            f"{one.other:.1e}",
        )
    return found


def draw(played: dict[str, Played], path: Path) -> None:
    """One column a variant: the three probabilities, and below them the gap; dashes are the exact algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "dno_jax"  # the same drawing gives the same file
    figure, axes = plt.subplots(
        2, len(played), figsize=(3.1 * len(played), 4.6), sharex=True, sharey="row", squeeze=False
    )
    nash = games.nash(games.cyclic_game())
    for column, (name, one) in enumerate(played.items()):
        above, below = axes[:, column]
        above.set_title(TITLES[name], fontsize=9)
        for answer, word in enumerate(START):
            (line,) = above.plot(one.policies[:, answer], label=word, linewidth=1.2)
            above.axhline(nash[answer], color=line.get_color(), linewidth=0.5, linestyle=":")
            if one.exact is not None:
                above.plot(one.exact[:, answer], color=line.get_color(), linewidth=0.8, linestyle="--", alpha=0.6)
        below.semilogy(one.gaps, color="black", linewidth=1.2, label="policy t")
        below.semilogy(one.average_gaps, color="gray", linewidth=1.0, label="average of 0..t")
        if one.exact is not None:
            below.semilogy(gaps(one.exact), color="black", linewidth=0.8, linestyle="--", alpha=0.6, label="exact")
        below.set_xlabel("iteration")
    axes[0, 0].set_ylabel("probability")
    axes[1, 0].set_ylabel("duality gap")
    axes[1, 0].set_ylim(1e-3, 2.0)
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/cyclic_game"))
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=FIGURE)
    parser.add_argument("--schemes", action="store_true", help="the outer schemes at one cost, over seeds")
    options = parser.parse_args()
    folder = options.folder.absolute()
    make_policy(folder)
    path = options.figure or FIGURES / ("cyclic_schemes.png" if options.schemes else "cyclic_language_model.png")
    if options.schemes:
        draw_schemes(play_schemes(folder, iterations=options.iterations, seeds=SEEDS), path)
    else:
        played = {name: play(folder, name, f"iterations={options.iterations}") for name in options.variants}
        console.print(table(played))
        draw(played, path)
    console.print(f"figure: {path}", markup=False)


if __name__ == "__main__":
    main()
