# Sourced by the other scripts.

# setup_env puts the pinned packages into .venv once, and uses it.
# setup_env EXTRAS installs llava_kd[EXTRAS]; VENV names another directory, PYTHON another interpreter.
# SETUP=no takes the python on PATH as it is: a container's, say.
setup_env() {
  if [ "${SETUP:-yes}" = no ]; then return; fi
  local extras="$1" root venv stamp wanted constraints
  root="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="${VENV:-$root/.venv}"
  constraints="${CONSTRAINTS:-$root/constraints.txt}"
  stamp="$venv/.installed-${extras:-core}"
  wanted="$(cat "$constraints" "$root"/{pyproject.toml,setup.py} "$root"/llava_kd/data/pixels/*.[ch] | sha256sum | cut -d' ' -f1)"
  if [ -e "$venv/bin/python" ] || [ -L "$venv/bin/python" ]; then
    sound_venv "$venv" || return 1
  else
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

# sound_venv FOLDER: its Python starts. It does not after a Python of the system that it belongs to was removed.
sound_venv() {
  if "$1/bin/python" -c "" >/dev/null 2>&1; then return; fi
  echo "the environment $1 must have a Python that starts; $1/bin/python does not: remove that folder and make it anew" >&2
  return 1
}

# whole_number NAME VALUE LEAST
whole_number() {
  case "$2" in
    '' | *[!0-9]* | 0?* | ??????*) ;;
    *) if [ "$2" -ge "$3" ]; then return; fi ;;
  esac
  echo "$1 must be a whole number from $3 to 99999; got '$2'" >&2
  return 2
}

# as_given PATH DEFAULT: one that a user named, once the script has left their working directory by its one `cd`.
as_given() {
  case "$1" in
    '') echo "$2" ;;
    /*) echo "$1" ;;
    *) if [ "$OLDPWD" = "$PWD" ]; then echo "$1"; else echo "$OLDPWD/$1"; fi ;;
  esac
}

# ended_at STATUS WHAT [ADVICE]: what a script's last line says where it did not reach its end.
ended_at() {
  if [ "$1" -eq 0 ]; then return; fi
  echo "$(basename "$0") ended with status $1 while $2: see the lines above for the reason; ${3:-run the same command again to continue}" >&2
}
