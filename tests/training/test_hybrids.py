"""Training of models whose layers do not all attend: packed rows, meshes, remat, and torch step by step."""

from __future__ import annotations

import dataclasses
import math
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.model import hf
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.hf import peft as peft_files
from dno_jax.model.params import init_adapters
from dno_jax.parallel.mesh import make_mesh
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.packing import Packing
from dno_jax.training.state import TrainState
from dno_jax.training.step import StepConfig, batch_logprobs, score_step, train_step
from tests.model.families import CASES
from tests.model.hybrids import HYBRIDS, hybrid_params
from tests.model.test_families import stir
from tests.training import test_adapters, test_torch_parity
from tests.training.test_packing import assert_equal, logprobs_and_gradients
from tests.training.trained import take_steps

LENGTH = 48
PACKED = Packing(packed=True, skips=True)
MORE_MESHES = (("qwen3_5", (1, 4, 2)), ("lfm2", (2, 2, 2)), ("lfm2", (1, 4, 2)))
each = pytest.mark.parametrize("name", HYBRIDS)


@pytest.fixture(scope="module")
def plain(rows):
    """Log-probabilities and gradients of unpacked rows on one device, by the model's name."""
    batch = make_batch(rows[:8], batch_size=8, max_length=LENGTH)
    return {name: logprobs_and_gradients(config, hybrid_params(name), batch) for name, config in HYBRIDS.items()}


@each
def test_packed_rows_give_the_same_logprobs_and_gradients(rows, plain, name):
    batch = make_batch(rows[:8], batch_size=8, max_length=LENGTH, packing=PACKED)
    assert batch.token.shape[1] == 1  # sixteen texts in one row
    assert_equal(logprobs_and_gradients(HYBRIDS[name], hybrid_params(name), batch), plain[name])


@each
def test_texts_see_nothing_of_each_other(rows, name):
    """Other tokens in one text leave the log-probabilities of all others as they are, bit for bit."""
    others = list(rows[:8])
    changed = tuple((token + 1) % 95 + 1 for token in rows[3].response_ids[0])
    others[3] = dataclasses.replace(rows[3], response_ids=(changed, rows[3].response_ids[1]))
    score = jax.jit(partial(batch_logprobs, Decoder(HYBRIDS[name]), chunk=64))
    pack = partial(make_batch, batch_size=8, max_length=LENGTH, packing=PACKED)
    before, after = (np.array(score(hybrid_params(name), pack(own).part(0))) for own in (rows[:8], others))
    assert before[3, 0] != after[3, 0]
    before[3, 0] = after[3, 0] = 0.0
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("name", "axes"),
    [("qwen3_5", (2, 2, 2)), *[pytest.param(*one, marks=pytest.mark.soak) for one in MORE_MESHES]],
    ids=str,
)
def test_eight_devices_are_one(rows, plain, name, axes):
    """Rows over data, all weights over fsdp, heads and channels over tensor."""
    data, fsdp, tensor = axes
    mesh = make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: math.prod(axes)])
    batch = make_batch(
        rows[:8], batch_size=8, max_length=LENGTH, packing=dataclasses.replace(PACKED, row_shards=data * fsdp)
    )
    assert_equal(logprobs_and_gradients(HYBRIDS[name], hybrid_params(name), batch, mesh=mesh), plain[name])


@pytest.mark.soak
@pytest.mark.parametrize("remat", ["full", "dots"])
@each
def test_what_is_recomputed_changes_nothing(rows, plain, name, remat):
    config, params = HYBRIDS[name], hybrid_params(name)
    part = make_batch(rows[:8], batch_size=8, max_length=LENGTH).part(0)
    weight = np.random.default_rng(3).normal(size=part.num_tokens.shape).astype(np.float32)

    def total(p):
        logprob = batch_logprobs(Decoder(config, remat=remat), p, part, chunk=64)
        return jnp.sum(logprob * weight), logprob

    (_, logprob), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert_equal((np.asarray(logprob), jax.tree.map(np.asarray, gradient)), plain[name])


@pytest.mark.soak
@pytest.mark.parametrize("section", [{"name": "adafactor"}, {"name": "muon"}, {"moment_dtype": "bfloat16"}], ids=str)
@each
def test_every_optimiser_takes_their_leaves_on_a_mesh(rows, name, section):
    batches = [make_batch(rows[:8], batch_size=8, max_length=LENGTH)] * 3
    config, params = HYBRIDS[name], hybrid_params(name)
    found, expected = (
        take_steps(config, params, OptimizerSection(**section), batches, axes=axes)[1]
        for axes in ((2, 2, 2), (1, 1, 1))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[-1] < found[0]


@pytest.mark.parametrize("names", [("layers", "heads", "head_dim", "taps"), ("layers", "channels", "taps")], ids=str)
def test_kernels_of_convolutions_are_no_matrices_to_muon(names):
    """Each is of one channel: they move by AdamW."""
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4, 3)[: len(names)]), jnp.float32)
    updates = []
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(OptimizerSection(name=name), {"kernel": names})
        params = {"kernel": leaf}
        updates.append(optimizer.update(params, optimizer.init(params), params)[0]["kernel"])
    np.testing.assert_allclose(*updates, rtol=1e-6)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What transformers writes of the two families' cases."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for name in ("qwen3_5", "lfm2"):
        torch.manual_seed(0)
        tree = CASES[name].config_json
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree), attn_implementation="eager")
        stir(model, 0)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


