#!/usr/bin/env bash
# Score a stock LLaVA directory on benchmarks: checks the files first, then answers on every GPU and scores.
#   MODEL=DIR DATA=ROOT OUT=DIR [BENCHMARKS=all] [NPROC=8] bash eval/run.sh [words for llava-kd eval]
# Run it again after an interruption and it goes on. Layout of ROOT: eval/README.md.
set -euo pipefail
source "$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/scripts/launch.sh"
trap - TERM USR1 INT # what is started here answers signals itself
: "${MODEL:?stock LLaVA directory}" "${DATA:?data root, see eval/README.md}" "${OUT:?folder for the results}"
benchmarks="${BENCHMARKS:-all}"
use_environment
nproc="$(num_processes)"

# Status 1 is a list of what is wrong: answering counts a bad picture as wrong, and refuses a missing file itself.
status=0
python -m llava_kd.cli data verify --benchmark "$benchmarks" --data "$DATA" || status=$?
if [ "$status" -gt 1 ]; then exit "$status"; fi
words=(eval --model "$MODEL" --benchmark "$benchmarks" --data "$DATA" --out "$OUT" "$@")
if [ "$nproc" -eq 1 ]; then
  python -m llava_kd.cli "${words[@]}"
else
  python -m llava_kd.assembly.runs.torchrun --standalone --nproc-per-node "$nproc" -m llava_kd.cli "${words[@]}"
fi
