"""linear_cross_entropy against PyTorch's, against our own cross_entropy of the whole logits, and in memory."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import jaxloss
from jaxloss import _slabs
from jaxloss._class_axis import on_cpu, undivided
from parity_tests.gates import HALF_UNIT, assert_errors_within_ratio, assert_float64_close, relative_l2
from parity_tests.losses import round_to, to_torch

TOKENS, FEATURES, CLASSES = 13, 6, 11


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes and options of one call."""
    leading = draw(st.sampled_from([(), (1,), (TOKENS,)]))
    soft = draw(st.booleans())
    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }
    if not soft:
        options["ignore_index"] = draw(st.sampled_from([None, -100, 3]))
    return {
        "leading": leading,
        "inner": draw(st.sampled_from([(), (), (2,), (2, 3)])) if leading else (),
        "soft": soft,
        "optional": [name for name in ("linear_bias", "weight") if draw(st.booleans())],
        "options": options,
        "budget": draw(st.sampled_from([None, 1, 5 * 3 * 8 * CLASSES])),
    }


def fill(layout: dict[str, Any], seed: int, dtype: str = "float64") -> dict[str, Any]:
    """A call of that layout: arrays in PyTorch's layout, with values that the dtype holds."""
    rng = np.random.default_rng(seed)
    leading, inner = layout["leading"], layout["inner"]
    arrays = {
        "inputs": rng.normal(size=(*leading, FEATURES)),
        "linear_weight": rng.normal(size=(CLASSES, *inner, FEATURES)) * 0.5,
        "linear_bias": rng.normal(size=(CLASSES, *inner)),
        "weight": rng.uniform(0.2, 2, CLASSES),
        "targets": rng.dirichlet(np.ones(CLASSES), (*leading, *inner)),
    }
    wanted = {"inputs", "linear_weight", "targets", *layout["optional"]}
    arrays = {k: v if dtype == "float64" else round_to(v, dtype) for k, v in arrays.items() if k in wanted}
    arrays["targets"] = np.moveaxis(arrays["targets"], -1, len(leading))
    if not layout["soft"]:
        arrays["targets"] = rng.integers(0, CLASSES, (*leading, *inner))
    return {"arrays": arrays, "options": layout["options"], "budget": layout["budget"]}


