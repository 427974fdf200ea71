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
"""Writing files atomically: a file is written completely or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from shared_iopfl.utils.errors import InputError


class Keeper(Protocol):
    """An object that is notified of every file that is written, such as a run that owns its folder."""

    def check(self, target: Path) -> None:
        """Raise `InputError` if the file must not be written."""

    def note(self, target: Path, content: Path) -> None:
        """Record a file that is about to be renamed to `target`; its contents are in `content` until then."""


keepers: list[Keeper] = []


@contextmanager
def whole_file(target: str | os.PathLike, previous: str | os.PathLike | None = None) -> Iterator[Path]:
    """A temporary file next to the target that replaces it on success and is deleted on failure.

    The file is synced before it is renamed, so that after a crash either the old or the new file exists, complete.

    Args:
        target: The file to write.
        previous: Path under which the old file is kept. Between the two renames it is the only complete file.

    Raises:
        InputError: If the folder is not writable, or if one of the `keepers` refuses.
    """
    target = Path(target)
    for keeper in keepers:
        keeper.check(target)
    # several threads may write the same target; and its name may already have the maximal length
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}_{target.name[-40:]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        for keeper in keepers:
            keeper.note(target, temporary)
            if previous is not None:
                keeper.note(Path(previous), temporary)
        if previous is not None and target.exists():
            os.replace(target, previous)
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"cannot write {target} ({reason}): give the scan a shorter one") from error
        raise InputError(
            f"cannot write to {target.parent} ({reason}): choose another output_dir or free space"
        ) from error
    finally:
        with suppress(OSError):  # the folder itself may not exist
            temporary.unlink(missing_ok=True)


def write_text(target: str | os.PathLike, text: str) -> None:
    """Write a text file atomically."""
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def check_writable(output_dir: str | os.PathLike) -> None:
    """Create a folder if necessary and try to write to it, so that a long run does not fail at its end.

    Raises:
        InputError: If the folder is not writable.
    """
    folder = Path(output_dir)
    with whole_file(folder / ".writable") as temporary, open(temporary, "wb") as file:
        file.write(bytes(2**16))
        os.fsync(file.fileno())
    (folder / ".writable").unlink(missing_ok=True)
