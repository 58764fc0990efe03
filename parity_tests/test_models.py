"""The Flax models against their PyTorch originals: initialisation, pooling, dropout, and what their heads return."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F  # noqa: N812

from jaxloss.parity import assert_close, to_torch
from train import models, originals
from train.convolution import conv_in_cells


def pooled_weights(model: str, framework: str) -> dict[str, np.ndarray]:
    """Every weight of twenty initialisations, by PyTorch's names."""

    def draw(seed: int) -> dict[str, np.ndarray]:
        torch.manual_seed(seed)
        if framework == "torch":
            return {name: weight.numpy() for name, weight in getattr(originals, model)().state_dict().items()}
        return to_torch(getattr(models, model)(nnx.Rngs(seed)))

    draws = [draw(seed) for seed in range(20)]
    return {name: np.stack([weights[name] for weights in draws]) for name in draws[0]}


def assert_uniform(samples: np.ndarray, bound: float) -> None:
    """Within the bound and filling it, with the mean and variance of U(-bound, bound) to 5 standard errors."""
    samples = samples.astype(np.float64) / bound
    assert np.abs(samples).max() <= 1 + 1e-6
    assert np.abs(samples).max() >= 0.95
    assert abs(samples.mean()) <= 5 * math.sqrt(1 / 3 / samples.size)
    assert abs((samples**2).mean() - 1 / 3) <= 5 * math.sqrt(4 / 45 / samples.size)


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("model", ["CNN", "Net", "ExNN"])
def test_initialisation_is_torchs_distribution(model, framework):
    weights = pooled_weights(model, framework)
    for name, samples in weights.items():
        _, outputs, *inputs = weights[name.removesuffix("bias").removesuffix("weight") + "weight"].shape
        fan_in = math.prod(inputs)
        xavier = (model, name) == ("CNN", "fc.weight")
        assert_uniform(samples, math.sqrt(6 / (fan_in + outputs)) if xavier else 1 / math.sqrt(fan_in))


@pytest.mark.parametrize("attribute", ["kernel", "bias"])
def test_initialisation_of_flax_is_caught(attribute):
    layers = [nnx.Linear(320, 50, rngs=nnx.Rngs(seed)) for seed in range(20)]
    with pytest.raises(AssertionError):
        assert_uniform(np.stack([getattr(layer, attribute)[...] for layer in layers]), 320**-0.5)


CONTENTS = {
    "random": lambda random, shape: random.standard_normal(shape),
    "ties": lambda random, shape: random.integers(0, 2, shape),
    "signed-zeros": lambda random, shape: random.choice([0.0, -0.0], shape),
    "nan": lambda random, shape: random.choice([np.nan, -1.0, 0.0, 1.0], shape),
    "infinities": lambda random, shape: random.choice([np.inf, -np.inf], shape),
}


