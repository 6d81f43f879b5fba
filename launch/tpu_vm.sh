#!/usr/bin/env bash
# One configuration on every host of a Cloud TPU slice, as a queued resource; the hosts find each other by metadata.
#   TPU=name ZONE=zone [PROJECT=id] launch/tpu_vm.sh request v5litepod-16 v2-alpha-tpuv5-lite [--spot | --flex-start 24h]
#   TPU=name ZONE=zone [PROJECT=id] launch/tpu_vm.sh run CONFIG [a.b=value ...]
#   TPU=name ZONE=zone [PROJECT=id] launch/tpu_vm.sh delete
# `run` waits until the slice is there, runs `dno run` on all hosts, and starts it again where it was stopped (status 75)
# or the slice was lost and has been given again, DNO_MAX_RESTARTS times (default 20). The hosts have the project in
# $DNO_HOME (default ~/dno_jax); where they lack it, DNO_SETUP is run on each first. run_dir lies on storage of all hosts.
set -euo pipefail
: "${TPU:?set TPU to the name of the TPU}" "${ZONE:?set ZONE to its zone}"
usage() { sed -n '3,5s/^# *//p' "$0" >&2 && exit 2; }
[ $# -ge 1 ] || usage
verb=$1
shift
place=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
tpus=(gcloud compute tpus)

state() { "${tpus[@]}" queued-resources describe "$TPU" "${place[@]}" --format='value(state.state)' 2>/dev/null || true; }

request() {
  local accelerator=$1 version=$2
  shift 2
  local terms=()
  case ${1:-} in
  '') ;;
  --spot) terms=(--spot) ;;
  --flex-start) terms=(--provisioning-model=FLEX_START --max-run-duration="${2:?--flex-start HOURSh}") ;;
  *) usage ;;
  esac
  gcloud alpha compute tpus queued-resources create "$TPU" --node-id "$TPU" "${place[@]}" \
    --accelerator-type "$accelerator" --runtime-version "$version" "${terms[@]}"
}

on_all() { "${tpus[@]}" tpu-vm ssh "$TPU" "${place[@]}" --worker=all --command "$1"; }

wait_until_active() {
  local found
  while :; do
    found=$(state)
    case $found in
    ACTIVE) return ;;
    SUSPENDED | FAILED | '')
      echo "$TPU is ${found:-gone}; give it again: $0 delete; $0 request ..." >&2
      return 1
      ;;
    *)
      echo "waiting for $TPU ($found)" >&2
      sleep "${DNO_POLL_SECONDS:-30}"
      ;;
    esac
  done
}

run() {
  local home arguments log command status=1 restarts=0
  home=${DNO_HOME:-\~/dno_jax}
  printf -v arguments ' %q' "$@"
  # Each host says how it ended: ssh to all of them tells only whether all went well.
  command="cd $home && .venv/bin/dno run$arguments; status=\$?; echo dno-status \$status; exit \$status"
  log=$(mktemp)
  while :; do
    wait_until_active || break
    if [ -n "${DNO_SETUP:-}" ]; then
      on_all "test -x $home/.venv/bin/dno || { $DNO_SETUP; }"
    fi
    status=0
    on_all "$command" 2>&1 | tee "$log" || status=$?
    [ "$status" -ne 0 ] || break
    # A host with another status has an error that comes again; without any, the hosts were taken away.
    if grep -q '^dno-status \([1-9]\|[1-6][0-9]\|7[0-4]\)$' "$log" || [ "$restarts" -ge "${DNO_MAX_RESTARTS:-20}" ]; then
      break
    fi
    restarts=$((restarts + 1))
    echo "starts again ($restarts)" >&2
    sleep "${DNO_POLL_SECONDS:-30}"
  done
  rm -f "$log"
  return "$status"
}

case $verb in
request) [ $# -ge 2 ] || usage && request "$@" ;;
run) [ $# -ge 1 ] || usage && run "$@" ;;
delete) "${tpus[@]}" queued-resources delete "$TPU" "${place[@]}" --force --quiet ;;
*) usage ;;
esac
