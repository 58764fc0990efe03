"""The gates of the numerics policy on any pytree."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloss.parity._compare import HALF_UNIT, NO_ELEMENTS, NO_FINITE, SMALL, compare, structural_problem, widen
from jaxloss.parity._faults import classify
from jaxloss.parity._state_dict import to_array

RATIO = 1.2
WORST = 3  # elements that a message shows


def assert_close(
    ours: Any, theirs: Any, *, oracle: Any = None, tolerance: float = 1e-12, floor: float = 0.0, ratio: float = RATIO
) -> None:
    """Raises unless two pytrees of arrays hold the same numbers, but for rounding.

    Keys, shapes, dtypes, and the places of NaN, +inf and -inf must be the same; but integers may be of another width,
    because JAX has 32 bits by default, and None is no leaf of a pytree. Then float64 arrays pass one by one if
    ‖ours - theirs‖ ≤ tolerance · ‖theirs‖ + floor. In other dtypes rounding is compared with rounding: with a float64
    oracle, computed from the same rounded inputs, rmse(ours) ≤ ratio · rmse(theirs) + half a rounding unit of the
    oracle's root mean square; arrays of fewer than 1000 elements together, because of one alone the ratio means
    little, each in units of its oracle's root mean square. Integers and booleans must be equal. Complex arrays are
    compared as their real and imaginary parts.

    Args:
        ours: pytree of JAX, NumPy or PyTorch arrays.
        theirs: the reference, of the same structure.
        oracle: what both would be without rounding, in float64; needed for every other floating dtype.
        tolerance: relative L2 distance that float64 arrays may have.
        floor: absolute L2 distance that they may have besides, where the exact result is 0.
        ratio: how much larger than theirs our error against the oracle may be.

    Raises:
        AssertionError: they differ. The message names the arrays, the worst elements and the class of the fault
            (layout, scale, precision, localised or semantic). Nothing to compare is an error too.
        ValueError: an oracle is missing, not float64, NaN at other places than theirs, or infinite where theirs is not.
            (Where theirs has overflowed, it may be finite: such elements are left out.)

    Examples:
        >>> import numpy as np
        >>> from jaxloss import parity
        >>> theirs = np.array([[1.0, 2.0], [3.0, 4.0]])
        >>> parity.assert_close({"w": theirs}, {"w": theirs})
        >>> parity.assert_close({"w": theirs.T}, {"w": theirs})
        Traceback (most recent call last):
            ...
        AssertionError: ['w'] differs by 0.26 of its norm, 1e-12 is allowed.
          layout: it equals PyTorch's with the axes in the order (1, 0)
          (0, 1): 3.0, expected 2.0
          (1, 0): 2.0, expected 3.0
    """
    pairs = _pairs(ours, theirs)
    oracles = {} if oracle is None else leaves(oracle)
    small: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for key, (x, y) in pairs.items():
        if not x.size:
            continue
        if x.dtype == np.float64 or not jnp.issubdtype(x.dtype, jnp.floating):
            exact = x.dtype != np.float64
            outcome = compare(x, y, tolerance=0.0 if exact else tolerance, floor=floor)
            if outcome.problem != NO_FINITE and not outcome.ok:
                message = f"differs by {outcome.error:.2g} of its norm, {outcome.bound:.2g} is allowed"
                raise AssertionError(_message(key, message, x, y))
            continue
        true = _oracle(oracles, key, x)
        if x.size < SMALL:
            small.setdefault(str(x.dtype), []).append((x, y, true))
        else:
            _judge(key, [(x, y, true)], ratio)
    for dtype, arrays in small.items():
        _judge(f"{len(arrays)} small {dtype} arrays", arrays, ratio)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """NumPy arrays by key path, complex ones as their two parts; a PyTorch tensor is a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in flat:
        array = to_array(leaf)
        arrays |= parts(jax.tree_util.keystr(path), np.asarray(leaf) if array is None else array)
    return arrays


def parts(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """An array by its name; of a complex one the real and the imaginary part."""
    if not np.iscomplexobj(array):
        return {name: array}
    return {f"{name}.real": np.real(array), f"{name}.imag": np.imag(array)}


def _pairs(ours: Any, theirs: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    mine, others = leaves(ours), leaves(theirs)
    if mine.keys() != others.keys():
        raise AssertionError(f"The keys differ: {', '.join(sorted(mine.keys() ^ others.keys()))}.")
    if not any(_tells(array) for array in others.values()):
        raise AssertionError("There are no finite elements: nothing was compared.")
    for key, array in mine.items():
        problem = structural_problem(array, others[key])
        if problem not in ("", NO_ELEMENTS, NO_FINITE):
            raise AssertionError(f"{key or 'It'} has {problem}.")
    return {key: (mine[key], others[key]) for key in mine}


def _tells(array: np.ndarray) -> bool:
    return bool(array.size and np.isfinite(widen(array)).any())


def _oracle(oracles: dict[str, np.ndarray], key: str, array: np.ndarray) -> np.ndarray:
    true = oracles.get(key)
    if true is None or true.dtype != np.float64 or true.shape != array.shape:
        what = "missing" if true is None else f"{true.dtype} of shape {true.shape}"
        raise ValueError(
            f"assert_close: {key or 'it'} is {array.dtype} of shape {array.shape}; its oracle must be float64 of the "
            f"same shape, and is {what}."
        )
    given = widen(array)
    unfit = (np.isnan(true) != np.isnan(given)) | (np.isinf(true) & (true != given))
    if unfit.any():
        first = tuple(np.argwhere(unfit)[0].tolist())
        raise ValueError(
            f"assert_close: {key or 'it'} is {given[first]} at {first}, where its oracle is {true[first]}. The oracle "
            "must be NaN where both results are, and finite where they are."
        )
    return true


def _judge(name: str, arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]], ratio: float) -> None:
    """Every array counts in units of its oracle's root mean square, so that small numbers count too."""
    columns: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for x, y, true in arrays:
        finite = np.isfinite(true) & np.isfinite(widen(x))
        scale = float(np.sqrt(np.mean(true[finite] ** 2))) if finite.any() else 0.0
        for column, array in zip(columns, (x, y), strict=True):
            column.append((widen(array)[finite] - true[finite]) / (scale or 1.0))
    mine, others = (_rms(np.concatenate(column)) for column in columns)
    bound = ratio * others + HALF_UNIT[str(arrays[0][0].dtype)]
    if not mine <= bound:
        message = f"has an rmse of {mine:.3g} of the oracle's scale, {bound:.3g} is allowed (theirs is {others:.3g})"
        worst = max(arrays, key=lambda each: _distances(each[0], each[2]).max())
        raise AssertionError(_message(name, message, worst[0], worst[2]))


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2))) if errors.size else 0.0


@np.errstate(invalid="ignore")  # inf - inf
def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.abs(x.astype(np.float64) - y.astype(np.float64)), nan=-1.0)


def _message(key: str, problem: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    fault = classify(ours, theirs)
    lines = [f"{key or 'It'} {problem}."]
    lines.append(f"{fault.kind}: {fault.seen}" if fault.seen else fault.kind)
    return "\n  ".join([*lines, *_worst(ours, theirs)])


def _worst(ours: np.ndarray, theirs: np.ndarray) -> Iterator[str]:
    distance = _distances(ours, theirs)
    for flat in np.argsort(-distance, axis=None, kind="stable")[:WORST]:
        index = tuple(int(i) for i in np.unravel_index(flat, ours.shape))
        if distance[index] > 0:
            yield f"{index}: {float(ours[index])!r}, expected {float(theirs[index])!r}"
