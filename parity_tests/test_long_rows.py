"""Long rows are summed in blocks on CPU: the same answers, and no sum on the fly is of a long row."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss
from jaxloss import _class_axis


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Has rows of 12 classes summed in three blocks from when it is called."""

    def cut() -> None:
        monkeypatch.setattr(_class_axis, "LONG_ROW", 5)
        monkeypatch.setattr(_class_axis, "SHORT_BLOCK", 1)
        jax.clear_caches()
        assert _class_axis.ClassAxis(1).in_blocks(jnp.ones((7, 12)))[1].shape == (7, 3, 4)

    yield cut
    jax.clear_caches()


def draw() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits with a confident row, labels and probabilities of 12 classes."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, 12)).astype(np.float32)
    logits[3, 9] = 30
    return logits, np.array([0, 11, 5, 9, -100, 6, 3]), rng.dirichlet(np.ones(12), 7).astype(np.float32)


EYE, WEIGHT = np.eye(12, dtype=np.float32), np.linspace(1, 2, 12, dtype=np.float32)
RESULTS = {
    "indices": lambda z, y, p: jaxloss.cross_entropy(z, y, reduction="none"),
    "bfloat16": lambda z, y, p: jaxloss.cross_entropy(z.astype(jnp.bfloat16), y, dtype=jnp.float32),
    "int8": lambda z, y, p: jaxloss.cross_entropy(z, y.astype(np.int8)),
    "smoothing": lambda z, y, p: jaxloss.cross_entropy(z, y, label_smoothing=0.1),
    "weights": lambda z, y, p: jaxloss.cross_entropy(z, y, label_smoothing=0.1, weight=WEIGHT, z_loss=0.1),
    "probabilities": lambda z, y, p: jaxloss.cross_entropy(z, p, reduction="none"),
    "log_softmax": lambda z, y, p: jaxloss.log_softmax(z),
    "another axis": lambda z, y, p: jaxloss.cross_entropy(z.T, y, axis=0, reduction="none"),
    "linear": lambda z, y, p: jaxloss.linear_cross_entropy(z, EYE, y),
    "linear_log_prob": lambda z, y, p: jaxloss.linear_log_prob(z, EYE, y)[:2],
}


@pytest.mark.parametrize("name", RESULTS)
def test_sums_of_blocks_are_those_of_whole_rows(name, short):
    logits, *targets = draw()

    def scalar(z: jax.Array) -> jax.Array:
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(RESULTS[name](z, *targets)))

    def evaluate() -> list[Any]:
        product = jax.jvp(jax.grad(scalar), (jnp.asarray(logits),), (jnp.cos(logits),))
        return jax.tree.leaves((RESULTS[name](jnp.asarray(logits), *targets), product))

    whole = evaluate()
    short()
    for ours, expected in zip(evaluate(), whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_wrong_labels_are_found_in_blocks_too(short):
    short()
    logits, labels, _ = draw()
    rows = jax.jit(RESULTS["indices"])(logits, np.where(labels == 5, 12, labels), None)
    assert list(np.isnan(rows)) == [label == 5 for label in labels]


def exponentials(function, *shapes) -> set[int]:
    """How many classes the arrays have of which the compiled program takes exponentials."""
    text = jax.jit(function).lower(*shapes).compile().as_text()
    return {int(shape.rstrip("]").split(",")[-1]) for shape in re.findall(r"= f32\[([\d,]+\])\S* exponential\(", text)}


@pytest.mark.rounding
def test_no_sum_on_the_fly_is_of_a_long_row(monkeypatch, short):
    shapes = jax.ShapeDtypeStruct((8, 131072), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    assert max(exponentials(jaxloss.cross_entropy, *shapes)) == 32768
    assert max(exponentials(lambda z, y: jaxloss.log_softmax(z), *shapes)) == 32768
    monkeypatch.setattr(_class_axis, "LONG_ROW", 2**20)
    jax.clear_caches()
    assert max(exponentials(jaxloss.cross_entropy, *shapes)) == 131072
