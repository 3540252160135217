# Sourced by the other scripts: put the pinned packages into .venv once, and use it.
# setup_env EXTRAS installs llava_kd[EXTRAS]; VENV names another directory, PYTHON another interpreter.
# SETUP=no takes the python on PATH as it is: a container's, say.
setup_env() {
  if [ "${SETUP:-yes}" = no ]; then return; fi
  local extras="$1" root venv stamp wanted constraints
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="${VENV:-$root/.venv}"
  constraints="${CONSTRAINTS:-$root/constraints.txt}"
  stamp="$venv/.installed-${extras:-core}"
  wanted="$(cat "$constraints" "$root"/{pyproject.toml,setup.py} "$root"/llava_kd/data/pixels/*.[ch] | sha256sum | cut -d' ' -f1)"
  if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" - <<'PY' || return 1
import sys
sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Set PYTHON.")
PY
    "${PYTHON:-python3}" -m venv "$venv" || return 1
  fi
  if [ -z "$extras" ] && [ "$(cat "$venv/.installed-all,dev" 2>/dev/null)" = "$wanted" ]; then
    stamp="$venv/.installed-all,dev" # holds more than is asked for
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing pinned packages into $venv (about 2 minutes and 6 GB) ..." >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
      --editable "$root${extras:+[$extras]}" 2> >(grep -v '^WARNING: Location' >&2) || return 1
    echo "$wanted" > "$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}

# ended_at STATUS WHAT [ADVICE]: what a script's last line says where it did not reach its end.
ended_at() {
  if [ "$1" -eq 0 ]; then return; fi
  echo "$(basename "$0") ended with status $1 while $2: see the lines above for the reason; ${3:-run the same command again to continue}" >&2
}
