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
"""Handlers of the trainer in ``train.json``: personalization, norm statistics, FedProx, FedBN, Ditto, checkpoints.

The folder may import `models`, `routing` and `evaluation`; it knows nothing of the server and of other sites.
"""

from shared_iopfl.handlers.checkpoints import ModelSaver
from shared_iopfl.handlers.methods import DittoHandler, LocalNormsHandler, ProximalHandler
from shared_iopfl.handlers.norm_statistics import NormStatisticsHandler
from shared_iopfl.handlers.personalization import PersonalizationHandler

__all__ = [
    "DittoHandler",
    "LocalNormsHandler",
    "ModelSaver",
    "NormStatisticsHandler",
    "PersonalizationHandler",
    "ProximalHandler",
]
