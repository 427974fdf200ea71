#!/usr/bin/env bash
# The tests. ./runtests.sh: the quick ones; ./runtests.sh --all: the slow ones too; anything else goes to pytest.
source "$(dirname "$0")/.ci/venv.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one process a core, each of one thread; a worker that is done takes from the other's
pytest=(.venv/bin/python -m pytest -n logical --dist worksteal)
if [ "${1:-}" = "--all" ]; then
    shift
    exec "${pytest[@]}" "$@"
fi
exec "${pytest[@]}" -m "not slow" "$@"
