"""Every field is of one kind: it decides the results of named stages, or it rounds, or it costs."""

from __future__ import annotations

from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from dno_jax.config import RewardConfig, RunConfig, SftConfig, deciding, parse_config, stage_digest
from dno_jax.config.base import Kind, Section, Stage

TREE = {
    "run_dir": "run",
    "model": {"path": "model"},
    "prompts": {"path": "prompts.jsonl"},
    "pairing": {"reward": "win_rate", "positive_floor": 0.5, "margin": 0.2, "student_margin": 0.2},
}
STAGES = [stage for stage in get_args(Stage) if stage not in ("sft", "reward")]


def sections(annotation):
    """The sections that a field's type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections(part)]


def leaves(kind, prefix=""):
    for name, field in kind.model_fields.items():
        inner = sections(field.annotation)
        if not inner or get_origin(field.annotation) is dict:
            yield prefix + name, field
        for section in inner:
            yield from leaves(section, f"{prefix}{name}.")


FIELDS = {name: field for config in (RunConfig, SftConfig, RewardConfig) for name, field in leaves(config)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_declares_its_kind(name):
    declared = FIELDS[name].json_schema_extra
    assert isinstance(declared, dict), f"{name} has no kind"
    assert declared["kind"] in get_args(Kind)
    if declared["kind"] in ("decides", "contents"):
        assert declared["stages"]
        assert set(declared["stages"]) <= set(get_args(Stage))
    else:
        assert "stages" not in declared


def test_a_path_never_decides():
    for name, field in FIELDS.items():
        if any("absolute" in repr(item) or "_rubric" in repr(item) for item in field.metadata):
            assert field.json_schema_extra["kind"] != "decides", name


def config(**changes):
    return parse_config(RunConfig, {**TREE, **changes}, place="test")


def changed_stages(**changes):
    before, after = config(), config(**changes)
    return {stage for stage in STAGES if stage_digest(before, stage) != stage_digest(after, stage)}


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"run_dir": "elsewhere"}, set()),
        ({"iterations": 7}, set()),
        ({"model": {"path": "other/place"}}, set()),
        ({"model": {"path": "model", "remat": "none", "attention": "xla"}}, set()),
        ({"mesh": {"fsdp": 4}}, set()),
        ({"training": {"micro_batch_size": 8, "logprob_chunk": 7, "save_every": 3}}, set()),
        ({"sampling": {"slots": 3, "chunk_steps": 5, "prefill_chunk": 64, "audit_prompts": 2}}, set()),
        ({"sampling": {"server": {"model": "served"}}}, set()),  # nobody asks a server
        ({"annotation": {"prices": {"m": {"input": 1, "output": 2}}, "store": "v.sqlite"}}, set()),
        ({"annotation": {"openai": {"model": "m"}}}, set()),  # the oracle judges
        ({"annotation": {"quality": {"repeat": 0.0, "max_tie_rate": 0.1}}}, set()),
        ({"report": {"tensorboard": False}}, set()),
        ({"optimizer": {"learning_rate": 1e-3}}, {"train"}),
        ({"training": {"batch_size": 8}}, {"train"}),
        ({"loss": {"beta": 0.5}}, {"train"}),
        ({"loss": {"target": "soft"}}, {"pair", "train"}),
        ({"pairing": {**TREE["pairing"], "margin": 0.1}}, {"pair"}),
        ({"reference": {"kind": "initial"}}, {"score", "train"}),
        ({"evaluation": {"num_samples": 3}}, {"evaluate"}),
        ({"evaluation": {"annotation": {"kind": "oracle", "oracle": {"target_words": 3}}}}, {"evaluate"}),
        ({"annotation": {"oracle": {"target_words": 3}}}, {"annotate", "evaluate"}),
        ({"annotation": {"show_reasoning": True}}, {"annotate", "pair", "evaluate"}),
        ({"model": {"path": "model", "template_options": {"enable_thinking": False}}}, {"sample", "evaluate"}),
        ({"sampling": {"temperature": 0.1}}, {"sample", "evaluate"}),
        ({"sampling": {"num_samples": 3}}, {"sample"}),
        ({"annotation": {"teacher": {"model": "t"}}}, {"teach"}),
        ({"model": {"path": "model", "dtype": "bfloat16"}}, {"sample", "score", "train", "evaluate"}),
        ({"seed": 1}, {"teach", "sample", "annotate", "pair", "train", "evaluate"}),
    ],
)
def test_a_field_changes_the_digests_of_the_stages_that_read_it(changes, stages):
    assert changed_stages(**changes) == stages


def test_a_section_above_says_which_stage_reads_its_fields():
    asked = {"kind": "openai", "openai": {"model": "m"}}
    own = config(annotation=asked, evaluation={"annotation": {"kind": "oracle"}})
    assert deciding(own, "annotate")["annotation.openai.model"] == "m"
    assert not [name for name in deciding(own, "evaluate") if name.startswith("annotation.")]
    taught = config(annotation={"teacher": {"model": "t"}})
    assert deciding(taught, "teach")["annotation.teacher.model"] == "t"
    assert not [name for name in deciding(taught, "annotate") if "teacher" in name]


def test_what_weighs_the_mixture_decides_samples_of_it():
    mixed = {
        "sampling": {"source": "mixture"},
        "pairing": {"opponents": "mixture", "reward": "win_rate", "rule": "all"},
    }
    for changes in ({"loss": {"beta": 0.3}}, {"reference": {"kind": "mixture", "tau": 0.05}}):
        before = config(**mixed, reference={"kind": "mixture", "tau": 0.02})
        after = config(**mixed, **{"reference": {"kind": "mixture", "tau": 0.02}, **changes})
        assert stage_digest(before, "sample") != stage_digest(after, "sample")


def test_built_in_names_decide_and_files_do_not():
    def judge(rubric):
        return config(annotation={"kind": "openai", "openai": {"rubric": rubric}})

    assert stage_digest(judge("listwise_6point"), "annotate") != stage_digest(judge(None), "annotate")
    assert stage_digest(judge("here/own.yaml"), "annotate") == stage_digest(judge("there/own.yaml"), "annotate")
    assert issubclass(RunConfig, Section)
