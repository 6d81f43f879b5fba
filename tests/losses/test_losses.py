import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dno_jax.losses import (
    chi_po_link,
    chi_po_loss,
    cross_entropy,
    dno_loss,
    implicit_reward,
    inpo_loss,
    ipo_loss,
    length_normalised,
    length_penalised_reference,
    nash_md_pg_loss,
    nll_loss,
    rebel_loss,
    reference_mixture,
    reward_margin,
    robust_target,
    self_play_win_rates,
    smoothed_target,
    spin_loss,
    spo_loss,
    sppo_hard_loss,
    sppo_loss,
    with_nll,
)

# ---------------------------------------------------------------------- the DNO loss


def log_sigmoid(x):
    """In float64, by log1p of exponentials of the safe sign."""
    return np.minimum(x, 0.0) - np.log1p(np.exp(-np.abs(x)))


def numpy_loss(chosen, rejected, reference_chosen, reference_rejected, target, beta):
    """Eq. 8 in float64."""
    delta = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -(target * log_sigmoid(delta) + (1 - target) * log_sigmoid(-delta))


def random_inputs(rng, count=200, scale=30.0):
    names = ("chosen_logprob", "rejected_logprob", "reference_chosen_logprob", "reference_rejected_logprob")
    return {name: (-rng.random(count) * scale).astype(np.float32) for name in names}


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("target", [1.0, 0.731, 0.5, 0.0])
def test_matches_float64(beta, target):
    inputs = random_inputs(np.random.default_rng(0))
    expected = numpy_loss(*(value.astype(np.float64) for value in inputs.values()), target, beta)
    found = dno_loss(**inputs, target=target, beta=beta)
    # float32 inputs of size 30: a rounding of 2e-6 nats in the margin.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_hand_computed_numbers():
    # beta (log-ratio difference) = 0.1 * ((-10 + 12) - (-20 + 15)) = 0.7; -log sigmoid(0.7) = 0.403186
    loss = dno_loss(
        chosen_logprob=-10.0, rejected_logprob=-20.0, reference_chosen_logprob=-12.0, reference_rejected_logprob=-15.0,
        target=1.0, beta=0.1,
    )  # fmt: skip
    assert float(loss) == pytest.approx(0.4031860, abs=1e-6)
    assert float(reward_margin(
        chosen_logprob=-10.0, rejected_logprob=-20.0, reference_chosen_logprob=-12.0, reference_rejected_logprob=-15.0,
        beta=0.1,
    )) == pytest.approx(0.7, abs=1e-6)  # fmt: skip
    assert float(implicit_reward(logprob=-10.0, reference_logprob=-12.0, beta=0.1)) == pytest.approx(0.2, abs=1e-6)


def test_is_log_two_where_the_policy_is_its_reference():
    same = jnp.full(3, -17.25)
    loss = dno_loss(
        chosen_logprob=same, rejected_logprob=same - 5, reference_chosen_logprob=same,
        reference_rejected_logprob=same - 5, target=1.0, beta=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(loss, math.log(2.0), rtol=1e-7)


def test_gradient_at_the_reference_is_beta_times_half_minus_target():
    # dno.md: gradient of Eq. 8 at pi = pi_t is -eta E[(sigma(D*) - 1/2) grad(log pi(y1) - log pi(y2))] as a loss.
    def loss(chosen):
        return dno_loss(
            chosen_logprob=chosen, rejected_logprob=-3.0, reference_chosen_logprob=-2.0,
            reference_rejected_logprob=-3.0, target=0.7, beta=0.3,
        )  # fmt: skip

    assert float(jax.grad(loss)(-2.0)) == pytest.approx(-0.3 * (0.7 - 0.5), abs=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_huge_margins_with_the_right_slope(dtype):
    chosen = jnp.asarray([1e4, -1e4, 0.0], dtype)
    zeros = jnp.zeros(3, dtype)

    def total(value):
        return dno_loss(
            chosen_logprob=value, rejected_logprob=zeros, reference_chosen_logprob=zeros,
            reference_rejected_logprob=zeros, target=1.0, beta=1.0,
        ).sum()  # fmt: skip

    loss, slope = jax.value_and_grad(total)(chosen)
    assert np.isfinite(float(loss))
    np.testing.assert_allclose(np.asarray(slope, np.float32), [0.0, -1.0, -0.5], atol=1e-6)


def test_agrees_with_torch_log_sigmoid():
    torch = pytest.importorskip("torch")
    inputs = random_inputs(np.random.default_rng(1), scale=8.0)
    tensors = {name: torch.tensor(value, requires_grad=name == "chosen_logprob") for name, value in inputs.items()}
    ratio = tensors["chosen_logprob"] - tensors["rejected_logprob"]
    reference = tensors["reference_chosen_logprob"] - tensors["reference_rejected_logprob"]
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratio - reference))
    expected.sum().backward()

    def total(chosen):
        return dno_loss(**{**inputs, "chosen_logprob": chosen}, target=1.0, beta=0.1).sum()

    np.testing.assert_allclose(
        dno_loss(**inputs, target=1.0, beta=0.1), expected.detach().numpy(), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        jax.grad(total)(inputs["chosen_logprob"]), tensors["chosen_logprob"].grad.numpy(), rtol=1e-5, atol=1e-7
    )


