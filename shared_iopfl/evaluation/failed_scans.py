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
"""Inference and evaluation that continue after a scan has failed, and list it in ``failed.csv``.

In training, a scan that cannot be loaded ends the run, so that no case is left out unnoticed.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ignite.engine import Events
from monai.data import CacheDataset, Dataset, list_data_collate
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.handlers import from_engine
from monai.utils import CommonKeys, ensure_tuple

from shared_iopfl.data.loading import reason
from shared_iopfl.data.scan_names import case_name, printable
from shared_iopfl.evaluation.records.growing_tables import ServedEvents
from shared_iopfl.evaluation.records.outputs import OutputWriter
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.files import check_writable
from shared_iopfl.utils.tables import write_rows

logger = logging.getLogger(__name__)
FAILURES = "failures"  # key of the failures in a batch
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NAMED = 20  # largest number of scans that a line names


class Failure(NamedTuple):
    """A scan that got no mask.

    Attributes:
        case: Name of the case.
        file: Path of the scan.
        reason: Reason in one line.
    """

    case: str
    file: str
    reason: str

    @classmethod
    def of(cls, case: str | None, file: Any, error: Exception) -> Failure:
        """Return the failure of one case, with the reason in one line."""
        cause = root_input_error(error)
        if cause is not None:
            line = " ".join(str(cause).split())
        else:
            *_, deepest = _chain(error)
            line = f"{type(deepest).__name__}: {reason(deepest)}"  # type: ignore[arg-type]
        path = str(ensure_tuple(file)[0])
        return cls(*map(printable, (case or case_name(path), path, line)))


class TolerantDataset(Dataset):
    """A dataset in which a scan that cannot be loaded becomes a `Failure`; see `tolerant_collate`.

    The error of the only scan of a dataset is raised, as no other scan remains; so is a lack of memory.

    Args:
        data: Cases with the path of their scan under `image_key`.
        transform: Transform that loads them.
        image_key: Key of the scan.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Any = None, image_key: str = "image") -> None:
        super().__init__(data, transform)
        self.image_key = image_key

    def _transform(self, index: int) -> Any:
        try:
            return super()._transform(index)
        except Exception as error:
            if len(self) == 1 or _is_hopeless(error):
                raise
            return Failure.of(self.data[index].get("case"), self.data[index][self.image_key], error)


class NamingCacheDataset(CacheDataset):
    """A `CacheDataset` that reports all cases that cannot be loaded; MONAI's reports the first one.

    Raises:
        InputError: When all cases have been tried and at least one failed.
    """

    def _fill_cache(self, indices: Any = None) -> list[Any]:
        cache = super()._fill_cache(indices)
        reasons = [item.reason for item in cache if isinstance(item, Failure)]
        if reasons:
            raise InputError("; ".join(reasons[:NAMED]) + f"; and {len(reasons) - NAMED} more" * (len(reasons) > NAMED))
        return cache

    def _load_cache_item(self, idx: int) -> Any:
        try:
            return super()._load_cache_item(idx)
        except Exception as error:
            if _is_hopeless(error) or root_input_error(error) is None:
                raise
            return Failure.of(self.data[idx].get("case"), self.data[idx]["image"], error)


def tolerant_collate(items: Sequence[Any]) -> dict[str, Any]:
    """Return the batch of the scans that could be loaded, which may be empty, with the failures of the others."""
    loaded = [item for item in items if not isinstance(item, Failure)]
    failures = [item for item in items if isinstance(item, Failure)]
    batch = list_data_collate(loaded) if loaded else {CommonKeys.IMAGE: torch.empty(0)}
    return {**batch, FAILURES: failures} if failures else batch


def from_scored(keys: Sequence[str]) -> Callable[[Any], Any]:
    """Return `monai.handlers.from_engine` for metrics, also for iterations without a case, whose scan failed."""
    items = from_engine(keys)
    return lambda output: items(output) if output else tuple([] for _ in keys)


class ScanWriter(OutputWriter):
    """An `OutputWriter` within the iteration, so that only the scan fails whose mask cannot be written."""

    def attach(self, engine: Any) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)


