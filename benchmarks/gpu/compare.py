"""Times the CUDA kernels against upstream's, and against dense layers, in one run on the same inputs.

Usage: compare.py LIBLMKAN_CUDA OUTPUT.json [--upstream] [--tactics auto,narrow,split]

Exits with 1 where a form failed or gave wrong values; a target that is missed changes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from cases import CASES, Case
from forms import (
    TACTICS,
    Form,
    QuantizedTable,
    dense_form,
    library_form,
    load_library,
    offered_tactics,
    upstream_form,
    upstream_tiles,
)

from lmkan_deploy.reference import dequantize_table, lookup2d

TABLES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
DEVICE = "cuda"
TOLERANCE = 1e-3  # of a relative error; fast forms have 1e-6 to 1e-4, wrong ones about 1
CHECKED_ROWS = 8  # at the start, in the middle and at the end of each input

LOST = 3  # exit status of a process whose CUDA context does not work any more


class WrongValuesError(Exception):
    """What a launch wrote is not what it should be."""


class ContextLostError(Exception):
    """No call to CUDA works any more in this process."""


# --- Tables and what should come out ---------------------------------------------------------------


def random_tables(case: Case) -> list[torch.Tensor]:
    """Tables whose outputs have about unit variance, [P, G + 1, G + 1, N_out].

    Those of networks are smooth, as trained ones are: noise would amplify a layer's rounding a hundred times.
    """
    points = case.num_grids + 1
    tables = []
    for n_in, n_out in case.layers:
        num_points = points if len(case.layers) == 1 else 4
        table = torch.randn((n_in // 2, n_out, num_points, num_points), device=DEVICE)
        if num_points != points:
            table = torch.nn.functional.interpolate(
                table, size=(points, points), mode="bilinear", align_corners=True
            )
        tables.append(table.permute(0, 2, 3, 1).contiguous() * (n_in / 2) ** -0.5)
    return tables


def quantize(table: torch.Tensor) -> QuantizedTable:
    """int8 integers and scales, as the exporter makes them."""
    scales = table.abs().amax(dim=(1, 2)) / 127
    return torch.round(table / scales[:, None, None]).to(torch.int8), scales.contiguous()


def narrow(tables: list[torch.Tensor], dtype: torch.dtype) -> list[QuantizedTable]:
    return [quantize(t) if dtype == torch.int8 else (t.to(dtype), None) for t in tables]


def checked_rows(rows: int) -> list[int]:
    """Some from the start, the middle and the end."""
    middle = max(0, rows // 2 - CHECKED_ROWS // 2)
    starts = (0, middle, max(0, rows - CHECKED_ROWS))
    return sorted({row for start in starts for row in range(start, min(start + CHECKED_ROWS, rows))})


def expected(inputs: list[torch.Tensor], tables: list[QuantizedTable]) -> np.ndarray:
    """[inputs, checked rows, N_out] in float64."""
    rows = checked_rows(len(inputs[0]))
    y = torch.stack([x[rows] for x in inputs]).double().cpu().numpy()
    for table, scales in tables:
        values = table.cpu().numpy()
        y = lookup2d(y, values if scales is None else dequantize_table(values, scales.cpu().numpy()))
    return y


def relative_error(form: Form, y: torch.Tensor, want: np.ndarray) -> float:
    """Of the checked rows. All other values must at least be finite."""
    y = form.view(y)
    if not bool(torch.isfinite(y).all()):
        raise WrongValuesError(f"{int((~torch.isfinite(y)).sum())} of {y.numel()} values are not finite")
    found = y[checked_rows(len(y))].double().cpu().numpy()
    error = float(np.linalg.norm(found - want) / np.linalg.norm(want))
    if not error < TOLERANCE:
        raise WrongValuesError(f"relative error {error:.1e}")
    return error


def check(form: Form, launches: timing.Launches, want: np.ndarray | None) -> float:
    """Largest error of the very launches that are timed, into memory that held NaN."""
    if want is None:
        return math.nan
    errors = []
    for turn in range(launches.turns):
        for buffer in (*form.buffers, launches.ys[turn]):
            buffer.fill_(math.nan)
        launches.enqueue(turn)
        torch.cuda.synchronize()
        last = (turn + launches.count - 1) % len(want)
        errors.append(relative_error(form, launches.ys[turn], want[last]))
    return max(errors)


# --- Measurements --------------------------------------------------------------------------------------

Method = type[timing.Graphs] | type[timing.Queue]


def quartiles(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_us": median, "q1_us": low, "q3_us": high}


def measure(form: Form, case: Case, method: Method, want: np.ndarray | None) -> dict[str, Any]:
    """Times of a launch, L2 as launches leave it and flushed before each, and the largest error."""
    result: dict[str, Any] = {}
    launches = method(form.run, case.num_inputs, 1)
    error = check(form, launches, want)
    count = timing.choose_count(launches, case.num_inputs)
    if count > 1:
        launches = method(form.run, case.num_inputs, count)
        error = max(error, check(form, launches, want))
    result["warm"] = quartiles(timing.measure_us(launches))
    if want is not None:  # what the last timed launch left
        turn = (timing.RUNS - 1) % launches.turns
        last = (turn + launches.count - 1) % case.num_inputs
        error = max(error, relative_error(form, launches.ys[turn], want[last]))
    if case.is_small:
        flush = timing.flush_l2()
        several = 3 * case.num_inputs
        flushes = method(lambda _: None, case.num_inputs, several, flush)
        launches = method(form.run, case.num_inputs, several, flush)
        error = max(error, check(form, launches, want))
        result["flushed"] = quartiles(timing.measure_us(launches, flushes))
    return {**result, "error": error, "launches": count}


def choose_method(case: Case, upstream: Callable[[int], Form], want: np.ndarray) -> tuple[Method, str | None]:
    """Graphs, unless upstream's launches can only be queued; and why."""
    problem = ""
    for method in (timing.Graphs, timing.Queue):
        try:
            form = upstream(case.tiles[0])
            check(form, method(form.run, case.num_inputs, 1), want)
        except Exception as error:  # of any kind: the package is not ours
            raise_if_lost(error)
            problem = problem or describe_error(error)
            continue
        if method is timing.Graphs:
            return method, None
        return method, f"all forms are queued, since upstream's graph failed: {problem}"
    return timing.Graphs, f"upstream fails: {problem}"