def test_nll_is_a_mean_over_tokens_and_zero_without_any():
    np.testing.assert_allclose(
        nll_loss(logprob=jnp.asarray([-6.0, 0.0]), num_tokens=jnp.asarray([3.0, 0.0])), [2.0, 0.0]
    )


def test_importing_the_losses_imports_jax_alone():
    code = "from dno_jax.losses import dno_loss; import sys; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jax" in loaded
    assert not {"flax", "optax", "transformers", "openai", "pydantic", "orbax", "torch", "yaml"} & set(loaded)


# ---------------------------------------------------------------------- the family: closed forms from the papers


@dataclass(frozen=True)
class Case:
    """A loss with its closed form in numpy.

    `found` maps arrays and options to the loss. So does `closed`, in float64; its second argument is the arrays again,
    as they are where a derivative is taken: what the gradient does not flow through is read from there.
    """

    found: Callable
    closed: Callable
    names: tuple[str, ...]
    options: dict[str, float]


POLICY = ("chosen_logprob", "rejected_logprob")
FOUR = (*POLICY, "reference_chosen_logprob", "reference_rejected_logprob")
INITIAL = ("initial_chosen_logprob", "initial_rejected_logprob")
LENGTHS = ("chosen_tokens", "rejected_tokens")


def random_arrays(names, *, count=64, seed=0):
    """Log-probabilities in multiples of 1/64, whose differences are exact in float32, with log-ratios of -3 to 3."""
    rng = np.random.default_rng(seed)

    def grid(low, high):
        return rng.integers(int(low * 64), int(high * 64), count) / 64.0

    arrays = {"chosen_logprob": grid(-30, -4), "rejected_logprob": grid(-30, -4), "logprob": grid(-30, -4)}
    for side in POLICY:
        for kind in ("reference", "initial"):
            arrays[f"{kind}_{side}"] = arrays[side] + grid(-3, 3)
    for kind in ("reference", "initial"):
        arrays[f"{kind}_logprob"] = arrays["logprob"] + grid(-3, 3)
    arrays["previous_logprob"] = arrays["logprob"] + grid(-0.75, 0.75)
    arrays["chosen_tokens"], arrays["rejected_tokens"] = (rng.integers(1, 9, count).astype(float) for _ in range(2))
    arrays["target"], arrays["win_rate"] = rng.integers(0, 65, (2, count)) / 64.0
    arrays["reward_difference"] = grid(-1, 1)
    arrays["preference"] = rng.integers(0, 65, (count, 4, 4)) / 64.0
    return {name: arrays[name] for name in names}


def pick(arrays, names, **more):
    return {name: arrays[name] for name in names} | more


def ratio(a, side, kind="reference"):
    return a[f"{side}_logprob"] - a[f"{kind}_{side}_logprob"]


def gap(a):
    """log pi(y+)/pi_ref(y+) - log pi(y-)/pi_ref(y-)."""
    return ratio(a, "chosen") - ratio(a, "rejected")


def closed_robust(a, at, *, beta, label_smoothing):
    delta, e = beta * gap(a), label_smoothing
    return (-(1 - e) * log_sigmoid(delta) + e * log_sigmoid(-delta)) / (1 - 2 * e)


def closed_ipo(a, at, *, beta):
    right, wrong = (gap(a) - 1 / (2 * beta)) ** 2, (gap(a) + 1 / (2 * beta)) ** 2
    return a["target"] * right + (1 - a["target"]) * wrong


