"""Training that is stopped and goes on: the same bits on the same devices, rounding apart on others."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from dno_jax.config import LossSection, MeshSection, SftConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.model.params import init_adapters
from dno_jax.parallel.cluster import CommonStop
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN
from dno_jax.runtime.programs import Programs
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages.checkpoints import read_checkpoint
from dno_jax.stages.train import Training, train
from dno_jax.training.batches import TrainingRow
from dno_jax.training.carried import load_moments, save_moments
from dno_jax.training.objectives import preference_loss

STEPS = 20
# Changes of the small configuration: whatever has a state of its own belongs here.
KINDS = {
    "adamw": {"optimizer": {"schedule": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.1}},
    "adafactor": {"optimizer": {"name": "adafactor", "min_factored": 8}},
    "muon": {"optimizer": {"name": "muon"}},
    "bfloat16": {"optimizer": {"moment_dtype": "bfloat16"}, "training": {"param_dtype": "bfloat16"}},
    "lora": {"adapter": {"rank": 4, "alpha": 8.0}},
}


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)

    def ids(most):
        return tuple(rng.integers(4, 70, size=rng.integers(2, most)).tolist())

    prompts = [ids(10) for _ in range(8 * STEPS)]
    return [TrainingRow((p, p), (ids(14), ids(14)), name=f"pair-{n}") for n, p in enumerate(prompts)]


class Trainer:
    """Trains in a run directory, on as many devices and with such an optimiser as asked, from its last state on."""

    def __init__(self, config, rows):
        self.config, self.rows = config, rows

    def __call__(self, *, devices=8, until=None, mesh=None, carried=None):
        runtime = Runtime.start(self.config)
        mesh = make_mesh(mesh or MeshSection(), jax.devices()[:devices])
        runtime = dataclasses.replace(runtime, programs=Programs(self.config, runtime.model_config, mesh))
        step = runtime.programs.step_config(preference_loss(LossSection(), self.config.reference))
        params, frozen = self.begun(runtime.programs)
        base = None if frozen is None else "the base's fingerprint"
        place = Training("train", 0, self.states, max_length=self.config.max_length, carried=carried, base=base)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CommonStop, "is_due", lambda self, now: now == until)
            self.states.parent.mkdir(parents=True, exist_ok=True)
            return train(runtime, params, self.rows, step, place, frozen=frozen)

    def begun(self, programs):
        """Return what is trained, as it begins, and what stands beside it."""
        held = read_checkpoint(self.config.model.path, shardings=programs.param_shardings(TRAIN))
        if programs.adapter is None:
            return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), held, programs.trained_params), None
        fresh = init_adapters(programs.model_config, programs.adapter, jax.random.key(0))
        return jax.device_put(fresh, programs.trained_shardings), held

    @property
    def states(self):
        return epath.Path(self.config.run_dir) / "states"

    def saved(self):
        return sorted(int(path.name) for path in self.states.iterdir())


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=[] if kind == "adamw" else pytest.mark.soak) for kind in KINDS]
)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def trainer(make_config, rows, tmp_path):
    def make(name, **changes):
        return Trainer(make_config(run_dir=str(tmp_path / name), **changes), rows)

    return make


def same(found, expected, **tolerance):
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(expected), strict=True):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance or {"rtol": 0, "atol": 0})


@pytest.fixture(scope="module")
def straight(small_folder, rows, kind, tmp_path_factory):
    """Twenty steps without a stop."""
    from dno_jax.config import RunConfig
    from tests.configured import deep_merge
    from tests.small import small_tree

    changes = {"run_dir": str(tmp_path_factory.mktemp("straight")), **kind}
    config = parse_config(RunConfig, deep_merge(small_tree(small_folder), changes), place="test")
    return Trainer(config, rows)()


def test_twenty_steps_are_ten_a_stop_and_ten(trainer, straight, kind):
    stopped = trainer("stopped", **kind)
    with pytest.raises(KeyboardInterrupt):
        stopped(until=10)
    assert stopped.saved() == [10]
    result = stopped()
    assert result.num_steps == STEPS
    same(result.params, straight.params)
    same(result.opt_state, straight.opt_state)
    timed = {"tokens_per_second", "tflops_per_second", "step_seconds", "jitter", "alarms"}
    assert {name for name, value in result.metrics.items() if straight.metrics.get(name) != value} <= timed


@pytest.mark.soak
def test_what_eight_devices_began_four_end(trainer, straight, kind):
    stopped = trainer("moved", **kind)
    with pytest.raises(KeyboardInterrupt):
        stopped(until=10)
    result = stopped(devices=4, mesh=MeshSection(data=2, fsdp=2))
    # Sums in another order; where a gradient is of rounding's size Adam may turn a step of 1e-3 around. What is rounded
    # at random may go to the other neighbour, and stays 2^-8 apart.
    rounded = "param_dtype" in kind.get("training", {})
    same(result.params, straight.params, **({"rtol": 2**-6, "atol": 2e-3} if rounded else {"rtol": 1e-4, "atol": 1e-4}))


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"save_every": 7}, [7, 14]), ({"save_every": 4, "keep_states": 9}, [4, 8, 12, 16]), ({"save_every": 20}, []),
     ({"save_every": 4, "keep_states": 1}, [16])],
)  # fmt: skip
def test_states_are_those_that_were_asked_for(trainer, changes, found):
    """Also not the first one, which Orbax would write by itself, and not the last, which the policy is."""
    asked = trainer("asked", training=changes)
    asked()
    assert asked.saved() == found


def test_carried_moments_go_on_and_new_ones_start_at_zero(trainer, tmp_path, rows):
    first = trainer("first")()
    policy = epath.Path(tmp_path) / "policies" / "001"
    save_moments(policy, first.opt_state)
    counts = {}
    for name, carried in {"anew": None, "carried": policy}.items():
        result = trainer(name)(carried=carried)
        counts[name] = max(int(leaf) for leaf in jax.tree.leaves(result.opt_state) if leaf.ndim == 0)
    assert counts == {"anew": STEPS, "carried": 2 * STEPS}
    # Interrupted, it goes on from its own state, not from the carried one again.
    stopped = trainer("stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped(until=3, carried=policy)
    same(stopped(carried=policy).opt_state, result.opt_state)


def test_moments_that_are_missing_or_others_are_refused(trainer, tmp_path):
    policies = epath.Path(tmp_path) / "policies"
    state = {"count": jax.numpy.int32(3), "mu": jax.numpy.arange(8.0)}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert load_moments(policies / "000", state, shardings) is state  # nothing has trained it
    with pytest.raises(DnoError, match=r"policies/002: no optimiser state.*--from train:1"):
        load_moments(policies / "002", state, shardings)
    for number in (2, 3):
        save_moments(policies / f"00{number}", {**state, "mu": number * state["mu"]})
    same(load_moments(policies / "002", state, shardings), {**state, "mu": 2 * state["mu"]})
    (policies / "002" / "moments").rmtree()
    (policies / "003" / "moments").rename(policies / "002" / "moments")
    with pytest.raises(DnoError, match=r"moments: not the optimiser state that was written; .*--from train:1"):
        load_moments(policies / "002", state, shardings)


@pytest.mark.parametrize(
    "field", ["optimizer.carry=true", "optimizer.learning_rate_decay=0.5", "training.keep_policies=2"]
)
def test_fine_tuning_refuses_what_concerns_iterations(field):
    name, value = field.split("=")
    section, _, own = name.partition(".")
    tree = {"run_dir": "r", "model": {"path": "m"}, "data": {"path": "d.jsonl"}, section: {own: value}}
    with pytest.raises(DnoError, match=f"{name}: concerns what one iteration leaves to the next"):
        parse_config(SftConfig, tree, place="test")
