"""`python -m benchmarks.plots RESULT.json DIR`: pictures of results that were measured earlier.

In a row of times the first implementation is ours, and the others are what one would use instead.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.growth import MEASURES, Curve, curves
from benchmarks.timing import spread

Rows = list[dict[str, Any]]
CASE_INCHES = 0.3
MEASURED = {*MEASURES, "first call, seconds", "steps"}  # what does not name a case


def draw(rows: Rows, folder: Path, name: str) -> list[Path]:
    """Ratios of times, growth with sizes and single trainings, as far as there are any; the files."""
    figures = {}
    for group, some in grouped((row for row in rows if is_case(row)), title).items():
        figures[group] = ratios(group, some)
    for (measure, along), some in grouped(curves(rows), itemgetter(0, 1)).items():
        figures[f"{measure} over {along}"] = growing(some)
    if trainings := [row for row in rows if "seed" in row]:
        figures["seconds"] = seeds(trainings)
    folder.mkdir(parents=True, exist_ok=True)
    return [save(figure, folder / f"{name}-{slug(group)}.svg") for group, figure in figures.items()]


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """By key, in the order of their first."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def is_case(row: dict[str, Any]) -> bool:
    """Whether times are compared in it, at no size of many."""
    return "along" not in row and len(row.get("milliseconds", ())) > 1


def title(row: dict[str, Any]) -> str:
    """Of the picture that a row of times belongs into: one for each loss, start or model, or for what is measured."""
    return next((row[key] for key in ("loss", "case", "of", "model") if key in row), "times")


def label(row: dict[str, Any]) -> str:
    """What tells a row from the others of its picture."""
    named = {key: value for key, value in row.items() if key not in MEASURED and value != title(row)}
    return ", ".join(described(*each) for each in named.items()) or title(row)


def described(key: str, value: Any) -> str:
    """For people: 128 x 10, batch 32, float32."""
    if key == "shape":
        return " x ".join(map(str, value))
    return f"{key} {value}" if isinstance(value, int) else str(value)


def slug(text: str) -> str:
    """For a file's name."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def save(figure: Figure, path: Path) -> Path:
    """Writes it, the same bytes for the same results, with text as text."""
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path


def ratios(group: str, rows: Rows) -> Figure:
    """Our median over every peer's, one case to a line; the bars reach as far as both middle halves do."""
    figure = Figure(figsize=(9, 1.5 + CASE_INCHES * len(rows)), layout="constrained")
    axes = figure.subplots()
    ours, *peers = dict.fromkeys(name for row in rows for name in row["milliseconds"])
    for number, peer in enumerate(peers):
        some = {line: row["milliseconds"] for line, row in enumerate(rows) if peer in row["milliseconds"]}
        heights = [line + 0.6 * ((number + 0.5) / len(peers) - 0.5) for line in some]
        middles = [times[ours]["median"] / times[peer]["median"] for times in some.values()]
        axes.plot(middles, heights, f"C{number}o", markersize=4, label=peer)
        axes.hlines(heights, *zip(*(spread(times, ours, peer) for times in some.values()), strict=True), f"C{number}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(title=group, xscale="log", xlabel=f"time of {ours} / time of another")
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}".strip("0.")[:1] in "125" else ""))
    axes.set_yticks(range(len(rows)), map(label, rows))
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def growing(some: list[Curve]) -> Figure:
    """One measure of every implementation over one size, both logarithmic unless all are 0, with the slopes."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for curve in some:
        axes.plot(*zip(*curve.points, strict=True), "o-", label=f"{curve.name}: slope {curve.slope:.2f}")
    first, unit = some[0], MEASURES[some[0].measure][0]
    scale = "log" if any(value > 0 for curve in some for _, value in curve.points) else "linear"
    axes.set(title=first.fixed, xlabel=first.along, ylabel=f"{first.measure}, {unit}", xscale="log", yscale=scale)
    sizes = sorted({size for curve in some for size, _ in curve.points})
    axes.set_xticks(sizes, map(str, sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def seeds(rows: Rows) -> Figure:
    """The seconds of every training."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(f"{row['model']}, {row['implementation']}" for row in rows))
    for row in rows:
        line = names.index(f"{row['model']}, {row['implementation']}")
        axes.plot(row["seconds"], line, "C0o")
    axes.set(xlabel="seconds of a training", xlim=(0, None))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return figure


def main(result: str, folder: str) -> None:
    """Draw a file of results."""
    path = Path(result)
    print(*draw(json.loads(path.read_text())["rows"], Path(folder), path.stem), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
