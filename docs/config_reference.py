# Copyright (c) MONAI Consortium
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The reference of the configs' keys: names and defaults from the JSON files, descriptions from the table below.

    python docs/config_reference.py

renews the tables in ``reference/config.md``; a test compares them. A key is a *setting* if `SETTINGS` describes it;
others are components or steps, which `COMPONENTS` describes. A new setting of a config needs one line here; a test
checks it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BUNDLES = Path(__file__).parents[1] / "bundles"
PAGE = Path(__file__).with_name("reference") / "config.md"
MARKER = "<!-- generated: python docs/config_reference.py -->"
TITLES = {
    "train": "Train one site. A client of MONAI FL or NVIDIA FLARE runs this config as well.",
    "federate": "Federate over the sites of a folder, in one process.",
    "inference": "Segment scans without labels.",
    "evaluate": "Score a model on the labelled cases of a site.",
    "calibrate": "Fit the line from quality to expected Dice for a set of models.",
    "personalise": "Fit published models to a site with a few labelled cases.",
    "compare": "Compare methods inside and outside, site by site.",
    "multi_gpu_train": "An overlay of `train.json` for several GPUs.",
    "fl_filters": "Privacy filters of a federated client (`--filters fl_filters`).",
    "fl_svt": "NVIDIA FLARE's differential privacy filter at a federated client (`--filters fl_svt`).",
    "baselines": "Inferers that `compare.json` measures the method against.",
    "virtual": "Changes of contrast, blur and noise that `compare.json` can apply to test cases (`--virtual`).",
}
SETTINGS = {
    # folders, machine, run
    "bundle_root": "folder of the bundle",
    "dataset_dir": "folder of the sites; for `inference.json` a scan or a folder of scans",
    "output_dir": "folder that the run writes to; it must be empty or new, and apart from the data",
    "ckpt_dir": "folder of the models",
    "mask_dir": "folder that the masks of an evaluation are written to",
    "ckpt": "file of the weights that are loaded",
    "device": "torch device",
    "run_name": "set by MONAI FL: name of the client that runs the bundle; leave it out otherwise",
    "seed": "seed of initial weights, sampling, augmentation, routers and drawn views",
    "sampling_seed": "seed of sampling and augmentation, of its own in each process on several GPUs",
    "seeds": "list of seeds; every method is trained once per seed",
    "deterministic": "`True`: deterministic CUDA kernels; slower",
    "amp": "mixed precision; the default is on for CUDA",
    "bf16": "train in bfloat16 autocast, also on a CPU",
    "recompute": "activation checkpointing: train with less memory, in more time, with the same gradient",
    "num_workers": "worker processes of the data loaders",
    "overwrite": "`True`: replace what an earlier run of the same kind wrote to `output_dir`",
    "resume": "`True`: continue an interrupted run",
    "verbose": "log every epoch",
    "tensorboard": "write TensorBoard events",
    "save_checkpoints": "write the models of the site",
    "save_execute_config": "used by MONAI's `--tracking`: keep the config as executed",
    # sites and cases
    "site": "site that is trained or scored",
    "sites": "names of the inside sites; for routing, the sites whose personalised models are used (`null`: all)",
    "outside_sites": "sites that take no part in the training and are scored afterwards",
    "role": "`inside`, `outside` or `virtual`: how the site is counted in the tables",
    "roles": "parts of the comparison: `inside`, `outside`",
    "split": "cases that are scored: `train`, `validation`, `test` or `all`",
    "split_seed": "seed of the split by patient",
    "fractions": "shares of training, validation and test patients; they sum to 1",
    "fold": "number of the cross-validation fold, from 0",
    "folds": "number of folds; 1: no cross-validation; in `personalise.json` at most one for each patient",
    "patient": "how files are assigned to patients: `auto`, a pattern with a group, or a table `FILE.csv`",
    # images
    "image_size": "side length in pixels that slices and photographs are resized to, from 16 to 2048",
    "field_of_view": "side in millimetres that slices are cropped or padded to before they are resized; 0: as they are",
    "normalise": "normalise intensities",
    "soft_labels": "training targets are the share of a pixel that the label covers; false: the nearest label",
    "augment": "augment the training images",
    "slices": "neighbouring slices that form the channels of the input; odd",
    "coding": "meaning of the mask values: a name in `codings`, a dictionary of values, or one of these per site",
    "codings": "mask codings by name",
    "crop": "crop photographs around the optic disc: `auto`, `always` or `never`",
    "grey": "what to do with grey photographs: `refuse`, or `replicate`: accept them",
    "acquisition": "transform that changes the test images as another scanner would; set by `compare.json`",
    # network and training
    "features": "base width of the U-Net, or a list of six widths",
    "rounds": "rounds of federated averaging; in `personalise.json` of training at the site, at most",
    "local_epochs": "epochs that each site trains per round",
    "epochs": "epochs of the whole run",
    "passes": "how often each case is drawn per epoch",
    "batch_size": "cases or photographs per training step; for inference, slices per forward pass",
    "slices_per_case": "slices drawn from each case of a batch",
    "learning_rate": "initial learning rate of Adam",
    "tail": "last part of the epochs, trained at a constant low learning rate; the personalised model averages over it",
    "tail_rate": "learning rate in that last part, as a fraction of the initial one",
    "alpha": "weight of the previous average in the personalised model, from 0 to below 1",
    "start_epoch": "epoch after which the average begins",
    "norm_statistics": "statistics by which batch norm normalises during training: `batch`, `global` or `blend`",
    "norm_start": "fraction of the epochs after which `global` and `blend` take effect",
    "local_norms": "`True`: FedBN, each site keeps its own batch-norm layers",
    "proximal": "weight of FedProx's proximal term; 0: off",
    "ditto": "weight of Ditto's regularisation; 0: off",
    "val_interval": "validate every so many epochs (rounds in `federate.json`); 0: never",
    "personalised_metrics": "for MONAI FL: also validate the site's personalised model",
    # federation
    "initial_model": "file of the global model from which the first round starts; empty: a new network",
    "server_momentum": "momentum of the server's step, from 0 to below 1; 0: plain averaging",
    "averaging": "`mean` of the sites' weights in proportion to their cases, `equal_mean`, `median` or `trimmed_mean`",
    "min_sites": "a round continues if at least so many sites deliver; 0: all must",
    "max_update_norm": "refuse updates that are more than so many times as long as usual; 0: no limit",
    "site_timeout": "seconds that a site may take per round; 0: no limit",
    "filters": "name of a config with privacy filters, such as `fl_filters` or `fl_svt`; empty: none",
    "own_rounds": "rounds of local training after the last federated round",
    "shares": "shares of the personalised model, from which each site selects by validation Dice; `[]`: no selection",
    # inference
    "model": "model that is scored: `global`, `personalised`, `routed`, `soup` or the name of a site",
    "mode": "`episodic`: route each scan; `site`: one network for all scans of a folder; `off`: the global model",
    "preset": "routing settings by name: `default`, `paper`, `soup`, `adapted` or `self_trained`",
    "routing": "dictionary of single routing settings that replace those of the preset",
    "bundle_routing": "settings of this bundle for `default`, `adapted` and `self_trained`; `routing` overrides them",
    "calibration": "file that `calibrate.json` wrote; the review list then has the expected Dice of each mask",
    "objective": "module that adaptation minimises; `null`: the objective of `routing`",
    "site_model": "file of a site's network: used if it exists, else written",
    "match_manifest": "`False`: allow settings that contradict `manifest.json`",
    "second_look": "fraction of the usual size below which a target is segmented again in a part of its scan; 0: never",
    "target_size": "usual size of the target, the root of its fraction of the pixels; 0: unknown",
    "one_component": "keep one connected component of each target",
    "smooth_outlines": "replace the outline of each such component by a smooth one",
    "output_format": "`nifti`: masks in the format of the scan; for DICOM also `dicomseg` and `rtstruct` (a list)",
    "overlays": "write pictures with the outlines of the masks",
    "empty_masks": "`fail`: exit with an error status if a mask is empty; `allow`",
    "pseudonyms": "table by which scans are served under pseudonyms; it must not be in `output_dir`",
    "strict": "set by MONAI FL: whether cases that cannot be read end the evaluation",
    "own_folder": "set by MONAI FL: whether the run checks and locks its `output_dir`",
    # comparison
    "inside": "methods for inside sites, name → overrides of the training",
    "outside": "methods for outside sites, name → overrides of the inference",
    "candidates": "routing settings among which an inner leave-one-site-out selects; `{}`: none",
    "fine_tuning": "rounds of local fine-tuning of the row `fine-tuned`",
    "pooled": "overrides for training on the pooled data; `null`: leave it out",
    "federations": "further federations, name → overrides",
    "level": "share of the masks of left-out sites that the interval of the expected Dice contains",
    "virtual": "names of virtual scanners to test on",
    "labelled": "also fit routes with labels, as an upper bound",
    # filters
    "percentile": "changes below this percentile are withheld",
    "clip": "changes above this percentile are clipped",
    "share": "fraction of the other changes that is sent",
    "fraction": "fraction of the changes that is sent",
    "epsilon": "privacy budget of selecting them",
    "noise_var": "privacy budget of each change that is sent; smaller: more noise",
    "gamma": "bound that changes are clipped to",
    "tau": "changes below this are withheld, up to noise",
}
COMPONENTS = {
    "imports": "modules for expressions",
    "+imports": "further imports",
    "run_settings": "settings that are recorded in `run.json`",
    "settings": "settings that are recorded in `run.json`",
    "site_config": "settings that are passed on to `train.json`",
    "client_config": "settings of `train.json` that each site has of its own in a federation",
    "scoring_config": "settings that are passed on to `evaluate.json`",
    "training": "settings that are passed on to `train.json`",
    "architecture": "what `manifest.json` records of the models",
    "model_files": "files that the training writes",
    "personalised_file": "file of the personalised model",
    "network_def": "network on the CPU, as MONAI's exporters read it",
    "network": "network on its device",
    "loss": "loss",
    "optimizer": "optimiser",
    "lr_scheduler": "learning-rate schedule",
    "round_state": "what a site keeps from round to round",
    "preprocessing_transforms": "transforms for training and validation",
    "preprocessing": "transforms before the network",
    "postprocessing": "transforms after the network",
    "train": "data, inferer, handlers and trainer of the training",
    "validate": "data, inferer, handlers and evaluator of the validation",
    "dataset": "dataset",
    "dataloader": "data loader",
    "experts": "personalised models, site → weights",
    "inferer": "inferer, here test-time routing",
    "handlers": "handlers of the evaluator",
    "evaluator": "evaluator",
    "federation": "the federation",
    "scoring": "the final scoring",
    "comparison": "the comparison",
    "baselines": "inferers by name",
    "initialize": "steps before the run",
    "run": "steps of the run",
    "finalize": "steps after the run",
    "+finalize": "further steps after the run",
    "arrived": "filter that remembers the weights of the server",
    "pre_filters": "filters of what arrives",
    "post_weight_filters": "filters of weights that leave",
    "post_evaluate_filters": "filters of metrics that leave",
    "post_statistics_filters": "filters of data statistics that leave",
}


