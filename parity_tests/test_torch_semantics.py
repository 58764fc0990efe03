"""PyTorch's formulas and edge values of cross_entropy and nll_loss: each test runs PyTorch and jaxloss on one input."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from parity_tests.gates import assert_float64_close, assert_identical, assert_same_structure, to_numpy
from parity_tests.losses import OURS, THEIRS, evaluate_jax, evaluate_torch, to_torch

pytestmark = pytest.mark.usefixtures("strict")

INF, NAN = np.inf, np.nan
BOTH = pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
SHAPES = pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2), (4, 5, 2, 3)], ids=["N,C", "N,C,d", "N,C,d1,d2"])
SHAPES_AND_SMOOTHING = pytest.mark.parametrize(
    ("shape", "smoothing"),
    [((4, 5), 0.0), ((4, 5), 0.1), ((4, 5, 2), 0.1), ((4, 5, 2, 3), 0.0)],
    ids=["N,C plain", "N,C smoothed", "N,C,d smoothed", "N,C,d1,d2 plain"],
)
WEIGHT = np.array([1.0, 0.5, 2.0, 0.0, -0.3])


def draw(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits with classes on axis 1, class indices a third of them -100, and class probabilities."""
    rng = np.random.default_rng(3)
    rows = (shape[0], *shape[2:])
    targets = rng.integers(0, shape[1], rows)
    targets.flat[1::3] = -100
    return rng.normal(size=shape) * 2, targets, np.moveaxis(rng.dirichlet(np.ones(shape[1]), rows), -1, 1)


LOGITS, TARGETS, PROBABILITIES = draw((4, 5))


def agree(name: str, values: Any, targets: Any, weight: Any = None, **options: Any) -> dict[str, np.ndarray]:
    """PyTorch's loss and gradients, once ours equal them in float64; in float32, loss shape, dtype and masks."""
    arrays = {"values": np.asarray(values, np.float64), "targets": np.asarray(targets)}
    arrays |= {} if weight is None else {"weight": np.asarray(weight)}
    axis = min(arrays["values"].ndim - 1, 1)
    theirs = evaluate_torch(name, arrays, options, "float64")
    with jax.enable_x64(True):
        ours = evaluate_jax(name, arrays, options, "float64", axis)
    assert_float64_close({key: ours[key] for key in theirs}, theirs, may_be_empty=True)
    single = {key: x.astype(np.float32) if x.dtype == np.float64 else x for key, x in arrays.items()}
    values, targets, *weight = single.values()
    loss = OURS[name](values, targets, axis=axis, weight=weight[0] if weight else None, **options)
    assert_same_structure(loss, evaluate_torch(name, arrays, options, "float32")["loss"], may_be_empty=True)
    return {key: to_numpy(value) for key, value in theirs.items()}


# Formulas


def index_formula(log_probs, targets, smoothing, reduction):
    log_probs, kept = np.moveaxis(log_probs, 1, -1), targets != -100
    row_weight = np.where(kept, WEIGHT[targets * kept], 0)
    nll = -row_weight * np.take_along_axis(log_probs, (targets * kept)[..., None], -1)[..., 0]
    smooth = np.where(kept, -log_probs @ WEIGHT, 0)
    rows = (1 - smoothing) * nll + smoothing / WEIGHT.size * smooth
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / row_weight.sum()}[reduction]


@SHAPES
@REDUCTIONS
def test_nll_loss_formula(shape, reduction):
    log_probs, targets, _ = draw(shape)
    theirs = agree("nll_loss", log_probs, targets, WEIGHT, reduction=reduction)
    assert np.isfinite(theirs["loss"]).all()
    assert_float64_close(theirs["loss"], index_formula(log_probs, targets, 0, reduction))


@SHAPES_AND_SMOOTHING
@REDUCTIONS
def test_cross_entropy_index_formula_with_weight_ignore_index_and_smoothing(shape, reduction, smoothing):
    logits, targets, _ = draw(shape)
    theirs = agree("cross_entropy", logits, targets, WEIGHT, reduction=reduction, label_smoothing=smoothing)
    assert np.isfinite(theirs["loss"]).all()
    assert_float64_close(theirs["loss"], index_formula(log_softmax(logits, 1), targets, smoothing, reduction))


@SHAPES_AND_SMOOTHING
@REDUCTIONS
def test_cross_entropy_probability_formula_divides_by_the_rows(shape, reduction, smoothing):
    logits, _, probabilities = draw(shape)
    probabilities[1:] *= 0.7  # rows need not sum to 1
    theirs = agree("cross_entropy", logits, probabilities, WEIGHT, reduction=reduction, label_smoothing=smoothing)
    smoothed = probabilities * (1 - smoothing) + smoothing / WEIGHT.size
    rows = -np.moveaxis(smoothed * log_softmax(logits, 1), 1, -1) @ WEIGHT
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / rows.size}[reduction]
    assert_float64_close(theirs["loss"], np.asarray(expected))
    assert np.abs(theirs["dtargets"]).max() > 0.01  # the gradient to the target, compared by agree


