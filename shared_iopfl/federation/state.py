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
"""The settings and the state of a federation in one process, which its checkpoint keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from shared_iopfl.federation.averaging import Averaging, ServerMomentum
from shared_iopfl.federation.client import SiteClient, check_time_limit
from shared_iopfl.federation.updates import Failures
from shared_iopfl.models.files import load_weights
from shared_iopfl.models.weights import Weights
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import check_sites


@dataclass(eq=False)
class FederationState:
    """Settings and progress of a :class:`~shared_iopfl.federation.simulation.Federation`, which describes the settings.

    Attributes:
        round: Number of the last round that was started, from 1; 0 before the first round.
        weights: The global weights.
        clients: site -> its client.
        history: Rows of ``history.csv``.
        failures: Failures of the sites.
        server: Server momentum.
    """

    bundle_root: str
    sites: list[str]
    rounds: int
    output_dir: Path
    local_epochs: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)
    val_interval: int = 1
    min_sites: int = 0
    max_update_norm: float = 10.0
    site_timeout: float = 0.0
    own_rounds: int = 0
    shares: Sequence[float] = ()
    server_momentum: float = 0.0
    resume: bool = False
    seed: int = 0
    averaging: Averaging = "mean"
    initial_model: str = ""

    def __post_init__(self) -> None:
        """Check the settings before any data are read."""
        if isinstance(self.sites, str) or not self.sites or len(set(self.sites)) != len(self.sites):
            raise InputError(
                f"sites must be a list of different names, such as \"['BIDMC','HK']\", but is {self.sites!r}."
            )
        check_values({**self.overrides, **vars(self)})
        check_time_limit(self.site_timeout)
        self.sites = check_sites(self.sites)
        self.output_dir = Path(self.output_dir)
        self.overrides = dict(self.overrides)
        self.server = ServerMomentum(self.server_momentum)
        self.failures = Failures(len(self.sites), self.min_sites)
        self.round = 0
        self.weights: dict[str, Tensor] = {}
        self.clients: dict[str, SiteClient] = {}
        self.history: list[dict[str, Any]] = []

    def first_weights(self, own: Weights) -> dict[str, Tensor]:
        """Return the global weights of the first round: those of `initial_model`, or those of the new network.

        Args:
            own: Weights of the new network, which the model must match in names and shapes.

        Raises:
            InputError: If the file is not a model of this network.
        """
        if not self.initial_model:
            return dict(own)
        weights = load_weights(self.initial_model)
        shapes, expected = ({key: tensor.shape for key, tensor in state.items()} for state in (weights, own))
        if shapes != expected:
            key = next(key for key in {**expected, **shapes} if shapes.get(key) != expected.get(key))
            raise InputError(
                f"initial_model {self.initial_model} does not fit the network: '{key}' differs; set --features to the "
                "value that it was trained with."
            )
        return weights

    @property
    def checkpoint(self) -> Path:
        """The path of the newest checkpoint."""
        return self.output_dir / "federation.pt"

    @property
    def previous(self) -> Path:
        """The path of the checkpoint of the round before."""
        return self.output_dir / "federation_previous.pt"

    def settings(self) -> dict[str, Any]:
        """Return the settings that must be the same when a run is resumed; folders and the device may change."""
        training = {
            key: list(value) if isinstance(value, (list, tuple)) else str(value) if isinstance(value, str) else value
            for key, value in self.overrides.items()
            if isinstance(value, (bool, int, float, str, list, tuple)) and key not in ("dataset_dir", "device")
        }
        own = {"sites": self.sites, "rounds": self.rounds, "local_epochs": self.local_epochs, "seed": self.seed}
        return {**training, **own, "server_momentum": self.server_momentum, "averaging": self.averaging}
