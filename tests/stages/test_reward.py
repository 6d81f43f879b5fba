"""`dno reward`: preferences from the file or from a run's own judge to the exported reward model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dno_jax.annotation.pool import Candidate, Pool
from dno_jax.cli import main as cli
from dno_jax.config import OptimizerSection, RewardConfig, RunConfig, dump_config, parse_config
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.decoder import Decoder
from dno_jax.records import Message, Prompt
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import reward
from dno_jax.stages.judge_on_devices.reward_model import RewardModel
from dno_jax.training.batches import make_batch
from dno_jax.training.objectives import reward_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import TrainState
from dno_jax.training.step import StepConfig, train_step
from tests.small import TEMPLATE, WORDS, small_tree

SAID = WORDS[:16]
PAIR = {"prompt": "bam bas", "chosen": "dom fen", "rejected": "kos les ket"}


@pytest.fixture
def policy(tmp_path, small_folder) -> Path:
    """A language model whose template ends an answer with its end token, which is all the padding that it has."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return Path(small_tree(small_folder)["model"]["path"])


@pytest.fixture
def make(tmp_path, policy):
    def config(*rows, model=None, training=None, mesh=None, **pairs) -> RewardConfig:
        path = tmp_path / "pairs.jsonl"
        if rows:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            pairs["path"] = str(path)
        tree = {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(policy), "chat_template": str(tmp_path / "chat.jinja")} | (model or {}),
            "mesh": mesh or {},
            "pairs": {"max_length": 24} | pairs,
            "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
            "training": {"batch_size": 8} | (training or {}),
            "report": {"tensorboard": False},
        }
        return parse_config(RewardConfig, tree, place="test")

    return config


def worth(words: list[str]) -> float:
    """The planted reward: what its words are worth, whatever the prompt."""
    return sum(math.sin(1.0 + 3.0 * WORDS.index(word)) for word in words)


def planted(count: int, *, seed: int = 0) -> list[dict]:
    """Rows of pairs whose verdicts are drawn from Bradley-Terry."""
    rng, rows = np.random.default_rng(seed), []
    for index in range(count):
        first, second = (rng.choice(SAID, size=rng.integers(2, 6)).tolist() for _ in range(2))
        if rng.random() > 1 / (1 + math.exp(worth(second) - worth(first))):
            first, second = second, first
        prompt = " ".join(rng.choice(WORDS, size=3))
        rows.append({"prompt": f"{prompt} {WORDS[index % len(WORDS)]}", "chosen": " ".join(first),
                     "rejected": " ".join(second)})  # fmt: skip
    return rows


def torch_model(path, **options):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()


def transformers_rewards(path, chats) -> np.ndarray:
    """What transformers makes of a batch of chats of different lengths, by the folder's own tokenizer and template."""
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), torch_model(path)
    ids = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    width = max(map(len, ids))
    pad = model.config.pad_token_id
    token = torch.tensor([[*own, *[pad] * (width - len(own))] for own in ids])
    mask = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in ids])
    with torch.no_grad():
        return model(token, attention_mask=mask).logits[:, 0].numpy()


def chat(prompt: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_rows_share_what_two_chats_have_in_common_and_the_preferred_one_is_first(make):
    worse = {"prompt": "bam bas", "candidates": [{"text": "dom fen", "score": 1}, {"text": "dom les ket", "score": 3}]}
    tied = {"prompt": "kos", "candidates": [{"text": "dom", "score": 2}, {"text": "fen", "score": 2}]}
    runtime = Runtime.start(make(PAIR, worse, tied))
    found = reward.preferences_of(runtime)
    spelt = [[runtime.tokenizer.strip(ids.tolist()) for ids in (*row.prompt_ids, *row.response_ids)]
             for row in found.rows]  # fmt: skip
    asked = ["<s>", "bam", "bas"]
    # The end token is padding, too: transformers reads the reward off the word before it. Then a token nobody reads.
    assert spelt[0] == [asked, asked, ["dom", "fen", "<unk>"], ["kos", "les", "ket", "<unk>"]]
    assert spelt[1] == [[*asked, "dom"], [*asked, "dom"], ["les", "ket", "<unk>"], ["fen", "<unk>"]]
    assert [row.target for row in found.rows] == [1.0, 1.0, 0.5]
    assert "3 pairs of 2 prompts from 3 rows" in found.lines[0]
    soft = reward.preferences_of(Runtime.start(make(PAIR, worse, tied, score_temperature=2.0)))
    assert [row.target for row in soft.rows] == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1)), 0.5])
    assert soft.digest != found.digest


