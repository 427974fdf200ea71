#!/usr/bin/env bash
# The whole chain on synthetic sites: four federate and personalise, the fifth is routed. ./demo.sh [prostate|fundus]
source "$(dirname "$0")/.ci/venv.sh"
task=${1:-prostate}
case $task in prostate | fundus) ;; *) echo "error: unknown task '$task': prostate or fundus" >&2; exit 1 ;; esac
out=demo_output/$task
rm -rf "$out"
.venv/bin/python -m shared_iopfl phantoms "$task" --output_dir "$out/sites"
.venv/bin/python -m monai.bundle run --config_file "bundles/${task}_iopfl/configs/federate.json" \
    --bundle_root "bundles/${task}_iopfl" --dataset_dir "$out/sites" --output_dir "$out" \
    --sites "['A','B','C','D']" --outside_sites "['E']" --image_size 64 --features 8 --rounds 12 --val_interval 3
echo "report: $out/report.html"
