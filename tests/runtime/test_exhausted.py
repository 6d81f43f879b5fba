"""A device without memory: one message with the field, its value and the next smaller setting."""

import jax
import jax.numpy as jnp
import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.parallel.mesh import make_mesh
from dno_jax.runtime import exhausted
from dno_jax.runtime.exhausted import Setting, explained
from dno_jax.runtime.programs import Programs
from tests.training.conftest import CONFIG as SHAPE

GPU = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 154618822656 bytes.\nBufferAssignment OOM Debugging.\n"
    + "\n".join(f"             parameter allocation: {n} GiB" for n in range(80))
)
TPU = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.3G of 15.7G hbm.\n" + "Total hbm usage\n" * 70


def programs(**changes):
    tree = {"run_dir": "r", "model": {"path": "m"}, "prompts": {"path": "p"}, "annotation": {"kind": "openai"}}
    for section, fields in changes.items():
        tree[section] = tree.get(section, {}) | fields
    config = parse_config(RunConfig, tree, place="test")
    return Programs(config, SHAPE, make_mesh(config.mesh))


@pytest.mark.parametrize("text", [GPU, TPU, "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"])
def test_one_short_message_for_each_platforms_words(text):
    with pytest.raises(DnoError) as told, explained("train of iteration 2", [Setting("a.b", 64, 32)]):
        raise jax.errors.JaxRuntimeError(text)
    assert str(told.value).count("\n") < 10
    assert "train of iteration 2: a device ran out of memory (" in str(told.value)
    assert "a.b is 64; the next smaller is 32: start the same command again with a.b=32" in str(told.value)


def test_a_real_allocation_that_fails_is_explained():
    with (
        pytest.raises(DnoError, match=r"ran out of memory \(.*RESOURCE_EXHAUSTED"),
        explained("x", [Setting("a", 1, None)]),
    ):
        jax.block_until_ready(jnp.zeros(1 << 55, jnp.uint8))


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error), match=str(error)), explained("x", []):
        raise error


@pytest.mark.parametrize(
    ("training", "smaller"),
    [
        ({"batch_size": 64}, 32),
        ({"batch_size": 64, "micro_batch_size": 32}, 16),
        ({"batch_size": 48}, 24),  # the next that divides the batch and that the 8 row shards divide
        ({"batch_size": 40}, 20),
        ({"batch_size": 8}, 4),
        ({"batch_size": 4}, None),
    ],
)
def test_the_next_smaller_micro_batch_is_one_that_works(training, smaller):
    first = exhausted.training_settings(programs(training=training))[0]
    assert (first.field, first.smaller) == ("training.micro_batch_size", smaller)
    if smaller:  # the configuration takes it
        programs(training=training | {"micro_batch_size": smaller})


def test_what_is_tried_after_the_micro_batch():
    settings = exhausted.training_settings(
        programs(training={"batch_size": 4, "logprob_chunk": 256}, model={"remat": "none"})
    )
    with (
        pytest.raises(
            DnoError, match=r"model\.remat is none; the next smaller is full.*\n.*training\.logprob_chunk=128"
        ),
        explained("train of iteration 0", settings),
    ):
        raise jax.errors.JaxRuntimeError(GPU)


def test_weights_are_split_over_more_devices_where_there_are_more():
    assert exhausted.weight_settings(programs()) == [Setting("mesh.fsdp", 1, 2)]
    assert exhausted.weight_settings(programs(mesh={"fsdp": 8})) == [Setting("mesh.fsdp", 8, None)]


def test_sampling_and_reward_models_name_their_own_fields():
    made = programs()
    assert exhausted.sampling_settings(made, 64)[0] == Setting("sampling.slots", 64, 32, " (chosen by the program)")
    assert exhausted.sampling_settings(programs(sampling={"slots": 1}), 1)[0].smaller is None
    assert exhausted.reward_settings(made, 24)[0] == Setting("annotation.reward_model.batch_size", 24, 8)
