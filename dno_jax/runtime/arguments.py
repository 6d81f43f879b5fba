"""What the stages hand to their programs, as shapes: with these the very programs are lowered before anything is there.

A test holds what is lowered here to what the stages run, by the text of the lowered program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.config import RewardConfig, RunConfig, SftConfig
from dno_jax.model.params import abstract_adapters, abstract_params, computing_params
from dno_jax.model.places import Places
from dno_jax.model.stack import group_at, layer_groups
from dno_jax.parallel.sharding import DECODE, TRAIN, AnyMesh, num_row_shards, row_sharding
from dno_jax.runtime.programs import ConfigT, Programs
from dno_jax.sampling.decode import decode, fill
from dno_jax.sampling.memory import SlotPlan
from dno_jax.sampling.state import Prompts, abstract_start, prompt_bucket
from dno_jax.training.batches import PairBatch
from dno_jax.training.objectives import preference_loss, reward_loss, supervised_loss
from dno_jax.training.packing import BatchShape, Plan, TextLengths, plan_batches
from dno_jax.training.state import TrainState, state_shardings
from dno_jax.training.step import score_step, train_step

# Batches that are looked through for the shapes of a training: more of the same change none.
_MOST_BATCHES = 256


@dataclass(frozen=True)
class Call:
    """A program, and what it is called with.

    Attributes:
        kinds: the arguments by what they are to a person, such as "parameters".
    """

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    kinds: dict[str, Any]

    def lowered(self) -> Any:
        return self.function.lower(*self.arguments, **self.options)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of one device by kind."""
        return {kind: local_bytes(tree) for kind, tree in self.kinds.items()}


def local_bytes(tree: Any) -> int:
    """Bytes that abstract arrays take on one device; without a sharding, each is there whole."""

    def one(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def placed(tree: Any, shardings: Any) -> Any:
    """Say where abstract arrays lie."""

    def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, shardings)


def longest_texts(programs: Programs[ConfigT], *, num_rows: int) -> TextLengths:
    """Return the lengths of rows whose texts are all as long as they may be."""
    config, longest = programs.config, programs.config.max_length
    num_rows = min(num_rows, _MOST_BATCHES * config.training.batch_size)
    texts, prompt = 1 if isinstance(config, SftConfig) else 2, longest // 4
    if isinstance(config, RunConfig):
        prompt = min(config.prompts.max_length, longest - 1)
    lengths = np.full((num_rows, texts), prompt, np.int64)
    return TextLengths(lengths, longest - lengths, np.ones(num_rows, bool))


def train_plan(programs: Programs[ConfigT], lengths: TextLengths) -> Plan:
    """Return the shapes of a training on rows of these lengths, in their order."""
    size = programs.config.training.batch_size
    starts = range(0, min(len(lengths), _MOST_BATCHES * size), size)
    return programs.plan_batches(lengths, [np.arange(at, min(at + size, len(lengths))) for at in starts])


def score_plan(programs: Programs[ConfigT], lengths: TextLengths) -> Plan:
    """Return the shapes in which rows of these lengths are scored."""
    section = programs.config.training
    size = section.micro_batch_size or section.batch_size
    starts = range(0, min(len(lengths), _MOST_BATCHES * size), size)
    batches = [np.arange(at, min(at + size, len(lengths))) for at in starts]
    longest = programs.config.max_length
    return plan_batches(lengths, batches, programs.packing, batch_size=size, max_length=longest)


def largest(plan: Plan) -> BatchShape:
    return max(plan.shapes, key=lambda shape: shape.num_tokens)


def abstract_batch(programs: Programs[ConfigT], shape: BatchShape) -> PairBatch:
    """Return a batch of this shape, as `make_batch` makes and lays it out."""
    texts, packing = 1 if isinstance(programs.config, SftConfig) else 2, programs.packing
    shared = packing.packed and packing.share_prompt and texts > 1

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.parts, *sizes), dtype)

    tokens, window = array(shape.rows, shape.length), array(shape.rows, shape.window)
    pairs, single = array(shape.pairs, texts, dtype=jnp.float32), array(shape.pairs, dtype=jnp.float32)
    batch = PairBatch(
        token=tokens,
        places=Places(tokens, tokens if packing.packed else None, tokens if shared else None),
        source=window,
        response_token=window,
        text=window,
        num_tokens=array(shape.pairs, texts),
        previous_logprob=pairs,
        initial_logprob=pairs,
        reward=pairs,
        target=single,
        weight=single,
        own=pairs,
        anchor=pairs,
    )
    return placed(batch, batch.shardings(programs.mesh))


