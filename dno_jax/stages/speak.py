"""Policies that answer people: of a run, or a checkpoint, through the run's own sampler and template."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dno_jax.addresses import name_bits
from dno_jax.bucket.work import bring
from dno_jax.config import MeshSection, RunConfig, TrainingSection, parse_config
from dno_jax.config.base import absolute
from dno_jax.config.loading import lay_over
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.params import computing_params, unstack_layers
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import DECODE
from dno_jax.records import Message, Prompt
from dno_jax.report.summary import best_policy_of
from dno_jax.run_dir import RunDir
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.sampler import sampling_params
from dno_jax.runtime.slots import Wanted, plan
from dno_jax.sampling.engine import generate
from dno_jax.sampling.requests import Request
from dno_jax.sampling.state import CompiledPrograms, EngineShape
from dno_jax.sampling.stops import stopped
from dno_jax.stages.checkpoints import read_checkpoint

_LONGEST_PROMPT = 4096  # tokens of a conversation, where the model's context has room for more
_STREAMED_TOKENS = 8  # between two looks at what is drawn
# What a checkpoint alone has no use for, and a configuration needs to be valid.
_PAIRING = {"reward": "win_rate", "positive_floor": 0.5, "margin": 0.1, "student_margin": 0.1}

Show = Callable[[str], None]
"""Is given the text of an answer as far as it has come, again and again; a later one begins with the earlier."""


@dataclass(frozen=True)
class Said:
    """An answer: its text, what ended it, and how many of the oldest messages there was no room for."""

    text: str
    finish: Literal["stop", "length"]
    num_forgotten: int = 0


@dataclass
class Speakers:
    """The policies of a run, or the one policy of a checkpoint; each is read when it is first asked.

    Attributes:
        numbers: the policies there are; a checkpoint's is 0.
        default: the best of a run, the newest where nothing has been evaluated.
    """

    runtime: Runtime[RunConfig]
    numbers: tuple[int, ...]
    default: int
    is_run: bool
    _params: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, place: str, *, overrides: Sequence[str] = ()) -> Speakers:
        """Open a run directory, a Hugging Face checkpoint, or a directory that `dno sft` has exported one into.

        Args:
            overrides: `a.b=value` of the configuration, such as `sampling.temperature=0`.

        Raises:
            DnoError: it is none of them, or holds no policy yet.
        """
        run_dir = RunDir(place)
        run_dir.fetch()
        folder = Path(run_dir.path)
        if (folder / "policies").is_dir():
            config = _with(run_dir.load_config(), overrides, run_dir=absolute(place))
            return cls.of_run(config)
        found = next((path for path in (folder, folder / "export") if (path / "config.json").is_file()), None)
        if found is None:
            raise DnoError(
                f"{place}: neither a run directory (policies/) nor a Hugging Face checkpoint (config.json); give one "
                "of them, or a directory of `dno sft` that is finished"
            )
        bring(found)
        return cls(_start(_of_checkpoint(str(found), overrides)), (0,), 0, is_run=False)

    @classmethod
    def of_run(cls, config: RunConfig) -> Speakers:
        """Open the policies of a run whose configuration is known.

        Raises:
            DnoError: it holds no policy yet.
        """
        numbers, best = policies_of(config)
        return cls(_start(config), numbers, best, is_run=True)

    @property
    def longest_prompt(self) -> int:
        context, section = self.runtime.model_config.context, self.runtime.config.sampling
        return max(1, min(_LONGEST_PROMPT, context - section.max_new_tokens))

    def check(self, policy: int) -> int:
        """
        Raises:
            DnoError: there is no such policy.
        """
        return check_policy(policy, self.numbers)

    def answer(self, policy: int, messages: Sequence[Message], *, draw: int, show: Show = lambda text: None) -> Said:
        """Answer a conversation; the same draw of the same conversation is the same answer.

        Raises:
            DnoError: the last message alone is too long, or the template refuses the conversation.
        """
        ids, forgotten = self._fitting(messages)
        request = Request(ids, name_bits(f"chat {draw} {[message.content for message in messages]}"))
        shape = EngineShape(
            slots=1,
            prompt_length=self.longest_prompt,
            entries=1,
            fill_rows=1,
            prefill_chunk=self.runtime.config.sampling.prefill_chunk,
            chunk_steps=_STREAMED_TOKENS,
            kv_dtype=self._kv_dtype,
        )
        with closing(self._generate(policy, [request], shape, num_samples=1, show=show)) as stream:
            (_, answers), *_ = stream
        show(answers[0].text)
        return replace(answers[0], num_forgotten=forgotten)

    def answer_all(
        self, policy: int, prompts: Sequence[Prompt], *, num_samples: int
    ) -> Iterator[tuple[Prompt, tuple[Said, ...]]]:
        """Answer prompts side by side, each yielded when it is finished; what does not fit is an error before any is.

        Raises:
            DnoError: a prompt is too long, or the template refuses it.
        """
        tokenizer, requests = self.runtime.tokenizer, []
        for prompt in prompts:
            ids = tokenizer.prompt_ids(prompt.messages, prompt.assistant_prefix)
            if len(ids) > self.longest_prompt:
                raise DnoError(f"prompt {prompt.prompt_id!r} has {len(ids)} tokens; at most {self.longest_prompt} fit")
            requests.append(Request(ids, name_bits(prompt.prompt_id)))
        if not requests:
            return
        section = self.runtime.config.sampling
        longest = max(len(request.token_ids) for request in requests)
        wanted = Wanted(num_samples, len(requests), prompt_length=longest, max_new_tokens=section.max_new_tokens)
        shape = plan(self.runtime, wanted).programs.shape
        befores = [request.token_ids if prompts[i].assistant_prefix else () for i, request in enumerate(requests)]
        with closing(self._generate(policy, requests, shape, num_samples=num_samples, befores=befores)) as stream:
            for index, answers in stream:
                yield prompts[index], answers

    def _fitting(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], int]:
        """The ids of a conversation, without its oldest turns where it has grown too long; and how many were left."""
        system = [message for message in messages[:1] if message.role == "system"]
        turns, forgotten = list(messages[len(system) :]), 0
        while True:
            ids = self.runtime.tokenizer.prompt_ids([*system, *turns])
            if len(ids) <= self.longest_prompt:
                return ids, forgotten
            if len(turns) < 3:
                raise DnoError(f"the message has {len(ids)} tokens; at most {self.longest_prompt} fit")
            turns, forgotten = turns[2:], forgotten + 2

    def _generate(
        self,
        policy: int,
        requests: Sequence[Request],
        shape: EngineShape,
        *,
        num_samples: int,
        show: Show | None = None,
        befores: Sequence[Sequence[int]] = (),
    ) -> Generator[tuple[int, tuple[Said, ...]], None, None]:
        runtime, section = self.runtime, self.runtime.config.sampling
        decode = partial(_decode, runtime.tokenizer.decode, befores)

        def stop(index: int, ids: Sequence[int]) -> tuple[int, str] | None:
            found = stopped(section.stop, ids, decode=partial(decode, index)) if section.stop else None
            if show is not None:
                show(decode(index, ids) if found is None else found[1])
            return found

        mesh = runtime.submesh.mesh
        params = sampling_params(runtime, num_samples=num_samples)
        programs = CompiledPrograms(runtime.programs.model(DECODE, mesh=mesh), params, shape, mesh)
        watch = stop if section.stop or show is not None else None
        for finished in generate(self._weights(policy), requests, programs, iteration=policy, stop=watch):
            yield (
                finished.index,
                tuple(
                    Said(decode(finished.index, one.token_ids) if one.text is None else one.text, one.finish)
                    for one in finished.responses
                ),
            )

    @property
    def _kv_dtype(self) -> str:
        config = self.runtime.config
        return config.model.dtype if config.sampling.kv_dtype == "auto" else config.sampling.kv_dtype

    def _weights(self, policy: int) -> Any:
        if policy not in self._params:
            runtime = self.runtime
            if self.is_run:
                self._params[policy] = runtime.load_for_decoding(runtime.run_dir.policy(self.check(policy)))
            else:
                held = computing_params(runtime.model_config, jnp.dtype(runtime.config.model.dtype))
                shardings = runtime.programs.param_shardings(DECODE, mesh=runtime.submesh.mesh)
                dtypes = jax.tree.map(lambda leaf: leaf.dtype, held)
                params = read_checkpoint(runtime.config.model.path, shardings=shardings, dtype=dtypes)
                self._params[policy] = unstack_layers(params, donate=True)
        return self._params[policy]


def _decode(decode: Callable[..., str], befores: Sequence[Sequence[int]], index: int, ids: Sequence[int]) -> str:
    return decode(ids, after=befores[index] if befores else ())


def _start(config: RunConfig) -> Runtime[RunConfig]:
    """Lay out this machine's devices, whichever a run had: as the run did where they are as many, else by rows."""
    try:
        make_mesh(config.mesh)
        mesh = config.mesh
    except DnoError:
        mesh = MeshSection()
    training = TrainingSection(batch_size=jax.device_count())  # nothing is trained: any number of devices will do
    return Runtime.start(config.model_copy(update={"mesh": mesh, "training": training}))


