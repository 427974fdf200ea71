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
"""``python -m shared_iopfl COMMAND``: what is done around a bundle's runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import fire

from shared_iopfl.data.mask_values import mask_values
from shared_iopfl.data.patients import AUTO
from shared_iopfl.data.phantoms.sites import make_fundus_sites, make_prostate_sites
from shared_iopfl.data.sites import find_cases, list_sites, site_cases
from shared_iopfl.models.bundle_configs import write_configs
from shared_iopfl.models.files import check_models
from shared_iopfl.models.manifest import check_manifest
from shared_iopfl.models.packaging import package, publish
from shared_iopfl.report.run import print_table, write_report
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError, one_line_errors
from shared_iopfl.utils.names import parse_names

TEXT = {"dataset_dir", "output_dir", "models_dir", "from_dir", "to_dir", "terms", "bundle", "env", "sites", "patient"}


def prepare(
    dataset_dir: str,
    split_seed: int = 0,
    patient: str = AUTO,
    fold: int = 0,
    folds: int = 1,
    seed: int | None = None,
) -> None:
    """List the sites of a folder, their cases and patients, how these would be split, and what values their masks hold.

    Every mask is opened. The options are those of the bundles' configs; --seed is an older name of --split_seed.
    """
    split_seed = split_seed if seed is None else seed
    check_values({"split_seed": split_seed, "patient": patient, "fold": fold, "folds": folds})
    for site in list_sites(dataset_dir):
        parts = []
        for part in ("train", "validation", "test"):
            cases = site_cases(dataset_dir, site, part, split_seed, patient=patient, fold=fold, folds=folds)
            parts.append(f"{len(cases)} {part} ({_count(len({case['patient'] for case in cases}), 'patient')})")
        cases = find_cases(dataset_dir, site, patient)
        print(f"{site}: {', '.join(parts)}; {mask_values(cases)}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def report(output_dir: str) -> None:
    """Write ``report.html`` of a run and print its table."""
    print(write_report(output_dir))
    print_table(output_dir)


def check(models_dir: str) -> None:
    """Hold a published model set to its manifest, read what is in it, and say what it is."""
    manifest = check_manifest(models_dir)
    check_models(models_dir)
    print(f"{len(manifest['files'])} files as published, of the sites {', '.join(manifest['sites']) or 'none'}")
    print(f"terms: {manifest['terms']}")


def configs(*tasks: str) -> None:
    """Generate the configs of bundles, each named by its folder, from its ``task.json``; see docs/extending/task.md."""
    if not tasks:
        raise InputError("no bundle is named: give the folders of the bundles whose configs are to be generated.")
    for task in tasks:
        for path in write_configs(str(task)):
            print(path)


def flare(
    bundle: str, sites: Sequence[str], output_dir: str, env: str = "sim", rounds: int = 60, **options: Any
) -> None:
    """Federate with NVIDIA FLARE: --env sim or poc on this machine, prod over several (see docs/flare.md).

    Further options: --dataset_dir, --min_sites, --round_timeout, --own_process; with --env prod also --startup_kit and
    --username, to submit the job at once; and every key of the bundle's federate.json and train.json.
    """
    _flare().federate(env, bundle, sites, rounds, output_dir, **options)


def flare_publish(output_dir: str, sites: Sequence[str]) -> None:
    """Publish personalised models of a FLARE run: those of the named sites, and no others."""
    for path in _flare().publish_sites(output_dir, sites):
        print(path)


def _flare() -> ModuleType:
    try:
        return import_module("shared_iopfl.federation.flare.run")
    except ModuleNotFoundError as error:
        if "nvflare" not in str(error.name):
            raise
        raise InputError("NVIDIA FLARE is not installed: pip install 'shared_iopfl[flare]'.") from error


def main() -> None:
    """Run the command named on the command line."""
    one_line_errors()
    fire.Fire(
        {
            "prepare": _as_typed(prepare),
            "phantoms": {"prostate": _as_typed(make_prostate_sites), "fundus": _as_typed(make_fundus_sites)},
            "report": _as_typed(report),
            "publish": _as_typed(publish),
            "check": _as_typed(check),
            "package": _as_typed(package),
            "configs": configs,
            "flare": _as_typed(flare),
            "flare_publish": _as_typed(flare_publish),
        },
        name="shared_iopfl",
    )


def _as_typed(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, told paths and names as they are typed: Fire takes 2024 and 1e3 for numbers, and a,b for a tuple."""
    text = {name: parse_names if name == "sites" else str for name in inspect.signature(command).parameters}
    return fire.decorators.SetParseFns(**{name: text[name] for name in text.keys() & TEXT})(command)


if __name__ == "__main__":
    main()
