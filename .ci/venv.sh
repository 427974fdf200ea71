#!/usr/bin/env bash
# Makes or refreshes .venv from requirements.txt; sourced by demo.sh and runtests.sh, which then run in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed, $PYTHON is older; set PYTHON=..." >&2; exit 1; }
stamp=$(cat requirements.txt pyproject.toml | cksum)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/.stamp 2>/dev/null)" != "$stamp" ]; then
    echo "installing into .venv (the first time this takes some minutes)"
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    echo "$stamp" > .venv/.stamp
fi