def _with(config: RunConfig, overrides: Sequence[str], **fields: Any) -> RunConfig:
    tree = config.model_dump(mode="json") | fields
    for override in overrides:
        lay_over(tree, override, kind=RunConfig)
    sampling = tree["sampling"]
    is_greedy = isinstance(sampling, dict) and sampling.get("temperature") == 0
    if is_greedy:  # of which a run could make no pairs
        tree["sampling"] = sampling | {"temperature": 1.0}
    config = parse_config(RunConfig, tree, place="overrides")
    if is_greedy:
        config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"temperature": 0.0})})
    return config


def _of_checkpoint(path: str, overrides: Sequence[str]) -> RunConfig:
    """A configuration that does nothing but read a checkpoint and sample from it."""
    shape = hf.read_config(path)
    said = json.loads((Path(path) / "config.json").read_text())
    is_half = (said.get("dtype") or said.get("torch_dtype")) == "bfloat16" and jax.default_backend() != "cpu"
    max_new_tokens = max(1, min(512, shape.context // 2))
    tree = {
        "pairing": _PAIRING,
        "run_dir": absolute(path),
        "model": {"path": absolute(path), "dtype": "bfloat16" if is_half else "float32"},
        "sampling": {"max_new_tokens": max_new_tokens},
        "prompts": {"path": absolute(path), "max_length": max(1, min(_LONGEST_PROMPT, shape.context - max_new_tokens))},
    }
    return _with(parse_config(RunConfig, tree, place=path), overrides)


def policies_of(config: RunConfig) -> tuple[tuple[int, ...], int]:
    """Return the policies that a run holds, and the best of them: the newest where nothing has been evaluated.

    Raises:
        DnoError: it holds no policy yet.
    """
    run_dir = RunDir(config.run_dir)
    folder = run_dir.path / "policies"
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    numbers = tuple(sorted(int(path.name) for path in found))
    if not numbers:
        raise DnoError(f"{config.run_dir}: no policy is there yet; `dno import` or `dno run` makes policy 0")
    return numbers, _best(run_dir, config, numbers)


def check_policy(policy: int, numbers: Sequence[int]) -> int:
    """
    Raises:
        DnoError: there is no such policy.
    """
    if policy not in numbers:
        raise DnoError(f"there is no policy {policy}; there are {', '.join(map(str, numbers))}")
    return policy


def _best(run_dir: RunDir, config: RunConfig, numbers: Sequence[int]) -> int:
    try:
        best = best_policy_of(run_dir, iterations=config.iterations)
    except DnoError:
        return numbers[-1]
    return best if best in numbers else numbers[-1]
