"""Accuracy: exact where PyTorch and optax lose digits, elsewhere never worse than PyTorch; mutants that must fail."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import jaxloss
from jaxloss import _cross_entropy
from parity_tests.gates import (
    FLOAT16_GRADIENT_RATIO,
    assert_errors_within_ratio,
    assert_float64_close,
    to_numpy,
)
from parity_tests.losses import evaluate_jax, evaluate_torch, round_to

pytestmark = pytest.mark.rounding

CONFIDENT = np.array([[20.0, 0.0, 0.0]], np.float32)
EXACT = np.log1p(2 * np.exp(-20.0))  # 4.1223e-9


@pytest.mark.parametrize(
    "targets", [np.array([0]), np.array([[1.0, 0.0, 0.0]], np.float32)], ids=["index", "probability"]
)
def test_confident_row_keeps_its_digits_where_pytorch_and_optax_give_zero(targets):
    loss, gradient = jax.value_and_grad(jaxloss.cross_entropy)(CONFIDENT, targets)
    np.testing.assert_allclose(loss, EXACT, rtol=3e-7)
    np.testing.assert_allclose(gradient[0], [-EXACT, EXACT / 2, EXACT / 2], rtol=3e-7)
    assert F.cross_entropy(torch.tensor(CONFIDENT), torch.tensor(targets)) == 0
    assert optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(CONFIDENT), jnp.array([0])) == 0


def test_log_softmax_of_a_confident_row_keeps_its_digits_and_so_does_its_gradient():
    def loss(z):
        return jaxloss.nll_loss(jaxloss.log_softmax(z), np.array([0]))

    for gradient in (jax.grad(loss), jax.jacfwd(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_allclose(gradient(CONFIDENT)[0], [-EXACT, EXACT / 2, EXACT / 2], rtol=3e-7)
    np.testing.assert_allclose(-jaxloss.log_softmax(CONFIDENT)[0, 0], EXACT, rtol=3e-7)


@pytest.mark.parametrize("top", [2.0, 8.0, 16.0, 30.0, 60.0])
def test_nll_of_log_softmax_equals_cross_entropy_to_two_ulp(top):
    logits = np.random.default_rng(0).normal(size=(64, 11)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 11, 64)
    logits[np.arange(64), targets] += top
    one = jaxloss.cross_entropy(logits, targets, reduction="none")
    two = jaxloss.nll_loss(jaxloss.log_softmax(logits), targets, reduction="none")
    np.testing.assert_array_max_ulp(np.asarray(one), np.asarray(two), maxulp=2)


@pytest.mark.parametrize("ties", [1, 2, 3, 10])
@pytest.mark.parametrize("gap", [0.0, 1e-30, 1e-9])
def test_tied_and_nearly_tied_maxima_are_counted_once_each(ties, gap):
    logits = np.full((1, 10), -3.0, np.float32)
    logits[0, :ties] = -gap * np.arange(ties, dtype=np.float32)
    exact = np.float64(logits)
    expected = exact - np.log(np.sum(np.exp(exact)))
    np.testing.assert_allclose(jaxloss.log_softmax(logits), expected, rtol=3e-7)
    np.testing.assert_allclose(jaxloss.cross_entropy(logits, np.array([0])), -expected[0, 0], rtol=3e-7)


@pytest.mark.parametrize("offset", [1e5, -1e5])
def test_common_offset_changes_nothing_where_optax_is_off(offset):
    logits = np.array([[1.0, 2.0, 4.0], [0.5, 0.25, 8.0]], np.float32)
    targets = np.array([1, 2])
    moved = (logits + np.float32(offset)).astype(np.float32)
    logits = moved - np.float32(offset)  # the values that survive rounding at that offset
    theirs, exact = (optax.softmax_cross_entropy_with_integer_labels(z, targets) for z in (moved, logits))
    assert np.max(np.abs(theirs - exact)) > 1e-3
    for transform in (lambda f: f, jax.grad):
        at_offset = transform(jaxloss.cross_entropy)(moved, targets)
        np.testing.assert_array_equal(at_offset, transform(jaxloss.cross_entropy)(logits, targets))


def draw(seed: int, dtype: str, kind: str) -> dict[str, np.ndarray]:
    """Logits of order 1 (or with a large offset, or nearly saturated), rounded to the dtype."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(37, 53)) * {"plain": 1.0, "offset": 1.0, "saturated": 8.0}[kind]
    logits += {"plain": 0.0, "offset": 50.0, "saturated": 0.0}[kind]
    return {"values": round_to(logits, dtype), "targets": rng.integers(0, 53, 37)}


OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "ignore": {"ignore_index": 3, "reduction": "sum"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["plain", "offset", "saturated"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in ("cross_entropy", "nll_loss", "probability")
        for options in OPTIONS
        if (name, options) not in (("nll_loss", "smoothing"), ("probability", "ignore"))
    ],
)
def test_error_against_float64_is_no_worse_than_pytorchs(name, options, kind, dtype):
    results: dict[str, list] = {"loss": [], "dvalues": []}
    for seed in range(20):
        arrays, keywords = draw(seed, dtype, kind), dict(OPTIONS[options])
        if name == "probability":
            dirichlet = np.random.default_rng(seed).dirichlet(np.ones(53), 37)
            arrays["targets"] = round_to(dirichlet, dtype)
        function = "nll_loss" if name == "nll_loss" else "cross_entropy"
        ours = evaluate_jax(function, arrays, keywords, dtype, 1)
        theirs = evaluate_torch(function, arrays, keywords, dtype)
        with jax.enable_x64(True):
            oracle = evaluate_jax(function, arrays, keywords, "float64", 1)
        for key, cases in results.items():
            cases.append((ours[key], theirs[key], oracle[key]))
    assert_errors_within_ratio(results["loss"])
    assert_errors_within_ratio(results["dvalues"], ratio=FLOAT16_GRADIENT_RATIO if dtype == "float16" else None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_log_softmax_error_is_no_worse_than_pytorchs(dtype):
    cases = []
    for seed in range(20):
        values = draw(seed, dtype, "plain")["values"]
        theirs = F.log_softmax(torch.tensor(values).to(getattr(torch, dtype)), dim=1)
        with jax.enable_x64(True):
            oracle = jaxloss.log_softmax(values)
        cases.append((jaxloss.log_softmax(jnp.asarray(values, dtype)), theirs, oracle))
    assert_errors_within_ratio(cases)


@pytest.mark.parametrize("classes", [130, 4097, 50257])
def test_error_stays_small_over_many_classes(classes):
    rng = np.random.default_rng(0)
    arrays = {"values": round_to(rng.normal(size=(16, classes)), "float32"), "targets": rng.integers(0, classes, 16)}
    ours, theirs = (
        evaluate_jax("cross_entropy", arrays, {}, "float32", 1),
        evaluate_torch("cross_entropy", arrays, {}, "float32"),
    )
    with jax.enable_x64(True):
        oracle = evaluate_jax("cross_entropy", arrays, {}, "float64", 1)
    assert_errors_within_ratio([(ours["dvalues"], theirs["dvalues"], oracle["dvalues"])])
    np.testing.assert_allclose(ours["loss"], oracle["loss"], rtol=2e-7)


def smoothing_error(dtype: str, weight: np.ndarray | None, offset: float) -> float:
    """The largest relative error of a row's loss of label smoothing alone."""
    logits = np.random.default_rng(0).normal(size=(16, 300)) + offset
    logits = jnp.asarray(round_to(logits, dtype), dtype)
    keywords = {"reduction": "none", "label_smoothing": 1.0, "weight": weight}
    found = jaxloss.cross_entropy(logits, np.arange(16), dtype="float32", **keywords)
    with jax.enable_x64(True):
        exact = np.asarray(jaxloss.cross_entropy(logits.astype("float64"), np.arange(16), **keywords))
    return float(np.max(np.abs(np.asarray(found) / exact - 1)))


@pytest.mark.parametrize(("dtype", "weighted"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_label_smoothing_keeps_its_digits_beside_a_common_offset(dtype, weighted, monkeypatch, request):
    weight = np.linspace(0.5, 1.5, 300, dtype=np.float32) if weighted else None
    for offset in (0, 2, -2, 10, -10, 1e3, -1e3):
        assert smoothing_error(dtype, weight, offset) < 1e-6

    def from_sums(axis, weights, logits, top, kept, narrow):
        return axis.sum(weights * logits) - top * axis.sum(jnp.broadcast_to(weights, logits.shape))

    monkeypatch.setattr(_cross_entropy, "_weighted_sum", from_sums)
    request.addfinalizer(jax.clear_caches)  # of what is compiled with it
    jax.clear_caches()
    assert smoothing_error(dtype, weight, 0) < 1e-6
    assert smoothing_error(dtype, weight, 1e3) > 1e-5


def test_label_smoothing_of_the_largest_logits_is_finite():
    logits = np.full((2, 300), 3e38, np.float32)
    logits[:, 0] = 2.9e38
    np.testing.assert_allclose(jaxloss.cross_entropy(logits, [0, 1], label_smoothing=1.0), 1e37 / 300, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("axis", [1, 0])
def test_a_half_gradient_is_rounded_once(dtype, axis):
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.normal(size=(64, 300)), dtype), rng.integers(0, 300, 64)
    weight = np.linspace(0.5, 1.5, 300, dtype=np.float32)
    if axis == 0:
        logits = logits.T

    def gradient(logits: jax.Array, smoothing: float) -> np.ndarray:
        keywords = {"label_smoothing": smoothing, "weight": weight, "ignore_index": 3, "axis": axis}
        keywords |= {"reduction": "sum", "dtype": "float32"}
        return np.asarray(jax.grad(jaxloss.cross_entropy)(logits, targets, **keywords), np.float32)

    def furthest(found: np.ndarray) -> float:
        exact = gradient(logits.astype("float32"), 0.1)
        least, precision = (float(x) for x in (jnp.finfo(dtype).smallest_normal, jnp.finfo(dtype).eps))
        step = np.maximum(2.0 ** np.floor(np.log2(np.abs(exact) + 1e-30)), least) * precision
        return float(np.max(np.abs(found - exact) / step))

    assert furthest(gradient(logits, 0.1)) < 0.501
    of_parts = round_to(0.9 * gradient(logits, 0), dtype) + round_to(0.1 * gradient(logits, 1), dtype)
    assert furthest(round_to(of_parts, dtype)) > 0.51


def log_normaliser(logits):
    return jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)


def reference(logits, targets, weight, smoothing=0.1, ignore_index=-100, normaliser=log_normaliser):
    """Cross entropy written out, for mutants to be cut from."""
    log_probs = logits - normaliser(logits)
    kept = targets != ignore_index
    index = jnp.where(kept, targets, 0)
    row_weights = jnp.where(kept, weight[index], 0)
    nll = -row_weights * jnp.take_along_axis(log_probs, index[:, None], -1)[:, 0]
    smooth = jnp.where(kept, -jnp.sum(weight * log_probs, -1), 0)
    return (jnp.sum(nll) * (1 - smoothing) + smoothing / logits.shape[-1] * jnp.sum(smooth)) / jnp.sum(row_weights)


MUTANTS: dict[str, Callable] = {
    "softmax term dropped": lambda z, t, w: reference(
        z, t, w, normaliser=lambda z: jax.lax.stop_gradient(log_normaliser(z))
    ),
    "mean over all rows": lambda z, t, w: reference(z, t, w) * jnp.sum(w[jnp.maximum(t, 0)] * (t >= 0)) / t.size,
    "mean over kept rows, weights forgotten": lambda z, t, w: (
        reference(z, t, w) * jnp.sum(w[jnp.maximum(t, 0)] * (t >= 0)) / jnp.sum(t >= 0)
    ),
    "ignore_index dropped": lambda z, t, w: reference(z, jnp.where(t < 0, 0, t), w),
    "ignored label wraps to a class": lambda z, t, w: reference(z, t % z.shape[-1], w),
    "smoothing without the weights": lambda z, t, w: (
        0.9 * reference(z, t, w, 0.0) + 0.1 * reference(z, t, w, 1.0) / w.mean()
    ),
    "smoothing over the wrong classes": lambda z, t, w: reference(z, t, w, 0.1 * z.shape[-1] / (z.shape[-1] - 1)),
    "weights forgotten": lambda z, t, w: reference(z, t, jnp.ones_like(w)),
    "wrong class axis": lambda z, t, w: reference(z.T.reshape(z.shape), t, w),
    "a class left out of the normaliser": lambda z, t, w: reference(z.at[:, -1].add(-1e-3), t, w),
    "float32 inside": lambda z, t, w: reference(z.astype(jnp.float32), t, w.astype(jnp.float32)).astype(jnp.float64),
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_float64_gate_passes_the_reference_and_kills_every_mutant(mutant, x64):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 7, 11)
    targets[3] = -100
    arrays = {"values": rng.normal(size=(11, 7)), "targets": targets, "weight": rng.uniform(0.5, 2, 7)}
    theirs = evaluate_torch("cross_entropy", arrays, {"label_smoothing": 0.1}, "float64")
    function = MUTANTS[mutant] if mutant else reference
    loss, gradient = jax.value_and_grad(function)(*(jnp.asarray(a) for a in arrays.values()))
    if mutant is None:
        return assert_float64_close({"loss": loss, "dvalues": gradient}, theirs)
    with pytest.raises(AssertionError):
        assert_float64_close({"dvalues": gradient}, {"dvalues": theirs["dvalues"]})
    return None


def summed_in_half_precision(logits, targets):
    """Each row's loss, with the exponentials added up in the dtype of the logits."""
    exponentials = jnp.exp(logits)
    total = jax.lax.fori_loop(1, logits.shape[1], lambda i, s: s + exponentials[:, i], exponentials[:, 0])
    return jnp.log(total) - logits[jnp.arange(len(targets)), targets]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ratio_gate_kills_half_precision_inside(dtype):
    cases = []
    for seed in range(20):
        rng, options = np.random.default_rng(seed), {"reduction": "none"}
        arrays = {"values": round_to(rng.normal(size=(8, 1000)), dtype), "targets": rng.integers(0, 1000, 8)}
        mutant = summed_in_half_precision(jnp.asarray(arrays["values"], dtype), arrays["targets"])
        theirs = evaluate_torch("cross_entropy", arrays, options, dtype)["loss"]
        with jax.enable_x64(True):
            oracle = evaluate_jax("cross_entropy", arrays, options, "float64", 1)["loss"]
        cases.append((mutant, theirs, oracle))
    with pytest.raises(AssertionError, match="rmse"):
        assert_errors_within_ratio(cases)


def test_half_precision_loss_of_optax_is_off_where_ours_is_not():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 1000)), jnp.bfloat16)
    targets = np.arange(8)
    exact = F.cross_entropy(torch.tensor(to_numpy(logits)).double(), torch.tensor(targets)).item()
    ours = jaxloss.cross_entropy(logits, targets, dtype=jnp.float32)
    assert abs(ours - exact) < 1e-6 * exact
    theirs = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets)))
    assert abs(float(theirs) - exact) > 1e-3 * exact
