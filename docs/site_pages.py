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
"""The parts of the documentation that are made from the repository itself, for MkDocs.

``reference/api.md`` ends in a marker that is replaced by what the package holds; the changelog and the guide for
contributors are the files at the top of the repository.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import api_reference  # noqa: E402

MARKER = "<!-- generated -->"
TOP = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose text stands at the top of the repository; their links into docs/ become links beside them."""
    for page, name in TOP.items():
        text = (DOCS.parent / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text)
        for other, file in TOP.items():
            text = text.replace(f"]({file})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated."""
    return markdown.replace(MARKER, api_reference.page()) if page.file.src_uri == "reference/api.md" else markdown
