"""Every named loss against its function in `dno_jax.losses`, and what is wrapped around all of them."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax import losses
from dno_jax.config import LossSection, ReferenceSection
from dno_jax.losses.registry import LOSSES, Loss
from dno_jax.model.decoder import Decoder
from dno_jax.model.places import Places
from dno_jax.training.batches import PairBatch, TrainingRow, make_batch
from dno_jax.training.objectives import preference_loss
from dno_jax.training.step import batch_logprobs
from tests.training.test_step import LENGTH, OPTIMIZER, assert_same, take_steps

NAMES = tuple(LOSSES)
ROWS = 6
BETA, TAU = 0.3, 0.12
REFERENCES = {
    "previous": ReferenceSection(),
    "initial": ReferenceSection(kind="initial"),
    "mixture": ReferenceSection(kind="mixture", tau=TAU),
}
IN_PAIRS = ("dno", "spin", "chi_po", "ipo", "rebel", "sppo_hard")  # by log-ratios of both sides to the reference
IN_TARGET = ("dno", "chi_po", "ipo", "inpo")


def pair_batch(**changed):
    """A batch of which a loss reads the columns of numbers only."""
    rng = np.random.default_rng(7)
    columns = {
        "previous_logprob": rng.uniform(-9, -1, (ROWS, 2)),
        "initial_logprob": rng.uniform(-9, -1, (ROWS, 2)),
        "reward": rng.uniform(0, 1, (ROWS, 2)),
        "target": rng.uniform(0, 1, ROWS),
        "weight": np.ones(ROWS),
    } | changed
    none = jnp.zeros((2 * ROWS, 4), jnp.int32)
    floats = {name: jnp.asarray(value, jnp.float32) for name, value in columns.items()}
    return PairBatch(
        token=none, places=Places(none), source=none, response_token=none, text=none - 1,
        num_tokens=jnp.zeros((ROWS, 2), jnp.int32), **floats,
    )  # fmt: skip


@pytest.fixture
def batch():
    return pair_batch()


@pytest.fixture
def logprob():
    """Near the references, as in training, so that no ratio is clipped everywhere."""
    return jnp.asarray(np.random.default_rng(8).uniform(-9, -1, (ROWS, 2)), jnp.float32)


@pytest.fixture
def num_tokens():
    return jnp.asarray(np.random.default_rng(9).integers(1, 20, (ROWS, 2)), jnp.float32)


def value_of(section, reference, logprob, num_tokens, batch):
    value, _ = preference_loss(section, reference)(logprob, num_tokens, batch)
    return np.asarray(value)


def reference_of(kind, batch, *, beta=BETA, tau=TAU):
    """[P, 2] log-probabilities that log-ratios are taken against, float64."""
    previous, initial = (np.asarray(x, np.float64) for x in (batch.previous_logprob, batch.initial_logprob))
    mixture = (1 - tau / beta) * previous + tau / beta * initial
    return {"previous": previous, "initial": initial, "mixture": mixture}[kind]


def sides(column, prefix=""):
    return {f"{prefix}chosen_logprob": column[:, 0], f"{prefix}rejected_logprob": column[:, 1]}


def direct(name, logprob, num_tokens, batch, against, *, beta=BETA, tau=TAU, target=None):
    """The same loss by its own function, written out once more."""
    pair = sides(logprob) | sides(np.asarray(against, np.float32), "reference_")
    soft = pair | {"target": batch.target if target is None else target, "beta": beta}
    previous, initial, reward = batch.previous_logprob, batch.initial_logprob, batch.reward
    three = sides(logprob) | sides(previous, "previous_") | sides(initial, "initial_")
    gradient = {"logprob": logprob, "previous_logprob": previous, "win_rate": reward, "clip_range": 0.2}
    calls = {
        "dno": lambda: losses.dno_loss(**soft),
        "spin": lambda: losses.spin_loss(**pair, beta=beta),
        "chi_po": lambda: losses.chi_po_loss(**soft, max_reward=10.0),
        "ipo": lambda: losses.ipo_loss(**soft),
        "inpo": lambda: losses.inpo_loss(**three, target=soft["target"], tau=tau, eta=beta),
        "rebel": lambda: losses.rebel_loss(**pair, reward_difference=reward[:, 0] - reward[:, 1], beta=beta),
        "sppo_hard": lambda: losses.sppo_hard_loss(**pair, beta=beta),
        "sppo": lambda: losses.sppo_loss(
            logprob=logprob, reference_logprob=np.asarray(against, np.float32), win_rate=reward, beta=beta
        ).mean(axis=1),
        "spo": lambda: losses.spo_loss(**gradient).mean(axis=1),
        "nash_md_pg": lambda: losses.nash_md_pg_loss(**gradient, initial_logprob=initial, tau=tau).mean(axis=1),
        "sft": lambda: losses.nll_loss(logprob=logprob[:, 0], num_tokens=num_tokens[:, 0]),
    }
    return np.asarray(calls[name]())


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(ValueError, match=r"unknown loss 'ppo'; there are dno, spin, .*, sft"):
        LossSection(name="ppo")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_loss_declares_is_what_its_function_takes(name):
    loss, takes = LOSSES[name], inspect.signature(LOSSES[name].load()).parameters
    assert loss.soft_target == ("target" in takes)
    assert loss.own_win_rates == ("win_rate" in takes)
    assert loss.regularised == ("tau" in takes)
    assert loss.on_policy == ("clip_range" in takes)
    assert set(loss.reads) == takes.keys() & {"clip_range", "max_reward"}


def hinge_loss(*, chosen_logprob, rejected_logprob, previous_chosen_logprob, rejected_num_tokens, beta):
    """A loss of nobody's: what it takes is found by name."""
    gap = chosen_logprob - previous_chosen_logprob - rejected_logprob / jnp.maximum(rejected_num_tokens, 1)
    return jnp.maximum(0.0, 9.0 - beta * gap)


