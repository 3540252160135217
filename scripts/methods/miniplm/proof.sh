#!/usr/bin/env bash
# Proof of `llava-kd data select` (MiniPLM, arXiv 2410.17215): equal steps on equally many records that are drawn, chosen,
# chosen the wrong way round, or drawn without the noise. The shipped teacher, the quickstart's student, three seeds.
# Writes $RUN/table.md and results.json; run it again after an interruption and it goes on. STEPS, RECORDS, SEEDS and JOBS
# (how many train at once) shorten it to try it out.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/setup_env.sh
here=scripts/methods/miniplm
run="${RUN:-runs/methods/miniplm}"
jobs="${JOBS:-$(nproc)}"
doing="installing into .venv"
trap 'ended_at $? "$doing"' EXIT
setup_env ""
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu
export steps="${STEPS:-300}" run here
seeds="${SEEDS:-0 1 2}"

# stage NAME [settings]: one training of the recipe, in its own log.
stage() {
  local name="$1"; shift
  mkdir -p "$run/logs"
  llava-kd train "$here/student.yaml" --output_dir="$run/$name" --log.progress=false "$@" >"$run/logs/${name//\//-}.log" 2>&1 ||
    { tail -n 5 "$run/logs/${name//\//-}.log" >&2; return 1; }
}
export -f stage

doing="drawing the records"
if [ ! -f "$run/data/test_hard.json" ]; then python "$here/make_data.py" "$run/data" --records "${RECORDS:-800}"; fi
llava-kd data shapes --out "$run/captions" --num_train 2000 --num_validation 6 --num_test 6 --seed 5 2>/dev/null

doing="teaching the student to see, once for all arms"
stage start --student='{vision_tower: scripts/quickstart/backbones/vision_tower, language_model: scripts/quickstart/backbones/student_llm}' \
  --data="{path: $run/captions/captions.json, images: $run/captions, template: plain, max_length: 256, num_workers: 0}" \
  --evaluate=null --max_steps="${START:-200}" --optim.lr=3e-3 --global_batch_size=32 --micro_batch_size=32
doing="training the reference"
stage reference --student.checkpoint="$run/start/model" --data.path="$run/data/train.json" --evaluate=null \
  --max_steps="${REFERENCE:-60}" --seed=100

doing="scoring the records"
llava-kd data select "$here/student.yaml" --student.checkpoint="$run/start/model" --data.path="$run/data/train.json" \
  --with_teacher scripts/quickstart/backbones/teacher --dtype float32 --reference "$run/reference/model" --keep 0.5 \
  --any_reference --out "$run/scores"
python "$here/arms.py" lists "$run" --seeds $seeds

doing="training the arms, $jobs at a time"
for seed in $seeds; do for arm in random select inverted oracle; do echo "$arm $seed"; done; done |
  xargs -P "$jobs" -L 1 bash -c 'stage "$0/seed$1" --student.checkpoint="$run/start/model" --seed="$1" --max_steps="$steps" \
    --data.path="$run/data/train.json" --data.records="$run/lists/$0$1.json" --evaluate.every="$steps" \
    --evaluate.losses="{easy: {path: $run/data/test_easy.json, images: $run/data}, hard: {path: $run/data/test_hard.json, images: $run/data}}"'

doing="writing the table"
python "$here/arms.py" table "$run" --seeds $seeds
