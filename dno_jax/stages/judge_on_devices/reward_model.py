"""A scalar reward model as the judge: P(y > y') = sigma((r(x, y) - r(x, y')) / temperature) (Bradley-Terry).

A stage on the devices (shards.py), whose weights are read once the sampler's are released. The model reads the
whole chat by its own tokenizer and template; the reward is that of the last token, as transformers' classifiers have
it. A chat that is too long is not cut: its pool gets no verdict.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from dno_jax.annotation.pool import Pool
from dno_jax.config import RewardModelSection, RunConfig
from dno_jax.console import Meter, say
from dno_jax.data.pools import Pools
from dno_jax.errors import DnoError
from dno_jax.files import digest_of
from dno_jax.model import hf
from dno_jax.model.decoder import Decoder, rewards
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.parallel.cluster import broadcast_from_primary, is_primary
from dno_jax.parallel.sharding import DECODE, num_row_shards, replicated, row_sharding, to_device
from dno_jax.preferences import scores_to_wins
from dno_jax.records import Judgement, Message
from dno_jax.runtime.exhausted import explained, reward_settings
from dno_jax.runtime.fit import check_ids
from dno_jax.runtime.runtime import Runtime
from dno_jax.stage_dir import Manifest
from dno_jax.stages.chats_to_score import chats_to_score
from dno_jax.stages.checkpoints import read_checkpoint
from dno_jax.stages.judge_on_devices.shards import CloseShard, DeviceJudge, judge_on_devices

_FILES_AT_ONCE = 8


def check(runtime: Runtime[RunConfig]) -> None:
    """Raise now what would otherwise be raised after sampling: the checkpoint, its template, lengths, rows.

    Says so where the longest prompts and responses would leave their pools without a verdict.

    Raises:
        DnoError: naming what does not fit.
    """
    config, judge = runtime.config, RewardModel.start(runtime)
    if config.max_length > judge.section.max_length and is_primary():
        say(
            f"prompts and responses may take {config.max_length} tokens (the policy's); pools with a chat above "
            f"annotation.reward_model.max_length={judge.section.max_length} (the reward model's) get no verdict"
        )


def run(runtime: Runtime[RunConfig], iteration: int) -> Manifest:
    """Judge iteration t's rollouts; closed shards are not judged again.

    Raises:
        DnoError: more pools than `annotation.max_failed` allows have no verdict; or as `check`.
    """
    judge = RewardModel.start(runtime)
    own = DeviceJudge(
        identity=judge.identity,
        inputs={f"reward model {judge.path.name}": judge.digest},
        judge_shards=partial(_judge_shards, judge),
        counts=_reward_sums,
        figures=_reward_figures,
        who="the reward model",
        remedy="would compute the same: start a run with a larger annotation.reward_model.max_length where chats are "
        "longer",
    )
    return judge_on_devices(runtime, iteration, own)


@dataclass(frozen=True)
class RewardModel:
    """A reward model, its weights still on disk.

    Attributes:
        runtime: the run's, with the reward model's shape and tokenizer in place of the policy's.
        section: as configured.
        pad_id: id that transformers takes for padding, wherever it stands at the end of a text; or None.
        digest: sha256 of config.json and the weights' files.
    """

    runtime: Runtime[RunConfig]
    section: RewardModelSection
    pad_id: int | None
    digest: str

    @classmethod
    def start(cls, runtime: Runtime[RunConfig]) -> RewardModel:
        """Look at everything but the weights' values.

        Raises:
            DnoError: the checkpoint is no reward model's or is not whole, has no chat template or one that refuses
                a question and its answer, has less context than `max_length`, or cannot be computed on this mesh.
        """
        section = runtime.config.annotation.reward_model
        assert section is not None  # the configuration's own check
        path = hf.folder(section.path, weights=True)
        files = hf.check(path, head="reward")
        model_config = hf.read_config(path, head="reward", rope_length=section.max_length)
        programs = replace(runtime.programs, model_config=model_config)
        own = replace(
            runtime, programs=programs, tokenizer=_tokenizer(section, model_config, date=runtime.tokenizer.date)
        )
        check_ids(own.tokenizer, model_config)
        try:
            _ = programs.param_shardings(DECODE), programs.attention_backend
        except DnoError as error:
            raise DnoError(f"annotation.reward_model.path {section.path}: {error}") from None
        if section.max_length > model_config.context:
            raise DnoError(
                f"annotation.reward_model.max_length {section.max_length} exceeds the reward model's context of "
                f"{model_config.context} (max_position_embeddings of {section.path}); lower it"
            )
        if section.batch_size % (shards := num_row_shards(own.submesh.mesh)):
            raise DnoError(
                f"annotation.reward_model.batch_size is {section.batch_size}, which the {shards} row shards of a "
                "process's submesh do not divide; make it a multiple"
            )
        return cls(own, section, hf.read_pad_token_id(path), _digest(path, files))

    @property
    def path(self) -> Path:
        return Path(self.section.path)

    @property
    def identity(self) -> str:
        """Everything that changes a verdict."""
        return (
            f"reward_model {self.path.name} digest={self.digest[:12]} template={self.runtime.tokenizer.digest[:12]} "
            f"temperature={self.section.temperature} max_length={self.section.max_length} "
            f"dtype={self.runtime.config.model.dtype}"
        )

    def load(self) -> Any:
        """Read the weights, in the compute dtype, onto this process's submesh."""
        runtime = self.runtime
        shardings = runtime.programs.param_shardings(DECODE, mesh=runtime.submesh.mesh)
        return read_checkpoint(
            self.section.path, head="reward", shardings=shardings, dtype=jnp.dtype(runtime.config.model.dtype)
        )

    def ask(self, pool: Pool) -> list[tuple[int, ...]] | str:
        """Return the ids of each candidate's chat up to the token that is read off, or why there are none."""
        texts = [candidate.text for candidate in pool.candidates]
        asked = chats_to_score(self.runtime.tokenizer, pool.prompt.messages, texts, pad_id=self.pad_id)
        if isinstance(asked, str):
            return asked
        if asked.longest > (limit := self.section.max_length):
            return f"a chat has {asked.longest} tokens, annotation.reward_model.max_length is {limit}"
        return list(asked.ids)

    def rewards(self, params: Any, texts: Sequence[tuple[int, ...]]) -> Float[np.ndarray, " texts"]:
        """Return the reward of each text, float32, however they are batched: texts of like lengths together."""
        order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
        size = self.section.batch_size
        found = np.empty(len(texts), np.float32)
        before: tuple[list[int], jax.Array] | None = None
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            now = self._forward(params, [texts[index] for index in rows])
            if before is not None:  # read when the next batch is on its way
                found[before[0]] = np.asarray(before[1])[: len(before[0])]
            before = rows, now
        if before is not None:
            found[before[0]] = np.asarray(before[1])[: len(before[0])]
        return found

    def _forward(self, params: Any, texts: Sequence[tuple[int, ...]]) -> jax.Array:
        size, mesh = self.section.batch_size, self.runtime.submesh.mesh
        length = length_bucket(max(map(len, texts)), max_length=self.section.max_length)
        token = np.zeros((size, length), np.int32)
        position = np.full((size, length), -1, np.int32)
        for row, ids in enumerate(texts):
            token[row, : len(ids)] = ids
            position[row, : len(ids)] = np.arange(len(ids))
        batch = to_device(
            {"token": token, "position": position}, dict.fromkeys(("token", "position"), row_sharding(mesh, ndim=2))
        )
        return reward_step(
            params, **batch, model=self.runtime.programs.model(DECODE, mesh=mesh), place=replicated(mesh)
        )

    def judge(self, params: Any, pools: Sequence[Pool]) -> list[Judgement]:
        """Judge pools, all of whose candidates are scored together."""
        asked = [self.ask(pool) for pool in pools]
        texts = [ids for own in asked if not isinstance(own, str) for ids in own]
        found = iter(self.rewards(params, texts).tolist())
        return [
            self._judgement(pool, own if isinstance(own, str) else list(itertools.islice(found, len(own))))
            for pool, own in zip(pools, asked, strict=True)
        ]

    def _judgement(self, pool: Pool, found: list[float] | str) -> Judgement:
        fields = {"prompt_id": pool.prompt.prompt_id, "candidate_ids": pool.candidate_ids, "judge": self.identity}
        if isinstance(found, str):
            return Judgement(**fields, state="failed", detail=found)
        kept = dict(zip(pool.candidate_ids, found, strict=True))
        for name, reward in kept.items():
            if not math.isfinite(reward):
                return Judgement(**fields, state="failed", detail=f"the reward of {name} is {reward}")
        wins = bradley_terry(found, temperature=self.section.temperature)
        return Judgement(**fields, state="ok", raw=json.dumps(kept), wins=wins)


