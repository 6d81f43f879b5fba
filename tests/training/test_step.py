import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.model.decoder import Decoder, logits
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN, Constrain
from dno_jax.training.batches import TrainingRow, make_batch, text_lengths
from dno_jax.training.objectives import preference_loss, supervised_loss
from dno_jax.training.optimizers import learning_rate_schedule, make_optimizer
from dno_jax.training.packing import Packing, plan_batches
from dno_jax.training.state import init_state, param_shardings, state_shardings
from dno_jax.training.step import (
    StepConfig,
    batch_logprobs,
    response_logprobs,
    score_step,
    train_step,
)

OPTIMIZER = OptimizerSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)
LOSS = preference_loss(LossSection(beta=0.1))
LENGTH = 48


def take_steps(
    config,
    params,
    batches,
    *,
    axes=(1, 1, 1),
    remat="none",
    row_loss=LOSS,
    chunk=64,
    section=OPTIMIZER,
):
    devices = jax.devices()[: math.prod(axes)]
    data, fsdp, tensor = axes
    mesh = make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor), devices)
    model = Decoder(config, remat=remat, constrain=Constrain(mesh, TRAIN))
    optimizer = make_optimizer(section)
    places = param_shardings(config, mesh, TRAIN)
    placed = jax.device_put(params, places)
    state = init_state(placed, optimizer, state_shardings(optimizer, places, placed))
    history = []
    for batch in batches:
        step = StepConfig(model, optimizer, row_loss, chunk=chunk)
        state, metrics = train_step(state, batch.place(mesh), jnp.float32(1e-3), config=step)
        history.append(jax.tree.map(float, metrics))
    return jax.tree.map(np.asarray, state), history


@pytest.fixture(scope="module")
def batches(rows):
    order = [np.arange(8), np.arange(8, 16)]
    plan = plan_batches(text_lengths(rows), order, Packing(granule=48), batch_size=8, max_length=LENGTH)
    assert len(plan.shapes) == 1
    return [make_batch(part, batch_size=8, max_length=LENGTH, plan=plan) for part in (rows[:8], rows[8:])]


@pytest.fixture(scope="module")
def plain(config, params, batches):
    return take_steps(config, params, batches)