@pytest.mark.soak
def test_rewards_are_those_of_transformers_packed_or_not(make, policy, tmp_path):
    """A reward model of transformers' making is read back, and its rewards come out of the training's own batches."""
    torch = pytest.importorskip("torch")
    source = as_classifier(policy, tmp_path / "classifier")
    chats = [chat(row["prompt"], row[side]) for row in planted(9) for side in ("chosen", "rejected")]
    expected = transformers_rewards(source, chats).reshape(9, 2)
    assert torch.is_grad_enabled()
    assert np.ptp(expected) > 0.1
    for packing, mesh in (("on", {}), ("off", {}), ("on", {"data": 2, "fsdp": 2, "tensor": 2})):
        config = make(*planted(9), model={"path": str(source)}, training={"packing": packing}, mesh=mesh)
        runtime = Runtime.start(config)
        found = reward.rewards_of(runtime, reward.initial_params(runtime), reward.preferences_of(runtime).rows)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)  # float32 through two layers


def as_classifier(policy: Path, path: Path) -> Path:
    """What transformers makes of the language model when it is told to classify, its score drawn at random."""
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    model = torch_model(policy, num_labels=1, pad_token_id=2)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(policy).save_pretrained(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def judge_with(target: Path, folder: Path) -> RewardModel:
    tree = small_tree(folder) | {"iterations": 1}
    tree["prompts"] = {"path": tree["prompts"]["path"], "max_length": 16}
    model = {"path": str(target), "max_length": 24, "batch_size": 8}
    tree["annotation"] = {"kind": "reward_model", "reward_model": model}
    return RewardModel.start(Runtime.start(parse_config(RunConfig, tree, place="test")))


def test_it_trains_exports_and_judges(make, small_folder, tmp_path, capsys):
    config = make(*planted(24), held_out=6, training={"batch_size": 8, "num_epochs": 2})
    runtime = Runtime.start(config)
    assert not np.asarray(reward.initial_params(runtime)["score"]).any()  # no text is better than another yet
    target = Path(reward.run(runtime))
    steps = [row for row in RunDir(config.run_dir).read_metrics() if row["stage"] == "reward"]
    assert len(steps) == 6  # two epochs of 18 pairs
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    said = capsys.readouterr().err
    assert "18 pairs are trained on, 6 held out" in said
    assert "held-out agreement" in said
    tree = json.loads((target / "config.json").read_text())
    assert tree["architectures"] == ["LlamaForSequenceClassification"]
    assert (tree["id2label"], tree["pad_token_id"]) == ({"0": "LABEL_0"}, 2)
    card = (target / "README.md").read_text()
    assert "text-classification" in card
    assert "Bradley-Terry" in card
    assert json.loads((Path(config.run_dir) / "held_out.json").read_text())["n"] == 6

    # A run's judge reads the same rewards off it as the training does that goes on from it.
    rows = planted(8, seed=7)
    more = Runtime.start(make(*rows, model={"path": str(target)}))
    ours = reward.rewards_of(more, reward.initial_params(more), reward.preferences_of(more).rows)
    judge = judge_with(target, small_folder)
    pools = [
        Pool(Prompt(prompt_id="p", messages=tuple(map(Message.model_validate, chat(row["prompt"], "")[:1]))),
             (Candidate("a", row["chosen"]), Candidate("b", row["rejected"])))
        for row in rows
    ]  # fmt: skip
    asked = [ids for pool in pools for ids in judge.ask(pool)]
    assert np.ptp(ours) > 1e-3
    np.testing.assert_allclose(judge.rewards(judge.load(), asked), ours.reshape(-1), atol=1e-5, rtol=0)

    # The same command again has nothing to do; other pairs are refused by name; status knows it.
    make(*planted(24), held_out=6)
    assert Path(reward.run(runtime)) == target
    with pytest.raises(DnoError, match=r"made by another configuration:\n  examples: "):
        reward.run(Runtime.start(make(*planted(24, seed=1), held_out=6, training={"num_epochs": 2})))
    assert command("status", config.run_dir) == 0
    assert "reward model" in capsys.readouterr().out


@pytest.mark.soak
def test_the_export_scores_equal_in_transformers(make, tmp_path):
    config = make(*planted(24), training={"num_epochs": 4})
    target = Path(reward.run(Runtime.start(config)))
    rows = planted(8, seed=7)
    theirs = transformers_rewards(target, [chat(row["prompt"], row[s]) for row in rows for s in ("chosen", "rejected")])
    more = Runtime.start(make(*rows, model={"path": str(target)}))
    ours = reward.rewards_of(more, reward.initial_params(more), reward.preferences_of(more).rows)
    assert np.ptp(theirs) > 0.01
    np.testing.assert_allclose(ours.reshape(-1), theirs, atol=1e-4, rtol=0)
    assert command("export", config.run_dir, str(tmp_path / "again")) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


def command(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["dno", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return caught.value.code


@pytest.mark.soak
def test_ten_steps_match_torch_step_by_step(make, policy, tmp_path):
    torch = pytest.importorskip("torch")
    source = as_classifier(policy, tmp_path / "classifier")
    rows = planted(8)
    chats = [chat(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    expected = torch_history(torch, source, chats)

    runtime = Runtime.start(make(*rows, model={"path": str(source)}))
    config, params = hf.load(source, head="reward")
    model = Decoder(config, remat="none")
    batch = make_batch(reward.preferences_of(runtime).rows, batch_size=8, max_length=25)
    optimizer = make_optimizer(OptimizerSection(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0))
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    step = StepConfig(model, optimizer, reward_loss, chunk=128)
    for at, (loss, norm) in enumerate(expected):
        state, metrics = train_step(state, batch, jnp.float32(1e-3), config=step)
        # Sums of float32 in another order; Adam divides small gradients by their size.
        assert float(metrics["loss"]) == pytest.approx(loss, abs=1e-4), f"loss at step {at}"
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=2e-3), f"gradient norm at step {at}"
    assert expected[-1][0] < 0.8 * expected[0][0]


def torch_history(torch, source, chats):
    """Ten AdamW steps on -log sigma(r_w - r_l), written from section 2.1 with transformers' model."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(source), torch_model(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    ids = [tokenizer.apply_chat_template(one, tokenize=True, return_dict=False) for one in chats]
    history = []
    for _ in range(10):
        rewards = torch.stack([model(torch.tensor([own])).logits[0, 0] for own in ids]).reshape(-1, 2)
        loss = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append((float(loss.detach()), float(norm)))
    return history


@pytest.mark.soak
def test_planted_rewards_are_recovered(make):
    """One verdict a pair, drawn from Bradley-Terry: on pairs that it has not seen, differences are ranked as planted.

    Differences, as a prompt's own worth is in no pair.
    """
    config = make(*planted(10_000), training={"batch_size": 100, "num_epochs": 3, "save_every": 1000})
    optimizer = config.optimizer.model_copy(update={"learning_rate": 3e-3, "schedule": "cosine"})
    target = reward.run(Runtime.start(config.model_copy(update={"optimizer": optimizer})))
    rows = planted(400, seed=11)
    more = Runtime.start(make(*rows, model={"path": str(target)}))
    found = reward.rewards_of(more, reward.initial_params(more), reward.preferences_of(more).rows)
    truth = [[worth(row[side].split()) for side in ("chosen", "rejected")] for row in rows]
    ours, planted_ones = (np.diff(values, axis=1)[:, 0] for values in (found, np.asarray(truth)))
    assert stats.spearmanr(ours, planted_ones).statistic > 0.95
    # And they are of the planted size, not only of its order.
    assert np.polyfit(planted_ones, ours, 1)[0] == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    ("rows", "pairs", "why"),
    [
        ([{"prompt": "bam", "response": "dom"}], {}, "holds no pairs: .*fewer than two responses with points"),
        ([{"text": "bam"}], {}, "pairs.jsonl:1: not a valid preference: columns 'text'"),
        ([PAIR], {"max_length": 3}, r"pairs.jsonl:1: 7 tokens exceed pairs.max_length 3; .*pairs.too_long=drop"),
        ([PAIR], {"max_length": 3, "too_long": "drop"}, "1 x too long.*none is left to train on"),
        ([PAIR], {"held_out": 1}, "there are pairs of 1 prompts: none would be left"),
        ([PAIR | {"chosen": "dom </s>"}], {}, "spells the control token '</s>'.*none is left"),
        ([PAIR | {"chosen": "kos les ket"}], {}, "the same tokens twice"),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_refused(make, rows, pairs, why):
    with pytest.raises(DnoError, match=f"(?s){why}"):
        reward.preferences_of(Runtime.start(make(*rows, **pairs)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pairs": {}}, "give one of pairs.path"),
        ({"pairs": {"path": "a.jsonl", "run": "r"}}, "give one of pairs.path"),
        ({"pairs": {"path": "a.jsonl", "iterations": [0]}}, "are those of pairs.run"),
        ({"pairs": {"run": "r", "iterations": [-1]}}, "expected numbers from 0"),
        ({"model": {"path": "m", "chat_template": "raw"}}, "reads chats by the template in its directory"),
        ({"model": {"path": "m", "template_options": {"x": 1}}}, "write them into a Jinja file"),
        ({"optimizer": {"carry": True}}, "this training has one"),
        ({"adapter": {"rank": 4}}, "'adapter' is unknown"),
        ({"data": {"path": "a.jsonl"}, "pairs": None}, "a recipe of `dno sft`"),
    ],
)
def test_a_configuration_that_makes_no_reward_model_is_refused(change, why):
    tree = {"run_dir": "r", "model": {"path": "m"}, "pairs": {"path": "a.jsonl"}} | change
    tree = {name: value for name, value in tree.items() if value is not None}
    with pytest.raises(DnoError, match=why):
        parse_config(RewardConfig, tree, place="test")


def test_a_recipe_of_a_run_is_none_of_a_reward_model_and_a_family_without_them_is_named(make, policy, tmp_path):
    with pytest.raises(DnoError, match=r"a recipe of `dno run`.*`dno reward` reads one with pairs"):
        parse_config(RewardConfig, small_tree(tmp_path), place="test")
    copy = tmp_path / "granite"
    copy.mkdir()
    for file in policy.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tree = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(tree | {"model_type": "granite",
                                                         "architectures": ["GraniteForCausalLM"]}))  # fmt: skip
    with pytest.raises(DnoError, match="granite has no reward models; transformers has no such class"):
        Runtime.start(make(PAIR, model={"path": str(copy)}))


def test_the_padding_that_transformers_will_know_is_settled_before_anything_is_read(make, policy, tmp_path):
    """The tokenizer's, else config.json's, else the end id; where it is none of the model's ids it is passed over."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in policy.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config, tokenizer = (json.loads((copy / name).read_text()) for name in ("config.json", "tokenizer_config.json"))

    def padding(pad_id, pad_token):
        (copy / "config.json").write_text(json.dumps(config | {"pad_token_id": pad_id}))
        (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"pad_token": pad_token}))
        return reward.padding_of(Runtime.start(make(PAIR, model={"path": str(copy)})))

    assert [padding(*given) for given in ((None, None), (5, None), (-1, None), (999, None), (5, "."))] == [
        2,
        5,
        2,
        2,
        3,
    ]


def test_a_run_directory_in_the_place_of_a_file_is_named(make, make_config, tmp_path):
    config = make_config()
    RunDir(config.run_dir).create(config)
    own = make(path=config.run_dir).model_copy(update={"run_dir": str(tmp_path / "elsewhere")})
    with pytest.raises(DnoError, match=r"pairs\.path .*: a run directory; give it as pairs\.run"):
        reward.preferences_of(Runtime.start(own))
    own = make(run=config.run_dir)  # whose run directory is the same
    with pytest.raises(DnoError, match=r"is pairs\.run, whose files would be mixed with these"):
        reward.preferences_of(Runtime.start(own))


def test_a_call_that_is_refused_leaves_nothing_behind(make, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(dump_config(make({"prompt": "bam", "response": "dom"})))
    before = sorted(tmp_path.rglob("*"))
    assert command("reward", str(tmp_path / "config.yaml")) == 2
    said = capsys.readouterr().err
    assert "holds no pairs" in said
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before
