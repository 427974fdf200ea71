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
"""Both bundles in a real MONAI Label server: `deploy/monailabel/serve.sh` starts it, `try.py` talks to it.

Run by ``deploy/monailabel/test.sh``, which makes the environment first; without that environment all of it is skipped.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from label_server import (
    BUNDLES,
    DEPLOY,
    PATIENCE,
    PYTHON,
    SITES,
    digest,
    ending,
    make_models,
    make_studies,
    needs_monailabel,
    own_mask,
    read,
    serving,
)

pytestmark = [pytest.mark.slow, needs_monailabel]


@dataclass
class Server:
    """A running server, the task its scans are of, and where its files are."""

    bundle: str
    url: str
    app: Path
    studies: Path
    masks: Path  # of the scans, drawn by a person
    scratch: Path

    @property
    def ending(self) -> str:
        return ending(self.bundle)

    @property
    def scans(self) -> list[str]:
        return sorted(path.name[: -len(self.ending)] for path in self.studies.glob(f"*{self.ending}"))

    @property
    def models(self) -> Path:
        return self.app / "model" / self.bundle / "models"

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command of the client, without waiting for it."""
        client = [PYTHON, str(DEPLOY / "try.py"), "--url", self.url, *command]
        return subprocess.Popen(client, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.scratch)

    def ask(self, *command: str) -> str:
        """What a command of the client prints."""
        return answer(self.start(*command))

    def infer(self, scan: str, *options: str) -> np.ndarray:
        """A mask as the server serves it."""
        return answered(*self.start_infer(scan, *options))

    def start_infer(self, scan: str, *options: str) -> tuple[subprocess.Popen[str], Path]:
        file = self.scratch / f"{time.monotonic_ns()}{self.ending}"
        return self.start("infer", self.bundle, scan, "--output", str(file), *options), file

    def own_mask(self, scan: str, **overrides: Any) -> np.ndarray:
        """The mask that the bundle itself makes of a scan, with the server's models."""
        file = self.studies / f"{scan}{self.ending}"
        return own_mask(self.app / "model" / self.bundle, file, self.scratch, **overrides)


def post(url: str, fields: dict[str, str] | None = None, file: Path | None = None) -> tuple[int, str]:
    """Status and text of the answer to a form, which may send a file."""
    edge, parts = "edge", []
    for name, value in (fields or {}).items():
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    if file is not None:
        head = f'Content-Disposition: form-data; name="file"; filename="{file.name}"\r\n\r\n'
        parts.append(head.encode() + file.read_bytes())
    body = b"".join(f"--{edge}\r\n".encode() + part + b"\r\n" for part in parts) + f"--{edge}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={edge}"} if parts else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body if parts else b"", headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def answer(client: subprocess.Popen[str]) -> str:
    printed, _ = client.communicate(timeout=PATIENCE)
    assert client.returncode == 0, printed
    return printed


def answered(client: subprocess.Popen[str], file: Path) -> np.ndarray:
    answer(client)
    return read(file)


