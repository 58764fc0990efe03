"""Few classes, whose two sums a CPU takes in one pass: the same answers as one after the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss
from jaxloss._class_axis import EVEN, FEW, ClassAxis

ROWS, CLASSES = EVEN, 7
LOSSES = {
    "indices": lambda z, y, p: jaxloss.cross_entropy(z, y, reduction="none"),
    "options": lambda z, y, p: jaxloss.cross_entropy(
        z, y, weight=np.linspace(0.5, 1.5, CLASSES), label_smoothing=0.1, z_loss=0.1, reduction="none"
    ),
    "probabilities": lambda z, y, p: jaxloss.cross_entropy(z, p, reduction="none"),
    "log_softmax": lambda z, y, p: jaxloss.log_softmax(z),
    "vmap": lambda z, y, p: jax.vmap(partial(jaxloss.cross_entropy, reduction="none"))(z[None], y[None])[0],
}


def draw(dtype: str) -> tuple[jax.Array, np.ndarray, jax.Array]:
    """Logits, labels and probabilities; the first rows are every kind of strange."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(ROWS, CLASSES)), rng.integers(0, CLASSES, ROWS)
    logits[0, labels[0]] = 40
    logits[1, [2, 5]] = 3
    logits[2, 1] = 30
    logits[3, 4] = -np.inf
    logits[4], logits[5, 2], logits[6, 3] = -np.inf, np.inf, np.nan
    logits[7] += 1000
    labels[1:5] = [5, 0, 4, 2]
    labels[8:10] = [-100, CLASSES]
    return jnp.asarray(logits, dtype), labels, jnp.asarray(rng.dirichlet(np.ones(CLASSES), ROWS), dtype)


def test_where_both_sums_are_taken_in_one_pass():
    few = partial(ClassAxis.sums_in_one_pass, ClassAxis(1))
    assert few(jnp.zeros((EVEN, FEW)))
    assert few(jnp.zeros((3, FEW, 5)))
    assert not few(jnp.zeros((EVEN, FEW + 1)))
    assert not few(jnp.zeros((EVEN + 1, FEW)))
    assert not ClassAxis(1, "classes").sums_in_one_pass(jnp.zeros((EVEN, FEW)))


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", LOSSES)
def test_both_sums_in_one_pass_are_those_of_two(name, dtype):
    def evaluate(rows: slice) -> list[np.ndarray]:
        logits, labels, probabilities = (x[rows] for x in draw(dtype))

        @jax.jit
        def values(z: jax.Array, labels: jax.Array) -> list[jax.Array]:
            loss = partial(LOSSES[name], y=labels, p=probabilities)
            directions = jnp.cos(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape)
            value, tangent = jax.jvp(loss, (z,), (directions,))
            pull = jax.vjp(loss, z)[1](value)[0]
            product = jax.jvp(jax.grad(lambda z: jnp.sum(jnp.sin(loss(z)))), (z,), (directions,))[1]
            return [loss(z), value, tangent, pull, product]

        return [np.asarray(x, np.float32) for x in values(logits, labels)]

    whole, part = evaluate(slice(None)), evaluate(slice(ROWS - 1))
    tolerance = 4e-6 if dtype == "float32" else 2**-6
    for found, expected in zip(whole, part, strict=True):
        np.testing.assert_allclose(found[:-1], expected, rtol=tolerance, atol=tolerance)
        assert np.isnan(expected).any()
        assert np.nanmax(np.abs(expected[10:])) > 0.01
    if dtype == "float32":  # the confident row, all of whose digits count
        np.testing.assert_allclose(whole[0][0], part[0][0], rtol=1e-5)
