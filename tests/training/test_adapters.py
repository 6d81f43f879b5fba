"""Adapters beside weights that stand, against dense training, merged weights, every mesh, and torch with PEFT."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.adapters import AdapterConfig, merging
from dno_jax.model.cache import init_cache
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.hf import peft as peft_files
from dno_jax.model.params import (
    abstract_adapters,
    abstract_params,
    adapter_axes,
    init_adapters,
    init_params,
    unstack_layers,
)
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN, Constrain
from dno_jax.training.adapted import Destination, base_of, load_apart, save_adapter
from dno_jax.training.batches import make_batch
from dno_jax.training.checkpoint import save_policy
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import TrainState, adapter_shardings, init_state, param_shardings, state_shardings
from dno_jax.training.step import StepConfig, batch_logprobs, score_step, train_step

LOSS = preference_loss(LossSection(beta=0.1))
TOKEN = np.arange(1, 41, dtype=np.int32).reshape(2, 20)
POSITION = np.broadcast_to(np.arange(20, dtype=np.int32), TOKEN.shape)


def noise(tree, size=0.1):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: size * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


def merge(params, adapters, adapter):
    change = merging(adapters, adapter)
    return jax.tree.map_with_path(lambda path, leaf: change([key.key for key in path], jnp.array(leaf)), params)


def logits_of(config, params, adapter=None, adapters=None):
    def of(params, adapters, token, position):
        variables = {"params": params} | ({} if adapter is None else {"adapters": adapters})
        hidden, _ = Decoder(config, adapter=adapter).apply(variables, token, position)
        return logits(config, params, hidden)

    return np.asarray(jax.jit(of)(params, adapters, TOKEN, POSITION))


def test_a_new_adapter_changes_no_bit_and_is_its_seeds_alone(config, params):
    adapter = AdapterConfig.of(config, rank=4, alpha=8.0)
    new = jax.jit(init_adapters, static_argnums=(0, 1))
    adapters = new(config, adapter, jax.random.key(1))
    assert jax.tree.map(jnp.shape, adapters) == jax.tree.map(jnp.shape, abstract_adapters(config, adapter))
    for name, leaf in adapters["layers"].items():
        assert (float(jnp.abs(leaf).max()) == 0) == name.endswith("_a"), name
    assert np.array_equal(logits_of(config, params, adapter, adapters), logits_of(config, params))
    # Of the seed and the matrix: no other target, rank 4 or mesh changes it.
    some = AdapterConfig.of(config, rank=4, alpha=1.0, targets=["v_proj", "q_proj"])
    assert some.targets == ("q", "v")
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    place = adapter_shardings(config, some, mesh, TRAIN)
    sharded = jax.jit(init_adapters, static_argnums=(0, 1), out_shardings=place)(config, some, jax.random.key(1))
    for name, leaf in sharded["layers"].items():
        np.testing.assert_array_equal(leaf, adapters["layers"][name])
    other = new(config, some, jax.random.key(2))
    assert not np.array_equal(other["layers"]["q_b"], adapters["layers"]["q_b"])
    axes = adapter_axes(config, adapter)["layers"]
    assert axes["q_a"] == ("layers", "embed", "rank")
    assert axes["o_b"] == ("layers", "rank", "embed")


@pytest.mark.parametrize("targets", ["all", ["q_proj", "down_proj"]], ids=str)
def test_apart_and_merged_are_one_policy(config, params, targets):
    adapter = AdapterConfig.of(config, rank=3, alpha=6.0, targets=targets)
    adapters = noise(abstract_adapters(config, adapter))
    found = logits_of(config, params, adapter, adapters)
    whole = merge(params, adapters, adapter)
    expected = logits_of(config, whole)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - logits_of(config, params)).max() > 1e-2
    # W + alpha / rank * A B, written out for one matrix of one layer.
    a, b = (np.asarray(adapters["layers"][f"q_{half}"][1], np.float64) for half in "ab")
    product = np.einsum("dr,rnh->dnh", a, b)
    np.testing.assert_allclose(whole["layers"]["q"][1], params["layers"]["q"][1] + 2.0 * product, atol=1e-6)
    # With a cache too, though sampling has its weights merged.
    variables = {"params": unstack_layers(jax.tree.map(jnp.asarray, params)), "adapters": adapters}
    texts = jnp.asarray(TOKEN), jnp.asarray(POSITION)
    hidden, _ = Decoder(config, adapter=adapter).apply(
        variables, *texts, init_cache(config, batch_size=2, num_slots=20)
    )
    np.testing.assert_allclose(logits(config, variables["params"], hidden), expected, atol=1e-5)


@pytest.fixture(scope="module")
def batch(rows):
    return make_batch(rows[:8], batch_size=8, max_length=48)


@pytest.fixture(scope="module")
def halves(rows):
    """The same rows in two micro-batches."""
    return make_batch(rows[:8], batch_size=8, max_length=48, parts=2)


def test_at_full_rank_beside_the_identity_the_gradient_is_the_dense_one(config, params, batch):
    """With A = [I 0] the gradient of B is that of W, and 0 in the rows that no input reaches."""
    adapter = AdapterConfig.of(config, rank=64, alpha=64.0)  # the widest input: down's
    adapters = init_adapters(config, adapter, jax.random.key(0))
    for name in adapter.targets:
        shape = adapters["layers"][f"{name}_a"].shape
        identity = jnp.eye(math.prod(shape[1:-1]), 64).reshape(shape[1:])
        adapters["layers"][f"{name}_a"] = jnp.broadcast_to(identity, shape)
        adapters["layers"][f"{name}_b"] *= 0

    def loss(model, trained, frozen, part):
        logprob = batch_logprobs(model, trained, part, chunk=64, frozen=frozen)
        return LOSS(logprob, jnp.zeros((8, 2)), part)[0].mean()

    dense = jax.jit(jax.grad(partial(loss, Decoder(config))))(params, None, batch.part(0))["layers"]
    found = jax.jit(jax.grad(partial(loss, Decoder(config, adapter=adapter))))(adapters, params, batch.part(0))[
        "layers"
    ]
    for name in adapter.targets:
        expected, size = dense[name], found[f"{name}_a"].shape
        inputs = math.prod(size[1:-1])
        own = found[f"{name}_b"].reshape(2, 64, -1)
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(own[:, :inputs], expected.reshape(2, inputs, -1), atol=2e-6 * scale, err_msg=name)
        assert not np.any(own[:, inputs:])


def ten_steps(config, params, batch, mesh):
    """Losses of ten steps of a new adapter of rank 8, which starts at the reference; and what is left."""
    adapter = AdapterConfig.of(config, rank=8, alpha=16.0)
    model = Decoder(config, constrain=Constrain(mesh, TRAIN), adapter=adapter)
    optimizer = make_optimizer(OptimizerSection(), adapter_axes(config, adapter))
    places = adapter_shardings(config, adapter, mesh, TRAIN)
    key = jax.random.key(5)
    adapters = jax.jit(init_adapters, static_argnums=(0, 1), out_shardings=places)(config, adapter, key)
    frozen = jax.device_put(params, param_shardings(config, mesh, TRAIN))
    batch = batch.place(mesh)
    shardings = state_shardings(optimizer, places, adapters)
    state = init_state(adapters, optimizer, shardings)
    step = StepConfig(model, optimizer, LOSS, chunk=64, places=tuple(jax.tree.leaves(shardings)))
    history = []
    for _ in range(10):
        state, metrics = train_step(state, batch, jnp.float32(1e-3), config=step, frozen=frozen)
        history.append(float(metrics["loss"]))
    return history, state, places


def mesh_of(devices, **axes):
    return make_mesh(MeshSection(**axes), devices)


@pytest.mark.soak
def test_on_every_mesh_the_loss_leaves_log_2_alike(config, params, batch, halves):
    """With B = 0 in place of A the first step of Adam goes by rounding, and on some meshes the loss stays."""
    devices = jax.devices()
    meshes = {
        "1": mesh_of(devices[:1], data=1),
        "data 4": mesh_of(devices[:4], data=4),
        "fsdp 4": mesh_of(devices[:4], data=1, fsdp=4),
        "permuted": mesh_of([devices[i] for i in (2, 0, 3, 1)], data=2, fsdp=2),
        "tensor 2": mesh_of(devices[:4], data=1, fsdp=2, tensor=2),
    }
    curves = {}
    score = partial(score_step, params, model=Decoder(config), chunk=64)

    def referred(batch):
        parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(len(batch.token))]
        return batch.replace(previous_logprob=np.stack([np.asarray(score(part)) for part in parts]))

    batch, halves = referred(batch), referred(halves)
    for name, mesh in meshes.items():
        own = halves if name == "permuted" else batch  # whose gradients are added up
        history, state, places = ten_steps(config, params, own, mesh)
        assert history[0] == pytest.approx(math.log(2), abs=1e-6)
        assert history[-1] < 0.692, name
        curves[name] = history
        # Moments, too, are of adapters alone, and lie where these lie.
        leaves = jax.tree.leaves(state.params)
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        assert [leaf.shape for leaf in moments] == [leaf.shape for leaf in leaves] * 2
        for leaf, place in zip(moments, [*jax.tree.leaves(places)] * 2, strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    for name, history in curves.items():
        np.testing.assert_allclose(history, curves["1"], atol=1e-3, err_msg=name)
    assert all(later < before for before, later in zip(curves["1"], curves["1"][1:], strict=False))


def test_beside_experts_attention_has_adapters_and_experts_are_refused_by_name():
    mixture = ModelConfig(
        vocab_size=96, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: 2 * leaf, init_params(mixture, jax.random.key(0)))
    adapter = AdapterConfig.of(mixture, rank=2, alpha=2.0, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapters = noise(abstract_adapters(mixture, adapter))
    found, expected = (
        logits_of(mixture, params, adapter, adapters),
        logits_of(mixture, merge(params, adapters, adapter)),
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for targets in ("all", ["q_proj", "up_proj"]):
        with pytest.raises(DnoError, match=r"up_proj.*set adapter\.targets=\[q_proj,k_proj,v_proj,o_proj\]"):
            AdapterConfig.of(mixture, rank=1, alpha=1.0, targets=targets)
    assert AdapterConfig.of(mixture, rank=1, alpha=1.0, targets=["o_proj"]).targets == ("o",)


def test_whatever_it_began_from_an_adapter_names_the_weights_it_stands_beside(config, params, tmp_path):
    """As the schemes have it: restarts from policy 0, and a centre that moves."""
    root, mesh = epath.Path(tmp_path), make_mesh(MeshSection(data=1), jax.devices()[:1])
    places, adapter = Destination(config, mesh, TRAIN), AdapterConfig.of(config, rank=2, alpha=3.0)
    base = save_policy(root / "000", jax.device_put(params, places.params))
    adapters = jax.device_put(noise(abstract_adapters(config, adapter)), places.adapters(adapter))
    names = [save_adapter(root / "004", adapters, adapter, beside=root / "000")]
    names.append(save_adapter(root / "001", adapters, adapter, beside=root / "004"))
    assert base_of(root / "001") == base_of(root / "000") == (root / "000", base)
    assert names[0] == names[1] != base  # the same adapter beside the same weights is the same policy
    wider = AdapterConfig.of(config, rank=2, alpha=6.0)
    assert save_adapter(root / "002", adapters, wider, beside=root / "001") != names[0]
    shapes, key = abstract_params(config), jax.random.key(0)
    found, frozen = load_apart(root / "001", places, adapter, key=key, shapes=shapes)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    jax.tree.map(np.testing.assert_array_equal, frozen, params)
    fresh, _ = load_apart(root / "000", places, adapter, key=key, shapes=shapes)
    assert not np.any(fresh["layers"]["up_a"])
    with pytest.raises(DnoError, match=r"002: holds .*alpha=6\.0.* the configuration has .*alpha=3\.0"):
        load_apart(root / "002", places, adapter, key=key, shapes=shapes)
    with pytest.raises(DnoError, match=r"003: no whole policy there"):
        base_of(root / "003")
    (root / "001" / "ADAPTER.json").write_text('{"base": "../000"}')
    with pytest.raises(DnoError, match=r"ADAPTER\.json: holds .*, no note of an adapter; .*--from train:0"):
        base_of(root / "001")
    # A folder that becomes one with weights of its own keeps no note.
    save_policy(root / "002", frozen)
    assert base_of(root / "002") == (root / "002", base)


def torch_history(folder, adapter_folder, batch, *, beta, rate, steps):
    """The same training by transformers' model, PEFT's adapters and torch's AdamW, written from the paper's Eq. 13."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, str(adapter_folder), is_trainable=True).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    batch = batch.part(0)
    texts = [batch.places.position[row] >= 0 for row in range(len(batch.token))]  # chosen, rejected, chosen ...

    def logprobs():
        values = []
        for row, used in enumerate(texts):
            ids = torch.tensor(batch.token[row][used][None].astype(np.int64))
            scores = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
            taken = scores.gather(1, ids[0, 1:, None])[:, 0]
            values.append(taken[-int(batch.num_tokens[row // 2, row % 2]) :].sum())
        return torch.stack(values).reshape(-1, 2)

    with torch.no_grad():
        reference = logprobs()
    history = []
    for _ in range(steps):
        ratio = logprobs() - reference
        loss = -torch.nn.functional.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        history.append((float(loss.detach()), float(norm)))
    return history


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tests.small import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("adapters") / "checkpoint")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of transformers, through PEFT
@pytest.mark.soak
def test_ten_steps_match_torch_and_peft_step_by_step(checkpoint, rows, tmp_path):
    pytest.importorskip("peft")
    config, params = hf.load(checkpoint)
    adapter = AdapterConfig.of(
        config, rank=4, alpha=8.0, targets=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    )
    adapters = init_adapters(config, adapter, jax.random.key(0))
    peft_files.save(tmp_path / "adapter", config, adapter, adapters, source=checkpoint, base=(str(checkpoint), None))
    batch = make_batch([TrainRow(row) for row in rows[:4]], batch_size=4, max_length=48)
    expected = torch_history(checkpoint, tmp_path / "adapter", batch, beta=0.1, rate=1e-2, steps=10)

    model = Decoder(config, remat="full", adapter=adapter)
    reference = np.asarray(score_step(adapters, batch, model=model, chunk=64, frozen=params))
    batch = batch.replace(previous_logprob=reference[None])
    optimizer = make_optimizer(OptimizerSection(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01, max_grad_norm=1.0))
    state = TrainState(step=jnp.int32(0), params=adapters, opt_state=optimizer.init(adapters))
    step = StepConfig(model, optimizer, LOSS, chunk=64)
    history = []
    for _ in range(10):
        state, metrics = train_step(state, batch, jnp.float32(1e-2), config=step, frozen=params)
        history.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert history[-1][0] < 0.9 * history[0][0]
    for number, (found, wanted) in enumerate(zip(history, expected, strict=True)):
        assert found[0] == pytest.approx(wanted[0], abs=1e-4), f"loss at step {number}"
        assert found[1] == pytest.approx(wanted[1], rel=1e-3), f"gradient norm at step {number}"


def TrainRow(row):
    """A row of the fixture whose ids the small checkpoint has."""
    from dno_jax.training.batches import TrainingRow

    within = [[tuple(i % 70 + 3 for i in ids) for ids in part] for part in (row.prompt_ids, row.response_ids)]
    return TrainingRow(tuple(within[0]), tuple(within[1]))
