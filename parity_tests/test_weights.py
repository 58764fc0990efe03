"""Weights between PyTorch and Flax: names, layouts, bits, files and faults."""

import inspect
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import linen, nnx
from torch import nn

from jaxloss.parity import load_torch, to_torch, weight_map
from jaxloss.parity._state_dict import read_state_dict
from parity_tests.gates import assert_float64_close
from train import models, originals

MODELS = ["CNN", "Net", "ExNN"]
RNGS = nnx.Rngs(0)


def flax_batch_norm(features: int) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, use_running_average=True, rngs=RNGS)


def flax_conv(size: tuple[int, ...], groups: int = 1) -> nnx.Conv:
    return nnx.Conv(4, 6, size, padding="VALID", feature_group_count=groups, rngs=RNGS)


def flax_conv_transpose(size: tuple[int, ...], strides: int, transpose_kernel: bool) -> nnx.ConvTranspose:
    strides_ = (strides,) * len(size)
    return nnx.ConvTranspose(4, 6, size, strides_, padding="VALID", transpose_kernel=transpose_kernel, rngs=RNGS)


# PyTorch layer, Flax layer, shape of PyTorch's input (None: token numbers)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nnx.Module], tuple[int, ...] | None]] = {
    "linear": (lambda: nn.Linear(4, 6), lambda: nnx.Linear(4, 6, rngs=RNGS), (3, 4)),
    "linear-square": (lambda: nn.Linear(4, 4), lambda: nnx.Linear(4, 4, rngs=RNGS), (3, 4)),
    "linear-without-bias": (
        lambda: nn.Linear(4, 6, bias=False),
        lambda: nnx.Linear(4, 6, use_bias=False, rngs=RNGS),
        (3, 4),
    ),
    "linear-general": (lambda: nn.Linear(4, 6), lambda: nnx.LinearGeneral(4, 6, rngs=RNGS), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: flax_conv((3,)), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda: flax_conv((3, 3)), (2, 4, 7, 8)),
    "conv2d-oblong": (lambda: nn.Conv2d(4, 6, (2, 3)), lambda: flax_conv((2, 3)), (2, 4, 7, 8)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: flax_conv((3, 3), groups=2), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (2, 3, 4)), lambda: flax_conv((2, 3, 4)), (2, 4, 5, 6, 7)),
    "conv-transpose": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
        lambda: flax_conv_transpose((3, 3), 2, transpose_kernel=False),
        (2, 4, 5, 6),
    ),
    "conv-transpose-kernel": (
        lambda: nn.ConvTranspose1d(4, 6, 4, stride=2),
        lambda: flax_conv_transpose((4,), 2, transpose_kernel=True),
        (2, 4, 5),
    ),
    "batch-norm": (lambda: nn.BatchNorm2d(4), lambda: flax_batch_norm(4), (2, 4, 5, 5)),
    "layer-norm": (lambda: nn.LayerNorm(4), lambda: nnx.LayerNorm(4, epsilon=1e-5, rngs=RNGS), (3, 4)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), lambda: nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=RNGS), (2, 4, 5, 5)),
    "rms-norm": (lambda: nn.RMSNorm(4, eps=1e-6), lambda: nnx.RMSNorm(4, epsilon=1e-6, rngs=RNGS), (3, 4)),
    "instance-norm": (
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nnx.InstanceNorm(4, epsilon=1e-5, rngs=RNGS),
        (2, 4, 5, 5),
    ),
    "prelu": (nn.PReLU, lambda: nnx.PReLU(), (3, 4)),
    "embedding": (
        lambda: nn.Embedding(5, 4),
        lambda: nnx.Embed(5, 4, param_dtype=jnp.float64, rngs=RNGS),
        None,
    ),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 3))),
        lambda: nnx.Sequential(nnx.Linear(4, 8, rngs=RNGS), nnx.relu, nnx.Sequential(nnx.Linear(8, 3, rngs=RNGS))),
        (3, 4),
    ),
}


