"""Reward models against transformers: tiny checkpoints with random weights, written by transformers."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.decoder import Decoder, rewards
from dno_jax.model.hf.families import FAMILIES
from dno_jax.model.params import abstract_params, param_axes
from tests.model import test_moe_models as moe
from tests.model.checkpoints import edit_config, edit_tensors
from tests.model.conftest import write_json
from tests.model.families import CASES, SHORT, SIZES
from tests.model.test_families import TOLERANCE, stir

# One case for each family that has reward models; the window is passed within the longest text.
TREES = {name: case.config_json for name, case in CASES.items()}
TREES |= {name: {**SIZES, **moe.COMMON, **tree} for name, tree in moe.FAMILIES.items()}
NAMES = sorted(
    {tree["model_type"]: name for name, tree in TREES.items() if FAMILIES[tree["model_type"]].reward}.values()
)
LENGTHS = (SHORT, 41, 12, 1)


@dataclass(frozen=True)
class Reference:
    """What transformers wrote, and what it makes of a batch of texts of different lengths."""

    path: Path
    token: np.ndarray  # [B, SHORT], padded on the right
    reward: np.ndarray  # [B] float32


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    @functools.cache
    def make(name: str) -> Reference:
        path = tmp_path_factory.mktemp(name)
        seed = sorted(TREES).index(name)
        config = AutoConfig.for_model(**TREES[name], num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
        stir(model, seed)
        model.save_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        pad = SIZES["pad_token_id"]
        token = np.random.default_rng(seed).integers(pad + 1, SIZES["vocab_size"], size=(len(LENGTHS), SHORT))
        for row, length in enumerate(LENGTHS):
            token[row, length:] = pad
        with torch.no_grad():
            found = model.eval()(torch.tensor(token), attention_mask=torch.tensor(token != pad)).logits
        assert found.shape == (len(LENGTHS), 1)
        return Reference(path, token, found[:, 0].numpy())

    return make


def positions(*, left: bool = False) -> np.ndarray:
    place = np.full((len(LENGTHS), SHORT), -1, np.int32)
    for row, length in enumerate(LENGTHS):
        first = SHORT - length if left else 0
        place[row, first : first + length] = np.arange(length)
    return place


def our_rewards(path: Path, token: np.ndarray, position: np.ndarray, *, dtype=jnp.float32) -> np.ndarray:
    config, params = hf.load(path, head="reward")
    token, position = jnp.asarray(token, jnp.int32), jnp.asarray(position)
    hidden, _ = Decoder(config, dtype=dtype).apply({"params": params}, token, position)
    found = rewards(params, hidden, position)
    assert found.dtype == jnp.float32
    return np.asarray(found)


@pytest.mark.parametrize("name", NAMES)
def test_rewards_equal_those_of_transformers(reference, name):
    found, tolerance = reference(name), TOLERANCE * (CASES[name].rougher if name in CASES else 1.0)
    np.testing.assert_allclose(our_rewards(found.path, found.token, positions()), found.reward, atol=tolerance, rtol=0)
    assert np.ptp(found.reward) > 0.1


def test_every_family_but_these_has_reward_models():
    without = FAMILIES.keys() - {TREES[name]["model_type"] for name in NAMES}
    assert without == {"granite", "granitemoehybrid", "ernie4_5", "lfm2"}  # transformers has no such classes


def test_padding_on_the_left_and_what_stands_on_it_changes_nothing(reference):
    found = reference("llama_gelu")
    token = np.zeros_like(found.token)
    for row, length in enumerate(LENGTHS):
        token[row, SHORT - length :] = found.token[row, :length]
        token[row, : SHORT - length] = 5
    ours = our_rewards(found.path, token, positions(left=True))
    np.testing.assert_allclose(ours, found.reward, atol=TOLERANCE, rtol=0)


def test_what_is_no_number_on_padding_stays_there():
    hidden = jnp.asarray([[[1.0, 2.0], [jnp.nan, jnp.inf]]])
    params = {"score": jnp.asarray([[3.0], [0.5]])}
    assert rewards(params, hidden, jnp.asarray([[0, -1]])).tolist() == [4.0]
    assert np.isnan(rewards(params, hidden, jnp.asarray([[0, 1]]))[0])


def test_bfloat16_is_near(reference):
    """Rewards of order one lie some 1 to 3 % away, as logits do; see test_families."""
    found = reference("qwen3")
    ours = our_rewards(found.path, found.token, positions(), dtype=jnp.bfloat16)
    assert 0 < np.abs(ours - found.reward).max() < 0.06


def test_the_tree_has_a_score_and_no_head(reference):
    found = reference("llama")
    config, params = hf.load(found.path, head="reward")
    assert not config.tie_word_embeddings
    assert params["score"].shape == (SIZES["hidden_size"], 1)
    assert "head" not in params
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    assert param_axes(config)["score"] == ("embed", "labels")


@pytest.fixture
def checkpoint(reference, tmp_path):
    """A copy that tests may spoil."""
    found = reference("llama")
    for file in found.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_files_are_checked_before_anything_is_read(checkpoint, monkeypatch):
    assert hf.check(checkpoint, head="reward") == (checkpoint / "model.safetensors",)
    monkeypatch.setattr("dno_jax.model.hf.files.TensorFiles._slice", None)

    def refused(edit, words):
        before = (checkpoint / "model.safetensors").read_bytes()
        edit_tensors(checkpoint, edit)
        for ask in (hf.check, hf.load):
            with pytest.raises(DnoError, match=re.escape(words)):
                ask(checkpoint, head="reward")
        (checkpoint / "model.safetensors").write_bytes(before)

    width = SIZES["hidden_size"]
    refused(lambda t: t.pop("score.weight"), f"tensor score.weight is missing; expected shape (1, {width})")
    refused(
        lambda t: t.update({"score.weight": np.zeros((2, width), "f4")}),
        f"score.weight has shape (2, {width}); config.json says (1, {width})",
    )
    refused(lambda t: t.update({"lm_head.weight": np.zeros((97, width), "f4")}), "unexpected tensor lm_head.weight")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"id2label": {"0": "A", "1": "B", "2": "C"}, "label2id": ...},
            "num_labels is 3; a reward model has 1, the reward",
        ),
        ({"id2label": ..., "label2id": ...}, "num_labels is 2 (what transformers assumes where neither"),
        ({"num_labels": 5}, "num_labels is 5; a reward model has 1"),
        ({"num_labels": True}, "num_labels is True; a reward model has 1"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "a reward model of llama supports ['LlamaForSequenceClassification']",
        ),
        ({"model_type": "granite"}, "granite has no reward models"),
        ({"classifier_dropout": 2}, "classifier_dropout is 2; expected a share"),
    ],
)
def test_a_config_that_is_no_reward_models_is_refused(checkpoint, changes, words):
    edit_config(checkpoint, **changes)
    with pytest.raises(DnoError, match=re.escape(words)):
        hf.check(checkpoint, head="reward")


def test_labels_and_padding_as_checkpoints_write_them(checkpoint):
    expected = hf.read_config(checkpoint, head="reward")
    edit_config(checkpoint, id2label=..., label2id=..., num_labels=1, problem_type="regression", architectures=None)
    assert hf.read_config(checkpoint, head="reward") == expected
    assert hf.read_pad_token_id(checkpoint) == SIZES["pad_token_id"]
    edit_config(checkpoint, pad_token_id=...)
    assert hf.read_pad_token_id(checkpoint) is None


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(checkpoint):
    with pytest.raises(DnoError, match="llama supports \\['LlamaForCausalLM'\\]"):
        hf.load(checkpoint)
    tree = json.loads((checkpoint / "config.json").read_text())
    write_json(checkpoint / "config.json", {key: value for key, value in tree.items() if key != "architectures"})
    with pytest.raises(DnoError, match=r"tensor lm_head\.weight is missing"):
        hf.load(checkpoint)
