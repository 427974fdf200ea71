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
"""Layouts of a site's folder: the public data sets as they are unpacked, or a MONAI datalist.

The layout of each site is recognised from the content of ``dataset_dir``:

1. ``SITE.json``: a MONAI datalist, its paths relative to ``dataset_dir``. It takes precedence over a folder of the same
   name. The folders that it names hold its cases, and are not sites of their own.
2. ``SITE/images/NAME.png`` and ``SITE/masks/NAME.png``.
3. ``SITE/{train,test}/ROIs/{image,mask}/NAME.png``: the public four-domain fundus set (DoFE).
4. ``SITE/NAME.nii.gz`` and ``SITE/NAME_segmentation.nii.gz``: the public six-site prostate set (SAML), and PROMISE12
   with ``.mhd`` and ``.raw``.
5. ``SITE/imagesTr`` and ``SITE/labelsTr``, ``SITE/image`` and ``SITE/mask``, and so on (`PAIRED`), also below
   ``SITE/left`` and ``SITE/right``: the Medical Segmentation Decathlon, nnU-Net (``NAME_0000.nii.gz``) and others.
6. ``SITE/CASE/t2.nii.gz`` and ``SITE/CASE/t2_anatomy_reader1.nii.gz``: a folder for each case, as Prostate158 has it.
7. ``SITE/sub-01/**/NAME_T2w.nii.gz`` and ``SITE/derivatives/**/sub-01/**/NAME_dseg.nii.gz``: BIDS.
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

from shared_iopfl.data.patients import AUTO, datalist_patient, patients_of
from shared_iopfl.data.scan_files import Case, entries, unique_names
from shared_iopfl.data.scan_names import MASK, PICTURES, VOLUMES, case_name, file_ending
from shared_iopfl.data.volumes.dicom_headers import patient_id
from shared_iopfl.utils.errors import InputError, warn_once
from shared_iopfl.utils.names import check_site
from shared_iopfl.utils.reading import read_json

PARTS = ("train", "validation", "test")
# folders of images and of masks, the first that are there; and folders that they may lie in
PAIRED = (
    *(("images", "masks"), ("image", "mask"), ("images", "labels"), ("image", "label")),
    *(("imagesTr", "labelsTr"), ("images", "mask"), ("image", "masks")),
)
SIDES = ("left", "right")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's names of images
IMAGE_NAMES = ("t2", "t2w", "image", "img", "scan", "volume")  # in a folder of one case, the first that is there
CASE_MASK = re.compile(r"(?:.*_)?(?:anatomy|seg|segmentation|mask|label|gt)(?:_reader1)?", re.IGNORECASE)
BIDS_MASK = re.compile(r"(?P<case>sub-[^_]+(?:_ses-[^_]+)?)(?:_.+)?_(?:dseg|mask|seg|label)", re.IGNORECASE)
DATALIST_KEYS = {"training": "train", "validation": "validation", "test": "test", "testing": "test"}


def known_sites(root: Path) -> list[str]:
    """The names of the sites in a folder, sorted; there may be none."""
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; set dataset_dir to the folder that holds the sites")
    lists = [entry for entry in entries(root) if entry.suffix == ".json" and _is_datalist(entry)]
    listed = set().union(*map(_listed_folders, lists))
    folders = {entry.name for entry in entries(root) if entry.is_dir() and _is_site_folder(entry)}
    return sorted({entry.stem for entry in lists} | (folders - listed))


def _listed_folders(datalist: Path) -> set[str]:
    """The folders whose files a datalist names: they hold the list's cases, and are not sites of their own."""
    try:
        content = read_json(datalist)
    except InputError:
        return set()
    items = [item for key in DATALIST_KEYS for item in _items(content.get(key)) if isinstance(item, dict)]
    paths = [item[key] for item in items for key in ("image", "label") if isinstance(item.get(key), str)]
    parts = (PureWindowsPath(path).parts for path in paths)  # which takes both kinds of separators
    return {part[0] for part in parts if len(part) > 1}


def _items(listed: Any) -> list[Any]:
    return listed if isinstance(listed, list) else []


