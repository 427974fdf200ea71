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
"""Fine-tuning of the global model at one site: a method that personalised models are compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor

from shared_iopfl.federation.client import SiteClient


def fine_tune(client: SiteClient, weights: Mapping[str, Tensor], rounds: int) -> dict[str, Tensor]:
    """Global weights trained further at a site, without averaging: at the tail's small rate once the run is over.

    The client is left as it was: its personalised model and all that survives an interruption.

    Args:
        client: of the site.
        weights: the global ones.
        rounds: of local training.

    Returns:
        The site's weights.
    """
    before, personalization = copy.deepcopy(client.state_dict()), client.kept["personalization"]
    path, personalization.save_path = personalization.save_path, None  # what is published is not this
    tuned = dict(weights)
    try:
        for _ in range(rounds):
            tuned = client.train(tuned)
    finally:
        personalization.save_path = path
        client.load_state_dict(before)
    return tuned
