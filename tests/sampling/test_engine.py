import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dno_jax.config import MeshSection
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.params import init_params
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import DECODE, TRAIN, Constrain, row_sharding, to_device
from dno_jax.sampling.engine import Generation, Mixture, PromptBatch, generate, prompt_bucket
from dno_jax.sampling.transforms import Truncation
from dno_jax.training.state import param_shardings

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=128,
    tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip
GENERATION = Generation(
    num_samples=3, max_new_tokens=20, end_ids=(5, 9), truncation=Truncation(temperature=0.9, top_p=0.95), seed=11
)
LENGTHS = [3, 9, 16, 1, 12, 7, 5, 8]


@pytest.fixture(scope="module")
def params():
    # Large weights make a peaked distribution, so that ends and likely tokens occur.
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(0)))


def prompt_batch(lengths=LENGTHS, *, width=16, rows=None, names=None):
    rows = rows or len(lengths)
    token, position = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
    name = np.zeros(rows, np.uint32)
    for row, length in enumerate(lengths):
        name[row] = names[row] if names is not None else row
        rng = np.random.default_rng(int(name[row]))
        token[row, :length] = rng.integers(10, 96, size=length)
        position[row, :length] = np.arange(length)
    return PromptBatch(token=jnp.asarray(token), position=jnp.asarray(position), name=jnp.asarray(name))


def run(params, batch, generation=GENERATION, *, model=None, iteration=0, mixture=None):
    found = generate(
        params,
        batch,
        model=model or Decoder(CONFIG),
        generation=generation,
        iteration=jnp.int32(iteration),
        mixture=mixture,
    )
    return jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def responses(params):
    return run(params, prompt_batch())


@jax.jit
def full_logits(params, ids):
    hidden, _ = Decoder(CONFIG).apply({"params": params}, ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None])
    return logits(CONFIG, params, hidden)[0]


def padded(ids, length=40):
    return jnp.asarray([[*ids, *[0] * (length - len(ids))]], jnp.int32)  # causal: what follows changes nothing


def test_responses_are_well_formed(responses):
    for row in range(len(LENGTHS) * 3):
        length = responses.length[row]
        tokens = responses.token[row, :length]
        assert 1 <= length <= 20
        assert np.all(responses.token[row, length:] == 0)
        assert not np.isin(tokens[:-1], GENERATION.end_ids).any()
        assert responses.stopped[row] == bool(np.isin(tokens[-1], GENERATION.end_ids))
        assert responses.stopped[row] or length == 20
    assert responses.stopped.any()
    assert not responses.stopped.all()
    by_prompt = responses.token.reshape(len(LENGTHS), 3, -1)
    assert np.any(by_prompt[:, 0] != by_prompt[:, 1])


def test_recorded_logprobs_are_the_models_at_temperature_one(params, responses):
    assert_own_logprobs(params, responses)