def test_target_of_the_shape_of_the_logits_is_probabilities():
    one_hot = np.eye(5)[np.maximum(TARGETS, 0)]
    as_index = agree("cross_entropy", LOGITS, np.maximum(TARGETS, 0))
    assert_float64_close(agree("cross_entropy", LOGITS, one_hot)["loss"], as_index["loss"])


def test_negative_ignore_index_means_nothing_to_probabilities():
    theirs = agree("cross_entropy", LOGITS, PROBABILITIES, ignore_index=-1)
    assert_float64_close(theirs, agree("cross_entropy", LOGITS, PROBABILITIES))


@BOTH
def test_ignore_index_that_is_a_class_drops_rows_but_not_the_class(name):
    targets = np.array([1, 0, 1, 3])
    theirs = agree(name, LOGITS, targets, WEIGHT, ignore_index=1)
    assert not theirs["dvalues"][targets == 1].any()
    assert_float64_close(theirs["loss"], agree(name, LOGITS[[1, 3]], targets[[1, 3]], WEIGHT)["loss"])
    if name == "cross_entropy":
        assert theirs["dvalues"][1, 1] > 0


@BOTH
@pytest.mark.parametrize("weight", [[0.0, 1, 1, 1, 0], [-1.0, -2, 1, 3, -0.5]], ids=["zero", "negative"])
@pytest.mark.parametrize("targets", [[0, 1, 4, 3], [0, 1, -100, -100]], ids=["kept", "ignored"])
def test_weight_may_be_zero_or_negative(name, weight, targets):
    assert np.isfinite(agree(name, LOGITS, targets, weight)["loss"])


# Edge values


@BOTH
@REDUCTIONS
@pytest.mark.parametrize("target", [3, -100], ids=["kept", "ignored"])
def test_one_row_takes_a_target_without_an_axis(name, reduction, target):
    assert agree(name, LOGITS[0], target, WEIGHT + 1, reduction=reduction)["loss"].shape == ()


@BOTH
@REDUCTIONS
def test_one_row_takes_a_target_of_shape_one_and_has_a_gradient_where_pytorch_has_none(name, reduction):
    logits = to_torch(LOGITS[0]).requires_grad_()
    theirs = THEIRS[name](logits, torch.tensor([3]), reduction=reduction)
    assert theirs.shape == ()
    with pytest.raises(RuntimeError, match="size mismatch"):
        theirs.backward()
    with jax.enable_x64(True):
        loss = partial(OURS[name], reduction=reduction)
        assert_float64_close(loss(LOGITS[0], np.array([3])), theirs)
        assert_identical(jax.grad(loss)(LOGITS[0], np.array([3])), jax.grad(loss)(LOGITS[0], np.array(3)))


@REDUCTIONS
def test_one_row_takes_probabilities(reduction):
    assert agree("cross_entropy", LOGITS[0], PROBABILITIES[0], WEIGHT, reduction=reduction)["loss"].shape == ()


@BOTH
@REDUCTIONS
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_no_rows(name, reduction, shape):
    rows = (shape[0], *shape[2:])
    loss = agree(name, np.zeros(shape), np.zeros(rows, int), reduction=reduction)["loss"]
    np.testing.assert_array_equal(loss, {"mean": NAN, "sum": 0.0, "none": np.zeros(rows)}[reduction])


@REDUCTIONS
def test_no_rows_of_probabilities(reduction):
    loss = agree("cross_entropy", np.zeros((0, 3)), np.zeros((0, 3)), reduction=reduction)["loss"]
    np.testing.assert_array_equal(loss, {"mean": NAN, "sum": 0.0, "none": np.zeros(0)}[reduction])


@BOTH
@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_row_ignored_has_gradient_zero(name, reduction, smoothing):
    options = {"label_smoothing": smoothing} if name == "cross_entropy" else {}
    theirs = agree(name, LOGITS, np.full(4, -100), WEIGHT, reduction=reduction, **options)
    np.testing.assert_array_equal(theirs["loss"], {"mean": NAN, "sum": 0.0, "none": np.zeros(4)}[reduction])
    assert not theirs["dvalues"].any()


@BOTH
def test_weights_of_the_targets_that_are_all_zero_give_nan(name):
    theirs = agree(name, LOGITS, np.array([3, 3, 3, 3]), WEIGHT)
    assert np.isnan(theirs["loss"])
    rows = theirs["dvalues"] if name == "cross_entropy" else theirs["dvalues"][:, 3]
    assert np.isnan(rows).all()


@BOTH
def test_weights_of_the_targets_that_cancel_give_inf(name):
    theirs = agree(name, LOGITS[:2], np.array([0, 1]), np.array([1.0, -1, 1, 1, 1]))
    assert np.isinf(theirs["loss"])


