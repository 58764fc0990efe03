"""How one array differs, element by element: a histogram of its errors and the worst elements."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxloss.parity._layout import Layout, Shape

WORST = 10  # elements that are kept
FINEST = 4  # the first bin ends at 2 ** -(FINEST - 1) units: below, it does not matter by how much
LAST = 68  # the last bin holds all that is larger, infinities and NaN included
_CHUNK = 2**18  # elements that are looked at together, so that a large array is not copied


@dataclass(frozen=True)
class Element:
    """One element, with its index in both layouts."""

    index: Shape  # Flax's
    torch_index: Shape
    ours: float
    theirs: float
    exact: float | None  # float64's, where both are judged against it
    units: float  # the port's error in units; infinite if only one is finite


@dataclass(frozen=True)
class Detail:
    """The errors of one array in units of rounding.

    A unit is one unit in the last place, in the dtype of the comparison, of a number as large as the reference's root
    mean square: eps · 2^floor(log2(rms)); 1 for integers. It is one for the whole array, so that small elements beside
    large ones are not held to digits that a sum with the large ones cannot keep.

    The reference is PyTorch's array in float64. In any other dtype it is float64's result from the same rounded
    inputs, and PyTorch has errors of its own.
    """

    unit: float
    ours: tuple[int, ...]  # how many elements have no error, at most 1/8 unit, 1/4, 1/2, 1, 2, 4, …
    theirs: tuple[int, ...]  # PyTorch's own errors; empty where PyTorch is the reference
    worst: tuple[Element, ...]  # the largest error of ours first; none without error

    @classmethod
    def of(
        cls, ours: np.ndarray, theirs: np.ndarray, layout: Layout, exact: np.ndarray | None = None
    ) -> "Detail | None":
        """Of two arrays in Flax's layout, and the exact one if there is one.

        None if their shapes differ, and of complex numbers.
        """
        if ours.shape != theirs.shape or not ours.size or np.iscomplexobj(ours) or np.iscomplexobj(theirs):
            return None
        unit = _unit(theirs if exact is None else exact, theirs.dtype)
        mine, others = np.zeros(LAST + 1, np.int64), np.zeros(LAST + 1, np.int64)
        worst: list[tuple[float, int]] = []  # minus the error, and where
        start = 0
        for x, true in zip(_parts(ours), _parts(theirs if exact is None else exact), strict=True):
            errors = _errors(x, true, unit)
            mine += _count(errors)
            worst = _worst(worst, errors, start)
            start += x.size
        if exact is not None:
            others += sum(_count(_errors(*parts, unit)) for parts in zip(_parts(theirs), _parts(exact), strict=True))
        elements = (_element(where, -error, ours, theirs, layout, exact) for error, where in worst)
        return cls(unit, _trimmed(mine), _trimmed(others), tuple(elements))


def bin_end(index: int) -> float:
    """The largest error, in units, that a bin of a histogram holds."""
    return 2.0 ** (index - FINEST) if index else 0.0


def _unit(reference: np.ndarray, dtype: np.dtype) -> float:
    if not jnp.issubdtype(dtype, jnp.floating):
        return 1.0
    kind, squares, count = jnp.finfo(dtype), 0.0, 0
    for part in _parts(reference):
        finite = part[np.isfinite(part)]
        with np.errstate(over="ignore"):
            squares, count = squares + float(finite @ finite), count + finite.size
    largest = 2.0 ** math.floor(math.log2(squares / count) / 2) if 0 < squares < math.inf else 1.0
    return max(float(kind.eps) * largest, float(kind.smallest_subnormal))


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """Of the flat array, in float64."""
    blocks = np.atleast_1d(array.squeeze())  # not the flat array: it is a copy where the axes are permuted
    rows = max(1, _CHUNK * len(blocks) // blocks.size)
    return (blocks[start : start + rows].ravel().astype(np.float64) for start in range(0, len(blocks), rows))


def _errors(x: np.ndarray, reference: np.ndarray, unit: float) -> np.ndarray:
    """Absolute, in units; 0 where both are the same NaN or infinity, infinite where only one is."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(x - reference) / unit
    same = (x == reference) | (np.isnan(x) & np.isnan(reference))
    return np.where(same, 0.0, np.where(np.isnan(errors), np.inf, errors))


def _count(errors: np.ndarray) -> np.ndarray:
    """How many are in each bin: bin k ends at `bin_end(k)`, which belongs to it."""
    mantissa, exponent = np.frexp(np.where(np.isfinite(errors), errors, 1.0))
    bins = np.clip(exponent - (mantissa == 0.5) + FINEST, 1, LAST)
    bins = np.where(np.isfinite(errors), np.where(errors == 0, 0, bins), LAST)
    return np.bincount(bins, minlength=LAST + 1)


def _worst(worst: list[tuple[float, int]], errors: np.ndarray, start: int) -> list[tuple[float, int]]:
    least = -worst[-1][0] if len(worst) == WORST else 0.0
    candidates = np.flatnonzero(errors > least)
    if candidates.size > WORST:
        candidates = candidates[np.argsort(-errors[candidates], kind="stable")[:WORST]]
    found = [(-float(errors[i]), start + int(i)) for i in candidates]
    return sorted(worst + found)[:WORST]


def _element(
    where: int, units: float, ours: np.ndarray, theirs: np.ndarray, layout: Layout, exact: np.ndarray | None
) -> Element:
    index = tuple(int(i) for i in np.unravel_index(where, ours.shape))
    true = None if exact is None else float(exact[index])
    return Element(index, layout.torch_index(index), float(ours[index]), float(theirs[index]), true, units)


def _trimmed(counts: np.ndarray) -> tuple[int, ...]:
    """Without the empty bins at the end."""
    filled = np.flatnonzero(counts)
    return tuple(counts[: filled[-1] + 1].tolist()) if filled.size else ()