def evaluate_jax(case: dict, dtype: str) -> dict[str, jax.Array]:
    arrays = {k: jnp.asarray(v, dtype if v.dtype == np.float64 else None) for k, v in case["arrays"].items()}
    floating = {k: v for k, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    def loss(floating: dict) -> tuple[jax.Array, jax.Array]:
        result = jaxloss.linear_cross_entropy(**(arrays | floating), **case["options"], memory_budget=case["budget"])
        return jnp.sum(result.astype(jnp.float64 if dtype == "float64" else jnp.float32)), result

    gradients, result = jax.grad(loss, has_aux=True)(floating)
    return {"loss": result} | {f"d{k}": v for k, v in gradients.items()}


def evaluate_torch(case: dict, dtype: str) -> dict[str, torch.Tensor]:
    tensors = {k: to_torch(v, dtype if v.dtype == np.float64 else None) for k, v in case["arrays"].items()}
    wanted = {k: v.requires_grad_() for k, v in tensors.items() if v.is_floating_point() and k != "weight"}
    tensors["input"], tensors["target"] = tensors.pop("inputs"), tensors.pop("targets")
    result = F.linear_cross_entropy(**tensors, **case["options"])
    gradients = torch.autograd.grad(result.sum(), list(wanted.values()))
    return {"loss": result} | {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}


@settings(max_examples=settings.default.max_examples // 10)
@given(layouts(), st.integers(0, 2**32 - 1))
def test_float64_values_and_gradients_equal_pytorch(layout, seed):
    case = fill(layout, seed)
    with jax.enable_x64(True):
        ours = evaluate_jax(case, "float64")
    theirs = evaluate_torch(case, "float64")
    assert_float64_close({k: ours[k] for k in theirs}, theirs)


def assert_no_worse_than_pytorch(layout: dict[str, Any], dtype: str) -> None:
    """The ratio gate on the loss and every gradient, pooled over seeds."""
    results: dict[str, list] = {}
    for seed in range(20):
        case = fill(layout, seed, dtype)
        ours, theirs = evaluate_jax(case, dtype), evaluate_torch(case, dtype)
        with jax.enable_x64(True):
            oracle = evaluate_jax(case, "float64")
        for key in theirs:
            results.setdefault(key, []).append((ours[key], theirs[key], oracle[key]))
    for found in results.values():
        assert_errors_within_ratio(found)


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=settings.default.max_examples // 80)
@given(layouts())
def test_error_against_float64_is_no_worse_than_pytorchs(dtype, layout):
    assert_no_worse_than_pytorch(layout, dtype)


@pytest.mark.rounding
def test_bfloat16_inputs_accumulate_in_float32_within_and_across_slabs():
    layout = {"leading": (512,), "inner": (), "soft": False, "optional": ["linear_bias"], "budget": 1}

    def evaluate(dtype: str, reduction: str) -> dict[str, jax.Array]:
        result = {"dtype": "float64" if dtype == "float64" else "float32"}
        return evaluate_jax(fill(layout | {"options": {"reduction": reduction} | result}, 0, "bfloat16"), dtype)

    with jax.enable_x64(True):
        exact = evaluate("float64", "none"), evaluate("float64", "mean")
    np.testing.assert_allclose(evaluate("bfloat16", "none")["loss"], exact[0]["loss"], rtol=1e-5)
    # The gradient of the logits is rounded once, as an operand, and the sum once, as a result.
    gradient = evaluate("bfloat16", "mean")["dlinear_weight"]
    assert relative_l2(gradient, exact[1]["dlinear_weight"]) < HALF_UNIT["bfloat16"]


def materialised(inputs, linear_weight, targets, *, linear_bias=None, logit_softcap=None, **options):
    logits = jnp.einsum("nf,c...f->nc...", inputs, linear_weight)
    logits = logits if linear_bias is None else logits + linear_bias[None]
    logits = logits if logit_softcap is None else logit_softcap * jnp.tanh(logits / logit_softcap)
    return jaxloss.cross_entropy(logits, targets, axis=1, **options)


ARGUMENTS = ("inputs", "linear_weight", "linear_bias", "weight", "label_smoothing", "z_loss", "logit_softcap")


def draw(kind: str) -> tuple[dict[str, jax.Array], jax.Array]:
    rng = np.random.default_rng(0)
    inner = (2,) if kind == "two outputs" else ()
    arrays = {
        "inputs": rng.normal(size=(TOKENS, FEATURES)),
        "linear_weight": rng.normal(size=(CLASSES, *inner, FEATURES)),
        "linear_bias": rng.normal(size=(CLASSES, *inner)),
        "weight": rng.uniform(0.5, 2, CLASSES),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_softcap": 3.0,
    }
    targets = jnp.asarray(rng.integers(0, CLASSES, (TOKENS, *inner))).at[2].set(-100)
    if kind == "probability":
        targets = jnp.asarray(rng.dirichlet(np.ones(CLASSES), TOKENS))
    return {k: jnp.asarray(v) for k, v in arrays.items()}, targets


def both(kind: str, reduction: str) -> tuple[Any, Any, dict]:
    """Ours in slabs of four tokens and the materialised one, as functions of a dict of everything differentiable."""
    arrays, targets = draw(kind)
    if kind == "probability":
        arrays["targets"] = targets
    budget = 4 * 2 * 8 * int(np.prod(arrays["linear_weight"].shape[:-1]))

    def of(function, **extra):
        def loss(arrays):
            arguments = {"targets": targets} | arrays
            first = [arguments.pop(k) for k in ("inputs", "linear_weight", "targets")]
            return jnp.sum(function(*first, reduction=reduction, **arguments, **extra))

        return loss

    return of(jaxloss.linear_cross_entropy, memory_budget=budget), of(materialised), arrays


TRANSFORMS = {
    "grad": jax.grad,
    "jvp": lambda f: lambda a: jax.jvp(f, (a,), (jax.tree.map(jnp.cos, a),)),
    "jacfwd": jax.jacfwd,
    "forward over reverse": lambda f: lambda a: jax.jvp(jax.grad(f), (a,), (jax.tree.map(jnp.cos, a),)),
    "reverse over reverse": lambda f: jax.grad(
        lambda a: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(jax.grad(f)(a)))
    ),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "vmap": lambda f: lambda a: jax.vmap(f)(jax.tree.map(lambda x: jnp.stack([x, x * 0.9]), a)),
    "vmap of grad": lambda f: lambda a: jax.vmap(jax.grad(f))(jax.tree.map(lambda x: jnp.stack([x, x * 0.9]), a)),
    "scan": lambda f: jax.grad(lambda a: jax.lax.scan(lambda c, s: (c + s * f(a), None), 0.0, jnp.arange(3.0))[0]),
}


@pytest.mark.parametrize(
    ("kind", "reduction", "transform"),
    [
        *(("index", "mean", transform) for transform in TRANSFORMS),
        *(("index", "none", transform) for transform in TRANSFORMS),
        *(("probability", "mean", transform) for transform in TRANSFORMS),
        *(("two outputs", "mean", transform) for transform in ("grad", "forward over reverse", "vmap of grad")),
    ],
)
def test_transform_equals_that_of_the_materialised_loss(kind, reduction, transform, x64):
    ours, theirs, arrays = both(kind, reduction)
    transformed = [jax.jit(TRANSFORMS[transform](f))(arrays) for f in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), *transformed)