def pool_both(pool: Callable[[jax.Array], jax.Array], inputs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Values and input gradients of our pool and of PyTorch's, in PyTorch's layout."""
    tensor = torch.tensor(inputs, requires_grad=True)
    theirs = F.max_pool2d(tensor, 2)
    cotangent = torch.randn_like(theirs)
    theirs.backward(cotangent)
    ours, pull_back = jax.vjp(pool, jnp.moveaxis(inputs, 1, -1))
    (gradient,) = pull_back(jnp.moveaxis(cotangent.numpy(), 1, -1))
    return [
        (np.moveaxis(ours, -1, 1), theirs.detach().numpy()),
        (np.moveaxis(gradient, -1, 1), tensor.grad.numpy()),
    ]


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 4, 7, 9), (2, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("contents", CONTENTS)
def test_max_pool_is_torchs_bit_for_bit(contents, shape):
    inputs = CONTENTS[contents](np.random.default_rng(0), shape).astype(np.float32)
    for ours, theirs in pool_both(jax.jit(models.max_pool), inputs):
        assert ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes()


def test_max_pool_that_splits_ties_is_caught():
    def split(x):
        return jnp.maximum(jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2]), jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2]))

    inputs = CONTENTS["ties"](np.random.default_rng(0), (3, 4, 8, 8)).astype(np.float32)
    (ours, theirs), (our_gradient, their_gradient) = pool_both(split, inputs)
    assert ours.tobytes() == theirs.tobytes()
    assert our_gradient.tobytes() != their_gradient.tobytes()


def test_net_in_evaluation_neither_drops_nor_draws():
    net, images = models.Net(nnx.Rngs(0)), jnp.ones((2, 28, 28, 1))
    net.eval()
    nothing = models.DropoutMasks(jnp.zeros((2, 1, 1, 20), bool), jnp.zeros((2, 50), bool))
    streams = nnx.to_pure_dict(nnx.state(net, nnx.RngCount))
    assert (net(images) == net(images, nothing)).all()
    assert nnx.to_pure_dict(nnx.state(net, nnx.RngCount)) == streams


def test_net_in_training_draws_new_masks():
    net, images = models.Net(nnx.Rngs(0)), jnp.ones((2, 28, 28, 1))
    net.train()
    assert (net(images) != net(images)).any()
    assert (models.Net(nnx.Rngs(0))(images) == models.Net(nnx.Rngs(0))(images)).all()


def test_dropout2d_drops_whole_channels():
    dropped = np.asarray(models.Net(nnx.Rngs(0)).conv2_drop(jnp.ones((200, 8, 8, 20))))
    assert (dropped == dropped[:, :1, :1]).all()
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert abs(dropped.mean() - 1) < 5 * math.sqrt(1 / 4000)


@pytest.mark.parametrize("model", ["CNN", "Net", "ExNN"])
def test_heads_return_what_their_loss_takes(model):
    inputs = jnp.ones((4, 2)) if model == "ExNN" else jnp.ones((4, 28, 28, 1))
    port = getattr(models, model)(nnx.Rngs(0))
    outputs = port.forward2(inputs) if model == "ExNN" else port(inputs)
    is_log_probs = bool(jnp.allclose(jnp.exp(outputs).sum(axis=-1), 1, atol=1e-6))
    assert is_log_probs == (model != "CNN")


@pytest.mark.parametrize(("size", "channels", "features", "pixels"), [(5, 1, 10, 28), (5, 10, 20, 12), (3, 2, 3, 6)])
def test_convolution_in_cells_is_jaxs_own(x64: None, size: int, channels: int, features: int, pixels: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, pixels, pixels, channels))
    kernel = rng.normal(size=(size, size, channels, features))
    options = {"window_strides": (1, 1), "padding": [(0, 0)] * 2, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def run(conv: Any) -> list[np.ndarray]:
        result, pull = jax.vjp(lambda x, w: conv(x, w, *options.values()), images, kernel)
        return [result, *pull(jnp.sin(result))]

    own = run(lambda x, w, s, p, d: jax.lax.conv_general_dilated(x, w, s, p, dimension_numbers=d))
    cells = run(lambda x, w, s, p, d: conv_in_cells(x, w, s, p, dimension_numbers=d))
    assert_close(cells, own)
    with pytest.raises(AssertionError):
        assert_close([cells[0], cells[1], cells[2] + 1e-9], own)


@pytest.mark.parametrize(
    ("pixels", "size", "channels", "options"),
    [
        (12, 5, 2, {"window_strides": (2, 2)}),
        (12, 5, 2, {"padding": [(2, 2)] * 2}),
        (27, 5, 2, {}),
        (12, 4, 2, {}),
        (4, 5, 2, {"padding": [(1, 1)] * 2}),
        (12, 5, 2, {"lhs_dilation": (2, 2)}),
        (12, 3, 2, {"rhs_dilation": (2, 2)}),
        (12, 5, 1, {"feature_group_count": 2}),
    ],
    ids=["strides", "padding", "odd image", "even kernel", "small image", "dilated image", "dilated kernel", "groups"],
)
def test_other_convolutions_are_jaxs_own(pixels: int, size: int, channels: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, pixels, pixels, 2)), rng.normal(size=(size, size, channels, 4))
    options = {"window_strides": (1, 1), "padding": [(0, 0)] * 2, **options}
    options["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(jnp.asarray(images), jnp.asarray(kernel), **options)
    strides, padding = options.pop("window_strides"), options.pop("padding")
    found = conv_in_cells(jnp.asarray(images), jnp.asarray(kernel), strides, padding, **options)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_only_cpu_has_convolutions_in_cells(platform: str, convolutions: int) -> None:
    conv = partial(conv_in_cells, strides=(1, 1), padding=[(0, 0)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 28, 28, 1), (5, 5, 1, 10)))
    exported = jax.export.export(jax.jit(conv), platforms=[platform])(*arguments)
    assert exported.mlir_module().count("stablehlo.convolution") == convolutions
