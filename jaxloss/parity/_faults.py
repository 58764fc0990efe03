"""The class of a difference between two arrays: layout, scale, precision, localised, or none of these: semantic."""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxloss.parity._compare import norm, widen

FLOAT32_INSIDE = "the error is of float32's size"
FLOAT32_ERROR = 4 * float(np.finfo(np.float32).eps)
MATCH = 1e-9  # relative L2 at which a guess is taken to be right


class Fault(NamedTuple):
    """What kind of difference it is, and what was seen."""

    kind: str
    seen: str = ""


@np.errstate(over="ignore", invalid="ignore")  # of numbers that another dtype or a float64 cannot hold
def classify(ours: np.ndarray, theirs: np.ndarray, *, linear_image: bool = False) -> Fault:
    """Compares ours with changed versions of theirs; of linear images of arrays, only their scale tells something."""
    x, y = widen(ours), widen(theirs)
    if x.shape != y.shape or not np.isfinite(x).all() or not np.isfinite(y).all():
        return Fault("semantic")
    if x.dtype != np.float64 or not y.any():
        return Fault("semantic")
    if theirs.dtype == np.float32 and norm(x - y) < FLOAT32_ERROR * norm(y):
        return Fault("precision", FLOAT32_INSIDE)
    if linear_image:
        return _scale(x, y) or Fault("semantic")
    if matches(x, y):
        return Fault("semantic", "it is PyTorch's but for less than 1e-9: a constant of few digits, or another epsilon")
    for fault in (_layout(x, y), _scale(x, y), _precision(x, y), _localised(x, y), _small(x, y)):
        if fault is not None:
            return fault
    return Fault("semantic")


def matches(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two arrays are equal but for float64's rounding."""
    return x.shape == y.shape and norm(x - y) <= MATCH * norm(y) < np.inf


def _layout(x: np.ndarray, y: np.ndarray) -> Fault | None:
    if x.ndim and not np.isclose(np.abs(x).sum(), np.abs(y).sum(), rtol=1e-9):
        return None
    axes = range(x.ndim)
    if x.ndim <= 5:
        for order in itertools.permutations(axes):
            if order != tuple(axes) and matches(x, y.transpose(order).reshape(x.shape)):
                return Fault("layout", f"it equals PyTorch's with the axes in the order {order}")
        for count in range(1, x.ndim + 1):
            for flipped in itertools.combinations(axes, count):
                if matches(x, np.flip(y, flipped)):
                    return Fault("layout", f"it equals PyTorch's flipped along {flipped}")
    if x.size > 1 and matches(np.sort(x, axis=None), np.sort(y, axis=None)):
        return Fault("layout", "it holds PyTorch's values in another order")
    return None


def _scale(x: np.ndarray, y: np.ndarray) -> Fault | None:
    if not x.any():
        return Fault("scale", "it is 0 everywhere")
    length = norm(y)
    factor = float(np.vdot(y / length, x / length))
    multiple = x.size > 1 and matches(x, np.asarray(factor * y))  # any number is one of any other
    told = f"{factor:.6g}"
    return Fault("scale", f"it is PyTorch's times {told}") if multiple and told != "1" else None


def _precision(x: np.ndarray, y: np.ndarray) -> Fault | None:
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        name = jnp.dtype(dtype).name
        unit = float(jnp.finfo(dtype).eps)
        rounded = x.astype(dtype).astype(np.float64)
        if np.ptp(x) == 0:
            return None  # a constant
        error = norm(x - y) / norm(y)
        if (rounded == x).all() and (y.astype(dtype).astype(np.float64) != y).any() and error < 64 * unit:
            return Fault("precision", f"every element is a {name} number")
    return None


def _small(x: np.ndarray, y: np.ndarray) -> Fault | None:
    if MATCH < norm(x - y) / norm(y) < FLOAT32_ERROR:
        return Fault("precision", FLOAT32_INSIDE)
    return None


def _localised(x: np.ndarray, y: np.ndarray) -> Fault | None:
    differs = np.abs(x - y) > MATCH * norm(y) / np.sqrt(y.size)
    share = differs.mean()
    if not 0 < share <= 0.5:
        return None
    first = tuple(int(i) for i in np.argwhere(differs)[0])
    for axis, size in enumerate(x.shape):
        rows = differs.any(axis=tuple(other for other in range(x.ndim) if other != axis))
        if rows.sum() <= max(2, size // 4) and size > 2:
            where = np.flatnonzero(rows).tolist()
            return Fault("localised", f"only at {where} along axis {axis}, first at {first}")
    return Fault("localised", f"at {int(differs.sum())} of {x.size} elements, first at {first}")
