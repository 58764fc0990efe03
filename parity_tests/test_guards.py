"""How much the losses do and hold, read off their compiled programs; no clock. Each guard fails on a worse loss.

The numbers are what XLA makes of them today on CPU: lower ones are welcome, higher ones cost time or memory.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss
from parity_tests.hlo import Costs, costs, kept_bytes

SMALL = 0.1  # of the logits: arrays of a row's or a class's size


def weighted(logits, targets):
    weight = jnp.linspace(0.5, 1.5, logits.shape[-1])
    return jaxloss.cross_entropy(logits, targets, weight=weight, label_smoothing=0.1, ignore_index=0)


def one_hot_loss(logits, targets):
    return -jnp.mean(jnp.sum(jax.nn.one_hot(targets, logits.shape[-1]) * jnp.log(jax.nn.softmax(logits)), -1))


def one_hot_nll(log_probs, targets):
    one_hot = jax.nn.one_hot(targets, log_probs.shape[-1], dtype=log_probs.dtype)
    return -jnp.trace(one_hot @ log_probs.T) / len(targets)


LOSSES = {  # and what is worse
    "cross_entropy": (jaxloss.cross_entropy, one_hot_loss),
    "three options": (weighted, lambda z, t: weighted(z, t) + 0.1 * one_hot_loss(z, t)),
    "probabilities": (
        jaxloss.cross_entropy,
        lambda z, p: jaxloss.cross_entropy(z, p) - jnp.mean(jnp.sum(p * jnp.log(jax.nn.softmax(z)), -1)),
    ),
    "log_softmax": (lambda z, t: jaxloss.log_softmax(z), lambda z, t: jnp.log(jax.nn.softmax(z))),
    "nll_loss": (jaxloss.nll_loss, one_hot_nll),
}


def with_gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The result, and its pullback to the logits, of the result itself."""

    def both(logits, targets):
        result, pull = jax.vjp(lambda z: function(z, targets), logits)
        return result, pull(result)

    return both


def exceeded(found: Costs, allowed: Costs) -> list[str]:
    return [name for name in Costs._fields if getattr(found, name) > getattr(allowed, name)]


@pytest.mark.rounding
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "value", "both"),
    [
        ("cross_entropy", (128, 10), "float32", Costs(2, 0, 1, 0, 0.51), Costs(5, 2, 1, 0, 0.6)),
        ("three options", (128, 10), "float32", Costs(3, 0, 1, 0, 0.7), Costs(6, 2, 1, 0, 1)),
        ("probabilities", (128, 10), "float32", Costs(3, 0, 1, 0, 0.5), Costs(6, 2, 1, 0, 0.7)),
        ("log_softmax", (128, 10), "float32", Costs(3, 1, 1, 0, 0.4), Costs(5, 2, 2, 0, 0.5)),
        ("cross_entropy", (128, 1000), "float32", Costs(3, 0, 1, 0, SMALL), Costs(7, 4, 1, 0, SMALL)),
        ("cross_entropy", (128, 1000), "bfloat16", Costs(3, 0, 1, 0, SMALL), Costs(6, 3, 1, 0, 2 + SMALL)),
        ("three options", (128, 1000), "float32", Costs(4, 0, 1, 0, SMALL), Costs(8, 4, 1, 0, SMALL)),
        ("three options", (128, 1000), "bfloat16", Costs(4, 0, 1, 0, SMALL), Costs(7, 3, 1, 0, 2 + SMALL)),
        ("probabilities", (128, 1000), "float32", Costs(4, 0, 1, 0, SMALL), Costs(7, 2, 1, 0, SMALL)),
        ("probabilities", (128, 1000), "bfloat16", Costs(4, 0, 1, 0, SMALL), Costs(6, 1, 2, 0, SMALL)),
        ("log_softmax", (128, 1000), "float32", Costs(4, 1, 1, 0, SMALL), Costs(6, 2, 2, 0, SMALL)),
        ("log_softmax", (128, 1000), "bfloat16", Costs(4, 1, 1, 0, SMALL), Costs(6, 2, 2, 0, SMALL)),
        # Rows in blocks, of a length that is a multiple of one and of one that is prime:
        ("cross_entropy", (32, 131072), "float32", Costs(3, 0, 1, 0, SMALL), Costs(7, 4, 1, 0, SMALL)),
        ("cross_entropy", (64, 65537), "float32", Costs(3, 0, 0, 0, SMALL), Costs(7, 4, 1, 0, SMALL)),
        ("probabilities", (64, 65537), "float32", Costs(6, 0, 0, 0, SMALL), Costs(8, 1, 1, 0, SMALL)),
        # Large halves, whose exponentials in float32 are not stored:
        ("cross_entropy", (128, 32768), "bfloat16", Costs(3, 0, 1, 0, SMALL), Costs(4, 1, 2, 0, SMALL)),
        ("cross_entropy", (32, 131072), "bfloat16", Costs(3, 0, 1, 0, SMALL), Costs(4, 1, 2, 0, SMALL)),
        ("cross_entropy", (128, 65537), "bfloat16", Costs(3, 0, 0, 0, SMALL), Costs(5, 1, 1, 0, SMALL)),
        ("three options", (128, 32768), "bfloat16", Costs(4, 0, 1, 0, SMALL), Costs(5, 1, 2, 0, SMALL)),
        ("nll_loss", (128, 1000), "float32", Costs(1, 0, 0, 0, SMALL), Costs(2, 1, 0, 0, SMALL)),
        ("nll_loss", (128, 1000), "bfloat16", Costs(1, 0, 0, 0, SMALL), Costs(2, 1, 0, 0, SMALL)),
    ],
)
def test_passes_over_the_logits_exponentials_products_and_temporaries(
    name, shape, dtype, value, both, monkeypatch, request
):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    request.addfinalizer(jax.clear_caches)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    arguments = (
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct(shape, dtype) if name == "probabilities" else labels,
    )
    ours, worse = LOSSES[name]
    for transform, allowed in ((lambda f: f, value), (with_gradient, both)):
        found = costs(transform(ours), *arguments)
        assert not exceeded(found, allowed), found
        assert exceeded(costs(transform(worse), *arguments), allowed)


