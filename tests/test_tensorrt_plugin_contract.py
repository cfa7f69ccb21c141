"""The TensorRT plugin's contract: how plugins are created, which types and shapes they take and refuse."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import tensorrt_rtx as trt

from lmkan_deploy.spec import DOMAIN, OP_TYPE, OPSET_VERSION, QUANTIZED_OP_TYPE
from tensorrt_builds import PLUGIN
from tensorrt_driver import Library, PluginField, dynamic_tensor, tensor
from tensorrt_plugins import BF16, FLOAT, FLOATS, HALF, INT8, OPERATORS, TABLE, X, create, fixed, profile

# --- Creation ------------------------------------------------------------------------------------------

CHAR = int(trt.PluginFieldType.CHAR)
INT32 = int(trt.PluginFieldType.INT32)


def layer_name(text: bytes, kind: int = CHAR, length: int | None = None) -> PluginField:
    data = ctypes.create_string_buffer(text, max(len(text), 1))
    field = PluginField(b"layer_name", ctypes.addressof(data), kind, len(text) if length is None else length)
    field.keep = data
    return field


def test_the_library_has_a_creator_for_each_operator(library: Library) -> None:
    assert library.count == len(OPERATORS)
    for index, name in enumerate(OPERATORS):
        plugin = create(library, bool(index))
        assert plugin.name == name
        assert [plugin.has_capability(kind) for kind in (0, 1, 2, 3)] == [True, True, True, False]
    assert create(library, name=None).name == OP_TYPE


@pytest.mark.parametrize(
    ("field", "found"),
    [
        (
            PluginField(b"nonsense", None, CHAR, 0),
            'expected no field other than layer_name, found "nonsense"',
        ),
        (PluginField(None, None, CHAR, 0), 'expected no field other than layer_name, found ""'),
        (layer_name(b"a", INT32), "found length 1 of type 5"),
        (layer_name(b""), "found length 0 of type 6"),
        (layer_name(b"a", length=-1), "found length -1 of type 6"),
        (layer_name(b"a" * 1025), "found length 1025 of type 6"),
        (PluginField(b"layer_name", None, CHAR, 1), "found length 1 of type 6 without data"),
    ],
    ids=["name", "no name", "type", "empty", "negative", "long", "no data"],
)
def test_bad_fields_are_refused(library: Library, field: PluginField, found: str) -> None:
    assert library.create(1, "layer 3", [field]) is None
    line = library.only_line()
    assert line.startswith(f'{QUANTIZED_OP_TYPE} layer "layer 3": expected ')
    assert line.endswith(found)


@pytest.mark.parametrize("quantized", [False, True])
def test_an_engine_keeps_the_layers_name(library: Library, quantized: bool) -> None:
    plugin = create(library, quantized, name="encoder/layer 5")
    (field,) = plugin.fields()
    assert (field.name, field.type, field.length) == (b"layer_name", CHAR, 15)
    again = create(library, quantized, name="", fields=[field], phase=1)
    for each in (again, again.clone(), again.attach()):
        assert each.name == OPERATORS[quantized]
        (kept,) = each.fields()
        assert ctypes.string_at(kept.data, kept.length) == b"encoder/layer 5"
        assert each.output_types([]) is None
        assert 'layer "encoder/layer 5": ' in library.only_line()
    assert create(library, quantized, name="").fields() == []
    assert create(library, name="x" * 5000).fields()[0].length == 1024
    plugin = create(library, name="é" * 1000 + "x")  # cut between characters
    (field,) = plugin.fields()
    assert ctypes.string_at(field.data, field.length).decode() == "é" * 512
    assert plugin.output_types([]) is None
    assert f'layer "{"é" * 80}": ' in library.only_line()


def test_messages_go_to_stderr_where_no_logger_is_found(
    host: Library, capfd: pytest.CaptureFixture[str]
) -> None:
    host.driver.driver_log_to(None)
    assert create(host).output_types([INT8, FLOAT]) is None
    expected = 'LMKAN2D layer "layer 1": expected x of type float32, float16 or bfloat16, found int8\n'
    assert capfd.readouterr().err == expected


# --- Types and formats ---------------------------------------------------------------------------------

ALL_TYPES = [int(kind) for kind in trt.DataType.__members__.values()]

# The contract: types by position. y, the last position, has x's type.
ACCEPTED = {
    False: ((FLOAT, HALF, BF16), (FLOAT, HALF, BF16)),
    True: ((FLOAT, HALF, BF16), (INT8,), (FLOAT,)),
}
SHAPES = ((-1, 6), (3, 5, 5, 7), (3, 7))
NAMES = {FLOAT: "float32", HALF: "float16", BF16: "bfloat16", INT8: "int8"}


def test_the_readme_has_the_contract() -> None:
    rows = re.findall(r"^\| (LMKAN2D.*) \|$", (PLUGIN / "README.md").read_text(), re.MULTILINE)
    assert [[cell.strip() for cell in row.split("|")] for row in rows] == [
        [name, str(OPSET_VERSION), DOMAIN]
        + [", ".join(NAMES[kind] for kind in kinds) for kinds in (*ACCEPTED[quantized], ())[:3]]
        + ["as x"]
        for quantized, name in enumerate(OPERATORS)
    ]


@pytest.mark.parametrize("quantized", [False, True])
def test_building_needs_no_memory(library: Library, quantized: bool) -> None:
    """TensorRT configures a plugin before any tensor has an address."""
    plugin = create(library, quantized)
    accepted = ACCEPTED[quantized]
    for types in itertools.product(*accepted):
        tensors = [
            dynamic_tensor(shape, kind, low=fixed(shape, 1), high=fixed(shape, 64))
            for shape, kind in zip((*SHAPES[: len(types)], (-1, 7)), (*types, types[0]), strict=True)
        ]
        assert plugin.configure(tensors) == 0
        assert plugin.workspace_size(tensors) < 2**30


@pytest.mark.parametrize("quantized", [False, True])
def test_output_type_of_every_combination(library: Library, quantized: bool) -> None:
    plugin = create(library, quantized)
    accepted = ACCEPTED[quantized]
    for types in itertools.product(ALL_TYPES, repeat=len(accepted)):
        if all(kind in kinds for kind, kinds in zip(types, accepted, strict=True)):
            assert plugin.output_types(types) == [types[0]]
        else:
            assert plugin.output_types(types) is None
            assert re.search(r"expected (x|table|scale) of type .*, found ", library.only_line())


@pytest.mark.parametrize("quantized", [False, True])
def test_format_combinations(library: Library, quantized: bool) -> None:
    plugin = create(library, quantized)
    accepted = ACCEPTED[quantized]
    num_inputs = len(accepted)
    supported = 0
    for x_type, position in itertools.product(FLOATS, range(num_inputs + 1)):
        first = [x_type, *(kinds[0] for kinds in accepted[1:]), x_type]
        expected = (*accepted, (x_type,))[position]
        for kind, layout in itertools.product(ALL_TYPES, trt.TensorFormat.__members__.values()):
            types = [*first[:position], kind]
            layouts = [0] * position + [int(layout)]
            tensors = [
                dynamic_tensor(shape, each, form)
                for shape, each, form in zip((*SHAPES[:num_inputs], (-1, 7)), types, layouts, strict=False)
            ]
            found = plugin.supports(position, tensors, num_inputs)
            assert found == (kind in expected and layout == trt.TensorFormat.LINEAR), (position, kind, layout)
            supported += found
    assert supported == len(FLOATS) * (sum(map(len, accepted)) + 1)
    tensors = [dynamic_tensor((2, 2), FLOAT)] * 6
    assert not plugin.supports(-1, tensors, num_inputs)
    assert not plugin.supports(num_inputs + 1, tensors, num_inputs)
    assert not plugin.supports(0, tensors, num_inputs + 1)
    assert not plugin.supports(0, tensors, num_inputs, 2)


@pytest.mark.parametrize("quantized", [False, True])
def test_numbers_of_tensors(library: Library, quantized: bool) -> None:
    plugin = create(library, quantized)
    right = len(ACCEPTED[quantized])
    names = "x, table, scale" if quantized else "x, table"
    for num_inputs, num_outputs in ((right - 1, 1), (right + 1, 1), (right, 2)):
        assert plugin.output_types([FLOAT] * num_inputs, num_outputs) is None
        expected = f"expected {right} inputs ({names}) and 1 output, found {num_inputs} and {num_outputs}"
        assert library.only_line().endswith(expected)
    too_many = [tensor((2, 2), FLOAT)] * (right + 2)
    assert plugin.output_shape(*[(2, 2)] * (right + 1)) is None
    assert plugin.configure([dynamic_tensor((2, 2), FLOAT)] * (right + 2)) != 0
    assert plugin.shape_change(too_many) != 0
    assert plugin.workspace_size([dynamic_tensor((2, 2), FLOAT)] * (right + 2)) == 0
    assert len(library.lines) == 4
    library.lines.clear()


# --- Shapes --------------------------------------------------------------------------------------------

TABLES = r"expected table \[pairs, G\+1, G\+1, outputs\] with equal grid axes, G >= 3"


class Refused(NamedTuple):
    quantized: bool
    shapes: tuple[Sequence[int], ...]
    message: str


REFUSED = {
    "odd features": Refused(False, ((-1, 7), TABLE), r"even number of features, found \[\?, 7\]"),
    "no features": Refused(False, ((2, 0), TABLE), r"even number of features, found \[2, 0\]"),
    "no axis": Refused(False, ((), TABLE), r"expected x \[..., features\].*, found \[\]"),
    "pairs": Refused(False, ((2, 8), TABLE), r"expected x \[..., 6\] because .* 3 pairs.*, found \[2, 8\]"),
    "table rank": Refused(False, (X, (3, 5, 5)), TABLES + r".*, found \[3, 5, 5\]"),
    "grid axes": Refused(False, (X, (3, 5, 6, 7)), TABLES + r".*, found \[3, 5, 6, 7\]"),
    "small grid": Refused(False, (X, (3, 3, 3, 7)), TABLES + r".*, found \[3, 3, 3, 7\]"),
    "small grid, other unknown": Refused(False, (X, (3, -1, 3, 7)), TABLES + r".*, found \[3, \?, 3, 7\]"),
    "other unknown, small grid": Refused(False, (X, (3, 3, -1, 7)), TABLES + r".*, found \[3, 3, \?, 7\]"),
    "no outputs": Refused(False, (X, (3, 5, 5, 0)), TABLES + r".*, found \[3, 5, 5, 0\]"),
    "no pairs": Refused(False, ((2, 0), (0, 5, 5, 7)), TABLES + r".*, found \[0, 5, 5, 7\]"),
    "scale pairs": Refused(True, (X, TABLE, (4, 7)), r"expected scale \[3, 7\], .*, found \[4, 7\]"),
    "scale outputs": Refused(True, (X, TABLE, (3, 1)), r"expected scale \[3, 7\], .*, found \[3, 1\]"),
    "scale rank": Refused(True, (X, TABLE, (3,)), r"expected scale \[3, 7\], .*, found \[3\]"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_bad_shapes_are_refused_wherever_tensorrt_tells_them(library: Library, case: Refused) -> None:
    plugin = create(library, case.quantized, name="bad layer")
    pattern = rf'{OPERATORS[case.quantized]} layer "bad layer": .*{case.message}'
    types = [FLOAT, INT8, FLOAT] if case.quantized else [FLOAT, FLOAT]
    described = list(zip(case.shapes, types, strict=True))

    assert plugin.output_shape(*case.shapes) is None
    assert re.fullmatch(pattern, library.only_line())
    y = (2, 7)
    tensors = [dynamic_tensor(shape, kind) for shape, kind in described]
    assert plugin.configure([*tensors, dynamic_tensor(y, FLOAT)]) != 0
    assert re.fullmatch(pattern, library.only_line())
    known = [tensor(fixed(shape), kind) for shape, kind in described]
    assert plugin.shape_change([*known, tensor(y, FLOAT)]) != 0
    assert re.fullmatch(pattern.replace(r"\?", "2"), library.only_line())
    assert plugin.enqueue([*known, tensor(y, FLOAT)], [0] * (len(known) + 1), 0, 0) != 0
    assert re.fullmatch(pattern.replace(r"\?", "2"), library.only_line())


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((6,), TABLE), [7]),
        (((4, 6), TABLE), [4, 7]),
        (((0, 6), TABLE), [0, 7]),
        (((-1, 6), TABLE), [-1, 7]),
        (((-1, -1), (-1, -1, -1, -1)), [-1, -1]),
        (((-1, 6), (-1, -1, -1, 7)), [-1, 7]),
        (((-1, 2, 3, 4, 5, 6, 7, 6), TABLE), [-1, 2, 3, 4, 5, 6, 7, 7]),
        (((2**40, 6), TABLE), [2**40, 7]),
    ],
)
def test_shape_of_y(library: Library, shapes: tuple[Sequence[int], ...], expected: list[int]) -> None:
    assert create(library).output_shape(*shapes) == expected
    scale = (shapes[1][0], shapes[1][3])
    assert create(library, quantized=True).output_shape(*shapes, scale) == expected


def test_types_are_checked_wherever_tensorrt_tells_them(library: Library) -> None:
    plugin = create(library)
    assert plugin.configure(profile(X, TABLE, table_type=INT8)) != 0
    assert library.only_line().endswith("expected table of type float32, float16 or bfloat16, found int8")
    tensors = [
        tensor((2, 6), int(trt.DataType.INT32)),
        tensor(TABLE, FLOAT),
        tensor((2, 7), int(trt.DataType.INT32)),
    ]
    assert plugin.shape_change(tensors) != 0
    assert library.only_line().endswith("expected x of type float32, float16 or bfloat16, found int32")


def test_limits_of_a_profile_are_checked(library: Library) -> None:
    plugin = create(library)
    tensors = profile(X, TABLE)
    assert plugin.configure(tensors) == 0
    tensors[0] = dynamic_tensor((-1, -1), FLOAT, low=(1, 4), high=(64, 6))
    assert plugin.configure(tensors) != 0
    assert re.search(r"expected x \[..., 6\] because .*, found \[1, 4\]", library.only_line())
    tensors[0] = dynamic_tensor((-1, -1), FLOAT, low=(1, 6), high=(64, 8))
    assert plugin.configure(tensors) != 0
    assert re.search(r"expected x \[..., 6\] because .*, found \[64, 8\]", library.only_line())
