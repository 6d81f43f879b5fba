"""What mixes tokens besides attention: its rules against what they are written from, and against torch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.model.adapters import AdapterConfig, target_of
from dno_jax.model.cache import KVCache, MixerState, init_cache
from dno_jax.model.causal_conv import causal_conv, next_tail
from dno_jax.model.decoder import Decoder, logits
from dno_jax.model.delta_rule import delta_rule, delta_step, unit_lower_inverse
from dno_jax.model.params import abstract_adapters, abstract_params, unstack_layers
from dno_jax.model.places import Places
from dno_jax.model.sizes import state_bytes
from dno_jax.model.stack import layer_groups, layer_places, sections
from dno_jax.training.flops import body_params
from tests.model.families import CASES
from tests.model.hybrids import HYBRIDS, hybrid_params

B, K, V, H, P = 2, 3, 6, 8, 12


def drawn(length, *, alike=False, seed=0):
    """Queries, keys, values, log decays and strengths; `alike`: all keys nearly one, and hardly any decay."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, length, K, H))
    if alike:
        k = 1 + 0.05 * k
    decay = -np.exp(rng.normal(size=(B, length, V))) * (1e-4 if alike else 0.1)
    strength = 1 / (1 + np.exp(-3 * rng.normal(size=(B, length, V)) - (4 if alike else 0)))
    return [q, k, rng.normal(size=(B, length, V, P)), decay, strength]


def written_out(q, k, v, decay, strength, begins, state):
    """Eq. 10 of arXiv 2412.06464 token by token in float64, value head by value head."""
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    state, out = np.array(state, np.float64), np.zeros(v.shape)
    for b in range(B):
        for t in range(q.shape[1]):
            for head in range(V):
                key, query = k[b, t, head // (V // K)], q[b, t, head // (V // K)] / H**0.5
                before = np.zeros((H, P)) if begins[b, t] else state[b, head]
                gate, write = np.exp(decay[b, t, head]), strength[b, t, head]
                forget = np.eye(H) - write * np.outer(key, key)
                state[b, head] = gate * forget @ before + write * np.outer(key, v[b, t, head])
                out[b, t, head] = state[b, head].T @ query
    return out, state


def rule(parts, begins, state, **options):
    q, k, v, decay, strength = (jnp.asarray(part, jnp.float32) for part in parts)
    return jax.jit(partial(delta_rule, **options))(
        q, k, v, log_decay=decay, strength=strength, begins=jnp.asarray(begins), state=jnp.asarray(state, jnp.float32)
    )


@pytest.mark.parametrize("alike", [False, True], ids=["any keys", "keys alike"])
def test_chunks_and_single_tokens_follow_the_equation_over_300_tokens(alike):
    """Texts begin in the middle of chunks and at their edges; the last chunk is not full."""
    parts, state = drawn(300, alike=alike), np.random.default_rng(1).normal(size=(B, V, H, P))
    begins = np.zeros((B, 300), bool)
    begins[0, [17, 18, 64, 150]] = begins[1, [0, 255]] = True
    expected, last = written_out(*parts, begins, state)
    out, after = rule(parts, begins, state)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(after, last, atol=1e-5)

    def step(state, token):
        q, k, v, decay, strength, begins = token
        out, state = delta_step(q, k, v, log_decay=decay, strength=strength, begins=begins, state=state)
        return state, out

    tokens = [jnp.moveaxis(jnp.asarray(part, jnp.float32), 1, 0) for part in parts] + [jnp.asarray(begins).T]
    after, out = jax.lax.scan(step, jnp.asarray(state, jnp.float32), tuple(tokens))
    np.testing.assert_allclose(jnp.moveaxis(out, 0, 1), expected, atol=1e-5)
    np.testing.assert_allclose(after, last, atol=1e-5)


def test_the_state_goes_on_from_call_to_call():
    parts, state = drawn(100), np.zeros((B, V, H, P))
    begins = np.zeros((B, 100), bool)
    whole, last = rule(parts, begins, state)
    outs = []
    for start, stop in ((0, 33), (33, 97), (97, 100)):
        out, state = rule([part[:, start:stop] for part in parts], begins[:, start:stop], state)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=2e-6)
    np.testing.assert_allclose(state, last, atol=2e-6)


