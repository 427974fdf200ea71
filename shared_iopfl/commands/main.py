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
"""The command ``iopfl``: its subcommands, their help texts, and how each of them is called."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from shared_iopfl.commands.runs import AMOUNTS, parse_settings, run_config
from shared_iopfl.models.bundles import own_bundles
from shared_iopfl.utils.errors import InputError, one_line_errors
from shared_iopfl.utils.names import nearest, parse_names

# command -> config of a bundle, name of the folder that it reads, description
RUNS = {
    "segment": ("inference", "SCANS", "segment scans without labels"),
    "federate": ("federate", "DATA", "train across the sites of a folder, in one process"),
    "personalise": ("personalise", "DATA", "fit published models to a site with a few labelled cases"),
    "calibrate": ("calibrate", "DATA", "estimate the Dice of masks without a reference, for a set of models"),
    "compare": ("compare", "DATA", "compare methods inside and outside, site by site"),
}
EXAMPLES = {
    "segment": """\
  iopfl segment prostate SCANS MASKS
  iopfl segment prostate exam.nii.gz MASKS --preset adapted
  iopfl segment prostate DICOM MASKS --output_format nifti,dicomseg,rtstruct
  iopfl segment fundus PHOTOS MASKS --ckpt_dir OUT/models --crop always""",
    "federate": """\
  iopfl federate prostate DATA OUT --sites BIDMC,HK,UCL --outside_sites RUNMC
  iopfl federate fundus DATA OUT --rounds 20 --image_size 256 --device cuda:1
  iopfl federate prostate DATA OUT --resume""",
    "personalise": """\
  iopfl personalise prostate DATA OUT --ckpt_dir MODELS
  iopfl personalise fundus DATA OUT --site CLINIC --rounds 4""",
    "calibrate": """\
  iopfl calibrate prostate DATA OUT/calibration --ckpt_dir OUT/models
  iopfl calibrate fundus DATA OUT --virtual [noise,blur]""",
    "compare": """\
  iopfl compare prostate DATA OUT --folds 2 --seeds [0,1,2]
  iopfl compare fundus DATA OUT --roles [outside]""",
}
# command -> module and function; imported when it is called
TOOLS = {
    "report": "shared_iopfl.commands.tools:report",
    "scans": "shared_iopfl.commands.tools:scans",
    "prepare": "shared_iopfl.commands.tools:prepare",
    "phantoms prostate": "shared_iopfl.data.phantoms.sites:make_prostate_sites",
    "phantoms fundus": "shared_iopfl.data.phantoms.sites:make_fundus_sites",
    "publish": "shared_iopfl.models.packaging:publish",
    "check": "shared_iopfl.commands.tools:check",
    "package": "shared_iopfl.models.packaging:package",
    "configs": "shared_iopfl.commands.tools:configs",
    "flare": "shared_iopfl.commands.tools:flare",
    "flare_publish": "shared_iopfl.commands.tools:flare_publish",
}
HELP = """\
usage: iopfl COMMAND ...        (python -m shared_iopfl is the same command)

  iopfl segment TASK SCANS OUT     segment scans without labels; OUT/report.html shows the masks
  iopfl federate TASK DATA OUT     train across the sites of a folder, in one process
  iopfl personalise TASK DATA OUT  fit published models to a site with a few labelled cases
  iopfl calibrate TASK DATA OUT    estimate the Dice of masks without a reference, for a set of models
  iopfl compare TASK DATA OUT      compare methods inside and outside, site by site
  iopfl report OUT                 write the report of a finished run again

  iopfl scans SCANS                list the scans of a folder with their names, and the files that would be skipped
  iopfl prepare DATA               list the sites of a folder with their cases, patients and splits
  iopfl phantoms TASK DATA         write synthetic sites
  iopfl publish OUT/models DIR --terms TEXT    copy the models of a run to a folder, with a manifest, for others to use
  iopfl check DIR                  check published models against their manifest
  iopfl package BUNDLE             pack a bundle as a zip file
  iopfl configs BUNDLE             generate the configs of a bundle from its task.json
  iopfl flare ..., flare_publish   federate with NVIDIA FLARE

