"""What the command line prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmkan_deploy.api import ExportResult, OptimizeResult
from lmkan_deploy.engines.manifest import Manifest
from lmkan_deploy.inspection import ModelInfo
from lmkan_deploy.latency import Latency
from lmkan_deploy.spec import TABLE_DTYPES
from lmkan_deploy.verification import RANDOM_CASE, Comparison, TableCosts, Verification

_console = Console(highlight=False)


def _print(*parts: str | tuple[str, str]) -> None:
    """One line of texts and (text, style): names and paths may hold what rich would take for its markup."""
    _console.print(Text.assemble(*parts), soft_wrap=True)


def print_export(result: ExportResult) -> None:
    """The outcome of an export."""
    info = result.info
    article = "an" if result.kind[0] in "aeiou" else "a"
    read = "read as weights only" if result.weights_only else "trusted to run code"
    _print((str(result.path), "bold"), f"  {_bytes(info.file_bytes)}, from {article} {result.kind}, {read}")
    # Shapes may have been inferred.
    _print(f"{'; '.join(info.inputs)} -> {'; '.join(info.outputs)}")
    _print_layers(info)
    for note in result.notes:
        _print(f"note: {note}")
    _print_costs(result.tables, "--calibration")
    if result.verification is None:
        _print("not verified")
        return
    worst: dict[str, float] = {}
    for comparison in result.verification.comparisons:
        worst[comparison.runner] = max(worst.get(comparison.runner, 0.0), comparison.max_rel)
    for runner, error in worst.items():
        compared = f"{runner} against PyTorch on {_data(result.verification)}"
        _print(("verified", "green"), f" {compared}: largest relative error {error:.1e}")


def _data(verification: Verification) -> str:
    """What outputs were compared on."""
    kinds = {comparison.case.startswith(RANDOM_CASE) for comparison in verification.comparisons}
    names = {True: "random", False: "given"}
    return f"{' and '.join(name for kind, name in names.items() if kind in kinds)} inputs"


def print_optimization(result: OptimizeResult) -> None:
    """What the passes did and what they left."""
    _print((str(result.path), "bold"), f"  {result.nodes_before} -> {result.nodes_after} nodes")
    _print_passes({name: outcome.applied for name, outcome in result.outcomes.items()}, "")
    _print_passes({name: outcome.refused for name, outcome in result.outcomes.items()}, "not ")
    _print_costs(result.tables, "--calibration")
    if result.verification is not None:
        worst = max(comparison.max_rel for comparison in result.verification.comparisons)
        compared = f"against the original on {_data(result.verification)}"
        _print(("verified", "green"), f" {compared}: largest relative error {worst:.1e}")


def _print_passes(lines: dict[str, list[str]], prefix: str) -> None:
    for name, entries in lines.items():
        for entry in entries:
            _print(f"  {prefix}{name}: {entry}")


def print_verification(result: Verification, narrow: str | None = None) -> None:
    """All comparisons, and the first bad element of each that failed.

    Args:
        result: What was compared.
        narrow: Types of the model's tables that round, where there are any.
    """
    for runner in dict.fromkeys(c.runner for c in result.comparisons):
        _console.print(_comparison_table(f"{runner} against {result.reference}", result, runner))
    failed = [c for c in result.comparisons if not c.passed]
    for c in failed:
        _print((f"{c.runner}, {c.case}:", "red"), f" {_failure(c)}")
    _print_costs(result.tables, "--inputs")
    total = len(result.comparisons)
    if failed and total == 1:
        _print(("the comparison failed", "bold red"))
    elif failed:
        _print((f"{len(failed)} of {total} comparisons failed", "bold red"))
    else:
        _print(("the comparison passed" if total == 1 else f"all {total} comparisons passed", "green"))
    if failed and narrow is not None:
        _print(f"{narrow} tables round, and networks amplify it: --rtol allows more")


def _comparison_table(title: str, result: Verification, runner: str) -> Table:
    table = _table(title)
    table.add_column("inputs", overflow="fold", min_width=6)
    table.add_column("output", overflow="fold", min_width=6)
    for name in ("max abs", "p99 abs", "max rel", "p99 rel", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for c in result.comparisons:
        if c.runner != runner:
            continue
        verdict = Text("ok", "green") if c.passed else Text("FAIL", "bold red")
        errors = (c.max_abs, c.p99_abs, c.max_rel, c.p99_rel, c.rtol)
        cells = ("" if c.problem is not None else f"{error:.1e}" for error in errors)
        table.add_row(c.case, Text(c.output), *cells, verdict)
    return table


def _table(title: str | None = None) -> Table:
    """A table that leaves the terminal's width to what it holds."""
    gap = 1 if _console.width >= 80 else 0  # besides the box's own
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0)
    )


def _print_costs(costs: TableCosts | None, option: str) -> None:
    """What every layer's narrow table costs, and what the other types would.

    Args:
        costs: What was measured; None for nothing.
        option: What gives inputs to measure on.
    """
    if costs is None or not costs.layers:
        return
    _print((f"largest relative error with one narrow table at a time, on {costs.data}", "bold"))
    dtypes = sorted({dtype for cost in costs.layers for dtype in cost.errors}, key=TABLE_DTYPES.index)
    table = _table()
    table.add_column("layer", overflow="fold", min_width=6)
    table.add_column("type", no_wrap=True)
    table.add_column("table", justify="right", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, justify="right", no_wrap=True)
    for cost in costs.layers:
        errors = (f"{cost.errors[dtype]:.1e}" if dtype in cost.errors else "" for dtype in dtypes)
        size = _bytes(cost.table_bytes) if cost.table_bytes else "shared"
        table.add_row(Text(cost.layer), cost.dtype, size, *errors)
    _console.print(table)
    size = _bytes(sum(cost.table_bytes for cost in costs.layers))
    _print(f"all tables, {size}: largest relative error {costs.together:.1e}")
    if costs.data == "random inputs":
        _print(f"random inputs may lie far outside of a network's data: {option} measures on yours")


