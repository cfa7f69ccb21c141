"""`torch.ops.lmkan.lookup2d`: values, gradients, tracing, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmkan_deploy import torch_op
from lmkan_deploy.reference import lookup2d

lookup = torch.ops.lmkan.lookup2d


def inputs(rows: int, pairs: int, grids: int, outputs: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2 * pairs, generator=generator)
    table = torch.randn(pairs, grids + 1, grids + 1, outputs, generator=generator)
    return x.to(dtype), table.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)],
)
@pytest.mark.parametrize("rows", [0, 1, 19])
def test_values(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    x, table = inputs(rows, 5, 7, 11, dtype)
    y = lookup(x, table)
    assert y.dtype == dtype
    assert y.shape == (rows, 11)
    want = lookup2d(x.double().numpy(), table.double().numpy())
    torch.testing.assert_close(y.double(), torch.from_numpy(want), rtol=tolerance, atol=tolerance)


def test_leading_axes_and_strides() -> None:
    x, table = inputs(24, 3, 4, 5)
    want = lookup(x, table)
    torch.testing.assert_close(lookup(x.view(2, 3, 4, 6), table), want.view(2, 3, 4, 5), rtol=0, atol=0)
    torch.testing.assert_close(lookup(x.T.contiguous().T, table), want, rtol=0, atol=0)
    strided = table.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    torch.testing.assert_close(lookup(x, strided), want, rtol=0, atol=0)
    assert lookup(x[0], table).shape == (5,)


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_against_finite_differences(rows: int) -> None:
    x, table = inputs(rows, 2, 4, 3, torch.float64)
    assert torch.autograd.gradcheck(lookup, (x.requires_grad_(), table.requires_grad_()))
    assert torch.autograd.gradcheck(lambda t: lookup(x.detach(), t), (table,))
    assert torch.autograd.gradcheck(lambda a: lookup(a, table.detach()), (x,))


def test_float32_gradients_agree_with_float64() -> None:
    x, table = inputs(111, 9, 8, 33)
    grads = []
    for dtype in (torch.float32, torch.float64):
        a, t = (v.detach().to(dtype, copy=True).requires_grad_() for v in (x, table))
        lookup(a, t).sin().sum().backward()
        grads.append((a.grad.double(), t.grad.double()))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_chunks_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table = inputs(50, 3, 4, 5, torch.float64)

    def run() -> list[torch.Tensor]:
        a, t = x.clone().requires_grad_(), table.clone().requires_grad_()
        y = lookup(a, t)
        y.square().sum().backward()
        return [y.detach(), a.grad, t.grad]

    want = run()
    monkeypatch.setattr(torch_op, "_CHUNK_ELEMENTS", 7 * 15)
    for got, expected in zip(run(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_registration() -> None:
    x, table = inputs(3, 3, 4, 4)
    torch.library.opcheck(lookup.default, (x, table))
    torch.library.opcheck(lookup.default, (x.requires_grad_(), table.requires_grad_()))


def test_the_gradient_has_the_strides_that_the_compiler_was_told() -> None:
    x, table = inputs(4, 3, 4, 5)
    strided = table.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    torch.library.opcheck(
        torch.ops.lmkan.lookup2d_backward.default,
        (torch.randn(4, 5), x.T.contiguous().T, strided, True, True),
    )


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_other_types_are_refused(kind: torch.dtype) -> None:
    x, table = inputs(4, 3, 4, 5)
    for device in ("cpu", "meta"):
        x, table = x.to(device), table.to(device)
        with pytest.raises(ValueError, match=f"expected x of float16, .*found {kind}; convert it"):
            lookup(x.to(kind), table)
        with pytest.raises(ValueError, match=f"expected the table of float16, .*found {kind}; convert it"):
            lookup(x, table.to(kind))


def test_two_devices_are_refused() -> None:
    x, table = inputs(4, 3, 4, 5)
    with pytest.raises(ValueError, match="on one device, found cpu and meta; move one"):
        lookup(x, table.to("meta"))
    with pytest.raises(ValueError, match="on one device, found meta and cpu; move one"):
        lookup(x.to("meta"), table)


def test_autocast_does_not_round_gradients() -> None:
    x, table = (v.requires_grad_() for v in inputs(64, 4, 8, 32))
    lookup(x, table).square().sum().backward()
    want, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        lookup(x, table).square().sum().backward()
    torch.testing.assert_close(x.grad, want, rtol=0, atol=0)


def test_compile_keeps_one_node_and_the_values() -> None:
    x, table = inputs(6, 3, 4, 4)
    graphs = []

    def backend(graph: torch.fx.GraphModule, examples: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda a, t: lookup(a, t) * 2, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, table), lookup(x, table) * 2, rtol=0, atol=0)
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(lookup) + targets.count(lookup.default) == 1


@pytest.mark.parametrize(("x_shape", "message"), [((3, 5), r"expected x \[..., 6\]"), ((), "expected x")])
def test_bad_shapes_are_refused_eagerly_and_while_tracing(x_shape: tuple, message: str) -> None:
    _, table = inputs(1, 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        lookup(torch.zeros(x_shape), table)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        lookup(mode.from_tensor(torch.zeros(x_shape)), mode.from_tensor(table))


def test_the_table_may_change_between_calls() -> None:
    x, table = inputs(5, 3, 4, 8)
    before = lookup(x, table)
    table.data.mul_(2)  # does not bump the version counter that a cache could watch
    torch.testing.assert_close(lookup(x, table), 2 * before)


def test_threads_agree_bit_for_bit() -> None:
    x, table = inputs(3000, 32, 8, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(lookup(x, table).numpy())
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*results)


def test_it_makes_every_tensor_where_x_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other devices than the CPU, as far as a machine without one can tell: PyTorch's meta device refuses to be
    mixed with the CPU as a GPU does.
    """
    multiplied = []

    def addmm_(self: torch.Tensor, scatter: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        multiplied.append(
            [tensor.device.type for tensor in (self, scatter, dense)]
        )  # meta has no sparse product
        return self

    monkeypatch.setattr(torch.Tensor, "addmm_", addmm_)
    x, table = (tensor.to("meta") for tensor in inputs(21, 6, 8, 5))
    assert torch_op._lookup2d_torch(x, table).device.type == "meta"
    backward = torch_op.lookup2d_backward._init_fn
    gradients = backward(torch.empty(21, 5, device="meta"), x, table, True, True)
    assert [(g.device.type, g.shape) for g in gradients] == [("meta", x.shape), ("meta", table.shape)]
    assert multiplied == [["meta"] * 3]

    grid = torch_op._grid
    monkeypatch.setattr(torch_op, "_grid", lambda count, dtype, _: grid(count, dtype, torch.device("cpu")))
    with pytest.raises(RuntimeError, match="device"):
        torch_op._lookup2d_torch(x, table)


# --- On a GPU ----------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and PyTorch with CUDA")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (1000, 6), (3, 0, 6), (2, 5, 6)], ids=str)
def test_values_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, table = 2 * torch.randn(shape), torch.randn(3, 9, 9, 7)
    x, table = x.to("cuda", dtype), table.to("cuda", dtype)
    y = lookup(x, table)
    assert (y.device, y.dtype, y.shape) == (x.device, dtype, (*shape[:-1], 7))
    want = lookup2d(x.double().cpu().numpy().reshape(-1, 6), table.double().cpu().numpy())
    error = np.abs(y.double().cpu().numpy().reshape(-1, 7) - want).max(initial=0.0)
    assert error <= tolerance * np.abs(want).max(initial=1.0)


@pytest.mark.gpu
@on_a_gpu
def test_gradients_on_a_gpu() -> None:
    torch.manual_seed(0)
    x, table, weight = torch.randn(500, 6), torch.randn(3, 9, 9, 7), torch.randn(500, 7)
    found = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("cuda", torch.float32)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, table)]
        (lookup(*leaves) * weight.to(device, dtype)).sum().backward()
        found[device, dtype] = [t.grad.double().cpu() for t in leaves]
    for key, tolerance in ((("cuda", torch.float64), 1e-10), (("cuda", torch.float32), 1e-4)):
        for gradient, want in zip(found[key], found["cpu", torch.float64], strict=True):
            assert (gradient - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.gpu
@on_a_gpu
def test_compile_on_a_gpu() -> None:
    torch.manual_seed(0)
    x, table = torch.randn(64, 6, device="cuda"), torch.randn(3, 9, 9, 7, device="cuda")
    compiled = torch.compile(lambda x, table: torch.relu(lookup(x, table)) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x, table), torch.relu(lookup(x, table)) + 1)
