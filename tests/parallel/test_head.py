"""The head on a mesh: gathered once, its gradient summed once, whatever the slices; and what it takes in memory."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.config import MeshSection, OptimizerSection
from dno_jax.logprobs import head_token_logprobs, token_logprobs
from dno_jax.model.config import ModelConfig
from dno_jax.model.params import init_params
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import DECODE, ROW_AXES, TRAIN, Constrain
from dno_jax.plan.hlo import calls
from dno_jax.training.batches import TrainingRow, make_batch
from tests.training.trained import begin

B, T, D, V = 8, 13, 16, 64
MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 1, "tensor": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, V)))
    weight = rng.normal(size=(B, T)).astype(np.float32)
    return hidden, head, rng.integers(0, V, size=(B, T)).astype(np.int32), weight


def on_mesh(arrays, axes, *, chunk, tied=False, softcap=None, layout=TRAIN, valid=None, columns=None):
    """Return the compiled value and gradients, and what they are called with."""
    hidden, head, token, weight = arrays
    mesh = make_mesh(MeshSection(**axes))
    names = ("vocab", "embed") if tied else ("embed", "vocab")
    rows = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    places = (rows, NamedSharding(mesh, layout.weight_spec(names)))
    operands = jax.device_put((hidden, head.T if tied else head), places)

    def loss(hidden, head):
        head = head.T if tied else head
        found = Constrain(mesh, layout).token_logprobs(
            hidden,
            head,
            jax.device_put(token, rows),
            chunk=chunk,
            softcap=softcap,
            valid=valid,
            columns=columns,
        )
        return jnp.sum(weight * found), found

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*operands).compile(), operands


@pytest.fixture(scope="module")
def wanted(arrays):
    hidden, head, token, weight = arrays

    def of(softcap, dtype=jnp.float32):
        def loss(hidden, head):
            logits = jnp.einsum("btd,dv->btv", hidden, head, precision="highest", preferred_element_type=jnp.float32)
            found = token_logprobs(logits if softcap is None else softcap * jnp.tanh(logits / softcap), token)
            return jnp.sum(weight * found), found

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)

    return {softcap: of(softcap) for softcap in (None, 3.0)}


@pytest.mark.parametrize(
    ("axes", "chunk", "tied", "softcap", "columns"),
    [
        *((axes, 7, tied, None, None) for axes in MESHES for tied in (False, True)),
        *((MESHES[3], chunk, False, 3.0, columns) for chunk, columns in ((1, None), (64, 9), (1000, 16))),
        *((axes, 7, False, None, 5) for axes in MESHES),  # blocks that do not divide a device's columns
    ],
    ids=str,
)
def test_a_mesh_gives_one_devices_values_and_gradients(arrays, wanted, axes, chunk, tied, softcap, columns):
    program, operands = on_mesh(arrays, axes, chunk=chunk, tied=tied, softcap=softcap, columns=columns)
    (_, found), (of_hidden, of_head) = program(*operands)
    (_, expected), (to_hidden, to_head) = wanted[softcap]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(of_hidden, to_hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_head.T if tied else of_head, to_head, rtol=1e-5, atol=1e-5)
    assert of_head.sharding.is_equivalent_to(operands[1].sharding, 2)


@pytest.mark.parametrize("axes", MESHES[1:4], ids=str)
def test_slices_of_a_device_that_nobody_asks_for_are_left_out(arrays, axes):
    """Each device has its own; what is asked for has the values and gradients that it has alone."""
    hidden, head, token, weight = arrays
    valid = np.arange(T)[None] < np.asarray([0, 13, 5, 1, 0, 0, 8, 2])[:, None]
    program, operands = on_mesh((hidden, head, token, weight * valid), axes, chunk=2, valid=jnp.asarray(valid))
    plain, own = on_mesh((hidden, head, token, weight * valid), {"data": 8}, chunk=1000)
    found, expected = program(*operands), plain(*own)
    np.testing.assert_allclose(found[0][1] * valid, expected[0][1] * valid, rtol=1e-5, atol=5e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(found[0][1])[0] == 0.0) == (axes.get("fsdp") == 8)


def test_a_layout_that_splits_no_weight_over_rows_needs_no_gather(arrays, wanted):
    program, operands = on_mesh(arrays, MESHES[3], chunk=7, layout=DECODE)
    np.testing.assert_allclose(program(*operands)[0][1], wanted[None][0][1], rtol=1e-5, atol=5e-6)
    assert "all-gather" not in program.as_text()


@pytest.mark.parametrize("axes", [axes for axes in MESHES if axes != {"data": 8}], ids=str)
def test_no_loop_moves_the_head_and_no_gradient_is_summed_whole(arrays, axes):
    """21 slices: with a gather or a sum in each, the head would cross the devices 63 times."""
    text = on_mesh(arrays, axes, chunk=1)[0].as_text()
    found = calls(text)
    share = V // axes.get("tensor", 1) * D  # numbers of a device's columns
    looped = [one.sizes for one in found if one.looped]
    assert looped or axes.get("tensor", 1) == 1
    assert all(size < share // 8 for sizes in looped for size in sizes), looped
    large = [(one.kind, size) for one in found for size in one.sizes if size >= share // axes.get("fsdp", 1)]
    split = axes.get("fsdp", 1) > 1
    kinds = Counter(kind for kind, _ in large)
    assert kinds["all-gather"] == split
    assert (kinds["all-to-all"] > 0) == split  # of the gradient's parts, which each device adds up
    assert not [size for kind, size in large if kind == "all-reduce" and size >= share and split]


def test_a_whole_step_moves_the_head_outside_of_its_loops():
    """Two micro-batches would be a loop of their own; with one, what loops is layers and slices."""
    config = ModelConfig(512, 32, 48, 2, 4, 2, 8)
    row = TrainingRow(((1,) * 8,) * 2, ((1,) * 24,) * 2)
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    state, take = begin(config, params, OptimizerSection(), axes=(1, 8, 1))
    batch = make_batch([row] * 16, batch_size=16, max_length=32)
    found = calls(take.lowered(state, batch).compile().as_text())
    share = 512 * 32 // 8  # numbers of the head on a device, and more than of any layer's weights of a device
    assert not [one.kind for one in found if one.looped and max(one.sizes) > share]
    large = Counter(one.kind for one in found if max(one.sizes) == 512 * 32)
    assert large == {"all-gather": 1}  # of the head; tokens travel to the embedding


def test_a_small_gradient_in_every_slice_is_not_lost_in_bfloat16():
    """256 slices that each bring 1: a sum in bfloat16 stands still at 256 of these, one in float32 does not."""
    rows, width = 2, 512
    hidden = jnp.ones((rows, width, 2), jnp.bfloat16)
    token = jnp.zeros((rows, width), jnp.int32)

    def loss(head):
        return head_token_logprobs(hidden, head, token, chunk=rows).sum()

    slope = jax.grad(loss)(jnp.zeros((2, 2), jnp.bfloat16))
    # d/dw of log softmax at equal logits: 1/2 from each of 1,024 tokens, down the other column.
    np.testing.assert_allclose(slope.astype(jnp.float32), [[512.0, -512.0]] * 2, rtol=1e-2)


def test_a_large_heads_gradient_is_nowhere_whole_in_float32():
    """Parts of it are added up, sent and rounded one after the other, on one device and on eight."""
    D, V = 1024, 2**17  # four times what is held at a time

    def loss(hidden, head, token):
        mesh = make_mesh(MeshSection(data=1, fsdp=8))
        return Constrain(mesh, TRAIN).token_logprobs(hidden, head, token, chunk=64).sum()

    def alone(hidden, head, token):
        return head_token_logprobs(hidden, head, token, chunk=64).sum()

    mesh = make_mesh(MeshSection(data=1, fsdp=8))
    rows, split = (NamedSharding(mesh, PartitionSpec(axis)) for axis in (ROW_AXES, "fsdp"))
    for function, places in ((alone, (None, None)), (loss, (rows, split))):
        shapes = (
            jax.ShapeDtypeStruct((8, 64, D), jnp.bfloat16, sharding=places[0]),
            jax.ShapeDtypeStruct((D, V), jnp.bfloat16, sharding=places[1]),
            jax.ShapeDtypeStruct((8, 64), jnp.int32, sharding=places[0]),
        )
        traced = jax.jit(jax.grad(function, (0, 1))).trace(*shapes)
        lowered = traced.lower(lowering_platforms=("tpu",)).as_text()  # a CPU widens the head to multiply it
        assert f"tensor<{D}x{V}xbf16>" in lowered
        assert f"tensor<{D}x{V // 4}xf32>" in lowered
        assert f"tensor<{D}x{V}xf32>" not in lowered


def test_a_large_head_takes_a_tenth_of_its_logits():
    """V = 128,256, D = 4,096, 8 x 4,096 tokens, compiled and not run: temporaries of value and gradients."""
    shapes = (
        jax.ShapeDtypeStruct((8, 4096, 4096), jnp.float32),
        jax.ShapeDtypeStruct((4096, 128256), jnp.float32),
        jax.ShapeDtypeStruct((8, 4096), jnp.int32),
    )

    def temporaries(logprobs):
        def loss(hidden, head, token):
            return logprobs(hidden, head, token).sum()

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def plain(hidden, head, token):
        return token_logprobs(jnp.einsum("btd,dv->btv", hidden, head), token)

    assert temporaries(partial(head_token_logprobs, chunk=512)) * 10 <= temporaries(plain)
