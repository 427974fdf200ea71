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
"""Commands that run no config: they list data, write reports, check published models, and start NVIDIA FLARE."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from shared_iopfl.commands.summary import has_results
from shared_iopfl.data.patients import AUTO
from shared_iopfl.data.scan_files import find_scans, not_taken
from shared_iopfl.data.splits import find_cases, list_sites, site_cases
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import counted

ENVIRONMENTS = ("sim", "poc", "prod")


def prepare(
    dataset_dir: str,
    split_seed: int = 0,
    patient: str = AUTO,
    fold: int = 0,
    folds: int = 1,
    masks: bool = True,
) -> None:
    """List the sites of a folder: their cases and patients, the split into parts, and the values in their masks.

    Every mask is opened unless --masks False is given. The other options are those of the bundles' configs.
    """
    check_values({"split_seed": split_seed, "patient": patient, "fold": fold, "folds": folds})
    if masks:
        from shared_iopfl.data.mask_values import mask_values

    for site in list_sites(dataset_dir):
        parts = []
        for part in ("train", "validation", "test"):
            cases = site_cases(dataset_dir, site, part, split_seed, patient=patient, fold=fold, folds=folds)
            parts.append(f"{len(cases)} {part} ({counted(len({case['patient'] for case in cases}), 'patient')})")
        values = f"; {mask_values(find_cases(dataset_dir, site, patient))}" if masks else ""
        print(f"{site}: {', '.join(parts)}{values}")


def scans(dataset_dir: str, pictures: bool = False) -> None:
    """List the scans in a folder that would be segmented, with their names, and the files that would be skipped.

    --pictures True lists photographs and skips volumes, as the fundus bundle does.
    """
    for scan in find_scans(dataset_dir, pictures):
        print(f"{scan['case']}: {scan['image']}")
    if line := not_taken(dataset_dir, pictures):
        print(line)


def report(output_dir: str) -> None:
    """Write ``report.html`` of a run, with the masks of an inference or with scores; scores are printed too.

    For a folder with a ``comparison.csv``, the tables are computed again from the scores of the cases.
    """
    if (Path(output_dir) / "comparison.csv").is_file():
        from shared_iopfl.comparison.report import print_comparison, write_comparison

        print(write_comparison(output_dir))
        print_comparison(output_dir)
        return
    if has_results(output_dir) and not (Path(output_dir) / "metrics.csv").is_file():
        from shared_iopfl.report.inference.page import write_inference_report

        print(write_inference_report(output_dir))
        return
    from shared_iopfl.report.run import print_table, write_report

    print(write_report(output_dir))
    print_table(output_dir)


def check(models_dir: str) -> None:
    """Check published models against their manifest, read every file, and print the sites and the terms of use."""
    from shared_iopfl.models.files import check_models
    from shared_iopfl.models.manifest import check_manifest

    manifest = check_manifest(models_dir)
    check_models(models_dir)
    print(f"{len(manifest['files'])} files as published, of the sites {', '.join(manifest['sites']) or 'none'}")
    print(f"terms: {manifest['terms']}")


def configs(*tasks: str) -> None:
    """Generate the configs of bundles from their ``task.json``. Takes bundle folders; see docs/extending/task.md."""
    from shared_iopfl.models.bundle_configs import write_configs

    if not tasks:
        raise InputError("no bundle given: name the folders of the bundles whose configs are to be generated.")
    for task in tasks:
        for path in write_configs(str(task)):
            print(path)


def flare(
    bundle: str,
    sites: Sequence[str],
    output_dir: str,
    env: str = "sim",
    rounds: int = 60,
    dataset_dir: str | None = None,
    round_timeout: int = 0,
    own_process: bool | None = None,
    startup_kit: str | None = None,
    username: str | None = None,
    tracking: str = "",
    publish: bool = False,
    **settings: Any,
) -> None:
    """Federate with NVIDIA FLARE; see docs/flare.md.

    Every key of the bundle's federate.json and train.json is an option too, such as --min_sites.

    Args:
        bundle: Folder of the bundle.
        sites: Names of the inside sites.
        output_dir: Folder to write to.
        env: "sim" or "poc" on this machine; "prod" over several machines: the job is exported, or submitted if
            a startup kit is given.
        rounds: Number of rounds.
        dataset_dir: Folder of the sites. In production each site sets its own.
        round_timeout: Seconds after which a round continues without the sites that have not answered; 0 waits for all.
        own_process: Whether a site runs each task in a process of its own; by default only in production.
        startup_kit: Startup kit of the FLARE admin who submits the job, a folder.
        username: The admin's name; by default the name of that folder.
        tracking: "tensorboard" or "mlflow": the server records the metrics while the sites report them.
        publish: At the end, sites that allow it send their personalised models to the others, which score them.
        settings: Other keys of the configs.
    """
    from shared_iopfl.evaluation.personalised_verdict import print_personalised_verdict
    from shared_iopfl.evaluation.scores import print_table

    if env not in ENVIRONMENTS:
        raise InputError(f"unknown env {env!r}: choose {', '.join(ENVIRONMENTS)}.")
    own_process = env == "prod" if own_process is None else own_process
    how = (round_timeout, own_process, settings, tracking, publish)
    run = _flare().FlareRun(str(bundle), sites, rounds, str(output_dir), dataset_dir, *how)
    if env == "prod" and dataset_dir is not None:
        raise InputError("in production each site sets its own data (IOPFL_DATASET_DIR there): leave out dataset_dir.")
    if env == "prod" and startup_kit is None:
        job = run.export()
        print(f"job: {job}\nsubmit it: nvflare job submit -j {job}")
    elif env == "prod":
        print("global model:", run.submit(str(startup_kit), username))
    else:
        print("global model:", run.simulate() if env == "sim" else run.prove())
        print_table(output_dir)
        print_personalised_verdict(output_dir)


def flare_publish(output_dir: str, sites: Sequence[str]) -> None:
    """Publish the personalised models of a FLARE run, only those of the given sites."""
    for path in _flare("results").publish_sites(output_dir, sites):
        print(path)


def _flare(module: str = "run") -> ModuleType:
    try:
        return import_module(f"shared_iopfl.federation.flare.{module}")
    except ModuleNotFoundError as error:
        if "nvflare" not in str(error.name):
            raise
        raise InputError("NVIDIA FLARE is not installed: pip install 'nvflare==2.9.0'") from error
