"""Where the processes of one run meet, by what their launcher leaves in the environment. Nothing here imports jax.

jax finds some of this by itself, but gives a process of SLURM one GPU of its node, wants a package on Kubernetes, and
says nothing where a process of several would run alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from dno_jax.errors import DnoError

Environment = Mapping[str, str]
Metadata = Callable[[str], str | None]  # an attribute of a machine, by its name

_TPU_PORT, _PORT = "8482", "55527"  # nobody can agree on one at run time
_OWN_STEPS = 0xFFFFFFF0  # SLURM numbers from here the batch script, and the shell that salloc opens on a node
FLAGS = "--coordinator HOST:PORT --num-processes N --process-id I"
# Where manifests of Indexed Jobs say how many pods there are; Kubernetes itself tells a pod only which it is.
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_COUNTS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "NUM_PROCESSES", "NNODES", "JOB_COMPLETIONS", "WORLD_SIZE")


@dataclass(frozen=True)
class Meeting:
    """Which of how many processes this is, and where they meet.

    Attributes:
        told_by: whose words these are.
        coordinator: host:port of process 0.
        local_device_ids: the accelerators of this host that are this process's; None: all that it sees.
        devices: how many of them it is to see, where that is said.
        advice: what to do where something is not said.
    """

    told_by: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    devices: int | None = None
    advice: str = f"give {FLAGS}"


def meeting_of(
    environment: Environment,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    metadata: Metadata | None = None,
) -> Meeting | None:
    """Return where this process meets the others; None where nothing says that there is more than one.

    Args:
        coordinator, num_processes, process_id: as explicit flags; they override what the environment says.
        metadata: reads an attribute of a Cloud TPU VM; None: this is none.

    Raises:
        DnoError: something of it is missing, contradicts itself, or has been started in a way that cannot work.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = {name: value for name, value in given.items() if value is not None}
    if num_processes == 1 and not process_id:
        return Meeting("the flags", num_processes=1)
    if len(given) == 3:
        found = Meeting("the flags")
    else:
        found = _told(environment, metadata)
        if found is None and given:
            raise DnoError(
                "--coordinator, --num-processes and --process-id go together: give all three, or none (nothing in the "
                "environment says the rest)"
            )
        if found is None:
            return None
        if found.num_processes != 1 and (address := environment.get("JAX_COORDINATOR_ADDRESS")):
            port = environment.get("JAX_COORDINATOR_PORT", _PORT)
            found = replace(found, coordinator=address if re.search(r":\d+$", address) else f"{address}:{port}")
    return _checked(replace(found, **given))


def _checked(found: Meeting) -> Meeting:
    count, index = found.num_processes, found.process_id
    if count == 1 and found.told_by != "the flags":
        return found
    if count is not None and count < 1:
        raise DnoError(f"the number of processes by {found.told_by} is {count}; expected 1 or more")
    missing = [
        words
        for words, value in (("how many processes there are", count), ("which of them this is", index))
        if value is None
    ]
    if found.coordinator is None:
        missing.append("where process 0 is")
    if missing or count is None or index is None:
        raise DnoError(f"{found.told_by} started this process and does not say {' nor '.join(missing)}: {found.advice}")
    if not 0 <= index < count:
        flag = "--process-id" if found.told_by == "the flags" else f"the process's number by {found.told_by}"
        raise DnoError(f"{flag} is {index} of {count}; expected 0 to {count - 1}")
    if not re.fullmatch(r".+:\d+", found.coordinator or ""):
        raise DnoError(f"the coordinator is {found.coordinator!r}; expected HOST:PORT of process 0")
    return found


def _told(environment: Environment, metadata: Metadata | None) -> Meeting | None:
    for launcher in (_by_variables, _open_mpi, _slurm, _gke_tpu, partial(_tpu_vm, metadata=metadata), _indexed_job):
        if (found := launcher(environment)) is not None:
            return found
    for count, whose in (("PMI_SIZE", "PMI"), ("PMIX_SIZE", "PMIx"), ("WORLD_SIZE", "torchrun, or one like it,")):
        if _number(environment, count, default=1) > 1:
            where = "$MASTER_ADDR:12355" if count == "WORLD_SIZE" else "HOST:PORT"
            rank = "RANK" if count == "WORLD_SIZE" else count.replace("SIZE", "RANK")
            raise DnoError(
                f"{whose} started {environment[count]} processes ({count}), and does not say where process 0 listens; "
                f"give --coordinator {where} --num-processes ${count} --process-id ${rank}, or unset {count} to run "
                "alone"
            )
    return _half_told(environment)


