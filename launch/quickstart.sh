#!/usr/bin/env bash
# Usage: bash launch/quickstart.sh [WORKDIR]
# Installs nemojax into .venv and runs the whole pipeline on a toy model; run it again to resume.
set -euo pipefail
WORKDIR="$(realpath -m "${1:-"$(dirname "$0")/../runs/quickstart"}")"
source "$(dirname "$0")/environment.sh"
prepare run -e .
mkdir -p "$(dirname "$WORKDIR")"
"$VENV/bin/nemojax" run --config=configs/quickstart.py --workdir="$WORKDIR"
echo "report: $WORKDIR/report.html   model: $WORKDIR/export"