def test_hessian_equals_that_of_the_materialised_loss(x64):
    ours, theirs, arrays = both("index", "mean")
    small = {k: arrays[k] for k in ("inputs", "linear_bias")}
    hessians = [jax.jit(jax.hessian(lambda a, f=f: f(arrays | a)))(small) for f in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), *hessians)


def value_and_grad(tokens: int, features: int, classes: int, dtype=jnp.float32, **options: Any):
    """The compiled value_and_grad of inputs and linear_weight, and what was lowered."""
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((tokens, features), (classes, features))]
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    step = jax.value_and_grad(lambda x, w, t: jaxloss.linear_cross_entropy(x, w, t, **options), (0, 1))
    return jax.jit(step).lower(*shapes, targets)


@pytest.mark.parametrize("budget", [2**20, 8 * 2**20])
@pytest.mark.parametrize(("tokens", "features", "classes"), [(1000, 64, 8192), (512, 128, 20000), (2048, 32, 32768)])
def test_temporaries_stay_within_the_budget(tokens, features, classes, budget):
    compiled = value_and_grad(tokens, features, classes, memory_budget=budget).compile()
    allowed = budget + 2 * 4 * features * classes + 16 * 2**20
    assert compiled.memory_analysis().temp_size_in_bytes <= allowed


def test_default_budget_takes_an_eighth_of_the_materialised_temporaries():
    tokens, features, classes = 2048, 256, 131072
    ours = value_and_grad(tokens, features, classes).compile().memory_analysis().temp_size_in_bytes
    assert ours <= 2 * 4 * tokens * classes / 8


def matrix_products(lowered: jax.stages.Lowered) -> list[str]:
    """The lines of its text with a product, not those of a vector with a matrix, which are sums."""
    return [line for line in lowered.as_text().splitlines() if re.search(r"dot_general .*-> tensor<\d+x\d+x", line)]


@pytest.fixture
def no_traces_kept():
    """From or for other tests."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def one_device(monkeypatch, no_traces_kept):
    """As on a machine with one CPU device, where nothing can have split the classes."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return monkeypatch


