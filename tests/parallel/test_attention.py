import dataclasses
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import LossSection, MeshSection, OptimizerSection
from dno_jax.errors import DnoError
from dno_jax.model.attention import CudnnAttention, SplashAttention, xla_attention
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder
from dno_jax.model.params import init_params
from dno_jax.model.places import NO_WINDOW, Places
from dno_jax.parallel.attention import ShardedAttention, choose_backend, make_attention
from dno_jax.parallel.mesh import make_mesh, one_device_mesh
from dno_jax.parallel.sharding import DECODE, TRAIN, Constrain
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import init_state, param_shardings, state_shardings
from dno_jax.training.step import StepConfig, train_step

KERNELS = {
    "splash": SplashAttention((32, NO_WINDOW), interpret=True),
    "cudnn": CudnnAttention((32, NO_WINDOW), implementation="xla"),
}
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
AMPERE = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
RADEON = SimpleNamespace(platform="gpu", device_kind="AMD MI300X", compute_capability="gfx942")
MODEL = {"dtype": "bfloat16", "head_dim": 128, "softcap": None}


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor))


@pytest.mark.parametrize(
    ("device", "backend"), [(CPU, "xla"), (TPU, "splash"), (AMPERE, "cudnn")], ids=["cpu", "tpu", "gpu"]
)
def test_auto_takes_the_platforms_kernel(device, backend, caplog):
    assert choose_backend("auto", device=device, **MODEL) == backend
    assert choose_backend(backend, device=device, **MODEL) == backend
    assert choose_backend("xla", device=device, **MODEL) == "xla"
    assert not caplog.records


