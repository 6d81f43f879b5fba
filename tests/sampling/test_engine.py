import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.model.attention import NO_WINDOW
from dno_jax.model.cache import init_cache, reaches
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.params import init_params, unstack_layers
from dno_jax.parallel.cache import ShardedWrite
from dno_jax.parallel.mesh import make_mesh, one_device_mesh
from dno_jax.parallel.sharding import DECODE, TRAIN, Constrain, row_sharding, to_device
from dno_jax.sampling import decode as programs
from dno_jax.sampling import engine
from dno_jax.sampling.engine import Statistics, generate
from dno_jax.sampling.requests import Request, SamplingParams
from dno_jax.sampling.state import CompiledPrograms, EngineShape, Mixture, prompt_bucket, start
from dno_jax.sampling.transforms import Truncation
from dno_jax.training.state import param_shardings

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=128,
    tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip
GENERATION = SamplingParams(
    num_samples=3, max_new_tokens=20, end_ids=(5, 9), truncation=Truncation(temperature=0.9, top_p=0.95), seed=11
)
LENGTHS = [3, 9, 16, 1, 12, 7, 5, 8]
SIZES = EngineShape(slots=5, prompt_length=16, entries=3, fill_rows=2, prefill_chunk=16, chunk_steps=7)


@pytest.fixture(scope="module")
def params():
    # Large weights make a peaked distribution, so that ends and likely tokens occur.
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(0)))


def request(name, length):
    rng = np.random.default_rng(name)
    return Request(tuple(rng.integers(10, 96, size=length).tolist()), name)


REQUESTS = [request(name, length) for name, length in enumerate(LENGTHS)]


def programs_of(sampling_params=GENERATION, *, shape=SIZES, model=None, mesh=None, record_drawn=False):
    mesh = mesh or one_device_mesh()
    return CompiledPrograms(model or Decoder(CONFIG), sampling_params, shape, mesh, record_drawn)


def run(
    params, requests=REQUESTS, sampling_params=GENERATION, *, iteration=0, mixture=None, stop=None, statistics=None,
    **static,
):  # fmt: skip
    """The responses of every request, in the requests' order."""
    programs = programs_of(sampling_params, **static)
    given = {"iteration": iteration, "mixture": mixture, "stop": stop, "statistics": statistics}
    found = list(generate(params, requests, programs, **given))
    assert sorted(finished.index for finished in found) == list(range(len(requests)))
    by_index = {finished.index: finished.responses for finished in found}
    return [by_index[index] for index in range(len(requests))]


def ids(responses):
    return [[one.token_ids for one in own] for own in responses]


def flat(responses):
    return [one for own in responses for one in own]


@pytest.fixture(scope="module")
def responses(params):
    return run(params)


@jax.jit
def full_logits(params, token):
    hidden, _ = Decoder(CONFIG).apply({"params": params}, token, jnp.arange(token.shape[1], dtype=jnp.int32)[None])
    return logits(CONFIG, params, hidden)[0]


def padded(token, length=40):
    return jnp.asarray([[*token, *[0] * (length - len(token))]], jnp.int32)  # causal: what follows changes nothing


