#!/usr/bin/env bash
# Make scripts/hard/backbones, from which ablations/hard.yaml starts: a vision tower of 96 pixels, the language models, and
# a teacher by the project's own stages. Run it again after an interruption and what is complete is left as it is.
# RUN names the directory, OUT another than the shipped one; NPROC=2 trains the teacher on two processes. HARD_STEPS,
# HARD_SCENES and HARD_QUESTIONS shorten it to try it out; the models are then in RUN/tried_out.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup_env.sh
doing="installing into .venv"
trap 'ended_at $? "$doing"' EXIT
setup_env ""
run="${RUN:-runs/hard}"
shortened="${HARD_STEPS:-}${HARD_SCENES:-}"
out="${OUT:-${shortened:+$run/tried_out}}"
out="${out:-scripts/hard/backbones}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 NPROC="${NPROC:-1}"
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

# teach NAME [overrides]: one stage of the teacher, goes on where it was stopped.
teach() {
  local name="$1"; shift
  doing="training in $run/teacher/$name"
  bash scripts/train.sh "scripts/hard/teacher_$name.yaml" --output_dir="$run/teacher/$name" \
    ${HARD_STEPS:+--max_steps="$HARD_STEPS"} "$@"
}
teach stage1 --data.path="$run/data/captions.json" --data.images="$run/data" \
  --student.vision_tower="$run/backbones/vision_tower" --student.language_model="$run/backbones/teacher_llm"
teach stage2 --data.path="$run/data/instructions.json" --data.images="$run/data" \
  --student.checkpoint="$run/teacher/stage1/model"
teach stage3 --student.checkpoint="$run/teacher/stage2/model" \
  --data.sources="[{path: $run/data/instructions.json, images: $run/data},
    {path: $run/data/captions.json, images: $run/data, weight: 0.35, template: plain}]"

doing="scoring $run/teacher/stage3/model"
llava-kd eval --model "$run/teacher/stage3/model" --data "$run/data/validation.json" --out "$run/teacher/validation"

doing="writing $out"
mkdir -p "$out"
for part in vision_tower teacher_llm student_llm made.json; do
  rm -rf "${out:?}/$part"
  cp -r "$run/backbones/$part" "$out/$part"
done
python scripts/quickstart/halve_model.py "$run/teacher/stage3/model" "$out/teacher"
echo "the models are in $out"
