"""From 64 classes on the gradient is written at the target instead of selected: the same answers, in every layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxloss
from parity_tests.gates import assert_float64_close
from parity_tests.losses import evaluate_jax, evaluate_torch

CLASSES = 70
SHAPES = {"two axes": (5, CLASSES), "many rows": (1030, CLASSES), "images": (3, CLASSES, 4, 2), "one row": (CLASSES,)}
OPTIONS = {"plain": {}, "smoothing": {"label_smoothing": 0.1}, "ignored class": {"ignore_index": 3}}


def draw(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """PyTorch's layout; a quarter of the targets is class 3, and one row is confident."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=shape)
    targets = rng.integers(0, CLASSES, shape[:1] + shape[2:] if len(shape) > 1 else ())
    targets = np.where(rng.random(targets.shape) < 0.25, 3, targets)
    if len(shape) == 2:
        logits[0, targets[0]] = 40
    return {"logits": logits, "targets": targets, "weight": rng.uniform(0.5, 2, CLASSES)}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_pytorch(shape, options, reduction, x64):
    arrays, options = draw(SHAPES[shape]), OPTIONS[options] | {"reduction": reduction}
    axis = 0 if shape == "one row" else 1
    ours = evaluate_jax("cross_entropy", arrays, options, "float64", axis)
    theirs = evaluate_torch("cross_entropy", arrays, options, "float64")
    assert_float64_close({k: ours[k] for k in theirs}, theirs)


def test_derivatives_of_both_modes_match_finite_differences(x64):
    arrays = draw((4, CLASSES))
    arrays["targets"][1] = -100
    logits, targets = arrays["logits"] / 8, jnp.asarray(arrays["targets"])  # finite differences need no confident row
    loss = partial(jaxloss.cross_entropy, targets=targets, weight=arrays["weight"], label_smoothing=0.1, z_loss=0.01)
    check_grads(loss, (jnp.asarray(logits),), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_vmap_of_grad_equals_a_loop(monkeypatch, request):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # on several the sums are in another order
    jax.clear_caches()
    request.addfinalizer(jax.clear_caches)
    arrays = draw((6, CLASSES))
    logits, targets = jnp.asarray(arrays["logits"], jnp.float32).reshape(2, 3, CLASSES), arrays["targets"].reshape(2, 3)
    gradient = jax.grad(jaxloss.cross_entropy)
    found = jax.vmap(gradient)(logits, jnp.asarray(targets))
    looped = jnp.stack([gradient(*pair) for pair in zip(logits, targets, strict=True)])
    np.testing.assert_allclose(found, looped)


@pytest.mark.parametrize("wrong", [-1, CLASSES, CLASSES + 7, -(2**31)])
def test_wrong_target_is_nan_in_its_whole_row_and_nowhere_else(wrong):
    logits = jnp.asarray(draw((5, CLASSES))["logits"], jnp.float32)
    targets = jnp.array([0, wrong, 69, 3, -100])
    rows = jax.jit(partial(jaxloss.cross_entropy, reduction="none"))(logits, targets)
    assert np.isnan(rows).tolist() == [False, True, False, False, False]
    total = jax.jit(jax.grad(partial(jaxloss.cross_entropy, reduction="sum")))(logits, targets)
    assert np.isnan(total[1]).all()
    assert np.isfinite(np.delete(total, 1, 0)).all()
    assert np.isnan(jax.jit(jax.grad(jaxloss.cross_entropy))(logits, targets)[:4]).all()


def test_nan_in_an_ignored_row_does_not_reach_the_gradient():
    logits = jnp.asarray(draw((3, CLASSES))["logits"], jnp.float32).at[1].set(jnp.nan)
    gradient = jax.jit(jax.grad(jaxloss.cross_entropy))(logits, jnp.array([0, -100, 69]))
    assert not np.any(gradient[1])
    assert np.isfinite(gradient).all()
