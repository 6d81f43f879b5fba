from pathlib import Path

import pytest
import yaml

from dno_jax.config import (
    RunConfig,
    SftConfig,
    changed_fields,
    config_digest,
    dump_config,
    load_config,
    parse_config,
)
from dno_jax.errors import DnoError

ROOT = Path(__file__).parents[1]
MINIMAL = {"run_dir": "runs/x", "model": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "pairing": {
    "reward": "win_rate", "positive_floor": 0.5, "margin": 0.2, "student_margin": 0.2}}  # fmt: skip


def write(tmp_path, tree=MINIMAL):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_overrides_are_yaml_laid_over_the_file(tmp_path):
    config = load_config(
        RunConfig,
        write(tmp_path),
        ["sampling.num_samples=8", "optimizer.learning_rate=1.0e-6", "mesh.fsdp=-1", "mesh.data=1"],
    )
    assert (config.sampling.num_samples, config.optimizer.learning_rate, config.mesh.fsdp) == (8, 1e-6, -1)


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config(RunConfig, write(tmp_path))
    again = parse_config(RunConfig, yaml.safe_load(dump_config(config)), place="dump")
    assert again == config
    assert config_digest(again) == config_digest(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temprature=1", r"(?s)sampling\.temprature.*known here: .*num_samples"),
        ("unknown=1", "(?s)unknown.*known here: run_dir"),
        ("sampling.num_samples=1", "num_samples is 1.*K >= 2"),
        ("sampling.top_p=1.5", r"sampling\.top_p.*got 1\.5"),
        ("loss.beta=0", r"loss\.beta"),
        ("mesh.data=0", "data is 0"),
        ("mesh.fsdp=-1", "more than one axis is -1"),
        ("pairing.positive_floor=5", "no win rate"),
        ("pairing.reward=score", "gives pairwise verdicts, no scores"),
        ("pairing.replay=0.9", "leaves no room"),
        ("training.micro_batch_size=7", "does not divide batch_size 64"),
        ("annotation.oracle.criteria=[variety, relevance]", "odd number"),
        ("prompts.held_out_path=h.jsonl", "choose one"),
        ("sampling", "expected a.b=value"),
        ("model.path.x=1", "is a value, not a section"),
        ("model.path=", r"model\.path"),
    ],
)
def test_bad_fields_are_named(tmp_path, override, message):
    with pytest.raises(DnoError, match=message):
        load_config(RunConfig, write(tmp_path), ["prompts.held_out=2", override])


@pytest.mark.parametrize("text", ["- a list", "a: [1", ""])
def test_bad_files_are_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(DnoError, match=r"broken\.yaml"):
        load_config(RunConfig, path)
    with pytest.raises(DnoError, match="no such configuration file"):
        load_config(RunConfig, tmp_path / "absent.yaml")


def test_changes_that_decide_results_are_named_and_others_are_not(tmp_path):
    config = load_config(RunConfig, write(tmp_path))
    other = load_config(
        RunConfig,
        write(tmp_path),
        ["loss.beta=0.2", "mesh.fsdp=4", "run_dir=elsewhere", "annotation.openai.max_concurrency=4"],
    )
    assert changed_fields(config, other) == ["loss.beta: 0.1 -> 0.2"]
    same = load_config(RunConfig, write(tmp_path), ["mesh.fsdp=4", "training.save_every=7"])
    assert config_digest(same) == config_digest(config) != config_digest(other)


def test_no_field_holds_a_secret():
    """The key's variable is named, the key never is: a field called key or token would invite it."""

    def names(kind):
        for name, field in kind.model_fields.items():
            yield name
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from names(field.annotation)

    assert "api_key_env" in set(names(RunConfig))
    assert not [name for name in names(RunConfig) if name in ("api_key", "key", "token", "secret", "password")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads(path):
    kind = SftConfig if path.name == "sft.yaml" else RunConfig
    config = load_config(kind, path)
    assert config.run_dir
    assert "shared" not in path.read_text().replace("split: shared", "")