@REDUCTIONS
@pytest.mark.parametrize("targets", [[0, -100, 0], [[1.0], [0.3], [0.0]]], ids=["index", "probability"])
def test_one_class_costs_nothing(reduction, targets):
    theirs = agree("cross_entropy", [[3.0], [-200.0], [0.0]], targets, reduction=reduction)
    assert not theirs["loss"].any()
    assert not theirs["dvalues"].any()


@REDUCTIONS
def test_no_classes_all_ignored(reduction):
    for name in ("cross_entropy", "nll_loss"):
        loss = agree(name, np.zeros((2, 0)), [-100, -100], reduction=reduction)["loss"]
        np.testing.assert_array_equal(loss, {"mean": NAN, "sum": 0.0, "none": np.zeros(2)}[reduction])


@REDUCTIONS
@pytest.mark.parametrize("shape", [(2, 0), (0,)], ids=str)
def test_no_classes_of_probabilities_is_nan_under_mean_alone(reduction, shape):
    loss = agree("cross_entropy", np.zeros(shape), np.zeros(shape), reduction=reduction)["loss"]
    np.testing.assert_array_equal(loss, {"mean": NAN, "sum": 0.0, "none": np.zeros(shape[:-1])}[reduction])


def with_value(value: float, row: int = 1, column: int = 2) -> np.ndarray:
    logits = LOGITS.copy()
    logits[row, column] = value
    return logits


INDICES = np.array([0, 4, 2, 1])  # one for each row of LOGITS, none at (1, 2)


@REDUCTIONS
def test_minus_inf_logit_of_another_class(reduction):
    theirs = agree("cross_entropy", with_value(-INF), INDICES, reduction=reduction)
    assert np.isfinite(theirs["loss"]).all()
    assert theirs["dvalues"][1, 2] == 0


@REDUCTIONS
def test_minus_inf_logit_of_another_class_under_smoothing(reduction):
    theirs = agree("cross_entropy", with_value(-INF), INDICES, reduction=reduction, label_smoothing=0.1)
    assert np.isposinf(theirs["loss"]).any()
    assert np.isfinite(theirs["dvalues"]).all()


@BOTH
@REDUCTIONS
def test_minus_inf_at_the_target(name, reduction):
    theirs = agree(name, with_value(-INF, 1, 4), INDICES, reduction=reduction)
    assert np.isposinf(theirs["loss"]).any()
    assert np.isfinite(theirs["dvalues"]).all()
    if reduction == "sum":
        assert theirs["dvalues"][1, 4] == -1  # p - 1


@REDUCTIONS
def test_minus_inf_logit_where_the_probability_is_zero(reduction):
    probabilities = PROBABILITIES.copy()
    probabilities[1] = [0.5, 0.25, 0, 0.25, 0]
    theirs = agree("cross_entropy", with_value(-INF), probabilities, reduction=reduction)
    assert np.isnan(theirs["loss"]).any()
    assert np.isfinite(theirs["dvalues"]).all()
    masked = agree("cross_entropy", with_value(-1e9), probabilities, reduction=reduction)
    assert_float64_close(theirs["dvalues"], masked["dvalues"])


FAULTY_ROWS = {"all -inf": np.full(5, -INF), "+inf": np.array([0, INF, 1, 2, 3]), "NaN": np.array([0, 1, 2, NAN, 3])}


@pytest.mark.parametrize("fault", FAULTY_ROWS)
@pytest.mark.parametrize("targets", [INDICES, PROBABILITIES], ids=["index", "probability"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_faulty_row_is_nan_in_that_row_only(fault, targets, smoothing):
    logits = LOGITS.copy()
    logits[1] = FAULTY_ROWS[fault]
    theirs = agree("cross_entropy", logits, targets, reduction="none", label_smoothing=smoothing)
    assert np.isnan(theirs["loss"]).tolist() == [False, True, False, False]
    assert np.isnan(theirs["dvalues"]).tolist() == [[False] * 5, [True] * 5, [False] * 5, [False] * 5]


@BOTH
@REDUCTIONS
@pytest.mark.parametrize("fault", FAULTY_ROWS)
def test_ignored_row_may_hold_nan_or_inf(name, reduction, fault):
    logits, targets = LOGITS.copy(), np.array([0, -100, 2, 1])
    logits[1] = FAULTY_ROWS[fault]
    options = {"reduction": reduction} | ({"label_smoothing": 0.1} if name == "cross_entropy" else {})
    theirs = THEIRS[name](to_torch(logits), to_torch(targets), **options)
    with jax.enable_x64(True):
        assert_float64_close(OURS[name](logits, targets, **options), theirs)
    assert_float64_close(theirs, THEIRS[name](to_torch(LOGITS), to_torch(targets), **options))
