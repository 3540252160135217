# Sourced by the stage scripts: start `llava-kd train` on NPROC processes of each of NNODES machines.
# NPROC defaults to the number of GPUs (1 without one); MASTER_ADDR and NODE_RANK matter on several machines.
launch() {
  local nproc="${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
  if [ "$nproc" -eq 0 ]; then nproc=1; fi
  if [ "$nproc" -eq 1 ] && [ "${NNODES:-1}" -eq 1 ]; then
    exec python -m llava_kd.cli train "$@"
  fi
  exec torchrun --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$nproc" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m llava_kd.cli train "$@"
}
