"""Times the CUDA kernels against upstream's, and against a dense layer, in one run on the same inputs.

Usage: compare.py LIBLMKAN_CUDA OUTPUT.json [--upstream]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lmkan_deploy.reference import dequantize_table, lookup2d

WARM_UPS, RUNS, INPUTS = 10, 30, 4
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
FORMS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
TACTICS = {"auto": 0, "gather": 1, "shared": 2}

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A chain of layers; one width more than layers. `tile` is upstream's."""

    widths: tuple[int, ...]
    num_grids: int
    batch: int
    tile: int

    @property
    def name(self) -> str:
        """As in the report."""
        return f"{'->'.join(map(str, self.widths))} G={self.num_grids} batch={self.batch}"


CASES = [
    Case((512, 512), 20, 1 << 20, 16),
    Case((128, 128), 26, 1024, 8),
    *(Case((512, 512), 26, batch, 8) for batch in (1, 16, 64)),
    # Upstream's tiles want an output width that they divide: 8 stands for 1 there.
    *(Case((n_in, 256, 256, 1), grids, 1 << 18, 8) for n_in in (32, 12) for grids in (12, 28)),
]


class TableDesc(ctypes.Structure):
    """lmkan_table_desc."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("num_pairs", ctypes.c_int64),
        ("num_grids", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
    )


class Layer:
    """One lookup layer of the library; the table is on the GPU."""

    def __init__(
        self, library: ctypes.CDLL, table: torch.Tensor, scales: torch.Tensor | None, tactic: int
    ) -> None:
        self._library, self._tensors, self._tactic = library, (table, scales), tactic
        pairs, points, _, outputs = table.shape
        pointer = None if scales is None else scales.data_ptr()
        self._desc = TableDesc(table.data_ptr(), DTYPES[table.dtype], pairs, points - 1, outputs, pointer)
        self._outputs = outputs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Y [rows, outputs] of x [rows, features], on the current stream."""
        y = torch.empty((x.shape[0], self._outputs), dtype=x.dtype, device=x.device)
        message, size = ctypes.create_string_buffer(512), ctypes.c_size_t()
        arguments = (ctypes.byref(self._desc), DTYPES[x.dtype])
        rows, tactic = ctypes.c_int64(x.shape[0]), self._tactic
        status = self._library.lmkan_cuda_workspace_size(
            *arguments, rows, tactic, ctypes.byref(size), message, ctypes.c_size_t(512)
        )
        assert status == 0, message.value
        workspace = torch.empty(size.value, dtype=torch.uint8, device=x.device)
        status = self._library.lmkan_cuda_lookup2d(
            *arguments,
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            rows,
            tactic,
            ctypes.c_void_p(workspace.data_ptr() or None),
            size,
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            message,
            ctypes.c_size_t(512),
        )
        assert status == 0, message.value
        return y


def chain(layers: list[Run]) -> Run:
    """The layers one after the other."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run


def quantize(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 integers and scales, as the exporter makes them."""
    scales = table.abs().amax(dim=(1, 2)) / 127
    return torch.round(table / scales[:, None, None]).to(torch.int8), scales.contiguous()