def scores_of(params, prompt, answer, *, read=full_logits):
    """log pi(token | prefix) of every token of an answer, the whole text read at once."""
    scores = np.asarray(jax.nn.log_softmax(read(params, padded([*prompt, *answer]))), np.float64)
    return [scores[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]


def assert_own_logprobs(params, responses, *, requests=REQUESTS, read=full_logits):
    for item, own in zip(requests, responses, strict=True):
        for one in own:
            expected = scores_of(params, item.token_ids, one.token_ids, read=read)
            # Logits reach 20 here; cached against teacher-forced, each is a sum in another order.
            np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


def test_responses_are_well_formed(responses):
    for own in responses:
        assert len(own) == 3
    for one in flat(responses):
        assert 1 <= len(one.token_ids) <= 20
        assert len(one.logprobs) == len(one.token_ids)
        assert one.drawn_logprobs is None
        assert not set(one.token_ids[:-1]) & set(GENERATION.end_ids)
        assert (one.finish == "stop") == (one.token_ids[-1] in GENERATION.end_ids)
        assert one.finish == "stop" or len(one.token_ids) == 20
    assert {one.finish for one in flat(responses)} == {"stop", "length"}
    assert {one.token_ids[-1] for one in flat(responses)} >= set(GENERATION.end_ids)  # several end ids, both seen
    assert any(own[0].token_ids != own[1].token_ids for own in responses)


def test_recorded_logprobs_are_the_models_at_temperature_one(params, responses):
    """24 responses through 5 slots: all but the first five were drawn in refilled ones."""
    assert_own_logprobs(params, responses)


def test_logprobs_with_sliding_windows(params):
    config = dataclasses.replace(CONFIG, windows=(6, NO_WINDOW))
    model = Decoder(config)

    @jax.jit
    def read(params, token):
        hidden, _ = model.apply({"params": params}, token, jnp.arange(token.shape[1], dtype=jnp.int32)[None])
        return logits(config, params, hidden)[0]

    found = run(params, model=model)
    assert_own_logprobs(params, found, read=read)
    assert ids(found) != ids(run(params))  # the window is felt


@pytest.mark.parametrize("slots", [1, 3, 8, 24])
def test_text_does_not_depend_on_the_number_of_slots(params, responses, slots):
    assert ids(run(params, shape=dataclasses.replace(SIZES, slots=slots))) == ids(responses)


@pytest.mark.parametrize("chunk_steps", [1, 32])
def test_text_does_not_depend_on_the_chunk(params, responses, chunk_steps):
    assert ids(run(params, shape=dataclasses.replace(SIZES, chunk_steps=chunk_steps))) == ids(responses)


@pytest.mark.parametrize(("entries", "fill_rows"), [(1, 1), (2, 1), (8, 8)])
def test_text_does_not_depend_on_the_queue(params, responses, entries, fill_rows):
    shape = dataclasses.replace(SIZES, entries=entries, fill_rows=fill_rows)
    assert ids(run(params, shape=shape)) == ids(responses)


def test_text_does_not_depend_on_order_padding_or_the_longest_prompt(params, responses):
    assert ids(run(params, REQUESTS[::-1])) == ids(responses)[::-1]
    assert ids(run(params, REQUESTS[2:5])) == ids(responses)[2:5]
    assert ids(run(params, shape=dataclasses.replace(SIZES, prompt_length=60))) == ids(responses)


def test_one_column_a_slot_to_spare_is_not_needed(params, responses):
    """Bitwise: the same numbers, not only the same text, where the same slots decode in another order."""
    again = run(params, REQUESTS[::-1])
    assert [one.logprobs for one in flat(again[::-1])] == [one.logprobs for one in flat(responses)]


@pytest.mark.soak
def test_samples_that_share_a_prefill_equal_separate_ones(params):
    sampling_params = dataclasses.replace(GENERATION, num_samples=5)
    together = ids(run(params, sampling_params=sampling_params))
    for sample in range(5):
        alone = run(params, sampling_params=dataclasses.replace(sampling_params, num_samples=1, first_sample=sample))
        assert [own[0] for own in ids(alone)] == [own[sample] for own in together]


def test_a_prompt_in_pieces_is_the_prompt(params):
    long = [request(100 + length, length) for length in (40, 17, 33, 5, 48)]
    whole = run(params, long, shape=dataclasses.replace(SIZES, prompt_length=50, prefill_chunk=64))
    for piece in (16, 7):
        shape = dataclasses.replace(SIZES, prompt_length=50, prefill_chunk=piece)
        assert ids(run(params, long, shape=shape)) == ids(whole)


def assert_close(found, expected):
    """They are the same text, and numbers that differ as float32 sums in another order do."""
    assert ids(found) == ids(expected)
    for one, other in zip(flat(found), flat(expected), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.soak)])
def test_a_prompt_beside_a_longer_one_is_the_prompt(params, kv_dtype):
    """Also of a rounded cache: what is attended is what the cache holds, whether it is read there or not."""
    pair = [REQUESTS[2], request(140, 40)]
    shape = dataclasses.replace(SIZES, prompt_length=50, kv_dtype=kv_dtype)
    beside = run(params, pair, shape=shape)
    assert_close(run(params, pair[:1], shape=shape), beside[:1])
    assert_close(run(params, pair, shape=dataclasses.replace(shape, prefill_chunk=64)), beside)


def test_iteration_and_seed_change_the_text(params, responses):
    assert ids(run(params, iteration=1)) != ids(responses)
    assert ids(run(params, sampling_params=dataclasses.replace(GENERATION, seed=12))) != ids(responses)


def test_prompts_come_when_they_are_finished(params):
    """The generator is asked for no more than it gives: requests are taken as there is room for them."""
    taken = []

    def coming():
        for item in [request(200 + i, 4) for i in range(40)]:
            taken.append(item.name)
            yield item

    found = generate(params, coming(), programs_of())
    next(found)
    assert len(taken) < 30
    found.close()


@pytest.mark.parametrize(
    "axes",
    [pytest.param((8, 1, 1), marks=pytest.mark.soak), pytest.param((1, 8, 1), marks=pytest.mark.soak), (2, 4, 1)],
    ids=str,
)
def test_data_meshes_give_the_same_tokens(params, responses, axes):
    assert ids(on_mesh(params, axes)) == ids(responses)


WIDER = dataclasses.replace(CONFIG, vocab_size=512, hidden_size=64, intermediate_size=172, num_attention_heads=8)


