#!/usr/bin/env bash
# Offline on-policy: STUDENT (a stage-2 model) answers DATA once, the teacher of CONFIG reads that once, stage 3 learns from both.
# Set STUDENT, DATA (a LLaVA file), IMAGES (its image root), OUT, NPROC (GPUs); further words go to cache-teacher and train as settings.
# Run it again after an interruption and it goes on.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
: "${STUDENT:?a stage-2 model}" "${DATA:?a LLaVA file}" "${IMAGES:?its image root}"
OUT="${OUT:-runs/on_policy}"
CONFIG="${CONFIG:-scripts/methods/on_policy/offline.yaml}"
on_all() { python -m llava_kd.assembly.runs.torchrun --standalone --nproc-per-node "${NPROC:-1}" -m llava_kd.cli "$@"; }
stage=("$CONFIG" --student.checkpoint="$STUDENT" --data.path="$OUT/answers/records.json" --data.images="$IMAGES" "$@")

on_all data answer label --relabel --model "$STUDENT" --data "$DATA" --images "$IMAGES" --out "$OUT/answers" \
  --temperature "${TEMPERATURE:-1}" --seed "${SEED:-0}" --max_new_tokens "${MAX_NEW_TOKENS:-128}"
on_all cache-teacher "${stage[@]}" --out "$OUT/cache"
on_all train "${stage[@]}" --output_dir="$OUT/offline" --teacher.cache="$OUT/cache"
