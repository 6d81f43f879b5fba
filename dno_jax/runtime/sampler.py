"""The engine that a run samples with, as its configuration says: ours on this process's devices, or a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from etils import epath

from dno_jax.config import RunConfig
from dno_jax.data.prompts import TokenizedPrompt
from dno_jax.parallel.sharding import DECODE
from dno_jax.records import Source
from dno_jax.runtime.exhausted import explained, sampling_settings
from dno_jax.runtime.runtime import Runtime
from dno_jax.runtime.slots import Wanted, drawing, plan
from dno_jax.sampling.completion import Codec, Task
from dno_jax.sampling.engine import Statistics, generate
from dno_jax.sampling.requests import Finished, Request, SamplingParams
from dno_jax.sampling.server import complete
from dno_jax.sampling.state import CompiledPrograms, EngineShape, Mixture
from dno_jax.sampling.stops import stopped

Stream = Generator[Finished, None, None]


@dataclass(frozen=True)
class SampleSpec:
    """Samples of one distribution: `num_samples` per prompt, numbered from `first_sample`.

    Attributes:
        weight: the initial policy's in the mixture; None draws from the policy alone.
    """

    source: Source
    num_samples: int
    first_sample: int = 0
    weight: float | None = None


@dataclass(frozen=True)
class Sampler:
    """What answers this process's prompts, draw by draw.

    Attributes:
        policy: index t of pi_t; a part of every sample's key, and of the served model's name.
        num_prompts: of the whole list that these are left of, all processes together. Slots follow it, and what a
            server may refuse: a restart decodes as many rows as one run would, and stops where it would.
        num_lost: as `complete` takes it.
        details: how the slots were used, or what the server was asked; each stream fills its own in when it ends.
    """

    runtime: Runtime[RunConfig]
    prompts: Sequence[TokenizedPrompt]
    specs: Sequence[SampleSpec]
    policy: int
    num_prompts: int
    num_lost: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def streams(self, policies: Mapping[str, epath.Path]) -> list[Stream]:
        """Return one stream per draw: prompts, by their index, as their responses are there.

        All processes call this together, also one that has no prompts. A stream must be closed where it is left before
        its end: it holds requests to a server, or a program's memory.

        Args:
            policies: paths by name, as `stages.draw.Draws` has them; a server has weights of its own.

        Raises:
            DnoError: the slots do not fit; from a stream, as `generate` or `complete`.
        """
        if self.runtime.config.sampling.engine == "openai":
            counts: Counter[str] = Counter()
            return [self._from_server(spec, counts) for spec in self.specs]
        shape = self._shapes()  # before weights take the memory that is asked about
        with explained("sampling", sampling_settings(self.runtime.programs, shape[0].slots)):
            params = {name: self.runtime.load_for_decoding(path) for name, path in policies.items()}
        return [self._from_devices(spec, size, params) for spec, size in zip(self.specs, shape, strict=True)]

    def _from_devices(self, spec: SampleSpec, shape: EngineShape, params: Mapping[str, Any]) -> Stream:
        """Sample on the devices of this process's submesh."""
        runtime, section = self.runtime, self.runtime.config.sampling
        statistics, mesh = Statistics(), runtime.submesh.mesh
        model, sampling_params = runtime.programs.model(DECODE, mesh=mesh), self._sampling_params(spec)
        with explained("sampling", sampling_settings(runtime.programs, shape.slots)):
            yield from generate(
                params["policy"],
                self._requests(),
                CompiledPrograms(model, sampling_params, shape, mesh, record_drawn=section.record_drawn_logprob),
                iteration=self.policy,
                mixture=None if spec.weight is None else Mixture(params["initial"], jnp.float32(spec.weight)),
                stop=self._stop if section.stop else None,
                statistics=statistics,
            )
        self.details[f"slots {spec.source}" if len(self.specs) > 1 else "slots"] = {
            "slots": shape.slots,
            "utilisation": round(statistics.utilisation, 4),
            "decode_calls": statistics.decode_calls,
        }

    def _from_server(self, spec: SampleSpec, counts: Counter[str]) -> Stream:
        """Sample from the configured server."""
        section = self.runtime.config.sampling
        task = Task(
            section=section.server,
            sampling_params=self._sampling_params(spec),
            codec=Codec(encode=self._encode, decode=self._decode, text_ids=self.runtime.tokenizer.text_ids),
            iteration=self.policy,
            stop=section.stop,
        )
        yield from complete(self._requests(), task, counts=counts, num_prompts=self.num_prompts, num_lost=self.num_lost)
        self.details["server"] = dict(counts)

    def _requests(self) -> list[Request]:
        return [Request(prompt.token_ids, prompt.name) for prompt in self.prompts]

    def _shapes(self) -> list[EngineShape]:
        """Of every draw: what all of them hold is in memory together."""
        first, *others = (
            Wanted.responses(
                self.runtime.config,
                num_samples=spec.num_samples,
                num_prompts=-(-self.num_prompts // self.runtime.submesh.count),
                num_policies=1 if spec.weight is None else 2,
            )
            for spec in self.specs
        )
        found = plan(self.runtime, replace(first, beside=tuple(others)))
        return [one.programs.shape for one in (found, *found.beside)]

    def _sampling_params(self, spec: SampleSpec) -> SamplingParams:
        return replace(
            sampling_params(self.runtime, num_samples=spec.num_samples),
            first_sample=spec.first_sample,
            max_total_tokens=self.runtime.config.sampling.max_total_tokens,
        )

    def _decode(self, index: int, ids: Sequence[int]) -> str:
        return self.runtime.tokenizer.decode(ids, after=self.prompts[index].text_ids_before)

    def _encode(self, index: int, text: str) -> Sequence[int]:
        prompt = self.prompts[index].prompt
        ids = self.runtime.tokenizer.response_ids(
            prompt.messages, text, end_id=self.runtime.end_ids[0], assistant_prefix=prompt.assistant_prefix
        )
        return ids[:-1]

    def _stop(self, index: int, ids: Sequence[int]) -> tuple[int, str] | None:
        return stopped(self.runtime.config.sampling.stop, ids, decode=partial(self._decode, index))


def sampling_params(runtime: Runtime[RunConfig], *, num_samples: int) -> SamplingParams:
    """How a run's configuration draws, without its bound on prompt and response together."""
    return drawing(
        runtime.config, num_samples=num_samples, end_ids=runtime.end_ids, num_ids=runtime.tokenizer.vocab_size
    )
