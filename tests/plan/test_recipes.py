"""The recipes at real scale: each is planned by arithmetic, as its own first lines say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dno_jax.config import RewardConfig, RunConfig, load_config
from dno_jax.errors import DnoError
from dno_jax.plan.run import Asked, plan_run
from dno_jax.plan.shape import shape_of, shapes
from dno_jax.plan.tables import as_json
from dno_jax.plan.totals import totals
from dno_jax.plan.trainings import plan_training

CONFIGS = Path(__file__).parents[2] / "configs"
COMMAND = re.compile(r"^#\s+dno plan configs/(\S+\.yaml) (--topology .*)$", re.MULTILINE)
RECIPES = {path.name: found for path in CONFIGS.glob("*.yaml") if (found := COMMAND.search(path.read_text()))}

TRAINING = "reward_model.yaml"  # no iteration of a run


def asked(arguments: str, **changes) -> Asked:
    words = shlex.split(arguments.split("#")[0])
    given = dict(zip(words[::2], words[1::2], strict=True))
    prompts = given.get("--prompts")
    found = {"num_prompts": None if prompts is None else 2_600, "model": given["--model"]}
    return Asked(topology=given["--topology"], compiled=False, **found | changes)


def test_the_recipes_at_real_scale_say_how_they_are_planned():
    assert {"mistral_7b_ultrafeedback.yaml", "mistral_7b_lora.yaml", "llama3_1_8b.yaml", "llama3_1_8b_lora.yaml",
            "qwen3_0_6b.yaml", "qwen3_4b.yaml", "llama3_1_70b.yaml", "prompts_600k.yaml",
            TRAINING} == set(RECIPES)  # fmt: skip


def test_the_reward_models_recipe_fits_the_devices_that_it_names():
    file, arguments = RECIPES[TRAINING].groups()
    assert file == TRAINING
    plan = plan_training(load_config(RewardConfig, CONFIGS / TRAINING), asked=asked(arguments))
    assert all(one.fits for one in plan.programs.values())
    assert as_json(plan)["total"]["stages"]["train"]["runs"] == -(-2_600 // 64)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {TRAINING}))
def test_a_recipe_fits_the_devices_that_it_names(name):
    file, arguments = RECIPES[name].groups()
    assert file == name
    plan = plan_run(load_config(RunConfig, CONFIGS / name), asked=asked(arguments, num_prompts=2_600))
    assert {"train", "score", "prefill", "decode"} == set(plan.programs)
    assert all(one.fits for one in plan.programs.values())
    assert plan.sampling["sample"].most_slots >= 16
    whole = totals(plan)
    assert whole is not None
    assert whole.device_hours is not None
    assert whole.device_hours > 0
    # All of it is numbers and words, so that JSON can hold it.
    assert as_json(plan)["total"]["disk"]["policy 0"] > 4 * plan.programs["train"].closed["parameters"] // 8


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("mistral-7b", 7_241_732_096),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3.5-9b", 8_953_803_264),  # these two as transformers' classes count on the meta device
        ("lfm2-1.2b", 1_170_340_608),
    ],
)
def test_a_bundled_shape_has_as_many_parameters_as_its_makers_say(name, numbers):
    from dno_jax.parallel.mesh import abstract_mesh
    from dno_jax.runtime.programs import Programs

    config = load_config(RunConfig, CONFIGS / "mistral_7b_ultrafeedback.yaml")
    shape = shape_of(config, name)
    assert Programs(config, shape.config, abstract_mesh(config.mesh, 1)).num_parameters == numbers
    assert name in shapes()


def test_the_papers_recipe_decodes_on_chips_of_16_gib():
    """A policy takes 13.5 GiB on every row shard of the training mesh: decoding has a mesh of its own."""
    config = load_config(RunConfig, CONFIGS / "mistral_7b_ultrafeedback.yaml")
    given = Asked(topology="v5e:16x16", compiled=False, model="mistral-7b")
    plan = plan_run(config, asked=given)
    slots = plan.sampling["sample"]
    assert slots.programs.mesh.shape["tensor"] == 2
    assert slots.weight_bytes < slots.capacity.usable / 2
    assert plan.mesh.shape["fsdp"] == 256  # training's mesh is as it was
    wider = load_config(RunConfig, CONFIGS / "mistral_7b_ultrafeedback.yaml", ["sampling.mesh={tensor: 8}"])
    assert plan_run(wider, asked=given).sampling["sample"].programs.mesh.shape["tensor"] == 8
    alone = load_config(RunConfig, CONFIGS / "mistral_7b_ultrafeedback.yaml", ["sampling.mesh={tensor: 1}"])
    with pytest.raises(DnoError, match="not even one sampling slot fits"):
        plan_run(alone, asked=given)
