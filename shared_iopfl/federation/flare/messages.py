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
"""Keys of the messages between server and sites, besides weights and metrics, and environment variables of a site."""

from __future__ import annotations

# sent with the weights and the round: site -> the last round in which its update was averaged
COUNTED = "counted"
# which of the tasks after the last round it is: to select the personalised model, or to score a model
LAST, SELECT, SCORE = "last", "select", "score"
# file with the settings of a job, which is sent to the sites
JOB_FILE = "federation.json"
# variables of a site, which take precedence over the settings of the job
ENVIRONMENT = {
    "bundle": "IOPFL_BUNDLE",
    "dataset_dir": "IOPFL_DATASET_DIR",
    "output_dir": "IOPFL_OUTPUT_DIR",
    "device": "IOPFL_DEVICE",
}
# "True": the site sends its personalised model to the other sites if the job asks for it
PUBLISH = "IOPFL_PUBLISH"