@partial(jax.jit, static_argnames=("model", "place"))
def reward_step(
    params: Any, token: Int[Array, "B T"], position: Int[Array, "B T"], *, model: Decoder, place: NamedSharding
) -> Float[Array, " B"]:
    """Return the reward of each row, float32, at `place`."""
    hidden, _ = model.apply({"params": params}, token, position)
    return jax.lax.with_sharding_constraint(rewards(params, hidden, position), place)


def bradley_terry(rewards: Sequence[float], *, temperature: float) -> tuple[tuple[float, ...], ...]:
    """Return P(row beats column); P + P^T is 1 to the last bit."""
    above = np.triu(scores_to_wins(rewards, temperature=temperature), 1)
    wins = above + np.tril(1.0 - above.T, -1) + np.diag(np.full(len(rewards), 0.5))
    return tuple(tuple(row) for row in wins.tolist())


def _judge_shards(judge: RewardModel, pools: Pools, shards: Sequence[str], *, close: CloseShard) -> None:
    """Judge and close shards; each submesh takes every n-th and runs by itself."""
    submesh = judge.runtime.submesh
    own = shards[submesh.index :: submesh.count]
    description, what = f"judge     {pools.sampled.iteration}", f"annotate of iteration {pools.sampled.iteration}"
    with (
        explained(what, reward_settings(judge.runtime.programs, judge.section.batch_size)),
        Meter(description, total=len(own), unit="shards", enabled=is_primary()) as meter,
    ):
        params = judge.load()
        for name in own:
            shard = pools.read(name)
            close(name, shard, judge.judge(params, shard.pools))
            meter.advance(1)


