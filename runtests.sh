#!/usr/bin/env bash
# The tests. ./runtests.sh: the quick ones; ./runtests.sh --all: the slow ones too; anything else goes to pytest.
source "$(dirname "$0")/.ci/venv.sh"
if [ "${1:-}" = "--all" ]; then
    shift
    exec .venv/bin/python -m pytest "$@"
fi
exec .venv/bin/python -m pytest -m "not slow" "$@"
