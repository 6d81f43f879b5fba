"""What is asked of jax under each launcher's environment, by one table; and what is refused, with what to do."""

import contextlib
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import jax
import pytest

from dno_jax.cli import joining
from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.parallel import cluster, metadata
from dno_jax.parallel.launchers import meeting_of
from dno_jax.parallel.mesh import abstract_mesh
from dno_jax.parallel.metadata import metadata_of

CHECK_PORT = cluster._check_port


def slurm(**changes):
    """The second task of a step of two nodes with eight GPUs each, one task a node."""
    return {
        "SLURM_JOB_ID": "4672", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    } | changes  # fmt: skip


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


OMPI = {
    "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3", "HOSTNAME": "dno-3.dno-pods"}
JOBSET = {**POD, "HOSTNAME": "run-workers-0-3", "JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "workers"}
GKE_TPU = {"TPU_WORKER_HOSTNAMES": "t-0.s,t-1.s,t-2.s,t-3.s", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "head.s:8080"}
EIGHT = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}

# The shell that salloc opens on the first node is a step of one task (LaunchParameters=use_interactive_step).
SALLOC = slurm(
    SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1", SLURM_STEP_NODELIST="gpu007",
    SLURM_PROCID="0", SLURM_NODEID="0", SLURM_JOB_NUM_NODES="2",
)  # fmt: skip

