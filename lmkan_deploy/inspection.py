"""What is inside an ONNX model: lookup layers, sizes, cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lmkan_deploy.converters.byte_scales import scale_weights
from lmkan_deploy.converters.model_file import initializer_bytes, load_model
from lmkan_deploy.converters.onnx_function import is_lookup, is_quantized_lookup
from lmkan_deploy.converters.passes import PASSES, noted_outcomes
from lmkan_deploy.converters.passes.base import dtype_name, name_of
from lmkan_deploy.errors import ModelError
from lmkan_deploy.spec import DOMAIN


@dataclass(frozen=True)
class LookupLayer:
    """One `LMKAN2D` or `LMKAN2DQuantized` node.

    Attributes:
        name: Name of the node.
        num_inputs: N_in.
        num_outputs: N_out.
        num_grids: G.
        table_dtype: Element type of the table.
        parameters: Number of table entries.
        table_bytes: Their size, with the scales of an int8 table, but for what an earlier layer has too: a file
            holds it once.
        multiply_adds: Multiply-adds a row: 4 for each pair and output.
        table_of: An earlier layer that has the same table; None for the first one.
    """

    name: str
    num_inputs: int
    num_outputs: int
    num_grids: int
    table_dtype: str
    parameters: int
    table_bytes: int
    multiply_adds: int
    table_of: str | None


@dataclass(frozen=True)
class ModelInfo:
    """Summary of a model.

    Attributes:
        path: The file.
        file_bytes: Its size with its external data.
        inputs: Name, type and shape of each.
        outputs: Name, type and shape of each.
        opsets: Domain -> version; the standard operators' domain is "ai.onnx".
        ir_version: Version of the file format.
        has_function: Whether the file carries the functions of its lookup layers.
        layers: The lookup layers, in the graph's order.
        other_nodes: Operator type -> number of nodes, for all others.
        weight_bytes: Size of all weights.
        metadata: What the exporter wrote about the model's origin.
        passes_applied: Graph pass -> a line for each application, of all passes that ran on the file.
        passes_refused: Graph pass -> a line for each place that it left as it is, and why.
        passes_not_run: Passes that did not run on it.
    """

    path: str
    file_bytes: int
    inputs: list[str]
    outputs: list[str]
    opsets: dict[str, int]
    ir_version: int
    has_function: bool
    layers: list[LookupLayer]
    other_nodes: dict[str, int]
    weight_bytes: int
    metadata: dict[str, str]
    passes_applied: dict[str, list[str]]
    passes_refused: dict[str, list[str]]
    passes_not_run: list[str]

    def to_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return asdict(self)


def inspect_model(path: str | Path) -> ModelInfo:
    """Reads a model's structure; weights are not read.

    Raises:
        ModelError: The file is not an ONNX model, or a table contradicts its node.
    """
    path = Path(path)
    model = load_model(path)
    nodes = list(model.graph.all_nodes())
    layers = [node for node in nodes if _is_layer(node)]
    files = [path, Path(f"{path}.data")]
    owners: dict[int, str] = {}
    described = {node: layer for node in layers if (layer := _layer(node, owners)) is not None}
    applied, refused = noted_outcomes(model.metadata_props)
    return ModelInfo(
        path=str(path),
        file_bytes=sum(file.stat().st_size for file in files if file.is_file()),
        inputs=[_describe(value) for value in model.graph.inputs],
        outputs=[_describe(value) for value in model.graph.outputs],
        opsets={domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        ir_version=model.ir_version,
        has_function=all((DOMAIN, node.op_type, "") in model.functions for node in layers),
        layers=list(described.values()),
        other_nodes=dict(Counter(node.op_type for node in nodes if node not in described).most_common()),
        weight_bytes=initializer_bytes(model),
        metadata=dict(model.metadata_props),
        passes_applied=applied,
        passes_refused=refused,
        passes_not_run=[item.name for item in PASSES if item.name not in applied],
    )


def _is_layer(node: ir.Node) -> bool:
    return is_lookup(node) or is_quantized_lookup(node)


def _layer(node: ir.Node, owners: dict[int, str]) -> LookupLayer | None:
    """What a node is; `owners` gets the first node of each table and of each weight that scales are made of."""
    table = node.inputs[1] if len(node.inputs) > 1 else None
    sizes_found = None if table is None else _table_sizes(table)
    if table is None or sizes_found is None:
        return None
    _check_sizes(node, sizes_found)
    num_pairs, points, _, num_outputs = sizes_found
    dtype = table.dtype or ir.DataType.FLOAT
    parameters = num_pairs * points * points * num_outputs
    owner = owners.get(id(table))
    sizes = {id(table): int(parameters * dtype.itemsize)}
    sizes |= {id(value): nbytes for value, nbytes in scale_weights(node)}
    table_bytes = sum(nbytes for key, nbytes in sizes.items() if key not in owners)
    for key in sizes:
        owners.setdefault(key, name_of(node))
    return LookupLayer(
        name=node.name or "",
        num_inputs=2 * num_pairs,
        num_outputs=num_outputs,
        num_grids=points - 1,
        table_dtype=dtype_name(dtype),
        parameters=parameters,
        table_bytes=table_bytes,
        multiply_adds=4 * num_pairs * num_outputs,
        table_of=owner,
    )


def _table_sizes(table: ir.Value) -> list[int] | None:
    """A table's shape, a weight's own rather than what the graph says of it; None where it is not known."""
    shape = table.shape if table.const_value is None else table.const_value.shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return [int(size) for size in shape]  # type: ignore[arg-type]


def _check_sizes(node: ir.Node, table: list[int]) -> None:
    name = f"{node.op_type} node {name_of(node)}"
    if len(table) != 4 or table[1] != table[2] or table[1] < 4 or 0 in table:
        raise ModelError(
            f"expected a table [pairs, G+1, G+1, outputs] with G of at least 3 for {name}, found {table}; "
            "export the model again"
        )
    x = node.inputs[0]
    features = x.shape[-1] if x is not None and x.shape is not None and len(x.shape) > 0 else None
    if isinstance(features, int) and features != 2 * table[0]:
        raise ModelError(
            f"expected {2 * table[0]} features for the table {table} of {name}, found {features}; export the "
            "model again"
        )


def _describe(value: ir.Value) -> str:
    shape = "?" if value.shape is None else ", ".join(str(size) for size in value.shape)
    dtype = "?" if value.dtype is None else dtype_name(value.dtype)
    return f"{value.name} {dtype}[{shape}]"
