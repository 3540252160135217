# Sourced by the stage scripts: start `llava-kd train` on NPROC processes of each of NNODES machines.
# NPROC defaults to the number of GPUs (1 without one). LAUNCHER is torchrun (default) or deepspeed. On several
# machines, run the same command on each, with its NODE_RANK and the first machine's MASTER_ADDR; see docs/clusters.md.
#
# Until the process that trains has taken over, nothing has begun: a signal ends the script at once.
stopped() {
  echo "stopped by SIG$1 before anything started; run the same command again to continue" >&2
  exit "$2"
}
trap 'stopped TERM 0' TERM
trap 'stopped USR1 0' USR1
trap 'stopped INT 130' INT
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

launch() {
  use_environment || return
  more_open_files
  local nproc nnodes="${NNODES:-1}"
  nproc="$(num_processes)" && whole_number NNODES "$nnodes" 1 && whole_number NODE_RANK "${NODE_RANK:-0}" 0 || return
  case " $* " in *" --dry_run "*) exec python -m llava_kd.cli train "$@" --ranks=$((nproc * nnodes)) ;; esac
  if [ "$nproc" -eq 1 ] && [ "$nnodes" -eq 1 ]; then
    exec python -m llava_kd.cli train "$@"
  fi
  if [ "$nnodes" -gt 1 ]; then place_among_machines "$nnodes" || return; fi
  local address=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
  case "${LAUNCHER:-torchrun}" in
    torchrun)
      # Runs on one machine each find a free port, unless MASTER_PORT names one.
      if [ "$nnodes" -eq 1 ] && [ -z "${MASTER_PORT:-}" ]; then address=(--standalone); fi
      # Not the torchrun on PATH, which may be of another environment.
      exec python -m llava_kd.assembly.runs.supervise python -m llava_kd.assembly.runs.torchrun --nnodes "$nnodes" --node-rank "${NODE_RANK:-0}" \
        --nproc-per-node "$nproc" "${address[@]}" -m llava_kd.cli train "$@"
      ;;
    deepspeed)
      if [ "$nnodes" -gt 1 ]; then
        : "${HOSTFILE:?deepspeed on several machines needs HOSTFILE, lines of: name slots=GPUs}"
        address=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" \
          --master_port "${MASTER_PORT:-29500}")
      else
        address=(--num_gpus "$nproc" --master_port "${MASTER_PORT:-29500}")
      fi
      exec python -m llava_kd.assembly.runs.supervise deepspeed "${address[@]}" --no_local_rank --module llava_kd.cli train "$@"
      ;;
    *) echo "LAUNCHER must be torchrun or deepspeed; got $LAUNCHER" >&2; return 2 ;;
  esac
}

# What NPROC says, or else the number of GPUs; 1 where that is 0.
num_processes() {
  local nproc="${NPROC:-}"
  if [ -z "$nproc" ]; then nproc="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"; fi
  whole_number NPROC "$nproc" 0 || return
  if [ "$nproc" -eq 0 ]; then nproc=1; fi
  echo "$nproc"
}

# Several machines wait for each other until all have come, so what would let them wait for ever is refused.
place_among_machines() {
  if [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-}" ]; then
    echo "NNODES is $1, so set MASTER_ADDR to the first machine (the same value on all machines) and NODE_RANK to 0..$(($1 - 1))" >&2
    return 2
  fi
  if [ "$NODE_RANK" -ge "$1" ]; then
    echo "NODE_RANK must be from 0 to $(($1 - 1)), because NNODES is $1; got $NODE_RANK" >&2
    return 2
  fi
  echo "machine $NODE_RANK of 0..$(($1 - 1)); waiting at $MASTER_ADDR:${MASTER_PORT:-29500} until all machines are connected" >&2
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
  # In the repository any Python sees llava_kd itself, without what it needs.
  local needed='all(map(find_spec, ("llava_kd", "torch", "transformers", "annotated_types")))'
  if python -c "from importlib.util import find_spec; raise SystemExit(not $needed)" >/dev/null 2>&1; then return; fi
  local root venv
  root="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="${VENV:-$root/.venv}"
  if [ -x "$venv/bin/llava-kd" ]; then
    sound_venv "$venv" || return 2
    export PATH="$venv/bin:$PATH"
  else
    echo "llava_kd is not installed here: activate its environment, or create one in $root with" >&2
    echo "  python3 -m venv .venv && .venv/bin/pip install -e '.[all]' -c constraints.txt" >&2
    return 2
  fi
}
