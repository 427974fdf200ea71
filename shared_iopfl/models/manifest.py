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
"""The manifest of a folder of models: what they were trained with and, once published, checksums and terms.

``manifest.json`` is beside the models. Training writes the architecture (see `architecture`); publishing adds terms,
figures and checksums. The size and SHA-256 of each file of a published set are checked when it is read, on the same
bytes that are then used. Folders that were not published are read without such checks.
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
# largest file, in bytes: far more than any network of this kind needs, and less than the memory of a machine
LIMIT = 4 * 2**30
# what is loaded as the global model or as an expert; model_final.pt is MONAI FL's name for the last global model
MODEL_FILE = re.compile(r"model(?:_(?!final\.pt)(.+))?\.pt")
# what publishing adds
PUBLISHED = {"sites": list, "terms": str, "files": dict}
AGAIN = "download the models again, or publish them anew."
T = TypeVar("T")


def is_published(name: str) -> bool:
    """Whether a file of this name is part of a published set."""
    return bool(MODEL_FILE.fullmatch(name)) or name in (SCORES, CALIBRATION)


def plain_name(name: str) -> str:
    """The name, or `InputError` where it would lead out of the folder it is looked up in."""
    if not name or name != os.path.basename(name) or name in (".", "..") or set(name) & set("/\\\0"):
        raise InputError(
            f"{name!r} is not a plain name: it must not be a path, as it names a file in the models' folder."
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
    """Write ``manifest.json`` over the models and scores that lie in a folder.

    Args:
        models_dir: the folder.
        architecture: ``network_def`` as resolved, and what else a run needs: ``features``, ``image_size``, ``slices``.
        terms: one line: what the models may be used for, as far as the data they were trained on say.
        metrics: how the models do, in any shape that JSON knows.
        training: the settings they were trained with.
        versions: of the packages they were trained with.

    Returns:
        The manifest.

    Raises:
        InputError: where there is no global model, or a model file is a link that leads out of the folder.
    """
    if not isinstance(terms, str) or not terms.strip() or "\n" in terms.strip():
        raise InputError(
            f"the terms must be one line of text that says what the models may be used for, not {terms!r}."
        )
    folder = Path(models_dir)
    names = sorted(path.name for path in folder.glob("*") if is_published(path.name))
    if "model.pt" not in names:
        raise InputError(f"no global model to publish in {folder}: a set needs model.pt.")
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
    """The manifest of a folder, or None where there is none.

    Raises:
        InputError: where it cannot be read, or is not a manifest that this version knows.
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
    """What the manifest of a folder lists, file -> entry; None where the set was not published.

    Raises:
        InputError: as :func:`read_manifest`.
    """
    return (read_manifest(models_dir) or {}).get("files")


def read_checked(path: str | os.PathLike) -> bytes | None:
    """The content of a file of a models' folder, checked against the manifest beside it if there is one.

    Returns:
        The bytes that were checked; None where there is no such file and none is listed.

    Raises:
        InputError: in one line, where the file is larger than `LIMIT`, is a link that leads out of its folder, differs
            from what the manifest says, is listed but missing, or is a model that the manifest does not list.
    """
    path = Path(path)
    files = published_files(path.parent)
    entry = files.get(path.name) if files is not None else None
    if not path.is_file():
        if entry is not None and not entry.get("released"):
            raise InputError(f"{path} is missing: {MANIFEST} lists it; {AGAIN}")
        return None
    if entry is None and files is not None and MODEL_FILE.fullmatch(path.name):
        raise InputError(f"{path} is not in {MANIFEST} beside it: take it away, or publish it with the others.")
    if entry is None or entry.get("released"):
        return _read(path)
    _check_size(path, entry["size"])
    content = _read(path)
    if _fingerprint(content) != {"size": entry["size"], "sha256": entry["sha256"]}:
        raise InputError(f"{path} was changed: its SHA-256 is not the one in {MANIFEST}; {AGAIN}")
    return content


def check_manifest(models_dir: str | os.PathLike) -> dict[str, Any]:
    """Check a whole published set against its manifest.

    Returns:
        The manifest.

    Raises:
        InputError: as :func:`read_checked`, for the first file that is wrong; also where there is no manifest.
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
    """A setting of the architecture as the folder's manifest has it, so that published models run as they are.

    Args:
        models_dir: the folder.
        name: such as ``features``.
        default: where there is no manifest, or it does not say.

    Raises:
        InputError: where the manifest has a value that the setting may not have (see `checks.RULES`), or of another
            type than the default; text may also be a dictionary, one text a site.
    """
    value = ((read_manifest(models_dir) or {}).get("architecture") or {}).get(name, default)
    kinds = (str, dict) if isinstance(default, str) else type(default)
    if name not in checks.RULES and not isinstance(value, kinds):
        path = Path(models_dir) / MANIFEST
        raise InputError(f"{path} has {name} {value!r:.80}, not such a value as {default!r:.40}; {AGAIN}")
    return check_setting(name, value, Path(models_dir) / MANIFEST)


def check_setting(name: str, value: T, path: str | os.PathLike) -> T:
    """The value of a setting as a file has it, if it is one that the setting may have.

    Args:
        name: such as ``features``.
        value: what the file has.
        path: of that file, for the message.

    Raises:
        InputError: for a value that `checks.RULES` does not allow.
    """
    rule = checks.RULES.get(name)
    if rule is not None and not rule.holds(value):
        raise InputError(f"{path} has {name} {value!r:.80}, not {rule.allowed}; {AGAIN}")
    return value


def release(models_dir: str | os.PathLike, names: Iterable[str]) -> None:
    """Let training replace some models of a published set.

    From then on these files are not checked against the manifest, and may be missing. The other files still are, and
    the architecture stays. Without a manifest nothing is done.

    Args:
        models_dir: the folder.
        names: of the files, whether they were published or not.
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


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size
    if found != size:
        what = "cut short" if found < size else "longer than it was"
        raise InputError(f"{path} is {what}: {found} bytes, {size} in {MANIFEST}; {AGAIN}")


def _read(path: Path, limit: int = LIMIT) -> bytes:
    """The bytes of a file that is in its folder, not a link to another one, and is not too large."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        raise InputError(f"{path} is a link that leads out of its folder: put the file itself there.")
    return read_bounded(path, limit)
