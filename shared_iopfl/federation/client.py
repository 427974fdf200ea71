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
"""One site of a federation: a `MonaiAlgo` client, its state for checkpoints, and its time limit."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

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
    """The `MonaiAlgo` client of one site, which runs the bundle's training config, and its state for checkpoints.

    Args:
        bundle_root: Folder of the bundle.
        site: Name of the site.
        local_epochs: Number of epochs in a round.
        overrides: Overrides of the training config, id -> value. Text is not evaluated unless it is an `Expression`.
            The additional key ``filters`` names a config of the bundle with privacy filters, such as "fl_filters"; ""
            applies no filters.

    Attributes:
        cases: Number of training cases.
        kept: name -> object with a ``state_dict``: what the site keeps from round to round.

    Raises:
        InputError: If the bundle has no such filters, or the config or the data of the site are wrong.
    """

    def __init__(self, bundle_root: str, site: str, local_epochs: int, overrides: Mapping[str, Any]) -> None:
        self.site = check_site(site)
        if not is_data(bundle_root):
            raise InputError(f"the bundle's path {bundle_root!r} would be evaluated or has a '#': rename the folder.")
        training, scoring = as_values(overrides), as_values(overrides)
        filters = training.pop("filters", "")
        scoring.pop("filters", None)
        if not (overrides.get("val_interval", 1) or overrides.get("save_checkpoints", True)):
            # the trainer's validator never runs, but it would cache the cases that the evaluator caches as well
            training["validate#dataset#data"] = []
        self.algo: Any = MonaiAlgo(
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
        if failed is not None:  # outside of the except clause, so that further exceptions are not chained to this one
            self._name_all(failed)
            raise failed
        parser = self.algo.train_workflow.parser  # type: ignore[union-attr]
        self.cases = len(parser.get_parsed_content("train#dataset#data"))
        state = parser.get_parsed_content("round_state")
        _return_memory()
        # a handler that is switched off is None
        self.kept: dict[str, Any] = {name: item for name, item in state.items() if item is not None}

    def _name_all(self, error: Exception) -> None:
        """If training cases cannot be read, check the validation cases too, so that one error names all of them."""
        fault = root_input_error(error)
        if fault is None or self.algo.eval_workflow is not None:
            return
        # a separate config, because the trainer's config may have no validation cases
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
        """Copies of the present weights of the network, on the CPU."""
        return _copy(self.algo.trainer.network.state_dict())

    @property
    def parameters(self) -> list[str]:
        """The names of the network's parameters; its other weights are buffers."""
        return [name for name, _ in self.algo.trainer.network.named_parameters()]

    @property
    def personalised(self) -> dict[str, Tensor]:
        """The personalised model, on the CPU; while the rounds run, it serves the site's own scoring only."""
        return {key: tensor.cpu() for key, tensor in self.kept["personalization"].ema_model.state_dict().items()}

    def train(self, weights: Weights) -> dict[str, Tensor]:
        """Train for one round from the global weights.

        Returns:
            Copies of the local weights on the CPU, or what the privacy filters leave of them.
        """
        self.algo.train(ExchangeObject(weights=dict(weights)))
        update = self.algo.get_weights({ExtraItems.CLIENT_NAME: self.site}).weights
        _return_memory()
        return {key: tensor.clone() for key, tensor in update.items()}

    def select_personalised(self, weights: Weights, own_rounds: int, shares: Sequence[float]) -> float:
        """Train further at this site alone after the last round, then select the personalised model by validation Dice.

        The site continues from the last global weights, and the moving average continues too. The candidates are
        interpolations between the global model and the moving average before, half-way through and after these rounds.
        A site without validation cases keeps the last moving average. Nothing is sent.

        Args:
            weights: The global weights of the last round.
            own_rounds: Number of rounds at this site alone, at the small learning rate of the end of the run.
            shares: Weights of the moving average in the interpolations, each from 0 to 1. If there are none, the last
                moving average is kept.

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
        if not shares or not len(self.algo.evaluator.data_loader):
            return 1.0
        share, selected = validated_interpolation(
            weights, averages, lambda state: self.validate(state)["val_mean_dice"], shares
        )
        self.kept["personalization"].ema_model.load_state_dict(selected)
        return share

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last local training, with its learning rate."""
        rate = self.kept["optimizer"].param_groups[0]["lr"]
        return {
            name: float(value) for name, value in {**self.algo.trainer.state.metrics, "learning_rate": rate}.items()
        }

    def validate(self, weights: Weights) -> dict[str, float]:
        """Return the metrics of any weights on the site's validation cases."""
        result = self.algo.evaluate(ExchangeObject(weights=dict(weights))).metrics
        return {name: float(value) for name, value in (result or {}).items()}

    def dice_by_statistics(self, weights: Weights) -> dict[str, float]:
        """Compare the validation Dice of weights with their own running statistics and with those of the site.

        If the statistics of the site's validation cases give a much higher Dice, the running statistics do not fit this
        site (see :mod:`shared_iopfl.handlers.norm_statistics`), because of how the model was trained or because the
        scanner differs from the others.

        Returns:
            "global" and "own", in [0, 1]; empty if it cannot be measured, as in :meth:`shift`.
        """
        network, stacks = self.measurable(weights)
        if not stacks:
            return {}
        own = with_own_statistics(network, mixed_batches(stacks))
        return {name: self.validate(w)["val_mean_dice"] for name, w in (("global", weights), ("own", own))}

    @torch.no_grad()
    def shift(self, weights: Weights) -> float | None:
        """Measure the mean distance of the site's validation cases from weights, as test-time routing measures it.

        The shift of an outside scan is judged in units of this distance. It is one number per site and reveals nothing
        about a single case.

        Returns:
            The mean distance, or None without validation cases, batch norms, or an inferer with the method ``stacks``.
        """
        network, stacks = self.measurable(weights)
        size, models = self.algo.evaluator.inferer.batch_size if stacks else 0, {GLOBAL: network.state_dict()}
        distances = [float(scan_distances(network, models, scan_slices(stack), size)) for stack in stacks]
        return fmean(distances) if distances else None

    def measurable(self, weights: Weights) -> tuple[torch.nn.Module, list[Tensor]]:
        """Return a copy of the network with these weights, and the network inputs of each validation case.

        There are no inputs if the network has no batch norm or the inferer has no method ``stacks``.
        """
        evaluator = self.algo.evaluator
        network = copy_network(evaluator.network)
        network.load_state_dict(weights)
        stacks = getattr(evaluator.inferer, "stacks", None)
        if stacks is None or not batch_norms(network):
            return network, []
        images = (batch[CommonKeys.IMAGE].to(evaluator.state.device) for batch in evaluator.data_loader)
        return network, [stack for image in images for stack in stacks(image)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state to keep in a checkpoint; the scaler of mixed precision is new in every round."""
        state = self.algo.trainer.state
        kept = {name: item.state_dict() for name, item in self.kept.items()}
        return {"epoch": state.epoch, "iteration": state.iteration, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        trainer = self.algo.trainer
        for engine in (trainer, self.algo.evaluator):
            # after an exception, ignite considers the run as started: the next one would end at once without training
            engine._internal_run_generator = None
        trainer.state.epoch, trainer.state.iteration = state["epoch"], state["iteration"]
        for name, item in self.kept.items():
            item.load_state_dict(state["kept"][name])


def _copy(state: Weights) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def _return_memory() -> None:
    """Return freed memory to the system: glibc keeps the gaps between cached scans."""
    with suppress(AttributeError):  # other systems have no such function and do not need it
        ctypes.CDLL(None).malloc_trim(0)


def _filters(bundle_root: str, name: str) -> str:
    """Return the config file of filters if it is the bundle's own: it is executed, and a server may choose the name."""
    file = f"configs/{name}.json"
    if Path(name).name != name or not (Path(bundle_root) / file).is_file():
        raise InputError(f"no filters '{name}': {bundle_root} has no {file}; name a config of the bundle.")
    return file


@contextmanager
def time_limit(site: str, seconds: float) -> Iterator[None]:
    """Raise `InputError` in the body as soon as it has taken longer than the limit.

    SIGALRM interrupts Python code and waiting (for a disk, a network or a worker process) in the same way as Ctrl-C:
    only in the main thread, and a call into a library has to return first.

    Args:
        site: Name of the site, for the message.
        seconds: The limit in seconds; 0 sets none.
    """
    if not seconds:
        yield
        return
    armed = True

    def expired(*_: Any) -> None:
        if armed:
            raise InputError(f"site '{site}' has taken more than its {seconds:g} seconds (site_timeout).")

    before = signal.signal(signal.SIGALRM, expired)
    # the alarm is repeated every second, because library code may swallow the exception
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
    """Raise `InputError` if a time limit is requested where none can be set."""
    if seconds and not (hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()):
        raise InputError(
            "site_timeout needs the main thread of a process on Linux or macOS: leave it out, or federate with FLARE."
        )
