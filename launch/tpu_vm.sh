#!/usr/bin/env bash
# Run one configuration on every host of a Cloud TPU slice; jax finds the other hosts in the TPU's metadata.
#   TPU=name ZONE=zone [PROJECT=id] launch/tpu_vm.sh CONFIG [a.b=value ...]
# The hosts must have the project installed in $DNO_HOME (default ~/dno_jax) with `pip install -e .[tpu]`, and run_dir must be
# on storage that all of them see (a gs:// path or a mounted file system).
set -euo pipefail
: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone}"
: "${1:?usage: TPU=name ZONE=zone launch/tpu_vm.sh CONFIG [a.b=value ...]}"
home=${DNO_HOME:-'~/dno_jax'}
printf -v arguments ' %q' "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker=all \
  --command "cd $home && .venv/bin/dno run$arguments"
