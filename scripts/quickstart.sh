#!/usr/bin/env bash
# From nothing to a report: set up .venv, make the shapes data, train a tiny student twice from the same start
# (undistilled, and by the three distilled stages), score both and the shipped teacher, write the report.
# Run it again after an interruption and it goes on. QUICKSTART_SEEDS=3 repeats both trainings for three seeds;
# RUN names the output directory; QUICKSTART_STEPS, QUICKSTART_SCENES and QUICKSTART_QUESTIONS shorten it to try it out.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
source scripts/both.sh
run="$(as_given "${RUN:-}" runs/quickstart)"
seeds="${QUICKSTART_SEEDS:-1}"
whole_number QUICKSTART_SEEDS "$seeds" 1
backbones=scripts/quickstart/backbones
python="${PYTHON:-python3}"
no_teacher=(--teacher=null --objective.response_kl=null --objective.visual_kl=null --objective.relation=null)
# What is done again once all is there takes no time that the report should count.
is_counted=yes
if [ -f "$run/report.html" ] && [ -f "$run/seed$((seeds - 1))/kd/eval/summary.json" ]; then is_counted=no; fi
clock() { if [ "$is_counted" = yes ]; then "$python" scripts/quickstart/times.py "$run" "$@"; fi; }

doing="making the folder $run (RUN names another)"
trap 'status=$?; if [ -d "$run" ]; then clock stop || true; fi; ended_at "$status" "$doing"' EXIT
mkdir -p "$run"
doing="installing into .venv"
clock first install
setup_env ""
cores="$(nproc)" # before OMP_NUM_THREADS, which nproc would repeat
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 NPROC=1 DS_ACCELERATOR=cpu
# Keep freed memory: fetching it from the system anew costs a tenth of a step of models this small.
export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864
clock next train

doing="drawing the shapes data"
scenes="${QUICKSTART_SCENES:-4000}"
questions="${QUICKSTART_QUESTIONS:-1200}" # as many as make_teacher.sh holds out, so that the teacher has seen none of them
llava-kd data shapes --out "$run/data" --num_train "$scenes" --num_validation "$questions" --num_test "$questions" --seed 0

# stage NAME SEED ARM LINE [overrides]: one stage of one arm, through the script that a cluster runs.
stage() {
  local name="$1" seed="$2" arm="$3" line="$4"; shift 4
  CONFIG="scripts/quickstart/$name.yaml" bash "scripts/$name.sh" --seed="$seed" --data.images="$run/data" \
    --log.progress_line="$line" ${QUICKSTART_STEPS:+--max_steps="$QUICKSTART_STEPS"} "$@"
}

# The undistilled arm runs the same recipes with the teacher's terms switched off.
arm() {
  local seed="$1" arm="$2" line="$3"; shift 3
  local out="$run/seed$seed/$arm"
  stage stage1_dpt "$seed" "$arm" "$line" --output_dir="$out/stage1" --data.path="$run/data/captions.json" "$@"
  stage stage2_sft "$seed" "$arm" "$line" --output_dir="$out/stage2" --data.path="$run/data/instructions.json" \
    --student.checkpoint="$out/stage1/model"
  stage stage3_dft "$seed" "$arm" "$line" --output_dir="$out/stage3" --data.path="$run/data/instructions.json" \
    --student.checkpoint="$out/stage2/model" "$@"
}

score() {
  llava-kd eval --model "$1" --data "$run/data/test.json" --out "$2" >/dev/null
}

for ((seed = 0; seed < seeds; seed++)); do
  doing="training both students of seed $seed"
  undistilled() { arm "$seed" sft 0 "${no_teacher[@]}"; }
  distilled() { arm "$seed" kd 1; }
  both undistilled distilled
done
clock next eval

doing="scoring the teacher"
score "$backbones/teacher" "$run/teacher/eval"
for ((seed = 0; seed < seeds; seed++)); do
  doing="scoring both students of seed $seed"
  score_undistilled() { score "$run/seed$seed/sft/stage3/model" "$run/seed$seed/sft/eval"; }
  score_distilled() { score "$run/seed$seed/kd/stage3/model" "$run/seed$seed/kd/eval"; }
  both score_undistilled score_distilled
done

doing="writing the report"
clock stop
if [ "$is_counted" = yes ]; then
  printf '{"training scenes": %d, "test questions": %d, "commit": "%s", "processor": "%s, cores: %d"}\n' "$scenes" "$questions" \
    "$(git describe --always --dirty 2>/dev/null || echo unknown)" \
    "$(sed -n '/^model name/{s/^[^:]*: //p;q}' /proc/cpuinfo)" "$cores" >"$run/settings.json"
fi
llava-kd report --run "$run"