def test_gradients_are_torchs(checkpoints):
    """Of every parameter of both families, through the whole model."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    token = np.random.default_rng(0).integers(1, 97, size=(1, 40))  # 0 is padding, which torch gives no gradient
    position = jnp.arange(40, dtype=jnp.int32)[None]
    for path in checkpoints.values():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        scores = torch.log_softmax(model(torch.tensor(token)).logits[0, :-1], dim=-1)
        (-scores.gather(1, torch.tensor(token)[0, 1:, None]).mean()).backward()
        theirs = {name: np.ascontiguousarray(weight.grad.numpy()) for name, weight in model.named_parameters()}
        config, params = hf.load(path)
        # Their gradients, laid out as our parameters: an export and import of the same tensors.
        folder = path / "gradients"
        folder.mkdir()
        save_file(
            {name: np.ascontiguousarray(gradient) for name, gradient in theirs.items()}, folder / "model.safetensors"
        )
        shutil.copy(path / "config.json", folder)
        expected = hf.load(folder)[1]

        def loss(params, config=config):
            hidden, _ = Decoder(config).apply({"params": params}, jnp.asarray(token, jnp.int32), position)
            scores = jax.nn.log_softmax(logits(config, params, hidden)[0, :-1])
            return -jnp.mean(jnp.take_along_axis(scores, jnp.asarray(token)[0, 1:, None], axis=1))

        found = jax.jit(jax.grad(loss))(params)
        for (name, ours), (_, meant) in zip(
            jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(expected), strict=True
        ):
            scale = float(np.abs(meant).max())
            np.testing.assert_allclose(ours, meant, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(name))


def pairs_of(rows):
    within = [[tuple(i % 90 + 3 for i in ids) for ids in (row.prompt_ids[0], *row.response_ids)] for row in rows[:4]]
    return [tuple(map(list, pair)) for pair in within]


@pytest.mark.soak
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_ten_dense_steps_match_torch_step_by_step(checkpoints, rows, name):
    pairs = pairs_of(rows)
    reference, expected = test_torch_parity.torch_history(checkpoints[name], pairs)
    config, params = hf.load(checkpoints[name])
    batch = make_batch(
        [TrainingRow((tuple(p), tuple(p)), (tuple(c), tuple(r))) for p, c, r in pairs], batch_size=4, max_length=LENGTH
    )
    model = Decoder(config, remat="full")
    own = np.asarray(score_step(params, batch, model=model, chunk=64))
    np.testing.assert_allclose(own, reference, atol=1e-3)
    optimizer = make_optimizer(OptimizerSection(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0))
    step = StepConfig(model, optimizer, preference_loss(LossSection(beta=test_torch_parity.BETA)), chunk=64)
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    assert_history(state, batch.replace(previous_logprob=own[None]), step, expected, rate=test_torch_parity.RATE)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.soak
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_ten_steps_of_adapters_match_torch_and_peft(checkpoints, rows, tmp_path, name):
    """On all projections, those that the files hold in one too."""
    pytest.importorskip("peft")
    config, params = hf.load(checkpoints[name])
    adapter = AdapterConfig.of(config, rank=4, alpha=8.0)
    adapters = init_adapters(config, adapter, jax.random.key(0))
    place = str(checkpoints[name])
    peft_files.save(tmp_path / "adapter", config, adapter, adapters, source=place, base=(place, None))
    made = [TrainingRow((tuple(p), tuple(p)), (tuple(c), tuple(r))) for p, c, r in pairs_of(rows)]
    batch = make_batch(made, batch_size=4, max_length=LENGTH)
    expected = test_adapters.torch_history(place, tmp_path / "adapter", batch, beta=0.1, rate=1e-2, steps=10)
    model = Decoder(config, remat="full", adapter=adapter)
    reference = np.asarray(score_step(adapters, batch, model=model, chunk=64, frozen=params))
    optimizer = make_optimizer(OptimizerSection(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01, max_grad_norm=1.0))
    state = TrainState(step=jnp.int32(0), params=adapters, opt_state=optimizer.init(adapters))
    step = StepConfig(model, optimizer, test_adapters.LOSS, chunk=64)
    batch = batch.replace(previous_logprob=reference[None])
    assert_history(state, batch, step, expected, rate=1e-2, frozen=params)


def assert_history(state, batch, step, expected, *, rate, **more):
    history = []
    for _ in range(10):
        state, metrics = train_step(state, batch, jnp.float32(rate), config=step, **more)
        history.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert history[-1][0] < 0.9 * history[0][0]
    for number, (found, wanted) in enumerate(zip(history, expected, strict=True)):
        assert found[0] == pytest.approx(wanted[0], abs=2e-4), f"loss at step {number}"
        assert found[1] == pytest.approx(wanted[1], rel=5e-3), f"gradient norm at step {number}"