def randomise(module: nn.Module) -> nn.Module:
    """Gives every floating weight and running statistic a random positive value, in float64."""
    torch.manual_seed(0)
    state = {
        k: torch.rand(v.shape).double() + 0.1 if v.is_floating_point() else v for k, v in module.state_dict().items()
    }
    module = module.double().eval()
    module.load_state_dict(state)
    return module


def forward_both(original: nn.Module, port: Any, shape: tuple[int, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    inputs = torch.arange(5) if shape is None else torch.randn(shape, dtype=torch.float64)
    theirs = original(inputs).detach().numpy()
    if shape is None or len(shape) == 2:
        return np.asarray(port(jnp.array(inputs.numpy()))), theirs
    return np.moveaxis(port(jnp.moveaxis(jnp.array(inputs.numpy()), 1, -1)), -1, 1), theirs


def same_bits(ours: Any, theirs: Any) -> bool:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and ours.tobytes() == theirs.tobytes()


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not same_bits(ours[name], theirs[name])] == []


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_computes_the_same_and_comes_back(layer):
    make_original, make_port, shape = LAYERS[layer]
    original = randomise(make_original())
    with jax.enable_x64(True):
        port = load_torch(make_port(), original.state_dict())
        assert_float64_close(*forward_both(original, port, shape))
    state = {name: tensor.numpy() for name, tensor in original.state_dict().items() if "num_batches" not in name}
    assert_same_bits(to_torch(port), state)


@pytest.mark.parametrize("axes", [(1, 0, 2, 3), (0, 1, 3, 2)], ids=["features-swapped", "square-kernel-transposed"])
def test_layer_with_transposed_weight_is_caught(axes):
    original = randomise(nn.Conv2d(6, 6, 3))
    with jax.enable_x64(True):
        port = nnx.Conv(6, 6, (3, 3), padding="VALID", rngs=RNGS)
        load_torch(port, original.state_dict() | {"weight": original.weight.detach().permute(axes)})
        with pytest.raises(AssertionError):
            assert_float64_close(*forward_both(original, port, (2, 6, 7, 8)))


DTYPES = ["float32", "bfloat16", "float16", "float64"]


def random_bits(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Every kind of number there is: normal, subnormal, infinite, both zeros, and NaN with all sorts of payloads."""
    size = jnp.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(256, size=(*shape[:-1], shape[-1] * size), dtype=np.uint8).view(dtype)


def abstract(model: str) -> Any:
    """A module without arrays, which costs no time to initialise."""
    return nnx.eval_shape(lambda: getattr(models, model)(nnx.Rngs(0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_round_trip_keeps_every_bit(model, dtype):
    shapes = {name: tensor.shape for name, tensor in getattr(originals, model)().state_dict().items()}
    state = {name: random_bits(shape, jnp.dtype(dtype)) for name, shape in shapes.items()}
    with jax.enable_x64(dtype == "float64"):
        port = load_torch(abstract(model), state)
        assert_same_bits(to_torch(port), state)
        again = load_torch(abstract(model), to_torch(port))
    assert {str(weight.dtype) for weight in jax.tree.leaves(nnx.state(port, nnx.Param))} == {dtype}
    assert jax.tree.all(jax.tree.map(same_bits, nnx.state(again, nnx.Param), nnx.state(port, nnx.Param)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_tensors_keep_every_bit(dtype):
    array = random_bits((256, 64), jnp.dtype(dtype))  # enough for NaNs in 16 bits
    tensor = torch.from_numpy(array.view(f"int{8 * array.itemsize}")).view(getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        state = to_torch(load_torch(nnx.Linear(256, 64, use_bias=False, rngs=RNGS), {"weight": tensor.t()}))
    assert_same_bits(state, {"weight": array.T})


@pytest.mark.parametrize("model", MODELS)
def test_to_torch_loads_into_the_original(model):
    weights = to_torch(getattr(models, model)(nnx.Rngs(0)))
    original = getattr(originals, model)()
    original.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)


def test_batch_norm_loads_into_the_original_without_its_counter():
    weights = to_torch(flax_batch_norm(4))
    assert weights.keys() == {"weight", "bias", "running_mean", "running_var"}
    nn.BatchNorm2d(4).load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)


def test_random_state_is_left_alone():
    net = models.Net(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(net, nnx.RngState))
    load_torch(net, to_torch(models.Net(nnx.Rngs(1))))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a == b).all(), before, nnx.to_pure_dict(nnx.state(net, nnx.RngState)))
    )


class Custom(nnx.Module):
    """Weights in containers, and weights and buffers that belong to no layer of Flax."""

    def __init__(self) -> None:
        self.blocks = nnx.List([nnx.Linear(2, 3, rngs=RNGS), nnx.Linear(3, 2, rngs=RNGS)])
        self.heads = nnx.Dict(left=nnx.Linear(2, 1, rngs=RNGS))
        self.kernel = nnx.Param(jnp.zeros((2, 3)))
        self.table = nnx.Variable(jnp.zeros((4, 2)))
        self.cache = nnx.Cache(jnp.zeros(7))


def test_containers_and_custom_weights_keep_their_names():
    shapes = {name: array.shape for name, array in to_torch(Custom()).items()}
    assert shapes == {
        "blocks.0.weight": (3, 2),
        "blocks.0.bias": (3,),
        "blocks.1.weight": (2, 3),
        "blocks.1.bias": (2,),
        "heads.left.weight": (1, 2),
        "heads.left.bias": (1,),
        "kernel": (2, 3),
        "table": (4, 2),
    }


class Flattening(nnx.Module):
    """A port as people write it: Flax flattens (height, width, channels) and has no record of it."""

    def __init__(self) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=RNGS)
        self.encode = nnx.Linear(3 * 2 * 4, 8, rngs=RNGS)
        self.decode = nnx.Linear(8, 3 * 2 * 4, rngs=RNGS)
        self.deconv = nnx.ConvTranspose(4, 1, (3, 3), padding="VALID", rngs=RNGS)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.encode(self.conv(x).reshape(-1, 24))
        return self.deconv(self.decode(x).reshape(-1, 3, 2, 4))


class FlatteningOriginal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.encode = nn.Conv2d(1, 4, 3), nn.Linear(4 * 3 * 2, 8)
        self.decode, self.deconv = nn.Linear(8, 4 * 3 * 2), nn.ConvTranspose2d(4, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encode(self.conv(x).flatten(1))
        return self.deconv(self.decode(x).view(-1, 4, 3, 2))


class Recording(Flattening):
    """The same with layers that record the feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nnx.LinearGeneral((3, 2, 4), 8, axis=(-3, -2, -1), rngs=RNGS)
        self.decode = nnx.LinearGeneral(8, (3, 2, 4), rngs=RNGS)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.deconv(self.decode(self.encode(self.conv(x))))


MAPS = {"encode": (4, 3, 2), "decode": (4, 3, 2)}


@pytest.mark.parametrize(
    ("make_port", "flatten"),
    [(Flattening, MAPS), (Recording, None), (Recording, MAPS)],
    ids=["named", "recorded", "both"],
)
def test_flattened_layers_are_permuted(make_port, flatten):
    original = randomise(FlatteningOriginal())
    with jax.enable_x64(True):
        port = load_torch(make_port(), original.state_dict(), flatten=flatten)
        assert_float64_close(*forward_both(original, port, (2, 1, 5, 4)))
        state = {name: tensor.numpy() for name, tensor in original.state_dict().items()}
        assert_same_bits(to_torch(port, flatten=flatten), state)


@pytest.mark.parametrize("flatten", [{}, {"encode": (4, 3, 2)}, {"decode": (4, 3, 2)}], ids=str)
def test_wrong_permutation_is_caught(flatten):
    original = randomise(FlatteningOriginal())
    with jax.enable_x64(True):
        port = load_torch(Flattening(), original.state_dict(), flatten=flatten)
        with pytest.raises(AssertionError):
            assert_float64_close(*forward_both(original, port, (2, 1, 5, 4)))


@pytest.mark.parametrize(
    ("flatten", "message"),
    [
        (None, r"encode, decode may read or write a flattened feature map"),
        ({"fc": (4, 3, 2)}, r"no linear layer 'fc', only encode, decode"),
        ({"encode": (4, 3, 3)}, r"encode has inputs \(24,\) and outputs \(8,\)"),
        ({"encode": (3, 2, 4)}, r"encode: \(3, 2, 4\) seems to have the channels last"),
    ],
    ids=["undeclared", "unknown", "misshapen", "channels-last"],
)
@pytest.mark.parametrize("convert", [to_torch, lambda port, **kw: load_torch(port, {}, **kw)], ids=["to", "from"])
def test_flatten_faults_are_named(convert, flatten, message):
    with pytest.raises(ValueError, match=message):
        convert(Flattening(), flatten=flatten)


def test_recorded_feature_map_contradicting_flatten_is_refused():
    with pytest.raises(ValueError, match=r"encode has inputs \(3, 2, 4\)"):
        to_torch(Recording(), flatten={"encode": (4, 2, 3)})


def test_globally_pooled_features_need_no_flatten():
    port = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=RNGS), nnx.Linear(8, 10, rngs=RNGS))
    assert to_torch(port).keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def linear(inputs: int, outputs: int) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0))


