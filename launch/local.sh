#!/usr/bin/env bash
# Run one configuration as N CPU processes on this machine (gloo): the rehearsal of a pod.
#   launch/local.sh N CONFIG [a.b=value ...]
# DNO is the command (default: the one on PATH, else .venv's); DNO_PORT the port of process 0 (default: a free one);
# DNO_GRACE the seconds between SIGTERM and SIGKILL (default 120, above grace_seconds of the configuration).
set -euo pipefail
if [ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -lt 43 ]; then
  echo "$0: needs bash 4.3 or newer (wait -n), this is $BASH_VERSION; install one, such as by brew install bash" >&2
  exit 2
fi
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "usage: $0 N CONFIG [a.b=value ...]   (N processes, at least 1)" >&2
  exit 2
fi
num_processes=$1
shift
here=$(cd "$(dirname "$0")/.." && pwd)
dno=${DNO:-$(command -v dno || echo "$here/.venv/bin/dno")}
port=${DNO_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=cpu

pids=()
# SIGTERM, and SIGKILL to what is left: a process that is stopped (SIGSTOP) holds every other signal.
end_all() {
  local seconds=$1 pid
  kill -TERM "${pids[@]}" 2>/dev/null || true
  for ((tenth = 0; tenth < 10 * seconds; tenth++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break # fails only where not one is left
    sleep 0.1
  done
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
}
asked=
trap 'asked=TERM' TERM
trap 'asked=INT' INT
trap 'end_all 10' EXIT
for ((id = 0; id < num_processes; id++)); do
  "$dno" run "$@" --coordinator "127.0.0.1:$port" --num-processes "$num_processes" --process-id "$id" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  while :; do
    one=0
    wait -n || one=$? # whichever ends; more than 128 where a signal has come instead
    if [ -n "$asked" ]; then
      asked=
      end_all "${DNO_GRACE:-120}"
      [ "$one" -le 128 ] || continue
    fi
    break
  done
  # The first to fail says how; the others end by themselves, when they notice, or are ended.
  if [ "$one" -ne 0 ] && [ "$status" -eq 0 ]; then
    status=$one
    end_all 20
  fi
done
trap - EXIT
exit "$status"
