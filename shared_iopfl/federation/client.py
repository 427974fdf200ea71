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
"""One site of a federation: a `MonaiAlgo` client, the state to be kept of it, and its time limit."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from monai.bundle import ConfigWorkflow
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject
from monai.utils.enums import CommonKeys
from torch import Tensor

from shared_iopfl.handlers.norm_statistics import batch_norms, mixed_batches, with_own_statistics
from shared_iopfl.models.files import GLOBAL
from shared_iopfl.models.weights import Weights, copy_network, validated_interpolation
from shared_iopfl.routing.distances import scan_distances
from shared_iopfl.utils.config_values import as_values, is_data
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.names import check_site
from shared_iopfl.utils.stacks import scan_slices


class SiteClient:
    """One site's `MonaiAlgo` on the bundle's training config, and the part of its state that is kept in checkpoints.

    Args:
        bundle_root: the bundle.
        site: the site's name.
        local_epochs: epochs a round.
        overrides: of the training config, id -> value; strings are not evaluated unless they are an `Expression`. The
            further key ``filters`` names the bundle's config of privacy filters, such as "fl_filters"; "": no filters.

    Raises:
        InputError: where there are no such filters.
    """

    def __init__(self, bundle_root: str, site: str, local_epochs: int, overrides: Mapping[str, Any]) -> None:
        self.site = check_site(site)
        if not is_data(bundle_root):
            raise InputError(f"the bundle's path {bundle_root!r} would be evaluated or has a '#': give another.")
        training, scoring = as_values(overrides), as_values(overrides)
        filters = training.pop("filters", "")
        scoring.pop("filters", None)
        if not (overrides.get("val_interval", 1) or overrides.get("save_checkpoints", True)):
            # the trainer's validator never runs, but would cache the cases that the evaluator below caches too
            training["validate#dataset#data"] = []
        self.algo = MonaiAlgo(
            bundle_root=bundle_root,
            local_epochs=local_epochs,
            send_weight_diff=False,
            train_kwargs=training,
            config_evaluate_filename="configs/train.json",
            eval_kwargs=scoring,
            config_filters_filename=_filters(bundle_root, filters) if filters else None,
        )
        failed: Exception | None = None
        try:
            self.algo.initialize({ExtraItems.CLIENT_NAME: site})
        except Exception as error:
            failed = error
        if failed is not None:  # out of the handler, so that what comes next is not chained to it
            self._name_all(failed)
            raise failed
        parser = self.algo.train_workflow.parser  # type: ignore[union-attr]
        self.cases = len(parser.get_parsed_content("train#dataset#data"))
        state = parser.get_parsed_content("round_state")
        _return_memory()
        # what the site keeps from round to round, by name; a handler that is switched off is None
        self.kept: dict[str, Any] = {name: item for name, item in state.items() if item is not None}

    def _name_all(self, error: Exception) -> None:
        """If training cases cannot be read, check the validation cases as well, so that one error names all."""
        fault = root_input_error(error)
        if fault is None or self.algo.eval_workflow is not None:
            return
        # a config of its own: the trainer's may have no such cases
        given = {**self.algo.eval_kwargs, "bundle_root": str(self.algo.bundle_root)}
        file = str(Path(self.algo.bundle_root) / "configs" / "train.json")
        try:
            config = ConfigWorkflow(file, meta_file=None, logging_file=False, workflow_type="train", **given)
            config.parser.get_parsed_content("validate#dataset")
        except Exception as other:
            more = root_input_error(other)
            if more is not None and str(more) != str(fault):
                raise InputError(f"{fault}; {more}") from None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of the network as it stands (copies, on the CPU)."""
        return _copy(self.algo.trainer.network.state_dict())  # type: ignore[union-attr]

    @property
    def parameters(self) -> list[str]:
        """The names of the network's parameters; the other weights are buffers."""
        return [name for name, _ in self.algo.trainer.network.named_parameters()]  # type: ignore[union-attr]

    @property
    def personalised(self) -> dict[str, Tensor]:
        """The personalised model; read by the client and for its own scoring only."""
        return self.kept["personalization"].ema_model.state_dict()

    def train(self, weights: Weights) -> dict[str, Tensor]:
        """One round: global weights in; out come local weights, or what filters leave of them (copies, on the CPU)."""
        self.algo.train(ExchangeObject(weights=dict(weights)))
        update = self.algo.get_weights({ExtraItems.CLIENT_NAME: self.site}).weights
        _return_memory()
        return {key: tensor.clone() for key, tensor in update.items()}

    def select_personalised(self, weights: Weights, own_rounds: int, shares: Sequence[float]) -> float:
        """Train on at this site alone after the last round, then select the personalised model by validation Dice.

        The site trains on from the last global weights, and the moving average with it. Candidates are interpolations
        between the global model and the moving average before, half-way through and after these rounds. A site without
        validation cases keeps the last moving average. Nothing is sent.

        Args:
            weights: the last global ones.
            own_rounds: number of rounds at this site alone, at the small learning rate of the end of the run.
            shares: weights of the moving average in the interpolations; none: the last moving average is kept.

        Returns:
            The weight of the moving average in the selected model.
        """
        own, averages = dict(weights), []
        for trained in range(own_rounds + 1):
            if trained:
                self.algo.train(ExchangeObject(weights=own))
                own = self.weights
            if trained in (0, own_rounds // 2, own_rounds):
                averages.append(_copy(self.personalised))
        if not shares or not len(cast(Any, self.algo.evaluator).data_loader):
            return 1.0
        share, selected = validated_interpolation(
            weights, averages, lambda state: self.validate(state)["val_mean_dice"], shares
        )
        self.kept["personalization"].ema_model.load_state_dict(selected)
        return share

    def metrics(self) -> dict[str, float]:
        """Of the last round's local training."""
        trainer: Any = self.algo.trainer
        rate = self.kept["optimizer"].param_groups[0]["lr"]
        return {**{name: float(value) for name, value in trainer.state.metrics.items()}, "learning_rate": float(rate)}

    def validate(self, weights: Weights) -> dict[str, float]:
        """The site's validation metrics of any weights."""
        result = self.algo.evaluate(ExchangeObject(weights=dict(weights))).metrics
        return {name: float(value) for name, value in (result or {}).items()}

    def dice_by_statistics(self, weights: Weights) -> dict[str, float]:
        """Validation Dice of a model with its own running statistics, and with those of the site's validation cases.

        Where the second is much higher, the running statistics do not fit this site (see
        :mod:`shared_iopfl.handlers.norm_statistics`), because of how the model was trained or because the scanner
        differs from the others.

        Returns:
            "global" and "own", in [0, 1]; nothing where it cannot be measured, as in :meth:`shift`.
        """
        network, stacks = self.measurable(weights)
        if not stacks:
            return {}
        own = with_own_statistics(network, mixed_batches(stacks))
        return {name: self.validate(w)["val_mean_dice"] for name, w in (("global", weights), ("own", own))}

    @torch.no_grad()
    def shift(self, weights: Weights) -> float | None:
        """Mean distance of the site's validation cases from a model, as test-time routing measures it.

        The shift of an outside scan is judged in units of this one. It is one number per site and reveals nothing about
        a single case. None where it cannot be measured: without cases, batch norms, or an inferer with `stacks`.
        """
        network, stacks = self.measurable(weights)
        size, distances = cast(Any, self.algo.evaluator).inferer.batch_size if stacks else 0, []
        for stack in stacks:
            some = scan_slices(stack)
            distances.append(float(scan_distances(network, {GLOBAL: network.state_dict()}, some, size)))
        return fmean(distances) if distances else None

    def measurable(self, weights: Weights) -> tuple[torch.nn.Module, list[Tensor]]:
        """A copy of the network with these weights, and its inputs from each validation case; no inputs where it has no
        batch norm, or the inferer has no method `stacks`."""
        evaluator = cast(Any, self.algo.evaluator)
        network = copy_network(evaluator.network)
        network.load_state_dict(weights)
        stacks = getattr(evaluator.inferer, "stacks", None)
        if stacks is None or not batch_norms(network):
            return network, []
        return network, [
            stack
            for batch in evaluator.data_loader
            for stack in stacks(batch[CommonKeys.IMAGE].to(evaluator.state.device))
        ]

    def state_dict(self) -> dict[str, Any]:
        """The state to be kept in a checkpoint."""
        trainer: Any = self.algo.trainer
        kept = {name: item.state_dict() for name, item in self.kept.items()}
        scaler = getattr(trainer, "scaler", None)
        return {
            "epoch": trainer.state.epoch,
            "iteration": trainer.state.iteration,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "kept": kept,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        trainer: Any = self.algo.trainer
        for engine in (trainer, self.algo.evaluator):
            # where a run raised, ignite keeps it as begun: the next one would end at once, having trained nothing
            engine._internal_run_generator = None  # type: ignore[union-attr]
        trainer.state.epoch, trainer.state.iteration = state["epoch"], state["iteration"]
        scaler = getattr(trainer, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        for name, item in self.kept.items():
            item.load_state_dict(state["kept"][name])


def _copy(state: Weights) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def _return_memory() -> None:
    """Give back what was freed to the system: glibc keeps the gaps between cached scans."""
    with suppress(AttributeError):  # other systems need no such call
        ctypes.CDLL(None).malloc_trim(0)


def _filters(bundle_root: str, name: str) -> str:
    """The file of some filters: the bundle's own, as what is in it is executed, and the name may come from a server."""
    file = f"configs/{name}.json"
    if Path(name).name != name or not (Path(bundle_root) / file).is_file():
        raise InputError(f"no filters '{name}': {bundle_root} has no {file}.")
    return file


@contextmanager
def time_limit(site: str, seconds: float) -> Iterator[None]:
    """Raise `InputError` in the body once it has taken `seconds`; 0: no limit.

    SIGALRM interrupts Python code and waits (for a disk, a network, a worker process) as Ctrl-C does: only in the main
    thread, and not before a running call into a library returns.
    """
    if not seconds:
        yield
        return
    armed = True

    def expired(*_: Any) -> None:
        if armed:
            raise InputError(f"site '{site}' has taken more than its {seconds:g} seconds (site_timeout).")

    before = signal.signal(signal.SIGALRM, expired)
    # again and again, as library code may swallow what is raised within it
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_time_limit(seconds: float) -> None:
    """Raise `InputError` if a time limit is wanted where none can be set."""
    if seconds and not (hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()):
        raise InputError("site_timeout needs the main thread of a process on Linux or macOS: run without, or by FLARE.")
