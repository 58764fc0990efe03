"""PyTorch's class axis, dtypes and argument kinds; log_softmax and kl_div: each test runs PyTorch and jaxloss."""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import jaxloss
from parity_tests.gates import (
    HALF_UNIT,
    assert_errors_within_ratio,
    assert_float64_close,
    assert_identical,
    assert_same_structure,
    relative_l2,
    to_numpy,
)
from parity_tests.losses import OURS, THEIRS, evaluate_jax, evaluate_torch, round_to, to_torch

pytestmark = pytest.mark.usefixtures("strict")

INF, NAN = np.inf, np.nan
BOTH = pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
KL_REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
WARNS_OF_MEAN = pytest.mark.filterwarnings("ignore:reduction:UserWarning")  # PyTorch on kl_div(reduction="mean")
RNG = np.random.default_rng(3)
LOGITS, PROBABILITIES = RNG.normal(size=(4, 5)) * 2, RNG.dirichlet(np.ones(5), 4)
TARGETS = np.array([0, 4, -100, 1])
WEIGHT = np.array([1.0, 0.5, 2.0, 0.0, -0.3])
FLOATS = ["float16", "bfloat16", "float32", "float64"]
UNSIGNED = ["uint8", "uint16", "uint32", "uint64"]


def agree(name: str, arrays: dict, axis: int = 1, **options) -> dict:
    """PyTorch's loss and gradients, once ours equal them in float64."""
    theirs = evaluate_torch(name, arrays, options, "float64")
    with jax.enable_x64(True):
        ours = evaluate_jax(name, arrays, options, "float64", axis)
    assert_float64_close({key: ours[key] for key in theirs}, theirs, may_be_empty=True)
    return theirs


# The class axis, array kinds and dtypes

AXES = [(shape, axis) for shape in [(4, 5), (4, 5, 2), (4, 5, 2, 3)] for axis in [*range(len(shape)), -1]]