@pytest.mark.rounding
@pytest.mark.parametrize(
    ("name", "value", "both"),
    [
        ("cross_entropy", Costs(3, 0, 1, 0, SMALL), Costs(7, 4, 1, 0, 2 * SMALL)),
        ("three options", Costs(4, 0, 1, 0, SMALL), Costs(8, 4, 1, 0, 2 * SMALL)),
        ("log_softmax", Costs(4, 1, 2, 0, SMALL), Costs(6, 2, 3, 0, SMALL)),
    ],
)
def test_the_same_where_the_classes_are_not_last(name, value, both):
    arguments = jax.ShapeDtypeStruct((8, 100, 32, 32), jnp.float32), jax.ShapeDtypeStruct((8, 32, 32), jnp.int32)
    weight = jnp.linspace(0.5, 1.5, 100)
    ours, worse = {
        "cross_entropy": (partial(jaxloss.cross_entropy, axis=1), LOSSES["cross_entropy"][1]),
        "three options": (
            partial(jaxloss.cross_entropy, weight=weight, label_smoothing=0.1, ignore_index=0, axis=1),
            LOSSES["three options"][1],
        ),
        "log_softmax": (lambda z, t: jaxloss.log_softmax(z, axis=1), LOSSES["log_softmax"][1]),
    }[name]
    for transform, allowed in ((lambda f: f, value), (with_gradient, both)):
        found = costs(transform(ours), *arguments)
        assert not exceeded(found, allowed), found
        assert exceeded(costs(transform(lambda z, t: worse(jnp.moveaxis(z, 1, -1), t)), *arguments), allowed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["cross_entropy", "three options", "nll_loss"])
def test_off_the_cpu_nothing_is_scattered_into_the_logits(name, dtype, monkeypatch, request):
    request.addfinalizer(jax.clear_caches)
    arguments = jax.ShapeDtypeStruct((128, 1000), dtype), jax.ShapeDtypeStruct((128,), jnp.int32)

    def scatters(loss: Callable[..., jax.Array]) -> bool:
        jax.clear_caches()
        return "stablehlo.scatter" in jax.jit(with_gradient(loss)).lower(*arguments).as_text()

    ours = LOSSES[name][0]
    assert scatters(ours) == (name != "nll_loss")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not scatters(ours)
    assert scatters(lambda logits, labels: -jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1)))


