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

FLOAT32_TARGETS = {  # time relative to float32
    "128x128-G26-B1024": {"function": 12, "embedding_bag": 3},
    "128x128-G26-B1": {"function": 10, "embedding_bag": 15},
}

SPEED_UP_TARGET = 1.8  # of two threads
LOST_TARGET = 0.1  # of a network's time, to all but the kernels

CURVES = {  # key of what varies, label
    "G": ("num_grids", "grid cells an axis, G"),
    "batch": ("batch", "batch"),
    "width": ("width", "width, N_in = N_out"),
}

ABOUT_GRIDS = (
    "Loads: four float32 an evaluation. Table: all of its bytes once a call; a time below the larger of both is "
    "possible where a batch reaches only a part of the table."
)

Entry = dict[str, Any]


def milliseconds(entry: Entry) -> str:
    """Median and interquartile range."""
    stats = entry["stats"]
    return f"{stats['median'] * 1e3:.4g} ms ± {stats['iqr'] * 500:.2g}"


def quartiles(values: list[float], style: str = ".2f") -> str:
    """Median, first and third quartile."""
    first, median, third = statistics.quantiles(values, n=4)
    return f"{median:{style}} ({first:{style}} to {third:{style}})"


def rate_of(size: int, bandwidth: dict[int, float]) -> float:
    """Bytes a second from the level that holds so many bytes."""
    return bandwidth[min((s for s in bandwidth if s >= size), default=max(bandwidth))]


def slice_bytes(n_out: int, grids: int) -> int:
    """One pair's part of a float32 table."""
    return (grids + 1) ** 2 * n_out * 4


def floor_seconds(size: int, bandwidth: dict[int, float]) -> float:
    """Time to load the 4 float32 of an evaluation from the level that holds one pair's slice, of `size` bytes."""
    return 16 / rate_of(size, bandwidth)


