"""The parity engine's losses: of any shape of outputs, with weights, with classes on the last axis."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jaxloss
from jaxloss import parity
from jaxloss.parity import load_torch
from parity_tests.zoo import randomise

WORDS, LENGTH = 11, 7
CROSS_ENTROPY = F.cross_entropy, jaxloss.cross_entropy


class TorchTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


class Tagger(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.head = nnx.Embed(WORDS, 8, rngs=rngs), nnx.Linear(8, WORDS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.embed(tokens)))


def tagger(port: Callable[[nnx.Rngs], nnx.Module] = Tagger) -> tuple[nn.Module, nnx.Module, torch.Tensor]:
    torch.manual_seed(0)
    original = randomise(TorchTagger())
    return original, parity.load_torch(port(nnx.Rngs(0)), original.state_dict()), tokens(WORDS, LENGTH)


def tokens(classes: int, length: int) -> torch.Tensor:
    return torch.randint(0, classes, (2, length))


@pytest.mark.parametrize(
    "losses",
    [
        CROSS_ENTROPY,
        (nn.CrossEntropyLoss(label_smoothing=0.1), jaxloss.CrossEntropyLoss(label_smoothing=0.1)),
        (F.nll_loss, jaxloss.nll_loss),
        (lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()), jaxloss.cross_entropy),
    ],
    ids=["functions", "modules", "nll", "by hand"],
)
def test_targets_may_leave_out_the_last_axis(losses, parity):
    original, port, words = tagger()
    report = parity.check(original, port, (words, tokens(WORDS, LENGTH)), losses=losses, steps=2)
    assert not any("not judged" in note for note in report.notes)  # the head's bias has a gradient, and moves


def test_targets_that_are_drawn_leave_out_the_last_axis_behind_a_linear_layer(parity):
    report = parity.check(*tagger(), steps=2)
    assert "No targets were given: classes of axis 2 are drawn, equally likely." in report.notes
    assert not any("not judged" in note for note in report.notes)


@pytest.mark.parametrize("targets", [tokens(LENGTH, WORDS), torch.rand(2, LENGTH, WORDS)], ids=["indices", "masses"])
def test_targets_may_leave_out_axis_1_where_the_port_has_it_too(targets, parity):
    original, port, words = tagger()
    parity.check(original, port, (words, targets), steps=1)


def test_axis_1_is_the_channels_of_a_convolution(parity):
    original, port = randomise(nn.Conv2d(3, 5, 1)), nnx.Conv(3, 5, (1, 1), rngs=nnx.Rngs(0))
    report = parity.check(original, port, torch.randn(2, 3, 4, 4), steps=1)
    assert "No targets were given: classes of axis 1 are drawn, equally likely." in report.notes


class FlatLoss(nn.CrossEntropyLoss):
    """Whose outputs are flattened by itself."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(outputs.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (FlatLoss(), lambda z, t: jaxloss.cross_entropy(z.reshape(-1, WORDS), t.reshape(-1))),
        (partial(F.cross_entropy, label_smoothing=0.1), partial(jaxloss.cross_entropy, label_smoothing=0.1)),
    ],
    ids=["subclass", "partial"],
)
def test_losses_of_other_kinds_are_called_as_they_are(theirs, ours, parity):
    original, port, words = tagger()
    parity.check(original, port, (words, tokens(WORDS, LENGTH)), losses=(theirs, ours), steps=1, dtypes=["float64"])


def test_outputs_that_are_transposed_behind_the_last_layer_have_pytorchs_classes(parity):
    class Original(TorchTagger):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens).movedim(-1, 1)

    class Port(Tagger):
        def __call__(self, tokens: jax.Array) -> jax.Array:
            return jnp.moveaxis(super().__call__(tokens), -1, 1)

    original = randomise(Original())
    port = load_torch(Port(nnx.Rngs(0)), original.state_dict())
    losses = nn.CrossEntropyLoss(), partial(jaxloss.cross_entropy, axis=1)
    report = parity.check(original, port, tokens(WORDS, LENGTH), losses=losses, steps=1, dtypes=["float64"])
    assert "No targets were given: classes of axis 1 are drawn, equally likely." in report.notes


class TorchPlaces(nn.Module):
    """A linear layer over the channels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("targets", [None, (2, 4, 6), (2, 5, 4)], ids=["drawn", "channels", "the last axis"])
def test_port_may_have_the_channels_last_behind_a_linear_layer(targets, parity):
    torch.manual_seed(0)
    original, port = randomise(TorchPlaces()), nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    names = {kind: f"head.{kind}" for kind in ("weight", "bias")}
    images = torch.randn(2, 3, 4, 6)
    batch = images if targets is None else (images, torch.randint(0, 5, targets))
    parity.check(original, load_torch(port, original.state_dict(), names=names), batch, names=names, steps=1)


class Shifted(Tagger):
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return super().__call__(tokens) + jnp.arange(WORDS)


@pytest.mark.parametrize("losses", [CROSS_ENTROPY, (F.cross_entropy, partial(jaxloss.cross_entropy, reduction="sum"))])
def test_faults_are_found_with_the_classes_last(losses):
    port = Shifted if losses is CROSS_ENTROPY else Tagger
    report = parity.check(*tagger(port), losses=losses, steps=0, dtypes=["float64"])
    place = "loss" if port is Tagger else "between head and the output"
    assert report.first_divergence.place == place, str(report)


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=["function", "module"])
def test_golden_file_keeps_targets_without_the_last_axis(loss, tmp_path):
    original, port, words = tagger()
    parity.record(tmp_path / "words", original, (words, tokens(WORDS, LENGTH)), loss=loss, steps=1, dtypes=["float64"])
    given: Any = None if loss is F.cross_entropy else jaxloss.cross_entropy
    report = parity.replay(tmp_path / "words", port, loss=given)
    assert report.ok, str(report)


def linear() -> tuple[nn.Module, nnx.Module]:
    torch.manual_seed(0)
    original = nn.Linear(4, 3)
    return original, parity.load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), original.state_dict())


def test_loss_may_be_a_module_with_weights(parity):
    weight = torch.tensor([0.5, 1.0, 2.0])
    losses = nn.CrossEntropyLoss(weight=weight), jaxloss.CrossEntropyLoss(weight=weight.numpy())
    parity.check(*linear(), torch.randn(5, 4), losses=losses, steps=1)
    assert losses[0].weight.dtype is torch.float32


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-9], ids=["right", "wrong"])
def test_gradient_of_the_loss_may_be_the_same_everywhere(factor):
    losses = lambda outputs, targets: outputs.mean(), lambda outputs, targets: outputs.mean() * factor
    report = parity.check(*linear(), torch.randn(5, 4), losses=losses, steps=1)
    assert report.ok is (factor == 1), str(report)
    assert ("loss", "gradient") in {(finding.place, finding.quantity) for finding in report.findings}