@pytest.mark.usefixtures("one_device")
def test_temporaries_on_one_device_stay_near_the_budget_whatever_the_classes():
    ours = value_and_grad(512, 256, 131072).compile().memory_analysis().temp_size_in_bytes
    assert ours <= 1.1 * 128 * 2**20


@pytest.mark.usefixtures("one_device")
def test_a_single_slab_holds_what_all_logits_take():
    tokens, features, classes = 128, 256, 16384
    ours = value_and_grad(tokens, features, classes).compile().memory_analysis().temp_size_in_bytes
    assert ours <= 1.05 * 4 * tokens * classes


@pytest.mark.parametrize(("classes", "products"), [(101, 2), (128, 1)], ids=["with a rest", "even"])
def test_a_gradient_made_in_pieces_is_that_of_the_whole(one_device, classes, products):
    one_device.setattr(_slabs, "PIECE", 8 * 15)
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (12, classes))
    t = jnp.asarray(rng.integers(0, classes, 12))

    def derivatives(loss):
        gradient = jax.grad(loss, (0, 1))
        forward = jax.jvp(gradient, (x, w), (jnp.cos(x), jnp.cos(w)))[1]
        reverse = jax.grad(lambda x, w: sum(jnp.sum(jnp.sin(g)) for g in gradient(x, w)), (0, 1))(x, w)
        return gradient(x, w), forward, reverse

    in_pieces = partial(jaxloss.linear_cross_entropy, targets=t, memory_budget=4 * 2 * 4 * classes)
    assert len(matrix_products(jax.jit(jax.grad(in_pieces, (0, 1))).lower(x, w))) == 2 + products
    ours, whole = derivatives(in_pieces), derivatives(lambda x, w: jaxloss.cross_entropy(x @ w.T, t))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, whole)


@pytest.mark.usefixtures("one_device")
def test_features_may_be_symbolic_on_one_device():
    (features,) = export.symbolic_shape("f")
    shapes = [jax.ShapeDtypeStruct((rows, features), jnp.float32) for rows in (64, 100)]
    step = jax.jit(jax.value_and_grad(jaxloss.linear_cross_entropy, (0, 1)))
    exported = export.export(step)(*shapes, jax.ShapeDtypeStruct((64,), jnp.int32))
    x, w, t = jnp.ones((64, 3)), jnp.ones((100, 3)), jnp.zeros(64, jnp.int32)
    np.testing.assert_allclose(exported.call(x, w, t)[0], np.log(100), rtol=1e-6)


@pytest.mark.usefixtures("no_traces_kept")
@pytest.mark.parametrize(
    ("backend", "classes", "expected"),
    [("cpu", 50_000, 256), ("cpu", 10**6, 128), ("gpu", 50_000, 2048), ("gpu", 10**6, 2048)],
)
def test_default_slabs_are_large_enough_for_the_products(monkeypatch, backend, classes, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8192, 8), (classes, 8))]
    step = jax.jit(jax.grad(jaxloss.linear_cross_entropy))
    text = step.lower(*shapes, jax.ShapeDtypeStruct((8192,), jnp.int32)).as_text()
    assert max(int(n) for n in re.findall(rf"-> tensor<(\d+)x{classes}xf32>", text)) == expected


def test_a_default_device_tells_what_programs_are_for(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not on_cpu()
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert on_cpu()


def test_arrays_are_undivided_on_one_device_and_within_shards(monkeypatch):
    mesh, found = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), []
    assert not undivided()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert undivided()
    with jax.set_mesh(mesh):
        assert not undivided()
    spec = jax.sharding.PartitionSpec("x")
    jax.shard_map(lambda x: (found.append(undivided()), x)[1], mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(2))
    assert found == [True]


