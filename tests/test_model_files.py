"""Model files that are damaged, hostile, or linked: one line that says what is wrong, or the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lmkan_deploy
from lmkan_deploy.converters import model_file
from lmkan_deploy.converters.model_file import load_model, staged_model
from lmkan_deploy.converters.onnx_function import function_proto
from lmkan_deploy.converters.passes import noted_outcomes
from lmkan_deploy.errors import ModelError
from lmkan_deploy.inspection import inspect_model
from lmkan_deploy.runtime.axis_limits import noted_limits
from lmkan_deploy.runtime.runner import load_runner
from networks import ExportedStack


def one_layer(*, quantized: bool = False) -> onnx.ModelProto:
    """y = LMKAN2D(x, table), with byte scales where it is quantized."""
    table = np.random.default_rng(0).integers(-9, 9, (2, 6, 6, 4))
    arrays = {"table": table.astype(np.int8 if quantized else np.float32)}
    op_type, nodes, inputs = "LMKAN2D", [], ["x", "table"]
    if quantized:
        op_type = "LMKAN2DQuantized"
        arrays |= {"multiple": np.full((2, 4), 9, np.uint8), "step": np.ones(1, np.float32)}
        nodes.append(helper.make_node("Cast", ["multiple"], ["float"], "cast", to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", ["float", "step"], ["scale"], "mul"))
        inputs.append("scale")
    nodes.append(helper.make_node(op_type, inputs, ["y"], "layer", domain="lmkan"))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(
        graph,
        functions=[function_proto(20, op_type)],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("lmkan", 1)],
        ir_version=10,
    )


def external(name: str, location: str, shape: list[int], offset: str = "0") -> TensorProto:
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset)):
        tensor.external_data.add(key=key, value=value)
    return tensor


def cut_short(model: onnx.ModelProto) -> None:
    table = model.graph.initializer[0]
    table.raw_data = table.raw_data[:100]


def negative_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -2


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def unknown_type_of_x(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 99


def bad_function(model: onnx.ModelProto) -> None:
    model.functions[0].node[0].attribute[0].type = 0


def same_node_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(model.graph.node[0])


def no_output(model: onnx.ModelProto) -> None:
    del model.graph.node[0].output[:]


def no_table(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[1:]


def bad_offset(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(external("table", "m.bin", [2, 6, 6, 4], "x"))


def with_node(op_type: str, *inputs: str, **attributes: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(op_type, inputs, ["z"], **attributes))

    return change


REFUSED = {
    "cut short": (cut_short, "the values of table in .*, found cannot reshape"),
    "negative size": (negative_size, r"the values of table in .*, found shape \[-2, 6, 6, 4\]"),
    "unknown type": (unknown_type, "found 99 is not a valid DataType"),
    "unknown type of x": (unknown_type_of_x, "found 99 is not a valid DataType"),
    "function": (
        bad_function,
        'attribute value of Constant node "zero" to be of type TENSOR, found UNDEFINED',
    ),
    "same node twice": (same_node_twice, "expected a valid ONNX model, found .*"),
    "no output": (no_output, 'the outputs y of LMKAN2D node "layer", found 0'),
    "no table": (no_table, 'the inputs x, table of LMKAN2D node "layer", found 1'),
    "offset": (bad_offset, "expected a valid ONNX model, found .*"),
    "Neg": (with_node("Neg"), "the inputs X of a Neg node, found 0"),
    "Add": (with_node("Add", "y"), "the inputs A, B of a Add node, found 1"),
    "Mul": (with_node("Mul", "", "y"), "the inputs A, B of a Mul node, found no A"),
    "perm": (
        with_node("Transpose", "y", perm=1.0),
        "perm of a Transpose node to be of type INTS, found FLOAT",
    ),
}


def refuses(path: Path, words: str) -> None:
    """Everything that reads the file says so."""
    for read in (
        lambda: inspect_model(path),
        lambda: lmkan_deploy.optimize(path, path.with_name("out.onnx"), check=False),
        lambda: load_runner(path, "onnx-reference"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not path.with_name("out.onnx").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_models(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    model = one_layer()
    change(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refuses(tmp_path / "m.onnx", rf"{words}.*; copy or export it again")
    with pytest.raises(ModelError, match=r"m\.onnx"):
        load_runner(tmp_path / "m.onnx", "onnxruntime-function")


@pytest.mark.parametrize("content", [b"not onnx at all", b"\x08\x0a\x3a\xff\xff", b"{}"])
def test_files_of_another_format(content: bytes, tmp_path: Path) -> None:
    for name in ("m.onnx", "m.json", "m.textproto"):  # onnx chooses a format by the name
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ModelError, match=r"which is damaged or of another format; copy or export it again"
        ):
            load_model(tmp_path / name)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("node", [0, 1], ids=["Cast", "Mul"])
def test_scales_with_other_inputs(node: int, count: int, tmp_path: Path) -> None:
    model = one_layer(quantized=True)
    inputs = model.graph.node[node].input
    if len(inputs) == count:
        return
    inputs[:] = (["multiple"] * count) if node == 0 else ["float", "step", "step"][:count]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refuses(tmp_path / "m.onnx", rf"the inputs .* found {count} in")


@pytest.mark.parametrize(
    "text", ['{"n": [1e400, null, 1]}', '{"n": [-1, null, 1]}', '{"n": [1e99, null, 1]}', "[1]", "x"]
)
def test_limits_that_are_none(text: str) -> None:
    assert noted_limits({"lmkan_deploy.axis_limits": text}) == {}


@pytest.mark.parametrize("text", ['{"clean-up": "x"}', '{"clean-up": [1]}', '{"clean-up": {}}', "[1]", "x"])
def test_notes_of_passes_that_are_none(text: str, tmp_path: Path) -> None:
    assert noted_outcomes({"lmkan_deploy.passes_applied": text}) == ({}, {})
    model = one_layer()
    helper.set_model_props(model, {"lmkan_deploy.passes_applied": text})
    onnx.save(model, tmp_path / "m.onnx")
    lmkan_deploy.optimize(tmp_path / "m.onnx", tmp_path / "out.onnx", check=False)
    assert "lmkan_deploy.passes_applied" in load_model(tmp_path / "out.onnx").metadata_props


def in_weights(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer.append(tensor)


def in_constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["z"], value=tensor))


def in_branch(model: onnx.ModelProto, tensor: TensorProto) -> None:
    def branch(name: str, weights: TensorProto) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{name} out", TensorProto.FLOAT, [8])
        return helper.make_graph(
            [helper.make_node("Identity", [weights.name], [out.name])], name, [], [out], [weights]
        )

    other = numpy_helper.from_array(np.zeros(8, np.float32), "zeros")
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    model.graph.node.append(
        helper.make_node(
            "If", ["condition"], ["z"], then_branch=branch("yes", tensor), else_branch=branch("no", other)
        )
    )


def in_function(model: onnx.ModelProto, tensor: TensorProto) -> None:
    body = [helper.make_node("Constant", [], ["w"], value=tensor)]
    model.functions.append(helper.make_function("my", "F", [], ["w"], body, [helper.make_opsetid("", 20)]))
    model.opset_import.append(helper.make_opsetid("my", 1))
    model.graph.node.append(helper.make_node("F", [], ["z"], domain="my"))


PLACES = {"weights": in_weights, "constant": in_constant, "branch": in_branch, "function": in_function}
SECRET = np.frombuffer(b"SECRET!!" * 4, np.float32)


def with_external(place: str, location: str) -> onnx.ModelProto:
    model = one_layer()
    PLACES[place](model, external("elsewhere", location, [8]))
    if place == "weights":
        model.graph.node.append(helper.make_node("Identity", ["elsewhere"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [8]))
    return model


@pytest.mark.parametrize("place", PLACES)
def test_no_file_outside_of_the_folder_is_read(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(SECRET.tobytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    for location, words in (
        ("../secret", r"in its own folder, found '\.\./secret'; a model file may not read others"),
        (str(tmp_path / "secret"), "in its own folder, found '/.*'; a model file may not read others"),
        (
            "link",
            "in its own folder, found that .*link is a link to .*secret; .*: copy that file to its place",
        ),
        ("none", "found no such file; copy it together with the model"),
    ):
        (folder / "m.onnx").write_bytes(with_external(place, location).SerializeToString())
        refuses(folder / "m.onnx", words)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["file", "hard link", "link"])
def test_weights_in_the_folder(kind: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(with_external(place, "data").SerializeToString())
    (tmp_path / ("data" if kind == "file" else "blob")).write_bytes(SECRET.tobytes())
    if kind == "hard link":
        os.link(tmp_path / "blob", tmp_path / "data")
    elif kind == "link":
        (tmp_path / "data").symlink_to("blob")
    feeds = {"x": np.zeros((1, 4), np.float32)}
    np.testing.assert_array_equal(load_runner(path, "onnx-reference").run(feeds)["z"], SECRET)
    lmkan_deploy.optimize(path, tmp_path / "out.onnx", check=False)
    for name in ("m.onnx", "data", "blob"):
        (tmp_path / name).unlink(missing_ok=True)
    for runtime in ("onnxruntime", "onnx-reference"):
        np.testing.assert_array_equal(load_runner(tmp_path / "out.onnx", runtime).run(feeds)["z"], SECRET)


def test_links_into_a_cache_of_downloads(stack: ExportedStack, tmp_path: Path) -> None:
    """Hugging Face's: both files are links to others that lie side by side."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    lmkan_deploy.export(stack.checkpoint, tmp_path / "m.onnx", external_data=True)
    for name, blob in (("m.onnx", "aaa"), ("m.onnx.data", "bbb")):
        (tmp_path / name).rename(blobs / blob)
        (snapshot / name).symlink_to(Path("..") / "blobs" / blob)
    inspect_model(snapshot / "m.onnx")
    lmkan_deploy.optimize(snapshot / "m.onnx", tmp_path / "out.onnx")
    lmkan_deploy.verify(snapshot / "m.onnx", checkpoint=stack.checkpoint, runtimes=["onnx-reference"])


def test_a_single_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(one_layer(), tmp_path / "m.onnx")
    monkeypatch.setattr(model_file, "_SINGLE_FILE_BYTES", 1000)
    model = load_model(tmp_path / "m.onnx")
    words = r"expected less than 2 GiB of weights in one file, found 0\.00 GiB; leave out --single-file"
    with pytest.raises(ModelError, match=words), staged_model(model, tmp_path / "out.onnx"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    with staged_model(model, tmp_path / "out.onnx", external_data=True):
        pass
    assert (tmp_path / "out.onnx.data").exists()


def test_a_model_that_can_not_be_written(tmp_path: Path) -> None:
    onnx.save(one_layer(), tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    model.metadata_props["n"] = 1  # type: ignore[assignment]
    with (
        pytest.raises(ModelError, match=r"expected a model that ONNX has a form for, found .*; export"),
        staged_model(model, tmp_path / "out.onnx"),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
