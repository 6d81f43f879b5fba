"""Policies and train states are held to what was written: nothing damaged is sampled, trained from or exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.errors import DnoError
from dno_jax.training import checkpoint
from dno_jax.training.checkpoint import StateCheckpoints, load_policy, policy_fingerprint, save_policy
from dno_jax.training.state import TrainState
from tests.damage import DAMAGES, damage_weights, flip, weights_file

MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
SPLIT = NamedSharding(MESH, PartitionSpec("data"))
WHOLE = NamedSharding(MESH, PartitionSpec())


def params(seed=0):
    rng = np.random.default_rng(seed)
    made = {"embed": rng.normal(size=(64, 32)), "layers": {"w": rng.normal(size=(16, 32, 8)), "b": np.zeros((16, 8))}}
    return jax.tree.map(lambda leaf: jax.device_put(jnp.asarray(leaf, jnp.float32), SPLIT), made)


def read(path, dtype=jnp.float32, sharding=SPLIT):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params())
    return load_policy(path, shapes=shapes, shardings=jax.tree.map(lambda _: sharding, shapes))


@pytest.fixture
def policy(tmp_path):
    path = epath.Path(tmp_path) / "policies" / "001"
    save_policy(path, params())
    return path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_whole_policy_is_read_as_it_was_written_whatever_the_layout(policy, dtype):
    for sharding in (SPLIT, WHOLE):
        found = read(policy, dtype, sharding)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)), found, params())
        assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {sharding}
    assert checkpoint.stored_fingerprint(policy) == policy_fingerprint(policy)


@pytest.mark.parametrize(
    ("damage", "dtype"), [*((name, jnp.float32) for name in DAMAGES), ("flip", jnp.bfloat16), ("cut", jnp.bfloat16)]
)
def test_a_damaged_policy_is_refused(policy, damage, dtype):
    damage_weights(policy / "params", DAMAGES[damage])
    with pytest.raises(DnoError, match=r"policies/001: .*--from train:0") as told:
        read(policy, dtype)
    assert str(told.value).count("\n") < 10


def test_no_flipped_bit_goes_unnoticed(policy):
    """Wherever it is: what cannot be told from the file itself, the fingerprint tells."""
    file = weights_file(policy / "params")
    whole = file.read_bytes()
    refused = 0
    for place in np.linspace(0, 1, 12):
        flip(file, float(place))
        try:
            jax.tree.map(np.testing.assert_array_equal, read(policy), params())  # a byte that nothing reads
        except DnoError:
            refused += 1
        file.write_bytes(whole)
    assert refused >= 4  # a third of the file is of an earlier version


def test_the_right_remedy_for_each_policy(policy):
    for name, remedy in [
        ("000", r"remove .*policies/000 and run again: the same one is imported from model\.path"),
        ("012", "--from train:11"),
    ]:
        with pytest.raises(DnoError, match=remedy):
            checkpoint.check_fingerprint(policy.parent / name, "a" * 64, "b" * 64)


def test_another_policys_files_are_not_taken_for_this_one(policy):
    other = policy.parent / "002"
    save_policy(other, params(1))
    (policy / "params").rmtree()
    (other / "params").rename(policy / "params")
    with pytest.raises(DnoError, match="not the weights that were written there"):
        read(policy)


@pytest.mark.parametrize("content", [b"", b"abc\n", b"\xff" * 64])
def test_a_damaged_fingerprint_is_named(policy, content):
    (policy / "FINGERPRINT").write_bytes(content)
    with pytest.raises(DnoError, match=r"FINGERPRINT: holds .*expected 64 hex digits.*--from train:0"):
        policy_fingerprint(policy)


def test_writing_the_same_policy_again_heals_it(policy):
    before = read(policy)
    flip(weights_file(policy / "params"))
    with pytest.raises(DnoError):
        read(policy)
    save_policy(policy, params())
    jax.tree.map(np.testing.assert_array_equal, read(policy), before)


def state(step):
    return TrainState(
        step=jax.device_put(jnp.int32(step), WHOLE), params=params(step), opt_state={"mu": params(step + 100)}
    )


@pytest.fixture
def states(tmp_path):
    path = epath.Path(tmp_path) / "states"
    kept = StateCheckpoints(path)
    for step in (2, 4, 6):
        kept.save(state(step), step=step)
    kept.close()
    return path


def restored(path):
    kept = StateCheckpoints(path)
    found = kept.restore(state(0), jax.tree.map(lambda leaf: leaf.sharding, state(0)))
    return kept, found


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_state_gives_way_to_the_one_before(states, damage, capsys):
    assert checkpoint.damaged_states(states) == {}
    damage_weights(states / "6", DAMAGES[damage])
    assert list(checkpoint.damaged_states(states)) == [6]
    kept, found = restored(states)
    assert int(found.step) == 4
    jax.tree.map(np.testing.assert_array_equal, found.params, params(4))
    said = capsys.readouterr().err
    assert "states/6: " in said
    assert "goes on from the state before it, after step 4" in said
    assert (states / "6.damaged").exists()
    kept.save(state(6), step=6)  # taken again, and saved again
    kept.close()
    kept, found = restored(states)
    assert int(found.step) == 6
    kept.close()


def test_where_no_state_is_whole_training_begins_anew(states, capsys):
    for step in (4, 6):
        damage_weights(states / str(step), flip)
    kept, found = restored(states)
    kept.close()
    assert found is None
    assert "training goes on from its beginning" in capsys.readouterr().err


def test_a_full_device_is_no_damage(states, monkeypatch):
    """A state that does not fit now is whole: it stays where it is."""
    kept = StateCheckpoints(states)

    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(kept._manager, "restore", full)
    with pytest.raises(jax.errors.JaxRuntimeError):
        kept.restore(state(0), jax.tree.map(lambda leaf: leaf.sharding, state(0)))
    kept.close()
    assert (states / "6").exists()