@pytest.mark.soak
def test_how_many_rows_a_product_has_decides_roundings_and_little_else(capsys):
    """XLA's products of few rows add up in another order than those of many, from some width on."""
    # so wide that a text is no foregone conclusion: fresh weights say the same at every token
    weights = jax.tree.map(lambda leaf: 8.0 * leaf if leaf.ndim > 1 else leaf, init_params(WIDER, jax.random.key(0)))
    requests = [request(number, 1 + number % 16) for number in range(30)]
    sampling_params = dataclasses.replace(GENERATION, max_new_tokens=64, end_ids=(1,))

    def drawn(slots, *, order=1, **changes):
        shape = dataclasses.replace(SIZES, slots=slots, entries=24, fill_rows=4, **changes)
        return flat(run(weights, requests[::order], sampling_params, shape=shape, model=Decoder(WIDER))[::order])

    many = drawn(64)
    for alike in (drawn(64, order=-1), drawn(96, chunk_steps=32)):
        assert [one.token_ids for one in alike] == [one.token_ids for one in many]
    few = drawn(5)
    same = [(one, other) for one, other in zip(few, many, strict=True) if one.token_ids == other.token_ids]
    for one, other in same:
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-3)
    with capsys.disabled():
        print(f"[5 slots or 64: {len(many) - len(same)} of {len(many)} texts differ] ", end="")
    assert len(same) >= 0.95 * len(many)


def test_a_tensor_axis_differs_only_where_rounding_decides(params, responses, capsys):
    programs.decode.clear_cache()
    found = on_mesh(params, (4, 1, 2))
    assert programs.decode._cache_size() == 1  # what a call gives lies as what it is given
    differing = sum(one.token_ids != other.token_ids for one, other in zip(flat(found), flat(responses), strict=True))
    with capsys.disabled():
        print(f"\n[tensor=2: {differing} of {len(flat(found))} responses differ from one device]")
    # Another order of float32 sums moves logits by about 1e-6: a row parts from its twin only where a draw falls that
    # close to the border of two tokens, which for these 24 rows of at most 20 draws is not expected to happen twice.
    assert differing <= 1
    for one, other in zip(flat(found), flat(responses), strict=True):
        if one.token_ids == other.token_ids:
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def laid_out(params, axes, *, layout=DECODE, config=CONFIG):
    data, fsdp, tensor = axes
    mesh = make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor))
    model = Decoder(config, constrain=Constrain(mesh, layout), write=ShardedWrite(mesh, layout))
    return mesh, model, jax.device_put(params, param_shardings(config, mesh, layout))


def on_mesh(params, axes, *, reference_params=None, weight=0.0):
    mesh, model, placed = laid_out(params, axes)
    mixture = None
    if reference_params is not None:
        mixture = mixed_with(jax.device_put(reference_params, param_shardings(CONFIG, mesh, DECODE)), weight)
    shape = dataclasses.replace(SIZES, slots=2, entries=1, fill_rows=1)
    return run(placed, shape=shape, model=model, mesh=mesh, mixture=mixture)


def compiled_decode(params, *, mesh, model, sampling_params=GENERATION, shape=SIZES, mixture=None):
    identity = CompiledPrograms(model, sampling_params, shape, mesh)
    policies = tuple(map(unstack_layers, (params,) if mixture is None else (params, mixture.params)))
    state, outputs = start(identity, policies=len(policies))
    marks = to_device(np.zeros(outputs.length.shape, bool), row_sharding(mesh, ndim=1))
    lowered = programs.decode.lower(
        policies,
        state,
        outputs,
        jnp.float32(0.0),
        fresh=marks,
        cancelled=marks,
        programs=identity,
    )
    return lowered.compile(), state, outputs


def collectives(text):
    """Shapes that collectives of a compiled program give, by kind."""
    found = {}
    for line in text.splitlines():
        if match := re.search(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", line):
            found.setdefault(match[2], []).append(match[1])
    return found


def numbers(shape):
    """How many numbers the largest array of a shape such as (f32[2,3]{1,0}, pred[]) has."""
    return max(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shape))


def test_no_weight_is_gathered_in_the_decode_layout():
    config = dataclasses.replace(CONFIG, vocab_size=4096)  # large: a small table is gathered to be looked up in
    params = init_params(config, jax.random.key(0))
    smallest = CONFIG.hidden_size * CONFIG.num_key_value_heads * CONFIG.head_dim // 2  # a key matrix, halved

    def gathered(layout):
        mesh, model, placed = laid_out(params, (2, 2, 2), layout=layout, config=config)
        text = compiled_decode(placed, mesh=mesh, model=model)[0].as_text()
        found = collectives(text).get("all-gather", [])
        return {numbers(shape) for shape in found if numbers(shape) >= smallest}

    drawn_from = {SIZES.slots * config.vocab_size}  # whole rows of logits, which are split by vocabulary
    assert gathered(DECODE) == drawn_from
    assert gathered(TRAIN) - drawn_from  # the check sees weights where they are


def test_rows_need_nothing_of_each_other(params):
    """Without a tensor axis all that crosses devices is a word: whether to go on, and how far attention reads."""
    mesh, model, placed = laid_out(params, (4, 2, 1))
    found = collectives(compiled_decode(placed, mesh=mesh, model=model)[0].as_text())
    assert found
    assert all(numbers(shape) <= 8 for shapes in found.values() for shape in shapes), found