def test_tracing_at_a_billion_tokens_and_a_million_classes_allocates_nothing():
    lowered = value_and_grad(10**9, 8, 10**6)
    assert lowered.out_info[1][0].shape == (10**9, 8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_slab_costs_three_matrix_products_of_the_inputs_dtype_and_one_forward(dtype):
    products = matrix_products(value_and_grad(64, 8, 32, dtype, memory_budget=16 * 2 * 4 * 32))
    assert len(products) == 3
    name = {jnp.float32: "f32", jnp.bfloat16: "bf16"}[dtype]
    for line in products:
        operands, result = re.search(r": \((.*)\) -> tensor<(.*)>", line).groups()
        assert re.findall(r"x([a-z]\w*)>", operands) == [name, name]
        assert result.endswith("f32")
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((64, 8), (32, 8))]
    forward = jax.jit(jaxloss.linear_cross_entropy).lower(*shapes, jax.ShapeDtypeStruct((64,), jnp.int32))
    assert len(matrix_products(forward)) == 1


def test_no_buffer_has_all_logits_and_nothing_scatters_into_classes():
    tokens, features, classes = 64, 8, 96
    text = value_and_grad(tokens, features, classes, memory_budget=16 * 2 * 4 * classes).compile().as_text()
    assert re.search(r"\[16,96\]", text), "the slabs"
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) == 16 * classes
    scattered = re.findall(r"= \w+\[([\d,]+)\]\S* scatter\(", text)
    assert set(scattered) == {"16,96"}, "one element to a token of a slab's logits, none of weight or bias"


def test_no_array_of_a_slabs_logits_enters_the_loop_over_slabs():
    classes = 4096
    text = value_and_grad(64, 8, classes, memory_budget=16 * 2 * 4 * classes).as_text()
    assert f"tensor<16x{classes}xf32>" in text
    (loop,) = (line for line in text.splitlines() if "stablehlo.while" in line)
    assert f"{classes}x8xf32" in loop
    assert f"16x{classes}xf32" not in loop


