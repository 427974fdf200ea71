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

import fire

from shared_iopfl.errors import one_line_errors
from shared_iopfl.phantoms import make_fundus_sites, make_prostate_sites
from shared_iopfl.report import print_table, write_report
from shared_iopfl.sites import list_sites, site_cases


def prepare(dataset_dir: str, seed: int = 0) -> None:
    """List the sites of a folder, how many cases each has, and how they would be split by patient."""
    for site in list_sites(dataset_dir):
        parts = {part: len(site_cases(dataset_dir, site, part, seed)) for part in ("train", "validation", "test")}
        print(f"{site}: " + ", ".join(f"{count} {part}" for part, count in parts.items()))


def report(output_dir: str) -> None:
    """Write ``report.html`` of a run and print its table."""
    print(write_report(output_dir))
    print_table(output_dir)


def main() -> None:
    """Run the command named on the command line."""
    one_line_errors()
    fire.Fire(
        {
            "prepare": prepare,
            "phantoms": {"prostate": make_prostate_sites, "fundus": make_fundus_sites},
            "report": report,
        },
        name="shared_iopfl",
    )


if __name__ == "__main__":
    main()