def conv(inputs: int, outputs: int) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (3, 3), rngs=nnx.Rngs(0))


def test_only_the_width_of_the_nearest_convolution_needs_no_flatten():
    """32 features may be two by two pixels of 8 channels, whatever other convolutions there are."""
    pooled = [conv(1, 8), conv(8, 32), linear(32, 3)], [linear(3, 32), conv(32, 8), conv(8, 1)]
    flattened = [conv(1, 32), conv(32, 8), linear(32, 3)], [linear(3, 32), conv(8, 32), conv(32, 1)]
    for convert in (to_torch, lambda port: load_torch(port, to_torch(port, flatten={}))):
        for layers in pooled:
            convert(nnx.Sequential(*layers))
        for layers in flattened:
            with pytest.raises(ValueError, match="may read or write a flattened feature map"):
                convert(nnx.Sequential(*layers))


class Late(nnx.Module):
    """Its linear layer comes first in sorted order."""

    def __init__(self) -> None:
        self.conv1, self.conv2, self.classifier = conv(1, 8), conv(8, 32), linear(32, 3)


def test_layers_that_flax_has_sorted_are_taken_in_the_order_of_the_state_dict():
    state = to_torch(Late())
    for module in (nnx.clone(Late()), nnx.eval_shape(Late)):
        assert_same_bits(to_torch(load_torch(module, state), flatten={}), state)
        assert weight_map(module, state)
        with pytest.raises(ValueError, match="classifier may read or write"):
            load_torch(module, dict(sorted(state.items())))


