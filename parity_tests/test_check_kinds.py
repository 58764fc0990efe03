"""The parity engine on ports that are no NNX modules."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import linen, nnx
from torch import nn

from jaxloss import parity
from jaxloss.parity import load_torch
from parity_tests.zoo import randomise


class LinenResidual(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = linen.Conv(8, (3, 3), padding=1, dtype=jnp.float32)(x)
        y = linen.relu(linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False)(y))
        y = linen.Dropout(0.5, broadcast_dims=(1, 2))(y, not train)
        y = linen.max_pool(y, (2, 2), (2, 2)).reshape(len(y), -1)
        return linen.Dense(5)(y)


class TorchSmall(nn.Sequential):
    def __init__(self) -> None:
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5), nn.MaxPool2d(2)
        super().__init__(*layers, nn.Flatten(), nn.Linear(8 * 16, 5))


def linen_port(original: nn.Module) -> tuple[linen.Module, Any]:
    """The port with the original's weights."""
    state = {name: jnp.array(tensor.numpy()) for name, tensor in original.state_dict().items()}
    kernel = state["6.weight"].reshape(5, 8, 4, 4).transpose(2, 3, 1, 0).reshape(-1, 5)
    params = {
        "Conv_0": {"kernel": state["0.weight"].transpose(2, 3, 1, 0), "bias": state["0.bias"]},
        "BatchNorm_0": {"scale": state["1.weight"], "bias": state["1.bias"]},
        "Dense_0": {"kernel": kernel, "bias": state["6.bias"]},
    }
    statistics = {"BatchNorm_0": {"mean": state["1.running_mean"], "var": state["1.running_var"]}}
    return LinenResidual(), {"params": params, "batch_stats": statistics}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_linen_module_is_compared_layer_by_layer(train):
    torch.manual_seed(0)
    original = randomise(TorchSmall())
    report = parity.check(original, linen_port(original), torch.randn(6, 3, 8, 8), train=train, steps=2)
    assert {"0", "1", "6", "between 1 and 6", "between 6 and the output"} <= report.places().keys()
    failures = [(finding.place, finding.quantity) for finding in report.failures()]
    assert failures == ([("1", "running_var after a step")] if train else []), str(report)
    if train:  # Flax's own batch norm is the one that differs
        assert "by n, PyTorch by n - 1" in report.first_divergence.diagnosis


def test_fault_in_a_linen_module_is_found():
    torch.manual_seed(0)
    original = randomise(TorchSmall())
    module, variables = linen_port(original)
    kernel = variables["params"]["Conv_0"]["kernel"]
    variables["params"]["Conv_0"]["kernel"] = kernel.swapaxes(0, 1)
    report = parity.check(original, (module, variables), torch.randn(6, 3, 8, 8), steps=0, dtypes=["float64"])
    assert (report.first_divergence.place, report.first_divergence.kind) == ("0", "layout")


