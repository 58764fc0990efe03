"""What JAX forces to differ from PyTorch: exactly these, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import jaxloss

pytestmark = pytest.mark.usefixtures("strict")

LOGITS = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
LOSSES = pytest.mark.parametrize("loss", [jaxloss.cross_entropy, jaxloss.nll_loss], ids=["cross_entropy", "nll_loss"])
WRONG = pytest.mark.parametrize("wrong", [5, 127, -1, -99, 2**31 - 1, -(2**31)])


@LOSSES
@WRONG
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_concrete_wrong_target_is_pytorchs_index_error(loss, wrong, reduction):
    message = f"^Target {wrong} is out of bounds.$"
    theirs = {jaxloss.cross_entropy: F.cross_entropy, jaxloss.nll_loss: F.nll_loss}[loss]
    with pytest.raises(IndexError, match=message):
        theirs(torch.tensor(LOGITS), torch.tensor([0, 1, wrong, 2]), reduction=reduction)
    for targets in (np.array([0, 1, wrong, 2]), jnp.array([0, 1, wrong, 2]), [0, 1, wrong, 2]):
        with pytest.raises(IndexError, match=message):
            loss(LOGITS, targets, reduction=reduction)


@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint64"])
@pytest.mark.parametrize("wrong", [2**31, 2**32 - 100, 2**32 - 1])
def test_wrong_target_beyond_int32_is_never_wrapped(dtype, wrong):
    targets = np.array([0, 1, wrong, 2], dtype)
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds."):
        jaxloss.cross_entropy(LOGITS, targets)
    with jax.enable_x64(True):
        losses = jax.jit(lambda t: jaxloss.cross_entropy(LOGITS, t, reduction="none"))(jnp.asarray(targets))
    assert np.isnan(losses).tolist() == [False, False, True, False]


@LOSSES
@WRONG
def test_wrong_target_under_jit_is_nan_in_its_row_and_gradient(loss, wrong):
    targets = jnp.array([0, wrong, -100, 2])
    losses = jax.jit(lambda z, t: loss(z, t, reduction="none"))(LOGITS, targets)
    assert np.isnan(losses).tolist() == [False, True, False, False]
    gradient = jax.jit(jax.grad(lambda z, t: loss(z, t, reduction="sum")))(LOGITS, targets)
    assert np.isnan(gradient).all(axis=1).tolist() == [False, True, False, False]
    assert np.isnan(gradient).any(axis=1).tolist() == [False, True, False, False]
    np.testing.assert_array_equal(gradient[2], 0)
    weight_gradient = jax.jit(jax.grad(lambda w, t: loss(LOGITS, t, weight=w, reduction="sum")))(jnp.ones(5), targets)
    assert np.isnan(weight_gradient).any()


@WRONG
@pytest.mark.parametrize("options", [{}, {"weight": np.ones(5, np.float32)}, {"label_smoothing": 0.1}], ids=str)
def test_wrong_target_under_jit_makes_every_gradient_of_a_mean_nan(wrong, options):
    targets = jnp.array([0, wrong, 1, 2])
    loss, gradient = jax.jit(jax.value_and_grad(lambda z, t: jaxloss.cross_entropy(z, t, **options)))(LOGITS, targets)
    assert np.isnan(loss)
    assert np.isnan(gradient).all()


@LOSSES
def test_wrong_target_of_nll_loss_makes_the_mean_nan(loss):
    assert np.isnan(jax.jit(loss)(LOGITS, jnp.array([0, 5, 1, 2])))


def test_optax_trains_on_the_wrong_class_where_we_do_not():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 120)), jnp.float32)
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([-1, -100]))
    wrapped = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([119, 20]))
    np.testing.assert_array_equal(theirs, wrapped)
    ours = jax.jit(lambda t: jaxloss.cross_entropy(logits, t, reduction="none"))(jnp.array([-1, -100]))
    assert np.isnan(ours[0])
    assert ours[1] == 0


def test_targets_that_span_processes_are_not_read(monkeypatch):
    targets = jnp.array([0, 1, 7, 2])
    monkeypatch.setattr(type(targets), "is_fully_addressable", property(lambda _: False))
    checked = jaxloss._checks.index_targets("cross_entropy", targets, jnp.asarray(LOGITS), "logits", 1, -100)
    assert checked is not None
    monkeypatch.undo()
    with pytest.raises(IndexError):
        jaxloss._checks.index_targets("cross_entropy", targets, jnp.asarray(LOGITS), "logits", 1, -100)


@LOSSES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradient_of_an_ignored_row_that_holds_nan_or_inf_is_zero(loss, bad):
    values = LOGITS.copy()
    values[1, 2] = bad
    targets = np.array([0, -100, 1, 2])
    clean = jax.grad(loss)(LOGITS, targets)
    np.testing.assert_array_equal(jax.grad(loss)(values, targets), clean)
    np.testing.assert_array_equal(clean[1], 0)


@pytest.mark.parametrize(
    "transform", [jax.hessian, lambda f: jax.jacrev(jax.grad(f)), lambda f: jax.jacfwd(jax.jacfwd(f))]
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
def test_second_derivatives_of_an_ignored_nan_row_are_zero(transform, options):
    logits = jnp.asarray(LOGITS).at[1, 2].set(jnp.nan)
    second = transform(lambda z: jaxloss.cross_entropy(z, jnp.array([0, -100, 1, 2]), **options))
    clean = transform(lambda z: jaxloss.cross_entropy(z, jnp.array([0, -100, 1, 2]), **options))(jnp.asarray(LOGITS))
    np.testing.assert_allclose(second(logits), clean, rtol=1e-6, atol=1e-7)


def test_weight_gradient_of_an_ignored_nan_row_is_finite():
    logits = jnp.asarray(LOGITS).at[1].set(jnp.nan)
    targets = jnp.array([0, -100, 1, 2])
    gradient = jax.grad(lambda w: jaxloss.cross_entropy(logits, targets, weight=w, label_smoothing=0.1, z_loss=0.1))
    assert np.isfinite(gradient(jnp.ones(5))).all()


def test_weight_of_another_dtype_is_cast_and_the_result_keeps_the_logits_dtype():
    logits, targets = jnp.asarray(LOGITS, jnp.bfloat16), np.array([0, 4, 1, 2])
    for weight in (np.arange(1, 6), jnp.arange(1.0, 6.0), np.arange(1, 6, dtype=np.float16)):
        loss = jaxloss.cross_entropy(logits, targets, weight=weight)
        assert loss.dtype == jnp.bfloat16
        assert loss == jaxloss.cross_entropy(logits, targets, weight=jnp.arange(1, 6, dtype=jnp.bfloat16))


def test_negative_label_smoothing_is_an_error():
    F.cross_entropy(torch.tensor(LOGITS), torch.tensor([0, 1, 2, 3]), label_smoothing=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 1, got -0\.1"):
        jaxloss.cross_entropy(LOGITS, np.array([0, 1, 2, 3]), label_smoothing=-0.1)


def test_bool_targets_are_a_type_error():
    with pytest.raises(TypeError, match=r"targets must be integers .*got bool"):
        jaxloss.cross_entropy(LOGITS, np.array([True, False, True, False]))


@pytest.mark.parametrize("loss", [jaxloss.cross_entropy, jaxloss.nll_loss], ids=["cross_entropy", "nll_loss"])
def test_masked_targets_are_a_type_error(loss):
    targets = np.ma.array([0, 1, 2, 3], mask=[True, False, False, False])
    with pytest.raises(TypeError, match=r"must not be a masked array\. Pass targets\.filled\(-100\)"):
        loss(LOGITS, targets)
    assert np.isfinite(loss(LOGITS, targets.filled(-100)))


@pytest.mark.parametrize("loss", [jaxloss.cross_entropy, jaxloss.nll_loss], ids=["cross_entropy", "nll_loss"])
def test_targets_may_be_a_list_of_traced_values(loss):
    expected = loss(LOGITS, np.array([0, 1, 2, 3]))
    np.testing.assert_allclose(jax.jit(lambda *t: loss(LOGITS, list(t)))(0, 1, 2, 3), expected)
    assert np.isnan(jax.jit(lambda *t: loss(LOGITS, list(t)))(0, 1, 2, 5))


def test_probabilities_may_be_a_list_with_traced_values():
    rows = jnp.full(5, 0.2)
    gradient = jax.grad(lambda row: jaxloss.cross_entropy(LOGITS, [row, rows, rows, rows]))(rows)
    whole = jax.grad(lambda rows: jaxloss.cross_entropy(LOGITS, rows))(jnp.full((4, 5), 0.2))
    np.testing.assert_allclose(gradient, whole[0])
