"""`dno run --smoke`: what is measured, what is made of it, and that nothing is left."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from dno_jax import smoke
from dno_jax.cli.main import app
from dno_jax.errors import DnoError
from dno_jax.records import Message, Prompt, Rollout
from dno_jax.sampling.memory import Capacity
from dno_jax.smoke import Smoke, StageFigures
from tests.small import small_tree


def test_hours_and_dollars_are_of_all_devices_and_the_judge_is_beside_them():
    def figures(hours):
        return StageFigures(1.0, None, None, None, None, hours)

    found = Smoke({"sample": figures(2.0), "annotate": figures(50.0), "train": figures(3.0)}, 8, 1.5, 4.0)
    assert found.hours == 5.0
    assert found.as_dict()["device_hours"] == 40.0
    assert found.as_dict()["usd"] == 160.0
    assert Smoke(found.stages, 8, 1.5, None).as_dict()["usd"] is None


def test_rows_are_two_responses_of_a_prompt_as_often_as_batches_want():
    def rollout(prompt, sample, ids):
        return Rollout(
            rollout_id=f"{prompt}/{sample}", prompt_id=prompt, sample=sample, text="t", prompt_token_ids=[1, 2],
            token_ids=ids, logprob=-1.0, finish="stop", policy=0, source="policy",
        )  # fmt: skip

    rows = smoke._rows([rollout("a", 0, [3]), rollout("a", 1, [4, 5]), rollout("b", 0, [6, 7])], count=5)
    assert [row.response_ids for row in rows] == [((3,), (4, 5)), ((6, 7), (6, 7))] * 2 + [((3,), (4, 5))]
    assert rows[0].prompt_ids == ((1, 2), (1, 2))


def test_the_prompts_are_long_ones():
    prompts = [
        Prompt(prompt_id=f"{length:03d}", messages=(Message(role="user", content="x" * length),))
        for length in range(1, 101)
    ]
    chosen = smoke._longest(prompts)
    assert [prompt.prompt_id for prompt in chosen] == [f"{length:03d}" for length in range(95, 79, -1)]
    assert len(smoke._longest(prompts[:3])) == 3


@pytest.fixture
def recipe(small_folder, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_tree(small_folder) | {"run_dir": str(tmp_path / "run")}))
    return path


def test_what_is_not_its_own_is_not_thrown_away(recipe, make_config, tmp_path):
    (tmp_path / "run-smoke").mkdir()
    kept = tmp_path / "run-smoke" / "mine"
    kept.write_text("")
    with pytest.raises(DnoError, match="run-smoke: is there already, and not of an earlier --smoke"):
        smoke.run(make_config(run_dir=str(tmp_path / "run")))
    assert kept.exists()


def test_what_the_run_has_no_room_for_is_said_first(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DnoError, match=r"1000 B are free on its disk, and .* of checkpoints will be written"):
        smoke.run(make_config(run_dir=str(tmp_path / "run")))
    monkeypatch.setattr(smoke, "known_capacity", lambda devices: Capacity(10_000, "a small device"))
    with pytest.raises(DnoError, match=r"training does not fit: .* \(a small device\)"):
        smoke.run(make_config(run_dir=str(tmp_path / "run")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_every_stage_is_measured_and_nothing_is_left(recipe, tmp_path):
    done = CliRunner().invoke(app, ["run", str(recipe), "--smoke", "--price-per-hour", "2"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(found["stages"]) == {"sample", "annotate", "score", "train"}
    for stage in found["stages"].values():
        assert stage["seconds"] > 0
        assert stage["hours"] > 0
    for name in ("sample", "score", "train"):
        assert found["stages"][name]["tokens_per_second"] > 0
        assert found["stages"][name]["peak_bytes"] > 0
    assert found["usd"] == pytest.approx(2 * found["device_hours"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]
