#!/usr/bin/env bash
# Usage: scripts/train.sh CONFIG.yaml [--a.b=value ...]: any stage file, launched as the stage scripts are.
set -euo pipefail
source "$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/launch.sh"
launch "$@"
