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
"""The routing space: networks whose layers are mixtures of the experts' layers, and how the mixture is chosen.

The folder may import torch, `utils` and `models.weights`; it knows nothing of scan files or of federated training.
"""

from shared_iopfl.models.weights import check_experts
from shared_iopfl.routing.network import RoutedNetwork, collapse, route

__all__ = ["RoutedNetwork", "check_experts", "collapse", "route"]