def random_tables(case: Case) -> list[torch.Tensor]:
    """Tables whose outputs have about unit variance."""
    pairs = zip(case.widths[:-1], case.widths[1:], strict=True)
    points = case.num_grids + 1
    return [
        torch.randn((n_in // 2, points, points, n_out), device="cuda") * (n_in / 2) ** -0.5
        for n_in, n_out in pairs
    ]


def check(run: Run, x: torch.Tensor, tables: list[np.ndarray], tolerance: float) -> float:
    """Relative error of the first rows against float64; poisoned memory must not show through."""
    rows = x[: min(len(x), 64)]
    want = rows.double().cpu().numpy()
    for table in tables:
        want = lookup2d(want, table)
    y = run(rows.contiguous()).double().cpu().numpy()
    error = float(np.linalg.norm(y - want) / np.linalg.norm(want))
    assert error < tolerance, f"relative error {error}"
    return error


def milliseconds(run: Run, inputs: list[torch.Tensor]) -> list[float]:
    """Time of each launch, between CUDA events."""
    for i in range(WARM_UPS):
        run(inputs[i % len(inputs)])
    times = []
    for i in range(RUNS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(inputs[i % len(inputs)])
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times


def upstream_chain(case: Case) -> tuple[Run, list[torch.Tensor]]:
    """Upstream's layers, and the tables that they hold."""
    from lmKAN import LMKAN2DLayer

    widths = [*case.widths[:-1], max(case.widths[-1], case.tile)]
    layers, tables = [], []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        tile = math.gcd(case.tile, math.gcd(n_in // 2, n_out))
        layer = LMKAN2DLayer(case.num_grids, n_in, n_out, tile_size_forward=tile, block_size_forward=1024)
        layer = layer.cuda().eval()
        torch.nn.init.normal_(layer.func_parameter, std=(n_in / 2) ** -0.5)
        layers.append(layer)
        tables.append(layer.func_parameter.detach().permute(3, 0, 1, 2).contiguous())

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return chain(layers)(x)

    return run, tables


def measure(case: Case, library: ctypes.CDLL, with_upstream: bool) -> dict[str, dict[str, float]]:
    """Form -> median and quartiles in ms, and the error."""
    torch.manual_seed(0)
    inputs = [torch.randn((case.batch, case.widths[0]), device="cuda") for _ in range(INPUTS)]
    forms: dict[str, tuple[Run, list[torch.Tensor], list[np.ndarray], float]] = {}
    if with_upstream:
        run, tables = upstream_chain(case)
        last = [x.t().contiguous() for x in inputs]
        transposed = lambda x, run=run: run(x.t().contiguous()).t()  # noqa: E731  for the check alone
        check(transposed, inputs[0], [t.double().cpu().numpy() for t in tables], 1e-3)
        forms["upstream"] = (run, last, [], 0.0)
    else:
        tables = random_tables(case)
    for form, dtype in FORMS.items():
        pairs = [quantize(t) if dtype == torch.int8 else (t.to(dtype), None) for t in tables]
        exact = [
            dequantize_table(t.cpu().numpy(), s.cpu().numpy()) if s is not None else t.double().cpu().numpy()
            for t, s in pairs
        ]
        for tactic, number in TACTICS.items():
            run = chain([Layer(library, table, scales, number) for table, scales in pairs])
            forms[f"{form}, {tactic}"] = (run, inputs, exact, 1e-3)
    weights = [
        torch.randn((a, b), device="cuda") for a, b in zip(case.widths[:-1], case.widths[1:], strict=True)
    ]
    forms["dense"] = (chain([lambda x, w=w: x @ w for w in weights]), inputs, [], 0.0)
    results = {}
    for name, (run, data, exact, tolerance) in forms.items():
        try:
            error = check(run, data[0], exact, tolerance) if exact else float("nan")
            times = milliseconds(run, data)
        except AssertionError as problem:
            results[name] = {"problem": str(problem)}
            continue
        low, median, high = statistics.quantiles(times, n=4)
        results[name] = {"median_ms": median, "q1_ms": low, "q3_ms": high, "error": error}
    return results


def report(case: Case, results: dict[str, dict[str, float]]) -> None:
    """A table of one case; ratios are to upstream where it ran."""
    base = results.get("upstream", {}).get("median_ms")
    print(
        f"\n{case.name}\n{'form':18} {'median ms':>10} {'q1':>9} {'q3':>9} {'upstream/form':>14} {'error':>9}"
    )
    for name, values in results.items():
        if "problem" in values:
            print(f"{name:18} {values['problem']}")
            continue
        ratio = f"{base / values['median_ms']:.2f}" if base else ""
        quartiles = f"{values['q1_ms']:9.4f} {values['q3_ms']:9.4f}"
        print(f"{name:18} {values['median_ms']:10.4f} {quartiles} {ratio:>14} {values['error']:9.1e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--upstream", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    library = ctypes.CDLL(str(arguments.library.resolve()))
    results = {}
    for case in CASES:
        results[case.name] = measure(case, library, arguments.upstream)
        report(case, results[case.name])
        torch.cuda.empty_cache()
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
