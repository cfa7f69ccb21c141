"""What the command line prints for people."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmkan_deploy.api import ExportResult, OptimizeResult
from lmkan_deploy.inspection import ModelInfo
from lmkan_deploy.verification import Comparison, Verification

_console = Console(highlight=False)


def print_export(result: ExportResult) -> None:
    """The outcome of an export."""
    info = result.info
    _console.print(f"[bold]{result.path}[/]  {_bytes(info.file_bytes)}, from a {result.kind}")
    _print_layers(info)
    for note in result.notes:
        _console.print(f"note: {note}")
    if result.verification is None:
        _console.print("not verified")
        return
    worst: dict[str, float] = {}
    for comparison in result.verification.comparisons:
        worst[comparison.runner] = max(worst.get(comparison.runner, 0.0), comparison.max_rel)
    for runner, error in worst.items():
        _console.print(f"[green]verified[/] {runner} against PyTorch: largest relative error {error:.1e}")


def print_optimization(result: OptimizeResult) -> None:
    """What the passes did and what they left."""
    _console.print(f"[bold]{result.path}[/]  {result.nodes_before} -> {result.nodes_after} nodes")
    _print_passes({name: outcome.applied for name, outcome in result.outcomes.items()}, "")
    _print_passes({name: outcome.refused for name, outcome in result.outcomes.items()}, "not ")
    if result.verification is not None:
        worst = max(comparison.max_rel for comparison in result.verification.comparisons)
        _console.print(f"[green]verified[/] against the original: largest relative error {worst:.1e}")


def _print_passes(lines: dict[str, list[str]], prefix: str) -> None:
    for name, entries in lines.items():
        for entry in entries:
            _console.print(f"  {prefix}{name}: {entry}", markup=False, soft_wrap=True)


def print_verification(result: Verification) -> None:
    """All comparisons, and the first bad element of each that failed."""
    for runner in dict.fromkeys(c.runner for c in result.comparisons):
        _console.print(_comparison_table(f"{runner} against {result.reference}", result, runner))
    failed = [c for c in result.comparisons if not c.passed]
    for c in failed:
        _console.print(f"[red]{c.runner}, {c.case}:[/] {_failure(c)}")
    total = len(result.comparisons)
    _console.print(
        f"[bold red]{len(failed)} of {total} comparisons failed[/]"
        if failed
        else f"[green]all {total} comparisons passed[/]"
    )


def _comparison_table(title: str, result: Verification, runner: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("inputs", no_wrap=True)
    table.add_column("output")
    for name in ("max abs", "p99 abs", "max rel", "p99 rel", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for c in result.comparisons:
        if c.runner != runner:
            continue
        verdict = Text("ok", "green") if c.passed else Text("FAILED", "bold red")
        errors = (c.max_abs, c.p99_abs, c.max_rel, c.p99_rel, c.rtol)
        cells = ("" if c.problem is not None else f"{error:.1e}" for error in errors)
        table.add_row(c.case, c.output, *cells, verdict)
    return table


def _failure(comparison: Comparison) -> str:
    if comparison.problem is not None:
        return comparison.problem
    assert comparison.first_bad_values is not None
    expected, found = comparison.first_bad_values
    index = ", ".join(map(str, comparison.first_bad or ()))
    return f"first bad element {comparison.output}\\[{index}]: expected {expected:.9g}, found {found:.9g}"


def print_model(info: ModelInfo) -> None:
    """Everything that `inspect` knows."""
    _console.print(f"[bold]{info.path}[/]  {_bytes(info.file_bytes)}, {_bytes(info.weight_bytes)} of weights")
    opsets = ", ".join(f"{domain} {version}" for domain, version in info.opsets.items())
    other = ", ".join(f"{count} {kind}" for kind, count in info.other_nodes.items())
    rows = {
        "inputs": "; ".join(info.inputs),
        "outputs": "; ".join(info.outputs),
        "opsets": f"{opsets}; IR version {info.ir_version}",
        "function": "present: runs in every ONNX runtime"
        if info.has_function
        else "absent: needs the custom op",
        "other nodes": other or "none",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, "dim"), Text(value))
    passes = {}
    for key, value in info.metadata.items():
        name = key.removeprefix("lmkan_deploy.")
        if name.startswith("passes_"):
            passes[name] = json.loads(value)
        else:
            grid.add_row(Text(name, "dim"), Text(value))
    _console.print(grid)
    if any(passes.values()):
        _console.print("[dim]passes[/]")
        _print_passes(passes.get("passes_applied", {}), "")
        _print_passes(passes.get("passes_refused", {}), "not ")
    _print_layers(info)


def _print_layers(info: ModelInfo) -> None:
    table = Table()
    table.add_column("lookup layer")
    for name in ("N_in", "N_out", "G", "parameters", "table", "type", "mult-adds"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in info.layers:
        table.add_row(
            layer.name,
            str(layer.num_inputs),
            str(layer.num_outputs),
            str(layer.num_grids),
            f"{layer.parameters:,}",
            _bytes(layer.table_bytes),
            layer.table_dtype,
            f"{layer.multiply_adds:,}",
        )
    if len(info.layers) > 1:
        table.add_section()
        table.add_row(
            "total",
            "",
            "",
            "",
            f"{sum(layer.parameters for layer in info.layers):,}",
            _bytes(sum(layer.table_bytes for layer in info.layers)),
            "",
            f"{sum(layer.multiply_adds for layer in info.layers):,}",
        )
    _console.print(table if info.layers else "no lookup layers")


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
