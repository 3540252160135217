#!/usr/bin/env bash
# Usage: scripts/stage2_sft.sh [--a.b=value ...]; CONFIG names another YAML file. NPROC, NNODES, NODE_RANK and
# MASTER_ADDR are read from the environment.
set -euo pipefail
here="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/launch.sh"
launch "${CONFIG:-$here/stage2_sft.yaml}" "$@"
