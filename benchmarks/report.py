"""Ratios, tables and plots from what run.py wrote.

Usage: report.py FOLDER

Writes report.md and PNG plots.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

TARGETS = {  # time relative to a dense layer: float32, best low-precision table
    "128x128-G8-B1024": (3.5, None),
    "128x128-G26-B1024": (7.0, 4.5),
    "512x512-G8-B4096": (4.5, None),
    "512x512-G26-B1024": (8.0, 5.0),
    "64x64-G12-B8192": (3.5, None),
    "128x128-G26-B1": (1.5, None),
}

FORM_TARGETS = {"float32": 0, "float16": 1, "bfloat16": 1, "int8": 1}

Entry = dict[str, Any]


def milliseconds(entry: Entry) -> str:
    """Median and interquartile range."""
    stats = entry["stats"]
    return f"{stats['median'] * 1e3:.4g} ms ± {stats['iqr'] * 500:.2g}"


def quartiles(values: list[float]) -> str:
    """Median, first and third quartile."""
    first, median, third = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({first:.2f} to {third:.2f})"


def floor_seconds(shape: str, evaluations: int, bandwidth: dict[int, float]) -> float:
    """Time to load 4 float32 an evaluation from the level that holds one pair's slice."""
    _, n_out, grids = (int(part.strip("GB")) for part in shape.replace("x", "-").split("-")[:3])
    slice_bytes = (grids + 1) ** 2 * n_out * 4
    size = min((s for s in bandwidth if s >= slice_bytes), default=max(bandwidth))
    return 16 * evaluations / bandwidth[size]


def shapes_table(entries: list[Entry], bandwidth: dict[int, float]) -> str:
    """One row a shape and form; the ratios to a dense layer are of runs that took turns with it."""
    by_shape: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        info = entry["extra_info"]
        by_shape.setdefault(info["shape"], {})[info["form"]] = entry
    lines = [
        "| shape | form | median, half IQR | G evaluations/s | of the floor | × dense, quartiles | to reach |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape, forms in by_shape.items():
        for form, entry in forms.items():
            seconds = entry["stats"]["median"]
            evaluations = entry["extra_info"]["evaluations"]
            target = TARGETS[shape][FORM_TARGETS[form]] if form in FORM_TARGETS else None
            lookup = form not in ("dense", "identity")
            share = floor_seconds(shape, evaluations, bandwidth) / seconds if form == "float32" else None
            lines.append(
                f"| {shape} | {form} | {milliseconds(entry)} "
                f"| {f'{evaluations / seconds / 1e9:.2f}' if lookup else ''} "
                f"| {f'{share:.0%}' if share is not None else ''} "
                f"| {quartiles(entry['extra_info']['ratios'])} | {f'≤ {target}' if target else ''} |"
            )
        for form in ("function", "embedding_bag"):
            if form in forms and "float32" in forms:
                other, own = (statistics.median(forms[f]["extra_info"]["ratios"]) for f in (form, "float32"))
                ratio = other / own
                lines.append(f"| {shape} | **{form} / float32** | | | | **{ratio:.1f}** | |")
    return "\n".join(lines)


def chains_table(entries: list[Entry]) -> str:
    """A network against its layers, each run alone, in turns."""
    lines = [
        "| network, G = 12 | median, half IQR | / sum of its layers, quartiles |",
        "| --- | --- | --- |",
    ]
    for entry in entries:
        info = entry["extra_info"]
        key = f"{'→'.join(map(str, info['widths']))}, batch {info['batch']}"
        lines.append(f"| {key} | {milliseconds(entry)} | {quartiles(info['ratios'])} |")
    return "\n".join(lines)


def one_row_table(interface: str, seconds: dict[str, list[float]]) -> str:
    """The ratio to float32 is that of each turn, so the machine's moods cancel."""
    lines = [
        f"| one row, 128→128, G = 26, through {interface} | µs a call, quartiles | time / float32 |",
        "| --- | --- | --- |",
    ]
    for form, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["float32"], strict=True)]
        microseconds = [value * 1e6 for value in values]
        lines.append(f"| {form} | {quartiles(microseconds)} | {quartiles(ratios)} |")
    return "\n".join(lines)


