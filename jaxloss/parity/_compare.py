"""One comparison of two arrays: structure, masks, and a gate on the distance. Nothing here can pass vacuously."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

# Half a rounding unit, by dtype: what an exact result may still be off by, relative to the tensor's scale.
HALF_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}

# How much larger than PyTorch's a layer's error may be in the rounded dtypes, and half units on top. XLA on CPU adds
# the terms of a dot product one after the other, PyTorch in blocks: over 3,136 of them a right port has twice
# PyTorch's error. Half precision where there should be none has thousands of times.
LAYER_RATIO, LAYER_UNITS = 4.0, 4.0
SMALL = 1000  # elements, below which arrays are judged together
UNKNOWN = "nothing was compared"  # how a problem ends that is no difference
NO_ELEMENTS, NO_FINITE = (f"no {what}: {UNKNOWN}" for what in ("elements", "finite element"))
# A gradient that is less than this beside the largest may be what cancellation leaves of larger terms: relative to its
# own norm, their rounding would hide that of all others.
SMALL_GRADIENT = 0.01


@dataclass(frozen=True)
class Outcome:
    """Whether two arrays agree, and by how much of what is allowed they differ."""

    error: float  # relative L2
    bound: float  # the largest error that passes
    problem: str = ""  # why nothing can be said of the error

    @property
    def ok(self) -> bool:
        """Whether the comparison passed."""
        return not self.problem and self.error <= self.bound


def compare(ours: np.ndarray, theirs: np.ndarray, *, tolerance: float, floor: float = 0.0) -> Outcome:
    """‖ours - theirs‖ ≤ tolerance · ‖theirs‖ + floor over what is finite in both; NaN and ±inf must coincide."""
    problem = structural_problem(ours, theirs)
    if problem:
        return Outcome(np.inf, tolerance, problem)
    if not jnp.issubdtype(theirs.dtype, jnp.floating):
        return Outcome(float(np.mean(ours != theirs)), 0.0)
    x, y = (widen(array).ravel() for array in (ours, theirs))
    finite = np.isfinite(y)
    if not finite.all():
        x, y = x[finite], y[finite]
    if math.isinf(norm(y)):  # though no element is
        x, y, floor = (part * 2.0**-512 for part in (x, y, floor))
    scale, distance = norm(y), norm(x - y)
    if not scale:
        return Outcome(distance, floor)
    return Outcome(distance / scale, tolerance + floor / scale)


def structural_problem(ours: np.ndarray, theirs: np.ndarray) -> str:
    """What forbids a comparison, in words; empty if nothing does."""
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, PyTorch's is {theirs.shape}"
    if ours.dtype != theirs.dtype and not _both_integers(ours, theirs):
        return f"dtype {ours.dtype}, PyTorch's is {theirs.dtype}"
    if not ours.size:
        return NO_ELEMENTS
    x, y = widen(ours), widen(theirs)
    for label, mask in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        a, b = mask(x), mask(y)
        if (a != b).any():
            return f"{label} at {int(a.sum())} elements, PyTorch's at {int(b.sum())}"
    if not np.isfinite(y).any():
        return NO_FINITE
    return ""


def is_constant(array: np.ndarray) -> bool:
    """Whether several elements are one number, as far as they are finite: order and layout do not show in it."""
    finite = array[np.isfinite(array)]
    return bool(array.size > 1 and finite.size and (finite == finite[0]).all())


def _both_integers(x: np.ndarray, y: np.ndarray) -> bool:
    return bool(np.issubdtype(x.dtype, np.integer) and np.issubdtype(y.dtype, np.integer))


def widen(array: np.ndarray) -> np.ndarray:
    """The same values in float64 or complex128, or as they are if they are no floats."""
    if np.iscomplexobj(array):
        return array.astype(np.complex128)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else np.asarray(array)


@dataclass(frozen=True)
class Rounding:
    """Root-mean-square errors against float64, in units of the exact array's own, or of a larger one."""

    ours: float
    theirs: float
    dtype: str
    size: int = 0
    problem: str = ""

    @classmethod
    def of(cls, ours: Any, theirs: np.ndarray, exact: np.ndarray, least: float = 0.0) -> "Rounding":
        """Of one array; relative to a norm of at least so much."""
        ours = np.asarray(ours)
        problem = structural_problem(ours, theirs)
        if problem:
            return cls(np.inf, 0.0, str(theirs.dtype), problem=problem)
        return cls(relative(ours, exact, least), relative(theirs, exact, least), str(theirs.dtype), ours.size)

    @classmethod
    def pooled(cls, roundings: "Sequence[Rounding]") -> "Rounding":
        """Of many small arrays together: of one alone, the ratio means little."""
        weights = [rounding.size for rounding in roundings]
        mine, others = (
            math.sqrt(np.average([getattr(r, whose) ** 2 for r in roundings], weights=weights))
            for whose in ("ours", "theirs")
        )
        return cls(mine, others, roundings[0].dtype, sum(weights))

    @property
    def bound(self) -> float:
        """The largest error that passes."""
        return LAYER_RATIO * self.theirs + LAYER_UNITS * HALF_UNIT[self.dtype]


def relative(ours: Any, theirs: np.ndarray, least: float = 0.0) -> float:
    """‖ours - theirs‖ / max(‖theirs‖, least) over what is finite in theirs; absolute if both are 0."""
    x, y = widen(np.asarray(ours)), widen(theirs)
    finite = np.isfinite(y)
    return norm((x - y)[finite]) / (max(norm(y[finite]), least) or 1.0)


def norm(array: np.ndarray | np.number) -> float:
    """The L2 norm, also where squares would overflow or underflow."""
    largest = float(np.abs(array).max(initial=0.0))
    return largest * float(np.linalg.norm(array / np.float64(largest))) if 0 < largest < math.inf else largest


def mutants(array: np.ndarray, bound: float) -> dict[str, np.ndarray]:
    """Wrong versions of an array, further off than the bound allows, each of which a comparison must refuse."""
    flat = array.ravel()
    finite = np.isfinite(flat)
    length = norm(flat[finite].astype(np.float64))
    element = flat.copy()
    where = int(np.argmax(np.where(finite, np.abs(flat.astype(np.float64)), -1)))
    wrong = {}
    rolled = np.roll(flat, 1)
    both = finite & np.isfinite(rolled)
    moved = norm(rolled[both].astype(np.float64) - flat[both].astype(np.float64))
    if moved > 4 * bound * length or (finite != np.isfinite(rolled)).any():  # some arrays are the same in any order
        wrong["order"] = rolled.reshape(array.shape)
    if jnp.issubdtype(array.dtype, jnp.floating):
        element[where] += 4 * bound * length or 1
        wrong |= {"sign": -array, "scale": array * (1 + 4 * bound)}
    else:
        element[where] = not element[where] if array.dtype == bool else element[where] + 1
    wrong["element"] = element.reshape(array.shape)
    # What equals the original, like the sign of zeros, is no fault.
    return {name: np.asarray(each) for name, each in wrong.items() if _differs(np.asarray(each), array)}


def _differs(x: np.ndarray, y: np.ndarray) -> bool:
    return not np.array_equal(widen(x), widen(y), equal_nan=bool(jnp.issubdtype(y.dtype, jnp.floating)))
