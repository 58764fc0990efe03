"""The exponential of short rows: the digits, the edge values and the derivatives of XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxloss
from jaxloss import _class_axis
from jaxloss._exp import LEAST, exp_of_negative

NUMBERS = np.concatenate([np.linspace(LEAST, 0, 1_000_001), -np.logspace(-30, 1.9, 100_001)]).astype(np.float32)
NUMBERS = NUMBERS[NUMBERS >= LEAST]


def ulps(found: jax.Array) -> np.ndarray:
    exact = np.exp(NUMBERS.astype(np.float64))
    return np.abs(np.asarray(found, np.float64) - exact) / np.spacing(exact.astype(np.float32))


def test_no_number_is_off_by_more_than_one_ulp():
    assert ulps(jax.jit(exp_of_negative)(NUMBERS)).max() <= 1
    assert ulps(jax.jit(jnp.exp2)(NUMBERS * np.float32(1.442695))).max() > 1


def test_edge_values_are_those_of_xla():
    edges = jnp.asarray([0, -0.0, -jnp.inf, jnp.nan, -1e30, np.nextafter(np.float32(LEAST), np.float32(-100)), LEAST])
    found = np.asarray(jax.jit(exp_of_negative)(edges))
    np.testing.assert_array_equal(found, jax.jit(jnp.exp)(edges))
    np.testing.assert_array_equal(found[:6], np.float32([1, 1, 0, np.nan, 0, 0]))


def test_derivatives_and_vmap_are_those_of_the_exponential():
    x = -jnp.linspace(0.1, 5, 12).reshape(3, 4)
    ours, xlas = exp_of_negative, jnp.exp
    for _ in range(3):
        np.testing.assert_allclose(jax.jit(jax.vmap(ours, 1))(x), jax.vmap(xlas, 1)(x), rtol=1e-6)
        np.testing.assert_allclose(ours(x), xlas(x), rtol=1e-6)
        ours, xlas = (lambda x, f=f: jax.vjp(f, x)[1](jax.jvp(f, (x,), (x,))[1])[0] for f in (ours, xlas))


def test_other_platforms_have_their_own():
    text = export.export(jax.jit(exp_of_negative), platforms=["cuda"])(jnp.zeros((2, 12))).mlir_module()
    assert "stablehlo.exponential" in text
    assert "stablehlo.exponential" not in jax.jit(exp_of_negative).lower(jnp.zeros((2, 12))).as_text()


@pytest.mark.parametrize(
    ("classes", "dtype", "written_out"),
    [
        (10, "float32", True),
        (32, "float32", True),
        (9, "float32", False),
        (33, "float32", False),
        (16, "bfloat16", False),
    ],
)
def test_which_rows_are_short(classes, dtype, written_out, request, monkeypatch):
    request.addfinalizer(jax.clear_caches)

    def exponentials() -> int:
        jax.clear_caches()
        z, t = jnp.zeros((6, classes), dtype), jnp.full((6, classes), 1 / classes, dtype)
        text = jax.jit(jax.grad(jaxloss.cross_entropy)).lower(z, t).as_text()
        return text.count("stablehlo.exponential ")

    found = exponentials()
    monkeypatch.setattr(_class_axis, "UNROLLED", (1, 0))
    assert (found < exponentials()) == written_out
