#!/usr/bin/env bash
# Choose the records of stages 2 and 3 before they run (MiniPLM): TEACHER and REFERENCE are stock LLaVA directories.
# NPROC GPUs of this machine share the scoring. Train with --data.records=$OUT/chosen.json afterwards.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
: "${TEACHER:?a stock LLaVA directory}" "${REFERENCE:?a small model of the same recipe, trained on a few percent}"
CONFIG="${CONFIG:-scripts/stage2_sft.yaml}"
OUT="${OUT:-runs/select}"
exec python -m llava_kd.assembly.runs.torchrun --standalone --nproc-per-node "${NPROC:-1}" -m llava_kd.cli data select "$CONFIG" --with_teacher "$TEACHER" \
  --reference "$REFERENCE" --keep "${KEEP:-0.5}" --group "${GROUP:-folder}" --out "$OUT" "$@"
