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
"""One document, two forms: the same words in Markdown and on the page."""

from __future__ import annotations

import re
from urllib.parse import quote

from shared_iopfl.report.documents import (
    Bullets,
    Card,
    Cards,
    Heading,
    OnPage,
    Picture,
    Row,
    Settings,
    Table,
    Text,
    markdown,
)
from shared_iopfl.report.pages import page

BLOCKS = [
    Heading("A <b>"),
    Text("as *it* is"),
    Bullets([("what", "text | $x$")]),
    Table(
        ["name", "one [95% interval]", "two"],
        [
            Row("plain", [("+1.0", "[+0.5, +1.5]"), "2"], frozenset({0})),
            Row("a|b", ["3", ""], italic=True),
            Row("ours", ["4", "5"], marked=True),
        ],
    ),
]


def test_markdown_stands_out_where_it_should_and_nowhere_else():
    lines = markdown("T", BLOCKS).splitlines()
    assert lines[:5:2] == ["# T", "## A \\<b\\>", "as \\*it\\* is"]
    assert "- **what**: text \\| \\$x\\$" in lines
    assert lines[-5:] == [
        "| name | one [95% interval] | two |",
        "| --- | ---: | ---: |",
        "| plain | **+1.0 [+0.5, +1.5]** | 2 |",
        "| *a\\|b* | *3* |  |",
        "| **ours** | 4 | 5 |",
    ]


def test_names_with_underscores_are_read_as_they_are_and_links_are_none():
    assert markdown("drishti_gs", [Text("_x_ [a](b)")]) == "# drishti_gs\n\n\\_x\\_ [a\\](b)\n"


def test_the_page_has_the_same_words_and_escapes_them():
    html = page("T & <t>", BLOCKS)
    assert "<title>T &amp; &lt;t&gt;</title>" in html and "<h1>T &amp; &lt;t&gt;</h1>" in html
    assert "<h2>A &lt;b&gt;</h2><p>as *it* is</p>" in html
    assert "<td><b>+1.0</b> <small>[+0.5, +1.5]</small></td>" in html
    assert "<th><em>a|b</em></th><td><em>3</em></td>" in html
    assert re.search(r"<tr class=mean><th><b>ours</b></th>", html)


def test_what_only_the_page_has_is_not_in_the_markdown():
    blocks = [Text("both"), OnPage([Heading("Pictures"), Text("of <both>")])]
    assert markdown("T", blocks) == "# T\n\nboth\n"
    assert "<h2>Pictures</h2><p>of &lt;both&gt;</p>" in page("T", blocks)


def test_whatever_comes_with_data_is_escaped_in_every_kind_of_block():
    evil = "<script>&'\""
    card = Card(evil, evil, [evil], "data:image/jpeg;base64,AA", f"{quote(evil)}.png")
    blocks = [
        *(Heading(evil, 3, evil), Text(evil, "caption", bold=True), Bullets([(evil, evil)])),
        *(Settings([(evil, evil)]), Picture("AA", 50, evil), Cards([card])),
        Table([evil], [Row(evil, [(evil, evil)], note=evil), Row(evil, [evil], frozenset({0}), italic=True)]),
    ]
    html = page(evil, blocks)
    assert "<script" not in html and html.count("&lt;script&gt;&amp;&#39;&#34;") == 22
    assert html.count('alt="&lt;script') == 2
