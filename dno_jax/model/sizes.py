"""What the layers of a model ask for, counted from its config: numbers of matrices, arithmetic, bytes of state."""

from __future__ import annotations

from dno_jax.model.config import Mixer, ModelConfig


def attention_layers(config: ModelConfig) -> int:
    """How many layers keep keys and values."""
    return config.layer_mixers.count("attention")


def mixer_params(config: ModelConfig, mixer: Mixer) -> int:
    """Numbers of the matrices that a token is multiplied by to mix it with others."""
    D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if mixer == "attention":
        return D * H * (2 * N + 2 * K + (N if config.attention_gate else 0))
    if mixer == "short_conv":
        return 4 * D * D
    key, value = _widths(config)
    return D * (2 * key + 3 * value + 2 * config.linear_num_value_heads)


def mixer_flops(config: ModelConfig, mixer: Mixer) -> int:
    """FLOPs a token that no matrix of weights and no length has a part in: a delta rule's, a convolution's."""
    if mixer == "attention":
        return 0
    if mixer == "short_conv":
        return (2 * config.conv_kernel + 2) * config.hidden_size
    key, value = _widths(config)
    # Decay, read, write and query of each number of the state.
    return 7 * value * config.linear_key_head_dim + 2 * config.conv_kernel * (2 * key + value)


def mixer_width(config: ModelConfig, mixer: Mixer) -> int:
    """Numbers that a token leaves behind in a layer's mixer, for a backward pass."""
    if mixer == "attention":
        heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
        return (heads + (config.num_attention_heads if config.attention_gate else 0)) * config.head_dim
    if mixer == "short_conv":
        return 4 * config.hidden_size
    key, value = _widths(config)
    return 4 * key + 4 * value


def state_bytes(config: ModelConfig) -> int:
    """Bytes that one text takes, however long, in the layers that are no attention (cache.MixerState)."""
    key, value = _widths(config)
    tail = 4 * (config.conv_kernel - 1)
    each = {
        "attention": 0,
        "short_conv": tail * config.hidden_size,
        "gated_delta": tail * (2 * key + value) + 4 * value * config.linear_key_head_dim,
    }
    return sum(each[mixer] for mixer in config.layer_mixers)


def _widths(config: ModelConfig) -> tuple[int, int]:
    """Channels of the delta rule's keys, and of its values."""
    return (
        config.linear_num_key_heads * config.linear_key_head_dim,
        config.linear_num_value_heads * config.linear_value_head_dim,
    )
