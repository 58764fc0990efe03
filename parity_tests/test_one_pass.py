"""What runs off the CPU: one pass finds each row's maximum and its sum. XLA's CPU backend computes it here."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxloss
from jaxloss import _class_axis
from parity_tests.hlo import gathered_sizes

CLASSES = 24
NEAR = 1e-6  # of the largest number of an array, beside float32's 6e-8 for a rounding
EDGES = {
    "ties": [3.0, 3.0, 3.0, -1.0],
    "confident": [40.0, 0.0, 1.0, -3.0],
    "far away": [1e4, 1e4 - 1, 1e4 - 2, -1e4],
    "-inf": [-np.inf, 2.0, -np.inf, 1.0],
    "all -inf": [-np.inf] * 4,
    "+inf": [np.inf, 0.0, 1.0, 2.0],
    "+inf twice": [np.inf, 0.0, np.inf, 2.0],
    "NaN": [0.0, np.nan, 1.0, 2.0],
}


@pytest.fixture
def off_the_cpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[], None]:
    """A call after which programs are those of a GPU that is alone."""

    def leave() -> None:
        request.addfinalizer(jax.clear_caches)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(_class_axis, "undivided", lambda: True)
        jax.clear_caches()

    return leave


def weighted(z: jax.Array, t: jax.Array) -> jax.Array:
    weight = jnp.linspace(0.5, 1.5, z.shape[-1])
    return jaxloss.cross_entropy(z, t, weight=weight, label_smoothing=0.1, z_loss=0.01, reduction="none")


def of_probabilities(z: jax.Array, t: jax.Array) -> jax.Array:
    masses = jax.nn.one_hot(t, z.shape[-1]) * 0.75 + 0.25 / z.shape[-1]
    return jaxloss.cross_entropy(z, masses, z_loss=0.01, reduction="none")


def linear(z: jax.Array, t: jax.Array) -> jax.Array:
    return jaxloss.linear_cross_entropy(z, jnp.eye(z.shape[-1]), t, reduction="none")


LOSSES = {
    "indices": lambda z, t: jaxloss.cross_entropy(z, t, reduction="none"),
    "indices, options": weighted,
    "classes first": lambda z, t: jaxloss.cross_entropy(z.T, t, axis=0, reduction="none"),
    "probabilities": of_probabilities,
    "log_softmax": lambda z, t: jaxloss.log_softmax(z)[:, ::2],
    "linear": linear,
    "entropy": lambda z, t: jaxloss.linear_log_prob(z, jnp.eye(z.shape[-1]), t).entropy,
}


def outcomes(loss: Callable, logits: jax.Array, targets: jax.Array) -> list[np.ndarray]:
    """Value, gradient and a product with the second derivative, forward over reverse and reverse over reverse."""

    def total(z: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cos(jnp.arange(1.0, 9.0))[: len(z)] @ loss(z, targets).reshape(len(z), -1))

    along = jnp.cos(jnp.arange(logits.size, dtype=logits.dtype)).reshape(logits.shape)
    gradient = jax.grad(total)
    forward = jax.jvp(gradient, (logits,), (along,))[1]
    reverse = jax.vjp(gradient, logits)[1](along)[0]
    rows = jax.vmap(lambda z, t: loss(z[None], t[None]))(logits, targets)
    return [np.asarray(x, np.float64) for x in (loss(logits, targets), gradient(logits), forward, reverse, rows)]


def assert_near(found: list[np.ndarray], expected: list[np.ndarray], near: float = NEAR) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        scale = np.abs(theirs[np.isfinite(theirs)]).max(initial=0)
        np.testing.assert_allclose(ours, theirs, rtol=near, atol=near * scale)


def takes_one_pass(loss: Callable) -> bool:
    jax.clear_caches()
    return "jaxloss_peaks[" in str(jax.make_jaxpr(loss)(jnp.ones((2, CLASSES)), jnp.zeros(2, jnp.int32)))


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_is_taken_off_the_cpu_alone(loss, off_the_cpu):
    assert not takes_one_pass(LOSSES[loss])
    off_the_cpu()
    assert takes_one_pass(LOSSES[loss])


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_gives_what_several_give(loss, off_the_cpu):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(8, CLASSES)) * 3, jnp.float32)
    logits = logits.at[0, 3].set(40).at[1, 5].set(-jnp.inf).at[2, 7].set(logits[2].max())
    targets = jnp.asarray(rng.integers(8, CLASSES, 8), jnp.int32).at[0].set(3).at[4].set(-100)
    if loss not in ("indices", "classes first", "log_softmax"):
        logits = logits.at[1, 5].set(-30)  # -inf would be NaN
    expected = outcomes(LOSSES[loss], logits, targets)
    assert all(np.isfinite(x).all() or loss == "log_softmax" for x in expected)
    with pytest.raises(AssertionError):
        assert_near([x * (1 + 1e-4) for x in expected], expected)
    off_the_cpu()
    assert_near(outcomes(LOSSES[loss], logits, targets), expected)


@pytest.mark.parametrize("loss", ["indices", "probabilities", "log_softmax"])
def test_second_derivatives_through_a_scan(loss, off_the_cpu):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 8, CLASSES)), jnp.float32)
    targets = jnp.argmax(logits, -1).at[:, ::2].set(0)  # the maximum and another class
    along = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)

    def total(loss: Callable[..., jax.Array]) -> Callable[[jax.Array], jax.Array]:
        def add(total: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + jnp.sum(jnp.square(loss(*each))), None

        return lambda logits: jax.lax.scan(add, jnp.zeros(()), (logits, targets))[0]

    def by_hand(z: jax.Array, t: jax.Array) -> jax.Array:
        log_probs = z - jax.scipy.special.logsumexp(z, -1, keepdims=True)
        masses = jax.nn.one_hot(t, CLASSES)
        if loss == "log_softmax":
            return log_probs[:, ::2]
        masses = masses * 0.75 + 0.25 / CLASSES if loss == "probabilities" else masses
        return -jnp.sum(masses * log_probs, -1)

    def products(loss: Callable[..., jax.Array]) -> list[np.ndarray]:
        gradient = jax.grad(total(loss))
        return [
            np.asarray(jax.jvp(gradient, (logits,), (along,))[1]),
            np.asarray(jax.vjp(gradient, logits)[1](along)[0]),
        ]

    def ours(z: jax.Array, t: jax.Array) -> jax.Array:
        if loss != "probabilities":
            return LOSSES[loss](z, t)
        return jaxloss.cross_entropy(z, jax.nn.one_hot(t, CLASSES) * 0.75 + 0.25 / CLASSES, reduction="none")

    expected = products(by_hand)
    off_the_cpu()
    assert_near(products(ours), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["indices", "probabilities", "log_softmax"])
def test_edge_values_of_one_pass(loss, dtype, off_the_cpu):
    rows, targets = jnp.repeat(jnp.asarray([*EDGES.values()], dtype), 4, 0), jnp.tile(jnp.arange(4), len(EDGES))

    def value_and_gradient() -> list[np.ndarray]:
        def each(z: jax.Array, t: jax.Array) -> jax.Array:
            return jnp.sum(LOSSES[loss](z[None], t[None]))

        return [np.asarray(x, np.float64) for x in jax.vmap(jax.value_and_grad(each))(rows, targets)]

    expected = value_and_gradient()
    off_the_cpu()
    assert_near(value_and_gradient(), expected, NEAR if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("order", ["ascending", "descending", "any"])
def test_a_maximum_that_keeps_changing_costs_no_digits(order, off_the_cpu):
    within = 4e-5  # XLA's CPU backend adds one after the other: what never changes the maximum errs by 2.3e-5
    values = np.random.default_rng(0).normal(size=(4, 8192)) * 4
    rows = {"ascending": np.sort(values), "descending": -np.sort(-values), "any": values}[order].astype(np.float32)
    exact = rows.astype(np.float64)
    top = exact.max(-1, keepdims=True)
    log_probs = exact - top - np.log(np.exp(exact - top).sum(-1, keepdims=True))
    off_the_cpu()
    found = np.asarray(jaxloss.log_softmax(rows), np.float64)
    assert np.abs(found - log_probs).max() <= within
    losses = np.asarray(jaxloss.cross_entropy(rows, np.arange(4), reduction="none"), np.float64)
    assert np.abs(losses + log_probs[np.arange(4), np.arange(4)]).max() <= within


def test_shards_of_the_classes_are_joined(off_the_cpu):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(8, CLASSES)), jnp.float32).at[1].set(2.0).at[2, :12].set(-jnp.inf)
    targets = jnp.asarray(rng.integers(12, CLASSES, 8), jnp.int32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def split(loss: Callable[..., jax.Array]) -> Callable:
        def local(z: jax.Array, t: jax.Array) -> jax.Array:
            return loss(z, t, class_axis_name="x")

        return jax.jit(jax.value_and_grad(jax.shard_map(local, mesh=mesh, in_specs=(P(None, "x"), P()), out_specs=P())))

    expected = jax.value_and_grad(jaxloss.cross_entropy)(logits, targets)
    off_the_cpu()
    assert_near(*([np.asarray(x) for x in each] for each in (split(jaxloss.cross_entropy)(logits, targets), expected)))


@pytest.mark.parametrize("probabilities", [False, True])
def test_classes_that_a_mesh_splits_are_not_gathered(probabilities, monkeypatch, request):
    request.addfinalizer(jax.clear_caches)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(jnp.ones((16, 64)), jax.NamedSharding(mesh, P(None, "x")))
    targets = split / 64 if probabilities else jnp.zeros(16, jnp.int32)
    compiled = jax.jit(jax.value_and_grad(jaxloss.cross_entropy)).lower(split, targets).compile()
    assert max(gathered_sizes(compiled), default=0) < split.size
