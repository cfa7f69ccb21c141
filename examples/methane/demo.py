"""From quantum chemistry to a served model: data, training, export, verification, latency.

Everything it writes is in build/demo. Exits with 1 when a step fails or an answer is wrong.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import molecules
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# The processes that compute the data import this file again, so PyTorch is imported where it is used.
if TYPE_CHECKING:
    import model
    import serve

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path("build/demo")
CHECKPOINT, ONNX_FILE, TEST_INPUTS = (OUTPUT / n for n in ("model.pt", "model.onnx", "test_inputs.npz"))
ARCHITECTURE = ["--arch", "model:MethaneNet", "--arch-path", "examples/methane", "--input-shape", "batch,5,3"]

TOLERANCE_MEV = 0.05
"""Largest allowed difference between PyTorch and ONNX Runtime."""

if not sys.stdout.isatty():
    # A log, such as a build server's, has no width; the commands that run below follow this one.
    os.environ.setdefault("COLUMNS", "100")
console = Console(highlight=False)


class DemoError(Exception):
    """A step did not give what it should."""


def main() -> None:
    begin = time.monotonic()
    train_set, test_set = make_data()
    network = train_network(train_set, test_set)
    deploy(network, test_set)
    compare(network, test_set)
    console.print(f"\n[green]done[/] in {time.monotonic() - begin:.0f} s; the files are in {OUTPUT}")


def make_data() -> tuple[molecules.Molecules, molecules.Molecules]:
    step(1, "Data: displaced methane molecules and their GFN2-xTB energies")
    with progress_bar() as bar:
        task = bar.add_task("computing", total=None, visible=False)
        train_set, test_set = molecules.load_molecules(
            ROOT / OUTPUT / "molecules.npz",
            lambda done, total: bar.update(task, completed=done, total=total, visible=True),
        )
    console.print(
        f"{len(train_set.energies):,} molecules to train on, {len(test_set.energies):,} to test; every "
        f"coordinate displaced by {molecules.DISPLACEMENT} Å (standard deviation); energies of "
        f"{test_set.energies.min():.2f} to {test_set.energies.max():.2f} eV"
    )
    return train_set, test_set


def train_network(train_set: molecules.Molecules, test_set: molecules.Molecules) -> model.MethaneNet:
    import model
    import torch
    import train

    # One thread: the batches are small, and the result must not depend on the number of cores.
    torch.set_num_threads(1)
    step(2, f"Training: lookup layers 10 → {model.HIDDEN} → {model.HIDDEN} → 1, G = {model.NUM_GRIDS}")
    with progress_bar(TextColumn("RMSE {task.fields[rmse]:5.1f} meV")) as bar:
        task = bar.add_task("training", total=train.STEPS, rmse=float("nan"))
        network = train.train(train_set, lambda done, rmse: bar.update(task, completed=done, rmse=rmse))
    with torch.inference_mode():
        prediction = network(torch.from_numpy(test_set.positions)).numpy()

    table = Table("error on the test set, meV")
    table.add_column("RMSE", justify="right")
    table.add_column("MAE", justify="right")
    predictions = train.baselines(train_set, test_set)
    errors = {name: error_mev(energies, test_set) for name, energies in predictions.items()}
    best_baseline = min(rmse for rmse, _ in errors.values())
    errors["[bold]lmKAN[/]"] = rmse, _ = error_mev(prediction, test_set)
    for name, values in errors.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
    console.print(table)
    if not rmse < best_baseline:
        raise DemoError(
            f"expected a test RMSE below a regression's {best_baseline:.1f} meV, found {rmse:.1f}"
        )
    torch.save(network.state_dict(), ROOT / CHECKPOINT)
    return network


def deploy(network: model.MethaneNet, test_set: molecules.Molecules) -> None:
    step(3, "Export to ONNX, verification, a look inside")
    np.savez(ROOT / TEST_INPUTS, positions=test_set.positions)
    command("export", CHECKPOINT, *ARCHITECTURE)
    command("verify", ONNX_FILE, "--checkpoint", CHECKPOINT, *ARCHITECTURE, "--inputs", TEST_INPUTS)
    console.print(
        "Random positions lie far outside of the data: outputs and differences are large there. The given ones "
        "are the test set.",
        style="dim",
    )
    command("inspect", ONNX_FILE)


def compare(network: model.MethaneNet, test_set: molecules.Molecules) -> None:
    import serve

    step(4, "PyTorch and ONNX Runtime on the test set")
    ways = serve.predictors(network, ROOT / ONNX_FILE)
    energies = {name: predict(test_set.positions) for name, predict in ways.items()}
    with progress_bar() as bar:
        task = bar.add_task("timing", total=serve.rounds())
        latencies = serve.latencies(ways, test_set.positions, lambda: bar.advance(task))

    table = Table()
    table.add_column("", no_wrap=True)
    for column in ("test RMSE\nmeV", "difference\nmeV"):
        table.add_column(column, justify="right")
    for size in serve.CALLS:
        table.add_column(f"batch {size}\nµs a row", justify="right", no_wrap=True)
    differences = {}
    for name in ways:
        rmse, _ = error_mev(energies[name], test_set)
        differences[name] = 1000.0 * float(np.abs(energies[name] - energies["PyTorch"]).max())
        shown = "" if name == "PyTorch" else f"{differences[name]:.5f}"
        times = (spread(latencies[name][size]) for size in serve.CALLS)
        table.add_row(name, f"{rmse:.4f}", shown, *times)
    console.print(table)
    calls = " and ".join(f"{calls:,}" for calls in serve.CALLS.values())
    console.print(
        "difference: the largest one from PyTorch on the test set. µs a row: median and quartiles of "
        f"{calls} calls from Python, after a warm-up, in turn, on the same inputs, one thread each. "
        f"The ONNX file has {(ROOT / ONNX_FILE).stat().st_size / 1000:.0f} KB."
    )
    for name, difference in differences.items():
        if not difference <= TOLERANCE_MEV:
            raise DemoError(f"{name}: expected at most {TOLERANCE_MEV} meV from PyTorch, found {difference}")


def step(number: int, title: str) -> None:
    console.print()
    console.rule(f"[bold]{number}  {title}[/]", align="left", style="dim")


def progress_bar(*extra: TextColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *extra, console=console, transient=True)


def command(*arguments: str | Path) -> None:
    """Runs `lmkan-deploy` as a user would, from the repository's root."""
    texts = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ {escape(shlex.join(['lmkan-deploy', *texts]))}[/]")
    program = Path(sys.executable).with_name("lmkan-deploy")
    sys.stdout.flush()  # before the other process writes to the same place
    result = subprocess.run([program, *texts], cwd=ROOT, check=False)
    if result.returncode != 0:
        raise DemoError(f"lmkan-deploy {texts[0]} exited with {result.returncode}")


def error_mev(energies: NDArray[np.floating], expected: molecules.Molecules) -> tuple[float, float]:
    """Root mean square error and mean absolute error."""
    error = 1000.0 * (energies.astype(np.float64) - expected.energies)
    return float(np.sqrt(np.square(error).mean())), float(np.abs(error).mean())


def spread(latency: serve.Latency) -> str:
    digits = 0 if latency.median >= 10 else 2
    return f"{latency.median:.{digits}f} ({latency.lower:.{digits}f}–{latency.upper:.{digits}f})"


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"error: {error}")