def test_function_with_params_is_compared_as_a_whole():
    def forward(params: Any, x: jax.Array) -> jax.Array:
        return (
            jax.nn.relu(x @ params["0"]["kernel"] + params["0"]["bias"]) @ params["2"]["kernel"] + params["2"]["bias"]
        )

    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    state = {name: jnp.array(tensor.numpy()) for name, tensor in original.state_dict().items()}
    params = {i: {"kernel": state[f"{i}.weight"].T, "bias": state[f"{i}.bias"]} for i in ("0", "2")}
    report = parity.check(original, (forward, params), torch.randn(5, 4), steps=2)
    assert report.ok, str(report)
    assert any("layers are unknown" in note for note in report.notes)
    assert ("whole network", "gradient of 2.weight") in {(f.place, f.quantity) for f in report.findings}
    params["2"]["bias"] = params["2"]["bias"] + 1
    report = parity.check(original, (forward, params), torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert not report.ok
    with pytest.raises(TypeError, match="the port is a function, expected"):
        parity.check(original, forward, torch.randn(5, 4))


@pytest.mark.parametrize("kind", ["function", "module"])
def test_integers_among_parameters_are_not_trained(kind):
    def forward(params: Any, x: jax.Array) -> jax.Array:
        x = x @ params["fc"]["w"] + params["fc"]["b"]
        return x.reshape(len(x), params["classes"])[:, params["order"]]

    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.register_buffer("order", torch.tensor([1, 0, 2]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)[:, self.order]

    class Port(nnx.Module):
        def __init__(self) -> None:
            self.fc = parity.load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), original.fc.state_dict())
            self.order = nnx.Param(state["order"])

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc(x)[:, self.order[...]]

    torch.manual_seed(0)
    original = Original()
    state = {name: jnp.array(tensor.numpy()) for name, tensor in original.state_dict().items()}
    params = {"fc": {"w": state["fc.weight"].T, "b": state["fc.bias"]}, "classes": 3, "order": state["order"]}
    port = (forward, params) if kind == "function" else Port()
    report = parity.check(original, port, torch.randn(5, 4), steps=2, dtypes=["float64"])
    assert report.ok, str(report)
    params["order"] = params["order"][::-1]
    report = parity.check(original, (forward, params), torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert report.first_divergence.quantity == "order"


class TorchMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        weights = (h[:, None] @ h[:, None].transpose(-1, -2) + mask).softmax(-1)
        return self.last((weights @ h[:, None])[:, 0].mean(1))


class FlaxMasked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        h = self.first(x)
        weights = jax.nn.softmax(h[:, None] @ h[:, None].swapaxes(-1, -2) + mask)
        return self.last((weights @ h[:, None])[:, 0].mean(1))


@pytest.mark.parametrize("queries", [1, 5])
def test_mask_of_attention_is_no_image(queries, parity):
    torch.manual_seed(0)
    original = TorchMasked()
    port = load_torch(FlaxMasked(nnx.Rngs(0)), original.state_dict())
    mask = torch.where(torch.rand(2, 1, queries, 5) < 0.3, -1e4, 0.0)
    parity.check(original, port, (torch.randn(2, 5, 4), mask, torch.tensor([0, 2])), steps=1, dtypes=["float64"])


def test_table_that_both_compute_does_not_stand_for_weights_that_are_copied():
    original, port = TorchMasked(), FlaxMasked(nnx.Rngs(0))
    original.register_buffer("table", torch.arange(6.0).sin())
    port.table = nnx.Variable(jnp.sin(jnp.arange(6.0)))
    batch = torch.randn(2, 5, 4), torch.zeros(2, 1, 1, 5), torch.tensor([0, 2])
    report = parity.check(original, port, batch, steps=0, dtypes=["float64"])
    assert any("PyTorch's were copied" in note for note in report.notes), str(report)
    assert report.ok, str(report)


class Flagged(nnx.Module):
    """Drops if the call says so, whatever mode the module is in."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.a, self.dropout, self.b = (
            nnx.Linear(6, 16, rngs=rngs),
            nnx.Dropout(0.3, rngs=rngs),
            nnx.Linear(16, 4, rngs=rngs),
        )

    def drop(self, x: jax.Array, off: bool) -> jax.Array:
        return self.b(self.dropout(nnx.relu(self.a(x)), deterministic=off))


class Deterministic(Flagged):
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        return self.drop(x, deterministic)


class Training(Flagged):
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.drop(x, not train)


class Given(Flagged):
    """What is called train is an input."""

    def __call__(self, x: jax.Array, train: jax.Array) -> jax.Array:
        return self.b(nnx.relu(self.a(x)) * train)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("port", [Deterministic, Training])
def test_a_port_whose_call_takes_the_mode_is_given_it(port, train, parity):
    original = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
    names = {"a.weight": "0.weight", "a.bias": "0.bias", "b.weight": "3.weight", "b.bias": "3.bias"}
    parity.check(original, port(), torch.randn(8, 6), names=names, train=train)


def test_an_input_of_the_name_of_a_mode_stays_an_input(parity):
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)) * factor)

    parity.check(Original(), Given(), (torch.randn(8, 6), torch.randn(8, 16)), losses=None)


def test_a_mask_that_leaves_nothing_out_tells_nothing():
    class Original(nn.Linear):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * mask[:, None]

    class Port(nnx.Linear):
        def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
            return super().__call__(x)

    original = Original(4, 3)
    port = load_torch(Port(4, 3, rngs=nnx.Rngs(0)), original.state_dict())
    for mask, ok in ((torch.ones(5, dtype=torch.long), True), (torch.arange(5) % 2, False)):
        report = parity.check(original, port, (torch.randn(5, 4), mask), losses=None, steps=0, dtypes=["float64"])
        assert report.ok is ok
        assert any("One number everywhere in input 1" in note for note in report.notes) is ok