@pytest.mark.parametrize(("shape", "axis"), AXES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("kind", ["cross_entropy", "nll_loss", "cross_entropy probabilities"])
def test_class_axis_may_be_anywhere(shape, axis, kind):
    name, rows, rng = kind.split()[0], (shape[0], *shape[2:]), np.random.default_rng(0)
    targets = np.where(rng.random(rows) < 0.3, -100, rng.integers(0, 5, rows))
    if kind != name:
        targets = np.moveaxis(rng.dirichlet(np.ones(5), rows), -1, 1)
    arrays = {"values": rng.normal(size=shape), "targets": targets, "weight": WEIGHT}
    theirs = evaluate_torch(name, arrays, {"reduction": "none"}, "float64")
    moved = {key: np.moveaxis(x, 1, axis) if x.shape == shape else x for key, x in arrays.items()}
    with jax.enable_x64(True):
        ours = evaluate_jax(name, moved, {"reduction": "none"}, "float64", axis)
    back = {key: x if key == "loss" else np.moveaxis(x, axis, 1) for key, x in ours.items() if key in theirs}
    assert_float64_close(back, theirs)


@BOTH
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", *UNSIGNED])
def test_targets_of_every_integer_dtype_give_pytorchs_int64_result(name, dtype):
    ignored = 255 if dtype in UNSIGNED else -100
    targets = np.array([0, 4, ignored, 1], dtype)
    agree(name, {"values": LOGITS, "targets": targets, "weight": WEIGHT}, ignore_index=ignored)
    values, weight = LOGITS.astype(np.float32), WEIGHT.astype(np.float32)
    options = {"weight": weight, "ignore_index": ignored}
    expected = OURS[name](values, targets.astype(np.int32), **options)
    assert_identical(OURS[name](values, targets, **options), expected)


@BOTH
def test_uint8_targets_are_accepted_by_pytorch_too(name):
    targets = np.array([0, 4, 255, 1], np.uint8)
    theirs = THEIRS[name](to_torch(LOGITS), torch.tensor(targets), ignore_index=255)
    with jax.enable_x64(True):
        assert_float64_close(OURS[name](LOGITS, targets, ignore_index=255), theirs)


@BOTH
def test_numpy_arrays_and_lists_are_taken(name):
    values, weight = LOGITS.astype(np.float32), WEIGHT.astype(np.float32)
    result = OURS[name](jnp.asarray(values), jnp.asarray(TARGETS), weight=jnp.asarray(weight))
    assert_same_structure(result, THEIRS[name](to_torch(values), to_torch(TARGETS), weight=to_torch(weight)))
    assert_identical(OURS[name](values, TARGETS, weight=weight), result)
    assert_identical(OURS[name](values.tolist(), TARGETS.tolist(), weight=weight.tolist()), result)


@BOTH
@REDUCTIONS
@pytest.mark.parametrize("dtype", FLOATS)
def test_index_targets_keep_the_dtype_of_the_input(name, reduction, dtype, x64):
    theirs = THEIRS[name](to_torch(LOGITS, dtype), to_torch(TARGETS), reduction=reduction)
    assert_same_structure(OURS[name](jnp.asarray(LOGITS, dtype), TARGETS, reduction=reduction), theirs)


def assert_promotes(ours: Callable, theirs: Callable, inputs: np.ndarray, targets: np.ndarray) -> None:
    """Of every pair of dtypes: the result's dtype is PyTorch's, and its value float64's within 4 half units of it.

    PyTorch's value may be worse: it rounds half inputs' log-probabilities before it multiplies them by float64.
    """
    for first, second in itertools.product(FLOATS, FLOATS):
        expected = theirs(to_torch(inputs, first), to_torch(targets, second))
        found = ours(jnp.asarray(inputs, first), jnp.asarray(targets, second))
        assert_same_structure(found, expected)
        exact = theirs(to_torch(round_to(inputs, first)), to_torch(round_to(targets, second)))
        assert relative_l2(found, exact) <= 4 * HALF_UNIT[str(found.dtype)], (first, second)


@pytest.mark.rounding
def test_probability_targets_promote(x64):
    assert_promotes(jaxloss.cross_entropy, F.cross_entropy, LOGITS, PROBABILITIES)


@pytest.mark.rounding
def test_float32_in_the_place_of_promotion_fails_that_comparison(x64):
    def wrong(x, t):
        right = jaxloss.cross_entropy(x, t)
        return jaxloss.cross_entropy(x.astype(jnp.float32), t.astype(jnp.float32)).astype(right.dtype)

    with pytest.raises(AssertionError):
        assert_promotes(wrong, F.cross_entropy, LOGITS, PROBABILITIES)


# log_softmax


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_log_softmax_along_any_axis(axis, x64):
    logits, cotangent = np.random.default_rng(4).normal(size=(2, 3, 4, 5))
    tensor = torch.tensor(logits, requires_grad=True)
    theirs = F.log_softmax(tensor, dim=axis)
    theirs.backward(torch.tensor(cotangent))
    ours, pull_back = jax.vjp(lambda z: jaxloss.log_softmax(z, axis=axis), jnp.asarray(logits))
    assert_float64_close({"y": ours, "dx": pull_back(cotangent)[0]}, {"y": theirs, "dx": tensor.grad})


LOG_SOFTMAX_EDGES = {
    "0-d": 5.0,
    "0-d inf": INF,
    "0-d -inf": -INF,
    "0-d NaN": NAN,
    "-inf": [[0, -INF, 1], [-INF, -INF, 2]],
    "slice all -inf": [[0, 1, 2], [-INF, -INF, -INF]],
    "+inf": [[0, 1, 2], [0, INF, 1]],
    "NaN": [[0, 1, 2], [0, NAN, 1]],
    "no rows": np.zeros((0, 3)),
    "no classes": np.zeros((3, 0)),
}


@pytest.mark.parametrize("case", LOG_SOFTMAX_EDGES)
def test_log_softmax_edge_value(case, x64):
    logits = np.asarray(LOG_SOFTMAX_EDGES[case], np.float64)
    theirs = F.log_softmax(torch.tensor(logits), dim=-1)
    assert_float64_close(jaxloss.log_softmax(logits), theirs, may_be_empty=True)
    if case in ("slice all -inf", "+inf", "NaN"):
        assert torch.isnan(theirs).tolist() == [[False] * 3, [True] * 3]
    if case == "0-d":
        assert theirs == 0


@pytest.mark.rounding
def test_log_softmax_casts_before(x64):
    logits, cases = np.array([[0, 1, 30], [2, 2, 200]]), []
    for kind, dtype in itertools.product([*FLOATS, "int32", "uint8"], FLOATS):
        theirs = F.log_softmax(torch.tensor(logits).to(getattr(torch, kind)), dim=1, dtype=getattr(torch, dtype))
        exact = jaxloss.log_softmax(np.float64(logits))  # every dtype holds these numbers
        cases.append((jaxloss.log_softmax(jnp.asarray(logits, kind), dtype=dtype), theirs, exact))
    assert_errors_within_ratio(cases)


def test_log_softmax_that_overflows_the_dtype_it_casts_to_is_nan():
    logits = np.array([[1e5, 1, 2]], np.float32)
    theirs = F.log_softmax(torch.tensor(logits), dim=1, dtype=torch.float16)
    assert torch.isnan(theirs).all()
    assert_identical(jaxloss.log_softmax(logits, dtype=jnp.float16), theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_softmax_keeps_the_dtype_of_the_input(dtype, x64):
    theirs = F.log_softmax(to_torch(LOGITS, dtype), dim=1)
    assert_same_structure(jaxloss.log_softmax(jnp.asarray(LOGITS, dtype)), theirs)


# kl_div


@WARNS_OF_MEAN
@KL_REDUCTIONS
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_formula(reduction, log_target):
    arrays = {"values": LOGITS, "targets": np.log(PROBABILITIES) if log_target else PROBABILITIES}
    theirs = agree("kl_div", arrays, reduction=reduction, log_target=log_target)
    losses = PROBABILITIES * (np.log(PROBABILITIES) - LOGITS)
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.mean(), "batchmean": losses.sum() / len(losses)}
    assert_float64_close(theirs["loss"], np.asarray(expected[reduction]))


@KL_REDUCTIONS
@WARNS_OF_MEAN
@pytest.mark.parametrize("shapes", [((4, 5), (5,)), ((5,), (4, 5)), ((4, 1), (1, 5)), ((), (4, 5))], ids=str)
def test_kl_div_of_shapes_that_broadcast(reduction, shapes):
    rng = np.random.default_rng(4)
    log_probs, targets = (np.asarray(rng.uniform(0.1, 1, shape)) for shape in shapes)
    agree("kl_div", {"values": log_probs, "targets": targets}, reduction=reduction)


@pytest.mark.parametrize(
    ("log_prob", "target"),
    [(-1.0, 0.0), (-INF, 0.0), (-INF, 0.5), (-1.0, -0.5), (NAN, 0.5), (-1.0, NAN), (-1.0, INF), (INF, 0.5)],
)
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_edge_value(log_prob, target, log_target):
    arrays = {"values": np.array([[log_prob, -2.0]]), "targets": np.array([[target, 0.5]])}
    agree("kl_div", arrays, reduction="none", log_target=log_target)


@WARNS_OF_MEAN
@KL_REDUCTIONS
def test_kl_div_of_no_elements(reduction):
    empty = np.zeros((0, 3))
    loss = to_numpy(agree("kl_div", {"values": empty, "targets": empty}, reduction=reduction)["loss"])
    np.testing.assert_array_equal(loss, {"sum": 0.0, "none": empty}.get(reduction, NAN))


@pytest.mark.rounding
def test_kl_div_promotes(x64):
    ours, theirs = (partial(kl_div, reduction="batchmean") for kl_div in (jaxloss.kl_div, F.kl_div))
    assert_promotes(ours, theirs, -np.abs(LOGITS), PROBABILITIES)
