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
"""Python programs as a user types them, each in a process of its own that has no libraries to import any more.

Torch and MONAI take seconds to import, the same for every program. One process per run of the tests imports them and
does nothing else; a program is a copy of that process: nothing is left in it of the tests or of other programs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED_ALREADY = (
    *("torch.utils.tensorboard", "torch.nn.parallel", "monai.bundle", "monai.engines", "monai.fl.client"),
    *("ignite.handlers", "nibabel", "PIL.Image", "scipy.ndimage", "skimage.measure", "matplotlib.figure"),
)
SECONDS = 900  # that a program may take


class Programs:
    """Runs programs as one interpreter does.

    Args:
        python: the interpreter; of an environment of its own, it knows what is installed there.
        paths: where modules are found besides.
    """

    def __init__(self, python: str | Path = sys.executable, paths: Sequence[Path] = (ROOT, ROOT / "tests")) -> None:
        self.python = str(python)
        self.paths = [str(path) for path in paths]

    def run(
        self,
        *words: str | Path,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python WORDS``, as `subprocess.run` does with the text of its two outputs captured.

        Args:
            words: ``-m MODULE``, ``-c CODE`` or the path of a script, and what the program is given.
            cwd: the folder that it runs in.
            environment: variables on top of this process's; what ``PYTHONPATH`` names comes before `paths`.
            stdin: the text of its standard input.
        """
        given = {**self._environment, **(environment or {})}
        given["PYTHONPATH"] = os.pathsep.join(filter(None, [(environment or {}).get("PYTHONPATH"), *self.paths]))
        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as readers:
            files = [Path(name) / stream for stream in ("stdin", "stdout", "stderr")]
            files[0].write_text(stdin, encoding="utf-8")
            for file in files[1:]:
                os.mkfifo(file)
            texts = readers.map(partial(Path.read_text, encoding="utf-8"), files[1:])
            request = {"words": list(map(str, words)), "cwd": str(cwd), "environment": given}
            request["files"] = [str(file) for file in files]
            asked, answers = self._process.stdin, self._process.stdout
            assert asked is not None and answers is not None
            print(json.dumps(request), file=asked, flush=True)
            status = int(answers.readline())
            said, told = texts
        return subprocess.CompletedProcess([self.python, *request["words"]], status, said, told)

    @property
    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return {**kept, "OMP_NUM_THREADS": "1"}

    @cached_property
    def _process(self) -> subprocess.Popen[str]:
        """The process that programs are copies of; it ends when this one does, as nobody writes to it any more."""
        command = [self.python, __file__]
        return subprocess.Popen(
            command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )


typed = Programs().run  # as a user of this environment and of a checkout types it


def run_bundle(root: str | Path, config: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m monai.bundle run`` on a bundle's config with settings as a user types them."""
    files = {"config_file": f"{root}/configs/{config}.json", "bundle_root": root}
    return typed("-m", "monai.bundle", "run", *as_options({**files, **settings}))


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command: ``--name value``."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def _next_program() -> list[str]:
    """Answer requests with the status of a copy of this process, in which this function returns the program."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(**request)
            return request["words"]
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _become(words: Sequence[str], cwd: str, environment: Mapping[str, str], files: Sequence[str]) -> None:
    """Let this process be as ``python WORDS`` finds it."""
    signal.alarm(SECONDS)
    for number, (file, mode) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
        os.dup2(os.open(file, mode), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    first = cwd if words[0].startswith("-") else str(Path(words[0]).parent)
    given = [path for path in environment["PYTHONPATH"].split(os.pathsep) if path]
    sys.path[:] = [first, *given, *sys.path[1:]]  # without the folder of this file
    sys.argv = list(words[1:] if words[0] in ("-m", "-c") else words)


def _run(words: Sequence[str]) -> None:
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv[0] = "-c"
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for module in IMPORTED_ALREADY:
        importlib.import_module(module)
    gc.freeze()
    _run(_next_program())
