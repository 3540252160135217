# Sourced by the scripts that train or score two students at once.

# stop_both STATUS FIRST SECOND: end the two shells, so that neither begins anything new, and what they run, which saves first.
# Ctrl-C alone does not reach it: commands in the background of a script are started without.
stop_both() {
  local tries
  echo "stopping; run the same command again to continue" >&2
  kill -TERM -- "-$2" "-$3" 2>/dev/null || true # each has a process group of its own
  for ((tries = 0; tries < 300; tries++)); do
    kill -0 -- "-$2" 2>/dev/null || kill -0 -- "-$3" 2>/dev/null || break
    sleep 0.2
  done
  exit "$1"
}

# both FIRST SECOND: the two commands at once; fails if either does. Whoever sources this has `set -e`.
both() {
  local status=0
  set -m # gives each its process group
  $1 & local first=$!
  $2 & local second=$!
  set +m
  trap 'stop_both 130 "$first" "$second"' INT
  trap 'stop_both 143 "$first" "$second"' TERM
  wait "$first" || status=$?
  wait "$second" || status=$?
  trap - INT TERM
  return $status
}
