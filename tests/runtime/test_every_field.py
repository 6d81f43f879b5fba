"""Every field that training reads does something: changing it changes the program, the schedule, the batches or the
result, or it is refused. A field without a case here fails, so that none is accepted and ignored.

What only costs may do nothing at all; that those do what they say is tested where they are.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.model.params import abstract_adapters, abstract_params
from dno_jax.parallel.sharding import TRAIN
from dno_jax.preferences import soft_target
from dno_jax.records import Message
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.scheme import update_of
from dno_jax.training.batches import TrainingRow, batch_order, make_batch, text_lengths
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import learning_rate_schedule
from dno_jax.training.state import TrainState, state_shardings
from dno_jax.training.step import train_step
from tests.config.test_kinds import leaves
from tests.configured import deep_merge
from tests.small import small_tree, write_checkpoint

SECTIONS = ("model", "mesh", "loss", "reference", "outer", "optimizer", "training", "adapter")
TEMPLATE = (
    "{{ bos_token }}{% if strftime_now('%Y') == '2025' %}bam {% endif %}{{ mood }} "
    "{% for m in messages %}{{ m.content }} bes {% endfor %}"
)


@dataclass(frozen=True)
class Case:
    """What a field is changed to.

    Attributes:
        to: the value.
        beside: other fields, before and after: what makes it readable.
        refused: a part of what is said, where it is refused without them.
    """

    to: Any
    beside: Any = None
    refused: str | None = None


MIXTURE = {"reference": {"kind": "mixture", "tau": 0.05}}
OWN = {"pairing": {"rule": "matching", "reward": "win_rate", "opponents": "policy", "replay": 0}}
TWO_POLICIES = {"iterations": 2, "prompts": {"split": "shared"}, "pairing": {**OWN["pairing"], "rule": "all"}}
SPO = {**OWN, "loss": {"name": "spo"}}
ADAFACTOR = {"optimizer": {"name": "adafactor"}}
CASES = {
    "loss.name": Case("ipo"),
    "loss.beta": Case(0.2),
    "loss.beta_schedule": Case("nash_md", MIXTURE, refused="is made of tau"),
    "loss.target": Case("soft"),
    "loss.target_temperature": Case(0.5, {"loss": {"target": "soft"}}, refused="nothing reads it with target=hard"),
    "loss.label_smoothing": Case(0.1),
    "loss.smoothing": Case("robust", {"loss": {"label_smoothing": 0.1}}, refused="nothing reads it with label_smo"),
    "loss.nll_weight": Case(0.1),
    "loss.forward_kl_weight": Case(0.1),
    "loss.length_normalised": Case(True),
    "loss.length_penalty": Case(0.1),
    "loss.clip_range": Case(0.3, SPO, refused="nothing reads it with name=dno; it is for spo, nash_md_pg"),
    "loss.max_reward": Case(5.0, {"loss": {"name": "chi_po"}}, refused="with name=dno; it is for chi_po"),
    "loss.load_balance_weight": Case(0.1, {"model": {"path": "experts"}}, refused="is no mixture of experts"),
    "reference.kind": Case("initial"),
    "reference.tau": Case(0.02, MIXTURE, refused="goes with kind=mixture"),
    "outer.scheme": Case("extragradient", TWO_POLICIES, refused="set prompts.split=shared"),
    "outer.every": Case(1, {"outer": {"scheme": "proximal", "every": 2}, **MIXTURE}, refused="goes with scheme=pro"),
    "optimizer.learning_rate": Case(1e-4),
    "optimizer.learning_rate_decay": Case(0.5),
    "optimizer.schedule": Case("cosine"),
    "optimizer.warmup_ratio": Case(0.5),
    "optimizer.weight_decay": Case(0.1),
    "optimizer.b1": Case(0.8),
    "optimizer.b2": Case(0.9),
    "optimizer.eps": Case(1e-6),
    "optimizer.max_grad_norm": Case(0.5),
    "optimizer.name": Case("adafactor"),
    "optimizer.moment_dtype": Case("bfloat16"),
    "optimizer.momentum": Case(0.8, {"optimizer": {"name": "muon"}}, refused="only muon reads it"),
    "optimizer.decay_rate": Case(0.7, ADAFACTOR, refused="only adafactor reads it"),
    "optimizer.max_update_rms": Case(2.0, ADAFACTOR, refused="only adafactor reads it"),
    "optimizer.min_factored": Case(16, ADAFACTOR, refused="only adafactor reads it"),
    "optimizer.relative_rate": Case(True, ADAFACTOR, refused="only adafactor reads it"),
    "optimizer.carry": Case(True),
    "training.batch_size": Case(16),
    "training.micro_batch_size": Case(4, {"training": {"packing": "off"}}),
    "training.packing": Case("off"),
    "training.group_by_length": Case(True),
    "training.num_epochs": Case(2),
    "training.logprob_chunk": Case(16),
    "training.param_dtype": Case("bfloat16"),
    "training.skip_nonfinite": Case(3),
    "adapter.rank": Case(2, {"adapter": {"rank": 4}}),
    "adapter.alpha": Case(8.0, {"adapter": {"rank": 4}}),
    "adapter.targets": Case(["q_proj"], {"adapter": {"rank": 4}}),
    "adapter.path": Case("folder"),
    "model.path": Case("experts"),
    "model.dtype": Case("bfloat16"),
    "model.remat": Case("none"),
    "model.attention": Case("splash", refused="splash"),
    "model.chat_template": Case("dated"),
    "model.template_date": Case("2025-01-31", {"model": {"chat_template": "dated"}}),
    "model.template_options": Case({"mood": "glad"}, {"model": {"chat_template": "dated"}}),
    "mesh.data": Case(4, {"mesh": {"data": 2, "fsdp": -1}}),
    "mesh.fsdp": Case(2),
    "mesh.expert": Case(2, {"model": {"path": "experts"}}),
    "mesh.tensor": Case(2),
    "mesh.dcn_data": Case(3, refused="mesh.dcn_data is 3"),
}  # fmt: skip
# Read by the stage, between its steps: what such a field changes is tested there.
ELSEWHERE = {
    "adapter.path": ("end_to_end/test_adapters.py", "test_a_run_starts_from_an_adapter_of_pefts"),
    "optimizer.carry": ("stages/test_restart.py", "test_carried_moments_go_on_and_new_ones_start_at_zero"),
}
FIELDS = {
    name: field
    for name, field in leaves(RunConfig)
    if name.startswith(tuple(f"{section}." for section in SECTIONS)) and field.json_schema_extra["kind"] != "costs"
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A configuration with changes over the small one; names of places are of files made here."""
    folder = tmp_path_factory.mktemp("fields")
    tree = small_tree(folder) | {"run_dir": str(folder / "run")}
    tree["optimizer"] = {"schedule": "linear"}
    template = folder / "dated.jinja"
    template.write_text(TEMPLATE + "{% for m in messages if m.role == 'assistant' %}{{ eos_token }}{% endfor %}")
    places = {"experts": _experts(folder), "dated": str(template)}

    def configured(*changes):
        found = functools.reduce(deep_merge, [change for change in changes if change], tree)
        model = {name: places.get(value, value) if isinstance(value, str) else value
                 for name, value in found["model"].items()}  # fmt: skip
        return parse_config(RunConfig, found | {"model": model}, place="test")

    return configured


