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
"""The allowed values of all hyper-parameters, in one table."""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

from shared_iopfl.utils.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
FORMATS = ("nifti", "dicomseg", "rtstruct")


class Rule(NamedTuple):
    """The allowed values of a setting.

    Attributes:
        allowed: Description, as in "must be ...".
        holds: Function that tells whether a value is allowed.
    """

    allowed: str
    holds: Callable[[Any], bool]


def check_values(settings: Mapping[str, Any]) -> None:
    """Raise for the first hyper-parameter with a value that is not allowed; called before any data are read.

    Args:
        settings: name -> value. Names that the table does not contain, and text that a config has yet to evaluate, are
            skipped.

    Raises:
        InputError: If a value is not allowed; the message names the hyper-parameter and its allowed values.
    """
    for name, value in settings.items():
        if name in RULES and not _is_expression(value) and not RULES[name].holds(value):
            raise InputError(f"{name} must be {RULES[name].allowed}, but is {reprlib.repr(value)}.")


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def output_formats(value: Any) -> list[str]:
    """The formats in which masks are written, from ``nifti,dicomseg`` or a list of such names."""
    names = value.split(",") if isinstance(value, str) else list(value)
    return [str(name).strip() for name in names]


def _are_formats(value: Any) -> bool:
    return isinstance(value, (str, list, tuple)) and bool(value) and {*output_formats(value)} <= {*FORMATS}


def has_negative_variance(key: str, tensor: Tensor) -> bool:
    """Whether an entry of a state_dict is the running variance of a norm layer (by torch's name) and negative."""
    return key.rpartition(".")[2] == "running_var" and bool((tensor < 0).any())


# ---- kinds of values: True is not a number, "0.5" is not a number, "False" is not a switch --------------------------


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def whole(low: int, high: float = math.inf) -> Rule:
    """A whole number in a range, its ends included."""
    return Rule(
        f"a whole number from {low}" + (f" to {high}" if high < math.inf else ""),
        lambda value: _is_number(value, Integral) and low <= value <= high,
    )


def number(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Rule:
    """A finite number in a range that includes its ends, unless `above` or `below` excludes one of them."""
    return Rule(
        f"a number {'above' if above else 'from'} {low:g}"
        + (f" {'to below' if below else 'to'} {high:g}" if high < math.inf else ""),
        lambda value: (
            _is_number(value)
            and low <= value <= high
            and abs(value) <= sys.float_info.max
            and not (above and value == low)
            and not (below and value == high)
        ),
    )


def word(*choices: str) -> Rule:
    """One of some words."""
    return Rule("one of " + ", ".join(choices), lambda value: isinstance(value, str) and value in choices)


def several(what: str, one: Rule, fewest: int = 0, most: float = math.inf) -> Rule:
    """A list, of a length from `fewest` to `most`, whose values all obey a rule."""
    return Rule(
        what,
        lambda value: (
            isinstance(value, (list, tuple)) and fewest <= len(value) <= most and all(one.holds(item) for item in value)
        ),
    )


def either(*rules: Rule) -> Rule:
    """A value that at least one of the rules allows."""
    return Rule(", or ".join(rule.allowed for rule in rules), lambda value: any(rule.holds(value) for rule in rules))


def is_patient_setting(value: Any) -> bool:
    """Whether a value is a way to find patients: "auto", a table, or a pattern with a group."""
    if not isinstance(value, str) or not value:
        return False
    try:
        return value == AUTO or value.lower().endswith(".csv") or re.compile(value).groups > 0
    except re.error:
        return False


def _works(device: Any) -> bool:
    import torch  # here, so that commands that only list files need not import it

    try:
        return torch.empty(0, device=torch.device(device)).device.type != "meta"
    except Exception:  # backends raise various exceptions without hardware or driver
        return False


def _are_fractions(value: Any) -> bool:
    return several("shares", number(0, 1), 3, 3).holds(value) and value[0] > 0 and abs(sum(value) - 1) <= 1e-6


switch = Rule("True or False", lambda value: isinstance(value, (bool, Integral)) and value in (False, True))
a_seed = whole(0, 2**63 - 1)
a_name = Rule("a name", lambda value: bool(value) and (isinstance(value, str) or _is_number(value)))
names = several("a list of at least one name", a_name, fewest=1)
nothing = Rule("null", lambda value: value is None)

# ---- the hyper-parameters of the bundles' configs, of `Federation` and of `Comparison` ------------------------------

RULES: dict[str, Rule] = {
    # data
    "sites": either(nothing, a_name, names),
    "outside_sites": several("a list of names, or an empty one", a_name),
    "role": word("inside", "outside", "virtual"),
    "roles": either(word("inside", "outside"), several("a list of them", word("inside", "outside"), fewest=1)),
    "split": word("train", "validation", "test", "all"),
    "split_seed": a_seed,
    "fractions": Rule("three shares (train, validation, test) that sum to 1, the first above 0", _are_fractions),
    "fold": whole(0),
    "folds": whole(1),
    "patient": Rule("'auto', a table FILE.csv, or a pattern with a group, such as (.*)_(OD|OS)", is_patient_setting),
    "image_size": whole(16, 2048),
    "field_of_view": number(0, 2000),
    **dict.fromkeys(("normalise", "match_manifest", "soft_labels", "augment"), switch),
    # network and machine
    "features": either(whole(1, 256), several("six such for the network's stages, at most 4096", whole(1, 4096), 6, 6)),
    "slices": Rule("an odd whole number from 1 to 99", lambda value: whole(1, 99).holds(value) and value % 2 == 1),
    "device": Rule("a device that this machine has, such as 'cpu' or 'cuda:0'", _works),
    **dict.fromkeys(("amp", "bf16", "recompute", "deterministic"), switch),
    "num_workers": whole(0, 256),
    "batch_size": whole(1),
    # training
    "seed": a_seed,
    "seeds": several("a list of at least one whole number from 0", a_seed, fewest=1),
    **dict.fromkeys(("rounds", "local_epochs", "epochs", "passes", "slices_per_case"), whole(1)),
    "start_epoch": whole(0),
    "learning_rate": number(0, above=True),
    "tail": number(0, 1),
    "tail_rate": number(0, 1),
    "alpha": number(0, 1, below=True),
    "norm_statistics": word("batch", "global", "blend"),
    "norm_start": number(0, 1),
    "local_norms": switch,
    "proximal": number(0),
    "ditto": number(0),
    "val_interval": whole(0),
    **dict.fromkeys(("personalised_metrics", "save_checkpoints", "tensorboard", "verbose"), switch),
    # federation and comparison
    "min_sites": whole(0),
    "max_update_norm": number(0),
    "initial_model": Rule("the path of a model file, or empty", lambda value: isinstance(value, str)),
    "server_momentum": number(0, 1, below=True),
    "averaging": word("mean", "equal_mean", "median", "trimmed_mean"),
    "site_timeout": number(0),
    "own_rounds": whole(0),
    "shares": several("a list of numbers from 0 to 1", number(0, 1)),
    "fine_tuning": whole(0),
    **dict.fromkeys(("resume", "overwrite", "publish", "labelled"), switch),
    "level": number(0.5, 1, below=True),
    # inference
    "mode": word("episodic", "site", "off"),
    "preset": word("default", "paper", "soup", "adapted", "self_trained"),
    **dict.fromkeys(("one_component", "smooth_outlines", "overlays"), switch),
    **dict.fromkeys(("second_look", "target_size"), number(0, 1)),
    "empty_masks": word("fail", "allow"),
    "output_format": Rule(f"one or several of {', '.join(FORMATS)}", _are_formats),
}
