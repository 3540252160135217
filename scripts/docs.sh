#!/usr/bin/env bash
# Build the site of docs/ into site/ (SITE names another folder): any warning, such as of a dead link, is an error.
# MkDocs has an environment of its own, .venv-docs, since training needs none of it; MKDOCS names one that is there.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdocs="${MKDOCS:-.venv-docs/bin/mkdocs}"
if [ -z "${MKDOCS:-}" ] && [ ! -x "$mkdocs" ]; then
  python3 -m venv .venv-docs
  .venv-docs/bin/pip install --quiet --no-deps --requirement constraints-docs.txt
fi
export NO_MKDOCS_2_WARNING=1
exec "$mkdocs" build --strict --site-dir "${SITE:-site}" "$@"
