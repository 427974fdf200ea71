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
"""Bad and odd inputs of both bundles: each gets a mask, or is refused in a line."""

from __future__ import annotations

import shutil
from pathlib import Path

from bad_pictures import PICTURES
from bad_volumes import VOLUMES, Corpus

CORPORA = {"prostate_iopfl": VOLUMES, "fundus_iopfl": PICTURES}


def make_corpus(corpus: Corpus, root: Path) -> Path:
    """All of a corpus in one folder."""
    root.mkdir(parents=True)
    for name, (make, _) in corpus.items():
        make(root / name)
    shutil.rmtree(root / "another", ignore_errors=True)
    return root