def _failure(comparison: Comparison) -> str:
    if comparison.problem is not None:
        return comparison.problem
    assert comparison.first_bad_values is not None
    expected, found = comparison.first_bad_values
    index = ", ".join(map(str, comparison.first_bad or ()))
    return f"first bad element {comparison.output}[{index}]: expected {expected:.9g}, found {found:.9g}"


def print_latencies(latencies: Sequence[Latency]) -> None:
    """A table for each batch size that was asked for."""
    several = len({latency.runtime for latency in latencies}) > 1
    for asked in dict.fromkeys(latency.asked for latency in latencies):
        found = [latency for latency in latencies if latency.asked == asked]
        batches = {latency.batch for latency in found}
        title = f"batch {asked}" if asked is not None else "given inputs"
        if len(batches) == 1:
            title = f"batch {found[0].batch}"
        table = _table(title)
        table.add_column("model", overflow="fold")
        for name in ("median", "p90", "p99", "rows/s", "time / first"):
            table.add_column(name, justify="right", no_wrap=True)
        for latency in found:
            name = f"{latency.model}, {latency.runtime}" if several else latency.model
            name += f", batch {latency.batch}" if len(batches) > 1 else ""
            times = (_time(value) for value in (latency.median, latency.p90, latency.p99))
            ratio = "" if latency.ratio is None else "{} ({} to {})".format(*map(_ratio, latency.ratio))
            table.add_row(Text(name), *times, _count(latency.rows_per_second), ratio)
        _console.print(table)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _ratio(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.3g}"


def _count(number: float) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g}"


def print_engine(path: Path, manifest: Manifest) -> None:
    """What an engine is and needs."""
    _print((str(path), "bold"), f"  {_bytes(path.stat().st_size)}, {manifest.lookup_layers} lookup layers")
    capability = manifest.compute_capability
    gpu = f"compute capability {capability}" if capability else "every GPU that the runtime supports"
    rows = {
        "runtime": f"{manifest.runtime} {manifest.runtime_version}",
        "GPU": gpu,
        "plugin": "needed" if manifest.plugin_sha256 else "not needed",
    }
    for number, profile in enumerate(manifest.profiles):
        prefix = f"profile {number}, " if len(manifest.profiles) > 1 else ""
        for name, shapes in profile.items():
            smallest, typical, largest = (
                "x".join(map(str, shape)) for shape in (shapes.smallest, shapes.typical, shapes.largest)
            )
            rows[f"{prefix}input {name}"] = f"{smallest} to {largest}, tuned for {typical}"
    _print_rows(rows)


def _print_rows(rows: dict[str, str]) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(Text(name, "dim"), Text(value))
    _console.print(grid)


_METADATA = {
    "version": "lmkan-deploy",
    "checkpoint_sha256": "SHA-256",
    "checkpoint_kind": "kind",
    "torch_version": "PyTorch",
    "onnx_version": "onnx",
}
"""What notes of an export are called where their keys are no words."""


def print_model(info: ModelInfo) -> None:
    """Everything that `inspect` knows."""
    _print((info.path, "bold"), f"  {_bytes(info.file_bytes)}, {_bytes(info.weight_bytes)} of weights")
    opsets = ", ".join(f"{domain} {version}" for domain, version in info.opsets.items())
    other = ", ".join(f"{count} {kind}" for kind, count in info.other_nodes.items())
    rows = {
        "inputs": "; ".join(info.inputs),
        "outputs": "; ".join(info.outputs),
        "opsets": f"{opsets}; IR version {info.ir_version}",
        "function": "present: runs in every ONNX runtime"
        if info.has_function
        else "absent: needs the compiled operator",
        "other nodes": other or "none",
    }
    for key, value in info.metadata.items():
        name = key.removeprefix("lmkan_deploy.")
        if not name.startswith("passes_"):
            rows[_METADATA.get(name, name)] = value
    _print_rows(rows)
    _print(("passes", "dim"))
    _print_passes(info.passes_applied, "")
    _print_passes(info.passes_refused, "not ")
    idle = [
        name for name, lines in info.passes_applied.items() if not lines + info.passes_refused.get(name, [])
    ]
    for title, names in (("nothing to do", idle), ("not run", info.passes_not_run)):
        if names:
            _print(f"  {title}: {', '.join(names)}")
    _print_layers(info)


def _print_layers(info: ModelInfo) -> None:
    if not info.layers:
        _print("no lookup layers")
        return
    table = _table()
    table.add_column("layer", overflow="fold", min_width=6)
    for name in ("N_in", "N_out", "G", "parameters", "table", "type", "mult-adds"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in info.layers:
        shared = layer.table_of is not None
        table.add_row(
            Text(layer.name),
            str(layer.num_inputs),
            str(layer.num_outputs),
            str(layer.num_grids),
            Text(f"as {layer.table_of}") if shared else f"{layer.parameters:,}",
            _bytes(layer.table_bytes) if layer.table_bytes else "",
            layer.table_dtype,
            f"{layer.multiply_adds:,}",
        )
    owners = [layer for layer in info.layers if layer.table_of is None]
    if len(info.layers) > 1:
        table.add_section()
        table.add_row(
            "total",
            "",
            "",
            "",
            f"{sum(layer.parameters for layer in owners):,}",
            _bytes(sum(layer.table_bytes for layer in info.layers)),
            "",
            f"{sum(layer.multiply_adds for layer in info.layers):,}",
        )
    _console.print(table)


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