CASES = {
    "slurm": (slurm(), "gpu007:62016", 2, 1, None),
    "slurm, a task for each GPU": (slurm(**EIGHT), "gpu007:62016", 16, 11, (3,)),
    "slurm, two tasks a node": (
        slurm(SLURM_STEP_NUM_TASKS="4", SLURM_STEP_TASKS_PER_NODE="2(x2)", SLURM_PROCID="3", SLURM_LOCALID="1"),
        "gpu007:62016", 4, 3, (4, 5, 6, 7),
    ),
    "slurm, each task bound to its GPU": (slurm(**EIGHT, CUDA_VISIBLE_DEVICES="0"), "gpu007:62016", 16, 11, None),
    "slurm, uneven nodes": (
        slurm(SLURM_STEP_NUM_TASKS="3", SLURM_STEP_TASKS_PER_NODE="2,1", SLURM_PROCID="2", SLURM_NODEID="1"),
        "gpu007:62016", 3, 2, None,
    ),
    "slurm, the step's own variable alone": (without(slurm(), "SLURM_NTASKS"), "gpu007:62016", 2, 1, None),
    "slurm, an older one": (without(slurm(), "SLURM_STEP_NUM_TASKS"), "gpu007:62016", 2, 1, None),
    "slurm, a step smaller than its job": (slurm(SLURM_NTASKS="16"), "gpu007:62016", 2, 1, None),
    "slurm, racks": (slurm(SLURM_STEP_NODELIST="r[1-2]n[07-08,11],x"), "r1n07:62016", 2, 1, None),
    "slurm, names": (slurm(SLURM_STEP_NODELIST="alpha,beta"), "alpha:62016", 2, 1, None),
    "slurm, another port": (slurm(JAX_COORDINATOR_PORT="1234"), "gpu007:1234", 2, 1, None),
    "slurm, CPUs": (without(slurm(), "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"), "gpu007:62016", 2, 1, None),
    "mpirun within a job of SLURM": ({**slurm(), **OMPI}, "10.96.0.1:62624", 16, 9, (1,)),
    "mpirun": (OMPI, "10.96.0.1:62624", 16, 9, (1,)),
    "mpirun, IPv6": (
        OMPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp6://[fe80::1,fe80::2]:4"}, "[fe80::1]:62624", 16, 9, (1,),
    ),
    "mpirun of Open MPI 5 on one host": (
        without(OMPI, "OMPI_MCA_orte_hnp_uri") | {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "1"},
        "127.0.0.1:61440", 8, 1, (1,),
    ),
    "mpirun, told where": (OMPI | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:99"}, "10.0.0.9:99", 16, 9, (1,)),
    "an Indexed Job": (POD | {"JAX_NUM_PROCESSES": "4"}, "dno-0.dno-pods:55527", 4, 3, None),
    "an Indexed Job, told where": (
        POD | {"HOSTNAME": "dno-3", "NNODES": "4", "JAX_COORDINATOR_ADDRESS": "dno-0.any"},
        "dno-0.any:55527", 4, 3, None,
    ),
    "a JobSet": (JOBSET | {"NNODES": "4"}, "run-workers-0-0.run:55527", 4, 3, None),
    "a JobSet of two jobs": (
        JOBSET | {"JAX_NUM_PROCESSES": "8", "JOB_INDEX": "1", "PROCESSES_IN_JOB": "4"},
        "run-workers-0-0.run:55527", 8, 7, None,
    ),
    "a JobSet of two jobs, by the pod's name": (
        JOBSET | {"JAX_NUM_PROCESSES": "8", "HOSTNAME": "run-workers-1-3", "PROCESSES_IN_JOB": "4"},
        "run-workers-0-0.run:55527", 8, 7, None,
    ),
    "a JobSet that does not name its job": (
        without(JOBSET, "REPLICATED_JOB_NAME") | {"NUM_PROCESSES": "4"}, "run-workers-0-0.run:55527", 4, 3, None,
    ),
    "GKE's TPUs": (GKE_TPU | {"JOB_COMPLETION_INDEX": "2"}, "t-0.s:8482", 4, 2, None),
    "GKE's TPUs, two slices": (GKE_TPU | SLICES, "head.s:8482", 8, 6, None),
    "two slices of one host": ({"TPU_WORKER_HOSTNAMES": "t-0.s", **SLICES}, "head.s:8482", 2, 1, None),
    "variables": (
        {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, "h:1", 3, 2, None,
    ),
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What jax is asked for; nobody is met, and nobody watches."""
    calls = []
    client = SimpleNamespace(
        key_value_set=lambda *_: None,
        wait_at_barrier=lambda *_: None,
        key_value_dir_get=lambda key: [(f"{key}{index}", "host") for index in range(99)],
    )

    def initialize(*places, **options):
        calls.append((*places, options))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(cluster.distributed.global_state, "client", client)
    monkeypatch.setattr(cluster.Heartbeat, "__init__", lambda *_: None)
    for name in ("_meet_on_devices", "_check_devices", "_check_port", "_wait_for_name"):
        monkeypatch.setattr(cluster, name, lambda *_: None)
    monkeypatch.setattr(cluster.stopping, "when_asked", lambda *_: None)
    gone = threading.Event()
    monkeypatch.setattr(cluster, "Relay", lambda coordinator: SimpleNamespace(address=coordinator, gone=gone))
    monkeypatch.setattr(cluster, "_joined", None)
    yield calls
    jax.config.update("jax_enable_preemption_service", True)


def set_variables(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("case", CASES)
def test_what_is_asked_of_jax(asked, monkeypatch, case):
    environment, *wanted, local = CASES[case]
    set_variables(monkeypatch, environment)
    cluster.initialize(heartbeat_seconds=40.0)
    ((*places, options),) = asked
    assert places == wanted
    assert options["local_device_ids"] == local
    # Left to itself jax would give a task of SLURM or MPI the one GPU of its number on its host.
    assert options["cluster_detection_method"] == "deactivate"
    # jax's heartbeat aborts, half of this option after a death at the earliest: after ours, which says why.
    assert 2 * 40 < options["heartbeat_timeout_seconds"] <= 2 * 60


@pytest.mark.parametrize(
    "environment",
    [
        {},
        without(slurm(), "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "1"},
        slurm(SLURM_STEP_NUM_TASKS="1"),
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "notebook-0"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        SALLOC | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"},
        slurm(SLURM_STEP_NUM_TASKS="1") | {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "stale"},
        {"TPU_WORKER_HOSTNAMES": "t-0.s", "TPU_WORKER_ID": "0", **SLICES, "MEGASCALE_NUM_SLICES": "1"},
        {"JAX_NUM_PROCESSES": "1", "JAX_COORDINATOR_ADDRESS": "h:1"},
        {"JAX_NUM_PROCESSES": "", "JAX_COORDINATOR_ADDRESS": "", "JAX_PROCESS_ID": " "},  # of a template
        POD | {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_a_lone_process_joins_nothing(asked, monkeypatch, environment):
    set_variables(monkeypatch, environment)
    cluster.initialize()
    assert not asked


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (without(slurm(), "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"), "use srun"),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4"}, "has 4 nodes and 4 tasks, .*: use srun"),
        (slurm(**EIGHT, CUDA_VISIBLE_DEVICES="0,1,2", SLURM_GPUS_ON_NODE="3"), "8 processes on this host see 3 GPUs"),
        (slurm(SLURM_STEP_NUM_TASKS="two"), "SLURM_STEP_NUM_TASKS is 'two' in the environment; expected a whole"),
        (without(slurm(), "SLURM_PROCID"), "SLURM .* does not say which of them this is"),
        (POD, "an Indexed Job .* how many processes there are: set JAX_NUM_PROCESSES"),
        (POD | {"HOSTNAME": "nowhere-3", "NNODES": "4"}, "where process 0 is: give the Job a headless service"),
        (JOBSET | {"JAX_NUM_PROCESSES": "8", "HOSTNAME": "run-workers-1-3"}, "PROCESSES_IN_JOB is not set"),
        (POD | {"JAX_NUM_PROCESSES": "8", "JOB_INDEX": "1"}, "PROCESSES_IN_JOB is not set in the environment"),
        (POD | {"JAX_NUM_PROCESSES": "3"}, "process's number by an Indexed Job is 3 of 3; expected 0 to 2"),
        (without(GKE_TPU, "TPU_WORKER_ID"), "which of them this is: TPU_WORKER_ID is wanted"),
        (SLICES, "multi-slice .*: TPU_WORKER_HOSTNAMES is wanted"),
        (GKE_TPU | without(SLICES, "MEGASCALE_NUM_SLICES"), "multi-slice .*: MEGASCALE_NUM_SLICES is wanted"),
        (GKE_TPU | without(SLICES, "MEGASCALE_SLICE_ID"), "multi-slice .*: MEGASCALE_SLICE_ID is wanted"),
        (GKE_TPU | without(SLICES, "MEGASCALE_COORDINATOR_ADDRESS"), "multi-slice .*: MEGASCALE_COORDINATOR_ADDRESS"),
        ({"TPU_WORKER_ID": "2"}, "how many processes .*: TPU_WORKER_HOSTNAMES, the names of all hosts, is wanted"),
        (GKE_TPU | {"TPU_WORKER_HOSTNAMES": "t-2.s"}, "TPU_WORKER_HOSTNAMES, the names of all hosts, is wanted"),
        (SALLOC, "job 4672 has 2 nodes and 2 tasks, .* without srun, .* the only one: use srun"),
        (SALLOC | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "8"}, "job 4672 has 1 node and 8 tasks, .*: use srun"),
        (without(slurm(**EIGHT), "SLURM_LOCALID"), "SLURM_LOCALID is not set in the environment, though the launcher"),
        (
            {"JAX_NUM_PROCESSES": "4"},
            "JAX_NUM_PROCESSES is set, JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not, .*set all",
        ),
        ({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, JAX_COORD"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_COORDINATOR_ADDRESS is set, .* or none to run alone"),
        (without(OMPI, "OMPI_MCA_orte_hnp_uri"), "Open MPI .* where process 0 is: .*-x JAX_COORDINATOR_ADDRESS="),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h"}, r"torchrun.* started 2 .*--coordinator \$MASTER_ADDR"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, r"PMI started 2 processes .*--process-id \$PMI_RANK"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(environment, said):
    with pytest.raises(DnoError, match=said):
        meeting_of(environment)


def test_flags_come_first_and_fill_what_the_environment_leaves_out():
    every = {"coordinator": "h:1", "num_processes": 2, "process_id": 0}
    broken = without(slurm(), "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    for environment in ({}, broken, {"PMI_SIZE": "2"}):
        found = meeting_of(environment, **every)
        assert (found.coordinator, found.num_processes, found.process_id) == ("h:1", 2, 0)
        assert meeting_of(environment, num_processes=1).num_processes == 1
    assert meeting_of(POD, num_processes=4).num_processes == 4
    assert meeting_of(slurm(), coordinator="h:1").coordinator == "h:1"
    with pytest.raises(DnoError, match="go together: give all three, or none"):
        meeting_of({}, coordinator="h:1")
    with pytest.raises(DnoError, match="--process-id is 2 of 2; expected 0 to 1"):
        meeting_of({}, **every | {"process_id": 2})
    assert meeting_of(SALLOC, num_processes=1, process_id=0).num_processes == 1
    with pytest.raises(DnoError, match="--process-id is 3 of 1; expected 0 to 0"):
        meeting_of({}, **every | {"process_id": 3, "num_processes": 1})
    with pytest.raises(DnoError, match="number of processes by the flags is 0; expected 1 or more"):
        meeting_of({}, **every | {"num_processes": 0})
    with pytest.raises(DnoError, match="the coordinator is 'h'; expected HOST:PORT"):
        meeting_of({}, **every | {"coordinator": "h"})


@contextlib.contextmanager
def metadata_server(attributes):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = attributes.get(self.path.rsplit("/", 1)[1])
            known = found is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"}, ("10.0.0.2:8482", 2, 1)),
        ({"worker-network-endpoints": "t-w-0,t-w-1,t-w-2,t-w-3"}, ("t-w-0:8482", 4, 1)),
        (
            {
                "worker-network-endpoints": "a:b:10.0.1.2,a:b:10.0.1.3",
                "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2:8080'\n",
            },
            ("10.0.0.2:8482", 4, 3),
        ),
        ({"worker-network-endpoints": "a:b:10.0.0.2"}, (None, 1, None)),
    ],
)
def test_a_tpu_vm_is_found_by_its_metadata(attributes, wanted):
    with metadata_server({"agent-worker-number": "1" if wanted[1] > 1 else "0", **attributes}) as host:
        environment = {"GCE_METADATA_IP": host, "TPU_SKIP_MDS_QUERY": "1"}  # jax sets this where it sees no TPU
        found = meeting_of(environment, metadata=metadata_of(environment, tpu_chips=0))
        if wanted[1] == 1:
            assert found is None or found.num_processes == 1
            return
        assert (found.coordinator, found.num_processes, found.process_id) == wanted


def test_half_of_a_tpu_vms_metadata_is_no_lone_machine():
    for attributes in ({"agent-worker-number": "0"}, {"agent-worker-number": "3", "worker-network-endpoints": ""}):
        with metadata_server(attributes) as host:
            environment = {"GCE_METADATA_IP": host}
            asked = metadata_of(environment, tpu_chips=4)
            with pytest.raises(DnoError, match=r"the TPU VM .* no worker-network-endpoints, .*--num-processes 1 where"):
                meeting_of(environment, metadata=asked)
            assert meeting_of(environment, metadata=asked, num_processes=1).num_processes == 1


@contextlib.contextmanager
def halting_server(said):
    """One that begins an answer, and breaks off; and the requests that it has had."""
    listener, asked = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                line, _ = listener.accept()
                with line:
                    asked.append(line.recv(4096))
                    line.sendall(said)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


@pytest.mark.parametrize(
    "said", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n1", b"HTTP/1.1 503 no\r\n\r\n"]
)
def test_metadata_that_breaks_off_is_asked_for_again_and_no_answer(monkeypatch, said):
    monkeypatch.setattr(metadata, "_PAUSE_SECONDS", 0.0)
    with halting_server(said) as (host, asked):
        environment = {"GCE_METADATA_IP": host}
        with pytest.raises(DnoError, match="has TPUs, and its metadata server does not say which host"):
            meeting_of(environment, metadata=metadata_of(environment, tpu_chips=4))
        assert len(asked) == metadata._TRIES
        assert meeting_of(environment, metadata=metadata_of(environment, tpu_chips=0)) is None


def test_who_is_asked_for_metadata(monkeypatch):
    """On any other machine nobody is: the name would not be known, or be asked for in vain."""
    monkeypatch.setattr(metadata, "_PAUSE_SECONDS", 0.0)
    assert metadata_of({}, tpu_chips=0) is None
    assert metadata_of({"JAX_PLATFORMS": "cpu"}, tpu_chips=4) is None
    assert metadata_of({}, tpu_chips=4) is not None
    with metadata_server({}) as host:  # a virtual machine without TPUs
        environment = {"GCE_METADATA_HOST": host}
        assert meeting_of(environment, metadata=metadata_of(environment, tpu_chips=0)) is None
    environment = {"GCE_METADATA_HOST": host}  # which listens no longer
    assert meeting_of(environment, metadata=metadata_of(environment, tpu_chips=0)) is None
    with pytest.raises(DnoError, match="has TPUs, and its metadata server does not say which host"):
        meeting_of(environment, metadata=metadata_of(environment, tpu_chips=4))


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (slurm(), 8),
        (slurm(**EIGHT), 1),
        (slurm(SLURM_STEP_NUM_TASKS="1"), 8),
        (slurm(CUDA_VISIBLE_DEVICES=""), None),  # told to take none
        (without(slurm(), "SLURM_GPUS_ON_NODE"), None),
        (POD | {"NNODES": "4", "NVIDIA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 2),
        (POD | {"NNODES": "4", "NVIDIA_VISIBLE_DEVICES": "all"}, None),
        (GKE_TPU | {"TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_CHIPS_PER_HOST_BOUNDS": "2,4,1"}, 8),
    ],
)
def test_how_many_devices_a_process_is_to_see(environment, devices):
    assert meeting_of(environment).devices == devices


def test_a_host_whose_devices_jax_does_not_see_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    with pytest.raises(DnoError, match=r"SLURM names 8 accelerators .* jax sees 1 cpu device; .*dno_jax\[gpu\]"):
        cluster._check_devices(meeting_of(slurm(SLURM_STEP_NUM_TASKS="1")))
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(DnoError, match="names 2 processes, and jax sees 1: each is alone"):
        cluster._check_devices(meeting_of(slurm()))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    cluster._check_devices(meeting_of(slurm()))


def test_the_line_at_the_start(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others = SimpleNamespace(hosts=["a", "b"])
    monkeypatch.setattr(cluster, "_joined", SimpleNamespace(others=others))
    mesh = abstract_mesh(MeshSection(data=1, fsdp=-1), 16)
    assert cluster.described(mesh) == "16 devices on 2 hosts, mesh data 1 x fsdp 16"
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    others.hosts = ["a"] * 8 + ["b"] * 8
    mesh = abstract_mesh(MeshSection(data=1, fsdp=8, tensor=2), 16)
    assert cluster.described(mesh) == "16 devices of 16 processes on 2 hosts, mesh data 1 x fsdp 8 x tensor 2"
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    monkeypatch.setattr(cluster, "_joined", None)
    assert cluster.described(abstract_mesh(MeshSection(), 1)) == "1 device on 1 host, mesh data 1 x fsdp 1"


def test_a_port_that_somebody_has_is_said(asked):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(DnoError, match=f"port {port}, .* cannot be listened at .*JAX_COORDINATOR_PORT"):
            CHECK_PORT(f"here:{port}")
    CHECK_PORT(f"here:{port}")


def test_who_waits_in_vain_says_so_and_may_be_started_again(asked, monkeypatch):
    """jax would abort the process, later."""
    ended = []
    monkeypatch.setattr(cluster, "_MEET_SECONDS", 0.05)
    monkeypatch.setattr(cluster.stopping, "end_now", lambda why, status: ended.append((why, status)))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: time.sleep(0.5))
    cluster.initialize(coordinator="node1:99", num_processes=2, process_id=1)
    ((why, status),) = ended
    assert status == 75
    assert "process 1 of 2 (by the flags) has not met the others at node1:99" in why


def test_who_fails_and_has_no_reader_any_more_still_tells_the_others(monkeypatch):
    """A terminal that has gone: the traceback cannot be written, and jax would wait for the others at the exit."""
    ended = []

    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(cluster, "await_verdict", lambda error: None)
    monkeypatch.setattr(cluster.os, "_exit", ended.append)
    monkeypatch.setattr(cluster.distributed.global_state, "num_processes", 2)
    monkeypatch.setattr(
        cluster, "_joined", SimpleNamespace(heartbeat=SimpleNamespace(fail=lambda status: ended.append(-status)))
    )
    monkeypatch.setattr(sys, "excepthook", gone)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(flush=gone))
    joining.leave(1, ValueError("of its own"))
    assert ended == [-1, 1]