def test_the_cache_is_given_away_and_never_copied(params):
    """The outputs, which the host reads while the next call runs, are what a call holds twice."""
    shape = dataclasses.replace(SIZES, slots=64, prompt_length=64)
    programs, state, outputs = compiled_decode(params, mesh=one_device_mesh(), model=Decoder(CONFIG), shape=shape)
    stats = programs.memory_analysis()
    size = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        for name, tree in {"state": state, "outputs": outputs}.items()
    }
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.slots.text.cache))
    assert stats.alias_size_in_bytes >= size["state"] - 256  # all but its counters
    assert stats.output_size_in_bytes - stats.alias_size_in_bytes <= size["outputs"] + 4096
    assert stats.temp_size_in_bytes < cache


def test_a_call_runs_while_the_one_before_is_read(params, monkeypatch):
    """Also what gathers its outputs from several processes stands in line before the next call, not behind it."""
    order = []

    def noted(name):
        real = getattr(engine, name)

        def call(*args, **options):
            if not order or order[-1] != name:
                order.append(name)
            return real(*args, **options)

        monkeypatch.setattr(engine, name, call)

    for name in ("decode", "_whole", "_on_host"):
        noted(name)
    statistics = Statistics()
    run(params, statistics=statistics)
    calls = statistics.decode_calls
    assert calls > 3
    assert order == ["decode", "_whole", *["decode", "_whole", "_on_host"] * (calls - 1)]


