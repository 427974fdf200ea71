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
"""The federation in the processes of NVIDIA FLARE: simulated, on loopback and provisioned, with sites that fail."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed: pip install '.[flare]'")

import psutil  # comes with nvflare
from faulty_sites import faulty_bundle
from flare_runs import BUNDLE, REPOSITORY, SITES, TINY, assert_same, figures, make_sites, matrix, one_process

from shared_iopfl.federation.simulation import Federation
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.tables import read_rows

pytestmark = pytest.mark.slow

GUIDE = REPOSITORY / "docs" / "flare.md"
ADMIN = "admin@coordinator.example"
# used as sitecustomize.py, it copies every frame that FLARE's simulator receives
RECORDER = """
import os, sys

if "nvflare.private.fed.app.simulator.simulator" in sys.orig_argv:
    import multiprocessing
    from nvflare.fuel.f3.sfm.conn_manager import ConnManager

    multiprocessing.set_start_method("fork")  # its server is a forked child; the processes of the sites are not
    process_frame = ConnManager.process_frame

    def recorded(self, connection, frame):
        with open(os.path.join(os.environ["RECORDED"], str(os.getpid())), "ab") as file:
            file.write(bytes(frame))
        return process_frame(self, connection, frame)

    ConnManager.process_frame = recorded
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    hook, threads, benchmark = sys.excepthook, torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(1)  # the same order of sums in this process and in those that a test starts
    yield
    sys.excepthook, torch.backends.cudnn.benchmark = hook, benchmark
    torch.set_num_threads(threads)
    set_determinism(None)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a one-process run of two rounds with the config of the bundle, scored and with a report."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    given = {**TINY, "sites": SITES, "rounds": 2, "dataset_dir": str(dataset), "output_dir": str(folder)}
    given = {name: value for name, value in given.items() if name != "tensorboard"}
    threads, hook = torch.get_num_threads(), sys.excepthook
    torch.set_num_threads(1)
    config = str(BUNDLE / "configs" / "federate.json")
    run = ConfigWorkflow(config, meta_file=None, logging_file=False, bundle_root=str(BUNDLE), device="cpu", **given)
    run.initialize()
    run.run()
    run.finalize()
    sys.excepthook = hook
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def network_of_its_own() -> list[str]:
    """A command that runs a shell in its own network, because FLARE's server uses fixed ports of all addresses."""
    refused = ""
    for how in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        try:
            subprocess.run([*how, "ip", "link", "set", "lo", "up"], capture_output=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError) as error:
            refused = str(error)
        else:
            return [*how, "sh", "-ec"]
    pytest.skip(f"no network namespace: {refused}")