def found_inpo(a, *, tau, eta):
    previous = {name.replace("reference", "previous"): a[name] for name in FOUR[2:]}
    return inpo_loss(**pick(a, POLICY), **previous, **pick(a, INITIAL), target=a["target"], tau=tau, eta=eta)


def closed_inpo(a, at, *, tau, eta):
    h = (a["chosen_logprob"] - a["rejected_logprob"]) - tau / eta * (
        a["initial_chosen_logprob"] - a["initial_rejected_logprob"]
    )
    h = h - (eta - tau) / eta * (a["reference_chosen_logprob"] - a["reference_rejected_logprob"])
    return a["target"] * (h - 1 / (2 * eta)) ** 2 + (1 - a["target"]) * (-h - 1 / (2 * eta)) ** 2


def closed_chi_po(a, at, *, beta, max_reward):
    chosen, rejected = np.exp(ratio(a, "chosen")), np.exp(ratio(a, "rejected"))
    margin = beta * (chosen + np.log(chosen)) - beta * (rejected + np.log(rejected))
    margin = np.clip(margin, -2 * max_reward, 2 * max_reward)
    return -a["target"] * log_sigmoid(margin) - (1 - a["target"]) * log_sigmoid(-margin)


def found_regularised(a, *, tau, eta):
    sides = {
        f"reference_{side}_logprob": reference_mixture(
            a[f"reference_{side}_logprob"], a[f"initial_{side}_logprob"], tau=tau, eta=eta
        )
        for side in ("chosen", "rejected")
    }
    return dno_loss(**pick(a, POLICY), **sides, target=a["target"], beta=eta)


def closed_regularised(a, at, *, tau, eta):
    def side(name):
        return (
            eta * a[f"{name}_logprob"]
            - (eta - tau) * a[f"reference_{name}_logprob"]
            - tau * a[f"initial_{name}_logprob"]
        )

    delta = side("chosen") - side("rejected")
    return -a["target"] * log_sigmoid(delta) - (1 - a["target"]) * log_sigmoid(-delta)


def found_normalised(a, *, beta):
    arrays = {
        name: length_normalised(logprob=a[name], num_tokens=a[f"{'chosen' if 'chosen' in name else 'rejected'}_tokens"])
        for name in FOUR
    }
    return dno_loss(**arrays, target=1.0, beta=beta)


def found_length_penalised(a, *, alpha, beta):
    sides = {
        f"reference_{side}_logprob": length_penalised_reference(
            reference_logprob=a[f"reference_{side}_logprob"], num_tokens=a[f"{side}_tokens"], alpha=alpha, beta=beta
        )
        for side in ("chosen", "rejected")
    }
    return dno_loss(**pick(a, POLICY), **sides, target=1.0, beta=beta)


def found_with_nll(a, *, beta, weight):
    loss = dno_loss(**pick(a, FOUR), target=1.0, beta=beta)
    return with_nll(loss, chosen_logprob=a["chosen_logprob"], num_tokens=a["chosen_tokens"], weight=weight)


def closed_surrogate(a, advantage, clip_range):
    rho = np.exp(a["logprob"] - a["previous_logprob"])
    return -np.where(
        advantage > 0,
        np.minimum(rho, 1 + clip_range) * advantage,
        np.maximum(rho, 1 - clip_range) * advantage,
    )


def closed_nash_md_pg(a, at, *, tau, clip_range):
    advantage = a["win_rate"] - 0.5 - tau * (at["logprob"] - at["initial_logprob"])
    return closed_surrogate(a, advantage, clip_range)