@pytest.mark.parametrize(("count", "most"), [(6, 1), (10, 2), (36, 5)])
def test_prompts_are_dealt_evenly_to_the_row_shards(params, count, most):
    mesh, model, _ = laid_out(params, (8, 1, 1))
    shape = EngineShape(slots=8, prompt_length=16, entries=8, fill_rows=4)
    books = engine._Books.open([request(i, 4) for i in range(count)], CompiledPrograms(model, GENERATION, shape, mesh))
    calls = []
    while (prompts := books.next_prompts()) is not None:
        calls.append((prompts.length > 0).sum())
    dealt = [len(shard.places) for shard in books.shards]
    assert sum(dealt) == sum(calls) == count
    assert (min(dealt), max(dealt)) == (count // 8, most)
    assert len(calls) == -(-count // 32)  # whole calls where there are so many


def test_greedy_is_the_argmax_chain(params):
    greedy = SamplingParams(
        num_samples=1, max_new_tokens=6, end_ids=(5,), truncation=Truncation(temperature=0.0), seed=0
    )
    for item, (one,) in zip(REQUESTS[:3], run(params, REQUESTS[:3], greedy), strict=True):
        chain = list(item.token_ids)
        for token in one.token_ids:
            assert token == int(jnp.argmax(full_logits(params, padded(chain))[len(chain) - 1]))
            chain.append(token)


def test_limits_end_responses(params):
    endless = dataclasses.replace(GENERATION, end_ids=(96,), max_total_tokens=18)  # an id that there is none of
    for item, own in zip(REQUESTS, run(params, sampling_params=endless), strict=True):
        for one in own:
            assert len(one.token_ids) == min(20, 18 - len(item.token_ids))
            assert one.finish == "length"


def test_few_programs_whatever_comes(params):
    """One for decoding, one a padded length of prompts; iterations, requests, weights and order compile nothing."""
    for function in (programs.fill, programs.decode):
        function.clear_cache()
    many = [request(300 + i, 1 + i % 40) for i in range(60)]
    shape = dataclasses.replace(SIZES, prompt_length=40, prefill_chunk=40)
    for iteration in range(2):
        run(params, many, shape=shape, iteration=iteration)
    run(params, many[::-1], shape=shape)
    assert programs.decode._cache_size() == 1
    assert programs.fill._cache_size() == 3  # 16, 32 and 40


def test_statistics_count_what_was_of_use(params):
    statistics = Statistics()
    found = run(params, [request(i, 4) for i in range(40)], statistics=statistics)
    assert statistics.tokens == statistics.busy_slot_steps == sum(len(one.token_ids) for one in flat(found))
    assert 0.85 < statistics.utilisation <= 1.0  # slots idle only while the last responses end
    assert statistics.slot_steps % SIZES.slots == 0


def test_stop_strings_cut_and_free_the_slot(params, responses):
    """Here a text is its ids in words; it ends at the first id 40 to 49."""

    def stop(index, token):
        for count, one in enumerate(token):
            if 40 <= one < 50:
                return count + 1, " ".join(map(str, token[:count]))
        return None

    statistics = Statistics()
    found = run(params, stop=stop, statistics=statistics)
    assert statistics.tokens < statistics.busy_slot_steps  # a chunk may run past the end; nobody sees it
    cut = 0
    for one, whole in zip(flat(found), flat(responses), strict=True):
        expected = stop(0, whole.token_ids)
        if expected is None:
            assert (one.token_ids, one.finish, one.text) == (whole.token_ids, whole.finish, None)
        else:
            cut += 1
            assert one.token_ids == whole.token_ids[: expected[0]]
            assert one.logprobs == pytest.approx(whole.logprobs[: expected[0]], abs=1e-5)
            assert (one.finish, one.text) == ("stop", expected[1])
    assert 5 < cut < 24
    for chunk_steps in (1, 32):
        again = run(params, stop=stop, shape=dataclasses.replace(SIZES, chunk_steps=chunk_steps))
        assert [(one.token_ids, one.text) for one in flat(again)] == [(one.token_ids, one.text) for one in flat(found)]


def test_no_token_is_looked_at_twice(params, responses):
    """Every call brings a token here, so a response is looked at once a token, whoever else keeps the host looking."""
    looked = Counter()

    def stop(index, token):
        looked[index, tuple(token)] += 1

    found = run(params, stop=stop, shape=dataclasses.replace(SIZES, chunk_steps=1))
    assert ids(found) == ids(responses)
    assert looked == Counter(
        (index, one[:count]) for index, own in enumerate(ids(found)) for one in own for count in range(1, len(one) + 1)
    )


def test_logprobs_of_the_distribution_drawn_from(params):
    sampling_params = dataclasses.replace(
        GENERATION, truncation=Truncation(temperature=0.7, top_k=20, top_p=0.8, min_p=0.02)
    )
    found = run(params, sampling_params=sampling_params, record_drawn=True)
    assert_own_logprobs(params, found)
    for item, own in zip(REQUESTS[:3], found, strict=False):
        one = own[0]
        scores = np.asarray(full_logits(params, padded([*item.token_ids, *one.token_ids])), np.float64) / 0.7
        for i, token in enumerate(one.token_ids):
            expected = truncated(scores[len(item.token_ids) - 1 + i], top_k=20, top_p=0.8, min_p=0.02)[token]
            assert one.drawn_logprobs[i] == pytest.approx(np.log(expected), abs=1e-4)


def truncated(scores, *, top_k, top_p, min_p):
    """Probabilities after top-k, top-p and min-p, by sorting."""
    order = np.argsort(-scores, kind="stable")
    probability = np.exp(scores - scores.max())
    kept = np.zeros(len(scores), bool)
    kept[order[:top_k]] = True
    probability = np.where(kept, probability, 0.0)
    ahead = np.cumsum(probability[order]) - probability[order]
    nucleus = np.zeros(len(scores), bool)
    nucleus[order] = ahead < top_p * probability.sum()
    kept &= nucleus & (probability >= min_p)
    return np.where(kept, probability, 0.0) / probability[kept].sum()


@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=0.7),
        # One rule at a time: test_transforms.py has the laws of each.
        pytest.param(Truncation(), marks=pytest.mark.soak),
        pytest.param(Truncation(repetition_penalty=2.0), marks=pytest.mark.soak),
        pytest.param(Truncation(temperature=0.5), marks=pytest.mark.soak),
        pytest.param(Truncation(top_k=7), marks=pytest.mark.soak),
        pytest.param(Truncation(top_p=0.6), marks=pytest.mark.soak),
        pytest.param(Truncation(min_p=0.1), marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_frequencies_through_the_whole_engine(params, truncation):
    """First token of many samples of two prompts, against exact probabilities."""
    sampling_params = SamplingParams(num_samples=6_000, max_new_tokens=1, end_ids=(96,), truncation=truncation, seed=3)
    shape = dataclasses.replace(SIZES, slots=512, entries=2)
    for item, own in zip(REQUESTS[1:3], run(params, REQUESTS[1:3], sampling_params, shape=shape), strict=True):
        scores = np.asarray(full_logits(params, padded(item.token_ids))[len(item.token_ids) - 1], np.float64)
        seen, penalty = np.unique(item.token_ids), truncation.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        exact = truncated(
            scores / truncation.temperature,
            top_k=truncation.top_k or len(scores),
            top_p=truncation.top_p,
            min_p=truncation.min_p,
        )
        counts = np.bincount([one.token_ids[0] for one in own], minlength=CONFIG.vocab_size)
        assert counts[exact == 0].sum() == 0
        # The draws are fixed, so this cannot flicker.
        assert fit(counts, exact) > 1e-3


def test_samples_and_steps_are_independent():
    """Contingency tables of draws that stand next to each other.

    All tokens look alike to this model, so that the next one's distribution is the same whatever was drawn.
    """
    config = dataclasses.replace(CONFIG, vocab_size=6, num_hidden_layers=1)
    params = init_params(config, jax.random.key(2))
    params = {
        **params,
        "embed": jnp.broadcast_to(params["embed"][:1], params["embed"].shape),
        "head": params["head"] * 5,
    }
    sampling_params = SamplingParams(num_samples=6_000, max_new_tokens=3, end_ids=(6,), truncation=Truncation(), seed=4)
    shape = dataclasses.replace(SIZES, slots=512, entries=2, chunk_steps=32)
    pair = [Request((1, 2, 3), 0), Request((4, 5), 1)]
    found = run(params, pair, sampling_params, shape=shape, model=Decoder(config))
    token_PKN = np.asarray([[one.token_ids for one in own] for own in found])
    for one, other in (
        (token_PKN[:, 0::2], token_PKN[:, 1::2]),  # samples k and k + 1
        (token_PKN[:, :-1, 1:], token_PKN[:, 1:, :-1]),  # shifted by a sample and a step
        (token_PKN[:, :, :-1:2], token_PKN[:, :, 1::2]),  # steps n and n + 1
        (token_PKN[:, :, 0], token_PKN[:, :, 2]),
        (token_PKN[0], token_PKN[1]),  # prompts
    ):
        table = np.zeros((6, 6))
        np.add.at(table, (one.ravel(), other.ravel()), 1)
        assert table.min() > 5
        # The draws are fixed, so this cannot flicker.
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


LONG = SamplingParams(
    num_samples=1, max_new_tokens=100, end_ids=(96,), truncation=Truncation(temperature=0.9, top_p=0.95), seed=11
)
LONG_REQUESTS = [request(100 + length, length) for length in (40, 17, 33, 5, 48)]
WINDOWED = dataclasses.replace(CONFIG, windows=(6, NO_WINDOW))


@pytest.fixture(scope="module")
def long_sizes():
    """Of prompts in pieces; texts outgrow two of the three ends up to which attention reads the cache."""
    shape = dataclasses.replace(SIZES, prompt_length=50)
    assert reaches(shape.prompt_length + LONG.max_new_tokens) == (64, 128, 150)
    return shape


@pytest.fixture(scope="module")
def long_responses(params, long_sizes):
    return run(params, LONG_REQUESTS, LONG, shape=long_sizes, model=Decoder(WINDOWED))


def test_logprobs_of_long_texts_with_prompts_in_pieces_and_sliding_windows(params, long_responses):
    @jax.jit
    def read(params, token):
        position = jnp.arange(token.shape[1], dtype=jnp.int32)[None]
        return logits(WINDOWED, params, Decoder(WINDOWED).apply({"params": params}, token, position)[0])[0]

    for item, (one,) in zip(LONG_REQUESTS, long_responses, strict=True):
        text = [*item.token_ids, *one.token_ids]
        scores = np.asarray(jax.nn.log_softmax(read(params, padded(text, 150))), np.float64)
        expected = scores[np.arange(len(item.token_ids), len(text)) - 1, one.token_ids]
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


@pytest.mark.soak
def test_long_texts_depend_on_neither_slots_order_nor_mesh_and_take_few_programs(params, long_sizes, long_responses):
    shape = dataclasses.replace(long_sizes, slots=2, chunk_steps=32)
    again = run(params, LONG_REQUESTS[::-1], LONG, shape=shape, model=Decoder(WINDOWED))
    assert ids(again[::-1]) == ids(long_responses)
    mesh, model, placed = laid_out(params, (4, 2, 1), config=WINDOWED)
    for function in (programs.fill, programs.decode):
        function.clear_cache()
    for requests in (LONG_REQUESTS, LONG_REQUESTS[1:], LONG_REQUESTS[3:4], LONG_REQUESTS[1:2]):
        spread = run(placed, requests, LONG, shape=shape, model=model, mesh=mesh)
        assert ids(spread) == [
            own for item, own in zip(LONG_REQUESTS, ids(long_responses), strict=True) if item in requests
        ]
    assert programs.decode._cache_size() == 1
    assert programs.fill._cache_size() == 3  # one piece of 16, two and four


def test_a_repetition_penalty_remembers_prompt_and_response(params):
    """So strong that nothing comes twice, nor anything of the prompt: the penalised logit is far below all others."""
    truncation = Truncation(temperature=0.0, repetition_penalty=1e6)
    sampling_params = SamplingParams(num_samples=1, max_new_tokens=20, end_ids=(96,), truncation=truncation, seed=0)
    shifted = {**params, "head": params["head"]}
    for item, (one,) in zip(REQUESTS, run(shifted, sampling_params=sampling_params), strict=True):
        scores = np.asarray(full_logits(params, padded([*item.token_ids, *one.token_ids])))
        seen = set(item.token_ids)
        for i, token in enumerate(one.token_ids):
            row = scores[len(item.token_ids) - 1 + i].copy()
            for old in seen:
                row[old] = row[old] / 1e6 if row[old] > 0 else row[old] * 1e6
            assert token == int(np.argmax(row))
            seen.add(token)


@pytest.mark.parametrize(
    ("kv_dtype", "bound"),
    # A number keeps 8 bits of mantissa, 8 bits of the largest of its column, 4 bits of mantissa.
    [
        pytest.param("bfloat16", 0.1, marks=pytest.mark.soak),
        ("int8", 0.1),
        pytest.param("float8_e4m3fn", 0.8, marks=pytest.mark.soak),
    ],
)
def test_smaller_caches_err_by_their_rounding_alone(params, kv_dtype, bound, capsys):
    found = run(params, shape=dataclasses.replace(SIZES, kv_dtype=kv_dtype))

    @jax.jit
    def rounded(params, token):
        """Every token read at once, keys and values rounded as the cache rounds them."""
        cache = init_cache(CONFIG, batch_size=1, num_slots=token.shape[1], dtype=jnp.dtype(kv_dtype))
        position = jnp.arange(token.shape[1], dtype=jnp.int32)[None]
        return logits(CONFIG, params, Decoder(CONFIG).apply({"params": params}, token, position, cache)[0])[0]

    def errors(read):
        each = [
            abs(np.asarray(one.logprobs) - scores_of(params, item.token_ids, one.token_ids, read=read))
            for item, own in zip(REQUESTS, found, strict=True)
            for one in own
        ]
        return np.concatenate(each)

    exact, own = errors(full_logits), errors(rounded)
    with capsys.disabled():
        print(f"\n[{kv_dtype}: log-probs differ by {exact.mean():.1e}, at most {exact.max():.1e}]")
    assert 1e-5 < exact.mean() < bound  # the cache is of that dtype, and no worse than that
    # Sums in another order put a number that lies on a border on its other side, now and then.
    assert np.mean(own < 1e-4) > 0.9, np.quantile(own, [0.5, 0.9, 0.95, 1.0])


@pytest.fixture(scope="module")
def reference_params():
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(1)))


