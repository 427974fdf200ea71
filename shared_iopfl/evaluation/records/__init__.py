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
"""Handlers of an evaluator that write records: scores of cases, masks and measures, routes.

They know `inferers`; configs refer to them by this folder.
"""

from shared_iopfl.evaluation.records.cases import CaseRecorder, case_scores
from shared_iopfl.evaluation.records.outputs import MeasureRecorder, OutputWriter, Progress
from shared_iopfl.evaluation.records.routes import RoutesRecorder, SiteFitter, reported_case, write_routes

__all__ = [
    "CaseRecorder",
    "MeasureRecorder",
    "OutputWriter",
    "Progress",
    "RoutesRecorder",
    "SiteFitter",
    "case_scores",
    "reported_case",
    "write_routes",
]