def test_nll_loss_keeps_nothing_of_the_size_of_the_log_probabilities():
    log_probs, targets = jnp.ones((64, 512)), jnp.zeros(64, jnp.int32)
    few = SMALL * log_probs.nbytes
    assert kept_bytes(lambda x: jaxloss.nll_loss(x, targets, weight=jnp.ones(512)), log_probs) <= few
    assert kept_bytes(lambda x: jnp.mean(jnp.log1p(-x)) + jaxloss.nll_loss(x, targets), log_probs) > few


def test_linear_cross_entropy_keeps_its_gradients_and_no_logits():
    tokens, features, classes = 64, 16, 512
    inputs, weight, targets = jnp.ones((tokens, features)), jnp.ones((classes, features)), jnp.zeros(tokens, jnp.int32)
    few = inputs.nbytes + weight.nbytes + SMALL * 4 * tokens * classes
    assert kept_bytes(lambda x, w: jaxloss.linear_cross_entropy(x, w, targets), inputs, weight) <= few
    assert kept_bytes(lambda x, w: jaxloss.cross_entropy(x @ w.T, targets), inputs, weight) > few


@pytest.mark.parametrize("loss", [jaxloss.cross_entropy, jaxloss.nll_loss])
def test_a_call_outside_of_jit_converts_no_array_that_is_one(loss, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("converted")

    logits, targets = jnp.ones((128, 10)), jnp.zeros(128, jnp.int32)
    loss(logits, targets)
    monkeypatch.setattr(jnp, "asarray", refuse)
    loss(logits, targets)
    with pytest.raises(AssertionError, match="converted"):
        loss(logits, np.asarray(targets))


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one with every program that XLA compiles."""
    found: list[str] = []

    def listener(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield found
    jax.monitoring.unregister_event_duration_listener(listener)


LOGITS, TARGETS = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), np.array([0, 4, 2, -100, 1, 3])
INPUTS, LINEAR = LOGITS[:, :3], LOGITS[:5, :3]
WEIGHT = np.linspace(0.5, 1.5, 5, dtype=np.float32)
CALLS: dict[str, Callable[[float], Any]] = {  # the same call with other values of everything that has values
    "log_softmax": lambda k: jaxloss.log_softmax(k * LOGITS),
    "nll_loss": lambda k: jaxloss.nll_loss(k * LOGITS, TARGETS, weight=k * WEIGHT),
    "class indices": lambda k: jaxloss.cross_entropy(LOGITS, np.roll(TARGETS, int(10 * k))),
    "cross_entropy": lambda k: jaxloss.cross_entropy(LOGITS, TARGETS, weight=k * WEIGHT, label_smoothing=k, z_loss=k),
    "probabilities": lambda k: jaxloss.cross_entropy(LOGITS, k * np.abs(LOGITS), label_smoothing=k, z_loss=k),
    "kl_div": lambda k: jaxloss.kl_div(k * LOGITS, k * np.abs(LOGITS)),
    "linear_cross_entropy": lambda k: jaxloss.linear_cross_entropy(
        k * INPUTS, LINEAR, TARGETS, linear_bias=k * WEIGHT, weight=k * WEIGHT, label_smoothing=k, logit_softcap=k
    ),
    "linear_log_prob": lambda k: jaxloss.linear_log_prob(k * INPUTS, LINEAR, TARGETS, temperature=k),
    "a criterion": lambda k: jaxloss.CrossEntropyLoss(weight=k * WEIGHT, label_smoothing=k)(LOGITS, TARGETS),
    "the gradient": lambda k: jax.grad(jaxloss.cross_entropy)(k * LOGITS, TARGETS, label_smoothing=k),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_values_outside_of_jit_never_compile_anew(name, compilations):
    CALLS[name](0.1)
    compilations.clear()
    for value in (0.1, 0.2, 0.7):
        CALLS[name](value)
    assert not compilations


def test_a_static_option_would_be_seen_to_compile_anew(compilations):
    loss = jax.jit(partial(jaxloss.cross_entropy, LOGITS), static_argnames="label_smoothing")
    for value in (0.1, 0.2):
        compilations.clear()
        loss(TARGETS, label_smoothing=value)
        assert compilations


def test_the_import_brings_no_large_part_of_jax():
    code = "import jax, sys; before = {*sys.modules}; import jaxloss; print(*{*sys.modules} - before)"
    brought = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "jaxloss" in brought
    assert not [name for name in brought if "pallas" in name or name.startswith(("torch", "flax", "optax"))]
