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
"""Where a site's cases are, and which of them train, validate and test.

What lies in ``dataset_dir`` tells the layout, site by site:

1. ``SITE.json``: a MONAI datalist, its paths relative to ``dataset_dir``; goes before a folder of the same name.
2. ``SITE/images/NAME.png`` and ``SITE/masks/NAME.png``.
3. ``SITE/{train,test}/ROIs/{image,mask}/NAME.png``: the public four-domain fundus set (DoFE).
4. ``SITE/NAME.nii.gz`` and ``SITE/NAME_segmentation.nii.gz``: the public six-site prostate set (SAML).

A case is ``{"image", "label", "site", "case", "patient"}``, all strings. Scans are never opened here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from shared_iopfl.errors import InputError

__all__ = [
    "case_name",
    "file_ending",
    "find_cases",
    "find_scans",
    "fingerprint",
    "is_dicom",
    "list_sites",
    "site_cases",
    "split_cases",
]

Case = dict[str, str]

VOLUMES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK = "_segmentation"  # compared without regard to case: the public sets write it both ways
MASK_FOLDERS = ("mask", "masks")
PARTS = ("train", "validation", "test")
DATALIST_KEYS = {"training": "train", "validation": "validation", "test": "test", "testing": "test"}
FRACTIONS = (0.6, 0.15, 0.25)


# ---- sites and their cases ------------------------------------------------------------------------------------------


def list_sites(dataset_dir: str | Path) -> list[str]:
    """The names of the sites in a folder, sorted.

    Raises:
        InputError: when there is no such folder, or it holds no site.
    """
    sites = _known_sites(Path(dataset_dir))
    if not sites:
        raise InputError(
            f"no sites in {dataset_dir}: expected a folder of scans and masks, or a SITE.json, for each site"
        )
    return sites


def find_cases(dataset_dir: str | Path, site: str) -> list[Case]:
    """All labelled cases of a site, sorted by case name.

    Raises:
        InputError: for an unknown site, one without cases, an image without its mask or a mask without its image.
    """
    return _sorted(case for part in _official(Path(dataset_dir), site).values() for case in part)


def site_cases(
    dataset_dir: str | Path, site: str, split: str, seed: int = 0, fractions: Sequence[float] = FRACTIONS
) -> list[Case]:
    """The cases of one part of a site: what a bundle's config asks for.

    A published split (the lists of a datalist, the train and test folders of the fundus set) is kept; a part it lacks
    is taken from its training cases, by patient, as `split_cases` does.

    Args:
        dataset_dir: folder of the sites.
        site: name of the site.
        split: ``"train"``, ``"validation"``, ``"test"``, or ``"all"``, which also serves an outside site.
        seed: another seed, another split.
        fractions: how much of the patients to train, validate and test on; they sum to 1.

    Raises:
        InputError: as `find_cases`, and when there are too few patients to split or the part holds no case.
    """
    if split not in (*PARTS, "all"):
        raise InputError(f"unknown split {split!r}: choose train, validation, test or all")
    if split == "all":
        return find_cases(dataset_dir, site)
    official = _official(Path(dataset_dir), site)
    shares = dict(zip(PARTS, _checked(fractions)))
    lacking = [part for part in PARTS if not official[part]]
    if official["train"] and (split == "train" or split in lacking):
        parts = {part: shares[part] for part in ("train", *lacking)}
        official.update(_split(official["train"], parts, seed, f"{dataset_dir}/{site}"))
    if not official[split]:
        raise InputError(f"no {split} cases in {dataset_dir}/{site}: its list is empty or its fraction is 0")
    return _sorted(official[split])


def split_cases(cases: Sequence[Case], seed: int = 0, fractions: Sequence[float] = FRACTIONS) -> dict[str, list[Case]]:
    """Split cases by patient into ``"train"``, ``"validation"`` and ``"test"``.

    A patient's part depends on a hash of seed and patient alone, so a patient stays where it is when cases are added.
    With few patients the parts can be uneven. A part that would be empty takes the patient nearest to its interval from
    the largest part: the one thing that can move a patient when cases are added.

    Args:
        cases: cases of one site, as `find_cases` returns them.
        seed: another seed, another split.
        fractions: how much of the patients to train, validate and test on; they sum to 1, and a 0 leaves a part empty.

    Raises:
        InputError: when there are fewer patients than parts.
    """
    where = f"site {cases[0].get('site', '?')}" if cases else "an empty list"
    return _split(cases, dict(zip(PARTS, _checked(fractions))), seed, where)


def _split(cases: Sequence[Case], shares: dict[str, float], seed: int, where: str) -> dict[str, list[Case]]:
    """Split by patient into the parts named in ``shares``, which are scaled to sum to 1."""
    position = {case["patient"]: _position(seed, case["patient"]) for case in cases}
    wanted = [part for part, share in shares.items() if share > 0]
    if len(position) < len(wanted):
        verbs = {"train": "train", "validation": "validate", "test": "test"}
        *first, last = (verbs[part] for part in wanted)
        each = f" (one each to {', '.join(first)} and {last})" if first else ""
        raise InputError(f"needs at least {len(wanted)} cases{each}, found {len(position)} in {where}")

    intervals, low = {}, 0.0
    for part in wanted:
        high = low + shares[part] / sum(shares.values())
        intervals[part] = (low, high if part != wanted[-1] else 1.0)
        low = high
    members = {
        part: {patient for patient, at in position.items() if low <= at < high}
        for part, (low, high) in intervals.items()
    }
    for part, (low, high) in intervals.items():
        if not members[part]:
            largest = max(members.values(), key=len)
            nearest = min(largest, key=lambda name: (max(low - position[name], position[name] - high), name))
            largest.remove(nearest)
            members[part].add(nearest)
    return {part: _sorted(case for case in cases if case["patient"] in members.get(part, ())) for part in shares}


def _position(seed: int, patient: str) -> float:
    """A patient's place in [0, 1); 48 bits, so that the quotient is exact."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:6], "big") / 2**48