@pytest.fixture(scope="module", params=BUNDLES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with both bundles and scans for one of them."""
    folder = tmp_path_factory.mktemp(request.param)
    models, masks = [], {}
    for bundle in BUNDLES:
        masks[bundle] = make_studies(folder / bundle / "studies", bundle)
        published = make_models(folder / bundle / "published", bundle, folder / bundle / "studies")
        models += ["--models", f"{bundle}={published}"]
    studies, app = folder / request.param / "studies", folder / "app"
    (folder / "scratch").mkdir()
    command = [DEPLOY / "serve.sh", "--app", app, "--studies", studies, *models]
    with serving(command, folder / "server.log") as url:
        yield Server(request.param, url, app, studies, masks[request.param], folder / "scratch")


def test_both_bundles_are_served_with_all_models(server: Server) -> None:
    """The client finds both bundles, the global and every personalised model of each, the scans and the trainers."""
    info = json.loads(urllib.request.urlopen(f"{server.url}/info/").read())
    assert set(info["models"]) == set(info["trainers"]) == {"prostate_iopfl", "fundus_iopfl"}
    for model in info["models"].values():
        files = model["config"]["model_filename"]
        assert files[0] == "model.pt", "the first is what is served by default"
        assert sorted(files[1:]) == [f"model_{site}.pt" for site in SITES]
    assert info["datastore"]["total"] == 3
    assert "prostate_iopfl" in server.ask("info")


def test_served_mask_is_the_bundles_own(server: Server) -> None:
    """Whether the server has the scan or is sent it: voxel by voxel what the bundle writes, in the scan's own grid."""
    scan = server.scans[0]
    file = server.studies / f"{scan}{server.ending}"
    served, sent = server.infer(scan), server.infer(str(file))
    own = server.own_mask(scan)
    assert 0 < (served > 0).mean() < 1, "a mask of one class would be right by chance"
    np.testing.assert_array_equal(served, own)
    np.testing.assert_array_equal(sent, own)
    assert served.dtype == np.uint8
    assert served.shape == read(file).shape[: served.ndim], "of a photograph, height and width"


def test_mask_has_the_values_that_its_labels_say(server: Server) -> None:
    """A viewer names the values of a mask by the labels it is told."""
    info = json.loads(urllib.request.urlopen(f"{server.url}/info/").read())
    labels = info["models"][server.bundle]["labels"]
    values = {"prostate_iopfl": {"prostate": 1}, "fundus_iopfl": {"optic disc": 1, "optic cup": 2}}
    assert labels == values[server.bundle]
    assert set(np.unique(server.infer(server.scans[0]))) == {0, *labels.values()}


def test_volume_keeps_its_place_in_the_patient(server: Server) -> None:
    """The affine of a served volume is its scan's."""
    if server.ending == ".png":
        pytest.skip("a photograph has no affine")
    scan = server.scans[0]
    client, file = server.start_infer(scan)
    answered(client, file)
    np.testing.assert_allclose(nib.load(file).affine, nib.load(server.studies / f"{scan}.nii.gz").affine, atol=1e-5)


def test_other_bundle_is_served_too(server: Server, tmp_path: Path) -> None:
    """One server, both tasks: a scan of the other kind, sent by the client, gets its mask."""
    other = "prostate_iopfl" if server.ending == ".png" else "fundus_iopfl"
    scan = sorted((server.studies.parents[1] / other / "studies").iterdir())[0]
    mask = tmp_path / scan.name
    server.ask("infer", other, str(scan), "--output", str(mask))
    assert read(mask).shape == read(scan).shape[: read(mask).ndim]
    assert read(mask).any()


def test_chosen_personalised_model_is_served_as_it_is(server: Server) -> None:
    """A site that asks for its own model gets that model's mask; without a choice the scan is routed."""
    scan = server.scans[0]
    routed = server.infer(scan)
    for site in SITES:
        file = f"model_{site}.pt"
        chosen = server.infer(scan, "--model_filename", file)
        np.testing.assert_array_equal(chosen, server.own_mask(scan, ckpt=str(server.models / file), mode="off"))
        assert (chosen != routed).any()
    np.testing.assert_array_equal(server.infer(scan), routed, "a choice is for one request")


def test_same_request_gives_the_same_mask(server: Server) -> None:
    """What was served in between, another scan or by another model, leaves no trace."""
    first, second, _ = server.scans
    before = server.infer(first)
    server.infer(second)
    server.infer(first, "--model_filename", "model_B.pt")
    np.testing.assert_array_equal(server.infer(first), before)


def test_two_at_once_get_what_each_gets_alone(server: Server) -> None:
    """Clients that ask at the same time for different scans and models do not mix."""
    requests = [(server.scans[0],), (server.scans[1],), (server.scans[0], "--model_filename", "model_A.pt")]
    alone = [server.infer(*request) for request in requests]
    together = [answered(*started) for started in [server.start_infer(*request) for request in requests]]
    for one, other in zip(alone, together):
        np.testing.assert_array_equal(one, other)


def test_batch_keeps_the_masks_that_single_requests_give(server: Server) -> None:
    """After a batch, the server holds each scan's mask, to be fetched."""
    server.ask("batch", server.bundle)
    for scan in server.scans:
        kept = server.scratch / f"kept_{scan}{server.ending}"
        server.ask("mask", scan, str(kept))
        np.testing.assert_array_equal(read(kept), server.infer(scan))


def test_what_is_wrong_with_a_request_is_answered_by_its_reason(server: Server, tmp_path: Path) -> None:
    """A status of 400 to 499 and one line, not the server's error: unknown names, and files that are no scans."""
    (tmp_path / f"broken{server.ending}").write_bytes(b"no scan")
    (tmp_path / "notes.txt").write_text("none either")
    for path, reason in {
        f"infer/nothing?image={server.scans[0]}": "no model 'nothing': there is fundus_iopfl, prostate_iopfl.",
        f"infer/{server.bundle}?image=nothing": "no scan 'nothing' at this server",
        "activelearning/nothing": "no strategy 'nothing': there is first, random, review.",
    }.items():
        status, said = post(f"{server.url}/{path}")
        assert status == 404 and reason in said
    chosen = {"params": '{"model_filename": "model_nothing.pt"}'}
    status, said = post(f"{server.url}/infer/{server.bundle}?image={server.scans[0]}", chosen)
    assert status == 404 and "no model_filename 'model_nothing.pt': there is model.pt, " in said
    for name in (f"broken{server.ending}", "notes.txt"):
        status, said = post(f"{server.url}/infer/{server.bundle}", file=tmp_path / name)
        assert status == 422 and "Traceback" not in said and len(said) > 20, said
    assert server.infer(server.scans[0]).any(), "the server goes on"


def test_the_scan_to_label_next_is_the_one_whose_mask_has_the_lowest_quality(server: Server) -> None:
    """As the server's answers say; before a scan is segmented, nothing is known of it."""
    quality = {}
    for scan in server.scans:
        file = server.scratch / f"quality_{scan}{server.ending}"
        answer = json.loads(post(f"{server.url}/infer/{server.bundle}?image={scan}&output=json")[1])
        quality[scan] = answer["quality"]
        assert not file.exists() and 0 <= quality[scan] <= 1
    status, said = post(f"{server.url}/activelearning/review")
    lowest = min(quality, key=lambda scan: (quality[scan], scan))
    assert status == 200 and json.loads(said)["id"] == lowest
    assert lowest in server.ask("next")


def test_training_on_two_labelled_cases_changes_what_is_served(server: Server) -> None:
    """With the server's own settings for validation. The new model serves at once; other sites' models stay."""
    *labelled, scan = server.scans
    experts = {site: digest(server.models / f"model_{site}.pt") for site in SITES}
    old, before = digest(server.models / "model.pt"), server.infer(scan)
    for case in labelled:
        server.ask("label", case, str(server.masks / f"{case}{server.ending}"))
    assert json.loads(post(f"{server.url}/activelearning/review")[1])["id"] == scan, "the others are labelled"
    status, said = post(f"{server.url}/scoring/dice?run_sync=true")
    assert status == 200 and set(json.loads(said)) == set(labelled), said
    for case, found in json.loads(said).items():
        files = (server.masks / f"{case}{server.ending}", server.scratch / f"kept_{case}{server.ending}")
        truth, mask = (read(file) for file in files)
        values = [value for value in np.unique(truth) if value]
        dice = [2 * ((truth == v) & (mask == v)).sum() / ((truth == v).sum() + (mask == v).sum()) for v in values]
        assert found == pytest.approx(np.mean(dice))
    server.ask("train", server.bundle, "--max_epochs", "2")
    assert digest(server.models / "model.pt") != old
    assert {site: digest(server.models / f"model_{site}.pt") for site in SITES} == experts
    served = server.infer(scan)
    assert (served != before).any()
    # the running server keeps the experts it started with: the site's own new model joins them at the next start
    np.testing.assert_array_equal(served, server.own_mask(scan, sites=list(SITES)))


def test_sites_own_new_model_joins_the_published_ones(server: Server) -> None:
    """Training names it as no published expert is; a fresh process takes the folder, manifest and all, as it is."""
    names = {path.name for path in server.models.glob("model_*.pt")}
    assert names == {"model_own.pt", *(f"model_{site}.pt" for site in SITES)}
    assert server.own_mask(server.scans[0]).any()
