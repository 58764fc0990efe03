"""linear_cross_entropy with tokens and classes split over eight devices: same values, and next to nothing moves."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from benchmarks.hlo import collectives
from parity_tests.hlo import gathered_sizes

ROOT = Path(__file__).parents[1]
TOKENS, FEATURES, CLASSES = 32, 8, 128
PER_TOKEN = 2 * 4 * CLASSES  # bytes of a slab's buffers where nothing is split
EVERY = (0, 1, 2, 3)
SPLITS = {"tokens": (("d", "m"), None), "classes": (None, ("d", "m")), "both": ("d", "m")}


def draw(kind: str, classes: int = CLASSES) -> list[jax.Array]:
    """inputs, linear_weight, linear_bias, weight and targets."""
    rng = np.random.default_rng(0)
    shapes = [(TOKENS, FEATURES), (classes, FEATURES), (classes,)]
    arrays = [rng.normal(size=shape) for shape in shapes] + [rng.uniform(0.5, 2, classes)]
    targets = jnp.asarray(rng.integers(0, classes, TOKENS)).at[3].set(-100)
    if kind == "probability":
        targets = jnp.asarray(rng.dirichlet(np.ones(classes), TOKENS), jnp.float32)
    return [*(jnp.asarray(a, jnp.float32) for a in arrays), targets]


def loss(x, w, b, c, t, *, label_smoothing=0.1, **options):
    """Every option at once; a scalar also for reduction="none"."""
    options = {"z_loss": 0.01, "logit_softcap": 4.0, "memory_budget": 8 * PER_TOKEN} | options
    rows = jaxloss.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, label_smoothing=label_smoothing, **options)
    return jnp.sum(jnp.sin(rows)) if rows.ndim else rows


def assert_trees_close(ours, expected) -> None:
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), jax.device_get(ours), jax.device_get(expected)
    )


def specs(tokens, classes, targets: jax.Array) -> tuple[P, ...]:
    return P(tokens), P(classes), P(classes), P(classes), P(tokens, *[classes] * (targets.ndim - 1))


def split_over(mesh: jax.sharding.Mesh, split: str, arrays: list[jax.Array]) -> list[jax.Array]:
    placed = zip(arrays, specs(*SPLITS[split], arrays[-1]), strict=True)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in placed]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_split_arrays_give_the_single_device_result_and_are_not_gathered(split, axis_type, reduction, kind):
    arrays = draw(kind)
    # More than one slab everywhere: the budget counts a device's own tokens and classes on explicit axes alone.
    tokens_per_slab = 8 if axis_type is AxisType.Auto else 2
    step = jax.value_and_grad(partial(loss, reduction=reduction, memory_budget=tokens_per_slab * PER_TOKEN), EVERY)
    expected = jax.jit(step)(*arrays)
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        placed = split_over(mesh, split, arrays)
        compiled = jax.jit(step).lower(*placed).compile()
        assert_trees_close(compiled(*placed), expected)
    assert not gathered_sizes(compiled)
    local_classes = CLASSES // (1 if SPLITS[split][1] is None else 4 if split == "both" else 8)
    crossing = collectives(compiled)
    assert any(found.in_loop for found in crossing) or split == "tokens"
    for size in (size for found in crossing for size in found.sizes):
        # Rows, gradients of the inputs, and where tokens are split the gradient of this device's classes.
        assert size <= max(TOKENS * FEATURES, 0 if split == "classes" else local_classes * FEATURES)
    if axis_type is AxisType.Explicit:
        in_loop = [size for found in crossing if found.in_loop for size in found.sizes]
        allowed = TOKENS if reduction != "none" else TOKENS * FEATURES
        assert max(in_loop, default=0) <= allowed, "the gradients of what is shared are to cross once"


def test_gathered_arrays_are_seen():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((TOKENS, FEATURES)), NamedSharding(mesh, P("x")))
    moved = jax.jit(lambda x: x[::-1] * 2, out_shardings=NamedSharding(mesh, P())).lower(x).compile()
    assert max(gathered_sizes(moved)) == TOKENS * FEATURES


@pytest.mark.parametrize("transform", ["hvp", "vmap of grad", "checkpoint"])
def test_transforms_on_an_explicit_mesh(transform):
    arrays = draw("index")
    tangent = jnp.cos(arrays[0])

    def step(x, w, b, c, t):
        if transform == "hvp":
            return jax.jvp(jax.grad(lambda x: loss(x, w, b, c, t)), (x,), (tangent * x,))
        if transform == "checkpoint":
            return jax.grad(jax.checkpoint(loss))(x, w, b, c, t)
        return jax.vmap(lambda s: jax.grad(loss)(x * s, w, b, c, t))(jnp.array([1.0, 0.5]))

    expected = jax.jit(step)(*arrays)
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        tangent = jax.device_put(tangent, NamedSharding(mesh, P("d")))
        assert_trees_close(jax.jit(step)(*split_over(mesh, "both", arrays)), expected)


def test_weight_split_over_the_tokens_axis_is_gathered_and_its_gradient_stays_split():
    arrays = draw("index")
    step = jax.value_and_grad(loss, EVERY)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, P("d"))) for x in arrays]
        found = jax.jit(step)(*placed)
        assert jax.typeof(found[1][1]).sharding.spec == P("d", None)
        assert_trees_close(found, jax.jit(step)(*draw("index")))


def test_batch_and_sequence_may_both_be_split_on_an_explicit_mesh():
    x, w, _, _, t = draw("index")
    step = jax.value_and_grad(jaxloss.linear_cross_entropy, (0, 1))
    expected = jax.jit(step)(x.reshape(4, 8, FEATURES), w, t.reshape(4, 8))
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x.reshape(4, 8, FEATURES), NamedSharding(mesh, P("d", "m"))),
            jax.device_put(w, NamedSharding(mesh, P(None, "d"))),  # features split too: gathered, as they must be
            jax.device_put(t.reshape(4, 8), NamedSharding(mesh, P())),
        ]
        found = jax.jit(step)(*placed)
        assert jax.typeof(found[1][0]).sharding.spec == P("d", "m", None)
        assert_trees_close(found, expected)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("place", ["grad inside", "grad outside"])
@pytest.mark.parametrize("names", ["x", ("x", "y")], ids=["one axis", "two axes"])
def test_class_axis_name_in_shard_map_gives_the_single_device_result(kind, place, names):
    arrays = draw(kind)
    inside = partial(loss, class_axis_name=names)
    in_specs = specs(None, names, arrays[-1])
    mesh = jax.make_mesh((8,) if names == "x" else (4, 2), tuple(names), axis_types=(AxisType.Auto,) * len(names))
    sharded = partial(jax.shard_map, mesh=mesh, in_specs=in_specs)
    if place == "grad inside":
        step = sharded(jax.value_and_grad(inside, EVERY), out_specs=(P(), in_specs[:4]))
    else:
        step = jax.value_and_grad(sharded(inside, out_specs=P()), EVERY)
    assert_trees_close(jax.jit(step)(*arrays), jax.value_and_grad(loss, EVERY)(*arrays))


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_tokens_and_classes_split_in_shard_map(kind):
    arrays = draw(kind)

    def local(x, w, b, c, t):
        return jax.lax.psum(loss(x, w, b, c, t, class_axis_name="m", reduction="sum"), "d")

    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs("d", "m", arrays[-1]), out_specs=P())
    # Smoothing and z-loss are shared by all shards: their gradients must not be counted once for each.
    found = jax.jit(jax.value_and_grad(sharded, EVERY))(*arrays)
    assert_trees_close(found, jax.value_and_grad(partial(loss, reduction="sum"), EVERY)(*arrays))


def test_gradient_to_shared_scalars_inside_shard_map_is_counted_once():
    x, w, b, c, t = draw("index")

    def total(options, x, t):
        return jaxloss.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, reduction="sum", **options)

    def local(options, x, t):
        return jax.lax.psum(total(options, x, t), "d")

    options = {"label_smoothing": jnp.float32(0.1), "z_loss": jnp.float32(0.01), "logit_softcap": jnp.float32(4)}
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P())
    assert_trees_close(jax.jit(jax.grad(sharded))(options, x, t), jax.grad(total)(options, x, t))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_vocabulary_padded_with_minus_infinity_changes_nothing(axis_type):
    x, w, b, c, t = draw("index", 125)
    expected = jax.value_and_grad(partial(loss, label_smoothing=0.0, logit_softcap=None), EVERY)(x, w, b, c, t)
    padded = [
        x,
        jnp.pad(w, ((0, 3), (0, 0))),
        jnp.pad(b, (0, 3), constant_values=-jnp.inf),
        jnp.pad(c, (0, 3), constant_values=1.0),
        t,
    ]
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(axis_type,) * 2)
    step = jax.jit(jax.value_and_grad(partial(loss, label_smoothing=0.0, logit_softcap=None), EVERY))
    with jax.set_mesh(mesh):
        value, (dx, *rest) = jax.device_get(step(*split_over(mesh, "both", padded)))
    assert_trees_close((value, (dx, *(g[:125] for g in rest))), expected)
    assert not any(np.any(g[125:]) for g in rest)
    unmasked = [*padded[:2], jnp.pad(b, (0, 3)), *padded[3:]]
    with pytest.raises(AssertionError):
        assert_trees_close(step(*unmasked)[0], expected[0])


def test_readme_step_trains_on_one_device_and_on_an_explicit_mesh():
    step, many = (ROOT / "README.md").read_text().split("## Large vocabularies")[1].split("```python\n")[1:3]
    rng = np.random.default_rng(0)
    names = {
        "kernel": jnp.asarray(rng.normal(size=(FEATURES, CLASSES)), jnp.float32),
        "bias": jnp.zeros(CLASSES),
        "hidden": jnp.asarray(rng.normal(size=(4, 16, FEATURES)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, CLASSES, (4, 16))),
    } | {"jax": jax, "jnp": jnp, "jaxloss": jaxloss, "optax": optax}
    names["optimizer"] = optax.sgd(0.1)  # Adam would magnify rounding
    exec(step.split("```")[0], names)  # ours: the blocks that readers run
    params = {"head": {"kernel": names["kernel"] + 0, "bias": names["bias"] + 0}}
    single = names["train_step"](params, names["optimizer"].init(params), names["hidden"], names["labels"])
    exec(many.split("```")[0], names)
    assert jax.typeof(names["params"]["head"]["kernel"]).sharding.spec == P(None, "model")
    assert_trees_close((names["params"], names["loss"]), (single[0], single[2]))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("split_tokens", [False, True])
def test_shard_map_over_the_classes_alone_on_an_explicit_mesh(split_tokens, check_vma):
    x, w, _, weight, t = draw("index")
    losses = {
        "linear": lambda x, w, c, t, **o: jaxloss.linear_cross_entropy(x, w, t, weight=c, reduction="sum", **o),
        "logits": lambda x, w, c, t, **o: jaxloss.cross_entropy(x @ w.T, t, weight=c, reduction="sum", **o),
        "log_prob": lambda x, w, c, t, **o: jnp.sum(jaxloss.linear_log_prob(x, w, t, **o).log_prob),
    }
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        tokens = P("d") if split_tokens else P()
        by_axis = (tokens, P("m"), P("m"), tokens)
        placed = tuple(map(jax.device_put, (x, w, weight, t), by_axis))
        for loss in losses.values():
            split = jax.shard_map(
                partial(loss, class_axis_name="m"),
                in_specs=(P(), P("m"), P("m"), P()),
                out_specs=P(),
                axis_names={"m"},
                check_vma=check_vma,
            )
            np.testing.assert_allclose(jax.jit(split)(*placed), loss(x, w, weight, t), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_where_nothing_tracks_what_varies_over_the_classes(reduction):
    x, w, _, weight, t = draw("index")

    def loss(x, w, weight, **options):
        options |= {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
        return jnp.sum(jaxloss.linear_cross_entropy(x, w, t, **options))

    expected = jax.grad(loss, (0, 1, 2))(x, w, weight)
    along = jax.jvp(loss, (x, w, weight), (x, w, weight))[1]
    split = partial(loss, class_axis_name="m")
    specs, mesh = (P(), P("m"), P("m")), jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    in_shard_map = jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)

    def in_vmap(x, w, weight):
        shards = w.reshape(8, -1, FEATURES), weight.reshape(8, -1)
        return jax.vmap(split, (None, 0, 0), axis_name="m")(x, *shards)[0]

    for function in (in_shard_map, in_vmap):
        assert_trees_close(jax.jit(jax.grad(function, (0, 1, 2)))(x, w, weight), expected)
        np.testing.assert_allclose(jax.jvp(function, (x, w, weight), (x, w, weight))[1], along, rtol=2e-5)


@pytest.mark.parametrize("on_mesh", ["targets", "linear_bias", "weight"])
def test_one_array_alone_may_be_on_an_explicit_mesh(on_mesh):
    x, w, b, c, t = draw("index")
    options = {"targets": t, "linear_bias": b, "weight": c}
    step = jax.grad(lambda x, w, o: jaxloss.linear_cross_entropy(x, w, **o), (0, 1))
    expected = step(x, w, options)
    with jax.set_mesh(jax.make_mesh((8,), ("m",), axis_types=(AxisType.Explicit,))):
        placed = options | {on_mesh: jax.device_put(options[on_mesh], P("m"))}
        assert_trees_close(jax.jit(step)(x, w, placed), expected)


def test_out_of_range_targets_on_an_explicit_mesh_are_nan():
    arrays = draw("index")
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x, w, _, _, t = split_over(mesh, "both", [*arrays[:4], arrays[4].at[5].set(CLASSES)])
        rows = jax.jit(partial(jaxloss.linear_cross_entropy, reduction="none"))(x, w, t)
    assert np.flatnonzero(np.isnan(jax.device_get(rows))).tolist() == [5]
