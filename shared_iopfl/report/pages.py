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
"""Elements of the HTML report: one file with its pictures inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from html import escape

from matplotlib.figure import Figure

from shared_iopfl.report import pictures

__all__ = ["breakable", "page", "picture", "table", "without_path"]

_CSS = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1f2328;
  max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; background: #fff }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .8rem; padding-bottom: .25rem; border-bottom: 1px solid #d5d9de }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem } h3 small, th small { font-weight: 400; color: #59636e }
p { max-width: 46rem } .facts { color: #59636e } .use { font-weight: 600; max-width: none }
.missing { background: #f6f8fa; border-left: 3px solid #8c959f; padding: .5rem .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .32rem .55rem; text-align: right; font-weight: 400 }
th, td small { white-space: nowrap } td small { display: inline-block } .wide + .wide { margin-top: 1.2rem }
th, td { border-bottom: 1px solid #e6e9ec } th:first-child { text-align: left }
tr:first-child th { font-weight: 600; border-bottom: 1px solid #59636e }
td small { color: #59636e } tr.mean th, tr.mean td { background: #f6f8fa; border-bottom: 1px solid #8c959f }
table.text th, table.text td { text-align: left; vertical-align: top }
tr:first-child th { white-space: normal }
th i { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .35em }
figure { margin: 1rem 0 1.6rem } img { max-width: 100%; height: auto; display: block }
.caption, figcaption { font-size: .88rem; color: #59636e; max-width: 46rem; margin: .5rem 0 1rem }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 1.5rem; font-size: .9rem }
dt { color: #59636e } dd { margin: 0; overflow-wrap: anywhere }
@media print { body { font-size: 10pt; margin: 0; max-width: none; padding: 0 } h2, h3 { break-after: avoid }
  figure, tr, .missing { break-inside: avoid } .wide { overflow: visible } table { font-size: 8.5pt }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact } @page { size: A4; margin: 16mm 14mm } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML file, with nothing to fetch from elsewhere."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_CSS}</style></head><body>
<h1>{escape(title)}</h1>
{body}
</body></html>
"""


def table(lines: Iterable[str], kind: str = "") -> str:
    """Rows, ``<tr>...</tr>``, as a table that scrolls where the page is narrow; `kind` "text" sets cells as text."""
    return f'<div class="wide"><table{kind and f" class={kind}"}>{"".join(lines)}</table></div>'


def picture(figure: Figure, caption: str = "") -> str:
    """A figure inside the page, as wide as its text needs to be as large as in the others."""
    data = base64.b64encode(pictures.png(figure)).decode()
    width = f"width:{100 * figure.get_figwidth() / pictures.WIDTH:.0f}%"
    image = f'<img style="{width}" src="data:image/png;base64,{data}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def breakable(name: str) -> str:
    """A name that may break into lines at its underscores."""
    return escape(name).replace("_", "_<wbr>")


def without_path(text: str) -> str:
    """Text up to its first file path: paths can name patients and machines, which a report must not show."""
    path = re.search(r"\S*(?:(?:^|[\s\"'(=\[,:~.])[/\\]\S|\w\w[/\\]\w\w)", text)
    return f"{text[: path.start()]}(path not shown)" if path else text