TASK is {tasks}, or the folder of a bundle. `iopfl COMMAND --help` shows examples and options.
The full interface is MONAI's own: python -m monai.bundle run --config_file ...
"""
FLAGS = ("-h", "--help", "--quiet", "--verbose")
# options that are text even if they look like a number or a tuple
TEXT = {"dataset_dir", "output_dir", "models_dir", "from_dir", "to_dir", "terms", "bundle", "env", "sites", "patient"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: The words of the command; None uses those of the command line.
    """
    one_line_errors(in_any_process=True)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(tasks=" or ".join(own_bundles()) or "a task"), end="")
    elif words[0] in RUNS:
        _run(words[0], words[1:])
    elif words[0] == "--version":
        print(import_module("shared_iopfl").__version__)
    else:
        _call(words)


def _run(command: str, words: Sequence[str]) -> None:
    """Run a command that is a config of a bundle."""
    config, source, _ = RUNS[command]
    flags = [word for word in words if word in FLAGS]
    others = [word for word in words if word not in FLAGS]
    end = next((at for at, word in enumerate(others) if word.startswith("--")), len(others))
    options, rest = _parser(command).parse_args([*flags, *others[:end]]), others[end:]
    settings = {**parse_settings(rest), "dataset_dir": getattr(options, source), "output_dir": options.OUT}
    summed_up = command == "segment" and options.amount != "quiet"
    at_end = partial(_sum_up, options.OUT, time.monotonic()) if summed_up else None
    run_config(options.TASK, config, settings, options.amount, at_end)


def _sum_up(output_dir: str, began: float) -> None:
    """Print a summary of this run. A run that stopped before it began prints none: its folder may hold an older run."""
    from shared_iopfl.commands.summary import has_results, summary
    from shared_iopfl.evaluation.run.folder import has_begun

    if has_begun(output_dir) and has_results(output_dir):
        sys.stderr.flush()
        print(summary(output_dir, time.monotonic() - began))


def _parser(command: str) -> argparse.ArgumentParser:
    config, source, what = RUNS[command]
    parser = argparse.ArgumentParser(
        prog=f"iopfl {command}",
        description=f"{what[:1].upper()}{what[1:]}.",
        epilog=f"examples:\n{EXAMPLES[command]}\n\n"
        f"Every top-level key of the bundle's {config}.json can be set after the folders, as --key value.\n"
        "They are listed in docs/reference/config.md. Values are never evaluated as code.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("TASK", help=f"{', '.join(own_bundles()) or 'a task'}, or the folder of a bundle")
    sources = {
        "SCANS": "a scan, a folder of scans, or a DICOM series",
        "DATA": "the folder that contains one folder per site",
    }
    parser.add_argument(source, help=sources[source])
    parser.add_argument("OUT", help="the folder to write to; it must be new or empty")
    quiet, usual, verbose = AMOUNTS
    parser.set_defaults(amount=usual)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quiet", dest="amount", action="store_const", const=quiet, help="show only errors")
    amount.add_argument("--verbose", dest="amount", action="store_const", const=verbose, help="show MONAI's log too")
    return parser


def _call(words: Sequence[str]) -> None:
    """Run a command that is a single function, with Python Fire; only the function's module is imported."""
    import fire

    called = [name for name in TOOLS if name.split()[0] == words[0]]
    if not called:
        known = [*RUNS, *dict.fromkeys(name.split()[0] for name in TOOLS)]
        raise InputError(f"unknown command {words[0]!r}{nearest(words[0], known)}; iopfl --help lists the commands.")
    commands: dict[str, Any] = {}
    for name in called:
        module, _, function = TOOLS[name].partition(":")
        *group, last = name.split()
        place = commands.setdefault(group[0], {}) if group else commands
        place[last] = _as_typed(getattr(import_module(module), function))
    fire.Fire(commands, command=list(words), name="iopfl")


def _as_typed(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with paths and names kept as typed: Fire would read 2024 and 1e3 as numbers and a,b as a tuple."""
    import fire

    text = {name: parse_names if name == "sites" else str for name in inspect.signature(command).parameters}
    return fire.decorators.SetParseFns(**{name: text[name] for name in text.keys() & TEXT})(command)