@pytest.mark.parametrize("reverse", [False, True], ids=["forward over reverse", "reverse over reverse"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_stay_within_the_slabs(reduction, reverse):
    tokens, features, classes = 1024, 32, 16384
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, features), (classes, features))]

    def hvp(x, w, t):
        def loss(x, w):
            return jnp.sum(jaxloss.linear_cross_entropy(x, w, t, reduction=reduction, memory_budget=2**21) ** 2)

        gradient = jax.grad(loss, (0, 1))
        if reverse:
            return jax.grad(lambda x, w: sum(jnp.vdot(g, jnp.cos(g)) for g in gradient(x, w)), (0, 1))(x, w)
        return jax.jvp(gradient, (x, w), (jnp.cos(x), jnp.cos(w)))

    compiled = jax.jit(hvp).lower(*shapes, jax.ShapeDtypeStruct((tokens,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * classes / 4


@pytest.mark.parametrize("function", [jaxloss.linear_cross_entropy, jaxloss.linear_log_prob], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_cpu_gpu_and_tpu(function, dtype):
    def total(x, w, t):
        return sum(jnp.sum(x) for x in jax.tree.leaves(function(x, w, t)) if jnp.issubdtype(x.dtype, jnp.floating))

    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((64, 8), (100, 8))]
    step = jax.jit(jax.value_and_grad(total, (0, 1)))
    exported = export.export(step, platforms=("cpu", "cuda", "tpu"))(*shapes, jax.ShapeDtypeStruct((64,), jnp.int32))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert len(exported.mlir_module()) > 1000


def test_float16_gradients_of_many_tokens_and_classes_keep_their_digits():
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(4096, 8)), jnp.float16), jnp.asarray(rng.normal(size=(512, 8)), jnp.float32)
    t = jnp.zeros(4096, jnp.int32)
    found = jax.grad(lambda w: jaxloss.linear_cross_entropy(x, w, t, memory_budget=2**20))(w)
    expected = jax.grad(lambda w: jaxloss.cross_entropy(x.astype(jnp.float32) @ w.T, t))(w)
    assert relative_l2(found[1:], expected[1:]) < 1e-4


@pytest.mark.parametrize(("inputs", "weight"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_inputs_and_weight_of_different_dtypes(inputs, weight):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(12, 8)), inputs), jnp.asarray(rng.normal(size=(30, 8)), weight)
    t = jnp.arange(12)
    loss, gradients = jax.value_and_grad(jaxloss.linear_cross_entropy, (0, 1))(x, w, t)
    assert (loss.dtype, gradients[0].dtype, gradients[1].dtype) == (inputs, inputs, weight)
    whole = [a.astype(jnp.float32) for a in (x, w)]
    expected, slopes = jax.value_and_grad(lambda x, w: jaxloss.cross_entropy(x @ w.T, t), (0, 1))(*whole)
    assert abs(loss.astype(jnp.float32) - expected) <= HALF_UNIT[inputs] * 2 * expected
    for found, slope in zip(gradients, slopes, strict=True):
        assert relative_l2(found, slope) < HALF_UNIT["bfloat16"]


def test_flax_kernel_transposed_is_not_copied():
    def step(kernel, x, t):
        return jaxloss.linear_cross_entropy(x, kernel.T, t)

    arguments = jnp.ones((8, 4096)), jnp.ones((16, 8)), jnp.zeros(16, jnp.int32)
    compiled = jax.jit(step).lower(*arguments).compile()
    assert not re.search(r"= f32\[(8,4096|4096,8)\]\S* (transpose|copy)\(", compiled.as_text())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # PyTorch's own use of torch.jit
def test_pytorchs_chunked_path_has_no_smoothing_no_second_derivatives_and_forward_mode_of_zero(x64):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, w, t = draw(64, 8, requires_grad=True), draw(128, 8), torch.arange(64)

    def chunked(x, **more):
        return F.linear_cross_entropy(x, w, t, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16), **more)

    with pytest.warns(UserWarning, match="options`` ignored"):
        chunked(x, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(chunked(x), x, create_graph=True)
    assert not gradient.requires_grad
    _, forward = torch.func.jvp(chunked, (x.detach(),), (x.detach(),))
    assert forward == 0
    ours = jax.jvp(lambda x: jaxloss.linear_cross_entropy(x, w.numpy(), t.numpy()), *[(jnp.asarray(x.detach()),)] * 2)
    assert_float64_close(ours[1], (gradient * x).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_weight": np.ones((3, 5))}, r"must share their last axis, got \(2, 4\) and \(3, 5\)"),
        ({"linear_weight": np.ones(4)}, "must share their last axis"),
        ({"linear_bias": np.ones(4)}, r"linear_bias must have shape \(3,\)"),
        ({"weight": np.ones(4)}, r"weight must have shape \(3,\)"),
        ({"memory_budget": 0}, "memory_budget must be a positive number of bytes, got 0"),
        ({"logit_softcap": 0.0}, "logit_softcap must be above 0"),
        ({"logit_softcap": -1.0}, "logit_softcap must be finite and above 0, got -1"),
        ({"targets": np.ones((2, 3)) / 3, "ignore_index": -100}, "ignore_index applies to class indices"),
        ({"inputs": np.ones((2, 2, 4)), "linear_weight": np.ones((3, 2, 4))}, "needs inputs"),
        ({"targets": np.array([0, 1, 2])}, r"targets must have shape \(2,\) .*, got \(3,\)\.$"),
        ({"reduction": "avg"}, "reduction must be one of"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else "",
)
def test_bad_argument_gets_one_clear_error(change, message):
    good = {"inputs": np.ones((2, 4)), "linear_weight": np.ones((3, 4)), "targets": np.array([0, 1])}
    jaxloss.linear_cross_entropy(**good)
    with pytest.raises(ValueError, match=message):
        jaxloss.linear_cross_entropy(**(good | change))


def test_wrong_targets_are_what_they_are_in_cross_entropy():
    x, w = jnp.ones((3, 4)), jnp.ones((5, 4))
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds\."):
        jaxloss.linear_cross_entropy(x, w, np.array([0, 5, 1]))
    step = jax.jit(jax.value_and_grad(lambda x, t: jaxloss.linear_cross_entropy(x, w, t)))
    loss, gradient = step(x, jnp.array([0, 5, 1]))
    assert np.isnan(loss)
    assert np.isnan(gradient).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("features", "classes"), [(0, 5), (4, 0), (4, 1)])
def test_no_features_no_classes_and_one_class_are_as_in_cross_entropy(features, classes, reduction):
    x, w = jnp.ones((3, features)), jnp.ones((classes, features))
    t = jnp.array([0, 0, -100]) if classes else jnp.full(3, -100)

    def evaluate(loss):
        return jax.value_and_grad(lambda x, w: jnp.sum(loss(x, w)), (0, 1))(x, w)

    for targets in (t, jnp.full((3, classes), 1 / max(classes, 1))):
        options = {"targets": targets, "reduction": reduction}
        ours = evaluate(lambda x, w, o=options: jaxloss.linear_cross_entropy(x, w, memory_budget=1, **o))
        whole = evaluate(lambda x, w, o=options: jaxloss.cross_entropy(x @ w.T, **o))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), ours, whole)


