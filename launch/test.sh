#!/usr/bin/env bash
# Usage: bash launch/test.sh [--all] [pytest arguments]
# Installs the test environment into .venv, then checks format, lint, types and tests. --all adds the slow
# tests: real kills, several processes, other library versions, browsers, long compilations.
set -euo pipefail
SECONDS=0
MARKERS=(-m "not slow") ALL=""
if [ "${1:-}" = "--all" ]; then
  MARKERS=() ALL=yes
  shift
fi
source "$(dirname "$0")/environment.sh"
# A CPU build of torch first, so that nothing asks for the CUDA one.
prepare torch torch ${NEMOJAX_TORCH_INDEX:+--index-url "$NEMOJAX_TORCH_INDEX"}
prepare test -e ".[test,dev]"
if [ -n "$ALL" ]; then
  # exports are read by the transformers 4 line too, in an environment of its own
  export NEMOJAX_TRANSFORMERS4="$PWD/.venv-transformers4/bin/python"
  VENV=.venv-transformers4 CONSTRAINTS=constraints-transformers4.txt prepare transformers4 torch transformers \
    ${NEMOJAX_TORCH_INDEX:+--extra-index-url "$NEMOJAX_TORCH_INDEX"}
  # TPU programs are compiled by libtpu, which jax would try to start wherever it finds it: kept aside
  if prepare libtpu --target .venv-libtpu --upgrade --no-deps libtpu; then
    export NEMOJAX_LIBTPU="$PWD/.venv-libtpu"
  fi
  # likewise GPU programs, by jax's CUDA plugin (478 MB); no CUDA is needed, and no GPU
  if prepare cuda --target .venv-cuda --upgrade --no-deps jax-cuda12-plugin jax-cuda12-pjrt; then
    export NEMOJAX_CUDA_PLUGINS="$PWD/.venv-cuda"
  fi
  # FP8 exports are read by transformers with this
  if prepare compressed-tensors --target .venv-compressed --upgrade --no-deps compressed-tensors loguru psutil; then
    export NEMOJAX_COMPRESSED_TENSORS="$PWD/.venv-compressed"
  fi
fi
export PATH="$PWD/$VENV/bin:$PATH"

ruff format --check .
ruff check .
if pyright --version > /dev/null 2>&1; then
  pyright --pythonpath "$VENV/bin/python"
else
  echo "skipped: pyright (it needs node, and could neither find nor fetch one)"
fi
echo "lint and types: ${SECONDS} s"

# One worker a core up to eight; tests of one file stay together, since they share compiled functions.
WORKERS=$(getconf _NPROCESSORS_ONLN)
[ "$WORKERS" -gt 8 ] && WORKERS=8
python -m pytest -q -rs -n "$WORKERS" --dist loadfile --no-loadscope-reorder "${MARKERS[@]}" "$@"
echo "passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