def _checked(fractions: Sequence[float]) -> Sequence[float]:
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(f"fractions are three shares (train, validation, test) that sum to 1, but are {fractions}")
    return fractions


def _sorted(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: case["case"])


def _known_sites(root: Path) -> list[str]:
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; set dataset_dir to the folder that holds the sites")
    lists = {entry.stem for entry in _entries(root) if entry.suffix == ".json" and _is_datalist(entry)}
    folders = {entry.name for entry in _entries(root) if entry.is_dir() and _is_site_folder(entry)}
    return sorted(lists | folders)


def _is_datalist(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # listed, so that whoever asks for the site hears what is wrong with it
    return isinstance(content, dict) and not DATALIST_KEYS.keys().isdisjoint(content)


def _is_site_folder(folder: Path) -> bool:
    if (folder / "images").is_dir() or any((folder / part / "ROIs").is_dir() for part in ("train", "test")):
        return True
    return any(file_ending(entry) in VOLUMES and entry.is_file() for entry in _entries(folder))


def _official(root: Path, site: str) -> dict[str, list[Case]]:
    """A site's labelled cases by published part; all in ``"train"`` where no split is published."""
    known = _known_sites(root)
    if site not in known:
        what = "holds no cases" if site and (root / str(site)).is_dir() else "is not known"
        raise InputError(f"site {site!r} {what} in {root}; sites there: {', '.join(known) or 'none'}")
    folder, datalist = root / site, root / f"{site}.json"
    patients: dict[Path, str] = {}
    if datalist.is_file():
        pairs, patients = _read_datalist(datalist, root)
    elif (folder / "images").is_dir():
        pairs = {"train": _pair(folder / "images", folder / "masks")}
    elif any((folder / part / "ROIs").is_dir() for part in ("train", "test")):
        published = [folder / part / "ROIs" for part in ("train", "test") if (folder / part / "ROIs").is_dir()]
        pairs = {rois.parent.name: _pair(rois / "image", rois / "mask") for rois in published}
    else:
        pairs = {"train": _pair(folder, folder)}

    names = _unique_names([image for part in pairs.values() for image, _ in part], root)
    official: dict[str, list[Case]] = {part: [] for part in PARTS}
    patient_parts: dict[str, str] = {}
    for part, found in pairs.items():
        for image, label in found:
            patient = patients.get(image, names[image])
            if patient_parts.setdefault(patient, part) != part:
                raise InputError(
                    f"patient {patient!r} of {folder} is in two lists: {patient_parts[patient]} and {part}"
                )
            official[part].append(
                {"image": str(image), "label": str(label), "site": site, "case": names[image], "patient": patient}
            )
    if not any(official.values()):
        raise InputError(f"site {site!r} holds no labelled cases in {root}; sites there: {', '.join(known)}")
    return official


# ---- the layouts ----------------------------------------------------------------------------------------------------


def _pair(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Images with their masks: the same name in two folders, or the ending ``_segmentation`` in one."""
    suffix = MASK if images == masks else ""
    endings = VOLUMES if images == masks else VOLUMES + PICTURES
    image_of: dict[str, Path] = {}
    mask_of: dict[str, Path] = {}
    for folder in (images,) if images == masks else (images, masks):
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}; images need their masks")
        for entry in _entries(folder):
            if file_ending(entry) not in endings or not entry.is_file():
                continue
            name, found = case_name(entry), image_of
            if folder == masks and name.lower().endswith(suffix):
                name, found = name[: len(name) - len(suffix)], mask_of
            if name in found:
                raise InputError(f"two files for one case in {folder}: {found[name].name} and {entry.name}; keep one")
            found[name] = entry
    unpaired = sorted(image_of.keys() ^ mask_of.keys())
    if unpaired:
        name, more = unpaired[0], f" (and {len(unpaired) - 1} more like it)" if len(unpaired) > 1 else ""
        if name in image_of:
            expected = masks / f"{name}{suffix}{_suffix(image_of[name])}"
            raise InputError(f"{image_of[name]} has no mask: expected {expected}{more}")
        expected = images / f"{name}{_suffix(mask_of[name])}"
        raise InputError(f"{mask_of[name]} is a mask without its image: expected {expected}{more}")
    return [(image_of[name], mask_of[name]) for name in sorted(image_of)]


def _read_datalist(path: Path, root: Path) -> tuple[dict[str, list[tuple[Path, Path]]], dict[Path, str]]:
    """The labelled items of a datalist by part, and the patients it names.

    A validation or test list without any label, as public challenges have it, cannot score anything and is left out.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a JSON datalist: {error}") from error
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    patients: dict[Path, str] = {}
    for key, part in DATALIST_KEYS.items():
        items = content.get(key) or []
        if not isinstance(items, list):
            raise InputError(f"{path}: {key!r} must be a list of items, but is {type(items).__name__}")
        if part != "train" and not any(isinstance(item, dict) and item.get("label") for item in items):
            continue
        for number, item in enumerate(items):
            where = f"{path}: item {number} of {key!r}"
            if not isinstance(item, dict) or not all(
                isinstance(item.get(k), str) and item[k] for k in ("image", "label")
            ):
                raise InputError(f"{where} must have an image and a label, each one path, but is {item}")
            image, label = (_inside(root, item[k], where) for k in ("image", "label"))
            if image in patients:
                raise InputError(f"{where} repeats {item['image']}: list each image once")
            pairs.setdefault(part, []).append((image, label))
            # not the case name: that changes when another folder's file turns out to be called the same
            patients[image] = str(item.get("patient") or _path_name(image, root))
    return pairs, patients


def _inside(root: Path, path: str, where: str) -> Path:
    full = root / path
    if not full.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{where} points outside {root}: {path}; keep a site's files below dataset_dir")
    if not full.exists():
        raise InputError(f"{where} names a file that is not there: {full}")
    return full


# ---- scans without masks --------------------------------------------------------------------------------------------


def find_scans(path: str | Path) -> list[Case]:
    """The scans to segment, as ``{"image", "case"}``, sorted by path.

    Args:
        path: one scan (NIfTI, MHA, MHD, NRRD, a picture, a DICOM file), or a folder. Of a folder count the scans in it
            and in folders named ``image`` or ``images`` below it, and every folder below it that holds DICOM files,
            which is one scan. Masks (``NAME_segmentation``, folders ``mask`` and ``masks``) and hidden files do not.

    Raises:
        InputError: when there is nothing at ``path``, or nothing that can be read as a scan.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"no such file or folder: {root}")
    found = sorted(_scans_below(root, all_kinds=True)) if root.is_dir() else [root]
    if not found or (root.is_file() and not file_ending(root) and not is_dicom(root)):
        kinds = f"DICOM or {', '.join(ending[1:] for ending in VOLUMES + PICTURES)}"
        raise InputError(f"no scan at {root}: expected {kinds}")
    names = _unique_names(found, root if root.is_dir() else root.parent)
    return [{"image": str(scan), "case": names[scan]} for scan in found]


def _scans_below(folder: Path, all_kinds: bool) -> Iterator[Path]:
    holds_dicom = False
    for entry in _entries(folder):
        if entry.is_dir():
            is_loop = entry.is_symlink() and folder.resolve().is_relative_to(entry.resolve())
            if entry.name.lower() not in MASK_FOLDERS and not is_loop:
                yield from _scans_below(entry, all_kinds=entry.name.lower() in ("image", "images"))
        elif is_dicom(entry):
            holds_dicom = True
        elif all_kinds and file_ending(entry) and not case_name(entry).lower().endswith(MASK):
            yield entry
    if holds_dicom:
        yield folder


def is_dicom(path: Path) -> bool:
    """By its name, or by the letters DICM at byte 128 where the name says nothing, as scanners and archives have it."""
    if file_ending(path) or path.name.upper() == "DICOMDIR":
        return file_ending(path) == ".dcm"
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


# ---- names ----------------------------------------------------------------------------------------------------------


def case_name(path: str | Path) -> str:
    """A scan's file name without its ending: ``Case03`` of ``BIDMC/Case03.nii.gz``; a series' folder name."""
    name = Path(path).name or Path(path).resolve().name
    return name[: len(name) - len(file_ending(name))]


def fingerprint(cases: Sequence[Case]) -> str:
    """SHA-256 over the sorted names and sizes of the cases' files: which data a run saw, without reading it.

    Raises:
        InputError: when a file is gone.
    """
    lines = []
    for case in cases:
        for key in ("image", "label"):
            if key in case:
                path = Path(case[key])
                try:
                    sizes = [(file.name, file.stat().st_size) for file in (_entries(path) if path.is_dir() else [path])]
                except OSError as error:
                    raise InputError(f"{path} cannot be read: {error.strerror}") from error
                lines.append(json.dumps([case.get("site"), case["case"], key, sizes]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def file_ending(path: str | Path) -> str:
    """The ending that tells a scan's format, in lower case (``.nii.gz``, ``.png``, ``.dcm``), or ``""``."""
    name = Path(path).name.lower()
    return next((ending for ending in (*VOLUMES, *PICTURES, ".dcm") if name.endswith(ending)), "")


def _suffix(path: Path) -> str:
    return path.name[len(case_name(path)) :]


def _path_name(path: Path, root: Path) -> str:
    relative = path.relative_to(root)
    return relative.with_name(case_name(path)).as_posix() if relative.name else case_name(path)


def _unique_names(paths: Sequence[Path], root: Path) -> dict[Path, str]:
    """A name for each path: its own, or where several share it, its way down from ``root`` and its ending."""
    count = Counter(case_name(path) for path in paths)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name = case_name(path)
        if count[name] > 1:
            name = "_".join(path.relative_to(root).parts or (name,)).replace(".", "_")
        base, number = name, 2
        while name in taken or (name != case_name(path) and name in count):
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        names[path] = name
    return names


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files (``._Case00.nii.gz`` on disks that a Mac has touched)."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
