"""What a decoder is, apart from its weights. How it is computed (dtype, remat, sharding) stands elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder, under the names of Hugging Face's config.json.

    Attributes:
        num_key_value_heads: heads of keys and values; query heads share them in groups (GQA).
        rms_norm_eps: added to the mean square before the root.
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: positions the model was trained for; positions start at 0.
        tie_word_embeddings: the output head is the embedding table; there is no "head" parameter.
        attention_bias: q, k, v and o have biases.
        mlp_bias: gate, up and down have biases.

    Raises:
        ValueError: the numbers contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            raise ValueError(f"rms_norm_eps {self.rms_norm_eps} and rope_theta {self.rope_theta} must be positive")