def keys() -> dict[str, dict[str, dict[str, Any]]]:
    """Config → key at its top → bundle → value."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(BUNDLES.glob("*_iopfl/configs/*.json")):
        if path.stem != "metadata":
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                found.setdefault(path.stem, {}).setdefault(key, {})[path.parts[-3].removesuffix("_iopfl")] = value
    order = {name: number for number, name in enumerate(TITLES)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def default(values: dict[str, Any]) -> str:
    """A setting's default, per bundle where they differ; an expression is shown as it is written."""
    texts = {bundle: json.dumps(value, ensure_ascii=False) for bundle, value in values.items()}
    short = {bundle: code(text if len(text) <= 60 else "see the config") for bundle, text in texts.items()}
    if len(set(short.values())) == 1 and len(texts) > 1:
        return next(iter(short.values()))
    return "<br>".join(f"{bundle}: {text}" for bundle, text in short.items())


def code(text: str) -> str:
    """Text as code in the cell of a table."""
    return text if text == "see the config" else f"`{text.strip(chr(34)) or ' '}`".replace("|", "\\|")


def page() -> str:
    """The tables of all configs in Markdown."""
    lines: list[str] = []
    for config, found in keys().items():
        lines += [f"## {config}.json", "", TITLES.get(config, ""), ""]
        settings = {key: values for key, values in found.items() if key in SETTINGS}
        if settings:
            lines += ["| setting | default | meaning |", "|---|---|---|"]
            lines += [f"| `{key}` | {default(values)} | {SETTINGS[key]} |" for key, values in settings.items()]
            lines += [""]
        others = [key for key in found if key not in SETTINGS]
        if others:
            lines += ["| component or step | meaning |", "|---|---|"]
            lines += [f"| `{key}` | {COMPONENTS.get(key, 'see the config')} |" for key in others]
            lines += [""]
    return "\n".join(lines)


def renewed(text: str) -> str:
    """The page ``reference/config.md`` with the tables as they are today."""
    return text.split(MARKER)[0] + f"{MARKER}\n\n{page()}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
