"""How a measure grows with a size: the slope of its logarithm over the size's."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

AXES = ("tokens", "features", "classes")  # of a row's shape


def mebibytes(count: int) -> float:
    """Of bytes."""
    return count / 2**20


MEASURES: dict[str, tuple[str, Callable[[Any], float]]] = {  # in a row: the unit, and what is drawn of its values
    "milliseconds": ("ms", lambda times: times["median"]),
    "temporaries": ("MiB", mebibytes),
    "resident": ("MiB", mebibytes),
}


class Curve(NamedTuple):
    """One implementation's measures over sizes."""

    measure: str  # such as "temporaries"
    along: str  # such as "classes"
    fixed: str  # the other sizes
    name: str
    points: list[tuple[int, float]]

    @property
    def slope(self) -> float:
        """The exponent of the best fit c * size ** slope: 1 where twice the size takes twice as much.

        NaN for less than two sizes at which anything was measured.
        """
        points = [point for point in self.points if point[1] > 0]
        return float(np.polyfit(*np.log(points).T, 1)[0]) if len(points) > 1 else float("nan")


def curves(rows: Iterable[dict[str, Any]]) -> list[Curve]:
    """Every implementation's, of the rows that are measured along a size."""
    found: dict[tuple[str, str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if "along" not in row:
            continue
        sizes = dict(zip(AXES, row["shape"], strict=True))
        size = sizes.pop(row["along"])
        fixed = " x ".join(f"{value} {name}" for name, value in sizes.items())
        for measure, (_, drawn) in MEASURES.items():
            for name, value in row.get(measure, {}).items():
                found.setdefault((measure, row["along"], fixed, name), []).append((size, drawn(value)))
    return [Curve(*key, points) for key, points in found.items()]