def _half_told(environment: Environment) -> Meeting | None:
    """
    Raises:
        DnoError: some of the three variables are set, and nobody says the rest.
    """
    there = [name for name in _VARIABLES if environment.get(name, "").strip()]
    if not there or _number(environment, "JAX_NUM_PROCESSES", default=0) == 1:
        return None
    raise DnoError(
        f"{' and '.join(there)} {_are(there)} set, "
        f"{' and '.join(name for name in _VARIABLES if name not in there)} not, and nothing else in the environment "
        "says the rest; set all three, or none to run alone"
    )


def _by_variables(environment: Environment) -> Meeting | None:
    """The three flags as variables, for manifests and containers."""
    if not all(name in environment for name in _VARIABLES):
        return None
    count, index = (_number(environment, name) for name in _VARIABLES[1:])
    return Meeting("JAX_NUM_PROCESSES", num_processes=count, process_id=index)


def _open_mpi(environment: Environment) -> Meeting | None:
    if _number(environment, "OMPI_COMM_WORLD_SIZE", default=1) < 2:
        return None
    count, index = (_number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    job = re.match(r"\d+", uri)
    head = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    coordinator = None
    tasks = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1)
    port = environment.get("JAX_COORDINATOR_PORT") or _high_port(int(job[0]) // 4096 if job else 0)
    if head is not None:
        coordinator = f"{head[1] or f'[{head[2]}]'}:{port}"
    elif tasks == count:  # all on this host
        coordinator = f"127.0.0.1:{port}"
    rank = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", default=0)
    return Meeting(
        "Open MPI", coordinator, count, index, _shared_out(environment, tasks, rank, on_node=None),
        advice="this version leaves that out; start by mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT, of the first host",
    )  # fmt: skip


def _slurm(environment: Environment) -> Meeting | None:
    if "SLURM_JOB_ID" not in environment:
        return None
    on_node = _number(environment, "SLURM_GPUS_ON_NODE", default=0) or None
    step = any(f"SLURM_STEP_{name}" in environment for name in ("ID", "NODELIST", "NUM_TASKS"))
    if not step or _number(environment, "SLURM_STEP_ID", default=0) >= _OWN_STEPS:
        nodes = _number(environment, "SLURM_JOB_NUM_NODES", default=_number(environment, "SLURM_NNODES", default=1))
        tasks = _number(environment, "SLURM_NTASKS", default=nodes)
        if max(nodes, tasks) > 1:
            raise DnoError(
                f"SLURM's job {environment['SLURM_JOB_ID']} has {nodes} node{'s' if nodes > 1 else ''} and {tasks} "
                "tasks, and this process was started without srun, so that it is the only one: use srun (`srun dno run "
                "CONFIG`, as launch/slurm.sbatch does), or --num-processes 1 to run alone"
            )
        return Meeting("SLURM", num_processes=1, devices=_seen(environment, on_node))
    count = _number(environment, "SLURM_STEP_NUM_TASKS", default=_number(environment, "SLURM_NTASKS", default=1))
    if count == 1:
        return Meeting("SLURM", num_processes=1, devices=_seen(environment, on_node))
    hosts = next((environment[name] for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
                  if name in environment), "")  # fmt: skip
    tasks = _tasks_here(environment, count)
    task = _number(environment, "SLURM_LOCALID", default=0 if tasks == 1 else None)
    local = _shared_out(environment, tasks, task, on_node=on_node)
    job = _number(environment, "SLURM_JOB_ID") + _number(environment, "SLURM_STEP_ID", default=0)
    return Meeting(
        "SLURM",
        f"{_first_host(hosts)}:{environment.get('JAX_COORDINATOR_PORT') or _high_port(job)}" if hosts else None,
        count,
        _number(environment, "SLURM_PROCID") if "SLURM_PROCID" in environment else None,
        local,
        None if on_node is None else _seen(environment, on_node // tasks),
    )


def _gke_tpu(environment: Environment) -> Meeting | None:
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    return _tpu_slices(environment, [host.strip().rsplit(":", 1)[0] for host in hosts.split(",") if host.strip()])


def _tpu_vm(environment: Environment, metadata: Metadata | None) -> Meeting | None:
    """A plain TPU VM keeps in its metadata what Kubernetes has in the environment."""
    if metadata is None or (worker := metadata("agent-worker-number")) is None:
        return None
    ends = (metadata("worker-network-endpoints") or "").strip()
    if not ends:
        return Meeting(
            "the TPU VM", process_id=_number({"agent-worker-number": worker}, "agent-worker-number"),
            advice="its metadata has agent-worker-number and no worker-network-endpoints, which names its hosts; "
            f"give {FLAGS}, or --num-processes 1 where it is the only one",
        )  # fmt: skip
    hosts = [end.split(":")[-1] for end in ends.split(",") if end]  # an address, or name:id:address
    told = dict(re.findall(r"^\s*(\w+)\s*:\s*'?([^'\n]*)'?\s*$", metadata("tpu-env") or "", flags=re.MULTILINE))
    return _tpu_slices({**told, **environment, "TPU_WORKER_ID": worker.strip()}, hosts)


def _tpu_slices(environment: Environment, hosts: list[str]) -> Meeting | None:
    """Several hosts of a slice, or several slices of equal size, whose coordinator is also jax's."""
    slices = _number(environment, "MEGASCALE_NUM_SLICES", default=1)
    devices = _product(environment.get("TPU_CHIPS_PER_PROCESS_BOUNDS") or environment.get("TPU_CHIPS_PER_HOST_BOUNDS"))
    if (slices > 1 or "MEGASCALE_NUM_SLICES" not in environment) and "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        names = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "TPU_WORKER_HOSTNAMES")
        missing = [name for name in names if not environment.get(name, "").strip() and not (name == names[2] and hosts)]
        if missing:
            return Meeting("multi-slice", advice=f"{' and '.join(missing)} {_are(missing)} wanted; or give {FLAGS}")
    elif slices > 1:
        return Meeting("multi-slice", advice=f"MEGASCALE_COORDINATOR_ADDRESS is wanted; or give {FLAGS}")
    if len(hosts) * slices <= 1:
        if _number(environment, "TPU_WORKER_ID", default=0) > 0:
            return Meeting(
                "the TPU", process_id=_number(environment, "TPU_WORKER_ID"),
                advice=f"TPU_WORKER_HOSTNAMES, the names of all hosts, is wanted beside TPU_WORKER_ID; or give {FLAGS}",
            )  # fmt: skip
        return None if devices is None and not hosts else Meeting("the TPU", num_processes=1, devices=devices)
    worker = None if len(hosts) > 1 else 0
    if "TPU_WORKER_ID" in environment:
        worker = _number(environment, "TPU_WORKER_ID")
    head = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").rsplit(":", 1)[0] or hosts[0]
    part = _number(environment, "MEGASCALE_SLICE_ID", default=0)
    return Meeting(
        "the TPU",
        f"{head}:{environment.get('JAX_COORDINATOR_PORT', _TPU_PORT)}",
        len(hosts) * slices,
        None if worker is None else part * len(hosts) + worker,
        devices=devices,
        advice=f"TPU_WORKER_ID is wanted beside TPU_WORKER_HOSTNAMES; or give {FLAGS}",
    )


def _indexed_job(environment: Environment) -> Meeting | None:
    """A pod of an Indexed Job or a JobSet: its name and its headless service say where pod 0 is."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    index = _number(environment, "JOB_COMPLETION_INDEX")
    named = re.search(r"-(\d+)-\d+$", environment.get("HOSTNAME", "").split(".")[0])
    job = int(named[1]) if named and "JOBSET_NAME" in environment else 0
    if job := _number(environment, "JOB_INDEX", default=job):
        index += job * _number(environment, "PROCESSES_IN_JOB")
    count = next((_number(environment, name) for name in _COUNTS if name in environment), None)
    listed = environment.get("NVIDIA_VISIBLE_DEVICES", "")
    devices = len(listed.split(",")) if re.match(r"GPU-|MIG-|\d", listed) else None
    advice = f"set JAX_NUM_PROCESSES in the manifest to the number of its pods (1: run alone), or give {FLAGS}"
    head = _first_pod(environment)
    if count is not None:
        advice = (
            "give the Job a headless service (its subdomain), or set JAX_COORDINATOR_ADDRESS in the manifest "
            "(launch/README.md)"
        )
    return Meeting(
        "an Indexed Job",
        None if head is None else f"{head}:{environment.get('JAX_COORDINATOR_PORT', _PORT)}",
        count,
        index,
        devices=_seen(environment, devices),
        advice=advice,
    )


def _first_pod(environment: Environment) -> str | None:
    name, jobset = environment.get("HOSTNAME", ""), environment.get("JOBSET_NAME")
    if jobset:
        job = environment.get("REPLICATED_JOB_NAME")
        prefix = f"{jobset}-{job}" if job else re.sub(r"-\d+-\d+$", "", name.split(".")[0])
        return f"{prefix}-0-0.{jobset}"
    domain = environment.get("JOB_SERVICE") or _own_domain(name)
    found = re.fullmatch(r"(.+)-\d+", name.split(".")[0])
    return f"{found[1]}-0.{domain}" if found and domain else None


def _own_domain(name: str) -> str | None:
    """What follows a pod's name in its own file of hosts: the service that gives its siblings names too."""
    if "." in name:
        return name.split(".", 1)[1]
    try:
        with open("/etc/hosts", encoding="utf-8") as file:
            found = re.search(rf"\s{re.escape(name)}\.(\S+)", file.read()) if name else None
    except OSError:
        return None
    return None if found is None else found[1]


def _shared_out(environment: Environment, tasks: int, task: int, *, on_node: int | None) -> tuple[int, ...] | None:
    """Return a task's part of the GPUs that all tasks of its node see; None where each sees its own."""
    visible = _visible(environment)
    seen = on_node if visible is None else visible
    if tasks == 1 or not seen:
        return None
    if visible is not None and visible < (on_node or tasks):  # bound to the task by the launcher
        return None
    if seen % tasks:
        raise DnoError(
            f"{tasks} processes on this host see {seen} GPUs, which cannot be shared out evenly; start one process for "
            "each host (--ntasks-per-node=1), or a number that divides them"
        )
    share = seen // tasks
    return tuple(range(task * share, (task + 1) * share))


def _seen(environment: Environment, devices: int | None) -> int | None:
    """How many devices a process is to see; nothing is said of GPUs where it is told to take none."""
    return None if _visible(environment) == 0 else devices


def _visible(environment: Environment) -> int | None:
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in environment:
            listed = [part.strip() for part in environment[name].split(",")]
            return len([part for part in listed if part not in ("", "-1", "NoDevFiles", "none")])
    return None


def _tasks_here(environment: Environment, count: int) -> int:
    """Tasks of this node, of "8", "2(x3),1"."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    nodes = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    node = _number(environment, "SLURM_NODEID", default=0)
    if node < len(nodes):
        return nodes[node]
    nodes_there = _number(environment, "SLURM_STEP_NUM_NODES", default=_number(environment, "SLURM_NNODES", default=1))
    return max(count // max(nodes_there, 1), 1)


def _first_host(hosts: str) -> str:
    """The first of "node001", "a,b", "rack1n[007-015,3],x" or "r[1-2]n[3-4]"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else hosts)


def _high_port(number: int) -> str:
    return str(61440 + number % 4096)


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _product(bounds: str | None) -> int | None:
    return None if not bounds or not re.fullmatch(r"\d+(,\d+)*", bounds) else math.prod(map(int, bounds.split(",")))


def _number(environment: Environment, name: str, *, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None or not text.strip():
        if default is None:
            raise DnoError(f"{name} is not set in the environment, though the launcher's other variables are")
        return default
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise DnoError(f"{name} is {text!r} in the environment; expected a whole number, as its launcher sets it")
    return int(text)
