from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import abstract_params, init_params
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import (
    DECODE,
    TRAIN,
    Constrain,
    num_row_shards,
    owned_rows,
    replicated,
    reshard,
    reshard_donated,
    resolve,
    row_sharding,
    to_device,
)
from dno_jax.plan.hlo import calls
from dno_jax.training.checkpoint import fingerprint, load_policy, policy_fingerprint, save_policy
from dno_jax.training.state import param_shardings

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64,
    tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor))


def test_one_axis_takes_the_rest():
    assert dict(mesh_of(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert dict(mesh_of(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    with pytest.raises(DnoError, match="does not divide the 8 cpu devices"):
        mesh_of(3, -1, 1)


def test_unknown_axes_and_indivisible_sizes_raise():
    mesh = mesh_of(2, 2, 2)
    with pytest.raises(DnoError, match=r"TRAIN knows no axis 'embde'"):
        TRAIN.weight_spec(("embde",))
    with pytest.raises(DnoError, match=r"w of shape \(7, 8\): size 7 cannot be split over fsdp=2"):
        resolve(mesh, TRAIN.weight_spec(("embed", "mlp")), shape=(7, 8), name="w")


def test_layouts_split_what_they_say():
    mesh = mesh_of(2, 2, 2)
    train, decode = (param_shardings(CONFIG, mesh, layout) for layout in (TRAIN, DECODE))
    assert train["layers"]["up"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert decode["layers"]["up"].spec == PartitionSpec(None, None, "tensor")
    assert train["layers"]["mlp_norm"].spec == PartitionSpec()
    assert TRAIN.activation_spec(("batch", "length", "embed")) == PartitionSpec(("data", "fsdp", "expert"), None, None)
    assert num_row_shards(mesh) == 4


def test_axes_of_one_device_are_left_out():
    mesh = mesh_of(8, 1, 1)
    assert {leaf.spec for leaf in jax.tree.leaves(param_shardings(CONFIG, mesh, TRAIN))} == {PartitionSpec()}


def test_constrain_is_a_value():
    mesh = mesh_of(2, 2, 2)
    assert Constrain(mesh, TRAIN) == Constrain(mesh_of(2, 2, 2), TRAIN) != Constrain(mesh, DECODE)
    assert hash(Constrain(mesh, TRAIN)) == hash(Constrain(mesh_of(2, 2, 2), TRAIN))


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_tokens_travel_to_the_embedding_and_the_table_stays(axes):
    """Nothing as large as a device's columns of all rows is gathered or summed but over devices that share them."""
    mesh = mesh_of(*axes)
    rng = np.random.default_rng(0)
    rows, token = rng.normal(size=(48, 64)).astype(np.float32), rng.integers(0, 48, size=(8, 2))
    weight = rng.normal(size=(8, 2, 64)).astype(np.float32)
    table = jax.device_put(rows, NamedSharding(mesh, TRAIN.weight_spec(("vocab", "embed"))))
    token = jax.device_put(token.astype(np.int32), row_sharding(mesh, ndim=2))

    def total(look_up):
        def of(table, token):
            found = look_up(table, token)
            return jnp.sum(weight * found), found

        return jax.jit(jax.value_and_grad(of, has_aux=True))

    program = total(partial(Constrain(mesh, TRAIN).look_up, dtype=jnp.float32)).lower(table, token).compile()
    (_, found), slope = program(table, token)
    (_, expected), wanted = total(lambda table, token: table[token])(rows, np.asarray(token))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(slope, wanted, rtol=1e-6, atol=1e-6)
    assert slope.sharding.is_equivalent_to(table.sharding, 2)
    own = 48 * 64 // (axes[1] * axes[2])
    for one in calls(program.as_text()):
        assert max(one.sizes) <= (own if axes[0] > 1 else token.size * 64 // axes[1])


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_every_row_is_owned_once(axes):
    mesh = mesh_of(*axes)
    rows = np.arange(16 * 3).reshape(16, 3)
    placed = to_device(rows, row_sharding(mesh, ndim=2))
    owned = owned_rows(placed)
    assert sorted(owned) == list(range(16))
    np.testing.assert_array_equal(np.stack([owned[row] for row in range(16)]), rows)


def test_relayout_moves_without_changing_a_bit():
    mesh = mesh_of(2, 2, 2)
    params = jax.device_put(init_params(CONFIG, jax.random.key(0)), param_shardings(CONFIG, mesh, TRAIN))
    places = param_shardings(CONFIG, mesh, DECODE)
    with jax.transfer_guard("disallow"):  # on the devices: not through the host
        moved = reshard(params, places)
    for leaf, place in zip(jax.tree.leaves(moved), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert fingerprint(moved) == fingerprint(params)


def test_relayout_to_devices_in_another_order_changes_no_bit():
    mesh = mesh_of(2, 2, 2)
    other = Mesh(mesh.devices[::-1, ::-1], mesh.axis_names, axis_types=mesh.axis_types)
    params = jax.device_put(init_params(CONFIG, jax.random.key(0)), param_shardings(CONFIG, mesh, TRAIN))
    places = param_shardings(CONFIG, other, DECODE)
    moved = reshard(params, places)
    for leaf, place in zip(jax.tree.leaves(moved), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place
    assert fingerprint(moved) == fingerprint(params)


def test_what_is_handed_over_never_lies_there_twice():
    mesh = mesh_of(2, 2, 2)
    params = jax.device_put(init_params(CONFIG, jax.random.key(0)), param_shardings(CONFIG, mesh, TRAIN))
    before, places = fingerprint(params), param_shardings(CONFIG, mesh, DECODE)
    with jax.transfer_guard("disallow"):
        moved = reshard_donated(params, places)
    assert fingerprint(moved) == before
    stayed = 0
    for leaf, old, place in zip(*map(jax.tree.leaves, (moved, params, places)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        stayed += leaf is old
        assert leaf is old or old.is_deleted()
    assert 0 < stayed < len(jax.tree.leaves(params))  # norms lie alike in both


def test_relayout_is_compiled_once():
    mesh = mesh_of(2, 2, 2)
    params = jax.device_put(init_params(CONFIG, jax.random.key(0)), param_shardings(CONFIG, mesh, TRAIN))
    compiled = []

    def listen(event: str, *_: float, **__: str) -> None:
        compiled.append("backend_compile" in event)

    reshard(params, param_shardings(CONFIG, mesh, DECODE))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        reshard(params, param_shardings(CONFIG, mesh_of(2, 2, 2), DECODE))  # equal shardings, not the same ones
        again = sum(compiled)
        reshard(params, jax.tree.map(lambda _: replicated(mesh), params))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert again == 0
    assert sum(compiled) == 1  # the listener does hear of compilations


def test_a_fingerprint_names_the_values_and_not_the_mesh():
    params = init_params(CONFIG, jax.random.key(0))
    base = fingerprint(params)
    for axes in [(8, 1, 1), (1, 8, 1), (2, 2, 2)]:
        assert fingerprint(jax.device_put(params, param_shardings(CONFIG, mesh_of(*axes), TRAIN))) == base
    up = params["layers"]["up"]
    bump = up.at[1, 3, 5].set(jnp.nextafter(up[1, 3, 5], jnp.float32(1)))
    swapped = up.at[0, 0, 0].set(up[0, 0, 1]).at[0, 0, 1].set(up[0, 0, 0])
    for other in (bump, swapped, up.astype(jnp.bfloat16)):
        assert fingerprint({**params, "layers": {**params["layers"], "up": other}}) != base


def test_a_policy_saved_on_one_mesh_is_read_on_another(tmp_path):
    from etils import epath

    params = init_params(CONFIG, jax.random.key(0))
    path = epath.Path(tmp_path / "policy")
    with pytest.raises(DnoError, match="no whole policy"):
        load_policy(path, shapes=abstract_params(CONFIG), shardings=param_shardings(CONFIG, mesh_of(8, 1, 1), TRAIN))
    digest = save_policy(path, jax.device_put(params, param_shardings(CONFIG, mesh_of(2, 2, 2), TRAIN)))
    assert policy_fingerprint(path) == digest
    for axes in [(1, 8, 1), (1, 4, 2)]:
        places = param_shardings(CONFIG, mesh_of(*axes), DECODE)
        loaded = load_policy(path, shapes=abstract_params(CONFIG), shardings=places)
        assert fingerprint(loaded) == digest
        assert loaded["layers"]["q"].sharding.is_equivalent_to(places["layers"]["q"], 4)


def test_replicated_means_everywhere():
    mesh = mesh_of(2, 2, 2)
    assert replicated(mesh) == NamedSharding(mesh, PartitionSpec())
