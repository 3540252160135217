#!/usr/bin/env bash
# New questions about the images of DATA, answers to them by TEACHER, and of these what OTHER answers too.
# Set DATA (a LLaVA file), IMAGES (its image root), TEACHER and OTHER (stock LLaVA directories), OUT, and NPROC (GPUs).
# Run it again after an interruption and it goes on. Train on $OUT/agreed/records.json with data.images=$IMAGES.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
: "${DATA:?a LLaVA file}" "${IMAGES:?its image root}" "${TEACHER:?a stock LLaVA directory}" "${OTHER:?another one}"
OUT="${OUT:-runs/elicited}"
PROMPTS="${PROMPTS:-scripts/methods/elicitation/prompts.txt}"
answer() { python -m llava_kd.assembly.runs.torchrun --standalone --nproc-per-node "${NPROC:-1}" -m llava_kd.cli data answer "$@" --images "$IMAGES"; }

answer expand --model "$TEACHER" --data "$DATA" --prompts "$PROMPTS" --temperature 0.7 --out "$OUT/asked" "$@"
answer label --model "$TEACHER" --data "$OUT/asked/records.json" --out "$OUT/labelled" "$@"
answer curate --by agreement --model "$OTHER" --data "$OUT/labelled/records.json" --out "$OUT/agreed" "$@"