@pytest.mark.parametrize(
    ("device", "change", "words"),
    [
        (TPU, {"dtype": "float32"}, "set model.dtype to bfloat16"),
        (HOPPER, {"dtype": "float32"}, "set model.dtype to bfloat16"),
        (HOPPER, {"softcap": 30.0}, r"soft cap of scores, and this model has one \(30\)"),
        (HOPPER, {"head_dim": 320}, "up to 256 on this GPU, and this model's is 320"),
        (AMPERE, {"head_dim": 256}, "up to 128 on this GPU, and this model's is 256"),
        (HOPPER, {"head_dim": 100}, "multiple of 8"),
        (RADEON, {}, "needs an NVIDIA GPU, not AMD MI300X"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_or_left_to_xla(device, change, words, caplog):
    name = "splash" if device is TPU else "cudnn"
    with pytest.raises(DnoError, match=f"model.attention is '{name}', but .*{words}.*to auto or xla"):
        choose_backend(name, device=device, **MODEL | change)
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", device=device, **MODEL | change) == "xla"
    assert f"xla instead of {name}, because it" in caplog.text


def test_what_a_kernel_can_do_is_not_refused():
    assert choose_backend("auto", device=HOPPER, **MODEL | {"head_dim": 256}) == "cudnn"
    assert choose_backend("auto", device=TPU, **MODEL | {"head_dim": 80, "softcap": 30.0}) == "splash"


@pytest.mark.parametrize(("name", "device"), [("cudnn", TPU), ("splash", HOPPER), ("splash", CPU), ("cudnn", CPU)])
def test_kernels_of_other_platforms_are_refused(name, device):
    with pytest.raises(DnoError, match=f"this run's devices are {device.platform}s; or set model.attention"):
        choose_backend(name, device=device, **MODEL)


def test_attention_is_a_value():
    made = [
        make_attention("splash", mesh=mesh_of(2, 2, 2), layout=layout, windows=windows)
        for layout, windows in [(TRAIN, (512, NO_WINDOW, 512)), (TRAIN, (NO_WINDOW, 512)), (DECODE, None)]
    ]
    assert made[0] == made[1] != made[2]
    assert hash(made[0]) == hash(made[1])
    assert made[0].attention.windows == (512, NO_WINDOW)
    assert make_attention("xla", mesh=one_device_mesh(), layout=TRAIN) is xla_attention
    assert make_attention("xla", mesh=mesh_of(2, 2, 2), layout=TRAIN).attention is xla_attention


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_device_attends_for_its_own_rows_and_heads(kernel):
    """Equal on a mesh and without; 3e-6 as in tests/model/test_attention.py. No device sees another's rows or heads."""
    B, T, N, K, H = 4, 128, 4, 2, 16
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(keys, (N, K, K), strict=True))
    start = np.arange(B)[:, None] * 9
    position = jnp.asarray(np.maximum(np.arange(T) - start, -1), jnp.int32)
    mesh = mesh_of(2, 2, 2)
    sharded = ShardedAttention(mesh, TRAIN, KERNELS[kernel])

    def total(attention, window, q, k, v):
        out = attention(q, k, v, places=Places(position), window=window, scale=0.3, softcap=None)
        out = jnp.where((position >= 0)[:, :, None, None], out, 0.0)
        return jnp.sum(jnp.sin(out)), out

    def run(attention, *operands):
        gradient = jax.grad(lambda window, *x: total(attention, window, *x), (1, 2, 3), has_aux=True)
        return jax.jit(gradient).lower(jnp.int32(32), *operands).compile()

    place = Constrain(mesh, TRAIN)
    axes = ("batch", "length", "heads", "head_dim")
    spread = [jax.jit(lambda x: place(x, axes))(x) for x in (q, k, v)]
    program = run(sharded, *spread)
    assert not {"all-gather", "all-to-all", "collective-permute"} & set(program.as_text().replace("(", " ").split())
    found = program(jnp.int32(32), *spread)
    wanted = run(xla_attention, q, k, v)(jnp.int32(32), q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1.0, np.abs(b).max()))


def test_on_a_mesh_too_cudnn_becomes_cudnns_kernel(monkeypatch):
    """Each device calls the library with its own rows and heads: 2 of 4 rows, 1 of 2 key heads."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)  # it asks the library, which is not here
    attention = make_attention("cudnn", mesh=mesh_of(2, 1, 4), layout=TRAIN)

    def total(q, k, v):
        position = jnp.zeros((4, 128), jnp.int32)
        out = attention(q, k, v, places=Places(position), window=NO_WINDOW, scale=0.1, softcap=None)
        return jnp.sum(out.astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((4, 128, heads, 64), jnp.bfloat16) for heads in (8, 4))
    text = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    assert len(calls) == 2
    for line in calls:
        assert "(tensor<2x128x2x64xbf16>, tensor<2x128x1x64xbf16>, tensor<2x128x1x64xbf16>" in line
    assert "CustomSPMDPartitioning" not in text


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_training_step_is_the_same_with_a_kernel(kernel):
    """One step of the real loop under remat: loss and gradient norm to float32 rounding of sums in another order."""
    config = ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def ids():
        return tuple(rng.integers(1, 96, size=rng.integers(3, 40)).tolist())

    rows = [TrainingRow((prompt := ids(), prompt), (ids(), ids()), previous_logprob=(-9.0, -8.0)) for _ in range(8)]
    batch = make_batch(rows, batch_size=8, max_length=80)
    mesh = mesh_of(2, 2, 2)
    optimizer = make_optimizer(OptimizerSection())
    places = param_shardings(config, mesh, TRAIN)
    placed = batch.place(mesh)
    results = []
    windowless = dataclasses.replace(KERNELS[kernel], windows=(NO_WINDOW,))
    for attention in (xla_attention, ShardedAttention(mesh, TRAIN, windowless)):
        params = jax.device_put(init_params(config, jax.random.key(0)), places)
        state = init_state(params, optimizer, state_shardings(optimizer, places, params))
        model = Decoder(config, remat="full", constrain=Constrain(mesh, TRAIN), attention=attention)
        step = StepConfig(model, optimizer, preference_loss(LossSection(beta=0.1)), chunk=64)
        _, metrics = train_step(state, placed, jnp.float32(1e-3), config=step)
        results.append(jax.tree.map(float, metrics))
    assert results[1]["grad_norm"] > 0.1
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, rtol=2e-5, atol=1e-6, err_msg=name)