def _reward_sums(judgements: Iterable[Judgement]) -> Counter[str]:
    """Number and sums of the rewards, of their squares, and of their squared distances from their pools' means."""
    found: Counter[str] = Counter()
    for judgement in judgements:
        if judgement.state == "ok":
            own = np.asarray(list(json.loads(judgement.raw).values()))
            within = ((own - own.mean()) ** 2).sum()
            found.update({"count": own.size, "total": own.sum(), "squares": (own**2).sum(), "within": within})
    return found


def _reward_figures(sums: Counter[str]) -> dict[str, dict[str, float]]:
    """The mean and the standard deviation of the rewards, and that within pools, in which `temperature` is measured."""
    if not (count := sums["count"]):
        return {}
    mean = sums["total"] / count
    spread = max(sums["squares"] / count - mean**2, 0.0)
    return {"rewards": {"mean": mean, "deviation": spread**0.5, "within_pools": (sums["within"] / count) ** 0.5}}


def _tokenizer(section: RewardModelSection, model_config: ModelConfig, *, date: datetime.date) -> ChatTokenizer:
    try:
        tokenizer = ChatTokenizer.load(hf.folder(section.path), date=date, num_rows=model_config.vocab_size)
        tokenizer.chat_ids((Message(role="user", content="q"),), "a")
    except DnoError as error:
        raise DnoError(
            f"annotation.reward_model.path: {error} (chats are read by the tokenizer and the template of this very "
            "directory, where chat_template.jinja may be put)"
        ) from None
    return tokenizer


def _digest(path: Path, files: Iterable[Path]) -> str:
    """sha256 of config.json and the weights; process 0's, so that one process reads them for it."""
    digest = bytes(32)
    if is_primary():
        named = [path / "config.json", *files]
        digest = _digest_files(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in named))
    return broadcast_from_primary(np.frombuffer(digest, np.uint8)).tobytes().hex()


@cache
def _digest_files(files: tuple[tuple[Path, int, int], ...]) -> bytes:
    """Read once per process, as every iteration asks; sizes and times are there to notice that a file was replaced."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        digests = pool.map(digest_of, (file for file, _, _ in files))
        lines = [f"{file.name} {digest}\n" for (file, _, _), digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).digest()


def length_bucket(length: int, *, max_length: int) -> int:
    """Return the padded length: max_length halved as often as the longest row allows, at least 32.

    Few shapes, few compiles.
    """
    bucket = max_length
    while bucket // 2 >= max(length, 32) and bucket % 2 == 0:
        bucket //= 2
    return bucket
