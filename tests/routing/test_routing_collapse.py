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
"""The collapse of a routed network: same output, export, and blended batch statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.utils import convert_to_onnx, convert_to_torchscript
from networks import ARCHITECTURES, experts, images, make, mixture, routes_of, spread, unet
from torch import nn

from shared_iopfl.routing.network import RoutedLayer, collapse, route
from shared_iopfl.utils.errors import InputError


@torch.no_grad()
@pytest.mark.parametrize("statistics", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (2, 3, 4, 5, 6)])
def test_batch_norm_blends_running_and_batch_statistics(statistics, shape):
    """0 equals torch's evaluation mode, 1 its training mode, and 0.5 uses the mean of both statistics."""
    norm = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d
    layers = [make(lambda: norm(3), seed) for seed in (1, 2)]
    r = torch.tensor([0.3, 0.7])
    own = {key: value.numpy() for key, value in mixture([layer.state_dict() for layer in layers], r).items()}
    scan = 3 * images(*shape).numpy() + 1
    axes = (0, *range(2, len(shape)))
    mean = (1 - statistics) * own["running_mean"] + statistics * scan.mean(axes)
    var = (1 - statistics) * own["running_var"] + statistics * scan.var(axes)
    mean, var, weight, bias = (
        x.reshape(1, 3, *(1,) * (len(shape) - 2)) for x in (mean, var, own["weight"], own["bias"])
    )
    expected = (scan - mean) / np.sqrt(var + layers[0].eps) * weight + bias
    routed = route(layers[0], {"a": layers[0].state_dict(), "b": layers[1].state_dict()}, statistics=statistics)
    routed.start_from(r)
    np.testing.assert_allclose(routed(torch.as_tensor(scan)).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_the_routes_through_running_statistics():
    """With equal affine parameters, only the running statistics of the experts give a gradient."""
    layers = [make(lambda: nn.BatchNorm2d(3), seed) for seed in (1, 2)]
    layers[1].weight, layers[1].bias = layers[0].weight, layers[0].bias
    routed = route(layers[0], {"a": layers[0].state_dict(), "b": layers[1].state_dict()})
    routed(images(2, 3, 4, 4)).square().mean().backward()
    (routes,) = routed.trainable()
    assert routes.grad is not None
    assert routes.grad.abs().min() > 1e-4


@torch.no_grad()
def test_batch_norm_without_running_statistics_uses_the_batch():
    layer = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    scan = 3 * images(2, 3, 4, 4) + 1
    routed = route(layer, {"a": layer.state_dict(), "b": layer.state_dict()})
    torch.testing.assert_close(routed(scan), layer(scan))


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_collapse_is_a_plain_network_with_the_same_output(name):
    """It has the class and the keys of the network, can be trained, and gives the output of the routed network."""
    network, space, scan = spread(name)
    routed = route(network, space)
    table = routes_of(3, layers=len(routed.layers))
    routed.start_from(table)
    expected = routed(scan)
    for plain in (collapse(routed), collapse(routed, table)):
        assert type(plain) is type(network)
        assert list(plain.state_dict()) == list(network.state_dict())
        assert not any(isinstance(module, RoutedLayer) for module in plain.modules())
        assert all(parameter.requires_grad for parameter in plain.parameters())
        assert all(a.dtype == b.dtype for a, b in zip(plain.state_dict().values(), network.state_dict().values()))
        torch.testing.assert_close(plain(scan), expected, rtol=1e-4, atol=1e-5)
    one = collapse(routed, torch.tensor([0.0, 0.0, 1.0]))
    for key, tensor in one.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, space["e2"][key])


@torch.no_grad()
def test_collapse_keeps_the_learnt_norm_shifts():
    network, space, scan = unet(), experts(2), images(2, 3, 32, 32)
    routed = route(network, space, affine=True)
    for parameter in routed.trainable():
        parameter.add_(images(*parameter.shape, seed=3))
    torch.testing.assert_close(routed(scan), collapse(routed)(scan), rtol=1e-4, atol=1e-5)


def test_collapse_and_deep_copy_after_a_forward_with_gradient():
    """Deep supervision keeps outputs with gradient in the module, which torch alone cannot copy."""
    network, space, scan = spread("DynUNet deep")
    network(scan)
    routed = route(network, space)
    routed(scan)
    plain = collapse(routed)
    assert torch.allclose(plain(scan), routed(scan), rtol=1e-4, atol=1e-5)


def test_collapse_keeps_the_statistics_of_the_last_forward():
    """Before a forward it is refused; afterwards the plain network gives the same output for the same images."""
    routed = route(unet(), experts(2), statistics=0.5)
    with pytest.raises(InputError, match="statistics"):
        collapse(routed)
    batch = images(4, 3, 32, 32)
    with torch.no_grad():
        expected = routed(batch)
        plain = collapse(routed)
        torch.testing.assert_close(plain(batch), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain(batch[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    routed.reset()
    with pytest.raises(InputError, match="statistics"):
        collapse(routed)


@torch.no_grad()
@pytest.mark.parametrize("name", ["BasicUNet 2D", "DynUNet"])
def test_collapsed_network_exports_to_torchscript(name):
    """Traced and scripted networks, as of MONAI's ckpt_export, have the same output."""
    network, space, scan = spread(name)
    routed = route(network, space)
    routed.start_from(routes_of(3))
    plain = collapse(routed)
    for use_trace in (True, False):
        script = convert_to_torchscript(plain, inputs=[scan], use_trace=use_trace)
        torch.testing.assert_close(script(scan), routed(scan), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_collapsed_network_exports_to_onnx(tmp_path):
    """ONNX Runtime gives the output of the routed network."""
    runtime = pytest.importorskip("onnxruntime")
    network, space, scan = spread("BasicUNet 2D")
    routed = route(network, space)
    routed.start_from(routes_of(3))
    file = tmp_path / "model.onnx"
    convert_to_onnx(collapse(routed), [scan], input_names=["image"], output_names=["pred"], filename=str(file))
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": scan.numpy()})
    np.testing.assert_allclose(found, routed(scan).numpy(), rtol=1e-3, atol=1e-4)
