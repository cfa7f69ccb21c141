"""What tables in fewer bits cost on real data, and the smallest ones that stay within an error."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.converters.byte_scales import constant_scales, scale_bytes
from lmkan_deploy.converters.onnx_function import attach_function, is_quantized_lookup
from lmkan_deploy.converters.passes.base import (
    add_constant,
    all_lookups,
    constant,
    float32_table,
    lookups,
    name_of,
    table_dtype_of,
)
from lmkan_deploy.converters.quantize import corner_importance
from lmkan_deploy.converters.table_dtype import narrow_tables
from lmkan_deploy.errors import ExportError, InputError, ModelError
from lmkan_deploy.progress import Progress, Step, no_progress
from lmkan_deploy.runtime.onnxruntime import OnnxRuntimeRunner
from lmkan_deploy.runtime.tensors import Arrays
from lmkan_deploy.spec import TableDtype
from lmkan_deploy.verification import ANY_FINITE_ERROR, RANDOM_CASE, TableCost, TableCosts, verify_runners

_MOST_ROWS = 1 << 16
"""Rows of a layer's input from which entries are weighted; more change nothing and take time."""


_BY_SIZE: tuple[TableDtype, ...] = ("int8", "float16", "float32")
"""What `Calibration.choose` chooses from. bfloat16 has float16's size and a bigger error, so that it comes in
where a table is beyond float16's range."""

Cases = Mapping[str, Arrays]