def words(output_dir: Path, env: str, rounds: int, *options: str, bundle: Path = BUNDLE, sites: Sequence[str] = SITES):
    """The command as a user types it, after ``python -m shared_iopfl``."""
    given = ["flare", "--bundle", str(bundle), "--sites", str(sites), "--rounds", str(rounds), "--env", env]
    given += ["--output_dir", str(output_dir), "--device", "cpu", *options]
    return given + [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


def start(given: Sequence[str], home: Path) -> subprocess.Popen:
    """Start the command ``flare``, or any other; its output is in ``<home>.log``."""
    home.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "PYTHONPATH": paths, "PATH": programs}
    command = [sys.executable, "-m", "shared_iopfl", *given] if given[0] == "flare" else given
    with open(f"{home}.log", "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def end(process: subprocess.Popen) -> None:
    """End a command and all its descendants: FLARE's processes have sessions of their own."""
    for member in [process, *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()
    process.wait()


def run_command(given: Sequence[str], home: Path) -> str:
    """The output of the command, which must succeed."""
    process = start(given, home)
    try:
        process.wait(timeout=900)
    finally:
        if process.poll() is None:
            end(process)
    said = Path(f"{home}.log").read_text()
    assert process.returncode == 0, said[-3000:]
    return said


def files(folder: Path) -> set[str]:
    """The files of a run, except for FLARE's workspace and the folders of the sites."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in paths if path.split("/")[0] not in ("flare", "sites", "tensorboard")}


def assert_finished(output_dir: Path, whole: Path, one_machine: bool = True, published: bool = False) -> None:
    """Check for the weights, metrics and files of the one-process run, and the place of each personalised model."""
    assert_same(load_weights(output_dir / "models" / "model.pt"), load_weights(whole / "models" / "model.pt"))
    assert figures(output_dir) == figures(whole)
    assert {row["model"] for row in read_rows(output_dir / "history.csv")} == {"local", "global", "personalised"}
    for name in ("shares", "scores"):
        found, there = (json.loads((folder / "models" / f"{name}.json").read_text()) for folder in (output_dir, whole))
        keys = list(there) if name == "shares" or published else ["usual_shift"]
        assert found == pytest.approx({key: there[key] for key in keys}, rel=1e-5)
    expected = (files(whole) - {"federation.pt", "federation_previous.pt"}) | {"flare.pt"}
    if not published:  # the models stay at the sites
        expected -= {*(f"models/model_{site}.pt" for site in SITES), "cross_site.csv"}
    if one_machine:
        for site in SITES:
            own = load_weights(output_dir / "sites" / site / f"model_{site}.pt")
            assert_same(own, load_weights(whole / "models" / f"model_{site}.pt"))
        assert read_rows(output_dir / "metrics.csv") == read_rows(whole / "metrics.csv")
    else:
        expected -= {path for path in expected if path.startswith(("masks/", "metrics.", "summary.", "cases."))}
    assert files(output_dir) == expected
    assert list((output_dir / "tensorboard").iterdir())
    assert json.loads((output_dir / "run.json").read_text())["settings"]["seed"] == TINY["seed"]
    kept_by_flare = {path.name for path in (output_dir / "flare").rglob("*.pt")}
    known = {"model.pt", "flare.pt"} | {path.removeprefix("models/") for path in expected if path.endswith(".pt")}
    assert kept_by_flare <= known, "FLARE's processes and the server hold no personalised model that is not published"


def test_simulator_gives_the_results_of_one_process_and_its_server_receives_nothing_personal(
    dataset, whole, tmp_path, monkeypatch
):
    """Property 5, with FLARE's simulator; the test searches every byte that its server receives."""
    for name in ("received", "recorder"):
        (tmp_path / name).mkdir()
    (tmp_path / "recorder" / "sitecustomize.py").write_text(RECORDER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "recorder"))
    monkeypatch.setenv("RECORDED", str(tmp_path / "received"))
    options = ("--dataset_dir", str(dataset), "--tracking", "tensorboard")
    run_command(words(tmp_path / "out", "sim", 2, *options), tmp_path / "home")
    assert_finished(tmp_path / "out", whole)
    streamed = {path.parent.name for path in (tmp_path / "out" / "flare").rglob("tb_events/*/events.*")}
    assert streamed == set(SITES), "the server keeps the figures of each site as they come"
    received = b"".join(path.read_bytes() for path in (tmp_path / "received").iterdir())
    shared = load_weights(tmp_path / "out" / "models" / "model.pt")
    for site in SITES:
        own = load_weights(tmp_path / "out" / "sites" / site / f"model_{site}.pt")
        # all sites have the same running statistics, up to rounding, and a site may have kept the global model
        different = [key for key in shared if own[key].numel() > 8 and not torch.allclose(own[key], shared[key])]
        sent = [key for key in different if own[key].numpy().tobytes() in received]
        assert not sent, f"{site}'s model has left it: {sent}"
    assert b"train_loss" in received, "the recording does hold what the sites send"
    assert b"upcat_4.upsample.deconv.weight" in received
    for private in (b"Case0", b".nii", b"training.log", str(dataset).encode(), b"/sites/A"):
        assert private not in received, private


def first_round_is_done(workspace: Path) -> bool:
    """Whether the server has written a model and then the checkpoint of its round."""
    models = list(workspace.rglob("iopfl/models/model.pt"))
    return any((path.parents[1] / "flare.pt").stat().st_mtime_ns >= path.stat().st_mtime_ns for path in models)


def test_simulation_that_was_killed_and_resumed_gives_the_same_weights(dataset, tmp_path):
    federation = one_process(tmp_path / "one", dataset, rounds=4)
    given = words(tmp_path / "flare", "sim", 4, "--dataset_dir", str(dataset), "--publish", "True")
    process = start(given, tmp_path / "home")
    deadline = time.monotonic() + 600
    while not first_round_is_done(tmp_path / "flare" / "flare"):
        if process.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    end(process)
    assert not (tmp_path / "flare" / "models" / "model.pt").exists(), "killed too late to prove anything"
    said = run_command([*given, "--resume", "True"], tmp_path / "again")
    assert "Round 1 of 4" not in said
    assert "Round 4 of 4" in said
    assert_continued(tmp_path / "flare", federation)
    assert matrix(tmp_path / "flare") == pytest.approx(matrix(tmp_path / "one"), abs=1e-5)
    for site, client in federation.clients.items():
        assert_same(load_weights(tmp_path / "flare" / "models" / f"model_{site}.pt"), client.personalised)


def assert_continued(output_dir: Path, federation: Federation) -> None:
    """Check for the global model, all personalised models and the history of a one-process run."""
    assert_same(load_weights(output_dir / "models" / "model.pt"), federation.weights)
    assert figures(output_dir) == figures(federation.output_dir)
    for site, client in federation.clients.items():
        assert_same(load_weights(output_dir / "sites" / site / f"model_{site}.pt"), client.personalised)


def test_rounds_continue_without_a_site_that_raises_dies_hangs_or_sends_nan_and_the_site_rejoins(tmp_path):
    """The results are those of one process in which the same sites raise in the same rounds."""
    sites = ["A", "B", "C"]
    dataset = make_sites(tmp_path / "sites", sites)
    # by round: B raises and C dies in the 2nd, A hangs in the 3rd, B sends NaN in the 4th
    plan = {"A": {"3": "hang"}, "B": {"2": "raise", "3": "nan"}, "C": {"2": "kill"}}
    tame = {site: {epoch: fault if fault == "nan" else "raise" for epoch, fault in plan[site].items()} for site in plan}
    for name in ("one", "flare"):
        (tmp_path / name).mkdir()
    bundle = faulty_bundle(BUNDLE, tmp_path / "one", tame)
    federation = one_process(tmp_path / "one" / "out", dataset, 5, bundle, sites, min_sites=1)
    bundle = faulty_bundle(BUNDLE, tmp_path / "flare", plan)
    options = ["--dataset_dir", str(dataset), "--min_sites", "1", "--round_timeout", "90", "--own_process", "True"]
    given = words(tmp_path / "flare" / "out", "sim", 5, *options, bundle=bundle, sites=sites)
    given[given.index("--val_interval") + 1] = "5"
    said = run_command(given, tmp_path / "home")
    marks = sorted(path.name for path in (tmp_path / "flare" / "gone_wrong").iterdir())
    assert marks == ["A_3_hang", "B_2_raise", "B_3_nan", "C_2_kill"]
    left_out = [("2", "B"), ("2", "C"), ("3", "A"), ("4", "B")]
    for folder in (tmp_path / "one" / "out", tmp_path / "flare" / "out"):
        assert sorted((row["round"], row["site"]) for row in read_rows(folder / "failures.csv")) == left_out
    reasons = {(row["round"], row["site"]): row["reason"] for row in read_rows(tmp_path / "flare/out/failures.csv")}
    assert "RuntimeError" in reasons["2", "B"]
    assert "no answer" in reasons["3", "A"]
    assert "NaN" in reasons["4", "B"]
    for number, site in left_out:
        assert f"Round {number}: site '{site}' is left out" in said
    assert "Case00" not in "".join(reasons.values()), "what an error says stays at the site"
    assert "Case00" in (tmp_path / "flare" / "out" / "sites" / "B" / "training.log").read_text()
    assert_same(load_weights(tmp_path / "flare" / "out" / "models" / "model.pt"), federation.weights)
    for site, client in federation.clients.items():
        own = load_weights(tmp_path / "flare" / "out" / "sites" / site / f"model_{site}.pt")
        assert_same(own, client.personalised)


def test_simulation_continues_without_a_site_whose_scans_cannot_be_read(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "sites")
    for path in (tmp_path / "sites" / "B").glob("*_segmentation.nii.gz"):
        path.write_bytes(path.read_bytes()[:100])
    given = words(tmp_path / "flare", "sim", 2, "--dataset_dir", str(tmp_path / "sites"), "--min_sites", "1")
    run_command(given, tmp_path / "home")
    rows = read_rows(tmp_path / "flare" / "failures.csv")
    assert [(row["round"], row["site"]) for row in rows] == [("1", "B"), ("2", "B")]
    log = (tmp_path / "flare" / "sites" / "B" / "training.log").read_text()
    assert "_segmentation.nii.gz cannot be read" in log
    for path in (tmp_path / "flare" / "flare").rglob("*log*"):
        assert not path.is_file() or "_segmentation.nii.gz" not in path.read_text(), f"{path} names a scan"


def test_processes_that_communicate_over_loopback_give_the_results_of_one_process(
    dataset, whole, tmp_path, network_of_its_own
):
    """FLARE's proof of concept has a provisioned server, two clients and an admin, each with a certificate."""
    given = words(tmp_path / "out", "poc", 2, "--dataset_dir", str(dataset), "--publish", "True")
    command = shlex.join([sys.executable, "-m", "shared_iopfl", *given])
    run_command([*network_of_its_own, f"ip link set lo up; exec {command}"], tmp_path / "home")
    assert_finished(tmp_path / "out", whole, published=True)
    assert matrix(tmp_path / "out") == pytest.approx(matrix(whole), abs=1e-5)


@pytest.fixture
def kits(tmp_path: Path) -> Iterator[Path]:
    """The output of `nvflare provision` for the project of the guide; its processes are ended after the test."""
    project = GUIDE.read_text().split("```yaml\n")[1].split("```")[0]
    project = project.replace("server.coordinator.example", "localhost")
    for site, name in zip(SITES, ("BIDMC", "HK")):
        project = project.replace(f"name: {name},", f"name: {site},")
    (tmp_path / "project.yml").write_text(project)
    provision = ["nvflare", "provision", "-p", str(tmp_path / "project.yml"), "-w", str(tmp_path / "kits")]
    run_command(provision, tmp_path / "provision")
    yield tmp_path / "kits" / "iopfl" / "prod_00"
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path / "kits") in word for word in process.info["cmdline"] or ()):
            process.kill()


