#!/usr/bin/env bash
# Everything that one card can say of this project, in under eight minutes and one JSON file:
#   benchmarks/accelerator.sh [OUT.json] [--small]
# kernels against XLA, the demo end to end, train MFU and decode MBU at the shapes of 1B and 7B, memory predicted and
# measured. --small takes shapes that a CPU goes through: the rehearsal.
# It wants Python with jax for the card. What else the project needs is installed into a folder beside, from the wheels in
# WHEELS where that is set (no network: `pip download -d WHEELS .` elsewhere makes it). PYTHON names another interpreter.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=accelerator.json
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  out=$1
  shift
fi
if ! PYTHONPATH=$here "$python" -c 'import jax, flax, optax, orbax.checkpoint, transformers, dno_jax.cli.main' 2>/dev/null; then
  venv=${DNO_VENV:-${TMPDIR:-/tmp}/dno-accelerator}
  "$python" -m venv --system-site-packages "$venv"
  from=()
  if [ -n "${WHEELS:-}" ]; then
    from=(--no-index --find-links "$WHEELS")
  fi
  "$venv/bin/python" -m pip install --quiet "${from[@]}" "$here"
  python=$venv/bin/python
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92} # XLA's own default is three quarters
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$here/benchmarks/accelerator.py" --out "$out" "$@"