def assert_own_logprobs(params, responses):
    """Compare with the log-probabilities under `params` of every fifth response, read as a whole."""
    batch = prompt_batch()
    for row in range(0, 24, 5):
        prompt = np.asarray(batch.token[row // 3, : LENGTHS[row // 3]])
        answer = responses.token[row, : responses.length[row]]
        scores = np.asarray(jax.nn.log_softmax(full_logits(params, padded([*prompt, *answer]))), np.float64)
        expected = sum(scores[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
        # float32 sums of up to 20 terms of size 10, cached against teacher-forced.
        assert responses.logprob[row] == pytest.approx(expected, abs=2e-4)


def test_text_does_not_depend_on_batch_order_or_padding(params, responses):
    order = [6, 2, 0, 7, 1, 5, 3, 4]
    shuffled = run(params, prompt_batch([LENGTHS[i] for i in order], names=order))
    expected = responses.token.reshape(8, 3, -1)[order].reshape(24, -1)
    np.testing.assert_array_equal(shuffled.token, expected)
    wide = run(params, prompt_batch(width=32))
    np.testing.assert_array_equal(wide.token, responses.token)
    few = run(params, prompt_batch(LENGTHS[:3], rows=8))  # the rest is filler
    np.testing.assert_array_equal(few.token[:9], responses.token[:9])
    assert np.all(few.length[9:] == 0)
    small = run(params, prompt_batch(LENGTHS[:2]))
    np.testing.assert_array_equal(small.token, responses.token[:6])


def test_more_samples_leave_the_first_ones_alone(params, responses):
    more = run(params, prompt_batch(), dataclasses.replace(GENERATION, num_samples=5))
    np.testing.assert_array_equal(more.token.reshape(8, 5, -1)[:, :3], responses.token.reshape(8, 3, -1))


def test_iteration_and_seed_change_the_text(params, responses):
    assert np.any(run(params, prompt_batch(), iteration=1).token != responses.token)
    assert np.any(run(params, prompt_batch(), dataclasses.replace(GENERATION, seed=12)).token != responses.token)


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 4, 1)], ids=str)
def test_data_meshes_give_the_same_tokens(params, responses, axes):
    found = on_mesh(params, axes)
    np.testing.assert_array_equal(found.token, responses.token)
    np.testing.assert_array_equal(found.length, responses.length)


def test_a_tensor_axis_differs_only_where_rounding_decides(params, responses, capsys):
    found = on_mesh(params, (2, 2, 2))
    differing = np.flatnonzero(np.any(found.token != responses.token, axis=1))
    with capsys.disabled():
        print(f"\n[tensor=2: {len(differing)} of {len(found.token)} rows differ from one device]")
    # Another order of float32 sums moves logits by about 1e-6: a row parts from its twin only where a draw falls that
    # close to the border of two tokens, which for these 24 rows of at most 20 draws is not expected to happen twice.
    assert len(differing) <= 1
    same = np.setdiff1d(np.arange(24), differing)
    np.testing.assert_allclose(found.logprob[same], responses.logprob[same], atol=2e-4)


def on_mesh(params, axes, *, reference_params=None, weight=0.0):
    data, fsdp, tensor = axes
    mesh = make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor))
    shardings = param_shardings(CONFIG, mesh, DECODE)
    batch = jax.tree.map(np.asarray, prompt_batch())
    batch = to_device(batch, jax.tree.map(lambda leaf: row_sharding(mesh, ndim=leaf.ndim), batch))
    mixture = None if reference_params is None else mixed_with(jax.device_put(reference_params, shardings), weight)
    model = Decoder(CONFIG, constrain=Constrain(mesh, DECODE))
    return run(jax.device_put(params, shardings), batch, model=model, mixture=mixture)


def gathered_weights(params, layout):
    """All-gathers of whole weight matrices in the compiled sampler, by reading the program."""
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, param_shardings(CONFIG, mesh, layout))
    batch = jax.tree.map(np.asarray, prompt_batch())
    batch = to_device(batch, jax.tree.map(lambda leaf: row_sharding(mesh, ndim=leaf.ndim), batch))
    model = Decoder(CONFIG, constrain=Constrain(mesh, layout))
    text = generate.lower(placed, batch, model=model, generation=GENERATION, iteration=jnp.int32(0)).compile().as_text()
    D, F = CONFIG.hidden_size, CONFIG.intermediate_size // 2
    shapes = (f"f32[{D},{F}]", f"f32[{F},{D}]", f"f32[1,{D},{F}]", f"f32[1,{F},{D}]")
    return [line for line in text.splitlines() if " all-gather" in line and any(shape in line for shape in shapes)]


def test_no_weight_is_gathered_in_the_decode_layout(params):
    assert not gathered_weights(params, DECODE)
    assert gathered_weights(params, TRAIN)  # the check sees them where they are


def test_greedy_is_the_argmax_chain(params):
    greedy = Generation(num_samples=2, max_new_tokens=6, end_ids=(5,), truncation=Truncation(temperature=0.0), seed=0)
    found = run(params, prompt_batch(LENGTHS[:2]), greedy)
    ids = list(np.asarray(prompt_batch(LENGTHS[:2]).token[1, : LENGTHS[1]]))
    for step in range(found.length[2]):
        ids.append(int(jnp.argmax(full_logits(params, padded(ids))[len(ids) - 1])))
        assert found.token[2, step] == ids[-1]


