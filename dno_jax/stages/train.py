"""Train policy t into policy t+1 on iteration t's pairs; the sharded loop that supervised fine-tuning shares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

from dno_jax import stopping
from dno_jax.addresses import Purpose, key_data
from dno_jax.config import AnyConfig, RunConfig
from dno_jax.console import Meter
from dno_jax.data.pair_table import PairRows, PairTable
from dno_jax.errors import DnoError
from dno_jax.parallel.cluster import CommonStop, barrier, broadcast_from_primary, is_primary, wait_until
from dno_jax.records import ReferenceScore
from dno_jax.runtime.exhausted import explained, training_settings
from dno_jax.runtime.runtime import ConfigT, Runtime
from dno_jax.runtime.scheme import update_of
from dno_jax.stage_dir import Manifest, StageDir, versions
from dno_jax.stages.audit import STEP_ZERO_TOLERANCE
from dno_jax.stages.score import INITIAL, reference_identity, samples_of
from dno_jax.tracker import open_sinks
from dno_jax.training.adapted import base_of
from dno_jax.training.batches import TrainingRow, batch_order, make_batch, num_steps, text_lengths
from dno_jax.training.carried import load_moments, save_moments
from dno_jax.training.checkpoint import StateCheckpoints, policy_fingerprint, remove_states
from dno_jax.training.flops import peak_flops, train_flops, work_of
from dno_jax.training.metrics import Course, MetricsWriter, NotFinite, skipped_before
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import learning_rate_schedule
from dno_jax.training.rounding import widened
from dno_jax.training.state import init_state, state_shardings
from dno_jax.training.step import StepConfig, train_step
from dno_jax.training.trace import Trace


@stopping.finishing()
def run(runtime: Runtime[RunConfig], iteration: int) -> Manifest:
    """Regress the log-ratios onto the pairs' preferences (Algorithm 2, line 7); write the resulting policy.

    Raises:
        DnoError: the reference scores belong to another policy, tokenizer, length or dtype, or the first step shows
            that they do (the policy is not pi_t of its own loss).
    """
    start = time.perf_counter()
    config, run_dir = runtime.config, runtime.run_dir
    update = update_of(config, run_dir, iteration)
    stage = run_dir.stage("train", iteration)
    scored = run_dir.stage("score", iteration)
    reference = scored.require()
    inputs = stage.input_digest(scored.manifest_path) | runtime.policy_inputs(update.previous)
    manifest = stage.finished(config, inputs)
    if manifest and policy_fingerprint(update.result) == manifest.details["fingerprint"]:
        return manifest
    expected = reference_identity(runtime, update)
    differing = [name for name, value in expected.items() if reference.details.get(name) != value]
    if differing:
        raise DnoError(
            f"{scored.path}: reference scores of another {', '.join(differing)}; remove the folder to score again"
        )

    if is_primary():
        stage.start(config)
    pairs = PairTable.load(run_dir.stage("pair", iteration))
    previous = pairs.logprobs(scored.read(ReferenceScore))
    initial = previous if update.initial is None else pairs.logprobs(scored.sub(INITIAL).read(ReferenceScore))
    rows = PairRows(
        pairs,
        previous,
        initial,
        sampled_from=samples_of(run_dir, update.previous).iteration,
        anchored_from=samples_of(run_dir, update.initial or update.previous).iteration,
    )
    row_loss = preference_loss(config.loss_at(iteration), config.reference)
    with explained(f"train of iteration {iteration}", training_settings(runtime.programs)):
        trained, frozen = runtime.load_trained(update.previous, exact=True)
        result = train(
            runtime,
            trained,
            rows,
            runtime.programs.step_config(row_loss, load_balance_weight=config.loss.load_balance_weight),
            Training(
                "train",
                iteration,
                stage.path / "states",
                max_length=config.max_length,
                scored=scored,
                carried=update.previous if config.optimizer.carry else None,
                base=None if frozen is None else base_of(update.previous)[1],
            ),
            frozen=frozen,
        )
        if config.optimizer.carry:
            save_moments(update.result, result.opt_state)
        digest = runtime.save_trained(update.result, result.params, previous=update.previous)
    barrier(f"trained {stage.path}")
    if is_primary():
        remove_states(stage.path / "states")
        stage.finish(
            config,
            inputs=inputs,
            rows=len(rows),
            seconds=time.perf_counter() - start,
            details={
                "policy": update.result.name,
                "fingerprint": digest,
                "steps": result.num_steps,
                **result.metrics,
            },
        )
    wait_until(stage.manifest_path.exists)
    return stage.require()


@dataclass(frozen=True)
class Training:
    """Which training it is.

    Attributes:
        stage, iteration: what its figures are filed under, and which batches it takes.
        states_path: where its states lie until it is done.
        max_length: tokens of the longest sequence.
        scored: whose reference step 0 must show to be of its own policy; None where there is no reference.
        carried: the policy whose optimiser state it starts from; None starts a new one.
        base: fingerprint of the weights that stand; None where all are trained.
    """

    stage: str
    iteration: int
    states_path: Any
    max_length: int
    scored: StageDir | None = None
    carried: epath.Path | None = None
    base: str | None = None


@dataclass(frozen=True)
class TrainResult:
    params: Any  # float32
    opt_state: Any
    num_steps: int
    metrics: dict[str, float]  # of the last step


def train(
    runtime: Runtime[ConfigT],
    params: Any,
    rows: Sequence[TrainingRow],
    step: StepConfig,
    training: Training,
    *,
    frozen: Any = None,
) -> TrainResult:
    """Run every optimiser step over the rows, resuming from the last saved state.

    Args:
        params: where to start, in the TRAIN layout and the dtypes that are trained; donated. Of adapters where there
            are frozen ones.
        frozen: parameters that stand, or None.
    """
    config = runtime.config
    section = config.training
    steps = num_steps(len(rows), batch_size=section.batch_size, num_epochs=section.num_epochs)
    stage, iteration = training.stage, training.iteration
    rate = learning_rate_schedule(config.optimizer, num_steps=steps, iteration=iteration)
    rounding = key_data(Purpose.ROUNDING, config.seed, iteration, stage)
    shardings = state_shardings(step.optimizer, runtime.programs.trained_shardings, params)
    step = replace(step, places=tuple(jax.tree.leaves(shardings)))
    state: Any = init_state(params, step.optimizer, shardings)
    checkpoints = StateCheckpoints(training.states_path, keep=section.keep_states, base=training.base)
    stop = CommonStop(f"{stage}/{iteration}")
    restored = checkpoints.restore(state, shardings)
    if restored is None and training.carried is not None:
        state = state.replace(opt_state=load_moments(training.carried, state.opt_state, shardings.opt_state))
    state = state if restored is None else restored
    first = int(state.step)
    lengths = text_lengths(rows)
    order = list(
        batch_order(
            len(rows),
            batch_size=section.batch_size,
            num_epochs=section.num_epochs,
            seed=config.seed,
            iteration=iteration,
            lengths=(lengths.prompt + lengths.response).max(axis=1) if section.group_by_length else None,
        )
    )
    plan = runtime.programs.plan_batches(lengths, order)  # of all steps, wherever this call begins
    course = Course(iteration, stage, first_step=first, max_skipped=section.skip_nonfinite, peak=_peak_flops(runtime))
    if section.skip_nonfinite:
        counted = skipped_before(runtime.run_dir, course) if is_primary() else 0
        course = replace(course, skipped=int(broadcast_from_primary(np.asarray(counted))))
    curve, first = f"{course.stage}_{course.iteration:03d}", course.first_step
    sinks = open_sinks(config.report, runtime.run_dir, curve=curve, first_step=first, enabled=is_primary())
    writer = MetricsWriter(runtime.run_dir, course, sinks=sinks, enabled=is_primary())
    share_prompt = runtime.programs.packing.packed and runtime.programs.packing.share_prompt
    trace = Trace(section.profile, runtime.run_dir.path / "profile" / f"{stage}_{iteration:03d}")
    try:
        with Meter(f"{stage:<9} {iteration}", total=steps, unit="steps", done=first, enabled=is_primary()) as meter:
            if stop.is_due(first):
                raise KeyboardInterrupt
            for index, indices in enumerate(order[first:], start=first):
                trace.step(index)
                chosen = [rows[i] for i in indices]
                batch = make_batch(chosen, batch_size=section.batch_size, max_length=training.max_length, plan=plan)
                placed = batch.place(runtime.mesh)
                learning_rate = float(np.asarray(rate(index)))
                rate_now = jax.numpy.float32(learning_rate)
                state, metrics = train_step(state, placed, rate_now, config=step, frozen=frozen, rounding=rounding)
                tokens = sum(row.num_tokens for row in chosen)
                work = work_of(runtime.model_config, lengths.take(indices), share_prompt=share_prompt)
                writer.write(
                    index,
                    metrics,
                    names=[row.name for row in chosen],
                    learning_rate=learning_rate,
                    tokens=float(tokens),
                    flops=train_flops(runtime.model_config, work, adapter_params=runtime.programs.adapter_params),
                    padding=float(np.mean(batch.places.position < 0)),
                    responses=float(lengths.response[indices].size),
                )
                stops = index + 1 < steps and stop.is_due(index + 1)
                saved = stops or (index + 1 < steps and (index + 1) % section.save_every == 0)
                if saved or index == 0 or index + 1 == steps:  # what is kept is looked at before
                    writer.flush()
                if training.scored is not None and index == 0:
                    check_step_zero(writer.last, dtype=config.model.dtype, scored=training.scored)
                if saved:
                    checkpoints.save(state, step=index + 1)
                meter.advance(1, note=f"loss {writer.last['loss']:.4f}" if writer.last else "")
                if stops:
                    raise KeyboardInterrupt
    except NotFinite as error:
        raise DnoError(_not_finite(error, training, checkpoints.last_step, config)) from None
    finally:
        with ExitStack() as ends:  # also after an error: states and metrics that are being written are worth keeping
            for end in (trace.close, writer.close, checkpoints.close):
                ends.callback(end)
    last = {name: round(value, 6) for name, value in writer.last.items()}
    return TrainResult(widened(state.params), state.opt_state, num_steps=steps, metrics=last)


def _peak_flops(runtime: Runtime[ConfigT]) -> float | None:
    """FLOP/s of all devices of the run at their best, where it is known."""
    devices = runtime.mesh.devices
    peak = peak_flops(devices.flat[0].device_kind)
    return None if peak is None else peak * devices.size


def _not_finite(error: NotFinite, training: Training, saved: int | None, config: AnyConfig) -> str:
    """Say which step failed, on what, and what can be done."""
    names = ", ".join(error.names[:16]) + (f" and {len(error.names) - 16} more" if len(error.names) > 16 else "")
    rate, dtype = config.optimizer.learning_rate, config.model.dtype
    here = f"--from {training.stage.replace('_', '-')}:{training.iteration}"
    anew = f"dno run CONFIG optimizer.learning_rate={rate / 10:g} {here}"
    if training.scored is None:
        anew = f"optimizer.learning_rate={rate / 10:g} and another run_dir"
    wider = "" if dtype == "float32" else f"; or model.dtype=float32 in place of {dtype}, whose range or rounding it is"
    return (
        f"{training.stage} of iteration {training.iteration}, step {error.step}: the loss is {error.loss:g} and the "
        f"gradient's norm {error.grad_norm:g}; training stops, and nothing of this step is kept ("
        + ("no state was saved before" if saved is None else f"the last saved state is that after step {saved}")
        + (f"; {error.skipped} steps were skipped before, as training.skip_nonfinite allows" if error.skipped else "")
        + ").\n"
        f"The batch's rows: {names}.\n"
        "The same command takes the same step again. A smaller learning rate is what mostly helps "
        f"(it is {rate:g}, with optimizer.max_grad_norm={config.optimizer.max_grad_norm:g}): {anew}{wider}. Where the "
        "losses before it in metrics.jsonl were small and steady, look at these rows' texts."
    )


def check_step_zero(metrics: dict[str, Any], *, dtype: str, scored: StageDir) -> None:
    """Refuse to train when the first step shows a policy that is not pi_t of its own loss.

    With pi_t as the reference that is also to say that the loss is log 2 and every implicit reward 0.

    Raises:
        DnoError: a log-ratio to pi_t is not zero within the dtype's rounding.
    """
    tolerance = STEP_ZERO_TOLERANCE[dtype]
    ratio = float(metrics["max_abs_log_ratio"])
    if ratio <= tolerance:
        return
    # Weights that have rotted and scores that were edited were refused when they were read: it is none of those.
    then, now = scored.require().versions, versions()
    changed = [f"{name} {then.get(name)} -> {found}" for name, found in now.items() if then.get(name) != found]
    raise DnoError(
        f"step 0: a response's log-probability differs from its reference by {ratio:.4g} nats (at most {tolerance:g} "
        f"is rounding in {dtype}), loss {float(metrics['loss']):.4f}.\n"
        "Weights and scores are as they were written (both were checked now), so they are computed otherwise than when "
        f"{scored.path} was made: other software ({', '.join(changed) or 'none has changed'}), other devices, or a "
        "device or its memory that fails.\n"
        "Find out which before scoring again, which hides it. Where software or devices are meant to be others: "
        f"{scored.redo} (with sampling.as_reference=false where the scores were the sampler's)"
    )
