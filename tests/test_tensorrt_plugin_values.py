"""What the TensorRT plugin computes, by which tactics, in how much memory; on host memory, and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import torch

from lmkan_deploy.reference import dequantize_table, lookup2d
from tensorrt_driver import Library, Plugin, PluginTensorDesc, dynamic_tensor, tensor
from tensorrt_plugins import BF16, FLOAT, FLOATS, HALF, INT8, TABLE, X, create, profile

NUMPY = {FLOAT: np.float32, HALF: np.float16, BF16: ml_dtypes.bfloat16, INT8: np.int8}
RTOL = {FLOAT: 1e-5, HALF: 2e-3, BF16: 2e-2}  # of the largest output, by x's type
AUTO, GATHER, SHARED, NARROW, SPLIT = 0, 1, 2, 3, 4


def arrays(
    x_type: int, table_type: int, x_shape: Sequence[int], table_shape: Sequence[int]
) -> tuple[np.ndarray, ...]:
    """x and table, and scale where the table has integers."""
    rng = np.random.default_rng(7)
    x = (3.0 * rng.standard_normal(x_shape)).astype(NUMPY[x_type])
    if table_type == INT8:
        scale = rng.uniform(0.01, 0.1, (table_shape[0], table_shape[3])).astype(np.float32)
        return x, rng.integers(-127, 128, table_shape, np.int8), scale
    return x, rng.standard_normal(table_shape).astype(NUMPY[table_type])


def trt_type(array: np.ndarray) -> int:
    return next(kind for kind, dtype in NUMPY.items() if array.dtype == dtype)


def describe(*tensors: np.ndarray) -> list[PluginTensorDesc]:
    return [tensor(array.shape, trt_type(array)) for array in tensors]


def evaluate(plugin: Plugin, *inputs: np.ndarray, workspace: int, stream: int = 1) -> np.ndarray | None:
    """y, or None where the plugin refuses; all in host memory."""
    x, table = inputs[:2]
    y = np.full((*x.shape[:-1], table.shape[3]), 77, x.dtype)
    descs = describe(*inputs, y)
    memory = np.zeros(workspace, np.uint8)
    assert plugin.shape_change(descs) == 0
    addresses = [array.ctypes.data for array in (*inputs, y)]
    status = plugin.enqueue(descs, addresses, memory.ctypes.data if workspace else 0, stream)
    return y if status == 0 else None


def expected_y(x: np.ndarray, table: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    return lookup2d(x, table if scale is None else dequantize_table(table, scale))


# --- Tactics and workspace -----------------------------------------------------------------------------


def test_tactics_are_the_kernels(host: Library) -> None:
    plugin = create(host)
    assert plugin.tactics() == []
    assert plugin.configure(profile(X, TABLE)) == 0
    assert plugin.tactics() == [NARROW, SHARED, SPLIT, GATHER]


def test_tactics_without_a_device(cuda: Library) -> None:
    """None, so that TensorRT uses its default, 0: the kernels then choose at run time."""
    plugin = create(cuda)
    assert plugin.configure(profile(X, TABLE)) == 0
    if torch.cuda.is_available():
        assert set(plugin.tactics()) <= {GATHER, SHARED, NARROW, SPLIT}
    else:
        assert plugin.tactics() == []


def test_the_workspace_is_what_the_largest_batch_needs(host: Library) -> None:
    plugin = create(host)
    for most in (1, 64, 10**6):
        tensors = profile((-1, 5, 6), TABLE, most=most)
        assert plugin.configure(tensors) == 0
        assert plugin.workspace_size(tensors) == 4 * 7 * 5 * most  # SPLIT's, in host_kernels.cc
    tensors[1] = dynamic_tensor((3, 5, 5, -1), FLOAT, low=(3, 5, 5, 1), high=(3, 5, 5, 90))
    assert plugin.workspace_size(tensors) == 4 * 90 * 5 * most


def test_clones_outlive_their_original_and_share_nothing_with_it(host: Library) -> None:
    original = create(host)
    tensors = profile([-1, 6], [3, 5, 5, 7])
    assert original.configure(tensors) == 0
    original.set_tactic(SPLIT)
    clones = [original.clone(), original.attach()]
    original.set_tactic(GATHER)
    addresses = {field.data for each in (original, *clones) for field in each.fields()}
    assert len(addresses) == 3
    assert original.configure(profile([-1, 6], [3, 5, 5, 7], x_type=HALF)) == 0
    del original
    for clone in clones:
        assert clone.tactics() == [NARROW, SHARED, SPLIT, GATHER]
        inputs = arrays(FLOAT, FLOAT, (4, 6), (3, 5, 5, 7))
        assert evaluate(clone, *inputs, workspace=0) is None
        assert "expected a workspace" in host.only_line()  # SPLIT
        assert evaluate(clone, *inputs, workspace=4 * 7 * 4) is not None


# --- Values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table_type", [*FLOATS, INT8], ids=["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("x_type", FLOATS, ids=["float32", "float16", "bfloat16"])
def test_values(host: Library, x_type: int, table_type: int) -> None:
    plugin = create(host, quantized=table_type == INT8)
    for shape in ((6,), (19, 6), (2, 3, 1, 6)):
        inputs = arrays(x_type, table_type, shape, TABLE)
        expected = expected_y(*inputs)
        for tactic in (AUTO, GATHER, SHARED, NARROW, SPLIT):
            assert plugin.set_tactic(tactic) == 0
            y = evaluate(plugin, *inputs, workspace=4 * 7 * 19)
            assert y is not None, host.lines
            rtol = max(RTOL[x_type], 1e-2 if table_type == INT8 else 0.0)
            np.testing.assert_allclose(y.astype(np.float64), expected, atol=rtol * np.abs(expected).max())


def test_no_rows(library: Library) -> None:
    y = evaluate(create(library), *arrays(FLOAT, FLOAT, (0, 6), TABLE), workspace=0)
    assert y is not None
    assert y.shape == (0, 7)


def test_failures_of_the_kernels_are_reported(host: Library) -> None:
    plugin = create(host)
    inputs = arrays(FLOAT, FLOAT, (4, 6), TABLE)
    assert plugin.set_tactic(SPLIT) == 0
    assert evaluate(plugin, *inputs, workspace=0) is None
    assert host.only_line() == 'LMKAN2D layer "layer 1": expected a workspace of 112 bytes, found 0'
    assert plugin.set_tactic(GATHER) == 0
    assert evaluate(plugin, *inputs, workspace=0, stream=0) is None
    assert host.only_line().endswith("expected the stream that TensorRT gave, found none")
    assert plugin.set_tactic(9) == 0
    assert evaluate(plugin, *inputs, workspace=0) is None
    assert host.only_line().endswith("expected tactic 0 to 4, found 9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that CUDA does not refuse")
def test_without_a_device_the_kernels_status_is_returned(cuda: Library) -> None:
    assert evaluate(create(cuda), *arrays(FLOAT, FLOAT, (4, 6), TABLE), workspace=0) is None
    assert cuda.only_line().startswith('LMKAN2D layer "layer 1": ')


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0, for which the kernels are built, and PyTorch with CUDA",
)
@pytest.mark.parametrize("table_type", [*FLOATS, INT8], ids=["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("x_type", FLOATS, ids=["float32", "float16", "bfloat16"])
def test_values_on_a_gpu(cuda: Library, x_type: int, table_type: int) -> None:
    plugin = create(cuda, quantized=table_type == INT8)
    inputs = arrays(x_type, table_type, (989, 6), TABLE)
    expected = expected_y(*inputs)
    y = np.zeros((989, 7), inputs[0].dtype)
    descs = describe(*inputs, y)
    dynamic = [dynamic_tensor(array.shape, trt_type(array)) for array in (*inputs, y)]
    assert plugin.configure(dynamic) == 0
    stream = torch.cuda.Stream()
    memory = [torch.from_numpy(array.view(np.uint8).copy()).cuda() for array in (*inputs, y)]
    workspace = torch.empty(max(plugin.workspace_size(dynamic), 1), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    for tactic in (AUTO, *plugin.tactics()):
        assert plugin.set_tactic(tactic) == 0
        assert plugin.shape_change(descs) == 0
        addresses = [block.data_ptr() for block in memory]
        assert plugin.enqueue(descs, addresses, workspace.data_ptr(), stream.cuda_stream) == 0, cuda.lines
        stream.synchronize()
        found = memory[-1].cpu().numpy().view(y.dtype).reshape(y.shape)
        rtol = max(RTOL[x_type], 1e-2 if table_type == INT8 else 0.0)
        np.testing.assert_allclose(found.astype(np.float64), expected, atol=rtol * np.abs(expected).max())