class TolerantEvaluator(SupervisedEvaluator):
    """An evaluator that continues with the next scan if one cannot be loaded, segmented or written.

    ``failed.csv`` in `output_dir` lists each failed scan immediately, with case, file and reason; without failures
    there is no such file. After all scans, the run ends with an `InputError` that gives the number of failures, and so
    with a status other than 0.

    An empty mask is kept, and its scan is named in the log and at the end of the run. It also leads to a status other
    than 0, as in most tasks every scan shows the target, unless `empty_masks` allows it.

    A lack of memory, and an `output_dir` that is full or not writable, are not errors of a scan and end the run at
    once. The scans of a batch fail together.

    Args:
        output_dir: Folder of ``failed.csv``.
        strict: Whether failures end the run with an `InputError`. Otherwise only a run in which all scans failed ends
            with it, and the caller finds the failures in `failures`.
        empty_masks: "fail" if every scan shows the target, or "allow".
        args, kwargs: As in `SupervisedEvaluator`; the loader uses a `TolerantDataset` and `tolerant_collate`.
    """

    def __init__(
        self,
        *args: Any,
        output_dir: str | os.PathLike,
        strict: bool = True,
        empty_masks: str = "allow",
        **kwargs: Any,
    ) -> None:
        check_values({"empty_masks": empty_masks})
        kwargs["event_names"] = [*(kwargs.get("event_names") or ()), ServedEvents]
        super().__init__(*args, **kwargs)
        self.strict = strict
        self.output_dir = Path(output_dir)
        self.empty_masks = empty_masks
        self.failures: list[Failure] = []
        self.empty: list[str] = []  # cases with an empty mask
        # after the handlers that load the models, so that an invalid model leaves an earlier run intact
        self.add_event_handler(Events.STARTED, lambda: self.failed_csv.unlink(missing_ok=True))

    @property
    def failed_csv(self) -> Path:
        """Path of the table of the scans that failed."""
        return self.output_dir / "failed.csv"

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Process all scans.

        Raises:
            InputError: At the end, if there were failures or empty masks; the message gives their number.
        """
        self.failures, self.empty = [], []
        count = len(self.data_loader.dataset)  # type: ignore[union-attr, arg-type]
        try:
            super().run(global_epoch)
        except ValueError:  # raised by MONAI's metrics if there is nothing to aggregate
            if len(self.failures) < count:
                raise
        ends = []
        if self.failures and (self.strict or len(self.failures) == count):
            ends.append(f"{len(self.failures)} of {count} scans failed: see {self.failed_csv}")
        if self.empty and self.empty_masks == "fail":
            named = ", ".join(self.empty[:NAMED]) + (", ..." if len(self.empty) > NAMED else "")
            ends.append(
                f"{len(self.empty)} of {count} scans have an empty mask: {named}; if scans without the target are "
                "expected, set --empty_masks allow"
            )
        if ends:
            raise InputError("; ".join(ends))

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> Any:
        self._record(batchdata.pop(FAILURES, []))
        image = batchdata[CommonKeys.IMAGE]
        if not len(image):
            return self._nothing()
        files = ensure_tuple(image.meta["filename_or_obj"])
        cases = batchdata.get("case", [None] * len(files))
        try:
            outputs: Any = super()._iteration(engine, batchdata)
            self._note_empty(outputs, cases, files)
            return outputs
        except Exception as error:
            if len(self.data_loader.dataset) == 1 or _is_hopeless(error):  # type: ignore[union-attr, arg-type]
                raise
            if any(isinstance(cause, OSError) for cause in _chain(error)):
                check_writable(self.output_dir)  # an error of the folder ends the run
            logger.debug("failure of %s:", files, exc_info=True)
            self._record([Failure.of(case, file, error) for case, file in zip(cases, files)])
            return self._nothing()

    def _note_empty(self, outputs: Sequence[Mapping[str, Any]], cases: Sequence[str | None], files: Any) -> None:
        for output, case, file in zip(outputs, cases, files):
            if not torch.count_nonzero(output[CommonKeys.PRED]):
                self.empty.append(printable(case or case_name(str(file))))
                logger.warning("%s has an empty mask", self.empty[-1])

    def _nothing(self) -> list[dict[str, Any]]:
        """Return an iteration's output without a case, so that handlers write and record nothing."""
        if hasattr(self.inferer, "reports"):
            self.inferer.reports.clear()  # the report of the failed scan must not be taken for that of the next one
        self.state.batch = []
        self.fire_event(ServedEvents.SCAN_FAILED)
        return []

    def _record(self, failures: Sequence[Failure]) -> None:
        if failures:
            self.failures += failures
            write_rows(self.failed_csv, Failure._fields, [failure._asdict() for failure in self.failures])
        for failure in failures:
            logger.warning("%s failed: %s", failure.case, failure.reason)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, the first cause last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_hopeless(error: Exception) -> bool:
    """Return whether the next scan would fail for the same reason: no memory, or no space on the disk.

    If a reader cannot allocate the memory that a scan's header requires, it has rejected this scan by an `InputError`.
    """
    causes = list(_chain(error))
    if any(isinstance(cause, OSError) and cause.errno in DISK_FULL for cause in causes):
        return True
    if root_input_error(error) is not None:
        return False
    memory = (MemoryError, torch.OutOfMemoryError)
    return any(isinstance(cause, memory) or "allocate memory" in str(cause) for cause in causes)