CASES = {
    "dno": Case(
        lambda a, beta: dno_loss(**a, beta=beta),
        lambda a, at, beta: numpy_loss(*(a[name] for name in FOUR), a["target"], beta),
        (*FOUR, "target"),
        {"beta": 0.1},
    ),
    "sigmoid": Case(  # TRL's name of DPO
        lambda a, beta: dno_loss(**a, target=1.0, beta=beta),
        lambda a, at, beta: -log_sigmoid(beta * gap(a)),
        FOUR,
        {"beta": 0.25},
    ),
    "spin": Case(
        lambda a, beta: spin_loss(**a, beta=beta),
        lambda a, at, beta: np.log1p(np.exp(-beta * gap(a))),
        FOUR,
        {"beta": 0.1},
    ),
    "cdpo": Case(
        lambda a, beta, label_smoothing: dno_loss(
            **a, target=smoothed_target(target=1.0, label_smoothing=label_smoothing), beta=beta
        ),
        lambda a, at, beta, label_smoothing: (
            -(1 - label_smoothing) * log_sigmoid(beta * gap(a)) - label_smoothing * log_sigmoid(-beta * gap(a))
        ),
        FOUR,
        {"beta": 0.1, "label_smoothing": 0.125},
    ),
    "robust": Case(
        lambda a, beta, label_smoothing: dno_loss(
            **a, target=robust_target(target=1.0, label_smoothing=label_smoothing), beta=beta
        ),
        closed_robust,
        FOUR,
        {"beta": 0.1, "label_smoothing": 0.125},
    ),
    "chi_po": Case(
        lambda a, beta, max_reward: chi_po_loss(**a, beta=beta, max_reward=max_reward),
        closed_chi_po,
        (*FOUR, "target"),
        {"beta": 0.1, "max_reward": 0.25},
    ),
    "ipo": Case(
        lambda a, beta: ipo_loss(**a, target=1.0, beta=beta),
        lambda a, at, beta: (gap(a) - 1 / (2 * beta)) ** 2,
        FOUR,
        {"beta": 0.1},
    ),
    "ipo_soft": Case(lambda a, beta: ipo_loss(**a, beta=beta), closed_ipo, (*FOUR, "target"), {"beta": 0.1}),
    "inpo": Case(found_inpo, closed_inpo, (*FOUR, *INITIAL, "target"), {"tau": 0.125, "eta": 0.5}),
    "rebel": Case(
        lambda a, beta: rebel_loss(**a, beta=beta),
        lambda a, at, beta: (beta * gap(a) - a["reward_difference"]) ** 2,
        (*FOUR, "reward_difference"),
        {"beta": 0.25},
    ),
    "sppo": Case(
        lambda a, beta: sppo_loss(**a, beta=beta),
        lambda a, at, beta: (a["logprob"] - a["reference_logprob"] - (a["win_rate"] - 0.5) / beta) ** 2,
        ("logprob", "reference_logprob", "win_rate"),
        {"beta": 0.1},
    ),
    "sppo_hard": Case(
        lambda a, beta: sppo_hard_loss(**a, beta=beta),
        lambda a, at, beta: (ratio(a, "chosen") - 0.5 / beta) ** 2 + (ratio(a, "rejected") + 0.5 / beta) ** 2,
        FOUR,
        {"beta": 0.1},
    ),
    "dno_regularised": Case(
        found_regularised, closed_regularised, (*FOUR, *INITIAL, "target"), {"tau": 0.125, "eta": 0.5}
    ),
    "dno_length_normalised": Case(
        found_normalised,
        lambda a, at, beta: (
            -log_sigmoid(beta * (ratio(a, "chosen") / a["chosen_tokens"] - ratio(a, "rejected") / a["rejected_tokens"]))
        ),
        (*FOUR, *LENGTHS),
        {"beta": 0.5},
    ),
    "r_dpo": Case(
        found_length_penalised,
        lambda a, at, alpha, beta: (
            -log_sigmoid(beta * gap(a) + (alpha * a["chosen_tokens"] - alpha * a["rejected_tokens"]))
        ),
        (*FOUR, *LENGTHS),
        {"alpha": 0.0625, "beta": 0.125},
    ),
    "dno_with_nll": Case(
        found_with_nll,
        lambda a, at, beta, weight: -log_sigmoid(beta * gap(a)) - weight * a["chosen_logprob"] / a["chosen_tokens"],
        (*FOUR, "chosen_tokens"),
        {"beta": 0.1, "weight": 0.005},
    ),
    "spo": Case(
        lambda a, clip_range: spo_loss(**a, clip_range=clip_range),
        lambda a, at, clip_range: closed_surrogate(a, a["win_rate"] - 0.5, clip_range),
        ("logprob", "previous_logprob", "win_rate"),
        {"clip_range": 0.2},
    ),
    "nash_md_pg": Case(
        lambda a, tau, clip_range: nash_md_pg_loss(**a, tau=tau, clip_range=clip_range),
        closed_nash_md_pg,
        ("logprob", "previous_logprob", "initial_logprob", "win_rate"),
        {"tau": 0.05, "clip_range": 0.2},
    ),
    "self_play_win_rates": Case(
        lambda a: self_play_win_rates(**a),
        lambda a, at: np.stack(
            [[np.mean([row[i][j] for j in range(4) if j != i]) for i in range(4)] for row in a["preference"]]
        ),
        ("preference",),
        {},
    ),
}
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def float32(arrays):
    return {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}


