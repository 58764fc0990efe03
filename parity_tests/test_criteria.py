"""The criteria as objects: frozen, printable, pytrees whose only leaf is the weight."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxloss

LOGITS = jax.random.normal(jax.random.key(0), (4, 3))
TARGETS = jnp.array([0, 2, 1, -100])
WEIGHT = jnp.array([1.0, 2.0, 0.5])
CRITERIA = [jaxloss.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), jaxloss.NLLLoss(weight=WEIGHT)]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_criterion_passes_through_jit_as_an_argument_and_as_a_constant(criterion):
    plain = criterion(LOGITS, TARGETS)
    np.testing.assert_allclose(jax.jit(lambda c, z: c(z, TARGETS))(criterion, LOGITS), plain, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda z: criterion(z, TARGETS))(LOGITS), plain, rtol=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_weight_is_the_only_leaf_and_has_a_gradient(criterion):
    assert len(jax.tree.leaves(criterion)) == 1
    gradient = jax.grad(lambda c: c(LOGITS, TARGETS))(criterion)
    assert type(gradient) is type(criterion)
    assert np.any(gradient.weight)
    assert gradient.ignore_index == -100


def test_other_values_of_weight_do_not_recompile():
    step = jax.jit(lambda c: c(LOGITS, TARGETS))
    for scale in (1.0, 2.0, 3.0):
        step(jaxloss.CrossEntropyLoss(weight=scale * WEIGHT))
    assert step._cache_size() == 1


def test_criterion_is_frozen_and_shows_its_options():
    criterion = jaxloss.CrossEntropyLoss(reduction="sum", z_loss=1e-4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        criterion.reduction = "mean"
    assert "reduction='sum'" in repr(criterion)
    assert "z_loss=0.0001" in repr(criterion)
    assert repr(jaxloss.LogSoftmax(axis=1)) == "LogSoftmax(axis=1, dtype=None)"


@pytest.mark.parametrize(
    ("criterion", "function"),
    [
        (jaxloss.CrossEntropyLoss, jaxloss.cross_entropy),
        (jaxloss.NLLLoss, jaxloss.nll_loss),
        (jaxloss.LogSoftmax, jaxloss.log_softmax),
    ],
)
def test_criterion_has_every_option_of_its_function_with_its_default(criterion, function):
    options = inspect.signature(function).parameters.values()
    expected = {each.name: each.default for each in options if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert {field.name: field.default for field in dataclasses.fields(criterion)} == expected


def test_criterion_passes_its_dtype_and_its_mesh_axis_on():
    halves = LOGITS.astype(jnp.bfloat16)
    assert jaxloss.LogSoftmax(dtype="float32")(halves).dtype == jnp.float32
    assert jaxloss.CrossEntropyLoss(dtype="float32")(halves, TARGETS).dtype == jnp.float32
    mesh = jax.make_mesh((3,), ("classes",), axis_types=(AxisType.Auto,))
    criterion = jaxloss.CrossEntropyLoss(class_axis_name="classes")
    split = jax.shard_map(criterion, mesh=mesh, in_specs=(P(None, "classes"), P()), out_specs=P())
    np.testing.assert_allclose(jax.jit(split)(LOGITS, TARGETS), jaxloss.CrossEntropyLoss()(LOGITS, TARGETS), rtol=1e-6)


def test_flax_variables_are_the_arrays_in_them():
    class Head(nnx.Module):
        def __init__(self) -> None:
            self.labels = nnx.Variable(jnp.array([0, 2, 1]))
            self.temperature = nnx.Param(jnp.array(2.0))

    inputs, weight, head = jnp.eye(3), jnp.arange(9.0).reshape(3, 3), Head()

    def log_prob(head: Head) -> jax.Array:
        found = jaxloss.linear_log_prob(inputs, weight, head.labels, temperature=head.temperature)
        return jnp.sum(found.log_prob)

    expected = -jaxloss.cross_entropy(weight.T / 2, head.labels[...], reduction="sum")
    for value in (log_prob(head), nnx.jit(log_prob)(head)):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert nnx.grad(log_prob)(head).temperature[...] != 0
