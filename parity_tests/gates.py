"""The comparisons every parity test uses: one float64 gate, one rounding-error gate, one bit-for-bit gate.

PyTorch is not the truth; float64 on the same dtype-rounded inputs is. No gate skips a NaN: masks must match.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

# Half a rounding unit, by dtype: what an exact result may still be off by, relative to the tensor's scale.
HALF_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
# How much larger than PyTorch's our root-mean-square error may be.
RATIO = {"float32": 1.2, "bfloat16": 1.2, "float16": 1.2}
FLOAT16_GRADIENT_RATIO = 1.3


def to_numpy(x: Any) -> np.ndarray:
    """A NumPy array of the same values; bfloat16 by way of float32, which holds it exactly."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def dtype_name(x: Any) -> str:
    """The dtype as "float32" and so on, whichever framework the array is of."""
    return str(x.dtype).removeprefix("torch.")


def leaves(tree: Any) -> dict[str, Any]:
    """Leaves by key path; a torch tensor is a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, torch.Tensor))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def assert_same_structure(ours: Any, theirs: Any, *, may_be_empty: bool = False) -> dict[str, tuple[Any, Any]]:
    """Equal keys, shapes, dtypes and NaN, +inf, -inf masks; at least one element. Returns the pairs of leaves."""
    ours, theirs = leaves(ours), leaves(theirs)
    assert ours.keys() == theirs.keys(), f"keys differ: {ours.keys() ^ theirs.keys()}"
    assert may_be_empty or any(to_numpy(leaf).size for leaf in ours.values()), "nothing was compared"
    for key in ours:
        a, b = to_numpy(ours[key]), to_numpy(theirs[key])
        assert a.shape == b.shape, f"{key}: shape {a.shape} against {b.shape}"
        assert dtype_name(ours[key]) == dtype_name(theirs[key]), f"{key}: {ours[key].dtype}, {theirs[key].dtype}"
        for label, mask in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
            np.testing.assert_array_equal(mask(a), mask(b), err_msg=f"{key}: {label} mask")
    return {key: (ours[key], theirs[key]) for key in ours}


def relative_l2(ours: Any, theirs: Any) -> float:
    """‖ours - theirs‖ / ‖theirs‖ over the finite elements, in float64; the absolute norm if theirs is 0."""
    a, b = to_numpy(ours).astype(np.float64), to_numpy(theirs).astype(np.float64)
    finite = np.isfinite(b)
    scale = np.linalg.norm(b[finite])
    return float(np.linalg.norm(a[finite] - b[finite]) / (scale or 1.0))


def assert_float64_close(
    ours: Any, theirs: Any, *, tolerance: float = 1e-12, floor: float = 0.0, may_be_empty: bool = False
) -> None:
    """Float64 results of the same semantics: leaf by leaf, ‖ours - theirs‖ ≤ tolerance · ‖theirs‖ + floor."""
    for key, (a, b) in assert_same_structure(ours, theirs, may_be_empty=may_be_empty).items():
        assert dtype_name(a) == "float64", f"{key}: {a.dtype} is not float64"
        x, y = to_numpy(a), to_numpy(b)
        finite = np.isfinite(y)
        distance, scale = np.linalg.norm(x[finite] - y[finite]), np.linalg.norm(y[finite])
        assert distance <= tolerance * scale + floor, f"{key}: {distance:.3g} > {tolerance:.3g} of {scale:.3g}"


def assert_identical(ours: Any, theirs: Any) -> None:
    """Bit for bit (but for the sign and payload of NaN and the sign of zero)."""
    for key, (a, b) in assert_same_structure(ours, theirs).items():
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b), err_msg=key)


def rmse(x: np.ndarray, oracle: np.ndarray) -> float:
    """Root-mean-square error over the elements whose exact value is finite in both."""
    finite = np.isfinite(oracle) & np.isfinite(x)
    return float(np.sqrt(np.mean((x[finite] - oracle[finite]) ** 2))) if finite.any() else 0.0


def assert_errors_within_ratio(cases: Iterable[tuple[Any, Any, Any]], *, ratio: float | None = None) -> float:
    """rmse(ours) ≤ ratio · rmse(theirs) + half a rounding unit of the scale, pooled over (ours, theirs, oracle) cases.

    Pooling is for tensors too small to have a meaningful error of their own. Returns the measured ratio.
    """
    pooled: list[list[np.ndarray]] = [[], [], []]
    dtype = ""
    for ours, theirs, oracle in cases:
        assert_same_structure(ours, theirs)
        assert dtype_name(oracle) == "float64", f"the oracle is {oracle.dtype}"
        assert dtype in ("", dtype_name(ours)), "cases of different dtypes"
        dtype = dtype_name(ours)
        for pool, x in zip(pooled, (ours, theirs, oracle), strict=True):
            pool.append(to_numpy(x).astype(np.float64).ravel())
    a, b, exact = (np.concatenate(pool) for pool in pooled)
    scale = np.sqrt(np.mean(exact[np.isfinite(exact)] ** 2))
    bound = (ratio or RATIO[dtype]) * rmse(b, exact) + HALF_UNIT[dtype] * scale
    error = rmse(a, exact)
    assert error <= bound, f"rmse {error:.3g} > {bound:.3g} (PyTorch's is {rmse(b, exact):.3g})"
    return error / bound