def test_every_fault_is_named_and_nothing_is_loaded():
    net = models.Net(nnx.Rngs(0))
    before = to_torch(net)
    state = {name: np.zeros_like(array) for name, array in before.items()}
    state["fc1.weight"] = state["fc1.weight"][:, :300]
    state["fc2.weights"] = state.pop("fc2.weight")
    state["conv1.bias"] = state["conv1.bias"].astype(np.float64)
    with pytest.raises(ValueError, match="does not fit Net") as error:
        load_torch(net, state)
    assert str(error.value).splitlines()[1:] == [
        "  missing: fc2.weight",
        "  unexpected: fc2.weights",
        "  of another shape: fc1.weight is (50, 300), expected (50, 320)",
        "  in need of jax_enable_x64: conv1.bias is float64",
    ]
    assert_same_bits(to_torch(net), before)


class Renamed(nnx.Module):
    """A port of Sequential(Linear, ReLU, Linear, Linear) with names of its own."""

    def __init__(self) -> None:
        self.body = nnx.Sequential(nnx.Linear(4, 4, rngs=RNGS), nnx.Linear(4, 4, rngs=RNGS))
        self.top = nnx.Linear(4, 3, rngs=RNGS)


def numbered() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))


def test_layers_without_namesakes_are_paired_in_order_and_printed(capsys):
    state = numbered().state_dict()
    port = load_torch(Renamed(), state)
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "  body.0.weight (4, 4) <- 0.weight",
        "  body.0.bias (4,) <- 0.bias",
    ]
    names = weight_map(port, state)
    assert names["body.1.weight"] == "2.weight"
    assert names["top.bias"] == "3.bias"
    assert_same_bits(to_torch(port, names=names), {name: tensor.numpy() for name, tensor in state.items()})


