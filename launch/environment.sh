# Sourced by the other launch scripts: `prepare NAME REQUIREMENT...` makes .venv if it is missing, installs
# the requirements with the pinned versions, and does nothing when NAME was installed from the same files.
# PYTHON chooses the interpreter (3.11 or newer); NEMOJAX_TORCH_INDEX an index with CPU builds of torch.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${NEMOJAX_VENV:-.venv}"
# memory in large pages, which the command line sets for itself
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"

prepare() {
  local name="$1" python="${PYTHON:-python3}"
  shift
  if [ ! -x "$VENV/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "launch: expected Python 3.11 or newer, got $("$python" -V 2>&1); set PYTHON=/path/to/python3.11" >&2
      exit 2
    }
    "$python" -m venv "$VENV"
  fi
  local stamp="$VENV/.installed-$name" wanted
  wanted="$(cat pyproject.toml constraints*.txt | cksum) $*"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    "$VENV/bin/python" -m pip install --quiet -c "${CONSTRAINTS:-constraints.txt}" "$@" || return
    echo "$wanted" > "$stamp"
  fi
}
