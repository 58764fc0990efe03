"""Generated cases against PyTorch: values, gradients, dtypes, shapes, and error or no error.

300 cases in plain pytest; 5,000 with `pytest parity_tests/test_fuzz.py --hypothesis-profile=thorough`.
"""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parity_tests.gates import HALF_UNIT, assert_float64_close, assert_same_structure, to_numpy
from parity_tests.losses import evaluate_jax, evaluate_torch, round_to

EXTREME = {"plain": 1.0, "large": 30.0, "saturated": 200.0}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """One call: a loss, its arrays in PyTorch's layout, its options, and the dtype."""
    name = draw(st.sampled_from(["cross_entropy", "cross_entropy", "nll_loss", "kl_div"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes = draw(st.integers(1, 9))
    shape = draw(
        st.sampled_from([(classes,), (0, classes), (1, classes), (5, classes), (3, classes, 2), (2, classes, 3, 2)])
    )
    axis = min(len(shape) - 1, 1)
    rows = shape[:axis] + shape[axis + 1 :]
    logits = rng.normal(size=shape) * EXTREME[draw(st.sampled_from(sorted(EXTREME)))]
    logits += draw(st.sampled_from([0.0, 0.0, 100.0]))
    special = draw(st.sampled_from([None, None, None, np.inf, -np.inf, np.nan]))
    if special is not None and logits.size:
        logits.flat[rng.integers(logits.size)] = special
    probabilities = name == "kl_div" or (name == "cross_entropy" and draw(st.booleans()))
    if probabilities:
        targets = np.moveaxis(rng.dirichlet(np.ones(classes), rows), -1, axis) * draw(st.sampled_from([1.0, 0.5]))
    else:
        targets = rng.integers(0, classes, rows)
    arrays = {"values": logits, "targets": targets}
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if name == "kl_div":
        options["reduction"] = draw(st.sampled_from(["mean", "sum", "none", "batchmean"]))
        options["log_target"] = draw(st.booleans())
        return {"name": name, "arrays": arrays, "options": options, "axis": axis}
    if draw(st.booleans()):
        weight = rng.uniform(0.2, 2, classes)
        weight[rng.integers(classes)] = draw(st.sampled_from([1.0, 0.0, -0.5]))
        arrays["weight"] = weight
    if name == "cross_entropy":
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    if not probabilities:
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, classes - 1, classes + 3]))
        ignored = rng.random(rows) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        arrays["targets"] = np.where(ignored, options["ignore_index"], targets)
    return {"name": name, "arrays": arrays, "options": options, "axis": axis}


def hide_ignored_faults(case: dict, theirs: dict) -> dict:
    """PyTorch's gradient of an ignored row that holds NaN or inf is NaN; ours is 0. One of the listed deviations."""
    arrays, axis = case["arrays"], case["axis"]
    if np.issubdtype(arrays["targets"].dtype, np.floating):
        return theirs
    ignored = arrays["targets"] == case["options"]["ignore_index"]
    mask = torch.tensor(np.broadcast_to(np.expand_dims(ignored, axis), arrays["values"].shape).copy())
    return theirs | {"dvalues": theirs["dvalues"].masked_fill(mask, 0.0)}


# Against a confident row PyTorch's p - 1 and log(1 + r) are off by a rounding unit times the row's weight.
CANCELLATION = 1e-13
# In the other dtypes one small case has no meaningful error ratio (test_numerics pools for that): a bound in half
# rounding units of the largest number that enters.
UNITS = 16