def _is_there(datalist: Path) -> bool:
    """Whether there is a datalist, or something of its name that cannot be read, such as a pipe."""
    return datalist.exists() and not datalist.is_dir()


def _is_datalist(path: Path) -> bool:
    if not _is_there(path):
        return False
    try:
        content = read_json(path)
    except InputError:
        return True  # listed, so that reading the site reports the error
    return isinstance(content, dict) and not DATALIST_KEYS.keys().isdisjoint(content)


def _is_site_folder(folder: Path) -> bool:
    if _paired_folders(folder) or any((folder / part / "ROIs").is_dir() for part in ("train", "test")):
        return True
    if any(file_ending(entry) in VOLUMES and entry.is_file() for entry in entries(folder)):
        return True
    return bool(_case_folders(folder) or _bids_pairs(folder))


def _paired_folders(folder: Path) -> list[tuple[Path, Path]]:
    """A site's folders of images with those of their masks; "images" needs no folder beside it to be one."""
    found = []
    for place in (folder, *(folder / side for side in SIDES)):
        there = [(place / images, place / masks) for images, masks in PAIRED if (place / images).is_dir()]
        whole = [pair for pair in there if pair[1].is_dir()] or [pair for pair in there if pair[0].name == "images"]
        found += whole[:1]
    return found


def _case_folders(site: Path) -> list[tuple[Path, Path]]:
    """An image and its mask from each folder of one case; none where no folder is like that."""
    pairs = []
    for folder in (entry for entry in entries(site) if entry.is_dir()):
        volumes = {case_name(entry).lower(): entry for entry in entries(folder) if file_ending(entry) in VOLUMES}
        image = next((name for name in IMAGE_NAMES if name in volumes), None)
        if image is None:
            continue
        names = [name for name in volumes if name != image and CASE_MASK.fullmatch(name)]
        own = [name for name in names if name.startswith(f"{image}_")] or [name for name in names if "_" not in name]
        if len(own) != 1:
            found = ", ".join(sorted(own)) or "none"
            raise InputError(f"{volumes[image]} needs one mask in its folder, such as {image}_mask, but has {found}.")
        pairs.append((volumes[image], volumes[own[0]]))
    return pairs


def _bids_pairs(site: Path) -> list[tuple[Path, Path]]:
    """The T2-weighted images of a BIDS data set that have a mask among its derivatives, or beside them."""
    masks: dict[str, Path] = {}
    for path in [*site.glob("derivatives/**/sub-*/**/*.nii*"), *site.glob("sub-*/**/*.nii*")]:
        named = BIDS_MASK.fullmatch(case_name(path))
        if named and masks.setdefault(named["case"], path) != path:
            raise InputError(f"{masks[named['case']]} and {path} are masks of one image: keep one.")
    pairs = []
    for image in sorted(site.glob("sub-*/**/*_T2w.nii*")):
        case = "_".join(part for part in case_name(image).split("_") if part.startswith(("sub-", "ses-")))
        pairs += [(image, masks[case])] if case in masks else []
    return pairs


