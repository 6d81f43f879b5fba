"""What is said of a training's health, and the count of its arithmetic."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.params import abstract_params
from dno_jax.parallel.chips import CHIPS
from dno_jax.run_dir import RunDir
from dno_jax.training.flops import Work, body_params, forward_flops, peak_flops, train_flops, work_of
from dno_jax.training.health import Health
from dno_jax.training.metrics import Course, MetricsWriter, NotFinite, skipped_before
from dno_jax.training.objectives import OWN, OWN_SQUARES
from dno_jax.training.packing import TextLengths
from dno_jax.training.skipping import keep_if_finite
from dno_jax.training.state import TrainState


@pytest.fixture
def said():
    return []


@pytest.fixture
def health(said):
    return Health("train 0", said.append)


def row(**changes):
    return {"loss": 0.5, "grad_norm": 1.0, "response_tokens": 80.0, "responses": 8.0, "chosen_shift": 0.0} | changes


def test_kl_is_half_the_mean_square_of_the_own_samples_log_ratios(health):
    rng = np.random.default_rng(0)
    # Of a Gaussian log-ratio with KL(pi_t || pi) = s^2/2 exactly: E = -s^2/2, variance s^2.
    s = 0.05
    ratio = rng.normal(-(s**2) / 2, s, size=200_000)
    found = health.look(0, row(**{OWN: ratio.size, OWN_SQUARES: float(np.sum(ratio**2))}))
    assert found["kl"] == pytest.approx(s**2 / 2, rel=0.02)
    assert OWN not in found
    assert "kl" not in health.look(1, row(**{OWN: 0.0, OWN_SQUARES: 0.0}))  # nobody's samples


@pytest.mark.parametrize(
    ("sick", "word"),
    [
        ({"chosen_shift": -0.2}, "chosen responses have lost 0.11 nats a token"),
        ({OWN: 8.0, OWN_SQUARES: 8.0 * 30.0}, "KL divergence"),  # 15 nats a response of 10 tokens
        ({"tied": 1.0}, "every pair of the batch ties"),
        ({"grad_norm": 0.0}, "the gradient is zero"),
    ],
)
def test_an_alarm_is_sounded_once_and_counted(health, said, sick, word):
    for step in range(40):
        assert health.look(step, row())["alarms"] == 0
    found = [health.look(40 + step, row(**sick)) for step in range(60)]
    assert len(said) == 1
    assert word in said[0]
    assert "train 0, step " in said[0]
    assert [entry["alarms"] for entry in found] == sorted(entry["alarms"] for entry in found)
    assert found[-1]["alarms"] == 1


def test_healthy_numbers_and_a_single_outlier_sound_nothing(health, said):
    for step in range(60):
        health.look(step, row(chosen_shift=-1.0 if step == 30 else 0.05, tied=0.9, step_seconds=0.1))
    assert said == []


def test_a_slow_step_is_told_and_jitter_is_a_figure(health, said):
    for step in range(30):
        found = health.look(step, row(step_seconds=60.0 if step == 0 else 2.0))  # the first is compiled
    assert found["jitter"] == pytest.approx(0.0)
    health.look(30, row(step_seconds=30.0))
    assert "it took 30 s, 15 times the median" in said[0]
    for step in range(31, 36):
        found = health.look(step, row(step_seconds=4.0))
    assert found["jitter"] == pytest.approx(1.0)


# --- steps that are skipped


def state(value):
    return TrainState(step=jnp.int32(4), params={"a": jnp.float32(value)}, opt_state=(jnp.int32(7), jnp.float32(value)))


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (0.5, np.inf), (np.inf, np.nan)])
def test_a_step_that_is_no_number_changes_nothing_and_is_counted_on(loss, norm):
    stepped = TrainState(jnp.int32(5), {"a": jnp.float32(np.nan)}, (jnp.int32(8), jnp.float32(np.nan)))
    metrics = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}
    kept, found = jax.jit(keep_if_finite)(state(2.0), stepped, metrics)
    assert jax.tree.map(float, (kept.params, kept.opt_state)) == ({"a": 2.0}, (7, 2.0))
    assert int(kept.step) == 5
    assert float(found["skipped"]) == 1.0
    kept, found = keep_if_finite(state(2.0), state(3.0), {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)})
    assert (float(kept.params["a"]), float(found["skipped"])) == (3.0, 0.0)


def test_so_many_steps_are_skipped_and_one_more_stops_training_also_after_a_restart(tmp_path, capsys):
    run_dir = RunDir(tmp_path)

    def writer(course):
        return MetricsWriter(run_dir, course, enabled=True)

    course = Course(1, "train", max_skipped=2)
    first = writer(course)
    for step, loss in enumerate([0.5, np.nan, 0.4]):
        first.write(step, row(loss=loss, skipped=float(np.isnan(loss))), names=[f"pair-{step}"])
    first.close()
    assert first.last["loss"] == 0.4
    assert "step 1: the loss is nan" in capsys.readouterr().err
    course = Course(1, "train", first_step=3, max_skipped=2)
    assert skipped_before(run_dir, course) == 1
    second = writer(Course(1, "train", first_step=3, max_skipped=2, skipped=1))
    second.write(3, row(loss=np.nan, skipped=1.0), names=["pair-3"])
    second.write(4, row(loss=np.nan, skipped=1.0), names=["pair-4"])
    with pytest.raises(NotFinite) as told:
        second.flush()
    assert (told.value.step, told.value.skipped) == (4, 2)
    assert "pair-3" in capsys.readouterr().err


# --- arithmetic

CONFIGS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mixture": {"num_experts": 4, "num_experts_per_tok": 4},  # all of them: what is computed is what there is
}


def model(**changes):
    numbers = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    return ModelConfig(**numbers | changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_n_is_the_number_of_all_weights_but_the_embeddings_and_vectors(name):
    config = model(**CONFIGS[name])
    leaves = jax.tree.leaves_with_path(abstract_params(config)["layers"])
    matrices = [leaf.size for path, leaf in leaves if not path[-1].key.endswith("norm")]
    assert body_params(config) == sum(matrices)


def test_of_a_mixture_the_experts_that_a_token_meets_count():
    one, four = model(num_experts=4, num_experts_per_tok=1), model(num_experts=4, num_experts_per_tok=4)
    assert body_params(four) - body_params(one) == 3 * 3 * 3 * 32 * 64


def test_forward_is_what_the_compiler_counts():
    """Between causal attention and all of T x T, and a few per cent for norms, rotations and the softmax."""
    config, length = model(hidden_size=128, intermediate_size=512, head_dim=32, num_hidden_layers=1), 64
    token = jnp.zeros((1, length), jnp.int32)

    def forward(params):
        hidden, _ = Decoder(config).apply({"params": params}, token, jnp.arange(length)[None])
        return logits(config, params, hidden)

    counted = jax.jit(forward).lower(abstract_params(config)).compile().cost_analysis()["flops"]
    causal, whole = (Work(length, seen, length) for seen in (length * (length + 1) // 2, length**2))
    assert forward_flops(config, causal) < counted < 1.05 * forward_flops(config, whole)


def lengths(prompt, response):
    prompt, response = np.asarray(prompt), np.asarray(response)
    return TextLengths(prompt, response, np.ones(len(prompt), bool))


@pytest.mark.parametrize("windows", [None, (5, 5, 5), (3, 100, 7)])
@pytest.mark.parametrize("share", [False, True])
def test_work_is_what_counting_one_by_one_gives(windows, share):
    config = model(windows=windows)
    texts = lengths([[6, 6], [4, 4]], [[3, 9], [1, 2]])
    tokens, seen = set(), set()
    for pair, side in itertools.product(range(2), range(2)):
        before, whole = texts.prompt[pair, side], texts.prompt[pair, side] + texts.response[pair, side]
        for query in range(whole):
            owner = (pair, None if share and query < before else side, query)
            tokens.add(owner)
            for layer in range(3):
                window = windows[layer] if windows else whole
                seen |= {(owner, layer, key) for key in range(query + 1) if query - key < window}
    assert work_of(config, texts, share_prompt=share) == Work(len(tokens), len(seen), 15)


def test_training_is_three_passes_and_adapters_spare_the_weights_gradients():
    config, work = model(), Work(tokens=100, seen=5_000, predicted=40)
    n, attention, head = body_params(config), 4 * 4 * 8 * 5_000, 2 * 32 * 96 * 40
    assert forward_flops(config, work) == 2 * n * 100 + attention + head
    assert train_flops(config, work) == 6 * n * 100 + 3 * attention + 3 * head
    adapters = 1_000
    assert train_flops(config, work, adapter_params=adapters) == 4 * n * 100 + 3 * attention + 2 * head + 6e5


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of it, at most
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_peaks_of_devices_by_their_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_mfu_is_flops_by_time_and_peak_and_is_left_out_where_no_peak_is_known(tmp_path):
    for peak in (None, 4e12):
        writer = MetricsWriter(RunDir(tmp_path), Course(0, "train", peak=peak), enabled=False)
        writer.write(0, row(), names=[], flops=2e9)
        writer.flush()
        assert writer.last["tflops_per_second"] == pytest.approx(2e-3 / writer.last["step_seconds"])
        assert writer.last.get("mfu") == (peak and pytest.approx(2e9 / writer.last["step_seconds"] / peak))
    assert max(chip.flops for chip in CHIPS) < 1e16
