"""A JobSet of one run, for GPUs or for TPUs, and a Job that annotates beside it on CPUs."""

from __future__ import annotations

from typing import Any

import yaml

from dno_jax.launch.values import Annotating, LaunchValues, Tpus, Volume

_WORKERS, _CONTAINER = "workers", "dno"
_PORT = 55527
# What no restart mends: an error of ours (1), and what its user must (2). All else is preemption, or a host's death.
_FINAL = [1, 2]
# A shell that is process 1 hands SIGTERM on only where it is told to; its `wait` then ends with 143.
_EVERY_ITERATION = """trap 'kill -TERM "$one"' TERM
for t in {iterations}; do
  dno annotate "$@" --iteration "$t" & one=$!
  while :; do
    status=0; wait "$one" || status=$?
    [ "$status" -eq 143 ] || break
  done
  [ "$status" -eq 0 ] || exit "$status"
done
"""
_CAPACITY = {
    "on-demand": {},
    "spot": {"cloud.google.com/gke-spot": "true"},
    "flex-start": {"cloud.google.com/gke-flex-start": "true"},
}


def manifest(values: LaunchValues) -> str:
    """Return the YAML for `kubectl apply -f`."""
    documents = [_jobset(values)]
    if values.annotate is not None:
        documents.append(_annotating(values, values.annotate))
    return yaml.safe_dump_all(documents, sort_keys=False)


def _jobset(values: LaunchValues) -> dict[str, Any]:
    accelerators = values.gpus or values.tpus
    assert accelerators is not None
    slices = values.tpus.slices if values.tpus else 1
    annotations = (
        {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if values.tpus else {}
    )
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(values, values.name, annotations),
        "spec": {
            # Pods find pod 0 by name, also before it is ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": values.max_restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {
                    "name": _WORKERS,
                    "replicas": slices,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "parallelism": accelerators.hosts,
                            "completions": accelerators.hosts,
                            "backoffLimit": 0,  # one pod's end is the end of all: the JobSet starts them again
                            "podFailurePolicy": {"rules": _pod_rules()},
                            "template": {"spec": _worker(values)},
                        }
                    },
                }
            ],
        },
    }


def _pod_rules() -> list[dict[str, Any]]:
    return [
        {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": _FINAL}},
    ]


def _annotating(values: LaunchValues, wanted: Annotating) -> dict[str, Any]:
    """A Job without accelerators: it follows the samples of one iteration after the other."""
    arguments = [*_recipe(values), "annotation.apart=true"]
    arguments.append(f"annotation.store={wanted.store.path}/verdicts.sqlite")
    loop = _EVERY_ITERATION.format(iterations=" ".join(map(str, range(wanted.iterations))))
    pod = _pod(values, wanted, ["sh", "-c", loop, "annotate", *arguments], volumes=[values.volume, wanted.store])
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(values, f"{values.name}-annotate", {}),
        "spec": {
            "backoffLimit": values.max_restarts,
            "podFailurePolicy": {"rules": _pod_rules()},
            "template": {"spec": pod},
        },
    }


def _metadata(values: LaunchValues, name: str, annotations: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "labels": {"app.kubernetes.io/name": "dno"}}
    if values.namespace is not None:
        found["namespace"] = values.namespace
    if values.queue is not None:
        found["labels"]["kueue.x-k8s.io/queue-name"] = values.queue
    if annotations:
        found["annotations"] = annotations
    return found


def _pod(
    values: LaunchValues, size: LaunchValues | Annotating, command: list[str], *, volumes: list[Volume]
) -> dict[str, Any]:
    names = ["shared", "store"][: len(volumes)]
    container = {
        "name": _CONTAINER,
        "image": values.image,
        "command": command[:1],
        "args": command[1:],
        "env": _environment(values),
        "resources": {
            "requests": {"cpu": size.cpu, "memory": size.memory},
            "limits": {"memory": size.memory},
        },
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": name, "mountPath": it.path} for name, it in zip(names, volumes, strict=True)],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": values.grace_seconds,
        "securityContext": {"runAsNonRoot": True, "runAsUser": values.user, "fsGroup": values.user},
        "containers": [container],
        "volumes": [
            {"name": name, "persistentVolumeClaim": {"claimName": it.claim}}
            for name, it in zip(names, volumes, strict=True)
        ],
    }
    if values.service_account is not None:
        pod["serviceAccountName"] = values.service_account
    return pod


def _worker(values: LaunchValues) -> dict[str, Any]:
    apart = [] if values.annotate is None else ["annotation.apart=true"]
    if apart and not any(text.startswith("annotation.store=") for text in values.overrides):
        apart.append(f"annotation.store={values.volume.path}/{values.name}-verdicts.sqlite")  # evaluation's
    command = ["dno", "run", *_recipe(values), *apart]
    pod = _pod(values, values, command, volumes=[values.volume])
    (container,) = pod["containers"]
    if values.gpus is not None:
        gpus = values.gpus
        taken = {gpus.resource: gpus.per_host}
        pod["nodeSelector"] = dict(gpus.node_labels)
        pod["tolerations"] = [{"key": gpus.resource, "operator": "Exists", "effect": "NoSchedule"}]
        pod["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})  # NCCL's
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
        # GKE tells pods with TPUs by itself what this tells those with GPUs.
        first = f"{values.name}-{_WORKERS}-0-0.{values.name}:{_PORT}"
        container["env"] += [
            {"name": "JAX_NUM_PROCESSES", "value": str(gpus.hosts)},
            {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
        ]
    else:
        assert values.tpus is not None
        taken = {"google.com/tpu": values.tpus.per_host}
        pod["nodeSelector"] = _tpu_nodes(values.tpus)
    for part in ("requests", "limits"):
        container["resources"][part] |= taken
    return pod


def _recipe(values: LaunchValues) -> list[str]:
    """The configuration and its overrides as Kubernetes is to hand them on, which puts variables in for $(NAME)."""
    return [text.replace("$", "$$") for text in (values.config, *values.overrides)]


def _environment(values: LaunchValues) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": name, "value": text} for name, text in values.environment.items()]
    for name, place in values.secrets.items():
        reference = {"name": place.secret, "key": place.key}
        found.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return found


def _tpu_nodes(tpus: Tpus) -> dict[str, str]:
    return {
        "cloud.google.com/gke-tpu-accelerator": tpus.accelerator,
        "cloud.google.com/gke-tpu-topology": tpus.topology,
        **_CAPACITY[tpus.capacity],
    }