def published_parts(root: Path, site: str, patient: str = AUTO) -> dict[str, list[Case]]:
    """A site's labelled cases by published part; all in ``"train"`` where no split is published.

    Args:
        root: folder of the sites.
        site: its name.
        patient: how patients are found where a datalist does not name them; see `patients.patients_of`.
    """
    check_site(site)
    known = known_sites(root)
    if site not in known and not ((root / site).is_dir() and _is_site_folder(root / site)):
        what = "holds no cases" if (root / site).is_dir() else "is not known"
        raise InputError(f"site {site!r} {what} in {root}; sites there: {', '.join(known) or 'none'}")
    folder, datalist = root / site, root / f"{site}.json"
    patients: dict[Path, str] = {}
    if _is_there(datalist):
        pairs, patients = _read_datalist(datalist, root)
    elif paired := _paired_folders(folder):
        pairs = {"train": [pair for images, masks in paired for pair in _pair(images, masks)]}
    elif any((folder / part / "ROIs").is_dir() for part in ("train", "test")):
        published = [folder / part / "ROIs" for part in ("train", "test") if (folder / part / "ROIs").is_dir()]
        pairs = {rois.parent.name: _pair(rois / "image", rois / "mask") for rois in published}
    elif any(file_ending(entry) in VOLUMES and entry.is_file() for entry in entries(folder)):
        pairs = {"train": _pair(folder, folder)}
    else:
        pairs = {"train": _case_folders(folder) or _bids_pairs(folder) or _pair(folder, folder)}

    names = unique_names([image for part in pairs.values() for image, _ in part], root)
    official: dict[str, list[Case]] = {part: [] for part in PARTS}
    # not the case name where there is a list: that changes when another folder's file turns out to be called the same
    own = {image: _path_name(image, root) if _is_there(datalist) else name for image, name in names.items()}
    found_out, declared = patients_of({image: own[image] for image in own if image not in patients}, patient, site)
    patient_parts: dict[str, str] = {}
    for part, found in pairs.items():
        for image, label in found:
            whose = patients.get(image) or found_out[image]
            if patient_parts.setdefault(whose, part) != part:
                between = f"patient {whose!r} of {folder} is in two lists: {patient_parts[whose]} and {part}"
                if declared or image in patients:
                    raise InputError(between)
                warn_once(f"{between}; the published lists are kept")
            official[part].append(
                {"image": str(image), "label": str(label), "site": site, "case": names[image], "patient": whose}
            )
    if not any(official.values()):
        raise InputError(f"site {site!r} holds no labelled cases in {root}; sites there: {', '.join(known)}")
    return official


def _pair(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Images with their masks: the same name in two folders, or the ending ``_segmentation`` in one."""
    suffix = MASK if images == masks else ""
    endings = VOLUMES if images == masks else VOLUMES + PICTURES
    image_of: dict[str, Path] = {}
    mask_of: dict[str, Path] = {}
    for folder in (images,) if images == masks else (images, masks):
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}; images need their masks")
        for entry in entries(folder):
            if file_ending(entry) not in endings or not entry.is_file():
                continue
            if file_ending(entry) == ".img" and entry.with_suffix(".hdr").is_file():
                continue  # the voxels of the scan that the .hdr is
            name, found = case_name(entry), image_of
            if folder == masks and name.lower().endswith(suffix):
                name, found = name[: len(name) - len(suffix)], mask_of
            elif folder == images and images.name == "imagesTr" and (channel := CHANNEL.fullmatch(name)):
                if channel[2] != "0000":
                    raise InputError(f"{entry} is a second channel of {channel[1]}: keep _0000, the scan, alone.")
                name = channel[1]
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
    """The labelled items of a datalist by part, and the patients that it, or a DICOM file's header, names.

    A validation or test list without any label, as public challenges have it, cannot score anything and is left out.
    """
    # not by MONAI's `load_decathlon_datalist`, which checks neither the items nor where their paths lead
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a datalist but a {type(content).__name__}: take it away or correct it.")
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    patients: dict[Path, str] = {}
    headers: dict[Path, str] = {}
    images: set[Path] = set()
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
            if image in images:
                raise InputError(f"{where} repeats {item['image']}: list each image once")
            pairs.setdefault(part, []).append((image, label))
            images.add(image)
            if (named := datalist_patient(item)) is not None:
                patients[image] = named
            elif named := patient_id(image):
                headers[image] = named
    if len(set(headers.values())) > 1:  # else it is what an anonymiser has written into each
        patients |= headers
    return pairs, patients


def _inside(root: Path, path: str, where: str) -> Path:
    full = root / path
    if "\\" in path and not full.exists():  # a list written on Windows
        full = root / PureWindowsPath(path).as_posix()
    if "\0" in path or not full.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{where} points outside {root}: {path}; keep a site's files below dataset_dir")
    if not full.exists():
        raise InputError(f"{where} names a file that is not there: {full}")
    return full


def _suffix(path: Path) -> str:
    return path.name[len(case_name(path)) :]


def _path_name(path: Path, root: Path) -> str:
    relative = path.relative_to(root)
    return relative.with_name(case_name(path)).as_posix() if relative.name else case_name(path)
