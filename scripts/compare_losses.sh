#!/usr/bin/env bash
# Usage: scripts/compare_losses.sh REV_A REV_B [--steps N] [RECIPE ...]
# Trains a few steps of every shipped recipe at tiny size at both commits, on one thread, and asks for equal figures and
# weights, bit for bit. Status 1 if anything moved. A dot as REV_B is the working tree as it is.
set -euo pipefail
root="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# -lt 2 ]; then echo "usage: scripts/compare_losses.sh REV_A REV_B [--steps N] [RECIPE ...]" >&2; exit 2; fi
source "$root/scripts/setup_env.sh"
setup_env ""
scratch="$(mktemp -d)"
made=() # only these are removed: the working tree is never one of them
cleanup() {
  for checkout in "${made[@]}"; do git -C "$root" worktree remove --force "$checkout"; done
  rm -rf "$scratch"
}
trap cleanup EXIT
sides=()
for revision in "$1" "$2"; do
  if [ "$revision" = . ]; then
    sides+=("$root")
  else
    checkout="$scratch/checkout${#sides[@]}"
    git -C "$root" worktree add --quiet --detach "$checkout" "$revision"
    made+=("$checkout")
    sides+=("$checkout")
  fi
done
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu
python "$root/scripts/compare_losses.py" "$1=${sides[0]}" "$2=${sides[1]}" --scratch "$scratch" "${@:3}"
