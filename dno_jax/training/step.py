"""The sharded training step: forward, loss, gradient accumulation, update. Everything here is pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt32

from dno_jax.logprobs import einsum_float32
from dno_jax.model.block import LOAD
from dno_jax.model.config import ModelConfig
from dno_jax.model.decoder import Decoder, head_logprobs
from dno_jax.model.moe import ExpertLoad, busiest_share, load_balance_loss
from dno_jax.model.parts import Constrain, identity
from dno_jax.training.accumulation import accumulated, groups_apart, in_groups, summed_over
from dno_jax.training.batches import PairBatch
from dno_jax.training.objectives import RowLoss
from dno_jax.training.rounding import stored, widened
from dno_jax.training.skipping import keep_if_finite
from dno_jax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]


def response_logprobs(
    hidden: Float[Array, "R T D"],
    params: Any,
    part: PairBatch,
    *,
    config: ModelConfig,
    chunk: int,
    constrain: Constrain = identity,
) -> Float[Array, "P C"]:
    """Return log pi(y|x) of each text, nats: the sum over response tokens. Policy and reference both come from here.

    Args:
        hidden: after the final norm.
        params: of the decoder, for its output head.
        part: one micro-batch; a text without response tokens gives 0.
        chunk: tokens per slice of the output head, on each device.
        constrain: the decoder's, which says where rows and head lie.
    """
    count, width = part.weight.shape[0], part.num_tokens.shape[1]
    window = jnp.take_along_axis(hidden, jnp.asarray(part.source)[..., None], axis=1)
    text = jnp.asarray(part.text)
    token = jnp.asarray(part.response_token)
    logprob = head_logprobs(config, params, window, token, chunk=chunk, valid=text >= 0, constrain=constrain)
    # Masked sums: a scatter would fail where rows are split over devices.
    own = text[None] == jnp.arange(count * width, dtype=text.dtype)[:, None, None]
    return jnp.sum(jnp.where(own, logprob[None], 0.0), axis=(1, 2)).reshape(count, width)


def text_rewards(hidden: Float[Array, "R T D"], params: Any, part: PairBatch) -> Float[Array, "P C"]:
    """Return r(x, y) of each text: what a reward model's score is of the hidden state before its last token.

    That token is one that no text has: rows put it behind what is read (data/labelled.py), so that the state is that of
    the text's own last token, as transformers' classifiers have it.

    Args:
        hidden: after the final norm.
        params: of a decoder whose head is "reward".
        part: one micro-batch.
    """
    count, width = part.weight.shape[0], part.num_tokens.shape[1]
    text = jnp.asarray(part.text)
    # The tokens of a text stand side by side: its last is followed by another text's, by padding, or by nothing.
    last = (text >= 0) & (text != jnp.pad(text[:, 1:], ((0, 0), (0, 1)), constant_values=-1))
    window = jnp.take_along_axis(hidden, jnp.asarray(part.source)[..., None], axis=1)
    score = einsum_float32("rwd,dl->rwl", window, params["score"].astype(hidden.dtype))[..., 0]
    # Masked sums: a scatter would fail where rows are split over devices.
    own = last[None] & (text[None] == jnp.arange(count * width, dtype=text.dtype)[:, None, None])
    return jnp.sum(jnp.where(own, score[None], 0.0), axis=(1, 2)).reshape(count, width)


def variables_of(trained: Any, frozen: Any = None) -> dict[str, Any]:
    """Return what the decoder is applied to: parameters that are trained, or adapters beside parameters that are not.

    Args:
        trained: the decoder's parameters; of adapters where there are frozen ones.
        frozen: the decoder's parameters, which no gradient reaches, or None.
    """
    return {"params": trained} if frozen is None else {"params": frozen, "adapters": trained}


def batch_logprobs(
    model: Decoder, params: Any, part: PairBatch, *, chunk: int, frozen: Any = None
) -> Float[Array, "P C"]:
    """Return log pi(y|x) of every text of a micro-batch; of a reward model r(x, y)."""
    return _logprobs_and_load(model, variables_of(params, frozen), part, chunk=chunk)[0]


def _logprobs_and_load(
    model: Decoder, variables: dict[str, Any], part: PairBatch, *, chunk: int
) -> tuple[Float[Array, "P C"], ExpertLoad | None]:
    """Return log pi(y|x) of every text, or r(x, y), and every layer's load of experts; None where there are none."""
    left: Any
    places = jax.tree.map(jnp.asarray, part.places)
    (hidden, _), left = model.apply(variables, jnp.asarray(part.token), places, mutable=["intermediates"])
    load = left["intermediates"]["layers"][LOAD][0] if model.config.num_experts else None
    if model.config.head == "reward":
        return text_rewards(hidden, variables["params"], part), load
    own: Any = {"config": model.config, "constrain": model.constrain}
    return response_logprobs(hidden, variables["params"], part, chunk=chunk, **own), load


