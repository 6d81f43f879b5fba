"""`dno reward`: a Bradley-Terry reward model, trained on preferences and exported as transformers has such models.

It is trained by the steps, batches and states of every other training. A text's reward is the score of its last token's
hidden state; what two texts have in common at their beginning is computed once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from dno_jax import stopping
from dno_jax.addresses import Purpose, rng
from dno_jax.config import RewardConfig
from dno_jax.console import say
from dno_jax.data.labelled import Labelled, LabelledPair, read_labelled, read_verdicts
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.model import hf
from dno_jax.model.params import computing_params
from dno_jax.parallel.cluster import barrier, described, is_primary
from dno_jax.parallel.sharding import TRAIN, replicated, reshard
from dno_jax.records import Message
from dno_jax.run_dir import RunDir
from dno_jax.runtime.capacity import known_capacity
from dno_jax.runtime.exhausted import explained, training_settings
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.scoring import logprobs_of, scoring_batches
from dno_jax.runtime.training_memory import refuse_training
from dno_jax.stages import disk
from dno_jax.stages.chats_to_score import chats_to_score
from dno_jax.stages.checkpoints import read_checkpoint
from dno_jax.stages.one_training import fresh_params, held, started
from dno_jax.stages.train import Training, train
from dno_jax.statistics import Estimate, Tally
from dno_jax.training.batches import TrainingRow
from dno_jax.training.checkpoint import remove_states
from dno_jax.training.objectives import reward_loss
from dno_jax.training.state import param_shardings

_BEHIND = (0,)  # the token after a text, which nothing reads: what stands before it is the text's own last one
_REASONS = 4  # that are named


def run(runtime: Runtime[RewardConfig]) -> epath.Path:
    """Train a reward model and export it; return where it lies.

    Everything that may be refused is looked at before anything is written.

    Raises:
        DnoError: the directory was made by another configuration, or from other pairs or weights.
    """
    start = time.perf_counter()
    target = runtime.run_dir.export_path
    refuse_training(runtime.programs, known_capacity(runtime.mesh.local_devices))
    preferences = preferences_of(runtime)
    if is_primary():
        for line in (described(runtime.mesh), *preferences.lines):
            say(line)
    noted = started(runtime, "reward", examples=preferences.digest)
    if target.exists():
        if is_primary():
            say(f"{target} is there already: nothing to do")
        return target
    if is_primary():
        disk.check(runtime)
    params = initial_params(runtime)
    with held(runtime, "reward", noted):
        return _train(runtime, preferences, params, start=start)


@stopping.finishing()
def _train(runtime: Runtime[RewardConfig], preferences: Preferences, params: Any, *, start: float) -> epath.Path:
    config, target, states = runtime.config, runtime.run_dir.export_path, runtime.run_dir.path / "states"
    with explained("reward", training_settings(runtime.programs)):
        step = runtime.programs.step_config(reward_loss)
        training = Training("reward", 0, states, max_length=config.max_length)
        result = train(runtime, params, preferences.rows, step, training)
        agreement = _agreement(runtime, result.params, preferences) if preferences.held_out else None
    words = None if agreement is None else _words(agreement)
    hf.save(
        str(target),
        runtime.model_config,
        result.params,
        source=hf.folder(config.model.init_config or config.model.path, weights=config.model.init_config is None),
        tokenizer=hf.folder(config.model.path),
        chat_template=runtime.tokenizer.template,
        pad_token_id=padding_of(runtime),
        facts=hf.ExportFacts(
            method="training as a reward model",
            loss="Bradley-Terry",
            num_pairs=len(preferences.rows),
            agreement=words,
        ),
    )
    if is_primary():
        if agreement is not None:
            write_atomically(runtime.run_dir.path / "held_out.json", json.dumps(agreement.as_dict(), indent=2) + "\n")
        remove_states(states)
        said = f"loss {result.metrics['loss']:.4f}" + (f", held-out agreement {words}" if words else "")
        say(f"reward: {result.num_steps} steps, {said}, {time.perf_counter() - start:.0f} s; checkpoint {target}")
    barrier("reward export")
    return target


def padding_of(runtime: Runtime[RewardConfig]) -> int:
    """Return the id by which transformers will tell where a text ends.

    It is what the tokenizer fills rows up with, or else what the checkpoint names, or else the end id: the first of
    them that the model has an embedding of. Of a reward model the checkpoint's comes first: it was trained so.
    """
    source = hf.folder(runtime.config.model.path)
    known = [runtime.tokenizer.pad_id, hf.read_pad_token_id(source)]
    for pad_id in reversed(known) if hf.head_of(source) == "reward" else known:
        if isinstance(pad_id, int) and 0 <= pad_id < runtime.model_config.vocab_size:
            return pad_id
    return runtime.end_ids[0]


@dataclass(frozen=True)
class Preferences:
    """What is trained on and measured by.

    Attributes:
        prompt_ids: of the held-out rows.
        digest: sha256 of the pairs' texts and preferences, wherever they lie.
        lines: what they were taken for.
    """

    rows: list[TrainingRow]
    held_out: list[TrainingRow]
    prompt_ids: list[str]
    digest: str
    lines: tuple[str, ...]


def preferences_of(runtime: Runtime[RewardConfig]) -> Preferences:
    """Read the pairs, tokenise them, and set the held-out prompts' aside.

    Raises:
        DnoError: there are none, they are malformed, or, unless pairs.too_long says otherwise, one is too long.
    """
    section, pad_id = runtime.config.pairs, padding_of(runtime)
    _try_template(runtime)
    found = labelled_of(runtime.config)
    aside = held_out_prompts(found.pairs, section.held_out, seed=runtime.config.seed)
    rows: list[TrainingRow] = []
    held_out: list[tuple[str, TrainingRow]] = []
    digest, left_out = hashlib.sha256(), Counter[str]()
    for pair in found.pairs:
        chat = [message.model_dump() for message in pair.messages]
        digest.update(json.dumps([chat, pair.texts, pair.target, pair.weight]).encode() + b"\n")
        row = _row(runtime, pair, pad_id=pad_id)
        if isinstance(row, str):
            left_out[row] += 1
        elif pair.prompt_id in aside:
            held_out.append((pair.prompt_id, row))
        else:
            rows.append(row)
    lines = [found.line]
    if left_out:
        reasons = [f"{count:,} x {why}" for why, count in left_out.most_common(_REASONS)]
        more = [f"{len(left_out) - _REASONS:,} more reasons"] if len(left_out) > _REASONS else []
        lines.append("pairs left out: " + ", ".join([*reasons, *more]))
    lines.append(f"{len(rows):,} pairs are trained on, {len(held_out):,} held out")
    if not rows:
        raise DnoError("; ".join([*lines, "none is left to train on"]))
    if section.held_out and not any(row.target > 0.5 for _, row in held_out):
        raise DnoError(
            f"pairs.held_out is {section.held_out}: of these prompts no pair is left of which one response is "
            "preferred; set more aside, or none"
        )
    return Preferences(
        rows, [row for _, row in held_out], [name for name, _ in held_out], digest.hexdigest(), tuple(lines)
    )


def labelled_of(config: RewardConfig) -> Labelled:
    """Read the preferences.

    Raises:
        DnoError: there are none, or they are malformed.
    """
    section = config.pairs
    if section.run is None:
        assert section.path is not None  # the configuration's own check
        for path in (section.path,) if isinstance(section.path, str) else section.path:
            if "://" not in path and RunDir(path).config_path.exists():
                raise DnoError(f"pairs.path {path}: a run directory; give it as pairs.run")
        return read_labelled(section.path, temperature=section.score_temperature)
    if os.path.realpath(section.run) == os.path.realpath(config.run_dir):
        raise DnoError(f"run_dir {config.run_dir} is pairs.run, whose files would be mixed with these; give another")
    return read_verdicts(RunDir(section.run), section.iterations, temperature=section.score_temperature)


def held_out_prompts(pairs: Iterable[LabelledPair], count: int, *, seed: int) -> set[str]:
    """Draw the prompts that are set aside.

    Raises:
        DnoError: none would be left to train on.
    """
    prompts = sorted({pair.prompt_id for pair in pairs})
    if count >= len(prompts):
        raise DnoError(
            f"pairs.held_out is {count}, and there are pairs of {len(prompts)} prompts: none would be left to train "
            "on; set it lower"
        )
    return {prompts[at] for at in rng(Purpose.HELD_OUT_PAIRS, seed).permutation(len(prompts))[:count]}


def _try_template(runtime: Runtime[RewardConfig]) -> None:
    try:
        runtime.tokenizer.chat_ids((Message(role="user", content="q"),), "a")
    except DnoError as error:
        raise DnoError(f"model.chat_template: {error}") from None


def _row(runtime: Runtime[RewardConfig], pair: LabelledPair, *, pad_id: int) -> TrainingRow | str:
    """Lay a pair out, its preferred text first; or say why it is none."""
    section = runtime.config.pairs
    found = chats_to_score(runtime.tokenizer, pair.messages, pair.texts, pad_id=pad_id)
    if isinstance(found, str):
        return found
    if found.longest > section.max_length:
        if section.too_long == "error":
            raise DnoError(
                f"{pair.place}: {found.longest} tokens exceed pairs.max_length {section.max_length}; raise it, remove "
                "the pair, or set pairs.too_long=drop"
            )
        return "too long"
    chosen, rejected = found.ids
    if chosen == rejected:
        return "the same tokens twice"
    differing = (index for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    common = next(differing, min(len(chosen), len(rejected)))
    before = np.asarray(chosen[:common], np.int32)
    after = tuple(np.asarray(ids[common:] + _BEHIND, np.int32) for ids in (chosen, rejected))
    return TrainingRow((before, before), after, target=pair.target, weight=pair.weight, name=pair.place)


def initial_params(runtime: Runtime[RewardConfig]) -> Any:
    """Return what is trained, in the dtypes that it is trained in.

    Of a language model the head goes, and the score that takes its place is 0: no text is better than another yet.
    """
    config, programs = runtime.config, runtime.programs
    if config.model.init_config is not None:
        return fresh_params(runtime)
    path, places, wanted = config.model.path, programs.param_shardings(TRAIN), programs.trained_params
    if hf.head_of(hf.folder(path)) == "reward":
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, wanted)
        return read_checkpoint(path, head="reward", shardings=places, dtype=dtypes)
    shape = replace(runtime.model_config, head="logits")
    given = jax.tree.map(lambda leaf: leaf.dtype, computing_params(shape, jnp.dtype(config.training.param_dtype)))

    def without_head(path: tuple[str, ...], leaf: Any) -> Any:  # let go of before the next is read
        return None if path == ("head",) else leaf

    shardings = param_shardings(shape, runtime.mesh, TRAIN)
    params = read_checkpoint(path, shardings=shardings, dtype=given, change=without_head)
    params.pop("head", None)
    score = wanted["score"]
    zeros = jax.jit(lambda: jnp.zeros(score.shape, score.dtype), out_shardings=places["score"])()
    return params | {"score": zeros}


def rewards_of(
    runtime: Runtime[RewardConfig], params: Any, rows: list[TrainingRow]
) -> Float[np.ndarray, "{len(rows)} 2"]:
    """Return the rewards of rows, as training computes them."""
    size = runtime.config.training.micro_batch_size or runtime.config.training.batch_size
    lengths = np.asarray([max(map(len, row.response_ids)) + len(row.prompt_ids[0]) for row in rows])
    batches = scoring_batches(runtime, lengths, size=size)
    found = np.empty((len(rows), 2), np.float32)
    for batch, values in zip(batches, logprobs_of(runtime, (params, None), rows, batches, size=size), strict=True):
        found[batch] = np.asarray(reshard(values, replicated(runtime.mesh)))[: len(batch)]
    return found


def _agreement(runtime: Runtime[RewardConfig], params: Any, preferences: Preferences) -> Estimate:
    """How often the reward of the preferred text is the higher one; prompts are clusters, and ties do not count."""
    found = rewards_of(runtime, params, preferences.held_out)
    told = [row.target > 0.5 for row in preferences.held_out]
    margin = (found[:, 0] - found[:, 1])[told]
    ids = [name for name, is_told in zip(preferences.prompt_ids, told, strict=True) if is_told]
    return Tally.of(0.5 * (1.0 + np.sign(margin)), ids).share()


def _words(agreement: Estimate) -> str:
    low, high = agreement.low or 0.0, agreement.high or 0.0
    return f"{100 * agreement.value:.1f} % [{100 * low:.0f}, {100 * high:.0f}] of {agreement.count:,} pairs"
