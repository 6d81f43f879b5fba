"""What a decoder is, apart from its weights. How it is computed (dtype, remat, sharding) stands elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "none"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Head = Literal["logits", "reward"]
Mixer = Literal["attention", "gated_delta", "short_conv"]


@dataclass(frozen=True)
class RopeConfig:
    """One rotation by position, under the names of Hugging Face's rope_parameters. rope.py has the formulas.

    Attributes:
        rope_type: "none" rotates by nothing (NoPE).
        theta: base of the frequencies; None: the model's rope_theta.
        factor: by which the context is stretched (linear, dynamic, llama3, yarn).
        original_max_position_embeddings: context before stretching (llama3, yarn, longrope); None: the model's
            max_position_embeddings.
        low_freq_factor, high_freq_factor: wavelengths between original/high and original/low are blended (llama3).
        beta_fast, beta_slow: rotations within the original context between which frequencies are blended (yarn).
        truncate: the bounds of that range are rounded to whole dimensions (yarn).
        attention_factor: multiplies cosine and sine (yarn, longrope).
        short_factor, long_factor: divisor of each frequency, for texts up to the original context and for longer
            ones (longrope); None: ones.
    """

    rope_type: RopeType = "default"
    theta: float | None = None
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        numbers = (self.factor, self.attention_factor, self.low_freq_factor, self.beta_slow)
        if min(*numbers, *(self.short_factor or ()), *(self.long_factor or ())) <= 0:
            raise ValueError(f"{self} has a factor that is not positive")
        if self.theta is not None and self.theta <= 1:
            raise ValueError(f"rope_theta is {self.theta}; expected more than 1")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of a decoder, under the names of Hugging Face's config.json; the defaults are Llama's.

    Attributes:
        num_key_value_heads: heads of keys and values; query heads share them in groups (GQA).
        rms_norm_eps: added to the mean square (or variance) before the root.
        rope_theta: base of the rotary frequencies, where a rotation names none of its own.
        max_position_embeddings: positions the model was trained for; positions start at 0.
        head: what stands on the hidden states: logits of the next token, or one number for a whole text (a reward
            model), whose parameter is "score"; there is no "head" parameter then.
        tie_word_embeddings: the output head is the embedding table; there is no "head" parameter.
        attention_bias: q, k and v have biases.
        output_bias: o has a bias.
        mlp_bias: gate, up and down have biases.
        family: Hugging Face's model_type. It says how tensors are named in files, and nothing about arithmetic.
        hidden_act: of the gate; "gelu_tanh" is GELU's approximation by a tanh.
        norm: "layer" is a LayerNorm without parameters (OLMo 1).
        norm_offset: norms multiply by offset + weight (Gemma: 1).
        pre_norm, post_norm: whether a sublayer's input is normed, and whether its output is.
        qk_norm: queries and keys are normed over each head's dimensions ("head") or over all heads' ("all").
        attention_gate: what attention gives is multiplied by the sigmoid of a gate, of its own size, which the query
            projection gives beside the queries (Qwen 3.5).
        attention_scale: multiplies scores; None: head_dim ** -0.5.
        query_growth: (beta, n): a query at a position beyond n is multiplied by 1 + beta ln(1 + floor(position / n))
            (Ministral 3); None: by nothing.
        attention_softcap, logit_softcap: x becomes cap * tanh(x / cap), of scores and of logits; None: x.
        clip_qkv: queries, keys and values are clipped to [-clip_qkv, clip_qkv]; None: they are not.
        embed_scale, residual_scale, logit_scale: multiply embeddings, what a sublayer adds, and logits.
        mixers: of each layer, what mixes tokens: attention, a gated delta rule (Qwen 3.5) or a short convolution
            (LFM2). None: attention, everywhere.
        linear_num_key_heads, linear_num_value_heads: heads of the delta rule; each key head serves a group of
            consecutive value heads.
        linear_key_head_dim, linear_value_head_dim: sizes of its heads, hence of its state.
        conv_kernel: tokens that a convolution sees, its own included: the delta rule's, or the short one.
        conv_bias: the short convolution and its projections have biases.
        windows: of each layer, how many of the last tokens a query sees, itself included; NO_WINDOW
            (attention.py) for all. None: all, everywhere.
        ropes: the rotations that layers choose from.
        layer_ropes: of each layer, its rotation's index in `ropes`; None: the first, everywhere.
        rotary_dim: leading dimensions of a head that rotate; None: all.
        rope_length: tokens of the longest text of this run, which selects longrope's factors and dynamic's base once
            and for all. transformers selects by the longest text of each batch, so that a token's log-probability
            depends on later tokens and on neighbours; sampling, scoring and training would then disagree. None: no
            text is longer than the original context.
        num_experts: of a mixture of experts in place of every MLP, each intermediate_size wide; 0: no mixture.
        num_experts_per_tok: experts that a token goes to.
        expert_norm: the weights of a token's experts are divided by their sum (norm_topk_prob).

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
    head: Head = "logits"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    family: str = "llama"
    hidden_act: Activation = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["head", "all"] | None = None
    attention_gate: bool = False
    attention_scale: float | None = None
    query_growth: tuple[float, int] | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    clip_qkv: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    mixers: tuple[Mixer, ...] | None = None
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    conv_kernel: int = 0
    conv_bias: bool = False
    windows: tuple[int, ...] | None = None
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    layer_ropes: tuple[int, ...] | None = None
    rotary_dim: int | None = None
    rope_length: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    expert_norm: bool = True

    @property
    def context(self) -> int:
        """Tokens of the longest text that the rotations are made for.

        yarn and dynamic stretch further than max_position_embeddings where that still names the original context.
        """
        stretched = [
            int(rope.factor * (rope.original_max_position_embeddings or self.max_position_embeddings))
            for rope in self.ropes
            if rope.rope_type in ("yarn", "dynamic")
        ]
        return max(self.max_position_embeddings, *stretched, 0)

    @property
    def layer_mixers(self) -> tuple[Mixer, ...]:
        """What mixes tokens in each layer."""
        return self.mixers or ("attention",) * self.num_hidden_layers

    @property
    def attends_everywhere(self) -> bool:
        """Whether every layer is attention: no state passes from a token to the next."""
        return set(self.layer_mixers) == {"attention"}

    def __post_init__(self) -> None:
        self._check_sizes(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        rotary = self.head_dim if self.rotary_dim is None else self.rotary_dim
        name = "head_dim" if self.rotary_dim is None else "rotary_dim"
        if rotary % 2 or not 0 < rotary <= self.head_dim:
            raise ValueError(f"{name} is {rotary}; rotary positions need an even number of at most head_dim")
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            raise ValueError(f"rms_norm_eps {self.rms_norm_eps} and rope_theta {self.rope_theta} must be positive")
        for name in ("attention_scale", "attention_softcap", "logit_softcap", "clip_qkv"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if self.query_growth is not None and (self.query_growth[0] < 0 or self.query_growth[1] < 1):
            raise ValueError(f"query_growth is {self.query_growth}; expected no negative number, and a length")
        if not min(self.num_experts, 1) <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; expected at least 1 and at most num_experts "
                f"{self.num_experts}"
            )
        if self.num_experts and self.mlp_bias:
            raise ValueError("mlp_bias is true; experts have no biases")
        for name, lowest, highest in (("windows", 1, None), ("layer_ropes", 0, len(self.ropes) - 1)):
            self._check_layers(name, lowest=lowest, highest=highest)
        if self.mixers is not None:
            self._check_mixers(self.mixers)
        if self.norm == "layer" and self.qk_norm is not None:
            raise ValueError(f"qk_norm is {self.qk_norm!r}; norm 'layer' has no parameters to norm queries and keys by")
        for rope in self.ropes:
            for factors in (rope.short_factor, rope.long_factor):
                if factors is not None and len(factors) != rotary // 2:
                    raise ValueError(
                        f"short_factor and long_factor have {len(factors)} numbers; expected {rotary // 2}"
                    )

    def _check_sizes(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")

    def _check_mixers(self, mixers: tuple[Mixer, ...]) -> None:
        known = get_args(Mixer)
        if len(mixers) != self.num_hidden_layers or not set(mixers) <= set(known):
            raise ValueError(
                f"mixers is {mixers}; expected {' or '.join(known)} for each of {self.num_hidden_layers} layers"
            )
        if self.attends_everywhere:
            raise ValueError("mixers names attention alone; expected None, which says the same")
        if self.num_experts:
            raise ValueError("mixers and num_experts are both given; a mixture of experts has attention in every layer")
        if self.norm != "rms":
            raise ValueError(f"norm is {self.norm!r}; layers that are no attention have norms with parameters")
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel is {self.conv_kernel}; expected at least 2 tokens")
        if "gated_delta" not in mixers:
            return
        self._check_sizes(
            "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"
        )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_key_heads {self.linear_num_key_heads} does not divide "
                f"linear_num_value_heads {self.linear_num_value_heads}"
            )

    def _check_layers(self, name: str, *, lowest: int, highest: int | None) -> None:
        values = getattr(self, name)
        if values is None:
            return
        if len(values) != self.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(values)} entries; expected one for each of {self.num_hidden_layers} layers"
            )
        if min(values) < lowest or (highest is not None and max(values) > highest):
            raise ValueError(f"{name} is {values}; expected {lowest} to {'any' if highest is None else highest}")
