"""`dno plan` of `dno sft` and `dno reward`: the programs are those that these run."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import jax
import pytest
import yaml

from dno_jax.cli import main as cli
from dno_jax.config import RewardConfig, SftConfig, kind_of, parse_config
from dno_jax.errors import DnoError
from dno_jax.plan.compiled import fingerprint_of
from dno_jax.plan.run import Asked, programs_on
from dno_jax.plan.shape import shape_of
from dno_jax.plan.topology import target_of
from dno_jax.plan.trainings import plan_training
from dno_jax.runtime import scoring
from dno_jax.runtime.arguments import largest, longest_texts, score_call, score_plan, train_call, train_plan
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import reward, sft
from dno_jax.stages import train as train_stage
from tests.plan.test_plan import MISTRAL
from tests.small import TEMPLATE, WORDS, small_tree

LONGEST, ROWS, HELD_OUT = 20, 32, 8  # tokens as they are trained on; the first quarter is the prompt
MESH = {"data": 1, "fsdp": 4, "tensor": 2}


class Reached(Exception):
    """The program that is compared."""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Recipes of both kinds whose texts are all as long as they may be: what they compile is what a plan assumes."""
    folder = tmp_path_factory.mktemp("trainings")
    model = small_tree(folder)["model"]["path"]
    (folder / "sft.jinja").write_text(TEMPLATE)
    (folder / "reward.jinja").write_text(TEMPLATE.replace("{{ eos_token }}", ""))

    def words(first, count):
        return " ".join(WORDS[(first + at) % len(WORDS)] for at in range(count))

    prompt = LONGEST // 4 - 1  # and <s>
    rows = {
        # After an example comes </s>, and behind each text of a pair the token that nothing reads.
        "sft": [{"prompt": words(n, prompt), "response": words(n + 7, LONGEST - prompt - 2)} for n in range(ROWS)],
        "reward": [
            {
                "prompt": words(n, prompt), "chosen": words(n + 7, LONGEST - prompt - 2),
                "rejected": words(n + 30, LONGEST - prompt - 2),
            }
            for n in range(ROWS + HELD_OUT)
        ],
    }  # fmt: skip
    found = {}
    for name, kind in (("sft", SftConfig), ("reward", RewardConfig)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        data = {"data": {"path": str(path), "max_length": LONGEST}}
        if kind is RewardConfig:
            data = {"pairs": {"path": str(path), "max_length": LONGEST - 1, "held_out": HELD_OUT}}
        tree = {
            "run_dir": str(folder / name), "mesh": MESH, "training": {"batch_size": 8, "num_epochs": 2},
            "model": {"path": model, "chat_template": str(folder / f"{name}.jinja")}, **data,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        found[name] = folder / f"{name}.yaml", parse_config(kind, tree, place="test")
    return found


def planned_calls(config):
    target = target_of("cpu:8", num_devices=None, memory=2**34)
    programs = programs_on(config, shape_of(config), target)
    train = train_call(programs, largest(train_plan(programs, longest_texts(programs, num_rows=ROWS))))
    score = score_call(programs, largest(score_plan(programs, longest_texts(programs, num_rows=ROWS))))
    return train, score


def lowered_by(monkeypatch, module, name, run):
    """What a stage lowers when it comes to a program; it goes no further."""
    found, own = [], getattr(module, name)

    def reached(*arguments, **options):
        found.append(own.lower(*arguments, **options))
        raise Reached

    with monkeypatch.context() as patched:
        patched.setattr(module, name, reached)
        with pytest.raises(Reached):
            run()
    return fingerprint_of(found[0])


def test_what_is_planned_is_what_the_trainings_run(recipes, monkeypatch):
    for name, stage in (("sft", sft), ("reward", reward)):
        config = recipes[name][1]
        train, score = planned_calls(config)
        runtime = Runtime.start(config)
        ran = lowered_by(monkeypatch, train_stage, "train_step", lambda stage=stage, at=runtime: stage.run(at))
        assert ran == fingerprint_of(train.lowered()), name
    params, preferences = reward.initial_params(runtime), reward.preferences_of(runtime)
    assert len(preferences.held_out) == HELD_OUT
    ran = lowered_by(
        monkeypatch, scoring, "score_step", lambda: reward.rewards_of(runtime, params, preferences.held_out)
    )
    assert ran == fingerprint_of(score.lowered())


@pytest.mark.soak
@pytest.mark.parametrize("name", ["sft", "reward"])
def test_its_bytes_are_the_compilers(recipes, name):
    config = recipes[name][1]
    plan = plan_training(config, asked=Asked(topology="cpu:8", memory=2**34))
    assert list(plan.programs) == (["train", "score"] if name == "reward" else ["train"])
    for one, call in zip(plan.programs.values(), planned_calls(config), strict=False):
        assert one.figures.fingerprint == fingerprint_of(call.lowered())
        memory = call.lowered().compile().memory_analysis()
        assert sum(one.figures.parts.values()) == memory.argument_size_in_bytes
        assert one.fits


@pytest.fixture
def dno_plan(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dno", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr()

    return run


def test_the_command_knows_them_by_their_section(recipes, dno_plan):
    for name, (path, config) in recipes.items():
        assert kind_of(path, (SftConfig, RewardConfig)) is type(config)
        status, said = dno_plan(path, "--devices", 8, "--memory", "1GiB", "--json")
        assert status == 0, said.err
        found = json.loads(said.out)
        assert found["total"]["pairs"] == ROWS
        assert found["total"]["stages"]["train"]["runs"] == 2 * ROWS // 8
        assert ("score" in found["total"]["stages"]) == (name == "reward")
        assert found["sampling"] == {}
        assert found["annotation"] is None
        # Adam's two moments of a float32 parameter.
        parts = found["programs"]["train"]["closed_form"]
        assert parts["moments"] == pytest.approx(2 * parts["parameters"], rel=0.001)
    status, said = dno_plan(path, "--devices", 8, "--memory", "1GiB")
    assert "the training, on 32 pairs, and 8 held out" in " ".join(said.out.split())
    assert "judge" not in said.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "40KiB"], "training does not fit: a step takes at least .*no change of micro batch"),
        (["--memory", "1GiB", "--response-tokens", "5"], "--response-tokens: nothing is sampled or judged by `dno re"),
        (["--memory", "1GiB", "sampling.slots=3"], "sampling"),
        (["--memory", "1GiB", "pairs.held_out=40"], "pairs.held_out is 40, and there are pairs of"),
    ],
)  # fmt: skip
def test_bad_input(recipes, dno_plan, arguments, said):
    status, told = dno_plan(recipes["reward"][0], "--devices", 8, *arguments)
    assert status == 2
    assert re.search(said, told.err), told.err


def test_a_reward_model_is_planned_without_a_head(tmp_path):
    """From a bundled shape: nothing is read, and the 131 million numbers of Mistral's head are not counted."""
    recipe = Path(__file__).parents[2] / "configs" / "reward_model.yaml"
    config = parse_config(RewardConfig, yaml.safe_load(recipe.read_text()), place="test")
    plan = plan_training(
        config, asked=Asked(topology="v5p:4x4x4", compiled=False, model="mistral-7b", num_prompts=1000)
    )
    head = MISTRAL["vocab_size"] * MISTRAL["hidden_size"]
    numbers = sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(programs_on(config, plan.shape, plan.target).trained_params)
    )
    assert numbers == 7_241_732_096 - head + MISTRAL["hidden_size"]
    unknown = plan_training(config, asked=Asked(topology="v5p:4x4x4", compiled=False, model="mistral-7b"))
    assert unknown.rows.trained is None
    assert "--prompts N assumes so many" in unknown.notes[0]
    with pytest.raises(DnoError, match=r"model.path .*: no config.json there"):
        plan_training(config, asked=Asked(topology="v5p:4x4x4", compiled=False))