def start_kits(kits: Path, places: Mapping[str, Mapping[str, Path]]) -> str:
    """Shell commands that start every kit as described in the guide, and wait until the clients are connected."""
    lines = ["ip link set lo up", f"{kits}/localhost/startup/start.sh"]
    for site, of_site in places.items():
        said = " ".join(f"{name}={shlex.quote(str(place))}" for name, place in of_site.items())
        lines.append(f"env {said} {kits}/{site}/startup/start.sh")
    for site in places:
        lines.append(f"until grep -qs 'Successfully registered client' {kits}/{site}/log.txt; do sleep 1; done")
    return "; ".join(lines)


def test_provisioned_machines_give_the_weights_of_one_process(dataset, whole, tmp_path, kits, network_of_its_own):
    """Follows the guide: project, kits, and the commands of a site and of the admin; each site has its own folder."""
    places = {}
    for site in SITES:
        shutil.copytree(dataset / site, tmp_path / f"hospital_{site}" / "scans" / site)
        own = tmp_path / f"hospital_{site}"
        names = {"IOPFL_BUNDLE": BUNDLE, "IOPFL_DATASET_DIR": own / "scans", "IOPFL_OUTPUT_DIR": own / "iopfl"}
        places[site] = names
    given = words(tmp_path / "out", "prod", 2, "--startup_kit", str(kits / ADMIN))
    command = shlex.join([sys.executable, "-m", "shared_iopfl", *given])
    run_command([*network_of_its_own, f"{start_kits(kits, places)}; exec {command}"], tmp_path / "home")
    assert_finished(tmp_path / "out", whole, one_machine=False)
    for site in SITES:
        own = load_weights(tmp_path / f"hospital_{site}" / "iopfl" / "sites" / site / f"model_{site}.pt")
        assert_same(own, load_weights(whole / "models" / f"model_{site}.pt"))
    server = [path for path in (kits / "localhost").rglob("*") if path.is_file()]
    for private in (b"Case0", b"/scans", b"/sites/"):
        assert not [path for path in server if private in path.read_bytes()], f"the server has come to know {private!r}"