def mixed_with(params, weight):
    return Mixture(params=params, weight=jnp.float32(weight))


def geometric(params, reference_params, token, *, weight, temperature=1.0):
    """Log-probabilities after every prefix, by the formula, each policy seeing the whole sequence at once."""
    own, reference = (
        np.asarray(jax.nn.log_softmax(full_logits(each, padded(token))), np.float64)[: len(token)]
        for each in (params, reference_params)
    )
    unnormalised = ((1 - weight) * own + weight * reference) / temperature
    return unnormalised - np.log(np.sum(np.exp(unnormalised), axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def mixed_responses(params, reference_params):
    return run(params, mixture=mixed_with(reference_params, 0.4))


def test_the_ends_of_a_mixture_are_its_policies(params, reference_params, responses):
    own = run(params, mixture=mixed_with(reference_params, 0.0))
    assert ids(own) == ids(responses)
    for found, expected in zip(flat(own), flat(responses), strict=True):  # two programs: they may round apart
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    reference = run(reference_params)
    found = run(params, mixture=mixed_with(reference_params, 1.0))
    assert ids(found) == ids(reference)
    assert ids(found) != ids(responses)
    assert_own_logprobs(params, found)


def test_a_mixtures_logprobs_are_pi_ts_own(params, mixed_responses, responses):
    same = sum(a.token_ids == b.token_ids for a, b in zip(flat(mixed_responses), flat(responses), strict=True))
    assert same < 3  # another distribution altogether
    assert_own_logprobs(params, mixed_responses)


@pytest.mark.parametrize("weight", [0.25, 0.6])
def test_a_greedy_mixture_is_the_argmax_chain_of_the_formula(params, reference_params, weight):
    greedy = SamplingParams(
        num_samples=1, max_new_tokens=12, end_ids=(96,), truncation=Truncation(temperature=0.0), seed=0
    )
    found = run(params, sampling_params=greedy, mixture=mixed_with(reference_params, weight))
    for item, (one,) in zip(REQUESTS, found, strict=True):
        text = [*item.token_ids, *one.token_ids]
        expected = np.argmax(geometric(params, reference_params, text, weight=weight), axis=-1)
        np.testing.assert_array_equal(one.token_ids, expected[len(item.token_ids) - 1 : -1])


@pytest.mark.soak
@pytest.mark.parametrize(
    ("weight", "temperature"),
    [(0.3, 1.0), (0.3, 0.7), (0.8, 1.0)],
)
def test_frequencies_are_those_of_the_geometric_mixture(params, reference_params, weight, temperature):
    """First and second token of many samples of one prompt, against probabilities computed from the formula."""
    # Far from uniform, or else every average of the two looks like every other.
    params, reference_params = ({**each, "head": 3 * each["head"]} for each in (params, reference_params))
    many = SamplingParams(
        num_samples=20_000, max_new_tokens=2, end_ids=(96,), truncation=Truncation(temperature=temperature), seed=3
    )
    shape = dataclasses.replace(SIZES, slots=1024)
    ((*own,),) = run(params, REQUESTS[1:2], many, shape=shape, mixture=mixed_with(reference_params, weight))
    token, prompt = np.asarray([one.token_ids for one in own]), list(REQUESTS[1].token_ids)
    first = int(np.argmax(np.bincount(token[:, 0])))
    for text, drawn in ((prompt, token[:, 0]), ([*prompt, first], token[token[:, 0] == first, 1])):
        counts = np.bincount(drawn, minlength=CONFIG.vocab_size)
        expected = np.exp(geometric(params, reference_params, text, weight=weight, temperature=temperature)[-1])
        # The draws are fixed, so this cannot flicker; other laws fail by many orders of magnitude.
        assert fit(counts, expected) > 1e-3
        own_law, reference_law = (
            np.exp(geometric(params, reference_params, text, weight=end, temperature=temperature)[-1]) for end in (0, 1)
        )
        assert fit(counts, (1 - weight) * own_law + weight * reference_law) < 1e-9
        swapped = geometric(params, reference_params, text, weight=1 - weight, temperature=temperature)[-1]
        assert fit(counts, np.exp(swapped)) < 1e-9


def fit(counts, probability):
    """p-value of Pearson's chi-square, cells that expect fewer than five draws taken together."""
    expected = probability * counts.sum()
    rare = expected < 5
    assert np.sum(~rare) > 3
    if rare.any() and expected[rare].sum() > 0:
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        counts, expected = counts[~rare], expected[~rare]
    return scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


@pytest.mark.parametrize("axes", [pytest.param((8, 1, 1), marks=pytest.mark.soak), (2, 4, 1)], ids=str)
def test_data_meshes_give_the_same_tokens_of_a_mixture(params, reference_params, mixed_responses, axes):
    assert ids(on_mesh(params, axes, reference_params=reference_params, weight=0.4)) == ids(mixed_responses)


def test_one_program_for_every_weight_and_another_without_mixture(params, reference_params):
    programs.decode.clear_cache()
    found = [run(params, mixture=mixed_with(reference_params, weight)) for weight in (0.1, 0.9)]
    assert programs.decode._cache_size() == 1
    assert ids(found[0]) != ids(found[1])
    run(params)
    assert programs.decode._cache_size() == 2


def test_without_mixture_there_is_no_second_cache(params, reference_params):
    def cache_bytes(policies):
        state, _ = start(CompiledPrograms(Decoder(CONFIG), GENERATION, SIZES, one_device_mesh()), policies=policies)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state.slots.text.cache))

    assert cache_bytes(2) == 2 * cache_bytes(1)