def assert_same(found, expected, *, rtol=2e-5, atol=3e-6):
    """Equal up to float32 rounding of sums in another order.

    Adam's first steps magnify it by at most 1 / eps^(1/2).
    """
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(found[0].params), jax.tree.leaves_with_path(expected[0].params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    for a, b in zip(found[1], expected[1], strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_meshes_agree_with_one_device(config, params, batches, plain, axes):
    assert_same(take_steps(config, params, batches, axes=axes), plain)


def test_gradients_on_a_mesh_equal_one_devices(config, params, batches):
    """Loss and gradients themselves, without Adam between them and the comparison."""

    def gradients(axes):
        data, fsdp, tensor = axes
        mesh = make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: math.prod(axes)])
        model = Decoder(config, constrain=Constrain(mesh, TRAIN))
        part = batches[0].place(mesh).part(0)

        def loss(p):
            value, _ = LOSS(batch_logprobs(model, p, part, chunk=64), jnp.zeros((8, 2)), part)
            return value.mean()

        return jax.jit(jax.value_and_grad(loss))(jax.device_put(params, param_shardings(config, mesh, TRAIN)))

    loss, expected = gradients((1, 1, 1))
    for axes in [(2, 2, 2), (2, 4, 1)]:
        value, found = gradients(axes)
        assert float(value) == pytest.approx(float(loss), rel=1e-6)
        for (path, a), (_, b) in zip(
            jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(expected), strict=True
        ):
            scale = float(jnp.max(jnp.abs(b)))
            np.testing.assert_allclose(a, b, atol=3e-6 * scale, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def whole(config, params, rows):
    """Three rows of eight are filler: a mean by micro-batch would weigh the others differently."""
    return take_steps(config, params, [make_batch(rows[:5], batch_size=8, max_length=LENGTH)])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_normalises_by_the_whole_batch(config, params, rows, whole, parts):
    batch = make_batch(rows[:5], batch_size=8, max_length=LENGTH, parts=parts)
    assert batch.token.shape[0] == parts
    found = take_steps(config, params, [batch])
    assert_same(found, whole)
    assert found[1][0]["max_abs_log_ratio"] == pytest.approx(whole[1][0]["max_abs_log_ratio"], rel=1e-5)


def test_accumulation_of_supervised_rows_is_a_mean_over_tokens(config, params, rows):
    examples = [
        TrainingRow(row.prompt_ids[:1], row.response_ids[:1], (0.0,), weight=float(len(row.response_ids[0])))
        for row in rows[:8]
    ]
    batch = make_batch(examples, batch_size=8, max_length=LENGTH)
    whole = take_steps(config, params, [batch], row_loss=supervised_loss)
    parted = make_batch(examples, batch_size=8, max_length=LENGTH, parts=4)
    assert_same(take_steps(config, params, [parted], row_loss=supervised_loss), whole)
    logprob = np.asarray(batch_logprobs(Decoder(config), params, batch.part(0), chunk=64))
    tokens = sum(len(example.response_ids[0]) for example in examples)
    assert whole[1][0]["loss"] == pytest.approx(-float(logprob.sum()) / tokens, rel=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_memory_only(config, params, batches, plain, remat):
    assert_same(take_steps(config, params, batches, remat=remat), plain)


def test_fillers_and_padding_change_nothing(config, params, rows, plain):
    wide = [make_batch(part, batch_size=16, max_length=96) for part in (rows[:8], rows[8:])]
    assert_same(take_steps(config, params, wide), plain)


def test_logprobs_equal_one_forward_pass_a_token(config, params, rows):
    """Brute force: log p(y_t | prefix) by a separate pass for every prefix. An off-by-one fails here."""
    row = rows[0]
    ids = list(row.prompt_ids[0] + row.response_ids[0])
    start = len(row.prompt_ids[0])

    @jax.jit
    def next_token(token, position):
        hidden, _ = Decoder(config).apply({"params": params}, token, position)
        return jax.nn.log_softmax(logits(config, params, hidden), axis=-1)

    brute = 0.0
    for place in range(start, len(ids)):
        token, position = np.zeros((1, LENGTH), np.int32), np.full((1, LENGTH), -1, np.int32)
        token[0, :place], position[0, :place] = ids[:place], np.arange(place)
        brute += float(next_token(token, position)[0, place - 1, ids[place]])
    batch = make_batch([row], batch_size=1, max_length=LENGTH)
    found = score_step(params, batch, model=Decoder(config), chunk=7)
    assert float(found[0, 0]) == pytest.approx(brute, abs=1e-4)
    shifted = TrainingRow(row.prompt_ids, ((*row.response_ids[0][1:], 1), row.response_ids[1]))
    wrong = score_step(params, make_batch([shifted], batch_size=1, max_length=LENGTH), model=Decoder(config), chunk=7)
    assert abs(float(wrong[0, 0]) - brute) > 1e-2


def test_prompt_and_padding_positions_get_no_gradient_from_the_head(config, params, rows):
    """d log-prob / d hidden is zero wherever the hidden state predicts no response token."""
    batch = make_batch(rows[:4], batch_size=4, max_length=LENGTH)
    part = batch.part(0)
    hidden = np.random.default_rng(0).normal(size=(*part.token.shape, config.hidden_size)).astype(np.float32)
    predicts = np.zeros(part.token.shape, bool)
    texts = [text for one in rows[:4] for text in zip(one.prompt_ids, one.response_ids, strict=True)]
    for row, (prompt, response) in enumerate(texts):
        predicts[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True

    def total(h):
        return response_logprobs(h, params, part, config=config, chunk=64).sum()

    slope = np.asarray(jax.grad(total)(jnp.asarray(hidden)))
    np.testing.assert_array_equal(np.any(slope != 0.0, axis=-1), predicts)


def test_an_empty_response_gives_zero_and_a_finite_loss(config, params, rows):
    empty = TrainingRow(rows[0].prompt_ids, (rows[0].response_ids[0], ()), previous_logprob=(-4.0, 0.0))
    batch = make_batch([empty, *rows[1:4]], batch_size=4, max_length=LENGTH)
    assert float(score_step(params, batch, model=Decoder(config), chunk=64)[0, 1]) == 0.0
    _, history = take_steps(config, params, [batch])
    assert all(np.isfinite(value) for value in history[0].values())


def test_overfitting_makes_the_chosen_response_the_likelier_one(config, params, rows):
    model = Decoder(config)
    batch = make_batch(rows[:4], batch_size=4, max_length=LENGTH)
    reference = np.asarray(score_step(params, batch, model=model, chunk=64))
    batch = batch.replace(previous_logprob=reference[None])
    state, history = take_steps(config, params, [batch] * 50)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[0]["max_abs_log_ratio"] < 1e-4
    after = np.asarray(score_step(state.params, batch, model=model, chunk=64)) - reference
    assert np.all(after[:, 0] > after[:, 1])
    assert history[-1]["accuracy"] == 1.0


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_one_program_for_every_step(config, params, batches, axes):
    train_step.clear_cache()
    take_steps(config, params, batches * 2, axes=axes)
    assert train_step._cache_size() == 1


def test_bfloat16_compute_stays_near_float32(config, params, batches):
    exact = np.asarray(score_step(params, batches[0], model=Decoder(config), chunk=64))
    low = np.asarray(score_step(params, batches[0], model=Decoder(config, dtype=jnp.bfloat16), chunk=64))
    tokens = batches[0].num_tokens[0]
    # 8 bits of mantissa in every activation: about 0.01 nats a token, and no drift with length.
    assert np.all(np.abs(low - exact) / tokens < 0.02)


def test_schedules_warm_up_and_decay():
    section = OptimizerSection(learning_rate=1.0, schedule="linear", warmup_ratio=0.2)
    rates = [float(learning_rate_schedule(section, num_steps=10)(step)) for step in range(10)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125], atol=1e-6)
    cosine = section.model_copy(update={"schedule": "cosine", "warmup_ratio": 0.0, "learning_rate_decay": 0.5})
    assert float(learning_rate_schedule(cosine, num_steps=10, iteration=2)(0)) == pytest.approx(0.25)