def assert_rounding_close(case: dict, dtype: str) -> None:
    """Structure and masks as PyTorch's in this dtype; values within UNITS of float64 on the same rounded inputs."""
    arrays = {k: round_to(v, dtype) if v.dtype == np.float64 else v for k, v in case["arrays"].items()}
    ours = evaluate_jax(case["name"], arrays, case["options"], dtype, case["axis"], jit=True)
    theirs = hide_ignored_faults(case, evaluate_torch(case["name"], arrays, case["options"], dtype))
    with jax.enable_x64(True):
        oracle = evaluate_jax(case["name"], arrays, case["options"], "float64", case["axis"], jit=True)
    assert_same_structure({k: ours[k] for k in theirs}, theirs, may_be_empty=True)
    largest = max(np.max(np.abs(v[np.isfinite(v)]), initial=1.0) for v in arrays.values() if v.dtype == np.float64)
    for key in theirs:
        a, b = to_numpy(ours[key]).astype(np.float64), to_numpy(oracle[key])
        finite = np.isfinite(a) & np.isfinite(b)
        a, b = a[finite], b[finite]
        scale = largest * max(np.max(np.abs(b), initial=0.0), 1.0)
        assert np.all(np.abs(a - b) <= UNITS * HALF_UNIT[dtype] * scale), (key, a, b)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")  # kl_div(reduction="mean")
@settings(max_examples=settings.default.max_examples * 7 // 10)
@given(case=cases(), dtype=st.sampled_from(["float64", "float64", "float32", "bfloat16", "float16"]))
def test_values_gradients_dtypes_and_shapes_equal_pytorch(case, dtype):
    if dtype != "float64":
        return assert_rounding_close(case, dtype)
    with jax.enable_x64(True):
        ours = evaluate_jax(case["name"], case["arrays"], case["options"], dtype, case["axis"], jit=True)
    theirs = hide_ignored_faults(case, evaluate_torch(case["name"], case["arrays"], case["options"], dtype))
    ours = {k: ours[k] for k in theirs}
    return assert_float64_close(ours, theirs, floor=CANCELLATION, may_be_empty=True)


FAULTS = [
    "reduction",
    "label_smoothing",
    "ignore_index",
    "weight",
    "target too large",
    "target negative",
    "targets floating",
    "targets longer",
    "integer values",
    "nothing",
]


def spoil(case: dict, fault: str) -> dict:
    """The same call with one thing wrong with it."""
    arrays, options, classes = case["arrays"], case["options"], case["arrays"]["values"].shape[case["axis"]]
    targets = arrays["targets"]
    match fault:
        case "reduction":
            return case | {"options": options | {"reduction": "avg"}}
        case "label_smoothing":
            return case | {"options": options | {"label_smoothing": 1.5}}
        case "ignore_index":
            return case | {"options": options | {"ignore_index": 1}}
        case "weight":
            return case | {"arrays": arrays | {"weight": np.ones(classes + 1)}}
        case "target too large":
            return case | {"arrays": arrays | {"targets": np.full_like(targets, classes + 7)}}
        case "target negative":
            return case | {"arrays": arrays | {"targets": np.full_like(targets, -7)}}
        case "targets floating":
            return case | {"arrays": arrays | {"targets": np.float64(targets)}}
        case "targets longer":
            return case | {"arrays": arrays | {"targets": np.concatenate([targets, targets[:1]])}}
        case "integer values":
            return case | {"arrays": arrays | {"values": np.int64(np.ones_like(arrays["values"]))}}
    return case


@settings(max_examples=settings.default.max_examples * 3 // 10)
@given(
    case=cases().filter(lambda c: c["name"] != "kl_div" and c["arrays"]["targets"].size > 0),
    fault=st.sampled_from(FAULTS),
)
def test_errors_are_raised_exactly_where_pytorch_raises(case, fault):
    probabilities = np.issubdtype(case["arrays"]["targets"].dtype, np.floating)
    assume(case["name"] == "cross_entropy" or fault != "label_smoothing")
    assume(not (probabilities and fault.startswith("target ")))
    assume(fault != "targets longer" or case["arrays"]["targets"].ndim > 0)
    spoiled = spoil(case, fault)
    try:
        evaluate_torch(spoiled["name"], spoiled["arrays"], spoiled["options"], "float64")
    except (RuntimeError, ValueError, IndexError, NotImplementedError):
        with pytest.raises((ValueError, TypeError, IndexError)), jax.enable_x64(True):
            evaluate_jax(spoiled["name"], spoiled["arrays"], spoiled["options"], "float64", spoiled["axis"])
    else:
        with jax.enable_x64(True):
            evaluate_jax(spoiled["name"], spoiled["arrays"], spoiled["options"], "float64", spoiled["axis"])
