#!/usr/bin/env bash
# Set up .venv and run the tests, a file of them on each core; words after it go to pytest (-n0: one process).
# --floor uses the oldest supported versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
trap 'ended_at $? "setting up the environment"' EXIT
if [ "${1:-}" = "--floor" ]; then
  shift
  export VENV="$PWD/.venv-floor" CONSTRAINTS="$PWD/constraints-floor.txt"
  setup_env all,dev
else
  setup_env all,dev
fi
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${VENV:-$PWD/.venv}/torch_extensions}" # one shared with others is rebuilt and locked
exec python -m pytest -n "${TEST_PROCESSES:-auto}" --dist loadfile "$@"
