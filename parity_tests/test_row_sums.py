"""Sums over the classes on CPU, as products with ones and of long rows in blocks: the answers of plain sums."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxloss
from jaxloss import _class_axis
from jaxloss._row_sums import SHORT, row_sum
from parity_tests.blocks import summed_pieces


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on one device, where rows of several axes are summed as products too."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, alone: None) -> Callable[[], None]:
    """Has 12 classes summed in three blocks, and 13 in four and a rest, from when it is called."""

    def cut() -> None:
        monkeypatch.setattr(_class_axis, "SHORT", 5)
        monkeypatch.setattr(_class_axis, "SHORT_BLOCK", 3)
        jax.clear_caches()
        assert summed_pieces(12) == [(7, 3, 4)]
        assert summed_pieces(13) == [(7, 4, 3), (7, 1)]

    return cut


X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 70)), jnp.float32)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(70,), (12, 70), (3, 4, 70), (0, 70), (2, 1)])
def test_a_row_sum_and_its_derivatives_are_those_of_a_sum(shape, dtype, alone, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    x = jnp.resize(X, shape).astype(dtype)
    tolerance = {"rtol": 4 * float(jnp.finfo(dtype).eps), "atol": 20 * float(jnp.finfo(dtype).eps)}

    def pulled(function: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
        sums, pull = jax.vjp(function, x)
        return sums, *pull(jnp.sin(sums)), jax.jvp(function, (x,), (jnp.cos(x),))[1]

    for ours, plain in zip(pulled(jax.jit(row_sum)), pulled(lambda x: jnp.sum(x, -1)), strict=True):
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
        np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(plain, np.float64), **tolerance)


def test_a_row_sum_under_vmap_and_shard_map(alone):
    for axis in range(3):
        moved = jnp.moveaxis(X, 0, axis)
        np.testing.assert_allclose(jax.jit(jax.vmap(row_sum, axis))(moved), jnp.sum(X, -1), 1e-5, 1e-6)
    mesh = jax.make_mesh((3,), ("rows",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("rows")
    for check in (True, False):
        split = jax.shard_map(row_sum, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check)
        sums, pull = jax.vjp(jax.jit(split), X)
        np.testing.assert_allclose(sums, jnp.sum(X, -1), 1e-5, 1e-6)
        np.testing.assert_array_equal(*pull(jnp.sin(sums)), jnp.broadcast_to(jnp.sin(sums)[..., None], X.shape))


def draw(classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits with a confident row and one with two maxima, labels and probabilities."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, classes)).astype(np.float32)
    logits[3, 9] = 30
    logits[6, [2, 11]] = 9
    return logits, np.array([0, 11, 5, 9, -100, 6, 3]), rng.dirichlet(np.ones(classes), 7).astype(np.float32)


def weight(classes: int) -> np.ndarray:
    return np.linspace(1, 2, classes, dtype=np.float32)


RESULTS = {
    "indices": lambda z, y, p: jaxloss.cross_entropy(z, y, reduction="none"),
    "bfloat16": lambda z, y, p: jaxloss.cross_entropy(z.astype(jnp.bfloat16), y, dtype=jnp.float32),
    "int8": lambda z, y, p: jaxloss.cross_entropy(z, y.astype(np.int8)),
    "smoothing": lambda z, y, p: jaxloss.cross_entropy(z, y, label_smoothing=0.1),
    "weights": lambda z, y, p: jaxloss.cross_entropy(z, y, label_smoothing=0.1, weight=weight(z.shape[-1]), z_loss=0.1),
    "probabilities": lambda z, y, p: jaxloss.cross_entropy(z, p, reduction="none"),
    "log_softmax": lambda z, y, p: jaxloss.log_softmax(z),
    "linear": lambda z, y, p: jaxloss.linear_cross_entropy(z, jnp.eye(z.shape[-1]), y),
    "linear_log_prob": lambda z, y, p: jaxloss.linear_log_prob(z, jnp.eye(z.shape[-1]), y)[:2],
}


@pytest.mark.parametrize("classes", [12, 13])
@pytest.mark.parametrize("name", RESULTS)
def test_sums_of_blocks_are_those_of_whole_rows(name, classes, short):
    logits, *targets = draw(classes)

    def scalar(z: jax.Array) -> jax.Array:
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(RESULTS[name](z, *targets)))

    def evaluate() -> list[Any]:
        product = jax.jvp(jax.grad(scalar), (jnp.asarray(logits),), (jnp.cos(logits),))
        return jax.tree.leaves((RESULTS[name](jnp.asarray(logits), *targets), product))

    whole = evaluate()
    short()
    for ours, expected in zip(evaluate(), whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [5000, 5003])
def test_no_rows_of_many_classes(classes, alone):
    logits, labels = jnp.zeros((0, classes)), np.zeros(0, int)
    for targets in (labels, logits):
        assert jaxloss.cross_entropy(logits, targets, reduction="none").shape == (0,)
        assert jaxloss.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1) == 0
        assert jnp.isnan(jaxloss.cross_entropy(logits, targets))
    assert jaxloss.linear_cross_entropy(jnp.zeros((0, 2)), jnp.zeros((classes, 2)), labels, reduction="sum") == 0


@pytest.mark.parametrize("classes", [12, 13])
def test_wrong_labels_are_found_in_blocks_too(classes, short):
    short()
    logits, labels, _ = draw(classes)
    rows = jax.jit(RESULTS["indices"])(logits, np.where(labels == 5, classes, labels), None)
    assert list(np.isnan(rows)) == [label == 5 for label in labels]


@pytest.mark.rounding
def test_sums_are_products_of_short_rows_that_take_the_exponentials_along(alone, monkeypatch):
    def exponentials_per_product(*shape: int) -> list[int]:
        """Of the compiled loss's fused loops with a product, how many exponentials each takes."""
        logits, labels = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:-1], jnp.int32)
        text = jax.jit(jaxloss.cross_entropy).lower(logits, labels).compile().as_text()
        return [loop.count(" exponential(") for loop in text.split("\n}\n") if " dot(" in loop]

    assert exponentials_per_product(8, SHORT) == [1]
    assert exponentials_per_product(2, 4, SHORT) == [1]
    assert exponentials_per_product(8, 131072) == [1]
    assert exponentials_per_product(8, 65537) == [1]
    monkeypatch.setattr(_class_axis, "SHORT", 2**12)  # as many as XLA does not fuse any more
    jax.clear_caches()
    assert exponentials_per_product(8, 2**12) == [0]
    monkeypatch.undo()
    jax.clear_caches()
    assert exponentials_per_product(8, SHORT) == [1]
    assert exponentials_per_product(2, 4, SHORT) == []  # on several devices