def test_numbers_are_no_names_where_the_frameworks_count_otherwise():
    port = nnx.Sequential(*(nnx.Linear(4, 4, rngs=RNGS) for _ in range(3)))
    original = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert weight_map(port, original.state_dict())["2.weight"] == "4.weight"
    assert weight_map(port, original.state_dict())["1.weight"] == "2.weight"


def test_map_can_be_changed_and_a_weight_takes_its_layer_along(capsys):
    state = numbered().state_dict()
    whole = weight_map(Renamed(), state)
    for kind in ("weight", "bias"):
        first, second = f"body.0.{kind}", f"body.1.{kind}"
        whole[first], whole[second] = whole[second], whole[first]
    weights = {name: theirs for name, theirs in whole.items() if name.endswith("weight")}
    for names in (whole, weights):
        port = load_torch(Renamed(), state, names=names)
        assert same_bits(port.body.layers[0].kernel[...], state["2.weight"].numpy().T)
        assert same_bits(port.body.layers[0].bias[...], state["2.bias"].numpy())
        assert same_bits(port.body.layers[1].bias[...], state["0.bias"].numpy())
    with pytest.raises(ValueError, match=r"no body\.2\.weight in the module, no 9\.weight in PyTorch"):
        load_torch(Renamed(), state, names={"body.2.weight": "9.weight"})


