#!/usr/bin/env bash
# Make what ablations/hard.yaml starts from, none of it shipped: the hard shapes, a vision tower of 96 pixels, the
# language models, and a teacher by the project's own stages. Run it again after an interruption and
# what is complete is left as it is. RUN names the directory; HARD_STEPS, HARD_SCENES and HARD_QUESTIONS shorten it to try it out.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup_env.sh
doing="installing into .venv"
trap 'ended_at $? "$doing"' EXIT
setup_env ""
run="${RUN:-runs/hard}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 NPROC=1
export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864  # see quickstart.sh
questions="${HARD_QUESTIONS:-1800}"

doing="drawing the hard shapes"
mkdir -p "$run"
llava-kd data shapes --hard --out "$run/data" --num_train "${HARD_SCENES:-16000}" \
  --num_validation "$questions" --num_test "$questions" --seed 0

doing="making the backbones"
if [ ! -f "$run/backbones/made.json" ]; then # the last thing that is written
  rm -rf "$run/backbones"
  fewer=()
  if [ -n "${HARD_STEPS:-}" ]; then
    fewer=(--tower-pictures=40 --tower-steps="$HARD_STEPS" --teacher-steps="$HARD_STEPS" --student-steps="$HARD_STEPS")
  fi
  python scripts/quickstart/make_backbones.py --setting hard --out "$run/backbones" --threads "$OMP_NUM_THREADS" "${fewer[@]}"
fi

# teach NAME RECORDS [overrides]: one stage of the teacher, goes on where it was stopped.
teach() {
  local name="$1" records="$2"; shift 2
  doing="training in $run/teacher/$name"
  llava-kd train "scripts/hard/teacher_$name.yaml" --output_dir="$run/teacher/$name" --data.images="$run/data" \
    --data.path="$run/data/$records.json" ${HARD_STEPS:+--max_steps="$HARD_STEPS"} "$@"
}
teach stage1 captions --student.vision_tower="$run/backbones/vision_tower" \
  --student.language_model="$run/backbones/teacher_llm"
teach stage2 instructions --student.checkpoint="$run/teacher/stage1/model"

doing="scoring $run/teacher/stage2/model"
llava-kd eval --model "$run/teacher/stage2/model" --data "$run/data/validation.json" --out "$run/teacher/validation"
echo "the teacher is $run/teacher/stage2/model"
