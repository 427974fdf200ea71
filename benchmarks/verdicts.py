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
"""How often a comparison of equals has a verdict, and what its two intervals cover: a simulation, as a table.

```bash
python -m benchmarks.verdicts
```

A method differs from its reference at a case by noise with a heavy tail (Laplace, standard deviation two points), equal
at all sites or growing fourfold from the first to the last. With a spread between sites, their true differences are
normal around 0: the interval for new sites is to hold 0, that over cases the mean of the sites at hand.
"""

from __future__ import annotations

import argparse

import numpy as np

from shared_iopfl.comparison.scores import RoleScores, Site
from shared_iopfl.evaluation import intervals

SIZES = ((3, 2), (4, 2), (6, 2), (4, 3), (3, 5), (1, 6), (2, 8), (6, 10), (4, 30))
CHUNK = 100  # comparisons that share an array


def simulate(sites: int, cases: int, draws: int, unequal: bool, spread: float) -> tuple[float, float, float]:
    """Of so many comparisons, the shares with a verdict, whose interval over cases holds, and whose over sites."""
    rng = np.random.default_rng(0)
    noise = 0.02 / np.sqrt(2) * (np.geomspace(1, 4, sites) if unequal else np.ones(sites))
    verdicts, over_cases, over_sites, done = 0, 0, 0, 0
    while done < draws:
        count = min(CHUNK, draws - done)
        truth = rng.normal(0, spread, (sites, count)) if spread else np.zeros((sites, count))
        found = {}
        for site in range(sites):
            gains = truth[site][:, None, None] + noise[site] * rng.laplace(size=(count, 1, cases))
            values = np.concatenate([np.full((1, 1, cases), 0.5), 0.5 + gains])
            found[str(site)] = Site([str(case) for case in range(cases)], values)
        scores = RoleScores(["none", *map(str, range(count))], ["0"], found, 1)
        for draw in range(count):
            one = scores.difference(str(draw), "none")
            verdicts += one.verdict in ("better", "worse")
            over_cases += one.low <= truth[:, draw].mean() <= one.high
            over_sites += one.new_low <= 0 <= one.new_high
        done += count
    return verdicts / draws, over_cases / draws, over_sites / draws


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000, help="comparisons a size")
    parser.add_argument("--resamples", type=int, default=intervals.RESAMPLES, help="of each interval")
    options = parser.parse_args()
    intervals.RESAMPLES = options.resamples
    heads = [
        "sites x cases",
        "verdicts (%)",
        "noise unequal (%)",
        "cases hold",
        "cases hold new sites",
        "sites hold them",
    ]
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|")
    for sites, cases in SIZES:
        equal = simulate(sites, cases, options.draws, False, 0.0)
        unequal = simulate(sites, cases, options.draws, True, 0.0)
        apart = simulate(sites, cases, options.draws, False, 0.01)
        new = f"{1 - apart[0]:.3f} | {apart[2]:.3f}" if sites >= 3 else "\u2013 | \u2013"
        shares = f"{100 * equal[0]:.1f} | {100 * unequal[0]:.1f} | {apart[1]:.3f}"
        print(f"| {sites} x {cases} | {shares} | {new} |", flush=True)


if __name__ == "__main__":
    main()
