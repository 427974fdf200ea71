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
"""The lock of a run's folder, which the operating system releases when the process ends."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO

from shared_iopfl.utils.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"


class FolderLock:
    """Lock of a folder until it is released; file systems and operating systems without locks are not locked.

    Args:
        folder: The folder, which exists.
        shown: Name of the folder in the message.

    Raises:
        InputError: If another process holds the lock.
    """

    def __init__(self, folder: Path, shown: str) -> None:
        self.path = folder / LOCK
        self._file: IO[str] | None = None
        while fcntl is not None and self._file is None:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = re.sub(r"\D", "", file.read(20)) or "unknown"
                file.close()
                raise InputError(
                    f"{shown} is in use by another run (process {who}): wait for it, or choose another output_dir."
                ) from None
            except OSError:
                file.close()
                self.path.unlink(missing_ok=True)
                return
            if self._is(file):
                self._file = file
            else:  # another run has removed the file in the meantime
                file.close()
        if self._file is not None:
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()

    def _is(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock of the folder."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
