"""The comparisons every parity test uses: the toolkit's gates, and one for equal bits.

PyTorch is not the truth; float64 on the same dtype-rounded inputs is. No gate skips a NaN: masks must match.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from jaxloss import parity
from jaxloss.parity._assert_close import NO_FINITE, leaves
from jaxloss.parity._compare import HALF_UNIT, relative, structural_problem

FLOAT16_GRADIENT_RATIO = 1.3


def to_numpy(x: Any) -> np.ndarray:
    """A NumPy array of the same values; bfloat16 by way of float32, which holds it exactly."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def assert_same_structure(ours: Any, theirs: Any, *, may_be_empty: bool = False) -> None:
    """Equal keys, shapes, dtypes and NaN, +inf, -inf masks; at least one element."""
    mine, others = leaves(ours), leaves(theirs)
    assert mine.keys() == others.keys(), f"keys differ: {mine.keys() ^ others.keys()}"
    assert may_be_empty or any(leaf.size for leaf in mine.values()), "nothing was compared"
    for key, leaf in mine.items():
        both_empty = leaf.size == 0 and leaf.shape == others[key].shape and leaf.dtype == others[key].dtype
        problem = structural_problem(leaf, others[key])
        assert both_empty or problem in ("", NO_FINITE), f"{key}: {problem}"


def relative_l2(ours: Any, theirs: Any) -> float:
    """‖ours - theirs‖ / ‖theirs‖ over the finite elements, in float64; the absolute norm if theirs is 0."""
    return relative(to_numpy(ours), to_numpy(theirs))


def assert_float64_close(
    ours: Any, theirs: Any, *, tolerance: float = 1e-12, floor: float = 0.0, may_be_empty: bool = False
) -> None:
    """`parity.assert_close` of nothing but float64 arrays."""
    mine = leaves(ours).values()
    assert_same_structure(ours, theirs, may_be_empty=may_be_empty)
    assert all(leaf.dtype == np.float64 for leaf in mine), "not float64"
    if any(np.isfinite(leaf).any() for leaf in mine):
        parity.assert_close(ours, theirs, tolerance=tolerance, floor=floor)


def assert_identical(ours: Any, theirs: Any) -> None:
    """Bit for bit (but for the sign and payload of NaN and the sign of zero)."""
    assert_same_structure(ours, theirs)
    mine, others = leaves(ours), leaves(theirs)
    for key, leaf in mine.items():
        np.testing.assert_array_equal(leaf, others[key], err_msg=key)


def assert_errors_within_ratio(cases: Iterable[tuple[Any, Any, Any]], *, ratio: float | None = None) -> None:
    """`parity.assert_close` over (ours, theirs, oracle) cases."""
    ours, theirs, oracle = (list(column) for column in zip(*cases, strict=True))
    parity.assert_close(ours, theirs, oracle=oracle, **({} if ratio is None else {"ratio": ratio}))


__all__ = [
    "FLOAT16_GRADIENT_RATIO",
    "HALF_UNIT",
    "assert_errors_within_ratio",
    "assert_float64_close",
    "assert_identical",
    "assert_same_structure",
    "relative_l2",
    "to_numpy",
]
