"""What `inspect` says of models that contradict themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lmkan_deploy
from lmkan_deploy.errors import ModelError


def save(path: Path, table: tuple[int, ...] | None, *, features: int = 6) -> Path:
    """A lookup node as somebody might write it; without a table's shape the table is an input."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", features])]
    weights = []
    if table is None:
        inputs.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, ["p", "g", "g", "o"]))
    else:
        weights.append(numpy_helper.from_array(np.zeros(table, np.float32), "t"))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])]
    node = helper.make_node("LMKAN2D", ["x", "t"], ["y"], "first", domain="lmkan")
    graph = helper.make_graph([node], "one", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("lmkan", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    "shape", [(), (3,), (3, 5, 5), (3, 5, 5, 4, 1), (3, 5, 6, 4), (3, 3, 3, 4), (0, 5, 5, 4), (3, 5, 5, 0)]
)
def test_tables_of_a_wrong_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", shape)
    with pytest.raises(
        ModelError, match=r"expected a table \[pairs, .* for LMKAN2D node first, found .*; export"
    ):
        lmkan_deploy.inspect(path)


def test_a_table_that_does_not_fit_the_features(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", (2, 5, 5, 4))
    with pytest.raises(
        ModelError, match=r"expected 4 features for the table .* of LMKAN2D node first, found 6"
    ):
        lmkan_deploy.inspect(path)


def test_a_table_that_is_an_input(tmp_path: Path) -> None:
    info = lmkan_deploy.inspect(save(tmp_path / "m.onnx", None))
    assert info.layers == []
    assert info.other_nodes == {"LMKAN2D": 1}
