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
"""What sites may be called, and how names are read off a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_iopfl.models.files import USUAL_SHIFT, load_experts
from shared_iopfl.routing.settings import PRESETS
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import RESERVED, check_file_name, check_site, check_sites, nearest, parse_names


@pytest.mark.parametrize("name", ["A", "BIDMC", "site-1", "1e3", "09", "a b", "Köln_2.1", "_x", "東京", "x" * 100])
def test_names_of_sites(name: str) -> None:
    assert check_site(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *["", " ", ".a", "-a", "$a", "%a", "@a", "a/b", "a\\b", "..", "a#b", "a:b", "a,b", "a'b", "a\nb", "a\n", " a"],
        *["a ", "a\0", "a;b", "a$b", "a@b", "x" * 101, "é" * 60, "\udcff", "=a", "+a", "a\u202eb", None, 1, ["A"]],
    ],
)
def test_names_that_no_site_may_have(name: object) -> None:
    with pytest.raises(InputError) as error:
        check_site(name)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError):
        check_file_name(name, "name")


@pytest.mark.parametrize("name", [*RESERVED, "GLOBAL", "Soup", "Routed"])
def test_names_that_mean_something_else(name: str) -> None:
    with pytest.raises(InputError, match="needs another name"):
        check_site(name)


def test_the_presets_and_keys_of_scores_are_among_them() -> None:
    assert {*PRESETS, USUAL_SHIFT} <= set(RESERVED)


def test_two_sites_do_not_share_a_file() -> None:
    assert check_sites(["A", "B", "A"]) == ["A", "B", "A"]
    with pytest.raises(InputError, match="'A' and 'a' differ in letter case only"):
        check_sites(["A", "B", "a"])


@pytest.mark.parametrize("name", ["model_$x.pt", "model_soup.pt", "model_.hidden.pt"])
def test_an_expert_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="site"):
        load_experts(str(tmp_path))


@pytest.mark.parametrize(
    "text, names",
    [
        ("['A','B']", ["A", "B"]),
        ('["A", "B C"]', ["A", "B C"]),
        ("[A,1]", ["A", "1"]),
        ("(A, 09)", ["A", "09"]),
        ("A,site-1", ["A", "site-1"]),
        ("1e3", ["1e3"]),
        ("[]", []),
        ("", []),
    ],
)
def test_names_as_they_are_written(text: str, names: list[str]) -> None:
    assert parse_names(text) == names


def test_the_nearest_name() -> None:
    assert nearest("roudns", ["rounds", "alpha"]) == "; did you mean 'rounds'?"
    assert nearest("xyz", ["rounds", "alpha"]) == ""