class Calibration:
    """A model with float32 tables, run on data.

    Args:
        model: Not changed.
        cases: Inputs by the name of their case.
        weighted: Whether the scales of int8 tables are those with the least error on the cases, or those
            that clip nothing.

    Raises:
        ValueError: There are no cases.
        ModelError: ONNX Runtime can't run the model.
        InputError: A case does not fit its inputs, or none has finite outputs.
    """

    def __init__(self, model: ir.Model, cases: Cases, *, weighted: bool = False) -> None:
        if not cases:
            raise ValueError("expected at least one case, found none")
        self._model = model
        self._cases = cases
        is_random = all(case.startswith(RANDOM_CASE) for case in cases)
        self._data = "random inputs" if is_random else " and ".join(cases)
        self._nodes = list(lookups(model))
        self._outputs = [str(value.name) for value in model.graph.outputs]
        inputs, self._expected = self._run_float32()
        outputs = [array for arrays in self._expected.values() for array in arrays.values()]
        if not any(np.isfinite(array.astype(np.float64)).any() for array in outputs):
            raise InputError(
                "expected data on which the model has finite outputs, found none; pass other rows"
            )
        self.importances = (
            [
                corner_importance(x, _table_shape(node)[1] - 1)
                for x, node in zip(inputs, self._nodes, strict=True)
            ]
            if weighted
            else None
        )
        """One for each lookup node, or None; see `quantize_table`."""

    def error(self, dtypes: Sequence[TableDtype]) -> float:
        """Largest relative error of the outputs with tables of these types, one for each lookup node.

        Infinite where a table is beyond its type's range.
        """
        narrowed = self._model.clone()
        if narrow_tables(narrowed, dtypes, self.importances).refused:
            return np.inf
        return self._error_of(narrowed)

    def _error_of(self, model: ir.Model) -> float:
        with _runner(model) as runner:
            result = verify_runners(self._expected, [runner], self._cases, rtol=ANY_FINITE_ERROR)
        # The share of labels that change says little beside errors of numbers.
        numbers = [comparison for comparison in result.comparisons if not comparison.is_discrete]
        return max((comparison.max_rel for comparison in numbers or result.comparisons), default=0.0)

    def costs(self, dtypes: Sequence[TableDtype], progress: Progress = no_progress) -> TableCosts:
        """What each layer's types cost, alone.

        Args:
            dtypes: The types in use, one for each lookup node.
            progress: Called at each step.
        """
        result = []
        tables: set[tuple[int, str]] = set()
        for index, (node, wanted) in enumerate(zip(self._nodes, dtypes, strict=True)):
            dtype: str = wanted
            errors: dict[str, float] = {}
            if float32_table(node) is not None:
                others: tuple[TableDtype, ...] = ("float16", "int8", wanted, "bfloat16")
                for other in dict.fromkeys(others):
                    if other == "float32" or (other == "bfloat16" != wanted and "float16" in errors):
                        continue
                    progress(Step(f"measuring {name_of(node)} in {other}", index, len(self._nodes)))
                    alone: list[TableDtype] = ["float32"] * len(dtypes)
                    alone[index] = other
                    error = self.error(alone)
                    if np.isfinite(error):
                        errors[other] = error
            else:
                dtype = table_dtype_of(node)
            result.append(TableCost(name_of(node), dtype, _bytes_once(node, dtype, tables), errors))
        return TableCosts(result, self.error(dtypes), self._data)

    def costs_of(self, narrowed: ir.Model, progress: Progress = no_progress) -> TableCosts:
        """What each narrow table of another model costs, alone.

        Args:
            narrowed: A model with the same lookup nodes: of the same names, or as many where nodes have none.
            progress: Called at each step.

        Raises:
            ModelError: The lookup nodes are not the same ones.
        """
        result = []
        tables: set[tuple[int, str]] = set()
        others = _counterparts(self._nodes, list(all_lookups(narrowed)))
        for index, (node, other) in enumerate(zip(self._nodes, others, strict=True)):
            dtype = table_dtype_of(other)
            errors: dict[str, float] = {}
            if dtype != table_dtype_of(node):
                progress(Step(f"measuring {name_of(node)} in {dtype}", index, len(self._nodes)))
                errors[dtype] = self._error_of(_with_table_of(self._model, index, other))
            result.append(TableCost(name_of(node), dtype, _bytes_once(other, dtype, tables), errors))
        return TableCosts(result, self._error_of(narrowed), self._data)

    def choose(self, max_error: float, progress: Progress = no_progress) -> list[TableDtype]:
        """The smallest type for each layer that keeps the whole model within an error.

        Starts with the smallest types and widens the table that costs most until the error is met; then
        tries to narrow again what was widened, the largest table first.

        Args:
            max_error: Largest relative error of the outputs on the data.
            progress: Called at each step.

        Returns:
            One type for each lookup node.

        Raises:
            ExportError: The error is not a positive number.
        """
        if not max_error > 0:
            raise ExportError(f"expected a largest error above 0, found {max_error}")
        alone = [cost.errors for cost in self.costs(["float32"] * len(self._nodes), progress).layers]
        ladders = [
            [dtype if dtype != "float16" or dtype in errors else "bfloat16" for dtype in _BY_SIZE]
            for errors in alone
        ]
        top = len(_BY_SIZE) - 1
        levels = [0 if errors else top for errors in alone]

        def types() -> list[TableDtype]:
            return [ladder[level] for ladder, level in zip(ladders, levels, strict=True)]

        def cost(index: int) -> float:
            return 0.0 if levels[index] == top else alone[index].get(types()[index], np.inf)

        while any(level < top for level in levels):
            progress(Step(f"trying {', '.join(types())}"))
            if self.error(types()) <= max_error:
                break
            levels[max(range(len(levels)), key=cost)] += 1
        for index in sorted(range(len(levels)), key=lambda i: -_bytes(self._nodes[i], "int8")):
            while levels[index] > 0 and alone[index]:
                levels[index] -= 1
                progress(Step(f"trying {', '.join(types())}"))
                if self.error(types()) > max_error:
                    levels[index] += 1
                    break
        return types()

    def _run_float32(self) -> tuple[list[NDArray[Any]], dict[str, Arrays]]:
        """Rows of every lookup node's input over all cases, and the model's outputs by case."""
        model = self._model.clone()
        wanted = [str(node.inputs[0].name) for node in lookups(model)]  # type: ignore[union-attr]
        present = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
        for node in lookups(model):
            x = node.inputs[0]
            if x is not None and x.name not in present:
                model.graph.outputs.append(x)
                present.add(x.name)
        inputs: list[list[NDArray[Any]]] = [[] for _ in wanted]
        expected = {}
        with _runner(model) as runner:
            for case, feeds in self._cases.items():
                values = dict(feeds) | runner.run(feeds)
                expected[case] = {name: values[name] for name in self._outputs}
                for rows, name in zip(inputs, wanted, strict=True):
                    rows.append(values[name].reshape(-1, values[name].shape[-1]))
        return [_thin(np.concatenate(rows)) for rows in inputs], expected


