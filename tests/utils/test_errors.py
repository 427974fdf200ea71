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
"""Errors that a user can correct end in one line; a program's own faults keep their traceback."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from monai.data import DataLoader, Dataset
from monai.transforms import Compose

from shared_iopfl.utils.errors import InputError, one_line_errors, root_input_error

START = "from shared_iopfl.utils.errors import InputError, one_line_errors\none_line_errors(True)\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60)


def test_chained_input_error_is_shown_once_in_one_line_with_status_1():
    """However often it was wrapped on the way, and whatever line breaks are in it."""
    ended = run(
        "try:\n"
        "    try:\n"
        "        raise InputError('no scan at /data:\\n give --dataset_dir')\n"
        "    except Exception as error:\n"
        "        raise RuntimeError('applying transform') from error\n"
        "except Exception:\n"
        "    raise KeyError('resolving config')\n"
    )
    assert ended.returncode == 1
    assert ended.stderr == "error: no scan at /data: give --dataset_dir\n"
    assert ended.stdout == ""


@pytest.mark.parametrize(
    "code",
    [
        "raise KeyError('a fault of ours')",
        "try:\n    raise InputError('handled')\nexcept InputError:\n    pass\nraise KeyError('a fault of ours')",
        "try:\n    raise InputError('handled')\nexcept InputError:\n    raise KeyError('a fault of ours') from None",
    ],
)
def test_other_errors_keep_their_traceback(code):
    ended = run(code)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "KeyError: 'a fault of ours'" in ended.stderr
    assert "error: handled" not in ended.stderr


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        ("OSError(27, 'File too large')", "warning: in the background: [Errno 27] File too large\n"),
        ("InputError('no\\nscan')", "warning: in the background: no scan\n"),
        ("KeyError('a fault of ours')", "Traceback"),
    ],
)
def test_what_ends_a_thread_is_a_warning_of_one_line_unless_it_is_a_fault_of_ours(raised, shown):
    ended = run(f"import threading\ndef fail(): raise {raised}\nt = threading.Thread(target=fail)\nt.start(); t.join()")
    assert ended.returncode == 0
    assert ended.stderr == shown if shown.endswith("\n") else shown in ended.stderr


def test_root_is_the_first_input_error_of_a_chain():
    root, middle, top = InputError("root"), InputError("middle"), RuntimeError("top")
    top.__cause__, middle.__context__ = middle, root
    assert root_input_error(top) is root
    assert root_input_error(middle) is root
    assert root_input_error(RuntimeError("alone")) is None
    assert root_input_error(None) is None
    root.__context__ = top  # a circle, which Python itself allows
    assert root_input_error(top) is root


def refuse(item: int) -> int:
    raise InputError(f"scan {item} is empty: remove it.")


@pytest.mark.parametrize("workers", [0, 1])
def test_input_error_of_a_transform_is_found_whichever_process_it_ran_in(workers):
    """From MONAI's wrapping in this process, and from the text that a data loader's worker sends home."""
    loader = DataLoader(Dataset([7], Compose([refuse])), num_workers=workers)
    with pytest.raises(Exception, match=r"scan 7|applying transform") as error:
        next(iter(loader))
    assert str(root_input_error(error.value)) == "scan 7 is empty: remove it."


def test_ctrl_c_is_one_line_that_says_how_to_go_on_with_status_130():
    ended = run(
        "from shared_iopfl.utils.errors import when_interrupted\nwhen_interrupted('go on')\nraise KeyboardInterrupt"
    )
    assert ended.returncode == 130
    assert ended.stderr == "interrupted: go on\n"


def test_the_process_of_another_program_keeps_its_hooks():
    """Such as MONAI Label, a client of MONAI FL, a notebook, or pytest."""
    hooks = sys.excepthook, threading.excepthook
    one_line_errors()
    assert (sys.excepthook, threading.excepthook) == hooks
