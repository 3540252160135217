#!/usr/bin/env bash
# Evaluate a student directory with lmms-eval: anything beyond the ten benchmarks, with lmms-eval's own prompts
# and rules. Its figures are not those of the papers: call them "lmms-eval" wherever they stand.
#   MODEL=DIR TASKS=mme_local,ai2d OUT=DIR [TASK_FOLDER=DIR] [PYTHON=PATH] [DEVICE=cuda] bash eval/lmms_eval.sh [words]
set -euo pipefail
: "${MODEL:?stock LLaVA directory}" "${TASKS:?tasks, separated by commas}" "${OUT:?folder for the results}"
here="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
device="${DEVICE:-cuda}"
dtype=bfloat16
if [ "$device" = cpu ]; then dtype=float32; fi
case "$MODEL" in /*) ;; *) MODEL="$PWD/$MODEL" ;; esac
case "$OUT" in /*) ;; *) OUT="$PWD/$OUT" ;; esac
include=()
if [ -n "${TASK_FOLDER:-}" ]; then include=(--include_path "$(cd "$TASK_FOLDER" && pwd)"); fi
mkdir -p "$OUT"
cd "$OUT"  # a folder named like a task in the working directory would be taken for a folder of task files
"${PYTHON:-python}" -m lmms_eval --model llava_hf \
  --model_args "pretrained=$MODEL,device=$device,dtype=$dtype,device_map=$device" \
  --tasks "$TASKS" "${include[@]}" --batch_size 1 --output_path "$OUT" --log_samples "$@"
"${PYTHON:-python}" "$here/lmms_eval_check.py" "$OUT"
