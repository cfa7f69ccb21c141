"""Layers: compatibility with upstream, the preconditioned and the convolutional forms."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.nn import functional

from lmkan_deploy import upstream
from lmkan_deploy.nn import LMKAN2DLayer, LMKANConv2d, PreconditionedLMKAN2D
from lmkan_deploy.reference import lookup2d
from lmkan_deploy.spec import grid_points


def test_constructor_has_upstreams_order() -> None:
    assert list(inspect.signature(LMKAN2DLayer.__init__).parameters)[1:] == [
        "num_grids",
        "input_dim",
        "output_dim",
        "block_size_forward",
        "block_size_backward",
        "tile_size_forward",
        "tile_size_backward",
        "init_scale",
        "backward_fast_mode",
    ]


def test_state_is_upstreams() -> None:
    layer = LMKAN2DLayer(5, 6, 3)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {"func_parameter": (6, 6, 3, 3), "borders": (6,)}
    torch.testing.assert_close(layer.borders.double(), torch.from_numpy(grid_points(5)), rtol=1e-6, atol=1e-7)
    assert layer.func_parameter.abs().max() <= 0.1 / 6**0.5
    assert layer.func_parameter.std() > 0.02


def test_the_table_is_a_contiguous_view_and_stays_one() -> None:
    layer = LMKAN2DLayer(5, 6, 3)
    contiguous = {key: value.contiguous() for key, value in layer.state_dict().items()}
    layer.load_state_dict(contiguous)
    for module in (layer, copy.deepcopy(layer), copy.deepcopy(layer).double()):
        assert module.table.is_contiguous()
        assert module.table.data_ptr() == module.func_parameter.data_ptr()


@pytest.mark.parametrize("output_dim", [1, 3, 128])
def test_values(output_dim: int) -> None:
    layer, x = LMKAN2DLayer(7, 10, output_dim), torch.randn(9, 10)
    want = lookup2d(x.numpy(), layer.table.detach().numpy())
    torch.testing.assert_close(layer(x).double(), torch.from_numpy(want), rtol=1e-5, atol=1e-6)


def test_batch_last_twin() -> None:
    twin, layer, x = upstream.LMKAN2DLayer(7, 10, 4), LMKAN2DLayer(7, 10, 4), torch.randn(10, 9)
    layer.load_state_dict(twin.state_dict())
    assert twin(x).shape == (4, 9)
    torch.testing.assert_close(twin(x), layer(x.T).T, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 4, 4), "at least 3 grid cells"),
        ((5, 3, 4), "even input_dim"),
        ((5, 0, 4), "even input_dim"),
        ((5, 4, 0), "output_dim of at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LMKAN2DLayer(*arguments)


def test_hessian_regularization_on_known_functions() -> None:
    layer = LMKAN2DLayer(8, 2, 3).double()
    g = torch.from_numpy(grid_points(8))
    layer.borders = g
    x, y = g[:, None], g[None, :]
    functions = torch.stack([x * 3 + y + 1, (x * y).expand(9, 9), (x**2 * torch.ones_like(y))], dim=-1)
    with torch.no_grad():
        layer.func_parameter.copy_(functions[..., None])
    # |H|² is 0 for a linear function, 2·1² for x·y, 2² for x².
    torch.testing.assert_close(layer.get_hessian_regularization(), torch.tensor(6.0, dtype=torch.float64))
    layer.get_hessian_regularization().backward()
    assert torch.isfinite(layer.func_parameter.grad).all()


@pytest.mark.parametrize("form", ["none", "linear", "relu_first", "relu_last"])
def test_preconditioned_forms(form: str) -> None:
    torch.manual_seed(0)
    module, x = PreconditionedLMKAN2D(6, 8, 5, form), torch.randn(7, 8)
    lookup = module.lmkan(x)
    want = {
        "none": lambda: lookup,
        "linear": lambda: 0.3 * lookup + module.linear(x),
        "relu_first": lambda: 0.3 * lookup + module.linear(x.relu()),
        "relu_last": lambda: 0.3 * lookup + module.linear(x).relu(),
    }[form]()
    torch.testing.assert_close(module(x), want)


def test_unknown_preconditioning_is_refused() -> None:
    with pytest.raises(ValueError, match="found 'relu'"):
        PreconditionedLMKAN2D(6, 8, 5, "relu")


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(2, 2, 0, 1), (3, 3, 0, 1), (3, 1, 1, 1), (3, 2, 2, 2)]
)
def test_convolution_is_the_layer_on_patches(
    channels: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    torch.manual_seed(0)
    conv = LMKANConv2d(5, channels, 4, kernel, stride, padding, dilation)
    x = torch.randn(2, channels, 10, 11)
    columns = functional.unfold(x, kernel, dilation, padding, stride)
    patches = columns.transpose(1, 2)
    if patches.shape[-1] % 2:
        patches = functional.pad(patches, (0, 1))
    y = conv(x)
    want = conv.layer(patches).transpose(1, 2).reshape(y.shape)
    torch.testing.assert_close(y, want)
    reference = functional.conv2d(
        x, torch.zeros(4, channels, kernel, kernel), None, stride, padding, dilation
    )
    assert y.shape == reference.shape


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        LMKAN2DLayer(8, 4, 16), torch.nn.BatchNorm1d(16, affine=False), LMKAN2DLayer(8, 16, 1)
    )
    x = torch.randn(512, 4)
    y = (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:3].abs()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (LMKAN2DLayer(5, 6, 3), (4, 6)),
        (PreconditionedLMKAN2D(5, 6, 3, "relu_last"), (4, 6)),
        (LMKANConv2d(5, 3, 4, 3, stride=1, padding=1), (2, 3, 6, 6)),
        (upstream.LMKAN2DLayer(5, 6, 3), (6, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_layers_make_every_tensor_where_x_is(module: torch.nn.Module, shape: tuple[int, ...]) -> None:
    """See the test of the operator."""
    module = copy.deepcopy(module).to("meta")
    y = module(torch.empty(shape, device="meta", requires_grad=True))
    assert y.device.type == "meta"
    layers = [part for part in module.modules() if hasattr(part, "get_hessian_regularization")]
    (y.sum() + sum(layer.get_hessian_regularization() for layer in layers)).backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in module.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and PyTorch with CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_networks_on_a_gpu(dtype: torch.dtype) -> None:
    """Outputs, a training step, and the regularization, beside those of the CPU in float64."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        LMKANConv2d(6, 3, 8, kernel_size=2, preconditioning="relu_first"),
        torch.nn.Flatten(),
        PreconditionedLMKAN2D(6, 8 * 16, 8, "linear"),
        LMKAN2DLayer(5, 8, 1),
    )
    x = torch.randn(16, 3, 8, 8)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        copied = copy.deepcopy(network).to(device, kind)
        y = copied(x.to(device, kind))
        y.square().mean().backward()
        gradients = [parameter.grad for parameter in copied.parameters()]
        results.append([y, *gradients, copied[3].get_hessian_regularization()])
        assert {tensor.device.type for tensor in results[-1]} == {device}
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for want, found in zip(*results, strict=True):
        assert (found.double().cpu() - want).abs().max() <= tolerance * want.abs().max()