def test_a_new_loss_is_one_function_and_one_entry(monkeypatch, config, params, rows):
    monkeypatch.setitem(LOSSES, "hinge", Loss(f"{__name__}:hinge_loss"))
    with pytest.raises(ValueError, match="name=hinge takes no target; target=soft is for dno, chi_po, ipo, inpo "):
        LossSection(name="hinge", target="soft")
    row_loss = preference_loss(LossSection(name="hinge", beta=1.0))
    batch = make_batch(rows[:8], batch_size=8, max_length=LENGTH)
    _, (first, second) = take_steps(config, params, [batch, batch], row_loss=row_loss)
    assert second["loss"] < first["loss"]
    assert second["chosen_logprob"] > first["chosen_logprob"]


def test_a_loss_that_asks_for_what_no_row_has_is_refused(monkeypatch, batch, logprob, num_tokens):
    monkeypatch.setitem(LOSSES, "spo", Loss("dno_jax.losses:spo_loss"))
    with pytest.raises(TypeError, match="spo_loss takes logprob, previous_logprob, win_rate; a loss per pair"):
        value_of(LossSection(name="spo"), REFERENCES["previous"], logprob, num_tokens, batch)


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("name", NAMES)
def test_a_named_loss_is_its_function(name, kind, batch, logprob, num_tokens):
    found = value_of(LossSection(name=name, beta=BETA), REFERENCES[kind], logprob, num_tokens, batch)
    against, tau = reference_of(kind, batch), REFERENCES[kind].tau
    expected = direct(name, logprob, num_tokens, batch, against, tau=tau)
    assert found.shape == (ROWS,)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("name", [*IN_PAIRS, "sppo"])
def test_only_the_column_of_the_reference_is_read(name, batch, logprob, num_tokens):
    section = LossSection(name=name, beta=BETA)
    shift = np.float32([[1.0, -0.5]])
    moved = {
        "previous": batch.replace(previous_logprob=batch.previous_logprob + shift),
        "initial": batch.replace(initial_logprob=batch.initial_logprob + shift),
    }
    for kind, reads in {"previous": ["previous"], "initial": ["initial"], "mixture": ["previous", "initial"]}.items():
        before = value_of(section, REFERENCES[kind], logprob, num_tokens, batch)
        for column, other in moved.items():
            after = value_of(section, REFERENCES[kind], logprob, num_tokens, other)
            assert np.array_equal(before, after) == (column not in reads), (kind, column)


@pytest.mark.parametrize("name", [*IN_PAIRS, "sppo", "inpo"])
def test_the_mixture_goes_from_previous_to_initial(name, batch, logprob, num_tokens):
    section = LossSection(name=name, beta=BETA)

    def mixed(tau):
        return value_of(section, ReferenceSection(kind="mixture", tau=tau), logprob, num_tokens, batch)

    of = {"previous": batch.previous_logprob, "initial": batch.initial_logprob}
    same = "ipo" if name == "inpo" else name  # INPO is IPO against the mixture
    ends = {kind: direct(same, logprob, num_tokens, batch, against) for kind, against in of.items()}
    np.testing.assert_allclose(mixed(BETA), ends["initial"], rtol=2e-5)
    np.testing.assert_allclose(mixed(1e-9), ends["previous"], rtol=2e-5)
    assert not np.allclose(ends["initial"], ends["previous"], rtol=1e-2)


