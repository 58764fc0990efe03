"""A wrong target under `checkify` is an error that names it; without `checkify` nothing is added to the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify

import jaxloss

pytestmark = pytest.mark.usefixtures("strict")

LOGITS = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def scanned_gradient(logits, targets):
    def step(carry, t):
        return carry + jax.grad(jaxloss.cross_entropy)(logits, t), None

    return lax.scan(step, jnp.zeros_like(logits), targets[None])[0]


@pytest.mark.parametrize(
    "function",
    [
        jax.jit(jaxloss.cross_entropy),
        jax.jit(jax.grad(jaxloss.cross_entropy)),
        jax.vmap(lambda z, t: jaxloss.cross_entropy(z, t)),
        jax.jit(scanned_gradient),
        jax.jit(jaxloss.nll_loss),
    ],
    ids=["jit", "grad", "vmap", "grad in scan", "nll_loss"],
)
def test_wrong_target_under_checkify_is_an_error_that_names_it(function):
    checked = checkify.checkify(function)
    error, _ = checked(jnp.asarray(LOGITS), jnp.array([0, 1, 7, 2]))
    with pytest.raises(checkify.JaxRuntimeError, match=r"Target 7 is out of bounds\."):
        error.throw()
    error, _ = checked(jnp.asarray(LOGITS), jnp.array([0, 1, 4, -100]))
    error.throw()


def test_checkify_costs_nothing_where_it_is_not_used():
    arguments = LOGITS, jnp.zeros(4, jnp.int32)
    assert not jax.make_jaxpr(jax.grad(jaxloss.cross_entropy))(*arguments).effects