def describe_error(error: BaseException) -> str:
    """In one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def raise_if_lost(error: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except Exception as lost:
        raise ContextLostError(describe_error(error)) from lost


def measure_case(case: Case, library: Any, with_upstream: bool, tactics: list[str]) -> dict[str, Any]:
    """Method, and for each form its times or its problem."""
    torch.manual_seed(0)
    inputs = [torch.randn((case.batch, case.widths[0]), device=DEVICE) for _ in range(case.num_inputs)]
    tables = random_tables(case)
    wants = {name: expected(inputs, narrow(tables, dtype)) for name, dtype in TABLES.items()}

    def upstream(tile: int) -> Form:
        return upstream_form(case, tile, tables, inputs)

    makers: dict[str, tuple[Callable[[], Form], np.ndarray | None]] = {}
    method: Method = timing.Graphs
    note = None
    if with_upstream:
        method, note = choose_method(case, upstream, wants["float32"])
        for tile in case.tiles:
            widths = ", ".join(map(str, upstream_tiles(case, tile)))
            makers[f"upstream, tile {widths}"] = (lambda tile=tile: upstream(tile), wants["float32"])
    for name, dtype in TABLES.items():
        narrowed = narrow(tables, dtype)
        for tactic in [tactic for tactic in offered_tactics(library, narrowed) if tactic in tactics]:
            makers[f"{name}, {tactic}"] = (
                lambda narrowed=narrowed, tactic=tactic: library_form(library, narrowed, tactic, inputs),
                wants[name],
            )
    makers["dense"] = (lambda: dense_form(case, inputs), None)

    result: dict[str, Any] = {"method": method.name, "note": note, "forms": {}}
    for name, (make, want) in makers.items():
        try:
            result["forms"][name] = measure(make(), case, method, want)
        except Exception as error:  # whatever it is, other forms can still be timed
            result["forms"][name] = {"problem": describe_error(error)}
            try:
                raise_if_lost(error)
            except ContextLostError as lost:
                result["lost"] = str(lost)
                break
        torch.cuda.empty_cache()
    result["targets"] = judge(case, result["forms"])
    return result


# --- Targets and the report ----------------------------------------------------------------------------


def fastest(forms: dict[str, Any], prefix: str, state: str) -> float | None:
    """Least median of the forms of that name."""
    times = [
        form[state]["median_us"]
        for name, form in forms.items()
        if name.split(",")[0] == prefix and state in form
    ]
    return min(times, default=None)


def judge(case: Case, forms: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with what AUTO reached, and the best tactic; None where something failed."""
    targets = []
    for state in ("warm", "flushed") if case.is_small else ("warm",):
        wanted = [(name, "upstream", factor) for name, factor in case.targets.items()]
        if case.most_dense is not None:
            wanted.append(("float32", "dense", 1 / case.most_dense))
        for name, against, factor in wanted:
            base = fastest(forms, against, state)
            auto = forms.get(f"{name}, auto", {}).get(state, {}).get("median_us")
            best = fastest(forms, name, state)
            found = None if base is None or auto is None else base / auto
            targets.append(
                {
                    "state": state,
                    "tables": name,
                    "against": against,
                    "target": factor,
                    "found": found,
                    "best_tactic": None if base is None or best is None else base / best,
                    "reached": None if found is None else found >= factor,
                }
            )
    return targets


STATES = {"warm": "L2 warm", "flushed": "L2 flushed"}


