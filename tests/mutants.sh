#!/usr/bin/env bash
# Mutants of one file, or of several with commas between, that their tests let live, by mutmut in a copy of the project:
#   bash tests/mutants.sh llava_kd/training/checkpoint.py tests/test_training_checkpoint.py [more tests]
# Without arguments: every line of tests/mutants.txt, which takes hours.
# MUTANTS_SECONDS=N stops trying after N seconds; those that were not tried are counted as such ("checked").
# MUTANTS_NAMED='PATTERN ...' tries only those of such names: '*[16]' is every fifth of each function, from its first.
# MUTANTS_PATIENCE=N adds N seconds to the time that its tests took, three times which a mutant may take (1).
# MUTMUT=FOLDER is a folder that has mutmut 3.8.1 already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$#" -eq 0 ]; then
  while read -ra line; do
    echo "== ${line[*]}"
    bash tests/mutants.sh "${line[@]}" </dev/null
  done <tests/mutants.txt
  exit
fi
file="$1"
shift
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python="${PYTHON:-$PWD/.venv/bin/python}"
site="${MUTMUT:-$folder/site}"
[ -e "$site" ] || "$python" -m pip install --quiet --disable-pip-version-check --target "$site" mutmut==3.8.1
mkdir "$folder/copy"
git ls-files -z | xargs -0 cp --parents -Pt "$folder/copy"
cp --parents -t "$folder/copy" llava_kd/data/pixels/_resample*.so 2>/dev/null || echo "without the part in C" >&2
cd "$folder/copy"
{
  printf '[mutmut]\nsource_paths=llava_kd\nonly_mutate=\n'
  printf '    %s\n' ${file//,/ }
  printf 'also_copy=\n'
  printf '    %s\n' tests scripts docs constraints.txt README.md
  printf 'process_isolation=forkserver\ntimeout_multiplier=3\ntimeout_constant=%s\n' "${MUTANTS_PATIENCE:-1}"
  printf 'pytest_add_cli_args_test_selection=\n'
  printf '    %s\n' "$@"
} >setup.cfg
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu PYTHONPATH="$site"
status=0
read -ra named <<<"${MUTANTS_NAMED:-}"
timeout "${MUTANTS_SECONDS:-0}" "$python" -m mutmut run --max-children "${MUTANTS_AT_ONCE:-1}" "${named[@]}" \
  >"$folder/said" || status=$?
tail -c 400 "$folder/said" | tr '\r' '\n' | grep -av 'llava_kd\.' || true
echo
if [ "$status" -ne 0 ] && [ "$status" -ne 124 ]; then exit "$status"; fi
"$python" -m mutmut results --all true |
  awk '{sub(/\.x[^.]*$/, "", $1); count[$1 " " $NF]++} END {for (s in count) print count[s], s}' | sort -k2
for name in $("$python" -m mutmut results | awk '/survived|no tests|timeout/ {sub(":", "", $1); print $1}'); do
  echo "$name"
  "$python" -m mutmut show "$name" | grep -aE '^[-+] ' || true
done
