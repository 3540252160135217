#!/usr/bin/env bash
# Make scripts/quickstart/backbones/teacher and teacher_captions from the backbones beside it. Its scenes hold all that the quickstart's
# students train on and none of its validation and test scenes: the same seed draws those first.
# TEACHER_STEPS, TEACHER_SCENES and TEACHER_QUESTIONS shorten it to try it out; OUT names another directory.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup_env.sh
doing="installing into .venv"
trap 'ended_at $? "$doing"' EXIT
setup_env ""
run="${RUN:-runs/teacher}"
out="${OUT:-scripts/quickstart/backbones/teacher}"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 NPROC=1
export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864  # see quickstart.sh
steps=(${TEACHER_STEPS:+--max_steps="$TEACHER_STEPS"})
questions="${TEACHER_QUESTIONS:-1200}"

doing="drawing the shapes data"
llava-kd data shapes --out "$run/data" --num_train "${TEACHER_SCENES:-24000}" \
  --num_validation "$questions" --num_test "$questions" --seed 0
python scripts/quickstart/lookups_by_shape.py "$run/data/instructions.json" "$run/data/lookups_by_shape.json"

doing="training in $run/stage1"
llava-kd train scripts/quickstart/teacher_stage1.yaml --output_dir="$run/stage1" --data.images="$run/data" \
  --data.path="$run/data/captions.json" "${steps[@]}"

# answer NAME FROM RECORDS STEPS LR PRECISION: question answering, from the end of another run.
answer() {
  doing="training in $run/$1"
  llava-kd train scripts/quickstart/teacher_stage2.yaml --output_dir="$run/$1" --student.checkpoint="$run/$2/model" \
    --data.images="$run/data" --data.path="$run/data/$3.json" --max_steps="$4" --optim.lr="$5" \
    --engine.precision="$6" "${steps[@]}"
}
answer stage2 stage1 instructions 4600 1.5e-3 bf16            # 79.9 % of the validation questions
answer longer stage2 instructions 2600 3e-3 fp32              # 81.5 %; shapes are still not found by their form,
answer lookups longer lookups_by_shape 700 2e-3 fp32          # so that is asked alone,
answer last lookups instructions 1000 2e-3 fp32               # and then all together: 93.3 %

doing="training in $run/captions"                             # with the captions that were forgotten meanwhile: 95.1 %
llava-kd train scripts/quickstart/teacher_stage3.yaml --output_dir="$run/captions" --student.checkpoint="$run/last/model" \
  --data.sources="[{path: $run/data/instructions.json, images: $run/data},
    {path: $run/data/captions.json, images: $run/data, weight: 0.35, template: plain}]" "${steps[@]}"

# keep RUN DIRECTORY: score it, and put it where it is shipped.
keep() {
  doing="scoring $run/$1/model"
  llava-kd eval --model "$run/$1/model" --data "$run/data/validation.json" --out "$run/$1/validation"
  python scripts/quickstart/halve_model.py "$run/$1/model" "$2"
}
keep last "$out"
keep captions "${out}_captions"
echo "the teachers are $out and ${out}_captions"
