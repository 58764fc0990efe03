"""Classes that a bias of -inf removes and ignored tokens leave nothing behind: no value, no NaN, no gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss
from parity_tests.gates import assert_float64_close

pytestmark = pytest.mark.usefixtures("x64")

TOKENS, FEATURES, CLASSES, PADDING = 7, 6, 5, 3
RNG = np.random.default_rng(0)
INPUTS, WEIGHT = RNG.normal(size=(TOKENS, FEATURES)), RNG.normal(size=(CLASSES, FEATURES))
BIAS, TARGETS = RNG.normal(size=CLASSES), RNG.integers(0, CLASSES, TOKENS)


def sums(name: str) -> Callable[..., jax.Array]:
    """A scalar of inputs, weight, bias and option."""

    def loss(inputs: Any, weight: Any, bias: Any, targets: Any = TARGETS, **options: Any) -> jax.Array:
        if name == "loss":
            return jaxloss.linear_cross_entropy(inputs, weight, targets, linear_bias=bias, **options)
        if name == "losses":
            return jnp.sum(
                jaxloss.linear_cross_entropy(inputs, weight, targets, linear_bias=bias, reduction="none", **options)
            )
        return jnp.sum(getattr(jaxloss.linear_log_prob(inputs, weight, targets, linear_bias=bias, **options), name))

    return loss


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("loss", "logit_softcap"),
        ("losses", "logit_softcap"),
        *((name, option) for name in ("log_prob", "entropy") for option in ("logit_softcap", "temperature")),
    ],
)
def test_removed_classes_are_as_none_under_a_cap_and_a_temperature(name, option):
    padded = np.vstack([WEIGHT, np.zeros((PADDING, FEATURES))]), np.append(BIAS, np.full(PADDING, -np.inf))

    def value_and_gradients(weight: np.ndarray, bias: np.ndarray) -> tuple[Any, Any]:
        loss = sums(name)
        by_all = jax.value_and_grad(lambda x, w, b, o: loss(x, w, b, **{option: o}), argnums=(0, 1, 2, 3))
        return by_all(INPUTS, weight, bias, 1.5)

    value, (dx, dw, db, doption) = value_and_gradients(*padded)
    expected, (dx0, dw0, db0, doption0) = value_and_gradients(WEIGHT, BIAS)
    for ours, theirs in ((value, expected), (dx, dx0), (dw[:CLASSES], dw0), (db[:CLASSES], db0), (doption, doption0)):
        assert_float64_close(np.asarray(ours), np.asarray(theirs))
    assert not dw[CLASSES:].any()
    assert not db[CLASSES:].any()


@pytest.mark.parametrize("name", ["loss", "losses", "log_prob", "entropy"])
@pytest.mark.parametrize("budget", [None, 1], ids=["one slab", "a slab for each token"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_ignored_tokens_that_are_not_finite_have_no_gradient(name, budget, bad):
    ignored = np.isin(np.arange(TOKENS), (1, 4))
    inputs, targets = INPUTS.copy(), np.where(ignored, -100, TARGETS)
    inputs[ignored, 2] = bad
    loss = partial(sums(name), memory_budget=budget)
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(inputs, WEIGHT, BIAS, targets)
    expected, others = jax.value_and_grad(loss, argnums=(0, 1, 2))(INPUTS[~ignored], WEIGHT, BIAS, TARGETS[~ignored])
    assert_float64_close(np.asarray(value), np.asarray(expected))
    assert not gradients[0][ignored].any()
    for ours, theirs in zip((gradients[0][~ignored], *gradients[1:]), others, strict=True):
        assert_float64_close(np.asarray(ours), np.asarray(theirs))


def test_a_token_that_is_not_ignored_keeps_its_nan():
    inputs = INPUTS.copy()
    inputs[1, 2] = np.nan
    value, gradient = jax.value_and_grad(sums("loss"), argnums=1)(inputs, WEIGHT, BIAS)
    assert np.isnan(value)
    assert np.isnan(gradient).all()


def test_the_most_probable_class_of_an_ignored_token_is_told():
    ignored = jaxloss.linear_log_prob(INPUTS, WEIGHT, np.full(TOKENS, -100), linear_bias=BIAS)
    np.testing.assert_array_equal(ignored.argmax, np.argmax(INPUTS @ WEIGHT.T + BIAS, -1))


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_traced_option_of_0_is_none_where_its_loss_is_infinite(option, kind, reduction):
    logits = INPUTS @ WEIGHT.T
    if option == "label_smoothing":
        logits[:, 1] = -np.inf
    else:
        logits *= 1e160  # whose squares are infinite
    targets = np.where(TARGETS == 1, 0, TARGETS)
    given = targets if kind == "indices" else np.asarray(jax.nn.one_hot(targets, CLASSES))
    if option == "label_smoothing" and kind == "probabilities":
        pytest.skip("0 times log 0 is NaN with probability targets, as in PyTorch, traced or not")
    loss = partial(jaxloss.cross_entropy, reduction=reduction)
    traced = jax.jit(lambda z, value: loss(z, given, **{option: value}))
    np.testing.assert_array_equal(traced(logits, 0.0), loss(logits, given))
    assert not np.isfinite(traced(logits, 0.1)).any()


def test_the_derivative_by_a_traced_option_of_0_is_that_beside_it():
    slope = jax.jit(jax.grad(lambda value: jaxloss.cross_entropy(INPUTS @ WEIGHT.T, TARGETS, label_smoothing=value)))
    assert_float64_close(np.asarray(slope(0.0)), np.asarray(slope(0.1)))
    assert slope(0.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda z: jaxloss.cross_entropy(z, TARGETS),
        lambda z: jaxloss.nll_loss(z, TARGETS, weight=np.ones(CLASSES)),
        lambda z: jaxloss.linear_cross_entropy(z, np.eye(CLASSES), TARGETS),
        lambda z: jaxloss.linear_log_prob(z, np.eye(CLASSES), TARGETS).entropy,
    ],
    ids=["cross_entropy", "nll_loss", "linear_cross_entropy", "linear_log_prob"],
)
def test_nothing_is_nan_on_the_way_to_a_number(call):
    with jax.debug_nans(True), jax.disable_jit():
        assert np.isfinite(call(INPUTS @ WEIGHT.T)).all()
