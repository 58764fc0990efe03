"""Every JAX transformation of every loss gives what plain evaluation, or a finite difference of it, gives."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.test_util import check_grads

import jaxloss
from parity_tests.hlo import kept_bytes

pytestmark = pytest.mark.usefixtures("strict")

ROWS, CLASSES = 5, 7
KINDS = ["cross_entropy index", "cross_entropy probability", "nll_loss", "kl_div", "log_softmax"]


def make_loss(kind: str, scale: float = 1.0, repeats: int = 1) -> tuple[Callable, tuple]:
    """A scalar loss of floating arguments (all differentiable) and arguments for it; scale 4 makes confident rows."""
    rng = np.random.default_rng(0)
    rows, targets = ROWS * repeats, jnp.tile(jnp.array([0, 6, -100, 3, 3]), repeats)
    logits = jnp.asarray(scale * rng.normal(size=(rows, CLASSES)))
    probabilities = jnp.asarray(rng.dirichlet(np.full(CLASSES, 10), rows), logits.dtype)
    weight = jnp.asarray(rng.uniform(0.5, 2, CLASSES), logits.dtype)
    eye, every = jnp.eye(CLASSES, dtype=logits.dtype), {"label_smoothing": 0.1, "z_loss": 0.01}
    cases: dict[str, tuple[Callable, tuple]] = {
        "cross_entropy index": (lambda z, w: jaxloss.cross_entropy(z, targets, weight=w, **every), (logits, weight)),
        "cross_entropy probability": (
            lambda z, t, w: jaxloss.cross_entropy(z, t, weight=w, **every),
            (logits, probabilities, weight),
        ),
        "nll_loss": (lambda z, w: jaxloss.nll_loss(z, targets, weight=w), (jaxloss.log_softmax(logits), weight)),
        "kl_div": (lambda z, t: jaxloss.kl_div(z, t, reduction="batchmean"), (logits, probabilities)),
        "log_softmax": (lambda z, u: jnp.sum(jaxloss.log_softmax(z) * u), (logits, probabilities)),
        "linear_cross_entropy": (
            lambda z, w: jaxloss.linear_cross_entropy(z, eye, targets, weight=w, **every),
            (logits, weight),
        ),
        "entropy": (lambda z: jnp.sum(jaxloss.linear_log_prob(z, eye, targets).entropy), (logits,)),
    }
    return cases[kind]


def plain_cross_entropy(logits, targets, weight, label_smoothing, z_loss):
    """The formula as the docstring has it, for index targets under "mean"."""
    log_probs = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    kept = targets != -100
    row_weight = jnp.where(kept, weight[jnp.where(kept, targets, 0)], 0.0)
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    smooth = (1 - label_smoothing) * one_hot + label_smoothing / logits.shape[-1]
    rows = -jnp.sum(weight[None] * smooth * log_probs, -1)
    rows = rows + z_loss * row_weight * jax.scipy.special.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(jnp.where(kept, rows, 0.0)) / jnp.sum(row_weight)


def close(ours, theirs, rtol=2e-5, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["plain", "confident"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_both_modes_match_finite_differences(kind, scale, x64):
    loss, arguments = make_loss(kind, scale)
    tolerance = 1e-5  # the error of the finite differences
    check_grads(loss, arguments, order=2, modes=("fwd", "rev"), atol=tolerance, rtol=tolerance)


def test_cross_entropy_and_its_second_derivatives_match_the_formula(x64):
    _, (logits, weight) = make_loss("cross_entropy index")
    targets = jnp.array([0, 6, -100, 3, 3])

    def ours(z, w):
        return jaxloss.cross_entropy(z, targets, weight=w, label_smoothing=0.1, z_loss=0.01)

    def formula(z, w):
        return plain_cross_entropy(z, targets, w, 0.1, 0.01)

    for transform in (lambda f: f, partial(jax.grad, argnums=(0, 1)), partial(jax.hessian, argnums=(0, 1))):
        close(transform(ours)(logits, weight), transform(formula)(logits, weight), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_jit_checkpoint_and_value_and_grad_give_the_plain_gradient(kind):
    loss, arguments = make_loss(kind)
    every = tuple(range(len(arguments)))
    plain = jax.grad(loss, every)(*arguments)
    close(jax.jit(jax.grad(loss, every))(*arguments), plain)
    close(jax.grad(jax.checkpoint(loss), every)(*arguments), plain)
    value, gradient = jax.jit(jax.value_and_grad(loss, every))(*arguments)
    close((value, gradient), (loss(*arguments), plain))


@pytest.mark.parametrize("kind", KINDS)
def test_jvp_and_jacfwd_give_the_plain_gradient(kind):
    loss, arguments = make_loss(kind)
    every = tuple(range(len(arguments)))
    plain = jax.grad(loss, every)(*arguments)
    close(jax.jacfwd(loss, every)(*arguments), plain)
    tangents = tuple(jnp.cos(a) for a in arguments)
    inner = sum(jnp.vdot(g, t) for g, t in zip(plain, tangents, strict=True))
    close(jax.jvp(loss, arguments, tangents), (loss(*arguments), inner))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "linear_cross_entropy"])
def test_infinite_loss_of_a_row_leaves_forward_mode_finite(name, weighted, reduction):
    z, targets, removed = jnp.array([[1.0, 2.0, -jnp.inf], [0.0, 1.0, -jnp.inf]]), jnp.array([0, 2]), -jnp.inf
    options = {"weight": jnp.array([0.5, 1.0, 2.0]) if weighted else None, "reduction": reduction}
    if name == "linear_cross_entropy":
        z, options["linear_bias"] = z.at[:, 2].set(0.5), jnp.array([0.0, 0.0, removed])
    losses = {
        "cross_entropy": lambda z: jaxloss.cross_entropy(z, targets, **options),
        "nll_loss": lambda z: jaxloss.nll_loss(z, targets, **options),
        "linear_cross_entropy": lambda z: jaxloss.linear_cross_entropy(z, jnp.eye(3), targets, **options),
    }
    assert jnp.isposinf(losses[name](z))
    assert jnp.isfinite(jax.jacrev(losses[name])(z)).all()
    close(jax.jacfwd(losses[name])(z), jax.jacrev(losses[name])(z))


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_nan_in_an_ignored_row_has_no_effect_on_forward_mode(name):
    x, targets = jnp.ones((2, 3)).at[1].set(jnp.nan), jnp.array([0, -100])
    losses = {
        "cross_entropy": lambda x: jaxloss.cross_entropy(x, targets),
        "linear_cross_entropy": lambda x: jaxloss.linear_cross_entropy(x, jnp.eye(3), targets),
    }
    tangent = jnp.array([[1.0, 2.0, 3.0], [jnp.nan] * 3])
    _, along = jax.jvp(losses[name], (x,), (tangent,))
    close(along, jnp.vdot(jax.grad(losses[name])(x)[0], tangent[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_is_the_same_forward_over_reverse_and_reverse_over_reverse(kind):
    loss, arguments = make_loss(kind)
    close(jax.hessian(loss)(*arguments), jax.jacrev(jax.grad(loss))(*arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_vmap_of_grad_equal_a_loop(kind):
    loss, arguments = make_loss(kind)
    batches = tuple(jnp.stack([a, a * 2, a * 0.5]) for a in arguments)
    for function in (loss, jax.grad(loss, tuple(range(len(arguments))))):
        looped = [function(*(b[i] for b in batches)) for i in range(3)]
        close(jax.vmap(function)(*batches), jax.tree.map(lambda *x: jnp.stack(x), *looped))


@pytest.mark.parametrize(("in_axes", "name"), [((0, None), "logits"), ((None, 0), "targets"), ((0, 0), "both")])
def test_vmap_over_logits_targets_or_both(in_axes, name):
    logits = jax.random.normal(jax.random.key(0), (3, ROWS, CLASSES))
    targets = jax.random.randint(jax.random.key(1), (3, ROWS), 0, CLASSES)
    arguments = [a if axis == 0 else a[0] for a, axis in zip((logits, targets), in_axes, strict=True)]
    expected = [
        jax.value_and_grad(jaxloss.cross_entropy)(
            *(a[i] if axis == 0 else a for a, axis in zip(arguments, in_axes, strict=True))
        )
        for i in range(3)
    ]
    ours = jax.vmap(jax.value_and_grad(jaxloss.cross_entropy), in_axes)(*arguments)
    close(ours, jax.tree.map(lambda *x: jnp.stack(x), *expected))


def products_with_second_derivatives(loss: Callable, arguments: tuple) -> list:
    """Forward over reverse and reverse over reverse, along one direction."""
    gradient = jax.grad(loss, tuple(range(len(arguments))))
    along = tuple(jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in arguments)
    return [jax.jvp(gradient, arguments, along)[1], jax.vjp(gradient, *arguments)[1](along)]


VMAPPED = {
    "indices": partial(jaxloss.cross_entropy, label_smoothing=0.1, z_loss=0.1),
    "rows": lambda z, t: jnp.sum(jaxloss.cross_entropy(z, t, reduction="none")),
    "nll_loss": lambda z, t: jaxloss.nll_loss(jaxloss.log_softmax(z), t),
    "linear": lambda z, t: jaxloss.linear_cross_entropy(z, jnp.eye(CLASSES), t),
    "linear_log_prob": lambda z, t: jnp.sum(jaxloss.linear_log_prob(z, jnp.eye(CLASSES), t).log_prob),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_derivatives_of_a_vmap_over_the_targets_alone(name):
    loss, logits = VMAPPED[name], jax.random.normal(jax.random.key(0), (ROWS, CLASSES))
    targets = jax.random.randint(jax.random.key(1), (3, ROWS), 0, CLASSES).at[0, 0].set(-100)

    def mapped(z):
        return jnp.sum(jax.vmap(loss, (None, 0))(z, targets))

    def looped(z):
        return sum(loss(z, t) for t in targets)

    close(jax.grad(mapped)(logits), jax.grad(looped)(logits))
    close(*(products_with_second_derivatives(f, (logits,)) for f in (mapped, looped)))


@pytest.mark.parametrize("kind", KINDS)
def test_scan_accumulates_the_plain_gradient(kind):
    loss, arguments = make_loss(kind)

    def total(*args):
        step = lambda carry, scale: (carry + scale * loss(*args), None)  # noqa: E731
        return lax.scan(step, jnp.zeros(()), jnp.array([1.0, 2.0]))[0]

    close(jax.grad(total)(*arguments), 3 * jax.grad(loss)(*arguments))


def scanned(loss: Callable) -> Callable:
    """The sum of squared losses over a leading axis of all arguments."""

    def total(*batches):
        return lax.scan(lambda total, each: (total + loss(*each) ** 2, None), jnp.zeros(()), batches)[0]

    return total


@pytest.mark.parametrize("repeats", [1, 64], ids=["rows", "many rows"])
@pytest.mark.parametrize("kind", [*KINDS, "linear_cross_entropy", "entropy"])
def test_second_derivatives_through_a_scan_are_those_of_a_loop(kind, repeats, x64):
    """Reverse mode of a scan drops custom rules: what is derived without them has to be right too."""
    loss, arguments = make_loss(kind, repeats=repeats)
    batches = tuple(jnp.stack([a, a * 1.5, a * 0.5]) for a in arguments)

    def looped(*batches):
        return sum(loss(*(b[i] for b in batches)) ** 2 for i in range(3))

    found, expected = (products_with_second_derivatives(f, batches) for f in (scanned(loss), looped))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    close(found, expected, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize("kind", ["cross_entropy index", "linear_cross_entropy"])
def test_nan_in_an_ignored_row_stays_there_in_second_derivatives_through_a_scan(kind):
    loss, (logits, weight) = make_loss(kind)
    batches = jnp.stack([logits, logits.at[2].set(jnp.nan)]), jnp.stack([weight] * 2)
    found = products_with_second_derivatives(scanned(loss), batches)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_lowers_for_every_platform(kind, platform):
    loss, arguments = make_loss(kind)
    exported = export.export(jax.jit(jax.value_and_grad(loss)), platforms=[platform])(*arguments)
    assert exported.platforms == (platform,)
    if platform == "cpu":
        close(exported.call(*arguments), jax.value_and_grad(loss)(*arguments))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_number_of_rows_may_be_symbolic(dtype, reduction):
    (rows,) = export.symbolic_shape("rows")
    logits = jax.ShapeDtypeStruct((rows, 12), dtype)
    labels, keywords = jax.ShapeDtypeStruct((rows,), "int32"), {"reduction": reduction, "label_smoothing": 0.1}
    for loss, targets in (
        (partial(jaxloss.cross_entropy, **keywords), labels),
        (partial(jaxloss.cross_entropy, **keywords), logits),
        (partial(jaxloss.nll_loss, reduction=reduction), labels),
        (lambda z, y: jaxloss.log_softmax(z), labels),
    ):
        result = export.export(jax.jit(lambda z, y, loss=loss: jax.vjp(lambda z: loss(z, y), z)[0]))(logits, targets)
        assert result.out_avals[0].dtype == dtype
        export.export(jax.jit(lambda z, y, loss=loss: jax.grad(lambda z: jnp.sum(loss(z, y)))(z)))(logits, targets)


def three(x: jax.Array) -> jax.Array:
    """The weight of three classes."""
    return x[:1] * jnp.arange(3.0)[:, None]


SYMBOLIC = {
    "indices": (partial(jaxloss.cross_entropy, label_smoothing=0.1, z_loss=0.1), "logits", "labels"),
    "probabilities": (partial(jaxloss.cross_entropy, label_smoothing=0.1), "logits", "logits"),
    "rows": (partial(jaxloss.cross_entropy, reduction="none"), "logits", "labels"),
    "nll_loss": (jaxloss.nll_loss, "logits", "labels"),
    "log_softmax": (lambda z, _: jaxloss.log_softmax(z), "logits", "labels"),
    "kl_div": (jaxloss.kl_div, "logits", "logits"),
    "linear": (lambda x, y: jaxloss.linear_cross_entropy(x, three(x), y % 3), "logits", "labels"),
    "linear, soft": (
        lambda x, y: jaxloss.linear_cross_entropy(x, three(x), jax.nn.one_hot(y % 3, 3)),
        "logits",
        "labels",
    ),
    "linear_log_prob": (lambda x, y: jaxloss.linear_log_prob(x, three(x), y % 3).entropy, "logits", "labels"),
}


@pytest.mark.parametrize("shape", ["rows, 70", "5, classes", "rows, classes"])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_one_exported_program_serves_every_number_of_rows_and_classes(name, shape):
    loss, *kinds = SYMBOLIC[name]
    symbolic = export.symbolic_shape(shape)
    rng = np.random.default_rng(0)
    values = {"logits": rng.random((5, 70)).astype(np.float32), "labels": rng.integers(0, 70, 5).astype(np.int32)}
    step = jax.jit(lambda z, y: (loss(z, y), jax.grad(lambda z: jnp.sum(loss(z, y)))(z)))
    shapes = {"logits": symbolic, "labels": symbolic[:1]}
    exported = export.export(step)(*(jax.ShapeDtypeStruct(shapes[kind], values[kind].dtype) for kind in kinds))
    arguments = [values[kind] for kind in kinds]
    close(exported.call(*arguments), step(*arguments))


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_traced_options_equal_concrete_ones_and_never_recompile(name):
    logits, targets = jax.random.normal(jax.random.key(0), (ROWS, CLASSES)), jnp.arange(ROWS)
    step = jax.jit(lambda value: jaxloss.cross_entropy(logits, targets, **{name: value}))
    for value in (0.0, 0.1, 0.7):
        close(step(value), jaxloss.cross_entropy(logits, targets, **{name: value}))
    assert step._cache_size() == 1


def plain_probability_loss(logits, probabilities):
    return -jnp.mean(jnp.sum(probabilities * jax.nn.log_softmax(logits), -1))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["log_softmax", "cross_entropy probability", "cross_entropy index"])
def test_derivatives_of_confident_rows_match_the_formula(kind, order, x64):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(6 * rng.normal(size=(3, 4)))
    assert np.sum(np.asarray(jax.nn.softmax(logits)).max(-1) > 2 / 3) >= 2
    mix, soft = jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.dirichlet(np.ones(4), 3))
    index = jnp.argmax(logits, -1)
    ours, formula = {
        "log_softmax": (
            lambda z: jnp.sum(mix * jaxloss.log_softmax(z)),
            lambda z: jnp.sum(mix * jax.nn.log_softmax(z)),
        ),
        "cross_entropy probability": (
            lambda z: jaxloss.cross_entropy(z, soft),
            lambda z: plain_probability_loss(z, soft),
        ),
        "cross_entropy index": (
            lambda z: jaxloss.cross_entropy(z, index),
            lambda z: plain_probability_loss(z, jax.nn.one_hot(index, 4)),
        ),
    }[kind]
    for _ in range(order):
        ours, formula = jax.jacfwd(ours), jax.jacrev(formula)
    close(jax.jit(ours)(logits), jax.jit(formula)(logits), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.float32, {}),
        (jnp.bfloat16, {}),
        (jnp.float32, {"label_smoothing": 0.1, "z_loss": 0.1}),
        (jnp.float32, {"label_smoothing": 0.1, "weight": np.ones(512, np.float32)}),
        (jnp.bfloat16, {"z_loss": 0.1, "weight": np.ones(512, np.float32), "dtype": jnp.float32}),
        (jnp.bfloat16, {"label_smoothing": 0.1, "weight": np.ones(512, np.float32)}),
    ],
    ids=["plain", "bfloat16", "smoothing", "weight", "bfloat16, weight", "bfloat16, smoothing"],
)
def test_index_targets_keep_the_logits_alone(dtype, options):
    logits, targets = jnp.ones((64, 512), dtype), jnp.zeros(64, jnp.int32)
    kept = kept_bytes(lambda z: jaxloss.cross_entropy(z, targets, **options), logits)
    few = 64 * 100 + 512 * 8
    assert kept <= logits.nbytes + few
    widened = kept_bytes(lambda z: jaxloss.cross_entropy(z.astype(jnp.float32), targets, **options), logits)
    assert (widened > logits.nbytes + few) == (dtype == jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probability_targets_keep_the_logits_and_the_targets(dtype):
    logits, targets = jnp.ones((64, 512), dtype), jnp.full((64, 512), 1 / 512, dtype)
    allowed = 2 * logits.nbytes + 64 * 100
    assert kept_bytes(lambda z: jaxloss.cross_entropy(z, targets), logits) <= allowed
    assert kept_bytes(lambda z: jaxloss.cross_entropy(z, targets) + jnp.sum(jnp.exp(z)), logits) > allowed


def test_log_softmax_keeps_half_logits_as_they_came_and_rows():
    logits = jnp.ones((64, 512), jnp.bfloat16)
    kept = jax.jit(lambda z: jax.vjp(jaxloss.log_softmax, z)[1]).eval_shape(logits)
    shapes = sorted((leaf.size, leaf.dtype.name) for leaf in jax.tree.leaves(kept))
    assert shapes == [(64, "float32"), (64, "float32"), (64 * 512, "bfloat16")]


def test_cross_entropy_keeps_no_second_array_of_the_size_of_the_logits():
    logits, targets = jnp.ones((64, 512)), jnp.zeros(64, jnp.int32)
    compiled = jax.jit(lambda z: jax.vjp(lambda z: jaxloss.cross_entropy(z, targets), z)[1]).eval_shape(logits)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(compiled))
    assert sizes.count(logits.size) == 1, sizes  # the logits
    assert sum(sizes) < logits.size + 10 * 64


def test_log_softmax_keeps_its_output_alone():
    logits = jnp.ones((64, 512))
    compiled = jax.jit(lambda z: jax.vjp(jaxloss.log_softmax, z)[1]).eval_shape(logits)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(compiled))
    assert sizes.count(logits.size) == 1, sizes


def test_tracing_a_million_rows_of_a_million_classes_allocates_nothing():
    logits = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    targets = jax.ShapeDtypeStruct((10**6,), jnp.int32)
    gradient = jax.eval_shape(jax.jit(jax.grad(jaxloss.cross_entropy)), logits, targets)
    assert gradient.shape == logits.shape


@pytest.mark.parametrize("shape", [(3, 10), (4, 100), (2, 5000)])
@pytest.mark.parametrize("name", ["log_softmax", "cross_entropy", "linear_log_prob"])
def test_a_product_that_the_compiler_makes_again_in_each_sum_gives_what_the_stored_one_gives(name, shape, x64):
    """A product and the difference from its maximum may be rounded once or twice, and not alike in each sum."""
    rng = np.random.default_rng(0)
    scores, scale = jnp.asarray(3 * rng.normal(size=shape)), jnp.asarray(0.7)
    probabilities = jnp.asarray(rng.dirichlet(np.ones(shape[-1]), shape[0]))

    def loss(scores, temperature):
        if name == "linear_log_prob":
            identity, targets = jnp.eye(shape[-1]), jnp.zeros(shape[0], int)
            return jaxloss.linear_log_prob(scores, identity, targets, temperature=temperature).entropy
        if name == "log_softmax":
            return jaxloss.log_softmax(scores / temperature)
        return jaxloss.cross_entropy(scores / temperature, probabilities, reduction="none")

    found = jax.jit(loss)(scores, scale)
    np.testing.assert_allclose(found, loss(scores / scale, jnp.ones(())), rtol=1e-12)
