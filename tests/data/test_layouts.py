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
"""Layouts: all public data sets and datalists are found as unpacked, and invalid folders give a one-line error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from site_folders import datalist, dofe, names, saml, touch

from shared_iopfl.data.layouts import published_parts
from shared_iopfl.data.splits import find_cases, list_sites, site_cases
from shared_iopfl.utils.errors import InputError


@pytest.mark.parametrize("mask", ["_segmentation", "_Segmentation"])
def test_saml_layout(tmp_path, mask):
    """The six-site prostate set is read as it is unpacked, beside hidden files of macOS and other folders."""
    saml(tmp_path, "BIDMC", 3, mask)
    touch(tmp_path, "BIDMC/._Case00.nii.gz", "BIDMC/.DS_Store", "BIDMC/notes.txt", "__MACOSX/BIDMC/._Case00.nii.gz")
    (tmp_path / "BIDMC" / "old.nii.gz").mkdir()
    assert list_sites(tmp_path) == ["BIDMC"]
    folder = tmp_path / "BIDMC"
    assert find_cases(tmp_path, "BIDMC")[1] == {
        "image": str(folder / "Case01.nii.gz"),
        "label": str(folder / f"Case01{mask}.nii.gz"),
        "site": "BIDMC",
        "case": "Case01",
        "patient": "Case01",
    }
    assert names(find_cases(tmp_path, "BIDMC")) == ["Case00", "Case01", "Case02"]


@pytest.mark.parametrize("ending", [".nii", ".mha", ".mhd", ".nrrd", ".NII.GZ"])
def test_volume_endings(tmp_path, ending):
    """All formats of volumes are accepted, and a mask may have another format than its scan."""
    touch(tmp_path, f"A/some.scan{ending}", "A/some.scan_segmentation.nii.gz", "A/some.scan.raw")
    assert names(find_cases(tmp_path, "A")) == ["some.scan"]


def test_images_and_masks_layout(tmp_path):
    touch(tmp_path, "A/images/train_1.png", "A/images/test_2.jpg", "A/masks/train_1.png", "A/masks/test_2.bmp")
    cases = find_cases(tmp_path, "A")
    assert names(cases) == ["test_2", "train_1"]
    assert cases[0]["label"].endswith("A/masks/test_2.bmp")


def test_fundus_layout_keeps_its_split(tmp_path):
    """The published test folder is the test part for any seed; validation cases are taken from the train folder."""
    dofe(tmp_path, train=20, test=5)
    for seed in range(3):
        parts = {part: names(site_cases(tmp_path, "D", part, seed)) for part in ("train", "validation", "test")}
        assert parts["test"] == [f"te{number:02d}" for number in range(5)]
        assert sorted(parts["train"] + parts["validation"]) == [f"tr{number:02d}" for number in range(20)]
        assert len(parts["train"]) > len(parts["validation"]) > 0
    assert len(site_cases(tmp_path, "D", "all")) == 25


def test_same_name_in_train_and_test_stays_two_cases(tmp_path):
    for part in ("train", "test"):
        touch(tmp_path, *(f"D/{part}/ROIs/{kind}/g1.png" for kind in ("image", "mask")))
    assert len(set(names(find_cases(tmp_path, "D")))) == 2


def test_datalist_takes_precedence_over_the_folder_and_keeps_its_lists(tmp_path):
    saml(tmp_path, "L", 6)
    items = [{"image": f"L/Case0{n}.nii.gz", "label": f"L/Case0{n}_segmentation.nii.gz"} for n in range(6)]
    datalist(tmp_path, training=items[:3], validation=items[3:4], testing=items[4:5])
    assert list_sites(tmp_path) == ["L"]
    parts = {part: names(site_cases(tmp_path, "L", part)) for part in ("train", "validation", "test", "all")}
    assert parts["train"] == ["Case00", "Case01", "Case02"]
    assert parts["validation"] == ["Case03"]
    assert parts["test"] == ["Case04"]
    assert len(parts["all"]) == 5


def test_datalist_splits_by_its_patients(tmp_path):
    """Two scans of a patient are in the same part for any seed."""
    saml(tmp_path, "L", 20)
    items = [
        {"image": f"L/Case{n:02d}.nii.gz", "label": f"L/Case{n:02d}_segmentation.nii.gz", "patient": f"p{n // 2}"}
        for n in range(20)
    ]
    datalist(tmp_path, training=items, test=["unlabelled.nii.gz"])  # a challenge's test list without labels
    for seed in range(5):
        parts = [{c["patient"] for c in site_cases(tmp_path, "L", p, seed)} for p in ("train", "validation", "test")]
        assert sum(map(len, parts)) == 10
        assert len(set.union(*parts)) == 10


def test_other_json_files_are_not_sites(tmp_path):
    saml(tmp_path, "A", 1)
    (tmp_path / "info.json").write_text('{"licence": "research"}')
    assert list_sites(tmp_path) == ["A"]


@pytest.mark.parametrize(
    "item, what",
    [
        ({"image": "../x.nii", "label": "L/b.nii"}, "points outside"),
        ({"image": "/etc/hosts", "label": "L/b.nii"}, "points outside"),
        ({"image": "L/link.nii", "label": "L/b.nii"}, "points outside"),
        ({"image": "L/gone.nii", "label": "L/b.nii"}, "does not exist"),
        ({"image": "L/a.nii"}, "must have an image and a label"),
        ({"image": ["L/a.nii", "L/b.nii"], "label": "L/b.nii"}, "must have an image and a label"),
        ("L/a.nii", "must have an image and a label"),
    ],
)
def test_bad_datalist_items(tmp_path, item, what):
    root = tmp_path / "data"
    touch(tmp_path, "x.nii", "data/L/a.nii", "data/L/b.nii")
    (root / "L" / "link.nii").symlink_to(tmp_path / "x.nii")
    datalist(root, training=[item])
    with pytest.raises(InputError, match=what) as error:
        find_cases(root, "L")
    assert "item 0 of 'training'" in str(error.value)


@pytest.mark.parametrize(
    "content, what",
    [
        ("{", "cannot be read as JSON"),
        ('{"training": {}, "test": {"a": 1}}', "must be a list"),
        ('{"training": []}', "no labelled cases"),
    ],
)
def test_bad_datalist(tmp_path, content, what):
    (tmp_path / "L.json").write_text(content)
    with pytest.raises(InputError, match=what):
        find_cases(tmp_path, "L")


def test_datalist_with_an_image_or_a_patient_in_two_lists_is_rejected(tmp_path):
    """An image must not be listed twice, and a patient must not be in both training and test."""
    saml(tmp_path, "L", 2)
    items = [{"image": f"L/Case0{n}.nii.gz", "label": f"L/Case0{n}_segmentation.nii.gz"} for n in (0, 1)]
    datalist(tmp_path, training=items, test=items[:1])
    with pytest.raises(InputError, match="repeats"):
        find_cases(tmp_path, "L")
    datalist(tmp_path, training=[{**items[0], "patient": "p"}], test=[{**items[1], "patient": "p"}])
    with pytest.raises(InputError, match=r"'p'.*two lists"):
        find_cases(tmp_path, "L")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, what",
    [
        (["A/a.nii.gz"], r"a\.nii\.gz has no mask: expected .*a_segmentation\.nii\.gz"),
        (["A/a.nii.gz", "A/b.nii.gz", "A/c.nii.gz"], "2 more"),
        (["A/a_segmentation.nii.gz"], r"mask without its image: expected .*/a\.nii\.gz"),
        (["A/a.nii", "A/a.nii.gz", "A/a_segmentation.nii"], "two files for one case"),
        (["A/images/a.png"], "masks"),
        (["A/images/a.png", "A/masks/b.png"], r"has no mask: expected .*masks/a\.png"),
        (["A/images/readme.txt", "A/masks/readme.txt"], "no labelled cases"),
        (["A/train/ROIs/image/a.png"], "no such folder.*mask"),
        (["A/readme.txt", "B/a.nii"], "'A' holds no cases.* B"),
        (["B/a.nii", "C/a.nii"], "'A' is not known.* B, C"),
    ],
)
def test_bad_sites(tmp_path, files, what):
    touch(tmp_path, *files)
    with pytest.raises(InputError, match=what) as error:
        find_cases(tmp_path, "A")
    assert "\n" not in str(error.value)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        list_sites(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no sites in"):
        list_sites(tmp_path)


@pytest.mark.parametrize("site", ["..", "../B", "", ".", None])
def test_a_site_is_a_name_and_not_a_path(tmp_path, site):
    saml(tmp_path, "B", 3)
    (tmp_path / "A").mkdir()
    with pytest.raises(InputError):
        find_cases(tmp_path / "A", site)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_datalist_written_on_windows(tmp_path, encoding, separator):
    (tmp_path / "files").mkdir()
    for name in ("i0.nii.gz", "l0.nii.gz"):
        (tmp_path / "files" / name).touch()
    item = {"image": f"files{separator}i0.nii.gz", "label": f".{separator}files{separator}l0.nii.gz"}
    (tmp_path / "S.json").write_bytes(json.dumps({"training": [item]}).encode(encoding))
    (case,) = published_parts(tmp_path, "S")["train"]
    assert case["image"] == str(tmp_path / "files" / "i0.nii.gz")
    assert case["case"] == "i0"


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_folders_that_a_datalist_names_are_not_listed_as_sites_but_can_be_requested(tmp_path, separator):
    saml(tmp_path, "files", 2)
    saml(tmp_path, "B", 1)
    datalist(
        tmp_path,
        training=[
            {"image": f"files{separator}Case0{n}.nii.gz", "label": f"files{separator}Case0{n}_segmentation.nii.gz"}
            for n in range(2)
        ],
    )
    (tmp_path / "bad.json").write_text('{"training": [1], "test": 2, "validation": [{"image": 3}]}')
    assert list_sites(tmp_path) == ["B", "L", "bad"]
    assert len(site_cases(tmp_path, "L", "all")) == len(site_cases(tmp_path, "files", "all")) == 2


@pytest.mark.parametrize("path", ["..\\x.nii.gz", "C:\\x.nii.gz", "\\\\host\\x.nii.gz", "a\0b"])
def test_datalist_of_windows_paths_elsewhere(tmp_path, path):
    (tmp_path / "S.json").write_text(json.dumps({"training": [{"image": path, "label": path}]}))
    with pytest.raises(InputError, match=r"points outside|does not exist"):
        published_parts(tmp_path, "S")


@pytest.mark.parametrize("name", ["$x", "../S", "global", "a#b"])
def test_site_names_that_are_not_allowed_are_rejected(tmp_path, name):
    with pytest.raises(InputError, match="site "):
        published_parts(tmp_path, name)


# ---- layouts of public data sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cases"),
    [
        (["Case00.mhd", "Case00.raw", "Case00_segmentation.mhd", "Case00_segmentation.raw"], ["Case00"]),
        (["imagesTr/p_1.nii.gz", "labelsTr/p_1.nii.gz", "imagesTs/p_2.nii.gz", "dataset.json"], ["p_1"]),
        (["imagesTr/p_1_0000.nii.gz", "labelsTr/p_1.nii.gz", "imagesTs/p_2_0000.nii.gz"], ["p_1_0000"]),
        (["image/a.png", "mask/a.png"], ["a"]),
        (["images/a.png", "labels/a.png"], ["a"]),
        (["020/t2.nii.gz", "020/t2_anatomy_reader1.nii.gz", "020/adc.nii.gz", "020/adc_tumor_reader1.nii.gz"], ["t2"]),
        (["P1/image.nii.gz", "P1/mask.nii.gz"], ["image"]),
        (
            [
                "dataset_description.json",
                "sub-01/anat/sub-01_T2w.nii.gz",
                "sub-02/ses-1/anat/sub-02_ses-1_acq-tra_T2w.nii.gz",
                "derivatives/manual/sub-01/anat/sub-01_label-prostate_dseg.nii.gz",
                "derivatives/manual/sub-02/ses-1/anat/sub-02_ses-1_mask.nii.gz",
                "sub-03/anat/sub-03_T2w.nii.gz",
            ],
            ["sub-01_T2w", "sub-02_ses-1_acq-tra_T2w"],
        ),
    ],
    ids=["PROMISE12", "MSD", "nnU-Net", "singular", "labels", "Prostate158", "case-folders", "BIDS"],
)
def test_public_layouts(tmp_path, files, cases):
    touch(tmp_path, *(f"S/{file}" for file in files), content=b"{}")
    assert list_sites(tmp_path) == ["S"]
    found = find_cases(tmp_path, "S")
    assert names(found) == cases
    assert all(Path(case["image"]).is_file() and Path(case["label"]).is_file() for case in found)
    assert not {case["image"] for case in found} & {case["label"] for case in found}


def test_left_and_right_eyes_are_cases_of_one_patient(tmp_path):
    touch(
        tmp_path,
        *(f"S/{side}/{kind}/P{n}.png" for side in ("left", "right") for kind in ("images", "masks") for n in (1, 2)),
    )
    found = find_cases(tmp_path, "S")
    assert len({case["case"] for case in found}) == 4
    assert len({case["patient"] for case in found}) == 2


def test_a_fault_of_one_site_does_not_keep_the_others_from_being_read(tmp_path):
    saml(tmp_path, "A", 2)
    touch(tmp_path, "B/1/t2.nii.gz", "B/1/t2_mask.nii.gz", "B/1/t2_seg.nii.gz")
    assert names(find_cases(tmp_path, "A")) == ["Case00", "Case01"]
    with pytest.raises(InputError, match="needs one mask in its folder"):
        find_cases(tmp_path, "B")


def test_a_second_channel_and_a_second_mask_are_refused(tmp_path):
    touch(tmp_path, "S/imagesTr/a_0000.nii.gz", "S/imagesTr/a_0001.nii.gz", "S/labelsTr/a.nii.gz")
    with pytest.raises(InputError, match="second channel of a"):
        find_cases(tmp_path, "S")
    touch(tmp_path, "T/1/t2.nii.gz", "T/1/t2_mask.nii.gz", "T/1/t2_seg.nii.gz")
    with pytest.raises(InputError, match="needs one mask in its folder"):
        find_cases(tmp_path, "T")


def test_case_folders_of_the_same_name_remain_separate_cases(tmp_path):
    touch(tmp_path, *(f"S/{n}/{name}.nii.gz" for n in ("020", "021") for name in ("t2", "t2_anatomy_reader1")))
    found = find_cases(tmp_path, "S")
    assert len({case["case"] for case in found}) == len({case["patient"] for case in found}) == 2