def test_wider_targets_and_options_widen_what_they_do_in_cross_entropy(x64):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32) for rows in (6, 9))
    soft = jnp.asarray(rng.dirichlet(np.ones(9), 6))

    def with_gradients(loss, *rest):
        return jax.value_and_grad(loss, tuple(range(len(rest) + 2)))(x, w, *rest)

    value, gradients = with_gradients(jaxloss.linear_cross_entropy, soft)
    exact, slopes = with_gradients(lambda x, w, t: jaxloss.cross_entropy(x.astype(float) @ w.T.astype(float), t), soft)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, exact, rtol=1e-14)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), gradients, slopes)
    assert [gradient.dtype for gradient in gradients] == ["float32", "float32", "float64"]
    assert jaxloss.linear_cross_entropy(x, w, soft.astype("float32"), dtype="float64").dtype == jnp.float64
    labels = jnp.arange(6)
    for reduction in ("mean", "none"):
        capped = jax.jit(partial(jaxloss.linear_cross_entropy, reduction=reduction))
        narrow, wide = (capped(x, w, labels, logit_softcap=jnp.asarray(2.0, d)) for d in ("float32", "float64"))
        assert narrow.dtype == wide.dtype == jnp.float32
        np.testing.assert_array_equal(narrow, wide)
    found = jax.jit(jaxloss.linear_log_prob)(
        x, w, labels, temperature=jnp.asarray(2.0, "float64"), logit_softcap=jnp.asarray(2.0, "float64")
    )
    assert found.log_prob.dtype == found.entropy.dtype == jnp.float32


def test_integer_class_weights_are_those_of_floats():
    x, w, t = jax.random.normal(jax.random.key(0), (6, 4)), jax.random.normal(jax.random.key(1), (9, 4)), jnp.arange(6)
    step = jax.grad(lambda x, weight: jaxloss.linear_cross_entropy(x, w, t, weight=weight))
    assert np.any(step(x, jnp.arange(1, 10)) != step(x, jnp.ones(9)))
    np.testing.assert_array_equal(step(x, jnp.arange(1, 10)), step(x, jnp.arange(1.0, 10)))


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_leading_axes(leading, reduction):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(*leading, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    t = rng.integers(0, 5, leading)
    ours = jaxloss.linear_cross_entropy(x, w, t, reduction=reduction, memory_budget=80)
    theirs = jaxloss.cross_entropy(x @ w.T, t, reduction=reduction)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "logit_softcap"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_traced_integer_option_is_that_number(option, reduction):
    inputs, weight, targets = jnp.eye(3, 4), jnp.arange(20.0).reshape(5, 4), jnp.array([0, 4, 2])

    @jax.jit
    def gradient(value: Any) -> jax.Array:
        loss = partial(jaxloss.linear_cross_entropy, reduction=reduction)
        return jax.grad(lambda x: jnp.sum(loss(x, weight, targets, **{option: value})))(inputs)

    np.testing.assert_array_equal(gradient(1), gradient(1.0))
