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
"""Time limits of sites, damaged checkpoints, and privacy filters of what a site sends."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_clients import FakeClient, State, by_hand, equal, fakes, make  # noqa: F401
from interrupted import BUNDLE, TinyRun

from shared_iopfl.federation.client import SiteClient, time_limit
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows

# ---- hanging --------------------------------------------------------------------------------------------------------


def sleep() -> None:
    time.sleep(60)


def spin() -> None:
    while True:
        pass


def wait_for_a_worker() -> None:
    queue.Queue().get()


def wait_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_a_file() -> None:
    """As for a mounted folder whose server does not answer."""
    reading, _ = os.pipe()
    os.read(reading, 1)


def wait_for_a_process() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=False)


def try_again_and_again() -> None:
    """As library code that ignores the first exception."""
    try:
        time.sleep(60)
    except Exception:
        time.sleep(60)


HANGS: list[Callable[[], None]] = [
    sleep, spin, wait_for_a_worker, wait_for_a_lock, wait_for_a_file, wait_for_a_process, try_again_and_again,
]  # fmt: skip


@pytest.mark.parametrize("hang", HANGS)
def test_code_that_hangs_is_interrupted_and_the_alarm_is_restored(hang):
    before, began = signal.getsignal(signal.SIGALRM), time.perf_counter()
    with pytest.raises(InputError, match=r"site 'B' has taken more than its 0\.1 seconds"), time_limit("B", 0.1):
        hang()
    assert time.perf_counter() - began < 10
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_code_within_the_time_limit_is_not_interrupted():
    for seconds in (0, 30):
        with time_limit("B", seconds):
            time.sleep(0.01)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(KeyError), time_limit("B", 30):
        raise KeyError
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("method", ["train", "validate"])
def test_round_continues_without_a_site_that_hangs_and_the_site_rejoins(method, tmp_path, monkeypatch):
    """If it hangs in training, it has no part in that round; if it hangs in validation, its update is averaged."""
    expected, _ = by_hand(tmp_path / "hand", {2: "B"} if method == "train" else {})
    original, calls = getattr(FakeClient, method), iter(range(100))

    def hanging(self: FakeClient, weights: Any) -> Any:
        result = original(self, weights)
        if self.site == "B" and next(calls) == 1:
            time.sleep(60)
        return result

    monkeypatch.setattr(FakeClient, method, hanging)
    began = time.perf_counter()
    assert equal(make(tmp_path / "run", site_timeout=1).run(), expected)
    assert time.perf_counter() - began < 30
    [failure] = read_rows(tmp_path / "run" / "failures.csv")
    assert failure["site"] == "B" and "site_timeout" in failure["reason"]
    assert failure["round"] == ("2" if method == "train" else "1")


@pytest.mark.usefixtures("fakes")
def test_site_that_hangs_ends_a_run_that_requires_all_sites(tmp_path, monkeypatch):
    """The error is one line, and the run can be resumed from the round before."""
    whole, train = make(tmp_path / "whole").run(), FakeClient.train

    def hanging(self: FakeClient, weights: Any) -> State:
        update = train(self, weights)
        return time.sleep(60) if (self.site, self.epoch) == ("B", 2) else update  # type: ignore[return-value]

    with monkeypatch.context() as patch:
        patch.setattr(FakeClient, "train", hanging)
        with pytest.raises(InputError, match="site 'B' has taken more than its 1 seconds"):
            make(tmp_path / "run", min_sites=0, site_timeout=1).run()
    assert equal(make(tmp_path / "run", min_sites=0, resume=True).run(), whole)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("wrong", [-1, float("nan")])
def test_time_limits_out_of_range_are_refused(wrong, tmp_path):
    with pytest.raises(InputError, match="site_timeout must be"):
        make(tmp_path, site_timeout=wrong)


@pytest.mark.usefixtures("fakes")
def test_time_limit_needs_the_main_thread(tmp_path):
    caught: list[Exception] = []

    def elsewhere() -> None:
        try:
            make(tmp_path, site_timeout=1)
        except InputError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_bit(content: bytes) -> bytes:
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def nothing(content: bytes) -> bytes:
    return b""


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("spoil", [cut, flip_a_bit, nothing])
def test_damaged_checkpoint_costs_one_round(spoil, tmp_path, monkeypatch, caplog):
    """The checkpoint before is loaded, and the results are those of an uninterrupted run."""
    whole = make(tmp_path / "whole", rounds=4).run()
    folder = tmp_path / "run"
    run = make(folder, rounds=4)
    run.start()
    for _ in range(3):
        run.run_round()
    run.checkpoint.write_bytes(spoil(run.checkpoint.read_bytes()))
    again = make(folder, rounds=4, resume=True)
    with caplog.at_level("WARNING"):
        again.start()
    assert again.round == 2 and not run.checkpoint.exists()
    assert str(run.checkpoint) in caplog.text
    assert equal(make(folder, rounds=4, resume=True).run(), whole)


@pytest.mark.usefixtures("fakes")
def test_new_run_removes_the_checkpoint_of_an_earlier_one(tmp_path):
    make(tmp_path, rounds=3).run()
    run = make(tmp_path, rounds=3)
    run.start()
    run.run_round()
    assert run.checkpoint.is_file() and not run.previous.exists()


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_flipped_bit_in_a_model_is_detected_without_a_manifest(at, tmp_path):
    torch.save({"w": torch.randn(1000)}, tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    content[int(at * len(content))] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|checksum"):
        load_weights(tmp_path / "model.pt")


# ---- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_filters_are_applied_only_to_what_a_site_sends(tmp_path):
    """With filters, a site sends a part of its changes; its personalised model is the same as without them."""
    tiny = TinyRun.make(tmp_path / "sites")
    open_run, filtered = (tiny.federation(tmp_path / name, rounds=1, filters=name) for name in ("", "fl_filters"))
    sent: dict[str, dict[str, State]] = {}
    for run in (open_run, filtered):
        run.start()
        sent[run.overrides["filters"]] = {site: client.train(run.weights) for site, client in run.clients.items()}
    old = open_run.weights
    withheld = []
    for site in "AB":
        full, part = sent[""][site], sent["fl_filters"][site]
        assert list(full) == list(part)
        for key, tensor in part.items():
            if tensor.is_floating_point():
                low, high = torch.minimum(old[key], full[key]), torch.maximum(old[key], full[key])
                assert ((tensor >= low - 1e-6) & (tensor <= high + 1e-6)).all(), key
                if not torch.equal(full[key], old[key]):  # the running statistics have not been trained
                    withheld.append(float(((tensor - old[key]).abs() < 1e-8).float().mean()))
        assert equal(filtered.clients[site].personalised, open_run.clients[site].personalised)
    assert (
        0.1 < sum(withheld) / len(withheld) < 0.4
    )  # a tenth is withheld as the smallest changes, and a tenth at random
    key = "conv_0.conv_0.conv.weight"
    drawn = [(sent["fl_filters"][site][key] - old[key]).abs() < 1e-8 for site in "AB"]
    assert not torch.equal(*drawn)
    filtered.run()
    assert torch.isfinite(torch.cat([tensor.flatten().float() for tensor in filtered.weights.values()])).all()


@pytest.mark.parametrize("name", ["none_such", "../configs/fl_filters", "/etc/passwd"])
def test_filters_that_are_not_of_the_bundle_are_refused(name, tmp_path):
    """A server may choose the name, and the config is executed."""
    with pytest.raises(InputError, match="no filters"):
        SiteClient(str(BUNDLE), "A", 1, {"filters": name, "dataset_dir": str(tmp_path)})