class Sorted(nnx.Module):
    """Layers of one shape, not defined in the order of their names."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.inp, self.hid, self.fc = (nnx.Linear(4, 4, rngs=rngs) for _ in range(3))


def test_order_that_flax_has_sorted_is_not_guessed(capsys):
    original = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    state = original.state_dict()
    right = weight_map(load_torch(Sorted(), state), state)
    assert right["hid.weight"] == "1.weight"
    for module in (nnx.eval_shape(Sorted), nnx.clone(Sorted())):
        with pytest.raises(ValueError, match="fc, hid, inp have the same shapes"):
            load_torch(module, state)
        assert same_bits(load_torch(module, state, names=right).hid.bias[...], state["1.bias"].numpy())


def test_tied_weight_that_the_module_has_once_is_named_with_its_twin():
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    with pytest.raises(ValueError, match=r"head\.weight equals weight: if PyTorch ties them, pass ignore=\['head\."):
        load_torch(nnx.Embed(3, 2, rngs=RNGS), {"weight": table, "head.weight": table})


@pytest.mark.parametrize(
    ("function", "given", "says"),
    [
        (load_torch, ((linen.Dense(2), {}), {}), "the module is a tuple, expected an nnx.Module"),
        (read_state_dict, (nn.Identity(),), r"is a Identity, expected a dict or a path: module\.state_dict\(\)"),
    ],
)
def test_what_is_no_module_or_no_state_dict_is_refused(function, given, says):
    with pytest.raises(TypeError, match=says):
        inspect.unwrap(function)(*given)  # without pytest's own checks of types


def test_names_that_would_lose_a_weight_are_refused():
    port = Sorted()
    with pytest.raises(ValueError, match=r"hid\.weight would be two weights"):
        to_torch(port, names={"inp.weight": "hid.weight"})
    with pytest.raises(ValueError, match=r"no out\.weight in the module"):
        to_torch(port, names={"out.weight": "0.weight"})


def test_what_the_port_does_not_need_is_ignored_by_name_or_pattern():
    state = nn.Linear(2, 2).state_dict() | {"attn.mask": np.ones((3, 3), np.float32)}
    with pytest.raises(ValueError, match=r"unexpected: attn\.mask"):
        load_torch(nnx.Linear(2, 2, rngs=RNGS), state)
    for ignore in ("attn.mask", "*.mask"):
        load_torch(nnx.Linear(2, 2, rngs=RNGS), state, ignore=[ignore])
    load_torch(nnx.BatchNorm(2, rngs=RNGS), nn.BatchNorm1d(2).state_dict(), ignore=["num_batches_tracked"])
    message = r"^ignore: there is no attn\.masc in the state_dict\. The closest names are attn\.mask, bias, weight\.$"
    with pytest.raises(ValueError, match=message):
        load_torch(nnx.Linear(2, 2, rngs=RNGS), state, ignore=["weight", "attn.masc"])


def test_square_layer_of_another_rank_is_refused():
    with pytest.raises(ValueError, match=r"weight is \(4, 4, 1\), expected \(4, 4\)"):
        load_torch(nnx.Linear(4, 4, use_bias=False, rngs=RNGS), {"weight": np.zeros((4, 4, 1), np.float32)})


def test_other_things_than_arrays_are_named():
    state = {"weight": [1.0], 7: np.zeros(1), "bias": np.array(["a"]), "fine": np.zeros(1)}
    with pytest.raises(TypeError, match=r"'weight' is a list, 7 is a ndarray, 'bias' is a ndarray\.$"):
        load_torch(nnx.Linear(1, 1, rngs=RNGS), state)


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.first = nnx.Linear(2, 2, use_bias=False, rngs=RNGS)
        self.second = self.first


def test_tied_weights_have_both_names_and_must_agree():
    weight = np.arange(4, dtype=np.float32).reshape(2, 2)
    tied = load_torch(Tied(), {"first.weight": weight, "second.weight": weight})
    assert_same_bits(to_torch(tied), {"first.weight": weight, "second.weight": weight})
    with pytest.raises(ValueError, match=r"different in the state_dict: first.weight and second.weight"):
        load_torch(tied, {"first.weight": weight, "second.weight": weight + 1})


class Cyclic(nnx.Module):
    """A module that knows itself, and its child its parent."""

    def __init__(self) -> None:
        self.me, self.child = self, nnx.Linear(2, 3, rngs=RNGS)
        self.child.parent = self


def test_module_that_refers_to_itself_is_loaded():
    state = nn.Linear(2, 3).state_dict()
    port = load_torch(Cyclic(), {f"child.{name}": tensor for name, tensor in state.items()})
    assert_same_bits(to_torch(port), {f"child.{name}": tensor.numpy() for name, tensor in state.items()})


class Weighted(nnx.Embed):
    """Has a weight besides its embedding, which is PyTorch's weight."""

    def __init__(self) -> None:
        super().__init__(5, 4, rngs=RNGS)
        self.weight = nnx.Param(jnp.ones(7))


def test_two_variables_of_one_name_are_refused():
    for convert in (to_torch, lambda port: load_torch(port, {"0.weight": np.ones(7, np.float32)})):
        with pytest.raises(ValueError, match=r"0\.embedding and 0\.weight would both be 0\.weight in PyTorch: rename"):
            convert(nnx.Sequential(Weighted()))


@pytest.mark.parametrize("convert", [lambda t: t, torch.Tensor.numpy], ids=["torch", "numpy"])
def test_loaded_weights_do_not_alias_the_callers(convert):
    tensors = {"weight": torch.zeros(512, 512), "bias": torch.zeros(512)}
    layer = load_torch(nnx.Linear(512, 512, rngs=RNGS), {name: convert(tensor) for name, tensor in tensors.items()})
    for tensor in tensors.values():
        tensor.add_(1)
    assert not layer.kernel[...].any()
    assert not layer.bias[...].any()


def test_aliased_weights_would_be_caught():
    tensor, layer = torch.zeros(512), nnx.Linear(1, 512, rngs=RNGS)
    assert layer.bias is not None
    layer.bias.set_value(jnp.from_dlpack(tensor))
    tensor.add_(1)
    assert layer.bias[...].any()


def test_returned_weights_do_not_alias_the_module():
    layer = nnx.Embed(512, 512, embedding_init=nnx.initializers.zeros_init(), rngs=RNGS)
    torch.from_numpy(to_torch(layer)["weight"]).add_(1)
    assert not layer.embedding[...].any()


