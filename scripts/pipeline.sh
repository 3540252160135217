#!/usr/bin/env bash
# Usage: scripts/pipeline.sh [--a.b=value ...]: every stage of PIPELINE (default: the three of scripts/pipeline.yaml);
# overrides go to all of them. The environment is read as by the stage scripts.
set -euo pipefail
here="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/launch.sh"
trap 'stopped TERM 143' TERM # not 0 as of a stage: what waits for all stages must not begin
trap 'stopped USR1 138' USR1
use_environment
exec python -m llava_kd.cli run "${PIPELINE:-$here/pipeline.yaml}" "$@"