def shapes_table(entries: list[Entry], bandwidth: dict[int, float]) -> str:
    """One row a shape and form; the ratios to a dense layer are of runs that took turns with it."""
    by_shape: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        info = entry["extra_info"]
        by_shape.setdefault(info["shape"], {})[info["form"]] = entry
    lines = [
        "| shape | form | median, half IQR | G evaluations/s | of the floor | × dense, quartiles | to reach "
        "| largest error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape, forms in by_shape.items():
        _, n_out, grids = (int(part.strip("GB")) for part in shape.replace("x", "-").split("-")[:3])
        floor = floor_seconds(slice_bytes(n_out, grids), bandwidth)
        for form, entry in forms.items():
            seconds = entry["stats"]["median"]
            evaluations = entry["extra_info"]["evaluations"]
            target = TARGETS[shape][FORM_TARGETS[form]] if form in FORM_TARGETS else None
            lookup = form not in ("dense", "identity")
            share = floor * evaluations / seconds if form == "float32" else None
            lines.append(
                f"| {shape} | {form} | {milliseconds(entry)} "
                f"| {f'{evaluations / seconds / 1e9:.2f}' if lookup else ''} "
                f"| {f'{share:.0%}' if share is not None else ''} "
                f"| {quartiles(entry['extra_info']['ratios'])} | {f'≤ {target}' if target else ''} "
                f"| {entry['extra_info']['error']:.1g} |"
            )
        for form, target in FLOAT32_TARGETS.get(shape, {}).items():
            if form in forms:
                ratio = quartiles(forms[form]["extra_info"]["float32_ratios"], ".1f")
                lines.append(f"| {shape} | **{form} / float32** | | | | **{ratio}** | ≥ {target} | |")
    return "\n".join(lines)


def chains_table(entries: list[Entry]) -> str:
    """The share of a network's time that its kernels do not take, of runs that took turns with them."""
    lines = [
        "| network, G = 12 | median, half IQR | lost to all but the kernels, quartiles | to reach |",
        "| --- | --- | --- | --- |",
    ]
    for entry in entries:
        info = entry["extra_info"]
        form = "exported batch-last with BatchNorm, " if info["form"] == "batch-last" else ""
        key = f"{form}{'→'.join(map(str, info['widths']))}, batch {info['batch']}"
        lost = quartiles(info["lost"], ".1%")
        lines.append(f"| {key} | {milliseconds(entry)} | {lost} | ≤ {LOST_TARGET:.0%} |")
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
    lines = [
        "| layer | 2 threads, half IQR | speed-up, quartiles | to reach |",
        "| --- | --- | --- | --- |",
    ]
    for entry in entries:
        info = entry["extra_info"]
        key = f"{info['width']}→{info['width']}, G = {info['num_grids']}, batch {info['batch']}"
        speed_up = quartiles(info["ratios"])
        lines.append(f"| {key} | {milliseconds(entry)} | {speed_up} | ≥ {SPEED_UP_TARGET} |")
    return "\n".join(lines)


def points_of(entries: list[Entry], curve: str) -> list[tuple[int, Entry]]:
    """A curve's entries with their place on it, in order."""
    own = [entry for entry in entries if entry["extra_info"]["curve"] == curve]
    key, _ = CURVES[curve]
    return sorted(((entry["extra_info"][key], entry) for entry in own), key=lambda point: point[0])


def nanoseconds(entry: Entry, statistic: str) -> float:
    """Time of one evaluation: its median, q1 or q3."""
    return entry["stats"][statistic] / entry["extra_info"]["evaluations"] * 1e9


def nanoseconds_text(entry: Entry) -> str:
    """Median, first and third quartile."""
    median, first, third = (nanoseconds(entry, statistic) for statistic in ("median", "q1", "q3"))
    return f"{median:.3g} ({first:.3g} to {third:.3g})"


def grids_table(points: list[tuple[int, Entry]], bandwidth: dict[int, float]) -> str:
    """Time over G against what the cache levels explain: loads of a slice, and one pass over the table."""
    lines = [
        "| G | slice of one pair, KB | table, MB | ns an evaluation, quartiles "
        "| loads from the slice's level, ns | table from its level, ns | time / the larger |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for grids, entry in points:
        info = entry["extra_info"]
        size = slice_bytes(info["width"], grids)
        table = info["width"] // 2 * size
        loads = floor_seconds(size, bandwidth) * 1e9
        passes = table / rate_of(table, bandwidth) / info["evaluations"] * 1e9
        ratio = nanoseconds(entry, "median") / max(loads, passes)
        lines.append(
            f"| {grids} | {size / 1024:.0f} | {table / 2**20:.1f} | {nanoseconds_text(entry)} | {loads:.3f} "
            f"| {passes:.3f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def curve_table(points: list[tuple[int, Entry]], curve: str) -> str:
    """Time over batch or width."""
    lines = [f"| {CURVES[curve][1]} | ns an evaluation, quartiles |", "| --- | --- |"]
    lines += [f"| {place} | {nanoseconds_text(entry)} |" for place, entry in points]
    return "\n".join(lines)


def plot_curves(entries: list[Entry], folder: Path) -> list[str]:
    """Nanoseconds an evaluation over G, batch and width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    links = []
    for curve, (_, label) in CURVES.items():
        points = points_of(entries, curve)
        if not points:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
        x = [place for place, _ in points]
        median, low, high = (
            [nanoseconds(entry, statistic) for _, entry in points] for statistic in ("median", "q1", "q3")
        )
        axes.fill_between(x, low, high, alpha=0.25, linewidth=0)
        axes.plot(x, median, marker="o", markersize=4)
        if curve != "G":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        if max(median) > 5 * min(median):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("ns an evaluation")
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"over-{curve}.png", dpi=120)
        pyplot.close(figure)
        links.append(f"![{label}](over-{curve}.png)")
    return links


def parts_of(folder: Path, title: str, by_kind: dict[str, list[Entry]]) -> list[str]:
    """What one run found, and the machine's bandwidth."""
    levels = json.loads((folder / "bandwidth.json").read_text())
    bandwidth = {int(size): rate for size, rate in levels.items()}
    rates = ", ".join(f"{size >> 10} KB: {rate / 1e9:.0f}" for size, rate in bandwidth.items())
    parts = [f"## {title}"]
    if by_kind["shapes"]:
        one_row = json.loads((folder / "one_row.json").read_text())
        parts += ["### One layer, one thread", shapes_table(by_kind["shapes"], bandwidth)]
        parts += [one_row_table(interface, seconds) for interface, seconds in one_row.items()]
    parts.append(f"Load bandwidth in GB/s by working set: {rates}")
    if by_kind["chain"]:
        parts += ["### Chains, one thread", chains_table(by_kind["chain"])]
    if by_kind["threads"]:
        parts += ["### Threads", threads_table(by_kind["threads"])]
    for curve, (_, label) in CURVES.items():
        points = points_of(by_kind["curve"], curve)
        if points:
            table = grids_table(points, bandwidth) if curve == "G" else curve_table(points, curve)
            parts += [f"### Time over {label}", table]
            parts += [ABOUT_GRIDS] if curve == "G" else []
    return parts


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
    parts += parts_of(folder, "With all instruction sets", by_kind)
    parts += plot_curves(by_kind["curve"], folder)
    if (folder / "avx2" / "timings.json").exists():
        parts += parts_of(folder / "avx2", "Without AVX-512", entries_of(folder / "avx2")[1])
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