def trained_state(programs: Programs[ConfigT]) -> tuple[TrainState, Any]:
    """Return what training carries, and the parameters that stand beside adapters, or None."""
    config, model = programs.config, programs.model_config
    params, frozen = programs.trained_params, None
    if programs.adapter is not None:
        params = abstract_adapters(model, programs.adapter)
        whole = computing_params(model, jnp.dtype(config.model.dtype))
        frozen = placed(whole, programs.param_shardings(TRAIN))
    optimizer = programs.optimizer
    shardings = state_shardings(optimizer, programs.trained_shardings, params)
    opt_state = jax.eval_shape(optimizer.init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    return placed(state, shardings), frozen


def train_call(programs: Programs[ConfigT], shape: BatchShape) -> Call:
    """The optimiser step of a batch."""
    config = programs.config
    state, frozen = trained_state(programs)
    if isinstance(config, RunConfig):
        loss = preference_loss(config.loss_at(0), config.reference)
        step = programs.step_config(loss, load_balance_weight=config.loss.load_balance_weight)
    else:
        step = programs.step_config(reward_loss if isinstance(config, RewardConfig) else supervised_loss)
    step = replace(step, places=tuple(leaf.sharding for leaf in jax.tree.leaves(state)))
    batch, rate = abstract_batch(programs, shape), jax.ShapeDtypeStruct((), jnp.float32)
    options = {"config": step, "frozen": frozen, "rounding": jax.ShapeDtypeStruct((2,), jnp.uint32)}
    kinds = {"parameters": state.params, "moments": state.opt_state, "frozen parameters": frozen, "batch": batch}
    return Call(train_step, (state, batch, rate), options, {k: tree for k, tree in kinds.items() if tree is not None})


def score_call(programs: Programs[ConfigT], shape: BatchShape) -> Call:
    """The log-probabilities of a batch under a policy that stands; of a reward model that is trained, its rewards."""
    shapes, frozen = abstract_params(programs.model_config), None
    if isinstance(programs.config, RewardConfig):
        shapes = programs.trained_params
    params = placed(shapes, programs.param_shardings(TRAIN))
    if programs.adapter is not None:
        state, frozen = trained_state(programs)
        params = state.params
    batch = abstract_batch(programs, shape)
    options = {"model": programs.model(TRAIN), "chunk": programs.config.training.logprob_chunk, "frozen": frozen}
    kinds = {"parameters": params, "frozen parameters": frozen, "batch": batch}
    return Call(score_step, (params, batch), options, {k: tree for k, tree in kinds.items() if tree is not None})


def decoding_params(programs: Programs[RunConfig], mesh: AnyMesh) -> Any:
    """The weights of a policy as decoding has them: apart by layers."""
    config = programs.model_config
    shapes = computing_params(config, jnp.dtype(programs.config.model.dtype))
    params = placed(shapes, programs.param_shardings(DECODE, mesh=mesh))

    def layer(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    layers: dict[int, Any] = {}
    for path, numbers in layer_groups(config).items():
        layers |= dict.fromkeys(numbers, jax.tree.map(layer, dict(group_at(params["layers"], path))))
    return {**params, "layers": tuple(layers[number] for number in range(config.num_hidden_layers))}


def decode_call(programs: Programs[RunConfig], slots: SlotPlan) -> Call:
    """The loop that draws tokens for all slots."""
    mesh, policies = slots.programs.mesh, slots.num_policies
    params = (decoding_params(programs, mesh),) * policies
    state, outputs = abstract_start(slots.programs, policies=policies)
    rows = row_sharding(mesh, ndim=1)
    marks = jax.ShapeDtypeStruct(outputs.done.shape, jnp.bool_, sharding=rows)
    weight = jax.ShapeDtypeStruct((), jnp.float32)
    options = {"fresh": marks, "cancelled": marks, "programs": slots.programs}
    kinds = {"parameters": params, "KV cache": state.slots, "queue": state.queue, "responses": (outputs, marks, marks)}
    return Call(decode, (params, state, outputs, weight), options, kinds)


def fill_call(programs: Programs[RunConfig], slots: SlotPlan) -> Call:
    """The prefill of the longest prompts."""
    mesh, policies, shape = slots.programs.mesh, slots.num_policies, slots.programs.shape
    params = (decoding_params(programs, mesh),) * policies
    state, _ = abstract_start(slots.programs, policies=policies)
    rows = num_row_shards(mesh) * shape.fill_rows
    width = prompt_bucket(shape.prompt_length, max_length=shape.prompt_length, piece=shape.prefill_chunk)

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=row_sharding(mesh, ndim=len(sizes)))

    prompts = Prompts(array(rows, width), array(rows), array(rows, dtype=jnp.uint32), array(rows), array(rows))
    options = {"iteration": jax.ShapeDtypeStruct((), jnp.int32), "programs": slots.programs}
    kinds = {"parameters": params, "KV cache": state.slots, "queue": state.queue, "prompts": prompts}
    return Call(fill, (params, state, prompts), options, kinds)
