#!/usr/bin/env bash
# The whole chain on synthetic sites: four federate and personalise, the fifth is routed.
# ./demo.sh [prostate|fundus] [--SETTING VALUE ...]; further settings are those of federate.json, such as --rounds 3
source "$(dirname "$0")/.ci/venv.sh"
task=${1:-prostate}
case $task in
    prostate) settings=(--rounds 15 --own_rounds 4 --passes 8) ;;
    fundus) settings=(--rounds 15 --own_rounds 4 --passes 16) ;;
    *) echo "error: unknown task '$task': prostate or fundus" >&2; exit 1 ;;
esac
out=demo_output/$task sites=demo_output/${task}_sites
rm -rf "$out" "$sites"
.venv/bin/python -m shared_iopfl phantoms "$task" --output_dir "$sites" --cases 12
.venv/bin/python -m monai.bundle run --config_file "bundles/${task}_iopfl/configs/federate.json" \
    --bundle_root "bundles/${task}_iopfl" --dataset_dir "$sites" --output_dir "$out" \
    --sites "['A','B','C','D']" --outside_sites "['E']" --fractions "[0.5,0.15,0.35]" \
    --image_size 64 --features 8 --val_interval 3 "${settings[@]}" "${@:2}"
echo "report: $out/report.html"