def test_one_program_for_every_iteration(params):
    generate.clear_cache()
    for iteration in range(3):
        run(params, prompt_batch(), iteration=iteration)
    assert generate._cache_size() == 1


@pytest.fixture(scope="module")
def reference_params():
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(1)))


def mixed_with(params, weight):
    return Mixture(params=params, weight=jnp.float32(weight))


def geometric(params, reference_params, ids, *, weight, temperature=1.0):
    """Log-probabilities after every prefix of `ids`, by the formula, each policy seeing the whole sequence at once."""
    own, reference = (
        np.asarray(jax.nn.log_softmax(full_logits(each, padded(ids))), np.float64)[: len(ids)]
        for each in (params, reference_params)
    )
    unnormalised = ((1 - weight) * own + weight * reference) / temperature
    return unnormalised - np.log(np.sum(np.exp(unnormalised), axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def mixed_responses(params, reference_params):
    return run(params, prompt_batch(), mixture=mixed_with(reference_params, 0.4))


def test_the_ends_of_a_mixture_are_its_policies(params, reference_params, responses):
    own = run(params, prompt_batch(), mixture=mixed_with(reference_params, 0.0))
    jax.tree.map(np.testing.assert_array_equal, own, responses)
    reference = run(reference_params, prompt_batch())
    found = run(params, prompt_batch(), mixture=mixed_with(reference_params, 1.0))
    for field in ("token", "length", "stopped"):
        np.testing.assert_array_equal(getattr(found, field), getattr(reference, field))
    assert np.any(found.token != responses.token)
    assert_own_logprobs(params, found)


def test_a_mixtures_logprobs_are_pi_ts_own(params, mixed_responses, responses):
    assert np.mean(np.any(mixed_responses.token != responses.token, axis=1)) > 0.9  # another distribution altogether
    assert_own_logprobs(params, mixed_responses)


@pytest.mark.parametrize("weight", [0.25, 0.6])
def test_a_greedy_mixture_is_the_argmax_chain_of_the_formula(params, reference_params, weight):
    greedy = Generation(num_samples=1, max_new_tokens=12, end_ids=(), truncation=Truncation(temperature=0.0), seed=0)
    found = run(params, prompt_batch(), greedy, mixture=mixed_with(reference_params, weight))
    batch = prompt_batch()
    for row, length in enumerate(LENGTHS):
        ids = [*np.asarray(batch.token[row, :length]), *found.token[row]]
        expected = np.argmax(geometric(params, reference_params, ids, weight=weight), axis=-1)
        np.testing.assert_array_equal(found.token[row], expected[length - 1 : -1])


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.3, 0.7), (0.8, 1.0)])
def test_frequencies_are_those_of_the_geometric_mixture(params, reference_params, weight, temperature):
    """First and second token of many samples of one prompt, against probabilities computed from the formula."""
    # Far from uniform, or else every average of the two looks like every other.
    params, reference_params = ({**each, "head": 3 * each["head"]} for each in (params, reference_params))
    many = Generation(
        num_samples=20_000, max_new_tokens=2, end_ids=(), truncation=Truncation(temperature=temperature), seed=3
    )
    batch = prompt_batch([9])
    token = run(params, batch, many, mixture=mixed_with(reference_params, weight)).token
    prompt = list(np.asarray(batch.token[0, :9]))
    first = int(np.argmax(np.bincount(token[:, 0])))
    for ids, drawn in ((prompt, token[:, 0]), ([*prompt, first], token[token[:, 0] == first, 1])):
        counts = np.bincount(drawn, minlength=CONFIG.vocab_size)
        expected = np.exp(geometric(params, reference_params, ids, weight=weight, temperature=temperature)[-1])
        # The draws are fixed, so this cannot flicker; other laws fail by many orders of magnitude.
        assert fit(counts, expected) > 1e-3
        own, reference = (
            np.exp(geometric(params, reference_params, ids, weight=end, temperature=temperature)[-1]) for end in (0, 1)
        )
        assert fit(counts, (1 - weight) * own + weight * reference) < 1e-9
        swapped = geometric(params, reference_params, ids, weight=1 - weight, temperature=temperature)[-1]
        assert fit(counts, np.exp(swapped)) < 1e-9