def _experts(folder: Path) -> str:
    """The small checkpoint's folder, with the shape of a mixture in its config.json: no weights are read here."""
    path = write_checkpoint(folder / "mixture")
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
               "num_experts_per_tok": 2}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def seen(make):
    """What a configuration makes of training: each configuration is looked at once."""
    rng = np.random.default_rng(0)

    def ids(most):
        return tuple(rng.integers(4, 70, size=rng.integers(2, most)).tolist())

    rows = [TrainingRow((prompt := ids(12), prompt), (ids(14), ids(14))) for _ in range(64)]
    lengths = text_lengths(rows)

    @functools.cache
    def look(text: str) -> dict[str, Any]:
        config = parse_config(RunConfig, json.loads(text), place="test")
        runtime = Runtime.start(config)
        programs, section = runtime.programs, config.training
        order = list(
            batch_order(
                len(rows),
                batch_size=section.batch_size,
                num_epochs=section.num_epochs,
                seed=config.seed,
                iteration=0,
                lengths=(lengths.prompt + lengths.response).max(axis=1) if section.group_by_length else None,
            )
        )
        plan = programs.plan_batches(lengths, order)
        rates = [
            [float(learning_rate_schedule(config.optimizer, num_steps=len(order), iteration=t)(s)) for s in range(8)]
            for t in range(2)
        ]
        return {
            "schedule": rates,
            "batches": [index.tolist() for index in order],
            "shapes": [str(shape) for shape in plan.shapes],
            "targets": _target(config),
            "scheme": [str(update_of(config, RunDir("r"), t)) for t in range(config.iterations)],
            "text": runtime.tokenizer.prompt_ids(_messages(), ""),
        }

    @functools.cache
    def program(text: str) -> str:
        config = parse_config(RunConfig, json.loads(text), place="test")
        runtime, section = Runtime.start(config), config.training
        programs = runtime.programs
        plan = programs.plan_batches(lengths, [np.arange(section.batch_size)])
        batch = make_batch(
            rows[: section.batch_size], batch_size=section.batch_size, max_length=config.max_length, plan=plan
        )
        step = programs.step_config(
            preference_loss(config.loss_at(0), config.reference), load_balance_weight=config.loss.load_balance_weight
        )
        params, frozen = programs.trained_params, None
        if programs.adapter is not None:
            params = abstract_adapters(runtime.model_config, programs.adapter)
            frozen = jax.tree.map(_placed, abstract_params(runtime.model_config), programs.param_shardings(TRAIN))
        shardings = state_shardings(step.optimizer, programs.trained_shardings, params)
        state = jax.eval_shape(lambda held: TrainState(jnp.int32(0), held, step.optimizer.init(held)), params)
        state, placed = jax.tree.map(_placed, state, shardings), batch.place(runtime.mesh)
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        return train_step.lower(state, placed, jnp.float32(1e-3), config=step, frozen=frozen, rounding=key).as_text()

    @dataclass
    class Seen:
        """Compared by what is cheap first."""

        text: str

        def __eq__(self, other):
            return look(self.text) == look(other.text) and program(self.text) == program(other.text)

    return lambda *changes: Seen(json.dumps(make(*changes).model_dump(mode="json")))


def _placed(leaf, place):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _messages():
    return (Message(role="user", content="bam bet"),)


def _target(config):
    return soft_target(0.9, 0.3, temperature=config.loss.target_temperature) if config.loss.target == "soft" else 1.0


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_does_something_or_is_refused(name, make, seen):
    case = CASES.get(name)
    assert case is not None, f"{name} has no case: say in CASES what it is changed to, and see that it does something"
    section, _, field = name.partition(".")
    change = {section: {field: case.to}}
    if case.refused:
        with pytest.raises(DnoError) as told:
            Runtime.start(make(change))
        assert case.refused in str(told.value)
        if not case.beside:
            return
    if name in ELSEWHERE:
        file, test = ELSEWHERE[name]
        assert f"def {test}(" in (Path(__file__).parents[1] / file).read_text()
        return
    before, after = seen(case.beside), seen(case.beside, change)
    assert before != after, f"{name} is accepted and ignored"


def test_no_case_is_of_a_field_that_is_gone():
    assert set(CASES) <= set(FIELDS)


def test_what_is_the_same_is_seen_as_the_same(seen):
    """Else nothing above would mean anything."""
    assert seen() == seen({"training": {"save_every": 3, "keep_states": 5}, "grace_seconds": 7.0})