@dataclass(frozen=True)
class StepConfig:
    """What the compiled step is made of: equal ones are one program.

    Attributes:
        model: with its mesh, layout and kernels.
        optimizer: made with a learning rate of 1, which the step multiplies its updates by.
        row_loss: the loss of each row, unreduced.
        chunk: tokens per slice of the output head, on each device.
        places: shardings of the next state's arrays, in their order, so that it lies as the state before and is no
            argument to compile for again; None leaves them to the compiler.
        load_balance_weight: of the load-balance loss of a mixture of experts, which is added to what is minimised and
            not to `loss`. It is no sum over tokens: with micro-batches, the mean of theirs by tokens is minimised.
        skips: whether a step without a finite loss and gradient leaves parameters and moments as they are.
    """

    model: Decoder
    optimizer: optax.GradientTransformation
    row_loss: RowLoss
    chunk: int
    load_balance_weight: float = 0.0
    places: tuple[jax.sharding.Sharding, ...] | None = None
    skips: bool = False


@partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def train_step(
    state: TrainState,
    batch: PairBatch,
    learning_rate: Float[Array, ""],
    *,
    config: StepConfig,
    frozen: Any = None,
    rounding: UInt32[ArrayLike, " 2"] | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one optimiser step on the weighted mean loss of a batch.

    The mean is over the whole batch however many micro-batches compute it: gradients of weighted sums are added up and
    divided once by the whole weight.

    Args:
        batch: its rows of tokens over (data, fsdp, expert).
        learning_rate: multiplies the optimiser's updates.
        frozen: the decoder's parameters where the state's are adapters beside them, else None.
        rounding: the training's Threefry key, by which parameters and moments that are held in bfloat16 are rounded;
            the step and the array are folded in here. None where all are float32.

    Returns:
        The next state and scalars: loss, grad_norm, the loss's own metrics (weighted means), response_tokens, and
        max_abs_log_ratio, the largest |log pi/pi_t| of a response in the batch before the update, nats (of a reward
        model the largest |r|). For a mixture of experts also load_balance and busiest_expert of the whole batch
        (moe.load_balance_loss, busiest_share).
    """
    apart = groups_apart(config.model.constrain.mesh, parts=batch.token.shape[0])
    total_weight = jnp.maximum(jnp.sum(batch.weight), 1e-9)
    total_tokens = jnp.maximum(jnp.sum(batch.places.position >= 0), 1)

    def weighted_loss(params: Any, frozen: Any, part: PairBatch) -> tuple[Array, tuple[Metrics, ExpertLoad | None]]:
        found = _logprobs_and_load(config.model, variables_of(params, frozen), part, chunk=config.chunk)
        # A pair's texts may lie in different groups, each of which then goes on with the whole pair.
        logprob, load = cast(tuple[Array, ExpertLoad | None], summed_over(found, apart))
        loss, metrics = config.row_loss(logprob, part.num_tokens, part)
        weight = part.weight / total_weight
        summed = {name: jnp.sum(weight * value) for name, value in {"loss": loss, **metrics}.items()}
        ratio = jnp.abs(logprob - part.previous_logprob)
        summed["max_abs_log_ratio"] = jnp.max(jnp.where(part.weight[:, None] > 0, ratio, 0.0))
        total = summed["loss"]
        if load is not None and config.load_balance_weight:
            share = jax.lax.psum(jnp.sum(part.places.position >= 0), apart) / total_tokens
            total = total + config.load_balance_weight * share * load_balance_loss(load)
        return total, jax.lax.stop_gradient((summed, load))

    gradient = jax.grad(weighted_loss, has_aux=True)

    def sums(params: Any, frozen: Any, batch: PairBatch) -> tuple[Any, tuple[Metrics, ExpertLoad | None]]:
        # Added up in float32, whatever parameters are held in.
        grads, found = accumulated(lambda part: widened(gradient(params, frozen, part)), batch)
        return jax.lax.psum(grads, apart), found

    if apart:
        specs = (PartitionSpec(), PartitionSpec(), batch.specs(apart))
        sums = in_groups(sums, config.model.constrain.mesh, axes=apart, in_specs=specs)
    grads, (metrics, load) = sums(state.params, frozen, batch)
    largest = jnp.max(metrics.pop("max_abs_log_ratio"), axis=0)
    metrics, load = jax.tree.map(partial(jnp.sum, axis=0), (metrics, load))
    metrics["max_abs_log_ratio"] = largest

    updates, opt_state = config.optimizer.update(grads, state.opt_state, state.params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    if load is not None:
        metrics |= {"load_balance": load_balance_loss(load), "busiest_expert": busiest_share(load)}
    metrics["response_tokens"] = jnp.sum(batch.num_tokens * (batch.weight > 0)[..., None]).astype(jnp.float32)
    params = optax.apply_updates(widened(state.params), jax.tree.map(lambda update: learning_rate * update, updates))
    params, opt_state = stored((params, opt_state), like=(state.params, state.opt_state), key=rounding, step=state.step)
    stepped = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    if config.places is not None:
        places = jax.tree.unflatten(jax.tree.structure(stepped), config.places)
        stepped = jax.lax.with_sharding_constraint(stepped, places)
    return keep_if_finite(state, stepped, metrics) if config.skips else (stepped, metrics)


@partial(jax.jit, static_argnames=("model", "chunk"))
def score_step(params: Any, batch: PairBatch, *, model: Decoder, chunk: int, frozen: Any = None) -> Float[Array, "P C"]:
    """Return the log-probabilities of a batch under a policy that stands: the reference of the next training.

    Args:
        batch: of one micro-batch.
    """
    return batch_logprobs(model, params, batch.part(0), chunk=chunk, frozen=frozen)
