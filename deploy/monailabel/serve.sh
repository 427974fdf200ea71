#!/usr/bin/env bash
# Serves both bundles in MONAI Label: makes its environment, puts the bundles into an app, starts the server.
#   deploy/monailabel/serve.sh --studies DIR [--models BUNDLE=DIR]... [--app DIR] [--port 8000] [--host 127.0.0.1]
# More in docs/monailabel.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/deploy/monailabel
venv=${MONAILABEL_VENV:-$root/.venv-monailabel}
python=${PYTHON:-python3}
host=127.0.0.1 port=8000 studies='' app=$root/.monailabel-app until=server
models=()

fail() { echo "error: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --environment | --prepare) until=$1; shift; continue ;;  # stop after step 1, or after step 2
        --help | -h) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
    esac
    [ $# -ge 2 ] || fail "$1 needs a value."
    case $1 in
        --studies) studies=$2 ;;
        --app) app=$2 ;;
        --host) host=$2 ;;
        --port) port=$2 ;;
        --models) models+=(--models "$2") ;;
        *) fail "unknown option $1: $(sed -n '3s/^# *//p' "${BASH_SOURCE[0]}")" ;;
    esac
    shift 2
done

# 1. The environment. torch and torchvision are taken from the machine where it has them with CUDA: the wheels that fit
#    its driver are its own business.
environment() {
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
        fail "MONAI Label 0.8.5 needs Python 3.11 or 3.12; set PYTHON=..."
    [ -f "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] || fail "$venv is there and no environment."
    echo "installing MONAI Label into $venv (the first time this takes some minutes)"
    local own=() torch=(torch==2.13.0)
    if "$python" -c 'import sys, torch, torchvision; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        own=(--system-site-packages) torch=()
    fi
    "$python" -m venv --clear "${own[@]}" "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${torch[@]}" -r "$here/requirements.txt"
    # without what it asks for: see requirements.txt
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps monailabel==0.8.5
    echo "$stamp" > "$venv/.stamp"
}
stamp=$(cksum < "$here/requirements.txt")
[ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ] || environment
[ "$until" != --environment ] || exit 0

# the bundles' Python; and monailabel imports torchvision.utils when it starts, of which no wheel fits a CPU build of
# torch 2.13: where there is none, a stand-in with the two names it imports is enough
export PATH=$venv/bin:$PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python -c 'import torchvision.utils' 2>/dev/null || PYTHONPATH=$PYTHONPATH:$here/stand_in

# 2. The app, with a bundle under model/ for each that has models.
names=$(python "$here/app.py" --app "$app" "${models[@]}")
[ "$until" = server ] || exit 0

# 3. The server. zoo_source: the default asks the internet which bundles there are; sam2 would be downloaded.
[ -n "$studies" ] || fail "--studies DIR: the folder with the scans to be labelled."
exec python -m monailabel.main start_server --app "$app" --studies "$studies" --host "$host" --port "$port" \
    --conf models "$names" --conf zoo_source ngc --conf sam2 false
