"""Gradients and steps: frozen, stopped, constant, NaN, of integers, or of layers that nothing uses."""

from typing import Any

import jax
import optax
import pytest
import torch
from flax import nnx
from torch import nn

from jaxloss import parity
from jaxloss.parity import load_torch
from parity_tests.small import small
from parity_tests.without_torch import BatchNorm


def test_frozen_parameters_are_held_fixed(parity):
    module, port = small()
    module.bias.requires_grad_(False)
    report = parity.check(module, port, torch.randn(5, 4), steps=2, dtypes=["float64"])
    assert any("does not train bias" in note for note in report.notes)


def test_gradients_that_are_nan_or_zero_everywhere_end_in_a_report():
    def constant(outputs: Any, targets: Any) -> Any:
        return (outputs * 0).sum()

    def nan(outputs: Any, targets: Any) -> Any:
        return ((outputs * 0) ** 0.5).sum()

    module, port = small()
    for loss in (constant, nan):
        report = parity.check(module, port, torch.randn(5, 4), losses=(loss, loss), steps=2)
        assert not report.ok
        assert report.first_divergence is not None


def test_integer_parameters_and_an_unknown_step_difference_end_in_a_report():
    module, port = small()
    module.count = nn.Parameter(torch.arange(3), requires_grad=False)
    pair = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.8), optax.sgd(0.0, momentum=0.7)
    report = parity.check(
        module, port, torch.randn(5, 4), optimizers=pair, steps=3, dtypes=["float64"], ignore=["count"]
    )
    first = report.first_divergence
    assert (first.place, first.quantity) == ("step 2", "momentum_buffer of weight")
    assert "KeyError" not in first.fix


def test_difference_below_what_can_be_told_apart_gets_no_reason():
    module, port = small()
    pair = torch.optim.SGD(module.parameters(), lr=0.1), optax.sgd(0.1 * (1 + 4e-9))
    first = parity.check(module, port, torch.randn(5, 4), optimizers=pair, dtypes=["float64"]).first_divergence
    assert first.place.startswith("step ")
    assert "nesterov" not in first.diagnosis


def test_parameter_may_be_called_like_what_a_step_keeps_and_another_be_empty():
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.add_module("mean of x", nn.Linear(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule("mean of x")(x)

    class Port(nnx.Module):
        def __init__(self) -> None:
            setattr(self, "mean of x", nnx.Linear(4, 3, rngs=nnx.Rngs(0)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return getattr(self, "mean of x")(x)

    torch.manual_seed(0)
    module = Original()
    port = parity.load_torch(Port(), module.state_dict(), ignore=["empty"])
    pair = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), optax.sgd(0.01, momentum=0.9)
    first = parity.check(
        module, port, torch.randn(5, 4), optimizers=pair, steps=2, dtypes=["float64"], ignore=["empty"]
    ).first_divergence
    assert (first.place, first.quantity) == ("step 1", "mean of x.weight")
    assert first.diagnosis == "The port's lr is 0.01, PyTorch's 0.1."


def test_layer_that_nothing_uses_passes(parity):
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            return self.used(x)

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.used, self.unused = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            self.unused(x)
            return self.used(x)

    parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(5, 4), steps=1, dtypes=["float64"])


@pytest.mark.parametrize("where", ["original", "port"])
def test_gradient_that_only_one_framework_stops_is_found(where):
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x.detach() if where == "original" else x)

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.b = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.a(x) + self.b(jax.lax.stop_gradient(x) if where == "port" else x)

    report = parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert "gradient of the input" in [finding.quantity for finding in report.failures()]


def test_our_own_translation_with_param_groups_passes():
    module, port = small()
    groups = [{"params": [module.weight], "lr": 0.1}, {"params": [module.bias], "lr": 0.01}]
    adam = torch.optim.Adam(groups)
    pair = adam, parity.optimizer(adam, groups={"weight": 0, "bias": 1})
    report = parity.check(module, port, torch.randn(5, 4), optimizers=pair, steps=3, dtypes=["float64"])
    assert report.ok, str(report)


def test_gradients_that_are_the_same_everywhere_may_be_right(parity):
    class Original(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).sum()

    class Port(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.fc(x).sum()

    original = Original()
    port = load_torch(Port(nnx.Rngs(0)), original.state_dict())
    parity.check(original, port, torch.randn(5, 4), losses=None, steps=1, dtypes=["float64"])


def frozen_embedding() -> tuple[nn.Module, nnx.Module]:
    original = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).requires_grad_(False)
    rngs = nnx.Rngs(0)
    port = nnx.Sequential(nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs))
    return original, load_torch(port, original.state_dict())


def test_frozen_network_of_integers_is_compared_forward(parity):
    original, port = frozen_embedding()
    report = parity.check(original, port, torch.tensor([0, 6, 3, 3]), dtypes=["float64"])
    assert {"0", "1", "loss"} <= report.places().keys()
    assert not any("gradient of" in finding.quantity for finding in report.findings)
    assert "PyTorch's module trains nothing: no gradients of weights and no steps are compared." in report.notes


def test_fault_of_a_frozen_network_of_integers_is_found():
    original, port = frozen_embedding()
    port.layers[1].bias.set_value(port.layers[1].bias[...] + 1e-6)
    report = parity.check(original, port, torch.tensor([0, 6, 3, 3]), dtypes=["float64"])
    assert (report.first_divergence.place, report.first_divergence.quantity) == ("1", "bias")


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_running_statistics_that_are_averages_of_all_steps_are_noted(momentum):
    original = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=momentum))
    rngs = nnx.Rngs(0)
    port = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), BatchNorm(3, momentum=0.9, rngs=rngs))
    report = parity.check(original, port, torch.randn(5, 4), train=True, steps=0, dtypes=["float64"])
    told = "1 average over all steps (momentum=None): only the first step's is compared."
    assert (told in report.notes) is (momentum is None)
