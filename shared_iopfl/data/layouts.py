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
"""Supported layouts of a site's folder: the public data sets as they are unpacked, and MONAI datalists.

The layout of each site is recognised from the contents of ``dataset_dir``:

1. ``SITE.json``: a MONAI datalist with paths relative to ``dataset_dir``. It takes precedence over a folder of the same
   name. The folders that it names contain its cases and are not sites themselves.
2. ``SITE/images/NAME.png`` and ``SITE/masks/NAME.png``.
3. ``SITE/{train,test}/ROIs/{image,mask}/NAME.png``: the public four-domain fundus set (DoFE).
4. ``SITE/NAME.nii.gz`` and ``SITE/NAME_segmentation.nii.gz``: the public six-site prostate set (SAML), and PROMISE12
   with ``.mhd`` and ``.raw``.
5. ``SITE/imagesTr`` and ``SITE/labelsTr``, ``SITE/image`` and ``SITE/mask``, and the other pairs in `PAIRED`, also
   below ``SITE/left`` and ``SITE/right``: the Medical Segmentation Decathlon, nnU-Net (``NAME_0000.nii.gz``) and
   others.
6. ``SITE/CASE/t2.nii.gz`` and ``SITE/CASE/t2_anatomy_reader1.nii.gz``: one folder for each case, as in Prostate158.
7. ``SITE/sub-01/**/NAME_T2w.nii.gz`` and ``SITE/derivatives/**/sub-01/**/NAME_dseg.nii.gz``: BIDS.
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

from shared_iopfl.data.patients import AUTO, datalist_patient, patients_of
from shared_iopfl.data.scan_files import Case, entries, unique_names
from shared_iopfl.data.scan_names import MASK, PICTURES, VOLUMES, case_name, file_ending
from shared_iopfl.data.volumes.dicom_headers import patient_id
from shared_iopfl.utils.errors import InputError, warn_once
from shared_iopfl.utils.names import check_site
from shared_iopfl.utils.reading import read_json

PARTS = ("train", "validation", "test")
# names of the folders of images and masks, in order of precedence, and of the folders that may contain them
PAIRED = (
    *(("images", "masks"), ("image", "mask"), ("images", "labels"), ("image", "label")),
    *(("imagesTr", "labelsTr"), ("images", "mask"), ("image", "masks")),
)
SIDES = ("left", "right")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # the names of images in nnU-Net
IMAGE_NAMES = ("t2", "t2w", "image", "img", "scan", "volume")  # in the folder of a case, in order of precedence
CASE_MASK = re.compile(r"(?:.*_)?(?:anatomy|seg|segmentation|mask|label|gt)(?:_reader1)?", re.IGNORECASE)
BIDS_MASK = re.compile(r"(?P<case>sub-[^_]+(?:_ses-[^_]+)?)(?:_.+)?_(?:dseg|mask|seg|label)", re.IGNORECASE)
DATALIST_KEYS = {"training": "train", "validation": "validation", "test": "test", "testing": "test"}


def known_sites(root: Path) -> list[str]:
    """Return the sorted names of the sites in a folder; the list may be empty.

    Args:
        root: Folder of the sites.

    Raises:
        InputError: If the folder does not exist.
    """
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; set dataset_dir to the folder that holds the sites")
    lists = {entry.stem: _listed_folders(entry) for entry in entries(root) if entry.suffix == ".json"}
    datalists = {site: folders for site, folders in lists.items() if folders is not None}
    folders = {entry.name for entry in entries(root) if entry.is_dir() and _is_site_folder(entry)}
    return sorted(datalists.keys() | folders.difference(*datalists.values()))


def _listed_folders(path: Path) -> set[str] | None:
    """Return the folders whose files a datalist lists, which are not sites themselves; None for other files."""
    if not _is_file(path):
        return None
    try:
        content = read_json(path)
    except InputError:
        return set()  # it counts as a site, so that reading the site reports the error
    if not isinstance(content, dict) or DATALIST_KEYS.keys().isdisjoint(content):
        return None
    lists = [content[key] for key in DATALIST_KEYS if isinstance(content.get(key), list)]
    items = [item for listed in lists for item in listed if isinstance(item, dict)]
    paths = [item[key] for item in items for key in ("image", "label") if isinstance(item.get(key), str)]
    parts = (PureWindowsPath(path).parts for path in paths)  # it splits at both kinds of separators
    return {part[0] for part in parts if len(part) > 1}


def _is_file(path: Path) -> bool:
    """Return whether a path exists and is not a folder; what cannot be read, such as a pipe, is reported on reading."""
    return path.exists() and not path.is_dir()


def _is_site_folder(folder: Path) -> bool:
    layouts = (_paired_folders, _roi_folders, _has_volumes, _case_folders, _bids_pairs)
    return any(found_in(folder) for found_in in layouts)


def _has_volumes(folder: Path) -> bool:
    return any(file_ending(entry) in VOLUMES and entry.is_file() for entry in entries(folder))


def _roi_folders(folder: Path) -> list[Path]:
    return [rois for part in ("train", "test") if (rois := folder / part / "ROIs").is_dir()]


def _paired_folders(folder: Path) -> list[tuple[Path, Path]]:
    """Return a site's folders of images, each with the folder of its masks.

    A folder "images" counts even if the folder of masks is missing, so that the missing masks are reported.
    """
    found = []
    for place in (folder, *(folder / side for side in SIDES)):
        pairs = [(place / images, place / masks) for images, masks in PAIRED if (place / images).is_dir()]
        complete = [pair for pair in pairs if pair[1].is_dir()] or [pair for pair in pairs if pair[0].name == "images"]
        found += complete[:1]
    return found


def _case_folders(site: Path) -> list[tuple[Path, Path]]:
    """Return the image and the mask of each folder that holds one case."""
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
    """Return the T2-weighted images of a BIDS data set that have a mask, with their masks."""
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
    """Return the labelled cases of a site by the parts of its published split.

    Args:
        root: Folder of the sites.
        site: Name of the site.
        patient: How patients are recognised if a datalist does not name them; see `patients.patients_of`.

    Returns:
        Part -> cases, for each of `PARTS`. Without a published split, all cases are in ``"train"``.

    Raises:
        InputError: If the site is unknown or has no labelled case, if an image or a mask lacks its counterpart, or if a
            declared patient is in two parts.
    """
    check_site(site)
    folder, datalist = root / site, root / f"{site}.json"
    if _listed_folders(datalist) is None and not (folder.is_dir() and _is_site_folder(folder)):
        what = "holds no cases" if folder.is_dir() else "is not known"
        raise InputError(f"site {site!r} {what} in {root}; sites there: {', '.join(known_sites(root)) or 'none'}")
    patients: dict[Path, str] = {}
    if _is_file(datalist):
        pairs, patients = _read_datalist(datalist, root)
    elif paired := _paired_folders(folder):
        pairs = {"train": [pair for images, masks in paired for pair in _pair(images, masks)]}
    elif published := _roi_folders(folder):
        pairs = {rois.parent.name: _pair(rois / "image", rois / "mask") for rois in published}
    elif _has_volumes(folder):
        pairs = {"train": _pair(folder, folder)}
    else:
        pairs = {"train": _case_folders(folder) or _bids_pairs(folder)}

    names = unique_names([image for part in pairs.values() for image, _ in part], root)
    official: dict[str, list[Case]] = {part: [] for part in PARTS}
    # the case name of a listed image depends on the files of other folders, its path does not
    own = {image: _path_name(image, root) if _is_file(datalist) else name for image, name in names.items()}
    recognised, declared = patients_of({image: own[image] for image in own if image not in patients}, patient, site)
    patient_parts: dict[str, str] = {}
    for part, found in pairs.items():
        for image, label in found:
            whose = patients.get(image) or recognised[image]
            if patient_parts.setdefault(whose, part) != part:
                both = f"patient {whose!r} of {folder} is in two lists: {patient_parts[whose]} and {part}"
                if declared or image in patients:
                    raise InputError(f"{both}; keep the patient in one of them")
                warn_once(f"{both}; the published lists are kept")
            official[part].append(
                {"image": str(image), "label": str(label), "site": site, "case": names[image], "patient": whose}
            )
    if not any(official.values()):
        known = ", ".join(known_sites(root))
        raise InputError(f"site {site!r} holds no labelled cases in {root}; sites there: {known}")
    return official


def _pair(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Return images with their masks: files of the same name in two folders, or ``_segmentation`` files in one."""
    suffix = MASK if images == masks else ""
    endings = VOLUMES if images == masks else VOLUMES + PICTURES
    image_of: dict[str, Path] = {}
    mask_of: dict[str, Path] = {}
    for folder in (images,) if images == masks else (images, masks):
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}; put the masks of the images there")
        for entry in entries(folder):
            if file_ending(entry) not in endings or not entry.is_file():
                continue
            if file_ending(entry) == ".img" and entry.with_suffix(".hdr").is_file():
                continue  # the .hdr file stands for both files of the scan
            name, found = case_name(entry), image_of
            if folder == masks and name.lower().endswith(suffix):
                name, found = name[: len(name) - len(suffix)], mask_of
            elif folder == images and images.name == "imagesTr" and (channel := CHANNEL.fullmatch(name)):
                if channel[2] != "0000":
                    raise InputError(f"{entry} is a second channel of {channel[1]}: keep only _0000, the scan.")
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
    """Return the labelled items of a datalist by part, and the patients that the list or a DICOM header names.

    A validation or test list without any label, as public challenges have it, cannot be scored and is left out.
    """
    # MONAI's `load_decathlon_datalist` checks neither the items nor where their paths lead
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a datalist but a {type(content).__name__}: remove or correct it.")
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    patients: dict[Path, str] = {}
    headers: dict[Path, str] = {}
    images: set[Path] = set()
    for key, part in DATALIST_KEYS.items():
        items = content.get(key) or []
        if not isinstance(items, list):
            raise InputError(f"{path}: {key!r} must be a list of items, but is {type(items).__name__}: correct it")
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
    if len(set(headers.values())) > 1:  # a single value for all files was written by an anonymiser
        patients |= headers
    return pairs, patients


def _inside(root: Path, path: str, where: str) -> Path:
    full = root / path
    if "\\" in path and not full.exists():  # a list written on Windows
        full = root / PureWindowsPath(path).as_posix()
    if "\0" in path or not full.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{where} points outside {root}: {path}; keep a site's files below dataset_dir")
    if not full.exists():
        raise InputError(f"{where} names a file that does not exist: {full}; correct the path, or add the file")
    return full


def _suffix(path: Path) -> str:
    return path.name[len(case_name(path)) :]


def _path_name(path: Path, root: Path) -> str:
    relative = path.relative_to(root)
    return relative.with_name(case_name(path)).as_posix() if relative.name else case_name(path)
