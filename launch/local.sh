#!/usr/bin/env bash
# Run one configuration as N CPU processes on this machine (gloo): the rehearsal of a pod.
#   launch/local.sh N CONFIG [a.b=value ...]
# DNO is the command (default: the one on PATH, else .venv's); DNO_PORT the port of process 0 (default: a free one).
set -euo pipefail
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
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT INT TERM
for ((id = 0; id < num_processes; id++)); do
  "$dno" run "$@" --coordinator "127.0.0.1:$port" --num-processes "$num_processes" --process-id "$id" &
  pids+=($!)
done
# The first process to fail ends the others: they would wait for it in a collective.
for ((left = num_processes; left > 0; left--)); do
  wait -n || exit $?
done
trap - EXIT