def test_gradients_of_the_rule_are_torchs():
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    parts, begins = drawn(70), np.zeros((B, 70), bool)
    weight = np.random.default_rng(2).normal(size=(B, 70, V, P)).astype(np.float32)
    given = [torch.tensor(part, dtype=torch.float32, requires_grad=True) for part in parts]
    out, _ = torch_recurrent_gated_delta_rule(*given[:3], g=given[3], beta=given[4], use_qk_l2norm_in_kernel=True)
    (out * torch.tensor(weight)).sum().backward()

    def total(parts):
        state = jnp.zeros((B, V, H, P))
        out, _ = delta_rule(*parts[:3], log_decay=parts[3], strength=parts[4], begins=jnp.asarray(begins), state=state)
        return jnp.sum(out * weight)

    found = jax.jit(jax.grad(total))([jnp.asarray(part, jnp.float32) for part in parts])
    for ours, theirs in zip(found, given, strict=True):
        scale = float(theirs.grad.abs().max())
        np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=1e-5 * scale)


def test_unit_lower_inverse_and_its_gradient():
    """All ones below the diagonal too, where powers of the matrix would be of size 1e18."""
    rng = np.random.default_rng(0)
    below = np.tril(np.stack([np.ones((64, 64)), rng.uniform(-1, 1, size=(64, 64)) / 4]), -1)
    found = unit_lower_inverse(jnp.asarray(below, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(np.eye(64) + below), atol=1e-5)
    weight = jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)

    def total(below):
        return jnp.sum(weight * unit_lower_inverse(below))

    def by_solver(below):
        return jnp.sum(weight * jnp.linalg.inv(jnp.eye(64) + below))

    small = jnp.asarray(below[1], jnp.float32)
    found, expected = jax.grad(total)(small), jnp.tril(jax.grad(by_solver)(small), -1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_convolution_sees_its_own_text_alone_and_goes_on_from_its_tail():
    """Two texts in a row and padding on either side, against numpy's convolution of each text."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 12, 5)), rng.normal(size=(5, 4))
    position = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [-1, -1, 0, 1, 2, 3, 4, 5, -1, -1, -1, -1]])
    given = [jnp.asarray(array, jnp.float32) for array in (x, kernel)]
    found = causal_conv(*given, position=jnp.asarray(position))
    for row, start, stop in ((0, 0, 5), (0, 5, 12), (1, 2, 8)):
        for channel in range(5):
            expected = np.convolve(x[row, start:stop, channel], kernel[channel, ::-1])[: stop - start]
            np.testing.assert_allclose(found[row, start:stop, channel], expected, atol=1e-5)
    # Piece by piece; what a row has of padding leaves its tail as it is.
    tail, outs = jnp.zeros((2, 3, 5)), []
    for start, stop in ((0, 8), (8, 9), (9, 12)):
        piece, places = given[0][:, start:stop], jnp.asarray(position[:, start:stop])
        outs.append(causal_conv(piece, given[1], position=places, tail=tail))
        tail = next_tail(tail, piece, position=places)
    np.testing.assert_allclose(np.concatenate(outs, axis=1)[0], found[0], atol=1e-5)
    np.testing.assert_allclose(tail[0], x[0, 9:], atol=1e-6)
    np.testing.assert_allclose(tail[1], x[1, 5:8], atol=1e-6)


def test_layers_are_cut_into_the_fewest_that_are_traced():
    lfm2 = tuple("attention" if layer in (2, 5, 8, 10, 12, 14) else "short_conv" for layer in range(16))
    qwen = ("gated_delta", "gated_delta", "gated_delta", "attention") * 8
    assert [(one.mixers, one.repeats) for one in sections(qwen)] == [(qwen[:4], 8)]
    assert sum(len(one.mixers) for one in sections(lfm2)) == 6
    rng = np.random.default_rng(0)
    for length in (1, 2, 7, 30):
        mixers = tuple(rng.choice(["attention", "short_conv"], size=length).tolist())
        found = sections(mixers)
        assert sum((one.mixers * one.repeats for one in found), ()) == mixers
        assert [one.first for one in found[1:]] == [one.end for one in found[:-1]]


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_layer_lies_where_its_group_says(name):
    """Its leaves are its mixer's, whatever is stacked with it."""
    config = HYBRIDS[name]
    own = {"attention": "q", "gated_delta": "delta_q", "short_conv": "conv_taps"}
    params = hybrid_params(name)
    apart = unstack_layers(jax.tree.map(jnp.asarray, params))["layers"]
    assert sorted(sum(layer_groups(config).values(), ())) == list(range(config.num_hidden_layers))
    for layer, (path, row) in enumerate(layer_places(config)):
        group = params["layers"]
        for key in path:
            group = group[key]
        leaf = own[config.layer_mixers[layer]]
        assert {name for name in own.values() if name in group} == {leaf}
        np.testing.assert_array_equal(apart[layer][leaf], group[leaf][row])


@pytest.mark.parametrize("name", HYBRIDS)
def test_padding_on_either_side_and_packed_texts_change_nothing(name):
    """Three texts padded before, padded after, and side by side in one row; the longest by itself too."""
    config, params = HYBRIDS[name], hybrid_params(name)

    @jax.jit
    def read(token, position, segment=None):
        hidden, _ = Decoder(config).apply({"params": params}, token, Places(position, segment))
        return logits(config, params, hidden)

    rng = np.random.default_rng(0)
    texts = [rng.integers(96, size=length) for length in (70, 9, 33)]
    before, after = np.zeros((2, 3, 80), np.int32)
    first, last = np.full((2, 3, 80), -1, np.int32)
    for row, text in enumerate(texts):
        before[row, -len(text) :], first[row, -len(text) :] = text, np.arange(len(text))
        after[row, : len(text)], last[row, : len(text)] = text, np.arange(len(text))
    before, after = read(before, first), read(after, last)
    position = np.concatenate([np.arange(len(text)) for text in texts] + [np.full(8, -1)])[None].astype(np.int32)
    segment = np.repeat(np.arange(4, dtype=np.int32), [70, 9, 33, 8])[None]
    packed = read(np.concatenate([*texts, np.zeros(8)])[None].astype(np.int32), position, segment)[0]
    alone = read(texts[0][None].astype(np.int32), np.arange(70, dtype=np.int32)[None])[0]
    np.testing.assert_allclose(after[0, :70], alone, atol=2e-5)
    for number, text in enumerate(texts):
        own = after[number, : len(text)]
        np.testing.assert_allclose(before[number, -len(text) :], own, atol=2e-5, err_msg=f"text {number}")
        np.testing.assert_allclose(packed[segment[0] == number], own, atol=2e-5, err_msg=f"text {number}")


@pytest.mark.parametrize("name", HYBRIDS)
def test_texts_that_share_a_prompt_are_refused(name):
    places = Places(*(jnp.zeros((1, 4), jnp.int32) for _ in range(3)))
    with pytest.raises(ValueError, match="share a prompt"):
        Decoder(HYBRIDS[name]).apply({"params": hybrid_params(name)}, jnp.zeros((1, 4), jnp.int32), places)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_cache_holds_what_each_mixer_needs(name, dtype):
    """Keys and values alone are in the cache's dtype; a state does not grow with the number of slots."""
    config = HYBRIDS[name]
    short, long = (init_cache(config, batch_size=3, num_slots=slots, dtype=dtype) for slots in (16, 64))
    for mixer, a, b in zip(config.layer_mixers, short, long, strict=True):
        if mixer == "attention":
            assert isinstance(a, KVCache)
            assert a.key.dtype == dtype
            assert b.key.shape[-1] == 64
        else:
            assert isinstance(a, MixerState)
            assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
            assert {leaf.dtype for leaf in jax.tree.leaves(a)} == {jnp.dtype("float32")}


def test_a_step_of_a_delta_layer_reads_no_more_of_a_longer_text():
    """Bytes by the compiler of one token's program: those of the state stay, those of keys and values grow."""
    whole = HYBRIDS["qwen3_5"]

    def bytes_read(mixers, slots):
        config = whole.__class__(**{**vars(whole), "mixers": mixers, "num_hidden_layers": 2})
        params = unstack_layers(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(config)))
        cache = init_cache(config, batch_size=4, num_slots=slots)
        one = jnp.zeros((4, 1), jnp.int32)
        step = jax.jit(lambda params, cache: Decoder(config).apply({"params": params}, one, one, cache))
        return step.lower(params, cache).compile().cost_analysis()["bytes accessed"]

    assert bytes_read(("gated_delta",) * 2, 64) == bytes_read(("gated_delta",) * 2, 4096)
    assert bytes_read(None, 4096) > 4 * bytes_read(None, 64)


SIZED = HYBRIDS | {name: CASES[name].config() for name in ("qwen3_5_odd", "glm4")}


@pytest.mark.parametrize("config", SIZED.values(), ids=SIZED)
def test_sizes_are_those_of_the_arrays(config):
    """What plans and MFU count, against the parameter tree, the adapters' and the cache."""
    leaves = [(path[-1].key, leaf.size) for path, leaf in jax.tree.leaves_with_path(abstract_params(config)["layers"])]
    multiplied = {name: target for name, _ in leaves if (target := target_of(name)) is not None}
    assert body_params(config) == sum(size for name, size in leaves if name in multiplied)
    adapters = abstract_adapters(config, AdapterConfig.of(config, rank=1, alpha=1.0))
    halves = {path[-1].key for path, _ in jax.tree.leaves_with_path(adapters)}
    assert halves == {f"{name}_b" for name in multiplied} | {f"{target}_a" for target in multiplied.values()}
    cache = jax.eval_shape(partial(init_cache, config, batch_size=1, num_slots=8))
    states = jax.tree.leaves([layer for layer in cache if isinstance(layer, MixerState)])
    assert state_bytes(config) == sum(leaf.size * 4 for leaf in states)