@pytest.mark.parametrize("name", ["dno", "ipo", "inpo", "chi_po"])
@pytest.mark.parametrize("smoothing", ["conservative", "robust"])
def test_label_smoothing_moves_the_target(name, smoothing, batch, logprob, num_tokens):
    flip = 0.2
    z = np.asarray(batch.target, np.float64)
    target = {"conservative": (1 - flip) * z + flip * (1 - z), "robust": (z - flip) / (1 - 2 * flip)}[smoothing]
    section = LossSection(name=name, beta=BETA, label_smoothing=flip, smoothing=smoothing)
    found = value_of(section, REFERENCES["mixture"], logprob, num_tokens, batch)
    against = reference_of("mixture", batch)
    expected = direct(name, logprob, num_tokens, batch, against, target=np.float32(target))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_robust_smoothing_undoes_flipped_labels(batch, logprob, num_tokens):
    """The mean over labels flipped with that probability is the loss of the true label."""
    section = LossSection(beta=BETA, label_smoothing=0.2, smoothing="robust")
    true, flipped = (batch.replace(target=jnp.full(ROWS, z)) for z in (1.0, 0.0))
    robust = [value_of(section, REFERENCES["previous"], logprob, num_tokens, b) for b in (true, flipped)]
    plain = value_of(LossSection(beta=BETA), REFERENCES["previous"], logprob, num_tokens, true)
    np.testing.assert_allclose(0.8 * robust[0] + 0.2 * robust[1], plain, rtol=1e-4)


@pytest.mark.parametrize("name", ["dno", "nash_md_pg", "sppo"])
def test_the_likelihood_term_is_a_mean_over_the_chosen_tokens(name, batch, logprob, num_tokens):
    section = LossSection(name=name, beta=BETA, nll_weight=0.5)
    found = value_of(section, REFERENCES["mixture"], logprob, num_tokens, batch)
    plain = direct(name, logprob, num_tokens, batch, reference_of("mixture", batch))
    np.testing.assert_allclose(found, plain - 0.5 * logprob[:, 0] / num_tokens[:, 0], rtol=2e-5)


def dno64(logprob, against, target):
    """Eq. 8 in float64."""
    gap = BETA * (np.asarray(logprob, np.float64) - against)
    delta, z = gap[:, 0] - gap[:, 1], np.asarray(target, np.float64)
    return z * np.logaddexp(0, -delta) + (1 - z) * np.logaddexp(0, delta)


@pytest.mark.parametrize("kind", REFERENCES)
def test_length_normalised_takes_log_probabilities_a_token(kind, batch, logprob, num_tokens):
    section = LossSection(beta=BETA, length_normalised=True, nll_weight=0.5)
    found = value_of(section, REFERENCES[kind], logprob, num_tokens, batch)
    expected = dno64(logprob / num_tokens, reference_of(kind, batch) / num_tokens, batch.target)
    # The likelihood term is a mean over tokens already: it is not divided twice.
    np.testing.assert_allclose(found, expected - 0.5 * logprob[:, 0] / num_tokens[:, 0], rtol=2e-5)


@pytest.mark.parametrize("kind", REFERENCES)
def test_length_penalty_takes_its_price_off_every_token(kind, batch, logprob, num_tokens):
    alpha = 0.05
    found = value_of(LossSection(beta=BETA, length_penalty=alpha), REFERENCES[kind], logprob, num_tokens, batch)
    gap = BETA * (np.asarray(logprob, np.float64) - reference_of(kind, batch)) + alpha * num_tokens
    delta, z = gap[:, 0] - gap[:, 1], np.asarray(batch.target, np.float64)
    np.testing.assert_allclose(found, z * np.logaddexp(0, -delta) + (1 - z) * np.logaddexp(0, delta), rtol=2e-5)