def fit(counts, probability):
    """p-value of Pearson's chi-square, cells that expect fewer than five draws taken together."""
    expected = probability * counts.sum()
    rare = expected < 5
    assert np.sum(~rare) > 10
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return scipy.stats.chisquare(counts, expected).pvalue


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 4, 1)], ids=str)
def test_data_meshes_give_the_same_tokens_of_a_mixture(params, reference_params, mixed_responses, axes):
    found = on_mesh(params, axes, reference_params=reference_params, weight=0.4)
    np.testing.assert_array_equal(found.token, mixed_responses.token)
    np.testing.assert_allclose(found.logprob, mixed_responses.logprob, atol=2e-4)


def test_a_tensor_axis_mixes_likewise(params, reference_params, mixed_responses):
    found = on_mesh(params, (2, 2, 2), reference_params=reference_params, weight=0.4)
    differing = np.flatnonzero(np.any(found.token != mixed_responses.token, axis=1))
    assert len(differing) <= 1  # as for one policy: only where rounding decides a draw


def test_one_program_for_every_weight_and_another_without_mixture(params, reference_params):
    generate.clear_cache()
    found = [run(params, prompt_batch(), mixture=mixed_with(reference_params, weight)) for weight in (0.1, 0.9)]
    assert generate._cache_size() == 1
    assert np.any(found[0].token != found[1].token)
    run(params, prompt_batch())
    assert generate._cache_size() == 2


def test_without_mixture_there_is_no_second_cache(params, reference_params):
    rows, slots = len(LENGTHS) * GENERATION.num_samples, 16 + GENERATION.max_new_tokens

    def caches(mixture):
        """Key caches that the decode loop carries, by reading the program."""
        text = generate.lower(
            params, prompt_batch(), model=Decoder(CONFIG), generation=GENERATION, iteration=jnp.int32(0),
            mixture=mixture,
        ).as_text()  # fmt: skip
        heads, size = CONFIG.num_key_value_heads, CONFIG.head_dim
        key = f"tensor<{CONFIG.num_hidden_layers}x{rows}x{heads}x{size}x{slots}xf32>"
        return max(line.count(key) for line in text.splitlines() if "stablehlo.while" in line)

    assert (caches(None), caches(mixed_with(reference_params, 0.5))) == (1, 2)


def test_prompt_buckets_are_few_powers_of_two():
    assert [prompt_bucket(n, max_length=100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    assert len({prompt_bucket(n, max_length=4096) for n in range(1, 4097)}) == 9


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(temperature=0.0), Truncation(0.8, 30, 0.9, 0.01)])
def test_rows_of_the_embedding_without_a_token_are_never_drawn(params, truncation):
    """A tokenizer may have fewer ids than the embedding has rows; what those rows say is likeliest here."""
    num_ids = 60
    loud = params | {"head": params["head"].at[:, num_ids:].multiply(3.0)} if "head" in params else None
    assert loud is not None
    free = dataclasses.replace(GENERATION, end_ids=(), truncation=truncation)
    assert (run(loud, prompt_batch(), free).token >= num_ids).mean() > 0.5
    masked = run(loud, prompt_batch(), dataclasses.replace(free, num_ids=num_ids))
    assert masked.token.max() < num_ids
    assert len(np.unique(masked.token)) > 5
    # The record is the trainer's: a log-probability over the whole embedding.
    assert_own_logprobs(loud, masked)


def test_as_many_ids_as_rows_changes_nothing(params, responses):
    same = run(params, prompt_batch(), dataclasses.replace(GENERATION, num_ids=CONFIG.vocab_size))
    np.testing.assert_array_equal(same.token, responses.token)
