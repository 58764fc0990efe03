"""Logits split over eight devices along the classes or the rows: same values, and nothing of that size moves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from parity_tests.hlo import gathered_sizes

ROWS, CLASSES = 16, 64
CASES = {
    "index": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"weight": True, "label_smoothing": 0.1, "z_loss": 1e-2},
}


def make_inputs(target_kind: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(ROWS, CLASSES)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, CLASSES, ROWS), jnp.int32).at[3].set(-100)
    if target_kind == "probability":
        targets = jnp.asarray(rng.dirichlet(np.ones(CLASSES), ROWS), jnp.float32)
    return logits, targets, jnp.asarray(rng.uniform(0.5, 2, CLASSES), jnp.float32)


def loss_of(options: dict, **extra):
    """`(logits, targets, weight) -> loss, (gradients to logits and weight)`."""
    weighted = options.get("weight", False)
    options = {k: v for k, v in options.items() if k != "weight"} | extra

    def loss(logits, targets, weight):
        return jaxloss.cross_entropy(logits, targets, weight=weight if weighted else None, **options)

    return jax.value_and_grad(loss, argnums=(0, 2))


def assert_trees_close(ours, theirs, rtol: float = 2e-6) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=rtol / 20), ours, theirs)


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("x",), axis_types=(kind,))


@pytest.mark.parametrize("split", ["classes", "rows"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("target_kind", ["index", "probability"])
@pytest.mark.parametrize("case", CASES)
def test_sharded_logits_give_the_single_device_result(split, kind, target_kind, case):
    logits, targets, weight = make_inputs(target_kind)
    function = loss_of(CASES[case])
    expected = jax.jit(function)(logits, targets, weight)

    mesh, spec = mesh_of(kind), P(None, "x") if split == "classes" else P("x", None)
    with jax.set_mesh(mesh):
        row_spec = spec if target_kind == "probability" else P(spec[0])
        weight_spec = P("x") if split == "classes" else P(None)
        arrays = (
            jax.device_put(logits, NamedSharding(mesh, spec)),
            jax.device_put(targets, NamedSharding(mesh, row_spec)),
            jax.device_put(weight, NamedSharding(mesh, weight_spec)),
        )
        compiled = jax.jit(function).lower(*arrays).compile()
        assert_trees_close(jax.device_get(compiled(*arrays)), jax.device_get(expected))
    if split == "rows" and kind is AxisType.Auto:
        assert not gathered_sizes(compiled)
    assert max(gathered_sizes(compiled), default=0) < ROWS * CLASSES // 8


def test_gathered_sizes_finds_an_all_gather():
    mesh = mesh_of(AxisType.Auto)
    x = jax.device_put(jnp.ones((ROWS, CLASSES)), NamedSharding(mesh, P(None, "x")))
    compiled = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P())).lower(x).compile()
    assert max(gathered_sizes(compiled)) == ROWS * CLASSES


@pytest.mark.parametrize("target_kind", ["index", "probability"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_axis_name_in_shard_map_gives_the_single_device_result(target_kind, case, reduction):
    logits, targets, weight = make_inputs(target_kind)
    expected = jax.jit(loss_of(CASES[case], reduction=reduction))(logits, targets, weight)
    target_spec = P(None, "x") if target_kind == "probability" else P(None)

    inside = loss_of(CASES[case], reduction=reduction, class_axis_name="x")
    specs = (P(None, "x"), target_spec, P("x"))
    mapped = jax.shard_map(inside, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=(P(), (P(None, "x"), P("x"))))
    assert_trees_close(jax.jit(mapped)(logits, targets, weight), expected)

    def outside(logits, targets, weight):
        return jax.shard_map(
            lambda *shards: jaxloss.cross_entropy(
                shards[0],
                shards[1],
                weight=shards[2] if CASES[case].get("weight") else None,
                reduction=reduction,
                class_axis_name="x",
                **{k: v for k, v in CASES[case].items() if k != "weight"},
            ),
            mesh=mesh_of(AxisType.Auto),
            in_specs=specs,
            out_specs=P(),
        )(logits, targets, weight)

    compiled = jax.jit(jax.value_and_grad(outside, argnums=(0, 2))).lower(logits, targets, weight).compile()
    assert_trees_close(compiled(logits, targets, weight), expected)
    assert max(gathered_sizes(compiled), default=0) < ROWS * CLASSES // 8


@pytest.mark.parametrize("target_kind", ["index", "probability"])
def test_class_axis_name_may_name_several_mesh_axes(target_kind):
    logits, targets, weight = make_inputs(target_kind)
    names = ("x", "y")
    step = loss_of(CASES["all"], class_axis_name=names)
    specs = (P(None, names), P(None, names) if target_kind == "probability" else P(), P(names))
    mesh = jax.make_mesh((2, 4), names, axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), (specs[0], specs[2])))
    found = jax.jit(mapped)(logits, targets, weight)
    assert_trees_close(found, jax.jit(loss_of(CASES["all"]))(logits, targets, weight))


def test_class_axis_name_keeps_a_wrong_target_nan():
    logits, targets, _ = make_inputs("index")
    targets = targets.at[0].set(CLASSES).at[1].set(-1)
    inside = partial(jaxloss.cross_entropy, class_axis_name="x", reduction="none")
    mapped = jax.shard_map(inside, mesh=mesh_of(AxisType.Auto), in_specs=(P(None, "x"), P(None)), out_specs=P())
    losses = jax.jit(mapped)(logits, targets)
    assert np.flatnonzero(np.isnan(losses)).tolist() == [0, 1]


@pytest.mark.parametrize("case", ["index", "weight"])
def test_classes_padded_with_minus_inf_change_nothing(case):
    logits, targets, weight = make_inputs("index")
    logits, weight = logits[:, :61], weight[:61]
    targets = jnp.where(targets < 0, targets, targets % 61)
    function = loss_of(CASES[case])
    loss, (dlogits, dweight) = jax.jit(function)(logits, targets, weight)
    padded = (
        jnp.pad(logits, ((0, 0), (0, 3)), constant_values=-jnp.inf),
        targets,
        jnp.pad(weight, (0, 3), constant_values=1),
    )

    mesh = mesh_of(AxisType.Auto)
    specs = (P(None, "x"), P(None), P("x"))
    arrays = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(padded, specs, strict=True)]
    padded_loss, (padded_dlogits, padded_dweight) = jax.jit(function)(*arrays)
    assert_trees_close((padded_loss, padded_dlogits[:, :61], padded_dweight[:61]), (loss, dlogits, dweight))
    assert not np.any(padded_dlogits[:, 61:])


def test_tokens_split_in_shard_map_sum_and_count_globally():
    logits, targets, _ = make_inputs("index")

    def mean(logits, targets):
        loss = jaxloss.cross_entropy(logits, targets, reduction="sum")
        return jax.lax.psum(loss, "x") / jax.lax.psum(jnp.sum(targets != -100), "x")

    mapped = jax.shard_map(mean, mesh=mesh_of(AxisType.Auto), in_specs=(P("x", None), P("x")), out_specs=P())
    ours = jax.jit(jax.value_and_grad(mapped))(logits, targets)
    assert_trees_close(ours, jax.jit(jax.value_and_grad(jaxloss.cross_entropy))(logits, targets))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["log_softmax", "nll_loss", "kl_div"])
def test_the_other_losses_take_sharded_classes_too(name, dtype):
    logits, targets, weight = make_inputs("index")
    logits = logits.astype(dtype)
    probabilities = make_inputs("probability")[1]
    functions = {
        "log_softmax": lambda z: jnp.sum(jaxloss.log_softmax(z) * probabilities),
        "nll_loss": lambda z: jaxloss.nll_loss(z, targets, weight=weight),
        "kl_div": lambda z: jaxloss.kl_div(z, probabilities, reduction="batchmean"),
    }
    expected = jax.jit(jax.value_and_grad(functions[name]))(logits)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = jax.device_put(logits, NamedSharding(mesh, P(None, "x")))
        compiled = jax.jit(jax.value_and_grad(functions[name])).lower(split).compile()
        ours, theirs = (jax.tree.map(np.float32, jax.device_get(x)) for x in (compiled(split), expected))
        assert_trees_close(ours, theirs, 2e-6 if dtype == "float32" else 2**-7)
    assert max(gathered_sizes(compiled), default=0) < ROWS * CLASSES // 8


@pytest.mark.parametrize("spec", [P(None, "x"), P("x", None)], ids=["classes", "rows"])
@pytest.mark.parametrize("loss", [jaxloss.cross_entropy, lambda z, t: jnp.sum(jaxloss.log_softmax(z)[:, 3])])
def test_few_sharded_classes_give_the_single_device_result(loss, spec):
    rows, classes = 64, 16  # of which both sums are taken in one pass
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.normal(size=(rows, classes)), jnp.float32), rng.integers(0, classes, rows)
    split = jax.device_put(logits, NamedSharding(mesh_of(AxisType.Auto), spec))
    for function in (loss, jax.value_and_grad(loss)):
        compiled = jax.jit(function).lower(split, targets).compile()
        assert_trees_close(compiled(split, targets), jax.jit(function)(logits, targets))
        assert max(gathered_sizes(compiled), default=0) <= rows * 8  # at most each device's sums


@pytest.mark.parametrize("classes", [6000, 16424])  # which blocks of a single device would not divide as the mesh does
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
def test_many_classes_split_over_an_auto_mesh_move_no_logits(classes, options):
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.normal(size=(8, classes)), jnp.float32), rng.integers(0, classes, 8)
    split = jax.device_put(logits, NamedSharding(mesh_of(AxisType.Auto), P(None, "x")))
    loss = partial(jaxloss.cross_entropy, **options)
    for function in (loss, jax.grad(loss), lambda z, t: jnp.sum(jnp.sin(jaxloss.log_softmax(z)))):
        compiled = jax.jit(function).lower(split, targets).compile()
        assert_trees_close(compiled(split, targets), jax.jit(function)(logits, targets), 1e-5)
        assert not gathered_sizes(compiled)


def test_optax_raises_on_classes_split_over_an_explicit_mesh_axis():
    logits, targets, _ = make_inputs("index")
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = jax.device_put(logits, NamedSharding(mesh, P(None, "x")))
        targets = jnp.maximum(targets, 0)
        with pytest.raises(Exception, match="sharding"):
            jax.jit(optax.softmax_cross_entropy_with_integer_labels)(split, targets)


@pytest.mark.parametrize("target_kind", ["index", "probability"])
@pytest.mark.parametrize("logits_spec", [P("d", "m"), P("d", None), P(None, "m")], ids=str)
@pytest.mark.parametrize("split_targets", [False, True], ids=["whole targets", "split targets"])
def test_targets_and_weight_may_be_split_otherwise_than_the_logits(target_kind, logits_spec, split_targets):
    logits, targets, weight = make_inputs(target_kind)
    function = loss_of(CASES["all"])
    expected = jax.jit(function)(logits, targets, weight)
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        target_spec = P("d", *[None] * (targets.ndim - 1)) if split_targets else P()
        arrays = (
            jax.device_put(logits, NamedSharding(mesh, logits_spec)),
            jax.device_put(targets, NamedSharding(mesh, target_spec)),
            jax.device_put(weight, NamedSharding(mesh, P("m") if split_targets else P())),
        )
        assert_trees_close(jax.device_get(jax.jit(function)(*arrays)), jax.device_get(expected))


def test_vmap_of_weighted_rows_on_an_explicit_mesh():
    logits, targets, weight = make_inputs("index")
    function = jax.vmap(lambda z, t: jaxloss.cross_entropy(z[None], t[None], weight=weight, reduction="sum"))
    expected = function(logits, targets)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        rows = jax.device_put(logits, NamedSharding(mesh, P("x", None)))
        split = jax.device_put(targets, NamedSharding(mesh, P("x")))
        np.testing.assert_allclose(jax.device_get(jax.jit(function)(rows, split)), expected, rtol=2e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_vmap_over_a_split_axis_of_an_explicit_mesh(loss, reduction):
    """With targets that all examples share, and are not on the mesh."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 6)), jnp.float32)
    weight, labels = jnp.linspace(0.5, 1.5, 6), jnp.array([0, 5, -100, 2, 1])
    targets = jax.nn.one_hot(labels, 6) if loss == "probabilities" else labels
    call = jaxloss.nll_loss if loss == "nll_loss" else jaxloss.cross_entropy
    function = jax.vmap(jax.value_and_grad(lambda z: call(z, targets, weight=weight, reduction=reduction)))
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        found = jax.jit(function)(jax.device_put(logits, NamedSharding(mesh, P("x"))))
    assert_trees_close(jax.device_get(found), jax.device_get(function(logits)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("spec", [P(), P("d"), P("d", "m"), P(None, ("d", "m")), P("m")], ids=str)
def test_nll_loss_and_kl_div_take_targets_that_are_split_otherwise(spec, reduction):
    log_probs, targets, weight = make_inputs("index")
    _, masses, _ = make_inputs("probability")
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(log_probs, NamedSharding(mesh, spec))
        for place in (P(), P("d")):
            labels, weights, probabilities = (
                jax.device_put(x, NamedSharding(mesh, place)) for x in (targets, weight, masses)
            )
            found = jaxloss.nll_loss(split, labels, weight=weights, reduction=reduction)
            expected = jaxloss.nll_loss(log_probs, targets, weight=weight, reduction=reduction)
            np.testing.assert_allclose(jax.device_get(found), expected, rtol=2e-6)
            found = jaxloss.kl_div(split, probabilities, reduction=reduction)
            expected = jaxloss.kl_div(log_probs, masses, reduction=reduction)
            np.testing.assert_allclose(jax.device_get(found), expected, rtol=2e-6)
