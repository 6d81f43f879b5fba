#!/usr/bin/env bash
# One configuration on every host of a Cloud TPU slice, as a queued resource; the hosts find each other by metadata.
#   TPU=name ZONE=zone [PROJECT=id] launch/tpu_vm.sh request v5litepod-16 v2-alpha-tpuv5-lite [--spot | --flex-start 24h]
#   TPU=name ZONE=zone [PROJECT=id] launch/tpu_vm.sh run CONFIG [a.b=value ...]
#   TPU=name ZONE=zone [PROJECT=id] launch/tpu_vm.sh delete
# `run` waits until the slice is there, runs `dno run` on all hosts, and starts it again where it was stopped (status 75)
# or the slice was taken away, DNO_MAX_RESTARTS times (default 20). Where none is there, or a preempted one is SUSPENDED, it
# is requested by DNO_REQUEST, the words after `request`. The hosts have the project in $DNO_HOME (default ~/dno_jax);
# where they lack it, DNO_SETUP is run on each first. run_dir lies on storage of all hosts.
set -euo pipefail
: "${TPU:?set TPU to the name of the TPU}" "${ZONE:?set ZONE to its zone}"
usage() { sed -n '3,5s/^# *//p' "$0" >&2 && exit 2; }
[ $# -ge 1 ] || usage
verb=$1
shift
place=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
tpus=(gcloud compute tpus)

# The queued resource's state; NOT_FOUND where there is none, and nothing where gcloud fails otherwise, which it says.
state() {
  local said
  if said=$("${tpus[@]}" queued-resources describe "$TPU" "${place[@]}" --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$said"
  elif grep -q NOT_FOUND <<<"$said"; then
    echo NOT_FOUND
  else
    echo "$said" >&2
  fi
}

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
    --accelerator-type "$accelerator" --runtime-version "$version" ${terms[@]+"${terms[@]}"}
}

delete() { "${tpus[@]}" queued-resources delete "$TPU" "${place[@]}" --force --quiet; }

on_all() { "${tpus[@]}" tpu-vm ssh "$TPU" "${place[@]}" --worker=all --command "$1"; }

restarts=0
may_again() { [ "$restarts" -lt "${DNO_MAX_RESTARTS:-20}" ] && restarts=$((restarts + 1)); }

request_again() {
  if [ -z "${DNO_REQUEST:-}" ] || ! may_again; then
    echo "$TPU is $1; request it again ($0 delete; $0 request ...), or set DNO_REQUEST for \`run\` to do so" >&2
    return 1
  fi
  echo "$TPU is $1; requests it: $DNO_REQUEST" >&2
  [ "$1" = NOT_FOUND ] || delete || return 1
  # shellcheck disable=SC2086  # they are words
  request $DNO_REQUEST
}

wait_until_active() {
  local found silent=0
  while :; do
    found=$(state)
    case $found in
    ACTIVE) return ;;
    SUSPENDED | FAILED | NOT_FOUND) request_again "$found" || return 1 ;;
    '')
      silent=$((silent + 1))
      [ "$silent" -lt 5 ] || return 1
      ;;
    *) silent=0 ;;
    esac
    echo "waiting for $TPU (${found:-its state is not known})" >&2
    sleep "${DNO_POLL_SECONDS:-30}"
  done
}

run() {
  local home arguments log command status=1
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
    if grep -q '^dno-status \([1-9]\|[1-6][0-9]\|7[0-4]\)$' "$log" || ! may_again; then
      break
    fi
    echo "starts again ($restarts)" >&2
    sleep "${DNO_POLL_SECONDS:-30}"
  done
  rm -f "$log"
  return "$status"
}

case $verb in
request) [ $# -ge 2 ] || usage && request "$@" ;;
run) [ $# -ge 1 ] || usage && run "$@" ;;
delete) delete ;;
*) usage ;;
esac
