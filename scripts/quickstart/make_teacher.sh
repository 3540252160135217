#!/usr/bin/env bash
# Make scripts/quickstart/backbones/teacher from the backbones beside it. Its scenes hold all that the quickstart's
# students train on and none of its validation and test scenes: the same seed draws those first.
# TEACHER_STEPS and TEACHER_SCENES shorten it to try it out; OUT names another directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup_env.sh
setup_env ""
run="${RUN:-runs/teacher}"
out="${OUT:-scripts/quickstart/backbones/teacher}"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 NPROC=1
steps=(${TEACHER_STEPS:+--max_steps="$TEACHER_STEPS"})

llava-kd data shapes --out "$run/data" --num_train "${TEACHER_SCENES:-24000}" --num_validation 1200 --num_test 1200 --seed 0
llava-kd train scripts/quickstart/teacher_stage1.yaml --output_dir="$run/stage1" --data.images="$run/data" \
  --data.path="$run/data/captions.json" "${steps[@]}"
llava-kd train scripts/quickstart/teacher_stage2.yaml --output_dir="$run/stage2" --data.images="$run/data" \
  --data.path="$run/data/instructions.json" --student.checkpoint="$run/stage1/model" "${steps[@]}"
llava-kd eval --model "$run/stage2/model" --data "$run/data/validation.json" --out "$run/validation"
rm -rf "$out"
cp -r "$run/stage2/model" "$out"
rm "$out/README.md"  # its paths are those of this run
