"""What a manifest is made of, each value typed and looked at before a cluster sees it."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from dno_jax.config import Section
from dno_jax.config.base import Count, VariableName
from dno_jax.display import hide_keys


def _label(text: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", text):
        raise ValueError(
            f"{text!r} is no name of Kubernetes; expected at most 42 of a-z, 0-9 and -, with a letter at the start"
        )
    return text


def _cpus(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?|\d+m", text) or not float(text.rstrip("m")):
        raise ValueError(f"{text!r} is no number of CPUs; expected such as 8, 1.5 or 500m")
    return text


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[MGTP]i?", text) or not float(re.split("[MGTP]", text)[0]):
        raise ValueError(f"{text!r} is no quantity of memory; expected such as 64Gi (without a unit it would be bytes)")
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError(f"{text!r}: expected an absolute path in the container")
    return text


def _mounted(text: str) -> str:
    if ":" in _absolute(text) or not text.strip("/") or ".." in text.split("/"):
        raise ValueError(f"{text!r}: nothing can be mounted there; expected such as /data")
    return text


Label = Annotated[str, AfterValidator(_label)]
Cpus = Annotated[str, AfterValidator(_cpus)]
Memory = Annotated[str, AfterValidator(_memory)]
ContainerPath = Annotated[str, AfterValidator(_absolute)]
MountPath = Annotated[str, AfterValidator(_mounted)]


class SecretKey(Section):
    """A key of a secret that the cluster holds."""

    secret: Label = Field(description="the name of the Secret")
    key: str = Field(description="which of its keys", pattern=r"^[-._a-zA-Z0-9]+$")


class Volume(Section):
    """Storage that outlives the pods."""

    claim: Label = Field(description="a PersistentVolumeClaim; ReadWriteMany where several pods share it")
    path: MountPath = Field(description="where it is mounted")


class Annotating(Section):
    """A Job without accelerators that judges beside the run; the pods then wait for its verdicts."""

    iterations: Count = Field(description="as many as the recipe has")
    store: Volume = Field(description="storage of this Job alone, for the verdicts: ReadWriteOnce will do")
    cpu: Cpus = Field(default="4", description="CPUs that it asks for")
    memory: Memory = Field(default="16Gi", description="memory that it asks for, and may not exceed")


class Gpus(Section):
    """Hosts with GPUs."""

    hosts: Count = Field(default=1, description="pods, one for each host")
    per_host: Count = Field(default=8, description="GPUs of a host, all of which its one process takes")
    resource: str = Field(default="nvidia.com/gpu", description="their name among the node's resources")
    node_labels: dict[str, str] = Field(
        default={}, description="labels of the nodes, such as cloud.google.com/gke-accelerator: nvidia-h200-141gb"
    )


_AXES = {"tpu-v5-lite": 2, "tpu-v6e": 2, "tpu-v4": 3, "tpu-v5p": 3, "tpu7x": 3}  # of the topologies of a kind


class Tpus(Section):
    """Slices of TPUs of GKE."""

    accelerator: str = Field(description="such as tpu-v5-lite-podslice", pattern=r"^tpu[-a-z0-9]*$")
    topology: str = Field(description="of one slice, such as 4x4 or 4x4x4", pattern=r"^[1-9]\d*x[1-9]\d*(x[1-9]\d*)?$")
    per_host: Count = Field(default=4, description="chips of a host")
    slices: Count = Field(default=1, description="slices, between which data is split")
    capacity: Literal["on-demand", "spot", "flex-start"] = Field(default="on-demand", description="how nodes are had")

    @property
    def hosts(self) -> int:
        return math.prod(map(int, self.topology.split("x"))) // self.per_host

    @model_validator(mode="after")
    def _whole_hosts(self) -> Tpus:
        wanted = next((axes for kind, axes in _AXES.items() if self.accelerator.startswith(kind)), None)
        if wanted is not None and len(self.topology.split("x")) != wanted:
            raise ValueError(
                f"topology {self.topology}: slices of {self.accelerator} have {wanted} axes; expected such as "
                f"{'x'.join('4' * wanted)}"
            )
        chips = math.prod(map(int, self.topology.split("x")))
        if chips % self.per_host:
            raise ValueError(
                f"topology {self.topology} has {chips} chips, which per_host={self.per_host} does not divide"
            )
        return self


class LaunchValues(Section):
    """One run on a cluster: a JobSet, and, where the judge needs no accelerator, a Job that annotates beside it."""

    name: Label = Field(description="of the JobSet")
    namespace: Label | None = Field(default=None, description="None: that of kubectl's context")
    image: str = Field(description="the container image, with a tag or a digest", pattern=r"^\S+[:@]\S+$")
    config: ContainerPath = Field(description="the recipe, as the container sees it")
    overrides: tuple[str, ...] = Field(default=(), description="fields to set, such as run_dir=/data/runs/a")
    gpus: Gpus | None = Field(default=None, description="where it runs on GPUs")
    tpus: Tpus | None = Field(default=None, description="where it runs on TPUs")
    cpu: Cpus = Field(default="32", description="CPUs that a pod asks for")
    memory: Memory = Field(default="200Gi", description="memory that a pod asks for, and may not exceed")
    volume: Volume = Field(description="storage of all pods, in which run_dir, the model and the prompts lie")
    secrets: dict[VariableName, SecretKey] = Field(default={}, description="variables that the cluster's secrets fill")
    environment: dict[VariableName, str] = Field(default={}, description="variables that may be read by all")
    queue: Label | None = Field(default=None, description="a LocalQueue of Kueue")
    service_account: Label | None = Field(default=None, description="None: the namespace's default")
    max_restarts: int = Field(default=50, ge=0, description="after preemptions and losses of hosts")
    grace_seconds: Count = Field(default=120, description="between SIGTERM and SIGKILL; above the recipe's")
    annotate: Annotating | None = Field(default=None, description="a Job on CPU nodes judges meanwhile")
    user: Count = Field(default=1000, description="the user and group that the container runs as; not root")

    @field_validator("environment")
    @classmethod
    def _no_keys(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if hide_keys(text) != text or re.search(r"(?i)(key|token|secret|password)$", name):
                raise ValueError(
                    f"{name}: keys do not go into manifests; put it into a Secret and name that in `secrets`"
                )
        return value

    @field_validator("overrides")
    @classmethod
    def _no_keys_either(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if "=" not in text:
                raise ValueError(f"{text!r}: expected FIELD=VALUE")
            if hide_keys(text) != text:
                raise ValueError(f"{text.split('=')[0]}: keys do not go into manifests; name a variable of `secrets`")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> LaunchValues:
        if (self.gpus is None) == (self.tpus is None):
            raise ValueError("give one of gpus and tpus")
        return self

    @model_validator(mode="after")
    def _nothing_twice(self) -> LaunchValues:
        if twice := sorted(self.environment.keys() & self.secrets.keys()):
            raise ValueError(f"{', '.join(twice)}: in environment and in secrets; give it in one of them")
        if ours := sorted(self.environment.keys() & {"JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"}):
            raise ValueError(f"environment: {', '.join(ours)} would part the pods; leave it out, the manifest says it")
        if self.annotate is not None and self.annotate.store.path.rstrip("/") == self.volume.path.rstrip("/"):
            raise ValueError(f"annotate.store.path is volume.path, {self.volume.path}; give another one")
        return self
