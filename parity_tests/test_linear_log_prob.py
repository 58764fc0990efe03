"""linear_log_prob against torch.distributions.Categorical, and what confident, ignored and impossible classes give."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxloss
from parity_tests.gates import assert_errors_within_ratio, assert_float64_close, assert_identical
from parity_tests.hlo import gathered_sizes
from parity_tests.losses import round_to, to_torch

TOKENS, FEATURES, CLASSES = 13, 6, 11
BUDGET = 4 * 2 * 4 * CLASSES


def draw(tokens: int = TOKENS, classes: int = CLASSES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "inputs": rng.normal(size=(tokens, FEATURES)),
        "linear_weight": rng.normal(size=(classes, FEATURES)),
        "linear_bias": rng.normal(size=classes),
        "temperature": np.array(0.7),
        "targets": rng.integers(0, classes, tokens),
    }


def cotangents(targets: np.ndarray) -> np.ndarray:
    """Factors of the log-probabilities and the entropies in the sum whose gradients are compared."""
    return np.random.default_rng(1).normal(size=(2, *targets.shape))


def categorical(arrays: dict[str, np.ndarray], dtype: str, ignore_index: int = -100) -> dict[str, torch.Tensor]:
    """The three quantities and the gradients of a weighted sum of the first two, in PyTorch."""
    tensors = {k: to_torch(v, dtype if v.dtype == np.float64 else None) for k, v in arrays.items()}
    wanted = {k: v.requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    targets, classes = tensors["targets"], len(tensors["linear_weight"])
    weight = tensors["linear_weight"].reshape(classes, -1, FEATURES)
    logits = torch.einsum("...f,cmf->...mc", tensors["inputs"], weight)
    if "linear_bias" in tensors:
        logits = logits + tensors["linear_bias"].reshape(classes, -1).T
    removed = logits == -torch.inf  # no cap brings them back, and no derivative multiplies them by 0
    capped = logits.masked_fill(removed, 0)
    if "logit_softcap" in tensors:
        capped = tensors["logit_softcap"] * torch.tanh(capped / tensors["logit_softcap"])
    temperature = tensors.get("temperature", torch.ones(()))
    logits = torch.where(removed, logits / temperature.detach(), capped / temperature)
    logits = logits.reshape(*targets.shape, classes)
    policy = torch.distributions.Categorical(logits=logits, validate_args=False)
    kept = targets != ignore_index
    log_prob = policy.log_prob(torch.where(kept, targets, 0))
    found = {name: torch.where(kept, x, 0) for name, x in (("log_prob", log_prob), ("entropy", policy.entropy()))}
    total = sum(
        (torch.tensor(c).to(v.dtype) * v).sum() for c, v in zip(cotangents(targets), found.values(), strict=True)
    )
    gradients = torch.autograd.grad(total, list(wanted.values()))
    return found | {"argmax": logits.argmax(-1)} | dict(zip(wanted, gradients, strict=True))


def ours(
    arrays: dict[str, np.ndarray], dtype: str, ignore_index: int = -100, budget: int | None = BUDGET
) -> dict[str, jax.Array]:
    """The same in slabs of a few tokens."""
    options = {"ignore_index": ignore_index, "memory_budget": budget, "targets": jnp.asarray(arrays["targets"])}
    floating = {k: jnp.asarray(v, dtype) for k, v in arrays.items() if k != "targets"}

    def weighted(floating: dict) -> tuple[jax.Array, jaxloss.LinearLogProb]:
        found = jaxloss.linear_log_prob(**floating, **options)
        factors = cotangents(arrays["targets"])
        return sum(jnp.sum(jnp.asarray(c, v.dtype) * v) for c, v in zip(factors, found[:2], strict=True)), found

    gradients, found = jax.grad(weighted, has_aux=True)(floating)
    return found._asdict() | gradients


def test_float64_values_and_gradients_equal_those_of_categorical(x64):
    a, b = ours(draw(), "float64"), categorical(draw(), "float64")
    assert_identical(a.pop("argmax"), b.pop("argmax").int())
    assert_float64_close(a, b)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arrays and options."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leading = draw(st.sampled_from([(), (0,), (1,), (TOKENS,), (2, 3)]))
    inner = draw(st.sampled_from([(), (2,), (2, 3)])) if len(leading) == 1 else ()
    classes = draw(st.integers(1, CLASSES))
    bias = rng.normal(size=(classes, *inner))
    if classes > 1 and draw(st.booleans()):
        bias[rng.integers(classes)] = -np.inf
    optional = {"linear_bias": bias, "logit_softcap": np.array(3.0), "temperature": np.array(0.7)}
    arrays = {name: array for name, array in optional.items() if draw(st.booleans())}
    arrays["inputs"] = rng.normal(size=(*leading, FEATURES)) * draw(st.sampled_from([0.0, 1.0, 10.0]))
    arrays["linear_weight"] = rng.normal(size=(classes, *inner, FEATURES))
    ignore_index = draw(st.sampled_from([-100, -1, 0, classes]))
    ignored = rng.random((*leading, *inner)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    arrays["targets"] = np.where(ignored, ignore_index, rng.integers(0, classes, ignored.shape))
    budget = draw(st.sampled_from([None, 1, 5 * 3 * 8 * classes]))
    return {"arrays": arrays, "ignore_index": ignore_index, "budget": budget}


@settings(max_examples=settings.default.max_examples // 10)
@given(calls())
def test_generated_calls_equal_categorical(call):
    with jax.enable_x64(True):
        found = ours(call["arrays"], "float64", call["ignore_index"], call["budget"])
    expected = categorical(call["arrays"], "float64", call["ignore_index"])
    del found["argmax"], expected["argmax"]  # which of several maxima depends on their rounding
    assert_float64_close(found, expected, may_be_empty=True)


def test_a_wrong_temperature_fails_that_comparison(x64):
    wrong = draw() | {"temperature": np.array(0.7000001)}
    with pytest.raises(AssertionError):
        assert_float64_close(ours(wrong, "float64")["entropy"], categorical(draw(), "float64")["entropy"])


@pytest.mark.rounding
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["plain", "confident"])
def test_float32_error_is_no_worse_than_that_of_categorical(scale):
    cases: dict[str, list] = {}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        arrays = {k: round_to(v, "float32") if v.dtype == np.float64 else v for k, v in draw().items()}
        arrays["inputs"] = round_to(scale * rng.normal(size=(TOKENS, FEATURES)), "float32")
        found, theirs = ours(arrays, "float32"), categorical(arrays, "float32")
        with jax.enable_x64(True):
            exact = ours(arrays, "float64")
        for key in found.keys() - {"argmax"}:
            cases.setdefault(key, []).append((found[key], theirs[key], exact[key]))
    for triples in cases.values():
        assert_errors_within_ratio(triples)


def test_bfloat16_inputs_give_float32_results(x64):
    arrays = {k: round_to(v, "bfloat16") if v.dtype == np.float64 else v for k, v in draw().items()}
    half = ours(arrays, "bfloat16")
    assert (half["log_prob"].dtype, half["entropy"].dtype) == (jnp.float32, jnp.float32)
    assert half["inputs"].dtype == jnp.bfloat16
    exact = ours(arrays, "float64")
    for key in ("log_prob", "entropy"):
        np.testing.assert_allclose(half[key], exact[key], rtol=2e-6)


def test_second_derivatives_match_finite_differences(x64):
    arrays = {k: jnp.asarray(v) for k, v in draw(5).items()}
    targets = arrays.pop("targets").at[2].set(-100)

    def weighted(arrays: dict) -> jax.Array:
        found = jaxloss.linear_log_prob(targets=targets, memory_budget=BUDGET, logit_softcap=3.0, **arrays)
        return jnp.sum(found.log_prob * found.entropy)

    check_grads(weighted, (arrays,), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_vmap_and_jit_give_the_plain_result():
    arrays = {k: jnp.asarray(v) for k, v in draw().items()}
    plain = jaxloss.linear_log_prob(**arrays)
    many = jax.vmap(lambda x: jaxloss.linear_log_prob(**(arrays | {"inputs": x})))(arrays["inputs"][None])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), jax.tree.map(lambda x: x[0], many), plain)
    jitted = jax.jit(lambda a: jaxloss.linear_log_prob(**a))(arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), jitted, plain)


def test_confident_tokens_are_exact():
    found = jaxloss.linear_log_prob(jnp.array([[20.0]]), jnp.array([[1.0], [0.0], [0.0]]), jnp.array([0]))
    rest = np.exp(-20.0)
    np.testing.assert_allclose(found.log_prob, -np.log1p(2 * rest), rtol=1e-6)
    np.testing.assert_allclose(found.entropy, np.log1p(2 * rest) + 2 * 20 * rest / (1 + 2 * rest), rtol=1e-6)
    slope = jax.grad(lambda x: jaxloss.linear_log_prob(x, jnp.array([[1.0], [0.0], [0.0]]), jnp.array([0])).entropy[0])
    np.testing.assert_allclose(slope(jnp.array([[20.0]])), [[-2 * 20 * rest]], rtol=1e-5)


def test_ignored_tokens_are_zero_even_with_nan_inputs():
    arrays = {k: jnp.asarray(v, jnp.float32 if v.dtype == np.float64 else None) for k, v in draw().items()}
    arrays["inputs"] = arrays["inputs"].at[3].set(jnp.nan)
    arrays["targets"] = arrays["targets"].at[3].set(-100)

    def total(inputs):
        found = jaxloss.linear_log_prob(**(arrays | {"inputs": inputs}))
        return jnp.sum(found.log_prob + found.entropy), found

    gradient, found = jax.grad(total, has_aux=True)(arrays["inputs"])
    assert (found.log_prob[3], found.entropy[3]) == (0, 0)
    assert not np.signbit(found.log_prob[3])
    assert not np.any(gradient[3])
    assert np.isfinite(gradient).all()
    for tangent in jax.jvp(lambda x: total(x)[1][:2], (arrays["inputs"],), (jnp.ones_like(arrays["inputs"]),))[1]:
        assert tangent[3] == 0
        assert np.isfinite(tangent).all()


def test_edge_values():
    weight = jnp.zeros((3, 2))
    bias = jnp.array([0.0, -jnp.inf, 0.0])
    removed = jaxloss.linear_log_prob(jnp.ones((2, 2)), weight, jnp.array([0, 1]), linear_bias=bias)
    np.testing.assert_allclose(removed.log_prob, [-np.log(2), -np.inf], rtol=1e-6)
    np.testing.assert_allclose(removed.entropy, [np.log(2)] * 2, rtol=1e-6)
    assert removed.argmax.tolist() == [0, 0]
    nothing = jaxloss.linear_log_prob(jnp.ones((1, 2)), weight, jnp.array([0]), linear_bias=jnp.full(3, -jnp.inf))
    assert np.isnan(nothing.log_prob).all()
    assert np.isnan(nothing.entropy).all()
    empty = jaxloss.linear_log_prob(jnp.ones((0, 2)), weight, jnp.zeros(0, int))
    assert [x.shape for x in empty] == [(0,)] * 3
    wrong = jax.jit(jaxloss.linear_log_prob)(jnp.ones((2, 2)), weight, jnp.array([0, 3]))
    assert np.isnan(wrong.log_prob).tolist() == [False, True]
    with pytest.raises(IndexError, match=r"Target 3 is out of bounds\."):
        jaxloss.linear_log_prob(jnp.ones((2, 2)), weight, np.array([0, 3]))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        jaxloss.linear_log_prob(jnp.ones((2, 2)), weight, np.array([0, 1]), temperature=0.0)
    with pytest.raises(ValueError, match="at least one class"):
        jaxloss.linear_log_prob(jnp.ones((2, 2)), weight[:0], np.array([-100, -100]))
    with pytest.raises(TypeError, match="targets must be integers"):
        jaxloss.linear_log_prob(jnp.ones((2, 2)), weight, np.ones((2, 3)) / 3)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_any_leading_axes_and_inner_axes(leading):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(*leading, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    t = rng.integers(0, 5, leading)
    found = jaxloss.linear_log_prob(x, w, t)
    np.testing.assert_allclose(found.log_prob, -jaxloss.cross_entropy(x @ w.T, t, reduction="none"), rtol=1e-5)
    inner = jaxloss.linear_log_prob(x.reshape(-1, 4), np.stack([w, 2 * w], 1), np.stack([t.ravel()] * 2, 1))
    assert inner.entropy.shape == (t.size, 2)
    np.testing.assert_allclose(inner.log_prob[:, 0].reshape(leading), found.log_prob, rtol=1e-5)
    np.testing.assert_array_equal(inner.argmax[:, 1].reshape(leading), found.argmax)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_split_tokens_and_classes_give_the_single_device_result(kind):
    arrays = {k: jnp.asarray(v, jnp.float32 if v.dtype == np.float64 else None) for k, v in draw(32, 64).items()}
    arrays["linear_weight"] = arrays["linear_weight"].at[40].set(arrays["linear_weight"][7])  # two equal maxima
    arrays["linear_bias"] = arrays["linear_bias"].at[40].set(arrays["linear_bias"][7])
    arrays["temperature"] = jnp.float32(1)

    def step(arrays):
        def total(inputs):
            found = jaxloss.linear_log_prob(**(arrays | {"inputs": inputs}), memory_budget=8 * 2 * 4 * 64)
            return jnp.sum(found.log_prob * found.entropy), found

        return jax.grad(total, has_aux=True)(arrays["inputs"])

    expected = jax.jit(step)(arrays)
    assert 7 in expected[1].argmax
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    specs = {"inputs": P("data"), "targets": P("data"), "linear_weight": P("model"), "linear_bias": P("model")}
    with jax.set_mesh(mesh):
        split = {k: jax.device_put(v, NamedSharding(mesh, specs.get(k, P()))) for k, v in arrays.items()}
        compiled = jax.jit(step).lower(split).compile()
        found = jax.device_get(compiled(split))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, jax.device_get(expected))
    # An Auto mesh gathers each shard's best class for argmax: O(tokens).
    assert max(gathered_sizes(compiled), default=0) <= (32 if kind is AxisType.Auto else 0)


@pytest.mark.parametrize("names", ["x", ("x", "y")], ids=["one axis", "two axes"])
def test_class_axis_name_in_shard_map_gives_the_single_device_result(names):
    arrays = {k: jnp.asarray(v, jnp.float32 if v.dtype == np.float64 else None) for k, v in draw(8, 64).items()}

    def step(arrays, name=None):
        def total(weight):
            found = jaxloss.linear_log_prob(**(arrays | {"linear_weight": weight}), class_axis_name=name)
            return jnp.sum(found.log_prob * found.entropy), found

        return jax.grad(total, has_aux=True)(arrays["linear_weight"])

    specs = {k: P(names) if k in ("linear_weight", "linear_bias") else P() for k in arrays}
    mesh = jax.make_mesh((8,) if names == "x" else (4, 2), tuple(names), axis_types=(AxisType.Auto,) * len(names))
    sharded = jax.shard_map(partial(step, name=names), mesh=mesh, in_specs=(specs,), out_specs=(P(names), P()))
    found, expected = jax.jit(sharded)(arrays), jax.jit(step)(arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_temporaries_stay_within_the_budget_and_unused_results_cost_nothing():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1000, 64), (8192, 64))]
    targets = jax.ShapeDtypeStruct((1000,), jnp.int32)

    def lowered(of, budget=2**20):
        return jax.jit(lambda x, w, t: of(jaxloss.linear_log_prob(x, w, t, memory_budget=budget))).lower(
            *shapes, targets
        )

    temporaries = lowered(lambda found: found[:2]).compile().memory_analysis().temp_size_in_bytes
    assert temporaries <= 2**20 + 2**20
    exponentials = [lowered(of).compile().as_text().count(" exponential(") for of in (lambda f: f[0], lambda f: f[:2])]
    assert exponentials[0] < exponentials[1]
