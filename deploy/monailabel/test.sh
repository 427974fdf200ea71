#!/usr/bin/env bash
# Makes the environment if need be, starts real servers on synthetic scans, and asks them everything.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/.ci/venv.sh"
"$root/deploy/monailabel/serve.sh" --environment
exec "$root/.venv/bin/python" -m pytest "$root"/tests/test_monailabel*.py -v "$@"