@each_case
def test_is_its_closed_form(case):
    arrays = random_arrays(case.names)
    expected = case.closed(arrays, arrays, **case.options)
    found = case.found(float32(arrays), **case.options)
    assert found.dtype == jnp.float32
    assert found.shape == expected.shape
    # The inputs are exact: what is left is a few roundings, relative to the size of the terms.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(expected).mean()))


@each_case
def test_gradient_is_that_of_finite_differences(case):
    arrays = random_arrays(case.names, seed=1)
    moving = [name for name in case.names if name.endswith("logprob") or name in ("target", "win_rate")]
    gradient = jax.grad(lambda a: case.found(a, **case.options).sum())(float32(arrays))
    for name in moving:
        # A central difference in float64: an error of step^2 from curvature and 1e-16 / step from rounding.
        step = 1e-5
        up, down = (
            case.closed(arrays | {name: arrays[name] + shift}, arrays, **case.options) for shift in (step, -step)
        )
        expected = (up - down) / (2 * step)
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


@each_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_is_finite_with_log_ratios_of_ten_thousand(case, dtype):
    arrays = {name: jnp.asarray(value, dtype) for name, value in random_arrays(case.names, count=4).items()}
    sides = [name for name in case.names if name.endswith("logprob")]
    for name in sides:
        for pattern in ([1e4, -1e4, 1e4, -1e4], [1e4, 1e4, -1e4, -1e4]):
            extreme = arrays | {name: jnp.asarray(pattern, dtype)}
            loss, gradient = jax.value_and_grad(lambda a: case.found(a, **case.options).sum())(extreme)
            assert loss.dtype == jnp.float32
            assert np.isfinite(float(loss)), name
            for value in jax.tree.leaves(gradient):
                assert np.all(np.isfinite(np.asarray(value, np.float32))), name


@each_case
def test_takes_bfloat16_and_computes_in_float32(case):
    rounded = {name: jnp.asarray(value, jnp.bfloat16) for name, value in random_arrays(case.names).items()}
    found = case.found(rounded, **case.options)
    np.testing.assert_array_equal(found, case.found(float32(rounded), **case.options))


