"""What a user reads where ONNX Runtime refuses a model: what was found, and what helps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import lmkan_deploy
from lmkan_deploy.errors import InputError, ModelError
from lmkan_deploy.runtime.runner import load_runner
from networks import ExportedStack


def without_function(model: onnx.ModelProto) -> None:
    del model.functions[:]


def newer_format(model: onnx.ModelProto) -> None:
    model.ir_version = 99


def newer_opset(model: onnx.ModelProto) -> None:
    next(entry for entry in model.opset_import if entry.domain == "").version = 99


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("NoSuchOperator", ["x"], ["z"]))


def operator_of_others(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.others", 1))
    model.graph.node.append(helper.make_node("Theirs", ["x"], ["z"], domain="com.others"))


def input_from_nowhere(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            without_function,
            r"function of lmkan::LMKAN2D in m\.onnx, which the runtime onnxruntime-function needs, found none; "
            r"let lmkan-deploy optimize add it, or .* --runtime onnxruntime$",
        ),
        (newer_format, r"IR version \d+ or earlier, found 99 in m\.onnx; install a later release"),
        (newer_opset, r"expected opset \d+ of ai\.onnx .*, found 99 in m\.onnx; export with --opset"),
        (unknown_operator, r"found NoSuchOperator of opset 20 in m\.onnx; export the network without it"),
        (operator_of_others, r"found com\.others:Theirs in m\.onnx; .* register its library"),
        (input_from_nowhere, r"could not load m\.onnx: Invalid model\. .*nowhere.*; export the model again"),
    ],
)
def test_models_that_are_refused(
    change: Callable[[onnx.ModelProto], None], words: str, stack: ExportedStack, tmp_path: Path
) -> None:
    model = onnx.load(stack.onnx)
    change(model)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=words) as caught:
        load_runner(tmp_path / "m.onnx", "onnxruntime-function")
    assert "[ONNXRuntimeError]" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_damaged_file(stack: ExportedStack, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(stack.onnx.read_bytes()[:1000])
    with pytest.raises(
        ModelError, match=r"found m\.onnx, which is damaged or of another format; copy or export"
    ):
        load_runner(tmp_path / "m.onnx")


def test_weights_that_are_missing_or_cut_short(stack: ExportedStack, tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    lmkan_deploy.export(stack.checkpoint, path, external_data=True)
    os.truncate(data, 50)
    with pytest.raises(
        ModelError, match=r"of m\.onnx in its file of weights, found only 50 bytes there; copy"
    ):
        load_runner(path)
    data.unlink()
    with pytest.raises(
        ModelError, match=r"weights of m\.onnx in .*m\.onnx\.data, found no such file; copy it"
    ):
        load_runner(path)


def with_table(stack: ExportedStack, path: Path, table: np.ndarray) -> Path:
    """The stack's first layer with another table."""
    model = onnx.load(stack.onnx)
    name = next(node.input[1] for node in model.graph.node if node.op_type == "LMKAN2D")
    old = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    old.CopyFrom(onnx.numpy_helper.from_array(table.astype(np.float32), name))
    onnx.save(model, path)
    return path


def table_of(stack: ExportedStack) -> np.ndarray:
    model = onnx.load(stack.onnx)
    name = next(node.input[1] for node in model.graph.node if node.op_type == "LMKAN2D")
    return onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).copy()


def test_the_operators_words_stand_alone(stack: ExportedStack, tmp_path: Path) -> None:
    table = table_of(stack)
    table[0, 0, 0, 0] = np.nan
    with pytest.raises(
        ModelError,
        match=r'^m\.onnx: LMKAN2D node ".*": expected finite values in table, found 1 NaN .* training diverged$',
    ):
        load_runner(with_table(stack, tmp_path / "m.onnx", table))
    wrong = np.zeros((len(table), 3, 3, table.shape[-1]))
    with pytest.raises(
        ModelError,
        match=r'^m\.onnx: LMKAN2D node ".*": expected table .*, found \[.*\]; export the model again$',
    ):
        load_runner(with_table(stack, tmp_path / "m.onnx", wrong))


def test_features_and_tables_that_contradict_each_other(stack: ExportedStack, tmp_path: Path) -> None:
    table = table_of(stack)
    path = with_table(stack, tmp_path / "m.onnx", np.concatenate([table, table]))
    spec = load_runner(path).inputs[0]
    feeds = {spec.name: np.zeros([3 if isinstance(size, str) else size for size in spec.shape], np.float32)}
    pairs = 2 * len(table)
    with pytest.raises(
        InputError,
        match=rf'^LMKAN2D node ".*": expected x \[..., {2 * pairs}\] because the table has {pairs} pairs of .*; '
        rf"give x {2 * pairs} features, or export the model again$",
    ):
        load_runner(path).run(feeds)
    with pytest.raises(
        InputError,
        match=r"^expected features and a table that fit each other in a lookup layer, found features \[3, .*\] "
        rf"and a table of {pairs} pairs; lmkan-deploy inspect names the layers$",
    ):
        load_runner(path, "onnxruntime-function").run(feeds)


def save_one_node(path: Path, node: onnx.NodeProto, input_type: int) -> None:
    """A model whose inputs are vectors of any sizes."""
    inputs = [helper.make_tensor_value_info(name, input_type, [f"size of {name}"]) for name in node.input]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "one", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def test_values_that_a_network_does_not_take(tmp_path: Path) -> None:
    save_one_node(tmp_path / "m.onnx", helper.make_node("Add", ["a", "b"], ["c"]), TensorProto.FLOAT)
    with pytest.raises(
        InputError, match=r"could not run the model: .*Add node.*; check that the network takes"
    ):
        load_runner(tmp_path / "m.onnx").run({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})


def test_more_than_the_memory_holds(tmp_path: Path) -> None:
    save_one_node(
        tmp_path / "m.onnx", helper.make_node("ConstantOfShape", ["shape"], ["y"]), TensorProto.INT64
    )
    with pytest.raises(InputError, match="intermediate results, found too little; run fewer rows at a time"):
        load_runner(tmp_path / "m.onnx").run({"shape": np.array([1 << 50], np.int64)})


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-function"])
def test_empty_batches_that_would_end_the_process(
    runtime: str, stack: ExportedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    node = helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,ij->ij")
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.save(model, tmp_path / "m.onnx")
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    runner = load_runner(tmp_path / "m.onnx", runtime)
    empty = {"x": np.zeros((0, 4), np.float32)}
    for call in (runner.run, runner.bind):
        with pytest.raises(
            InputError, match=r"at least one row of x, found shape \[0, 4\]: .* before 1\.25 "
        ):
            call(empty)
    assert runner.run({"x": np.full((2, 4), 3, np.float32)})["y"].tolist() == [[9] * 4] * 2
    lookups = load_runner(stack.onnx, runtime)
    sizes = [0 if isinstance(size, str) else size for size in lookups.inputs[0].shape]
    assert lookups.run({lookups.inputs[0].name: np.zeros(sizes, np.float32)})["y"].shape[0] == 0
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.0")
    assert not load_runner(tmp_path / "m.onnx", runtime)._needs_rows
