#!/usr/bin/env bash
# Set up .venv and run the tests, a file of them on each core; words after it go to pytest (-n0: one process).
# --floor uses the oldest supported versions.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
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
# DeepSpeed compiles this at its first start, which one test process would wait for the other to do.
if [ ! -f "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/deepspeed_shm_comm.so" ]; then
  python -c "from deepspeed.comm.torch import build_shm_op; build_shm_op()" >/dev/null 2>&1 || true
fi
# In the order of tests/conftest.py, the longest files first, so that none is left alone at the end.
exec python -m pytest -n "${TEST_PROCESSES:-auto}" --dist loadfile --no-loadscope-reorder "$@"