SAVERS: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
    "model.safetensors": lambda state, path: safetensors.torch.save_file(state, path),
    "model.pt": torch.save,
    "model.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filename", SAVERS)
@pytest.mark.parametrize("kind", [str, Path])
def test_files_are_read(tmp_path, filename, dtype, kind):
    state = originals.CNN().to(dtype).state_dict()
    SAVERS[filename](state, tmp_path / filename)
    from_file = load_torch(abstract("CNN"), kind(tmp_path / filename))
    assert_same_bits(to_torch(from_file), to_torch(load_torch(abstract("CNN"), state)))


def test_safetensors_written_from_flax_are_read_by_torch(tmp_path):
    port = models.CNN(nnx.Rngs(0))
    safetensors.numpy.save_file(to_torch(port), tmp_path / "model.safetensors")
    original = originals.CNN()
    original.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    assert_same_bits(to_torch(port), {name: tensor.numpy() for name, tensor in original.state_dict().items()})


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))], ids=["zip", "raw"]
)
def test_pickle_that_runs_code_is_refused(tmp_path, save, monkeypatch):
    trap, path = tmp_path / "trap", tmp_path / "model.pt"
    save({"weight": torch.zeros(1, 1), "bias": Malicious(trap)}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match=r"model.pt is broken, or holds more than tensors"):
        load_torch(nnx.Linear(1, 1, rngs=RNGS), path)
    assert not trap.exists()
    if save is torch.save:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trap.exists()  # so the file was armed


@pytest.mark.parametrize("filename", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize(
    "contents", [b"", b"garbage", b"\x80\x02", "truncated"], ids=["empty", "garbage", "pickle", "truncated"]
)
def test_broken_file_is_named(tmp_path, filename, contents):
    path = tmp_path / filename
    if contents == "truncated":
        SAVERS[filename](originals.CNN().state_dict(), path)
        contents = path.read_bytes()[:2000]
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=filename):
        load_torch(abstract("CNN"), path)


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        (nn.Linear(1, 1), ValueError, "save model.state_dict"),
        (torch.zeros(3), TypeError, "holds a Tensor, expected a dict"),
        ({"model": {"weight": torch.zeros(1)}, "epoch": 3}, TypeError, "'model' is a dict, 'epoch' is a int"),
    ],
    ids=["module", "tensor", "checkpoint"],
)
def test_file_of_something_else_is_refused(tmp_path, contents, error, message):
    torch.save(contents, tmp_path / "model.pt")
    with pytest.raises(error, match=message):
        load_torch(nnx.Linear(1, 1, rngs=RNGS), tmp_path / "model.pt")


def test_unknown_suffix_is_refused():
    with pytest.raises(ValueError, match=r"weights.npz is no state_dict: expected a .safetensors, .pt or .pth file"):
        load_torch(nnx.Linear(1, 1, rngs=RNGS), "weights.npz")


def test_public_names_are_listed_and_others_refused():
    from jaxloss import parity

    assert all(callable(getattr(parity, name)) for name in parity.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        parity.nonsense  # noqa: B018


def test_weights_travel_without_torch(tmp_path):
    code = f"""if True:
        import sys
        sys.modules["torch"] = None  # an import of it fails
        from flax import nnx
        from safetensors.numpy import save_file
        from jaxloss.parity import load_torch, to_torch, weight_map
        path = {str(tmp_path / "model.safetensors")!r}
        save_file(to_torch(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), path)
        load_torch(nnx.Linear(2, 3, rngs=nnx.Rngs(1)), path)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_stacked_by_vmap_are_named():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    port = nnx.Dict(layers=stacked(jax.random.split(jax.random.key(0), 3)))
    state = nn.Sequential(OrderedDict(layers=nn.Linear(4, 4))).state_dict()
    with pytest.raises(ValueError, match=r"layers.bias has shape \(3, 4\), its layer says \(4,\). If nnx.vmap"):
        load_torch(port, state)