@contextmanager
def _runner(model: ir.Model) -> Iterator[OnnxRuntimeRunner]:
    """Through a file, because a large model does not fit a protobuf message."""
    from lmkan_deploy.converters.model_file import temporary_model

    with (
        tempfile.TemporaryDirectory(prefix="lmkan-") as folder,
        temporary_model(model, Path(folder) / "model.onnx") as file,
    ):
        yield OnnxRuntimeRunner(file)


def _thin(rows: NDArray[Any]) -> NDArray[Any]:
    """At most `_MOST_ROWS` rows, evenly spread."""
    return rows[:: -(-len(rows) // _MOST_ROWS)] if len(rows) > _MOST_ROWS else rows


def _counterparts(nodes: Sequence[ir.Node], others: Sequence[ir.Node]) -> list[ir.Node]:
    """For each node the one of its name, or the one in its place where names are missing or repeated."""
    names, other_names = [node.name for node in nodes], [node.name for node in others]
    if all(names) and all(other_names) and len(set(names)) == len(names):
        by_name = dict(zip(other_names, others, strict=True))
        missing = next((name for name in names if name not in by_name), None)
        if missing is None:
            return [by_name[name] for name in names]
        found = ", ".join(map(str, other_names)) or "none"
        raise ModelError(f"expected a lookup layer {missing} in both models, found {found}")
    if len(nodes) != len(others):
        raise ModelError(f"expected {len(nodes)} lookup layers in both models, found {len(others)}")
    return list(others)


def _with_table_of(model: ir.Model, index: int, other: ir.Node) -> ir.Model:
    """A model in which the lookup node in one place has the table of a node of another model."""
    result = model.clone()
    copy = list(lookups(result))[index]
    arrays = [constant(other.inputs[1])]
    if is_quantized_lookup(other):
        arrays.append(constant_scales(other))
    if any(array is None for array in arrays):
        raise ModelError(f"expected a constant table of {name_of(other)}, found a computed one")
    copy.op_type = other.op_type
    copy.resize_inputs(len(other.inputs))
    for place, array in enumerate(arrays, 1):
        assert array is not None
        copy.replace_input_with(place, add_constant(result.graph, f"{name_of(copy)}.other.{place}", array))
    attach_function(result)
    return result


def _table_shape(node: ir.Node) -> tuple[int, ...]:
    table = node.inputs[1]
    assert table is not None
    assert table.shape is not None
    return tuple(int(size) for size in table.shape)  # type: ignore[arg-type]


def _bytes(node: ir.Node, dtype: str) -> int:
    pairs, points, _, outputs = _table_shape(node)
    entries = pairs * points * points * outputs
    if dtype == "int8":
        return entries + scale_bytes(pairs, points - 1, outputs)
    return entries * (4 if dtype == "float32" else 2)


def _bytes_once(node: ir.Node, dtype: str, tables: set[tuple[int, str]]) -> int:
    """0 for a table in a type that `tables` has already, which gets it otherwise."""
    key = (id(node.inputs[1]), dtype)
    if key in tables:
        return 0
    tables.add(key)
    return _bytes(node, dtype)
