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
"""The manifest of a folder of models: the architecture of the models and, once published, checksums and terms of use.

Training writes the architecture to ``manifest.json`` beside the models (see `architecture`); publishing adds terms,
figures and checksums. Whenever a file of a published set is read, the size and SHA-256 of the same bytes are compared
with the manifest. Files of other folders are read without this check.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shared_iopfl import __version__
from shared_iopfl.utils import checks
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import check_site
from shared_iopfl.utils.reading import parse_json, read_bounded
from shared_iopfl.utils.tables import write_json

MANIFEST = "manifest.json"
SCORES = "scores.json"
CALIBRATION = "calibration.json"
FORMAT = 1
LIMIT = 4 * 2**30  # largest size of a file in bytes, far above that of any network here
# files of the global model and of experts; model_final.pt is MONAI FL's name for the last global model
MODEL_FILE = re.compile(r"model(?:_(?!final\.pt)(.+))?\.pt")
PUBLISHED = {"sites": list, "terms": str, "files": dict}  # entries that publishing adds, with their types
AGAIN = "download the models again, or publish them anew."
T = TypeVar("T")


def is_published(name: str) -> bool:
    """Whether a file of this name is part of a published set."""
    return bool(MODEL_FILE.fullmatch(name)) or name in (SCORES, CALIBRATION)


def plain_name(name: str) -> str:
    """Return the name of a file in a folder, or raise `InputError` if it leads out of the folder."""
    if not name or name != os.path.basename(name) or name in (".", "..") or set(name) & set("/\\\0"):
        raise InputError(
            f"{name!r} is not a plain name: give the name of a file in the folder of the models, without a path."
        )
    return name


def write_manifest(
    models_dir: str | os.PathLike,
    architecture: Mapping[str, Any],
    terms: str,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write ``manifest.json`` for the models and scores in a folder.

    Args:
        models_dir: Folder of the models.
        architecture: Resolved ``network_def`` and settings such as ``features``, ``image_size``, ``slices``.
        terms: Terms of use in one line, as the training data require them.
        metrics: Scores of the models, in any form that JSON can express.
        training: Settings of the training.
        versions: Versions of the packages in the training.

    Returns:
        The manifest.

    Raises:
        InputError: If there is no global model, or a model file is a link that leads out of the folder.
    """
    if not isinstance(terms, str) or not terms.strip() or "\n" in terms.strip():
        raise InputError(
            f"the terms must be one line of text that states the permitted use of the models, but are {terms!r}."
        )
    folder = Path(models_dir)
    names = sorted(path.name for path in folder.glob("*") if is_published(path.name))
    if "model.pt" not in names:
        raise InputError(f"no global model to publish in {folder}: add model.pt.")
    manifest = {
        "format": FORMAT,
        "terms": terms.strip(),
        "sites": sorted(site for name in names if (site := _role(name).get("site"))),
        "architecture": dict(architecture),
        "metrics": dict(metrics or {}),
        "training": dict(training or {}),
        "versions": {**(versions or {}), "shared_iopfl": __version__},
        "files": {name: {**_role(name), **_fingerprint(_read(folder / name))} for name in names},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(models_dir: str | os.PathLike) -> dict[str, Any] | None:
    """Read the manifest of a folder.

    Args:
        models_dir: Folder of the models.

    Returns:
        The manifest, or None if there is none.

    Raises:
        InputError: If it cannot be read, or is not a manifest of a known format.
    """
    path = Path(models_dir) / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        manifest = parse_json(_read(path, limit=2**24), path)
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT}")
        kinds = {"architecture": dict, **(PUBLISHED if not PUBLISHED.keys().isdisjoint(manifest) else {})}
        for name, kind in kinds.items():
            if not isinstance(manifest[name], kind):
                raise ValueError(f"its {name} should be a {kind.__name__}")
        for name, entry in manifest.get("files", {}).items():
            plain_name(name)
            if site := _role(name).get("site"):
                check_site(site)
            if not entry.get("released") and not (isinstance(entry["size"], int) and isinstance(entry["sha256"], str)):
                raise ValueError(f"{name} has no size and sha256")
    except InputError as error:
        raise InputError(f"cannot trust {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"cannot read {path}: {reason[:160]}; download or publish the models again.") from error
    return manifest


def published_files(models_dir: str | os.PathLike) -> dict[str, Any] | None:
    """Return the files that the manifest of a folder lists, name -> entry; None if the set was not published.

    Args:
        models_dir: Folder of the models.

    Raises:
        InputError: As for :func:`read_manifest`.
    """
    return (read_manifest(models_dir) or {}).get("files")


def read_checked(path: str | os.PathLike) -> bytes | None:
    """Read a file in a folder of models, and compare it with the manifest if there is one.

    Args:
        path: Path of the file.

    Returns:
        The bytes that were compared; None if the file does not exist and is not listed.

    Raises:
        InputError: If the file is larger than `LIMIT`, is a link that leads out of its folder, differs from the
            manifest, is listed but missing, or is a model that the manifest does not list.
    """
    path = Path(path)
    files = published_files(path.parent)
    entry = files.get(path.name) if files is not None else None
    if not path.is_file():
        if entry is not None and not entry.get("released"):
            raise InputError(f"{path} is missing, but {MANIFEST} lists it; {AGAIN}")
        return None
    if entry is None and files is not None and MODEL_FILE.fullmatch(path.name):
        raise InputError(f"{path} is not in {MANIFEST} beside it: move it away, or publish it with the others.")
    if entry is None or entry.get("released"):
        return _read(path)
    expected = {"size": entry["size"], "sha256": entry["sha256"]}
    if (size := path.stat().st_size) != expected["size"]:  # before the whole file is read
        what = "cut short" if size < expected["size"] else "longer than the published file"
        raise InputError(f"{path} is {what}: it has {size} bytes, and {expected['size']} in {MANIFEST}; {AGAIN}")
    content = _read(path)
    if _fingerprint(content) != expected:
        raise InputError(f"{path} was changed: its SHA-256 is not that in {MANIFEST}; {AGAIN}")
    return content


def check_manifest(models_dir: str | os.PathLike) -> dict[str, Any]:
    """Compare all files of a published set with its manifest.

    Args:
        models_dir: Folder of the models.

    Returns:
        The manifest.

    Raises:
        InputError: As for :func:`read_checked`, for the first faulty file; also if there is no manifest.
    """
    manifest = read_manifest(models_dir)
    if manifest is None:
        raise InputError(f"no {MANIFEST} in {models_dir}: these models were not published.")
    if "files" not in manifest:
        raise InputError(f"{Path(models_dir) / MANIFEST} has no checksums: these models were not published.")
    folder = Path(models_dir)
    for name in sorted({*manifest["files"], *(p.name for p in folder.glob("*.pt") if MODEL_FILE.fullmatch(p.name))}):
        read_checked(folder / name)
    return manifest


def setting(models_dir: str | os.PathLike, name: str, default: T) -> T:
    """Return a setting of the architecture from the manifest of a folder, so that published models need no settings.

    Args:
        models_dir: Folder of the models.
        name: Name of the setting, such as ``features``.
        default: Value without a manifest, or if the manifest does not contain the setting.

    Raises:
        InputError: If the value in the manifest is not allowed (see `checks.RULES`) or differs in type from the
            default; instead of a text, a dictionary with one text per site is allowed.
    """
    value = ((read_manifest(models_dir) or {}).get("architecture") or {}).get(name, default)
    kinds = (str, dict) if isinstance(default, str) else type(default)
    if name not in checks.RULES and not isinstance(value, kinds):
        path = Path(models_dir) / MANIFEST
        raise InputError(f"{path} has {name} {value!r:.80}, which must be a value like {default!r:.40}; {AGAIN}")
    return check_setting(name, value, Path(models_dir) / MANIFEST)


def check_setting(name: str, value: T, path: str | os.PathLike) -> T:
    """Return the value of a setting that was read from a file, if it is allowed.

    Args:
        name: Name of the setting, such as ``features``.
        value: Value in the file.
        path: Path of the file, for the message.

    Raises:
        InputError: If `checks.RULES` does not allow the value.
    """
    rule = checks.RULES.get(name)
    if rule is not None and not rule.holds(value):
        raise InputError(f"{path} has {name} {value!r:.80}, which must be {rule.allowed}; {AGAIN}")
    return value


def release(models_dir: str | os.PathLike, names: Iterable[str]) -> None:
    """Allow training to replace some models of a published set.

    From then on these files may be missing or different; the other files and the architecture are still compared with
    the manifest. Without a manifest nothing is done.

    Args:
        models_dir: Folder of the models.
        names: Names of the files, whether published or not.
    """
    manifest = read_manifest(models_dir)
    released = {plain_name(name): {**_role(name), "released": True} for name in names}
    if manifest is None or "files" not in manifest:
        return
    if all(manifest["files"].get(name) == entry for name, entry in released.items()):
        return
    manifest["files"].update(released)
    write_json(Path(models_dir) / MANIFEST, manifest)


def _role(name: str) -> dict[str, str]:
    model = MODEL_FILE.fullmatch(name)
    if model is None:
        return {"role": Path(name).stem}
    return {"role": "personalised", "site": model[1]} if model[1] else {"role": "global"}


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read(path: Path, limit: int = LIMIT) -> bytes:
    """The bytes of a file that is not too large and not a link to another folder."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        raise InputError(f"{path} is a link that leads out of its folder: put the file itself there.")
    return read_bounded(path, limit)
