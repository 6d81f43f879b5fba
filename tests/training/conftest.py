import jax
import numpy as np
import pytest

from dno_jax.model.config import ModelConfig
from dno_jax.model.params import init_params
from dno_jax.training.batches import TrainingRow

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=128,
    tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def params():
    return jax.tree.map(np.asarray, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="session")
def rows():
    """16 pairs of unequal lengths with references off by a little, as after some steps."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return tuple(rng.integers(1, 96, size=rng.integers(low, high)).tolist())

    made = []
    for _ in range(16):
        prompt = ids(2, 20)
        responses = (ids(1, 24), ids(1, 24))
        reference = tuple(-4.5 * len(response) + rng.normal() for response in responses)
        made.append(TrainingRow((prompt, prompt), responses, previous_logprob=reference))
    return made
