#!/usr/bin/env bash
# Usage: bash launch/tpu_pod.sh NAME ZONE STAGE --config=FILE.py --workdir=DIR [--config.a.b=value ...]
# A stage on all workers of a TPU pod slice (gcloud's tpu-vm of that name): copies this repository to them,
# installs it with the extra `tpu`, and starts one process a worker. FILE is a path in the repository, DIR one
# on a disk that all workers mount. Run it again to resume. An error of any worker ends all of them.
# PROJECT=... names another project than gcloud's own.
set -euo pipefail

if [ "$#" -lt 3 ]; then
  echo "tpu_pod: expected NAME ZONE STAGE ..., got '$*'" >&2
  exit 2
fi
NAME="$1" ZONE="$2"
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
on_pod() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$ZONE" --worker=all ${PROJECT:+--project="$PROJECT"}; }

SOURCE="$(mktemp -d)"
trap 'rm -rf "$SOURCE"' EXIT
tar -czf "$SOURCE/nemojax.tar.gz" --exclude='.venv*' --exclude=.git --exclude=runs .
on_pod scp "$SOURCE/nemojax.tar.gz" "$NAME:nemojax.tar.gz"
on_pod ssh "$NAME" --command='set -e; mkdir -p nemojax; tar -xzf nemojax.tar.gz -C nemojax; cd nemojax
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/pip install --quiet -c constraints.txt -e ".[tpu]"'
# JAX asks the machines' metadata who they are and where worker 0 is
on_pod ssh "$NAME" --command="cd nemojax && NEMOJAX_NUM_PROCESSES=auto .venv/bin/nemojax$(printf ' %q' "$@")"
