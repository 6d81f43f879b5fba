"""How much arithmetic a model's training asks for, and how much of it a chip can do: the two sides of MFU.

What is counted is what the model needs, on tokens that are no padding; what is recomputed to save memory is not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from dno_jax.model.config import ModelConfig
from dno_jax.model.sizes import mixer_flops, mixer_params
from dno_jax.parallel.chips import chip_of
from dno_jax.training.packing import TextLengths


def peak_flops(device_kind: str) -> float | None:
    """The peak of a device by jax's name for its kind; None where it is not known, as of CPUs and of parts of a GPU."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.flops


@dataclass(frozen=True)
class Work:
    """What a model has to go through.

    Attributes:
        tokens: that are no padding; a prompt that several responses share counts once where it is computed once.
        seen: (query, key) that attention joins, summed over layers.
        predicted: tokens whose probability is asked for: the output head runs on these.
    """

    tokens: int
    seen: int
    predicted: int


def work_of(config: ModelConfig, lengths: TextLengths, *, share_prompt: bool = False) -> Work:
    """Count the work of some texts, each attended to causally within the layers' windows."""
    prompt, whole = lengths.prompt, lengths.prompt + lengths.response
    again = np.where(lengths.same_prompt, prompt.shape[1] - 1, 0) if share_prompt else np.zeros(len(prompt), int)
    tokens = int(whole.sum() - (again * prompt[:, 0]).sum())
    longest = (int(whole.max(initial=1)),) * config.num_hidden_layers
    kinds = zip(config.windows or longest, config.layer_mixers, strict=True)
    windows = Counter(window for window, mixer in kinds if mixer == "attention")
    seen = sum(
        layers * (_seen(whole, window).sum() - (again * _seen(prompt[:, 0], window)).sum())
        for window, layers in windows.items()
    )
    return Work(tokens, int(seen), int(lengths.response.sum()))


def _seen(length: np.ndarray, window: int) -> np.ndarray:
    """Pairs of a query and a key at or before it, at most `window` keys per query."""
    inside = np.minimum(length, window).astype(np.int64)
    return inside * (inside + 1) // 2 + (length - inside) * np.int64(window)


def body_params(config: ModelConfig) -> int:
    """Numbers of the matrices that a token is multiplied by in all layers: N. Of a mixture, those of its experts."""
    mixers = sum(mixer_params(config, mixer) for mixer in config.layer_mixers)
    experts = config.num_experts_per_tok if config.num_experts else 1
    mlp = 3 * config.intermediate_size * experts + config.num_experts  # and the router
    return mixers + config.num_hidden_layers * config.hidden_size * mlp


def _without_weights(config: ModelConfig, work: Work) -> float:
    """FLOPs of a forward pass that no matrix of weights has a part in: attention, and what other mixers do."""
    mixers = sum(mixer_flops(config, mixer) for mixer in config.layer_mixers)
    return float(4 * config.num_attention_heads * config.head_dim * work.seen + mixers * work.tokens)


def forward_flops(config: ModelConfig, work: Work) -> float:
    """FLOPs of log-probabilities: a pass of the reference. A multiplication and its addition are two."""
    head = config.hidden_size * config.vocab_size if config.head == "logits" else 0  # a reward reads few tokens
    return float(2 * body_params(config) * work.tokens + _without_weights(config, work) + 2 * head * work.predicted)


def train_flops(config: ModelConfig, work: Work, *, adapter_params: int | None = None) -> float:
    """FLOPs of a training step: forward, and the gradients of what flows and of what is trained.

    Args:
        adapter_params: numbers of the adapters' matrices where these alone are trained: no gradient of the base's
            weights is needed, and 4 N stands in the place of 6 N. What has no weights, as attention, costs the same.
    """
    forward = forward_flops(config, work)
    if adapter_params is None:
        return 3 * forward
    return 2 * forward + _without_weights(config, work) + 6 * adapter_params * work.tokens
