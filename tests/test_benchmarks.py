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
"""The benchmarks run, on tiny networks, and print what their readers expect; their figures mean nothing here."""

from __future__ import annotations

import json

import pytest
import torch
from networks import images, volume
from typed import typed

from benchmarks import accuracy, gpu
from benchmarks.networks import agree, make_experts, make_network, naive
from benchmarks.reference import NaiveInferer
from benchmarks.timing import _peak_resident
from shared_iopfl.data.phantoms.sites import make_prostate_sites
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.network import route
from shared_iopfl.routing.settings import preset
from shared_iopfl.utils import stacks
from shared_iopfl.utils.stacks import StackInferer

TINY = {
    "routing": ["--slices", "3", "--image_size", "32", "--batch_size", "2"],
    "adaptation": ["--slices", "2", "--image_size", "32", "--memory_slices", "2", "--memory_size", "32"],
    "training": ["--image_size", "32", "--cases", "4"],
    "scaling": ["--slices", "2", "--image_size", "32", "--many", "5", "--few", "2"],
    "options": ["--slices", "2", "--image_size", "32", "--compiled", "False"],
    "startup": ["--image_size", "32", "--experts", "3"],
}


def run(*arguments):
    """The object that a benchmark prints."""
    return json.loads(typed("-m", "benchmarks", *map(str, arguments)).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_benchmark_prints_one_object_with_ratios_machine_and_versions(name):
    found = run(name, "--features", 4, "--repeats", 1, *TINY[name])
    assert found["benchmark"] == name and found["machine"]["device"] == "cpu" and found["versions"]["torch"]
    assert all(difference <= 1e-4 for kind, difference in found["differences"].items() if kind != "bf16")
    for ratio in found["ratios"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]


@pytest.mark.slow
def test_accuracy_scores_both_paths_on_each_site_with_an_expert(tmp_path):
    make_prostate_sites(tmp_path / "sites", ["A", "B"], cases=1, size=(32, 32, 8))
    network = make_network(4, torch.device("cpu"))
    (tmp_path / "models").mkdir()
    for site, state in zip("ABC", make_experts(network, 3).values()):
        torch.save(state, tmp_path / "models" / f"model_{site}.pt")
    torch.save(network.state_dict(), tmp_path / "models" / "model.pt")
    folders = {"dataset_dir": str(tmp_path / "sites"), "ckpt_dir": str(tmp_path / "models")}
    found = accuracy.measure(**folders, cases=1, image_size=32, features=4)
    assert set(found["dice_points"]) == {"A", "B"}
    for points in found["dice_points"].values():
        assert 0 <= points["fast"] <= 100 and points["largest_difference"] < 0.2


@pytest.mark.slow
def test_memory_of_a_federation_is_measured():
    found = run("training", "--memory", "--image_size", 32, "--features", 4)
    assert set(found["peak_memory_gib"]) == {"data", "round"}
    assert all(0 < peak < 8 for peak in found["peak_memory_gib"].values())


@pytest.mark.slow
def test_the_script_for_machines_with_cuda_trains_both_tasks(tmp_path):
    """On a CPU and tiny networks; its tests and benchmarks are run by other tests."""
    gpu.measure(str(tmp_path), device="cpu", rounds=1, only="training", quick=True)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    for task in ("prostate", "fundus"):
        assert found["training"][task]["status"] == 0
        assert {"inside global", "outside routed"} <= set(found["training"][task]["scores"])
        assert f"| {task} | " in (tmp_path / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_the_script_for_machines_with_cuda_says_where_there_is_none(tmp_path):
    with pytest.raises(SystemExit, match="no CUDA"):
        gpu.measure(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_benchmark_that_failed_is_named_on_the_page():
    spread = {"median": 1.0, "min": 0.9, "max": 1.1}
    found = {
        "machine": {"device": "cuda", "cpu": "some", "gpu": "H100"},
        "versions": {"torch": "2"},
        "quick": False,
        "tests": {
            "status": 1,
            "seconds": 3.0,
            "log": "tests.log",
            "tests": 9,
            "failures": 1,
            "errors": 0,
            "skipped": 0,
        },
        "benchmarks": {
            "routing": {"status": 0, "log": "routing.log", "ratios": {"sample": spread}, "seconds": {"plain": spread}},
            "scaling": {"status": 1, "seconds": 2.0, "log": "scaling.log"},
        },
        "training": {"fundus": {"status": 1, "seconds": 2.0, "log": "federation_fundus.log"}},
    }
    written = gpu.page(found)
    assert written.startswith("# Results on H100")
    assert "9 tests, 1 failures" in written and "exit status 1" in written
    assert "| routing | sample, ratios | 1.0 | 0.9 | 1.1 |" in written
    assert "| scaling | failed, see scaling.log" in written
    assert "| fundus | 2.0 | failed, see federation_fundus.log |" in written


def test_the_peak_of_a_process_does_not_contain_that_of_its_parent():
    held = bytearray(2**29)  # half a GiB, touched
    held[:: 2**12] = b"1" * len(held[:: 2**12])
    code = "import torch; from benchmarks.timing import print_peak; print_peak(torch.device('cpu'))"
    of_child = float(typed("-c", code).stdout)
    assert _peak_resident() > 0.5 and of_child < _peak_resident()


def test_a_benchmark_that_prints_no_json_does_not_stop_the_others(tmp_path, monkeypatch):
    told = {"status": 0, "seconds": 1.0, "log": "routing.log", "stdout": "a library's banner\n{"}
    monkeypatch.setattr(gpu, "_run", lambda *_: dict(told))
    result = gpu._benchmark("routing", tmp_path, [])
    assert result["status"] and result["log"] == "routing.log"


def test_nothing_is_timed_where_fast_and_naive_path_differ():
    one = torch.ones(2)
    assert agree(one, one + 1e-6) > 0
    with pytest.raises(SystemExit, match="differ by"):
        agree(one, one + 1e-2)


@pytest.mark.parametrize("per", ["sample", "volume", "layer"])
def test_fast_paths_and_the_naive_loop_agree(per):
    """A loop over samples and experts, each layer on its own: the same masks as the paths that are fast."""
    network = make_network(4, torch.device("cpu"))
    routed = route(network, {"global": network.state_dict(), **make_experts(network, 3)}, per=per, random=True)
    inputs = images(3, 3, 32, 32)
    with torch.no_grad():
        expected = naive(routed)(inputs)
        torch.testing.assert_close(routed(inputs), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(routed(inputs), expected, atol=1e-4, rtol=1e-4)  # with gradients: another path


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        preset(),
        preset("default", {"statistics": 1.0, "views": "judge"}),
        preset("default", {"statistics": [0.0, 0.5]}),
        preset("default", {"views": "none"}),
        preset("soup"),
        preset("paper", {"steps": 0}),
    ],
)
def test_fast_inferer_and_the_naive_one_agree(settings):
    """Distances, statistics, kernels and views: each in batches and at once, and each slice, expert and view alone."""
    network = make_network(4, torch.device("cpu"))
    scan = volume(
        20 if settings.per == "layer" else stacks.SCAN_SLICES
    )  # routers see all slices at once, also those not measured on
    masks = [
        kind(make_experts(network, 3), settings=settings, flips=(0,))(scan, network)
        for kind in (TestTimeRoutingInferer, NaiveInferer)
    ]
    torch.testing.assert_close(*masks, atol=1e-4, rtol=1e-4)


def test_networks_get_images_channels_last_turned_ones_too():
    seen = []

    def network(inputs):
        seen.append(inputs.is_contiguous(memory_format=torch.channels_last))
        return inputs

    pictures = images(2, 3, 8, 8)
    turned = torch.rot90(pictures.contiguous(memory_format=torch.channels_last), 1, (2, 3))
    for batch in (pictures, turned):
        assert torch.equal(StackInferer(None)(batch, network), batch)
    assert seen == [True] * 4


@torch.no_grad()
def test_scans_of_large_slices_are_measured_on_fewer(monkeypatch):
    """A bound on the pixels of the forward that sees a scan's slices together: the memory of an episodic mask."""
    measured = []

    class Recording(TestTimeRoutingInferer):
        def _distances(self, some, network, models):
            measured.append(len(some))
            return super()._distances(some, network, models)

    network = make_network(4, torch.device("cpu"))
    inferer = Recording(make_experts(network, 1))
    inferer(volume(20), network)
    monkeypatch.setattr(stacks, "SCAN_PIXELS", 7 * 32 * 32)
    inferer(volume(20), network)
    assert measured == [stacks.SCAN_SLICES, 7]