def report(case: Case, result: dict[str, Any]) -> None:
    """A table of one case; times of a launch in microseconds, ratios to upstream where it ran."""
    forms = result["forms"]
    states = [state for state in STATES if any(state in form for form in forms.values())]
    print(f"\n{case.name}: {result['method']}")
    if result["note"]:
        print(result["note"])
    header = f"{'form':24}"
    for state in states:
        label = f"{STATES[state]}, us" if case.is_small else "us"
        header += f" {label:>15} {'q1':>10} {'q3':>10} {'x upstream':>10}"
    print(f"{header} {'error':>8}")
    for name, form in forms.items():
        if "problem" in form:
            print(f"{name:24} {form['problem']}")
            continue
        line = f"{name:24}"
        for state in states:
            values, base = form[state], fastest(forms, "upstream", state)
            ratio = f"{base / values['median_us']:.2f}" if base else ""
            line += (
                f" {values['median_us']:15.2f} {values['q1_us']:10.2f} {values['q3_us']:10.2f} {ratio:>10}"
            )
        print(f"{line} {form['error']:8.1e}")
    for target in result["targets"]:
        print(describe_target(case, target))
    sys.stdout.flush()


def describe_target(case: Case, target: dict[str, Any]) -> str:
    """In one line, with the verdict."""
    verdict = {None: "not measured", True: "reached", False: "missed"}[target["reached"]]
    state = f", {STATES[target['state']]}" if case.is_small else ""
    if target["against"] == "dense":
        wanted = f"at most {1 / target['target']:g}x the time of dense layers"
        values = [f"{1 / target[key]:.2f}x" for key in ("found", "best_tactic") if target[key]]
    else:
        wanted = f"at least {target['target']:g}x as fast as upstream"
        values = [f"{target[key]:.2f}x" for key in ("found", "best_tactic") if target[key]]
    found = f", {values[0]} (best tactic {values[1]})" if len(values) == 2 else ""
    return f"target: {target['tables']} {wanted}{state}: {verdict}{found}"


def summarize(results: dict[str, Any]) -> int:
    """All targets and problems again; exit status."""
    print("\nSummary")
    failed = False
    for case in CASES:
        result = results["cases"].get(case.name)
        if result is None:
            print(f"{case.name}: not measured")
            failed = True
            continue
        problems = {name: form["problem"] for name, form in result["forms"].items() if "problem" in form}
        if "problem" in result:
            problems["the case"] = result["problem"]
        if "lost" in result:
            problems["forms after that"] = "not measured, since CUDA failed for good"
        failed |= bool(problems)
        for target in result["targets"]:
            print(f"{case.name}: {describe_target(case, target)}")
        for name, problem in problems.items():
            print(f"{case.name}: problem: {name}: {problem}")
    return int(failed)


# --- Processes -----------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "warm_ups": timing.WARM_UPS,
        "runs": timing.RUNS,
    }


def run_cases(library_path: Path, output: Path, with_upstream: bool, tactics: list[str], first: int) -> int:
    """Measures the cases from `first` on and saves after each; exit status."""
    torch.backends.cuda.matmul.allow_tf32 = False
    library = load_library(str(library_path.resolve()))
    results = load(output)
    results["environment"] = environment()
    output.write_text(json.dumps(results, indent=1))
    for case in CASES[first:]:
        try:
            result = measure_case(case, library, with_upstream, tactics)
        except Exception as error:
            result = failed_case(describe_error(error))
            if isinstance(error, ContextLostError):
                result["lost"] = str(error)
        results["cases"][case.name] = result
        output.write_text(json.dumps(results, indent=1))
        report(case, result)
        if "problem" in result:
            print(result["problem"], flush=True)
        if "lost" in result:
            return LOST
        torch.cuda.empty_cache()
    return 0


def failed_case(problem: str) -> dict[str, Any]:
    return {"method": "not measured", "note": None, "forms": {}, "targets": [], "problem": problem}


def load(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text()) if output.is_file() else {"cases": {}}


def main() -> None:
    """Command line: cases run in a process that is started anew where CUDA fails for good."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--upstream", action="store_true")
    parser.add_argument("--tactics", default=",".join(TACTICS), help="with commas; default: %(default)s")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tactics = arguments.tactics.split(",")
    if unknown := set(tactics) - set(TACTICS):
        parser.error(f"expected tactics of {', '.join(TACTICS)}, found {', '.join(sorted(unknown))}")
    if arguments.first is not None:
        options = (arguments.upstream, tactics, arguments.first)
        sys.exit(run_cases(arguments.library, arguments.output, *options))
    arguments.output.unlink(missing_ok=True)
    first = 0
    while first < len(CASES):
        command = [sys.executable, __file__, *sys.argv[1:], "--first", str(first)]
        status = subprocess.run(command, check=False).returncode
        results = load(arguments.output)
        done = [i for i, case in enumerate(CASES) if case.name in results["cases"]]
        if status == 0 or "environment" not in results:  # what it began with failed already
            break
        if status != LOST:  # it died in the case after those
            died = max([first - 1, *done]) + 1
            if died < len(CASES):
                results["cases"][CASES[died].name] = failed_case(f"the process ended with status {status}")
                arguments.output.write_text(json.dumps(results, indent=1))
                done.append(died)
        first = max([first, *done]) + 1
    sys.exit(summarize(load(arguments.output)))


if __name__ == "__main__":
    main()