def test_both_length_options_together_and_inpo_has_them_too(batch, logprob, num_tokens):
    options = {"beta": BETA, "length_normalised": True, "length_penalty": 0.05}
    against = reference_of("mixture", batch) / num_tokens - 0.05 / BETA * num_tokens
    found = value_of(LossSection(**options), REFERENCES["mixture"], logprob, num_tokens, batch)
    np.testing.assert_allclose(found, dno64(logprob / num_tokens, against, batch.target), rtol=2e-5)
    found = value_of(LossSection(name="inpo", **options), REFERENCES["mixture"], logprob, num_tokens, batch)
    expected = direct("ipo", logprob / num_tokens, num_tokens, batch, against)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_metrics_are_of_the_loss_that_is_trained(batch, logprob, num_tokens):
    section = LossSection(name="ipo", beta=BETA)
    _, metrics = preference_loss(section, REFERENCES["initial"])(logprob, num_tokens, batch)
    reward = BETA * (np.asarray(logprob, np.float64) - batch.initial_logprob)
    np.testing.assert_allclose(metrics["chosen_reward"], reward[:, 0], rtol=1e-4)
    np.testing.assert_allclose(metrics["rejected_reward"], reward[:, 1], rtol=1e-4)
    np.testing.assert_allclose(metrics["margin"], reward[:, 0] - reward[:, 1], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(metrics["accuracy"], reward[:, 0] > reward[:, 1])
    np.testing.assert_array_equal(metrics["chosen_logprob"], logprob[:, 0])
    np.testing.assert_array_equal(metrics["rejected_logprob"], logprob[:, 1])


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_ratios_give_finite_losses_and_gradients(name, kind, num_tokens):
    far = jnp.asarray([[0, -1e4], [-1e4, 0], [0, 0], [-1e4, -1e4], [-1e4, -1], [-1, -1e4]], jnp.float32)
    batch = pair_batch(previous_logprob=far[::-1], initial_logprob=jnp.roll(far, 1, axis=0))
    loss = preference_loss(LossSection(name=name, beta=BETA, nll_weight=0.1), REFERENCES[kind])

    def total(logprob):
        return loss(logprob, num_tokens, batch)[0].sum()

    value, slope = jax.value_and_grad(total)(far)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_losses_equal_eager_ones(name, batch, logprob, num_tokens):
    loss = preference_loss(LossSection(name=name, beta=BETA), REFERENCES["mixture"])
    assert loss is preference_loss(LossSection(name=name, beta=BETA), REFERENCES["mixture"])  # compiled once
    eager, compiled = (function(logprob, num_tokens, batch)[0] for function in (loss, jax.jit(loss)))
    np.testing.assert_allclose(compiled, eager, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sppo", pytest.param("nash_md_pg", marks=pytest.mark.soak)])
def test_micro_batches_and_meshes_take_the_whole_batchs_step(name, config, params, rows):
    """With an initial policy that is another one, and rewards: columns that DNO does not read."""
    rng = np.random.default_rng(1)
    made = [
        TrainingRow(
            row.prompt_ids,
            row.response_ids,
            previous_logprob=row.previous_logprob,
            initial_logprob=tuple(value + rng.normal() for value in row.previous_logprob),
            reward=tuple(rng.uniform(0, 1, 2).tolist()),
            target=float(rng.uniform()),
            weight=float(rng.integers(1, 5)),
        )
        for row in rows[:5]
    ]
    batch = make_batch(made, batch_size=8, max_length=LENGTH)  # three of eight rows are filler
    row_loss = preference_loss(LossSection(name=name, beta=1.0), ReferenceSection(kind="mixture", tau=0.3))
    # With its usual eps Adam turns the rounding of a gradient that is nearly 0 into a step of some size.
    section = OPTIMIZER.model_copy(update={"eps": 1e-6})
    step = partial(take_steps, config, params, [batch], row_loss=row_loss, section=section)
    whole = step()
    parted = make_batch(made, batch_size=8, max_length=LENGTH, parts=4)
    assert_same(take_steps(config, params, [parted], row_loss=row_loss, section=section), whole)
    # A margin is a difference of sums of some 100 nats, which float32 rounds by 4e-6 each.
    assert_same(step(axes=(2, 2, 2)), whole, atol=1e-5)
    # The loss is the mean by weight, here by brute force from the policy's own log-probabilities.
    part = jax.tree.map(jnp.asarray, batch.part(0))
    value, _ = row_loss(batch_logprobs(Decoder(config), params, part, chunk=64), part.num_tokens, part)
    weight = np.asarray(part.weight, np.float64)
    assert whole[1][0]["loss"] == pytest.approx(float((weight * np.asarray(value)).sum() / weight.sum()), rel=1e-5)
