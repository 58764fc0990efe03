"""Casts and selects of half types, and large bfloat16 arrays on CPU, whose sums read them as they are."""

import re
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxloss
from jaxloss import _class_axis, _cross_entropy
from jaxloss._class_axis import ClassAxis
from jaxloss._halves import cast, cast_sum, zero_unless
from parity_tests.blocks import summed_pieces

pytestmark = pytest.mark.rounding


def every_upper_half() -> np.ndarray:
    """float32 with each sign, exponent and bfloat16 mantissa, and lower halves around a rounding's ties."""
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper | lower).view(np.float32).ravel()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_cast_is_astype_for_every_kind_of_number(dtype):
    x = every_upper_half()
    with jax.enable_x64(dtype == "float64"):
        found = jax.jit(partial(cast, dtype=dtype))(x)
        expected = jnp.asarray(x).astype(dtype)
        assert found.dtype == expected.dtype
        numbers = ~np.isnan(x)
        integers = f"uint{8 * found.dtype.itemsize}"
        bits, others = (np.asarray(y).view(integers) for y in (found, expected))
        np.testing.assert_array_equal(bits[numbers], others[numbers])
        np.testing.assert_array_equal(np.isnan(np.asarray(found, np.float64)), ~numbers)


X = jnp.linspace(-1, 1, 12).reshape(3, 4)
POSITIVE = X > 0
PAIRS: dict[str, tuple[Callable, Callable]] = {  # ours, and with JAX's own operations
    "cast": (
        lambda x: jnp.sin(cast(cast(x, jnp.bfloat16), jnp.float32)),
        lambda x: jnp.sin(x.astype(jnp.bfloat16).astype(jnp.float32)),
    ),
    "cast_sum": (
        lambda x: cast(cast_sum(jnp.bfloat16, jnp.sin(x), x[..., :1], 2 * x), jnp.float32),
        lambda x: (jnp.sin(x) + x[..., :1] + 2 * x).astype(jnp.bfloat16).astype(jnp.float32),
    ),
    "zero_unless": (
        lambda x: zero_unless(POSITIVE[: len(x)], jnp.sin(x.astype(jnp.float16))).astype(jnp.float32),
        lambda x: jnp.where(POSITIVE[: len(x)], jnp.sin(x.astype(jnp.float16)), 0).astype(jnp.float32),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_transformation_is_that_of_jaxs_own_operations(name):
    ours, plain = PAIRS[name]
    for transform in (
        jax.jit,
        jax.jacfwd,
        jax.jacrev,
        jax.hessian,
        lambda f: jax.jacrev(jax.jacfwd(f)),
        lambda f: jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(x))),
        lambda f: lambda x: jax.jvp(f, (x,), (x,)),
        lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
        lambda f: lambda x: jax.vmap(f, in_axes=2, out_axes=1)(jnp.stack([x, 2 * x], 2)),
    ):
        np.testing.assert_array_equal(transform(ours)(X), transform(plain)(X))
    with jax.disable_jit():
        np.testing.assert_array_equal(ours(X), plain(X))
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(ours, mesh=mesh, in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows"))
    np.testing.assert_allclose(split(X), plain(X), rtol=1e-7)


def test_an_array_that_is_not_batched_joins_one_that_is():
    found = jax.vmap(lambda x: cast_sum(jnp.bfloat16, x, X[0]))(X)
    np.testing.assert_array_equal(found.astype("float32"), (X + X[0]).astype(jnp.bfloat16).astype("float32"))
    x = X.astype(jnp.bfloat16)
    found = jax.vmap(lambda mask: zero_unless(mask, x[0]))(POSITIVE)
    np.testing.assert_array_equal(found.astype("float32"), jnp.where(POSITIVE, x[0], 0).astype("float32"))


def test_a_gradient_of_half_log_probabilities_that_shard_map_does_not_split():
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    log_probs, targets = jnp.asarray(jax.nn.log_softmax(X[:2].repeat(4, 0)), jnp.bfloat16), jnp.arange(8 * devices) % 4

    def total(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
        return jax.lax.psum(jaxloss.nll_loss(log_probs, targets, reduction="sum"), "x")

    specs = PartitionSpec(), PartitionSpec("x")
    gradient = jax.jit(jax.grad(jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())))
    found = gradient(log_probs, targets)
    np.testing.assert_array_equal(found.astype("float32"), -devices * jax.nn.one_hot(targets[:8], 4))


def test_a_select_passes_every_half_as_it_is():
    bits = np.arange(2**16, dtype=np.uint16)
    for dtype in ("bfloat16", "float16"):
        x = jax.lax.bitcast_convert_type(bits, dtype)
        found = jax.lax.bitcast_convert_type(jax.jit(zero_unless)(bits % 3 == 0, x), jnp.uint16)
        np.testing.assert_array_equal(found, np.where(bits % 3 == 0, bits, 0))


SHAPE = (7, 12)
WEIGHT = np.linspace(0.5, 1.5, 12, dtype=np.float32)
OPTIONS = {"weight": WEIGHT, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none", "dtype": "float32"}
RESULTS = {
    "indices": lambda z, y, p: jaxloss.cross_entropy(z, y, reduction="none", dtype="float32"),
    "indices, options": lambda z, y, p: jaxloss.cross_entropy(z, y, **OPTIONS),
    "probabilities": lambda z, y, p: jaxloss.cross_entropy(z, p, reduction="none", dtype="float32"),
    "probabilities, options": lambda z, y, p: jaxloss.cross_entropy(z, p, **OPTIONS),
    "half probabilities": lambda z, y, p: jaxloss.cross_entropy(z, p.astype(z.dtype), dtype="float32"),
    "log_softmax": lambda z, y, p: jaxloss.log_softmax(z).astype(jnp.float32),
    "vmap": lambda z, y, p: jax.vmap(partial(jaxloss.cross_entropy, dtype="float32"))(z, y),
}


@pytest.fixture(params=["whole rows", "rows in blocks"])
def large(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Has arrays of any size count as large, and their rows as long if so named."""
    monkeypatch.setattr(_cross_entropy, "LARGE", 0)
    if request.param == "rows in blocks":
        monkeypatch.setattr(_class_axis, "LONG_ROW", 5)
        monkeypatch.setattr(_class_axis, "SHORT_BLOCK", 3)
        assert summed_pieces(12) == [(7, 3, 4)]
    jax.clear_caches()
    yield
    jax.clear_caches()


def draw() -> tuple[jax.Array, np.ndarray, jax.Array]:
    """bfloat16 logits with a confident row and common offsets, labels, and probabilities that bfloat16 has."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=SHAPE)
    logits[3, 9] = 30
    logits[4] += 100
    probabilities = jnp.asarray(rng.dirichlet(np.ones(12), 7), jnp.bfloat16).astype(jnp.float32)
    return jnp.asarray(logits, jnp.bfloat16), np.array([0, 11, 5, 9, -100, 6, 3]), probabilities


def test_which_arrays_are_lean():
    def lean(shape: tuple[int, ...], dtype: str = "bfloat16", position: int = 1, wide: str = "float32") -> bool:
        return ClassAxis(position).of_cast(jnp.zeros(shape, dtype), jnp.dtype(wide), least=2**22).lean

    assert lean((128, 32768))
    assert lean((32, 131072))
    assert not lean((127, 32768))
    assert ClassAxis(1).of_cast(jnp.zeros((7, 12), "bfloat16"), jnp.dtype("float32")).lean
    assert lean((128, 65537))
    assert not lean((32768, 128), position=0)
    assert not lean((128, 32768), "float16")
    assert not lean((128, 32768), wide="float64")


@pytest.mark.parametrize("name", RESULTS)
def test_large_halves_give_what_their_casts_give(name, large):
    logits, labels, probabilities = draw()

    def scalar(z: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(RESULTS[name](z, labels, probabilities)))

    def evaluate(z: jax.Array) -> list[jax.Array]:
        direction = jnp.cos(logits).astype(z.dtype)
        return [RESULTS[name](z, labels, probabilities), *jax.jvp(jax.grad(scalar), (z,), (direction,))]

    exact = evaluate(logits.astype(jnp.float32))
    value, gradient, product = evaluate(logits)
    if name == "log_softmax":  # whose result, and so what is made of it, is rounded too
        value_error, gradient_error, least = 2**-8, 2**-6, 0.02
    else:
        value_error, gradient_error, least = 1e-6, 2**-8, 1e-7
    np.testing.assert_allclose(value, exact[0], rtol=value_error, atol=1e-9)
    np.testing.assert_allclose(gradient.astype("float32"), exact[1], rtol=gradient_error, atol=least)
    np.testing.assert_allclose(product.astype("float32"), exact[2], rtol=2**-5, atol=0.02)


def test_wrong_and_ignored_labels_of_large_halves(large):
    logits, labels, _ = draw()
    logits = logits.at[4].set(jnp.nan)  # which is ignored

    @jax.jit
    def rows(z: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, pull = jax.vjp(lambda z: jaxloss.cross_entropy(z, labels, reduction="none"), z)
        return loss, pull(jnp.ones_like(loss))[0]

    found = rows(logits, np.where(labels == 5, 12, labels))
    loss, gradient = (np.asarray(x, np.float32) for x in found)
    wrong = labels == 5
    np.testing.assert_array_equal(np.isnan(loss), wrong)
    np.testing.assert_array_equal(np.isnan(gradient), np.broadcast_to(wrong[:, None], SHAPE))


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_every_derivative_of_large_halves(soft, large):
    logits, labels, probabilities = draw()
    values = {"weight": jnp.asarray(WEIGHT), "label_smoothing": jnp.array(0.1), "z_loss": jnp.array(0.1)}
    if soft:
        values["targets"] = probabilities
    logits = logits if soft else logits.at[4].set(jnp.nan)  # which is ignored

    def evaluate(z: jax.Array) -> list[jax.Array]:
        def loss(values: dict[str, jax.Array], z: jax.Array) -> jax.Array:
            return jaxloss.cross_entropy(z, **{"targets": labels} | values, dtype="float32")

        directions = jax.tree.map(jnp.cos, values), jnp.ones_like(z)
        return jax.tree.leaves(jax.jvp(jax.grad(loss), (values, z), directions))

    for found, exact in zip(evaluate(logits), evaluate(logits.astype(jnp.float32)), strict=True):
        assert np.all(np.isfinite(exact))
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def casts(function: Callable, *shapes: jax.ShapeDtypeStruct) -> int:
    """How many of XLA's own casts of arrays as large as the first to bfloat16 the compiled program has."""
    text, shape = jax.jit(function).lower(*shapes).compile().as_text(), ",".join(map(str, shapes[0].shape))
    return len(re.findall(rf"= bf16\[{shape}\]\S* convert\(", text))


def test_no_cast_of_xla_makes_a_half_gradient():
    logits, labels = jax.ShapeDtypeStruct((16, 300), "bfloat16"), jax.ShapeDtypeStruct((16,), "int32")
    assert casts(jax.grad(jaxloss.cross_entropy), logits, labels) == 0
    assert casts(jax.grad(lambda z, y: jaxloss.cross_entropy(z.astype("float32"), y)), logits, labels) > 0
    assert casts(jaxloss.log_softmax, logits) == 0
    assert casts(lambda z: jaxloss.log_softmax(z.astype("float32")).astype(z.dtype), logits) > 0