def threads_table(entries: list[Entry]) -> str:
    """Two threads against one, in turns."""
    lines = ["| layer | 2 threads, half IQR | speed-up, quartiles |", "| --- | --- | --- |"]
    for entry in entries:
        info = entry["extra_info"]
        key = f"{info['width']}→{info['width']}, G = {info['num_grids']}, batch {info['batch']}"
        lines.append(f"| {key} | {milliseconds(entry)} | {quartiles(info['ratios'])} |")
    return "\n".join(lines)


def plot_curves(entries: list[Entry], folder: Path) -> list[str]:
    """Nanoseconds an evaluation over G, batch and width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"G": "grid cells an axis, G", "batch": "batch", "width": "width, N_in = N_out"}
    keys = {"G": "num_grids", "batch": "batch", "width": "width"}
    links = []
    for curve, label in labels.items():
        points = sorted(
            (e["extra_info"][keys[curve]], e["stats"], e["extra_info"]["evaluations"])
            for e in entries
            if e["extra_info"]["curve"] == curve
        )
        if not points:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
        x = [point[0] for point in points]
        median = [stats["median"] / count * 1e9 for _, stats, count in points]
        low = [stats["q1"] / count * 1e9 for _, stats, count in points]
        high = [stats["q3"] / count * 1e9 for _, stats, count in points]
        axes.fill_between(x, low, high, alpha=0.25, linewidth=0)
        axes.plot(x, median, marker="o", markersize=4)
        if curve != "G":
            axes.set_xscale("log", base=2)
        axes.set_yscale("log" if max(median) > 5 * min(median) else "linear")
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("ns an evaluation")
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"over-{curve}.png", dpi=120)
        pyplot.close(figure)
        links.append(f"![{label}](over-{curve}.png)")
    return links


def layer_parts(folder: Path, title: str, entries: list[Entry]) -> list[str]:
    """One layer's timings, one row's through several interfaces, and the machine's bandwidth."""
    levels = json.loads((folder / "bandwidth.json").read_text())
    bandwidth = {int(size): rate for size, rate in levels.items()}
    rates = ", ".join(f"{size >> 10} KB: {rate / 1e9:.0f}" for size, rate in bandwidth.items())
    one_row = json.loads((folder / "one_row.json").read_text())
    return [
        f"## {title}",
        shapes_table(entries, bandwidth),
        *(one_row_table(interface, seconds) for interface, seconds in one_row.items()),
        f"Load bandwidth in GB/s by working set: {rates}",
    ]


def entries_of(folder: Path) -> tuple[dict[str, Any], dict[str, list[Entry]]]:
    """The timings of a run, and its entries by kind."""
    timings = json.loads((folder / "timings.json").read_text())
    by_kind: dict[str, list[Entry]] = {"shapes": [], "curve": [], "chain": [], "threads": []}
    for entry in timings["benchmarks"]:
        by_kind[entry["extra_info"]["kind"]].append(entry)
    return timings, by_kind


def main() -> None:
    """Command line."""
    folder = Path(sys.argv[1])
    timings, by_kind = entries_of(folder)
    cpu = timings["machine_info"]["cpu"].get("brand_raw", timings["machine_info"]["machine"])
    parts = [
        f"# One run\n\n{cpu}, {timings['machine_info'].get('python_version', '')}, {timings['datetime'][:10]}"
    ]
    if by_kind["shapes"]:
        parts += layer_parts(folder, "One layer, one thread", by_kind["shapes"])
    if (folder / "avx2" / "timings.json").exists():
        entries = entries_of(folder / "avx2")[1]["shapes"]
        parts += layer_parts(folder / "avx2", "The same without AVX-512", entries)
    if by_kind["chain"]:
        parts += ["## Chains, one thread", chains_table(by_kind["chain"])]
    if by_kind["threads"]:
        parts += ["## Threads", threads_table(by_kind["threads"])]
    parts += plot_curves(by_kind["curve"], folder)
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