def test_prompt_buckets_are_few_powers_of_two():
    assert [prompt_bucket(n, max_length=100, piece=512) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    assert len({prompt_bucket(n, max_length=4096, piece=4096) for n in range(1, 4097)}) == 9
    assert [prompt_bucket(n, max_length=700, piece=256) for n in (200, 300, 600)] == [256, 512, 768]


@pytest.mark.parametrize(
    "truncation",
    [
        pytest.param(Truncation(), marks=pytest.mark.soak),
        pytest.param(Truncation(temperature=0.0), marks=pytest.mark.soak),
        Truncation(0.8, 30, 0.9, 0.01),
    ],
)
def test_rows_of_the_embedding_without_a_token_are_never_drawn(params, truncation):
    """A tokenizer may have fewer ids than the embedding has rows; what those rows say is likeliest here."""
    num_ids = 60
    loud = params | {"head": params["head"].at[:, num_ids:].multiply(3.0)}
    free = dataclasses.replace(GENERATION, end_ids=(96,), truncation=truncation)
    drawn = np.concatenate([one.token_ids for one in flat(run(loud, sampling_params=free))])
    assert (drawn >= num_ids).mean() > 0.5
    masked = run(loud, sampling_params=dataclasses.replace(free, num_ids=num_ids))
    drawn = np.concatenate([one.token_ids for one in flat(masked)])
    assert drawn.max() < num_ids
    assert len(np.unique(drawn)) > 5
    # The record is the trainer's: a log-probability over the whole embedding.
    assert_own_logprobs(loud, masked)


def test_as_many_ids_as_rows_changes_nothing(params, responses):
    assert run(params, sampling_params=dataclasses.replace(GENERATION, num_ids=CONFIG.vocab_size)) == responses


@pytest.mark.parametrize(
    ("requests", "sampling_params", "message"),
    [
        ([Request((), 0)], {}, r"request 0 has a prompt of 0 tokens"),
        ([REQUESTS[0], request(9, 17)], {}, r"request 1 has a prompt of 17 tokens; the cache holds prompts of 1 to 16"),
        ([request(1, 9)], {"max_total_tokens": 9}, r"max_total_tokens is 9, which leaves no room for a response"),
    ],
)
def test_prompts_that_cannot_be_answered(params, requests, sampling_params, message):
    with pytest.raises(ValueError, match=message):
        run(params, requests, dataclasses.replace(GENERATION, **sampling_params))


def test_a_requests_own_limit(params, responses):
    limits = [1, 7, None, 40, 3, 12, 20, 5]
    requests = [dataclasses.replace(item, max_new_tokens=limit) for item, limit in zip(REQUESTS, limits, strict=True)]
    for own, whole, limit in zip(run(params, requests), responses, limits, strict=True):
        for one, other in zip(own, whole, strict=True):
            assert one.token_ids == other.token_ids[:limit]
            assert one.finish == ("stop" if one.token_ids[-1] in GENERATION.end_ids else "length")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"end_ids": ()}, "end_ids is empty"),
    ],
)
def test_generations_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GENERATION, **fields)


@pytest.mark.parametrize(
    ("fields", "message"), [({"slots": 0}, "slots is 0"), ({"fill_rows": 9}, "holds only 3 entries")]
)
def test_sizes_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **fields)


def test_nothing_asked_is_nothing_done(params):
    assert run(params, []) == []


def test_a_policy_that_gives_no_numbers_gives_no_data(params):
    broken = {**params, "final_norm": params["final_norm"] * jnp.nan}
    with pytest.raises(DnoError, match="are not finite"):
        run(broken)
    with pytest.raises(DnoError, match="are not finite"):
        run(params, mixture=mixed_with(broken, 0.4))
