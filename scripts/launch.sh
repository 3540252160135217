# Sourced by the stage scripts: start `llava-kd train` on NPROC processes of each of NNODES machines.
# NPROC defaults to the number of GPUs (1 without one). LAUNCHER is torchrun (default) or deepspeed. On several
# machines, run the same command on each, with its NODE_RANK and the first machine's MASTER_ADDR; see docs/clusters.md.
launch() {
  use_environment || return
  more_open_files
  local nproc="${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}" nnodes="${NNODES:-1}"
  if [ "$nproc" -eq 0 ]; then nproc=1; fi
  case " $* " in *" --dry_run "*) exec python -m llava_kd.cli train "$@" --ranks=$((nproc * nnodes)) ;; esac
  if [ "$nproc" -eq 1 ] && [ "$nnodes" -eq 1 ]; then
    exec python -m llava_kd.cli train "$@"
  fi
  local address=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
  case "${LAUNCHER:-torchrun}" in
    torchrun)
      # Runs on one machine each find a free port, unless MASTER_PORT names one.
      if [ "$nnodes" -eq 1 ] && [ -z "${MASTER_PORT:-}" ]; then address=(--standalone); fi
      supervise 1 torchrun --nnodes "$nnodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$nproc" \
        "${address[@]}" -m llava_kd.cli train "$@"
      ;;
    deepspeed)
      if [ "$nnodes" -gt 1 ]; then
        : "${HOSTFILE:?deepspeed on several machines needs HOSTFILE, lines of: name slots=GPUs}"
        address=(--hostfile "$HOSTFILE" --no_ssh --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:?}" \
          --master_port "${MASTER_PORT:-29500}")
      else
        address=(--num_gpus "$nproc" --master_port "${MASTER_PORT:-29500}")
      fi
      supervise 2 deepspeed "${address[@]}" --no_local_rank --module llava_kd.cli train "$@"
      ;;
    *) echo "LAUNCHER must be torchrun or deepspeed; got $LAUNCHER" >&2; return 2 ;;
  esac
}

# Data workers hand over every tensor as an open file; where many of them wait for a slow one, 1024 do not suffice.
more_open_files() {
  local most
  most="$(ulimit -Hn)"
  if [ "$most" = unlimited ] || [ "$most" -gt 65536 ]; then most=65536; fi
  if [ "$(ulimit -Sn)" != unlimited ] && [ "$(ulimit -Sn)" -lt "$most" ]; then ulimit -Sn "$most"; fi
}

# Without an active environment that has llava_kd: the .venv that the quickstart and the tests set up (VENV names another).
use_environment() {
  if python -m llava_kd.cli --version >/dev/null 2>&1; then return; fi
  local root venv
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="${VENV:-$root/.venv}"
  if [ -x "$venv/bin/llava-kd" ]; then
    export PATH="$venv/bin:$PATH"
  else
    echo "llava_kd is not installed here: activate its environment, or make one in $root with" >&2
    echo "  python3 -m venv .venv && .venv/bin/pip install -e '.[all]' -c constraints.txt" >&2
    return 2
  fi
}

# supervise DEPTH COMMAND...: run it; SIGTERM and SIGUSR1 go to the ranks, DEPTH generations below it, and not to
# the launcher: that one kills its ranks after 30 seconds, and a checkpoint may take longer.
supervise() {
  local depth="$1" pid status=0; shift
  "$@" &
  pid=$!
  # The ranks all stop if one is told to; SIGUSR1, since a launcher does not pass it on a second time.
  trap 'tell_ranks "$pid" "$depth"' TERM USR1
  while :; do
    wait "$pid" && status=0 || status=$?
    kill -0 "$pid" 2>/dev/null || break # else the wait was cut short by a signal
  done
  return "$status"
}

tell_ranks() {
  local processes="$1" generation
  for ((generation = 0; generation < $2; generation++)); do
    processes="$(pgrep -d, -P "$processes" || true)"
    [ -n "$processes" ] || return 0
  done
  kill -USR1 ${processes//,/ } 2>/dev/null || true
}
