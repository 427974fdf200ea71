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
"""Allowed names of sites, which become files, folders and keys.

Names come from folders, datalists, clients of a federation and published models, so they are checked wherever they
enter.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from shared_iopfl.utils.errors import InputError

# names of models, of presets and in scores.json, which stand where sites' names do; and model_final.pt of a trainer
PRESET_NAMES = ("adapted", "default", "paper", "self_trained", "soup")  # of `shared_iopfl.routing.settings`
RESERVED = tuple(sorted((*PRESET_NAMES, "final", "global", "personalised", "routed", "usual_shift")))
SITE = re.compile(r"\w(?:[\w .-]*[\w.-])?")
LONGEST = 100  # bytes: with what is put before and after it, a file's name has at most 255


def check_site(name: Any) -> str:
    """Return the name if it is allowed for a site.

    Args:
        name: Letters and digits of any script, ``_``, ``-``, ``.`` and spaces, at most 100 bytes. It begins with a
            letter, a digit or ``_``, does not end with a space, and is none of `RESERVED` in any letter case.

    Raises:
        InputError: If the name is not allowed.
    """
    if not _is_plain(name):
        raise InputError(
            f"site {_shown(name)} has no name that a site may have: use letters, digits, '_', '-', '.' and spaces, "
            f"beginning with a letter or digit, at most {LONGEST} bytes."
        )
    if name.casefold() in RESERVED:
        raise InputError(f"site {name!r} needs another name: {', '.join(RESERVED)} mean something else.")
    return name


def check_sites(names: Iterable[Any]) -> list[str]:
    """Return the names if all are allowed for sites and no two are equal on a case-insensitive file system."""
    checked = [check_site(name) for name in names]
    seen: dict[str, str] = {}
    for name in checked:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(f"sites {other!r} and {name!r} differ in letter case only, as files may not: rename one.")
    return checked


def check_file_name(name: Any, what: str) -> str:
    """Return the name if it is a plain file name without a path, in the form of a site's name.

    Args:
        name: Name without suffix.
        what: What the name stands for, for the message.
    """
    if not _is_plain(name):
        raise InputError(f"{what} {_shown(name)} is not a plain name: use letters, digits, '_', '-', '.' and spaces.")
    return name


def parse_names(text: str) -> list[str]:
    """The names in ``['A','B']``, ``[A,1]``, ``A,site-1`` or ``A``, as typed: ``09`` stays ``09``.

    Names contain no commas, brackets or quotes, so no quoting is needed.
    """
    text = text.strip()
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    names = [part.strip() for part in text.split(",") if part.strip()]
    return [name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"" else name for name in names]


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a message, ``; did you mean 'rounds'?``, or an empty text if no known name is similar."""
    close = difflib.get_close_matches(name, known, 1, 0.7)
    return f"; did you mean '{close[0]}'?" if close else ""


def counted(number: int, what: str) -> str:
    """The number and the noun, in the plural unless the number is 1, such as ``2 scans``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def shortened(text: str, longest: int) -> str:
    """The text, or only its beginning and end if it is longer than `longest` characters."""
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and bool(SITE.fullmatch(name)) and len(name.encode(errors="replace")) <= LONGEST


def _shown(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:77]}..."
