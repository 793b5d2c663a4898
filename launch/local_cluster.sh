#!/usr/bin/env bash
# Usage: bash launch/local_cluster.sh N [--devices=D] STAGE --config=FILE.py --workdir=DIR [--config.a.b=value ...]
#        bash launch/local_cluster.sh N import HF_DIR ARTIFACT | export ARTIFACT HF_DIR
#        bash launch/local_cluster.sh N generate ARTIFACT --prompts=FILE.jsonl --out=FILE.jsonl
# A cluster on this machine: N processes with D virtual CPU devices each (1), which meet over loopback and
# talk through gloo. Each writes to DIR.process<i>.log or OUT.process<i>.log (of a bucket, in this directory).
# SIGTERM and Ctrl-C go to all of them: they write a checkpoint (or end after a chunk of prompts), and this exits
# with 75, which means "run again to resume", with any N and D. When one ends with an error the others follow
# within about a minute; this says which it was, and exits with 2.
set -uo pipefail

GRACE=90 # seconds for the others to notice: more than the heartbeat of nemojax/hosts.py

fail() {
  echo "local_cluster: $*" >&2
  exit 2
}

[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || fail "expected a number of processes, got '${1:-}'; usage: local_cluster.sh N [--devices=D] STAGE ..."
N="$1" DEVICES=1 WORKDIR=""
shift
if [[ "${1:-}" == --devices=* ]]; then
  DEVICES="${1#*=}"
  [[ "$DEVICES" =~ ^[1-9][0-9]*$ ]] || fail "--devices: expected a number of devices for each process, got '$DEVICES'"
  shift
fi
for argument in "$@"; do
  [[ "$argument" == --workdir=?* || "$argument" == --out=?* ]] && WORKDIR="${argument#*=}"
done
if [ "${1:-}" = import ] || [ "${1:-}" = export ]; then
  PLACES=()
  for argument in "${@:2}"; do [[ "$argument" == -* ]] || PLACES+=("$argument"); done
  WORKDIR="${PLACES[1]:-}"
fi
[ -n "$WORKDIR" ] || fail "--workdir: expected --workdir=DIR after the stage, got none"
LOGS="${WORKDIR%/}"
[[ "$LOGS" != *://* ]] || LOGS="${LOGS##*/}"
NEMOJAX="${NEMOJAX_VENV:-.venv}/bin/nemojax"
[ -x "$NEMOJAX" ] || NEMOJAX="$(command -v nemojax)" || fail "expected nemojax in ${NEMOJAX_VENV:-.venv}, got none; install it, or set NEMOJAX_VENV"

# below the ports that the system gives out by itself
PORT=$((20000 + RANDOM % 10000))
while (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do PORT=$((20000 + RANDOM % 10000)); done
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
export NEMOJAX_COORDINATOR="127.0.0.1:$PORT" NEMOJAX_NUM_PROCESSES="$N"

PIDS=() CODES=() STOPPED="" FAILED="" SINCE=0
log_of() { echo "$LOGS.process$1.log"; }
signal_all() {
  for i in "${!PIDS[@]}"; do
    [ -n "${CODES[i]}" ] || kill "-$1" "${PIDS[i]}" 2> /dev/null
  done
}
stop() { # the second time for good
  if [ -z "$STOPPED" ]; then signal_all TERM; else signal_all KILL; fi
  STOPPED=yes
}
trap stop TERM INT

mkdir -p "$(dirname "$LOGS")" || exit 2
for ((i = 0; i < N; i++)); do
  NEMOJAX_PROCESS_ID="$i" "$NEMOJAX" "$@" >> "$(log_of "$i")" 2>&1 &
  PIDS[i]=$! CODES[i]=""
  echo "process $i of $N: pid $!, log $(log_of "$i")"
done

# the first one to end with an error is the one to name: the others end because of it
LEFT=$N
while [ "$LEFT" -gt 0 ]; do
  for i in "${!PIDS[@]}"; do
    [ -z "${CODES[i]}" ] && ! kill -0 "${PIDS[i]}" 2> /dev/null || continue
    wait "${PIDS[i]}"
    CODES[i]=$? LEFT=$((LEFT - 1))
    case "${CODES[i]}" in
      0 | 75) ;;
      143) [ -n "$STOPPED" ] || FAILED="${FAILED:-$i}" ;; # before it could listen
      *) FAILED="${FAILED:-$i}" ;;
    esac
    [ -z "$FAILED" ] || [ "$SINCE" -gt 0 ] || SINCE=$SECONDS
  done
  [ -z "$FAILED" ] || [ $((SECONDS - SINCE)) -lt "$GRACE" ] || signal_all KILL
  [ "$LEFT" -eq 0 ] || sleep 0.1
done 2> /dev/null # what bash has to say of a signal is said below

if [ -n "$FAILED" ]; then
  CODE="${CODES[FAILED]}"
  [ "$CODE" -le 128 ] || CODE="$CODE (SIG$(kill -l "$CODE"))"
  fail "process $FAILED of $N ended with exit code $CODE; its log is $(log_of "$FAILED")"
fi
for code in "${CODES[@]}"; do
  [ "$code" -eq 0 ] || exit 75
done
tail -n 1 "$(log_of 0)"
