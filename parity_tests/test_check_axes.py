"""Right ports that have a layer's axes in another order than PyTorch."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F  # noqa: N812

from jaxloss import parity
from jaxloss.parity import load_torch
from jaxloss.parity._layout import same
from jaxloss.parity._pairs import activation_layouts, nearest
from parity_tests.zoo import randomise

QUICK: dict[str, Any] = {"dtypes": ["float64"], "steps": 1}
HEADS, WIDTH = 4, 8


class QueryKeyNorm(nn.Module):
    """Attention that normalises (batch, heads, positions, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(attended.transpose(1, 2).reshape(x.shape)).mean(1)


class QueryKeyNormPort(nnx.Module):
    """The same on (batch, positions, heads, width)."""

    def __init__(self, epsilon: float = 1e-5) -> None:
        rngs = nnx.Rngs(0)
        self.q, self.k, self.v, self.out = (nnx.Linear(HEADS * WIDTH, HEADS * WIDTH, rngs=rngs) for _ in range(4))
        self.q_norm, self.k_norm = (nnx.LayerNorm(WIDTH, epsilon=each, rngs=rngs) for each in (epsilon, 1e-5))

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (layer(x).reshape(*x.shape[:2], HEADS, WIDTH) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", self.q_norm(q), self.k_norm(k)) / math.sqrt(WIDTH)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)).mean(1)


@pytest.mark.parametrize("positions", [6, HEADS])
def test_heads_that_the_port_has_after_the_positions(positions: int):
    original, batch = randomise(QueryKeyNorm()), torch.randn(3, positions, HEADS * WIDTH)
    assert parity.check(original, load_torch(QueryKeyNormPort(), original.state_dict()), batch, **QUICK).ok
    wrong = load_torch(QueryKeyNormPort(1e-3), original.state_dict())
    report = parity.check(original, wrong, batch, **QUICK)
    assert report.first_divergence.place == "q_norm"
    assert "epsilon is 0.001, PyTorch's 1e-05" in report.first_divergence.diagnosis
    places = {finding.place for finding in report.failures()}
    assert places == {"q_norm", "whole network", "step 1"}


class SequenceFirst(nn.Module):
    """(batch, positions, 6) in, and (positions, batch, 8) within."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.first, self.second = nn.Dropout(0.4), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(torch.relu(self.a(x.transpose(0, 1)))))
        return self.b(self.second(x)).transpose(0, 1).mean(1)


class BatchFirst(nnx.Module):
    """The same, (batch, positions, 8) within; or with axes forgotten at the end."""

    def __init__(self, axis: int = 1) -> None:
        rngs = nnx.Rngs(0)
        self.a, self.norm, self.b = (
            nnx.Linear(6, 8, rngs=rngs),
            nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs),
            nnx.Linear(8, 3, rngs=rngs),
        )
        self.first, self.second, self.axis = nnx.Dropout(0.4, rngs=rngs), nnx.Dropout(0.2, rngs=rngs), axis

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(self.second(self.norm(self.first(nnx.relu(self.a(x)))))).mean(self.axis)


@pytest.mark.parametrize("positions", [5, 4])
def test_a_sequence_that_the_port_has_after_the_batch(positions: int):
    original, batch = randomise(SequenceFirst()), torch.randn(4, positions, 6)
    port = load_torch(BatchFirst(), original.state_dict())
    report = parity.check(original, port, batch, train=True, **QUICK)
    assert report.ok
    told = "By its numbers, the port has the axes of a, norm, b in another order than PyTorch."
    assert (told in report.notes) == (positions == 4)


def test_axes_that_the_port_forgot_differ_where_they_matter():
    original, batch = randomise(SequenceFirst()), torch.randn(4, 4, 6)
    report = parity.check(original, load_torch(BatchFirst(0), original.state_dict()), batch, **QUICK)
    assert report.first_divergence.place == "between b and the output"


class ImageNorm(nn.Module):
    """Normalises (batch, channels, height, width) over the channels, and is no class that PyTorch has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias).movedim(-1, 1)


@pytest.mark.parametrize("size", [24, 32])
def test_as_many_channels_as_rows_and_columns(size: int):
    class Port(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.stem = nnx.Conv(3, 8, (4, 4), 4, padding=0, rngs=rngs)
            self.norm, self.head = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(nnx.relu(self.norm(self.stem(x))).mean((1, 2)))

    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), ImageNorm(8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.relu(self.norm(self.stem(x))).mean((2, 3)))

    original = randomise(Original())
    batch = torch.randn(2, 3, size, size), torch.randint(5, (2,))
    assert parity.check(original, load_torch(Port(), original.state_dict()), batch, **QUICK).ok


def test_another_order_is_taken_only_where_the_numbers_are_far_nearer():
    theirs = np.random.default_rng(0).normal(size=(3, 3, 2))
    layouts = activation_layouts(theirs.shape, theirs.shape)
    assert [layout.order for layout in layouts] == [(0, 1, 2), (1, 0, 2)]
    noise = np.random.default_rng(1).normal(size=theirs.shape)
    for ours, order in (
        (theirs, (0, 1, 2)),
        (theirs.swapaxes(0, 1), (1, 0, 2)),
        (theirs.swapaxes(0, 1) + 0.01 * noise, (1, 0, 2)),
        (theirs.swapaxes(0, 1) + 0.5 * noise, (0, 1, 2)),
        (noise, (0, 1, 2)),
        (np.full_like(theirs, np.nan), (0, 1, 2)),
    ):
        assert nearest(layouts, ours, theirs).order == order
    assert activation_layouts((3, 4, 6), (3, 6, 2, 2))[0].split == (3, 4, 6)
    assert activation_layouts((3, 4, 6), (3, 6, 3)) == []
    assert activation_layouts((), ()) == [same(())]


def test_a_forgotten_transposition_is_no_other_order_of_the_layer_after_it():
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.tokens = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)

    class Port(nnx.Module):
        def __init__(self, *, forgot: bool) -> None:
            rngs, self.forgot = nnx.Rngs(0), forgot
            self.norm, self.tokens = nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            y = self.norm(x)
            y = self.tokens(y if self.forgot else y.swapaxes(1, 2))
            return x + (y if self.forgot else y.swapaxes(1, 2))

    original, batch = randomise(Mixer()), torch.randn(3, 4, 4)
    for forgot in (False, True):
        port = load_torch(Port(forgot=forgot), original.state_dict())
        report = parity.check(original, port, batch, losses=None, **QUICK)
        assert report.ok is not forgot
    assert report.first_divergence.place == "between norm and tokens"
    assert "transposition is missing" in report.first_divergence.diagnosis