@each_case
def test_is_the_same_under_jit_vmap_and_every_kind_of_mesh(case):
    arrays = float32(random_arrays(case.names, count=16, seed=2))

    def loss(a):
        return case.found(a, **case.options)

    plain = np.asarray(loss(arrays))
    near = {"rtol": 1e-6, "atol": 1e-6}  # XLA fuses, and so rounds, otherwise
    np.testing.assert_allclose(jax.vmap(loss)(arrays), plain, **near)
    np.testing.assert_allclose(jax.jit(loss)(arrays), plain, **near)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        placed = jax.device_put(arrays, jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(jax.jit(loss)(placed), plain, **near)
            mapped = jax.shard_map(loss, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
            np.testing.assert_allclose(jax.jit(mapped)(placed), plain, **near)
            slope = jax.jit(jax.grad(lambda a: loss(a).sum()))(placed)
        for name, value in jax.grad(lambda a: loss(a).sum())(arrays).items():
            np.testing.assert_allclose(slope[name], value, **near)


@each_case
def test_every_array_and_every_option_matters(case):
    arrays = random_arrays(case.names, seed=3)
    plain = np.asarray(case.found(float32(arrays), **case.options))
    for name in case.names:
        moved = case.found(float32(arrays | {name: arrays[name] + 0.25}), **case.options)
        assert np.abs(moved - plain).max() > 1e-3, name
    for name, value in case.options.items():
        options = case.options | {name: 1.5 * value}
        moved = case.found(float32(arrays), **options)
        assert np.abs(moved - plain).max() > 1e-3, name
        np.testing.assert_allclose(moved, case.closed(arrays, arrays, **options), rtol=1e-5, atol=1e-5)


@each_case
def test_refuses_shapes_that_do_not_match(case, monkeypatch):
    if len(case.names) == 1:
        return
    arrays = float32(random_arrays(case.names, count=4))
    # Without the import hook of these tests, as users run it.
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    for name in case.names:
        for wrong in (arrays[name][:3], arrays[name][:, None], jnp.stack([arrays[name]] * 2)):
            with pytest.raises(ValueError, match=r"shapes do not match: .*\[4\]"):
                case.found(arrays | {name: wrong}, **case.options)


# ---------------------------------------------------------------------- the family: what each is for


def test_robust_targets_undo_smoothing_and_make_the_loss_unbiased():
    target = np.linspace(0, 1, 9, dtype=np.float32)
    smoothed = smoothed_target(target=target, label_smoothing=0.2)
    np.testing.assert_allclose(robust_target(target=smoothed, label_smoothing=0.2), target, atol=1e-6)
    np.testing.assert_array_equal(smoothed_target(target=target, label_smoothing=0.0), target)
    margin = np.linspace(-3, 3, 7, dtype=np.float32)
    right, wrong = (
        cross_entropy(margin=margin, target=robust_target(target=label, label_smoothing=0.2)) for label in (1.0, 0.0)
    )
    clean = cross_entropy(margin=margin, target=1.0)
    np.testing.assert_allclose(0.8 * right + 0.2 * wrong, clean, rtol=1e-5, atol=1e-6)


def small_game(seed=0, count=4):
    """A preference with cycles, a policy pi_t and a reference pi_ref, float64."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((count, count)), 1)
    preference = upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(count)
    return preference, *(rng.dirichlet(np.ones(count)) for _ in range(2))


def expected_loss(logits, sampler, loss):
    """E over y, y' ~ sampler of loss(log pi(y), log pi(y'), index of y, index of y')."""
    logprob = jax.nn.log_softmax(logits)
    first, second = (index.ravel() for index in np.indices((len(sampler), len(sampler))))
    weight = jnp.asarray(sampler[first] * sampler[second], jnp.float32)
    return (weight * loss(logprob[first], logprob[second], first, second)).sum()


def minimiser(objective, count):
    """The policy that minimises an objective quadratic in the logits: one Newton step, the constant direction aside."""
    zero = jnp.zeros(count)
    step = np.linalg.pinv(np.asarray(jax.hessian(objective)(zero), np.float64), rcond=1e-5) @ np.asarray(
        jax.grad(objective)(zero), np.float64
    )
    return np.asarray(jax.nn.softmax(jnp.asarray(-step, jnp.float32)))


def drawn_labels(preference, loss):
    """A pair loss in which the winner of (y, y') is drawn from P: the expectation over the label."""

    def both(log_first, log_second, first, second):
        won = jnp.asarray(preference[first, second], jnp.float32)
        return won * loss(log_first, log_second, first, second) + (1 - won) * loss(log_second, log_first, second, first)

    return both


def test_the_minimiser_of_inpo_is_that_of_the_regression_on_win_rates():
    # INPO, Prop. 6: labels are single draws of P, and yet the minimiser is exp(P(y > pi_t)/eta) times the mixture.
    preference, previous, initial = small_game()
    tau, eta = 0.3, 0.7
    win_rate = preference @ previous
    log_previous, log_initial = (jnp.asarray(np.log(policy), jnp.float32) for policy in (previous, initial))

    def inpo(log_chosen, log_rejected, chosen, rejected):
        return inpo_loss(
            chosen_logprob=log_chosen, rejected_logprob=log_rejected,
            previous_chosen_logprob=log_previous[chosen], previous_rejected_logprob=log_previous[rejected],
            initial_chosen_logprob=log_initial[chosen], initial_rejected_logprob=log_initial[rejected],
            target=1.0, tau=tau, eta=eta,
        )  # fmt: skip

    def regression(log_first, log_second, first, second):
        mixture = reference_mixture(log_previous, log_initial, tau=tau, eta=eta)
        return rebel_loss(
            chosen_logprob=log_first, rejected_logprob=log_second, reference_chosen_logprob=mixture[first],
            reference_rejected_logprob=mixture[second], beta=eta,
            reward_difference=jnp.asarray(win_rate[first] - win_rate[second], jnp.float32),
        ) / eta**2  # fmt: skip

    exact = previous ** (1 - tau / eta) * initial ** (tau / eta) * np.exp(win_rate / eta)
    exact /= exact.sum()
    labelled = drawn_labels(preference, inpo)
    assert np.abs(exact - previous).max() > 0.05
    for loss in (labelled, regression):
        found = minimiser(lambda logits, loss=loss: expected_loss(logits, previous, loss), 4)
        np.testing.assert_allclose(found, exact, atol=2e-5)  # a Newton step in float32
    # The two objectives differ by a constant, the variance of the label.
    offsets = [
        expected_loss(logits, previous, labelled) - expected_loss(logits, previous, regression)
        for logits in np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    ]
    np.testing.assert_allclose(offsets, offsets[0], rtol=1e-4)


def test_ipo_has_the_optimum_of_its_paper():
    # Azar et al., Theorem 2: pi ~ pi_ref exp(P(y > mu)/beta), with pairs from any mu of full support.
    preference, sampler, reference = small_game(seed=5)
    beta = 0.4
    log_reference = jnp.asarray(np.log(reference), jnp.float32)

    def ipo(log_chosen, log_rejected, chosen, rejected):
        return ipo_loss(
            chosen_logprob=log_chosen, rejected_logprob=log_rejected, reference_chosen_logprob=log_reference[chosen],
            reference_rejected_logprob=log_reference[rejected], target=1.0, beta=beta,
        )  # fmt: skip

    exact = reference * np.exp(preference @ sampler / beta)
    found = minimiser(lambda logits: expected_loss(logits, sampler, drawn_labels(preference, ipo)), len(sampler))
    np.testing.assert_allclose(found, exact / exact.sum(), atol=2e-5)
    same = dict.fromkeys(FOUR, -3.0)
    assert float(ipo_loss(**same | {"chosen_logprob": -3.0 + 1 / (2 * beta)}, target=1.0, beta=beta)) < 1e-10
    assert float(ipo_loss(**same, target=0.5, beta=beta)) == pytest.approx(1 / (4 * beta**2))


def test_rebel_has_the_form_of_inpo_when_rewards_are_win_rates():
    # (h_t - d/eta)^2 at d = P(y > pi_t) - P(y' > pi_t); at d = 1/2 it is INPO's hard label itself.
    arrays = random_arrays((*FOUR, *INITIAL, "reward_difference"), seed=4)
    tau, eta = 0.2, 0.5
    mixture = {
        f"reference_{side}": reference_mixture(
            jnp.asarray(arrays[f"reference_{side}"]), jnp.asarray(arrays[f"initial_{side}"]), tau=tau, eta=eta
        )
        for side in POLICY
    }

    def rebel(difference):
        return rebel_loss(**pick(arrays, POLICY), **mixture, reward_difference=difference, beta=eta) / eta**2

    mixed = {name: np.asarray(value, np.float64) for name, value in mixture.items()}
    h = gap(arrays | mixed)
    np.testing.assert_allclose(
        rebel(arrays["reward_difference"]), (h - arrays["reward_difference"] / eta) ** 2, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(rebel(0.5), found_inpo(arrays | {"target": 1.0}, tau=tau, eta=eta), rtol=1e-5, atol=1e-5)


def test_sppo_is_zero_at_its_win_rate_and_its_hard_form_takes_zero_and_one():
    loss = sppo_loss(logprob=-10.0, reference_logprob=-12.0, win_rate=0.7, beta=0.1)
    assert float(loss) == pytest.approx(0.0, abs=1e-10)  # 0.2 / 0.1 nats above the reference
    arrays = random_arrays(FOUR)
    hard = sum(
        sppo_loss(logprob=arrays[side], reference_logprob=arrays[f"reference_{side}"], win_rate=won, beta=0.1)
        for side, won in zip(POLICY, (1.0, 0.0), strict=True)
    )
    np.testing.assert_allclose(sppo_hard_loss(**arrays, beta=0.1), hard)


def test_the_reference_mixture_ends_at_its_two_policies():
    previous, initial = (np.asarray(values, np.float32) for values in ([-1.0, -20.5], [-3.0, -11.0]))
    np.testing.assert_array_equal(reference_mixture(previous, initial, tau=0.0, eta=0.3), previous)
    np.testing.assert_array_equal(reference_mixture(previous, initial, tau=0.3, eta=0.3), initial)
    np.testing.assert_allclose(reference_mixture(previous, initial, tau=0.1, eta=0.4), [-1.5, -18.125])
    for tau, eta in ((0.5, 0.4), (-0.1, 0.4), (0.0, 0.0), (-0.2, -0.1), (float("nan"), 0.4)):
        with pytest.raises(ValueError, match="0 <= tau <= eta"):
            reference_mixture(previous, initial, tau=tau, eta=eta)


def test_the_chi_po_link_is_linear_and_logarithmic_and_its_margin_is_clipped():
    np.testing.assert_allclose(
        chi_po_link(logprob=jnp.log(jnp.asarray([1.0, 2.0, 1e-3])), reference_logprob=0.0),
        [1.0, 2.0 + math.log(2.0), 1e-3 + math.log(1e-3)],
        rtol=1e-6,
    )

    def loss(chosen):
        return chi_po_loss(
            chosen_logprob=chosen, rejected_logprob=0.0, reference_chosen_logprob=0.0, reference_rejected_logprob=0.0,
            target=1.0, beta=0.1, max_reward=0.5,
        )  # fmt: skip

    # At the reference z = 1: the slope of the link is 2. At e^5 = 148 the margin, 15, is clipped to 1.
    assert float(jax.grad(loss)(0.0)) == pytest.approx(-0.5 * 0.1 * 2.0)
    assert float(loss(5.0)) == pytest.approx(float(-log_sigmoid(np.float64(1.0))), rel=1e-6)
    assert float(jax.grad(loss)(5.0)) == 0.0


def test_policy_gradients_on_policy_are_the_advantage():
    logprob, initial = jnp.asarray([-5.0, -7.0, -9.0]), jnp.asarray([-6.0, -6.0, -9.0])
    win_rate = jnp.asarray([0.9, 0.2, 0.5])

    def spo(value):
        return spo_loss(logprob=value, previous_logprob=logprob, win_rate=win_rate, clip_range=0.2).sum()

    def nash(value):
        return nash_md_pg_loss(
            logprob=value, previous_logprob=logprob, initial_logprob=initial, win_rate=win_rate, tau=0.1, clip_range=0.2
        ).sum()

    np.testing.assert_allclose(jax.grad(spo)(logprob), -(win_rate - 0.5), atol=1e-7)
    np.testing.assert_allclose(jax.grad(nash)(logprob), -(win_rate - 0.5 - 0.1 * (logprob - initial)), atol=1e-7)
    # A winner that is already 1.22 times as likely, a loser that is 0.74 times: nothing more to gain.
    np.testing.assert_array_equal(jax.grad(spo)(logprob + jnp.asarray([0.2, -0.3, 0.0]))[:2], [0.0, 0.0])


def test_self_play_win_rates_leave_out_the_response_itself_and_average_to_a_half():
    preference, *_ = small_game()
    found = self_play_win_rates(preference=preference + np.diag([np.nan] * 4))
    np.testing.assert_allclose(found, (preference.sum(1) - 0.5) / 3, rtol=1e-6)
    assert float(found.mean()) == pytest.approx(0.5, abs=1e-6)


def test_length_normalised_and_nll_of_an_empty_response_are_zero():
    found = length_normalised(logprob=jnp.asarray([-6.0, 0.0]), num_tokens=jnp.asarray([3, 0]))
    np.testing.assert_array_equal(found, [-2.0, 0.0])


def test_options_out_of_range_are_refused(monkeypatch):
    same = dict.fromkeys(FOUR, -3.0)
    sampled = {"logprob": -3.0, "previous_logprob": -3.0, "win_rate": 0.5}
    for call, message in (
        (lambda: smoothed_target(target=1.0, label_smoothing=0.5), "label_smoothing must be"),
        (lambda: robust_target(target=1.0, label_smoothing=-0.1), "label_smoothing must be"),
        (lambda: chi_po_loss(**same, target=1.0, beta=0.1, max_reward=0.0), "max_reward must be"),
        (lambda: with_nll(1.0, chosen_logprob=-3.0, num_tokens=2.0, weight=-0.1), "weight of the NLL term"),
        (
            lambda: length_penalised_reference(reference_logprob=-3.0, num_tokens=2.0, alpha=-1.0, beta=0.1),
            "length penalty alpha",
        ),
        (lambda: spo_loss(**sampled, clip_range=0.0), "clip_range must be"),
        (lambda: nash_md_pg_loss(**sampled, initial_logprob=-3.0, tau=-1.0, clip_range=0.2), "tau must be"),
        (lambda: self_play_win_rates(preference=np.ones((1, 1))), "preference must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="preference must be"):
        self_play_win_rates(preference=np.ones((2, 3)))
