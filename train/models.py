"""The three models of the source notes in Flax NNX: channels-last, with PyTorch's default initialisation.

Attributes carry the names of the PyTorch originals, so `jaxloss.parity.load_torch` and `to_torch` convert by name.
A `LinearGeneral` reads the last feature map axis by axis, where PyTorch flattens it: the shape of its kernel records
what PyTorch's flatten forgets, and the conversion needs no hint.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

import jaxloss
from train.convolution import conv_in_cells, to_cells


class DropoutMasks(NamedTuple):
    """Which activations of `Net` survive dropout, one field per dropout layer."""

    conv2_drop: Bool[ArrayLike, "batch 1 1 20"]
    dropout: Bool[ArrayLike, "batch 50"]


class CNN(nnx.Module):
    """Two convolutions and a linear layer. Returns logits, for `jaxloss.cross_entropy`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the weights from `rngs`: PyTorch's defaults, but for `fc`'s weight, which is xavier_uniform."""
        # The original applies relu before max_pool. Both orders give the same values and the same gradients;
        # this one touches a quarter of the elements.
        self.layer1 = nnx.Sequential(_conv(1, 32, 3, padding=1, rngs=rngs), max_pool, nnx.relu)
        self.layer2 = nnx.Sequential(_conv(32, 64, 3, padding=1, rngs=rngs), max_pool, nnx.relu)
        self.fc = _linear((7, 7, 64), 10, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)

    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
        """Logits of the ten classes."""
        return self.fc(self.layer2(self.layer1(images)))


class Net(nnx.Module):
    """Two convolutions and two linear layers with dropout. Returns log-probabilities, for `jaxloss.nll_loss`."""

    RATE = 0.5  # of both dropouts

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the weights, and later the dropout masks, from `rngs`."""
        self.conv1 = _conv(1, 10, 5, padding=0, conv=conv_in_cells, rngs=rngs)
        self.conv2 = _conv(10, 20, 5, padding=0, conv=conv_in_cells, rngs=rngs)
        self.conv2_drop = nnx.Dropout(
            self.RATE, broadcast_dims=(1, 2), rngs=rngs
        )  # PyTorch's Dropout2d: whole channels
        self.fc1 = _linear((4, 4, 20), 50, rngs=rngs)
        self.dropout = nnx.Dropout(self.RATE, rngs=rngs)
        self.fc2 = _linear((50,), 10, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch 28 28 1"], masks: DropoutMasks | None = None
    ) -> Float[Array, "batch 10"]:
        """Log-probabilities of the ten classes.

        Args:
            images: (batch, 28, 28, 1).
            masks: what dropout keeps in train mode, instead of masks drawn from the model's own random stream.

        Returns:
            (batch, 10).
        """
        conv2_mask, feature_mask = masks or (None, None)
        x = nnx.relu(max_pool(self.conv1(images)))  # (batch, 12, 12, 10)
        x = nnx.relu(max_pool(_drop(self.conv2_drop, self.conv2(x), conv2_mask)))  # (batch, 4, 4, 20)
        x = _drop(self.dropout, nnx.relu(self.fc1(x)), feature_mask)  # (batch, 50)
        return jaxloss.log_softmax(self.fc2(x))


class ExNN(nnx.Module):
    """A classifier of points in the plane with two heads, one for each of the two losses."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the weights from `rngs`."""
        self.fc1 = _linear((2,), 8, rngs=rngs)
        self.fc2 = _linear((8,), 3, rngs=rngs)

    def forward1(self, points: Float[Array, "batch 2"]) -> Float[Array, "batch 3"]:
        """Logits, for `jaxloss.cross_entropy`."""
        return self.fc2(self.fc1(points))

    def forward2(self, points: Float[Array, "batch 2"]) -> Float[Array, "batch 3"]:
        """Log-probabilities, for `jaxloss.nll_loss`."""
        return jaxloss.log_softmax(self.forward1(points))


def max_pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height//2 width//2 channels"]:
    """PyTorch's `F.max_pool2d(x, 2)` bit for bit, in values and gradients.

    A maximum over cells: on CPU its gradient is several times as fast as that of `lax.reduce_window`. As in
    PyTorch an odd last row or column is dropped, a NaN wins its window, and of equal maxima the first in row-major
    order receives the gradient, which `jnp.maximum` would divide.
    """
    cells = to_cells(x)
    largest, *others = (cells[:, :, :, i, j] for i in (0, 1) for j in (0, 1))
    for other in others:
        largest = jnp.where((other > largest) | jnp.isnan(other), other, largest)
    return largest


def _drop(layer: nnx.Dropout, x: Float[Array, "..."], mask: Bool[ArrayLike, "..."] | None) -> Float[Array, "..."]:
    """Applies a dropout layer, with the given mask of what to keep if there is one."""
    if mask is None or layer.deterministic:
        return layer(x)
    return jnp.where(mask, x / (1 - layer.rate), 0)


def _conv(
    in_features: int,
    out_features: int,
    size: int,
    *,
    padding: int,
    conv: Callable[..., Array] = jax.lax.conv_general_dilated,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution with PyTorch's default initialisation."""
    init = _uniform(in_features * size**2)
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        padding=padding,
        kernel_init=init,
        bias_init=init,
        conv_general_dilated=conv,
        rngs=rngs,
    )


def _linear(
    in_features: tuple[int, ...], out_features: int, *, kernel_init: Initializer | None = None, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    """A linear layer over the last axes, which are `in_features`, with PyTorch's default initialisation."""
    init = _uniform(math.prod(in_features))
    axes = tuple(range(-len(in_features), 0))
    return nnx.LinearGeneral(
        in_features, out_features, axis=axes, kernel_init=kernel_init or init, bias_init=init, rngs=rngs
    )


def _uniform(fan_in: int) -> Initializer:
    """PyTorch's default initialisation U(-1/√fan_in, 1/√fan_in), which biases share with the weights."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
