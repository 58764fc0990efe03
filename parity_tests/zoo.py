"""Small networks in both frameworks: the toolkit must find the faults that ports of them have."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jaxloss
from jaxloss.parity import Report, check, load_torch
from parity_tests.without_torch import BatchNorm
from train import models, originals


class TorchResidual(nn.Module):
    """A ResNet-style block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        return self.fc(F.avg_pool2d(x, 3, stride=2, padding=1).mean((2, 3)))


def pad(size: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    return (size, size), (size, size)


class FlaxResidual(nnx.Module):
    """`TorchResidual`, ported."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        norm = {"momentum": 0.9, "epsilon": 1e-5, "use_fast_variance": False, "rngs": rngs}
        self.stem = nnx.Conv(3, 8, (3, 3), strides=(2, 2), padding=1, rngs=rngs)
        self.conv1 = nnx.Conv(8, 8, (3, 3), padding=1, rngs=rngs)
        self.bn1 = BatchNorm(8, **norm)
        self.conv2 = nnx.Conv(8, 8, (3, 3), padding=1, rngs=rngs)
        self.bn2 = BatchNorm(8, **norm)
        self.fc = nnx.Linear(8, 5, rngs=rngs)
        self.count_include_pad = True

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        y = nnx.relu(self.bn1(self.conv1(x)))
        x = self.join(self.bn2(self.conv2(y)), x)
        return self.fc(self.pool(x).mean((1, 2)))

    def pool(self, x: jax.Array) -> jax.Array:
        return nnx.avg_pool(x, (3, 3), (2, 2), pad(), count_include_pad=self.count_include_pad)

    def join(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return nnx.relu(y + x)


class TorchTransformer(nn.Module):
    """One pre-norm block over a sequence, with causal attention, and a head on its last position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1 = nn.LayerNorm(8)
        self.query, self.key, self.value, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.norm2 = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.proj(self.attend(self.norm1(x)))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, -1])

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (f(x).view(batch, length, 2, width // 2).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / (width // 2) ** 0.5
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = F.softmax(scores.masked_fill(mask, -torch.inf), dim=-1)
        return (weights @ v).transpose(1, 2).reshape(batch, length, width)


class FlaxTransformer(nnx.Module):
    """`TorchTransformer`, ported."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm1 = nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.query, self.key, self.value, self.proj = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))
        self.norm2 = nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 11, rngs=rngs)
        self.scale, self.causal, self.axis, self.approximate, self.filler = 0.5, True, -1, False, -jnp.inf
        self.scores, self.merged = "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.pool(self.feed(self.mix(self.embed(tokens)))))

    def mix(self, x: jax.Array) -> jax.Array:
        return x + self.proj(self.attend(self.norm1(x)))

    def feed(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=self.approximate))

    def pool(self, x: jax.Array) -> jax.Array:
        return x[:, -1]

    def attend(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        q, k, v = (f(x).reshape(batch, length, 2, width // 2) for f in (self.query, self.key, self.value))
        scores = jnp.einsum(self.scores, q, k) * self.scale
        if self.causal:
            scores = jnp.where(jnp.tri(length, dtype=bool), scores, self.filler)
        weights = jax.nn.softmax(scores, axis=self.axis)
        return jnp.einsum(self.merged, weights, v).reshape(batch, length, width)


class TorchFlat(nn.Module):
    """A convolution whose feature map is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 5 * 3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


class FlaxFlat(nnx.Module):
    """`TorchFlat`, ported: the rows of `fc` have to be permuted."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), padding=0, rngs=rngs)
        self.fc = nnx.Linear(4 * 5 * 3, 6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(nnx.relu(self.conv(x)).reshape(len(x), -1))


class TorchTied(nn.Module):
    """A classifier of sets of tokens whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens).max(1).values)


class FlaxTied(nnx.Module):
    """`TorchTied`, ported."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.head = nnx.Embed(7, 4, rngs=rngs), None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.pool(self.embed(tokens))
        return self.embed.attend(x) if self.head is None else self.head(x)

    def pool(self, x: jax.Array) -> jax.Array:
        """The maximum, whose gradient goes to the first of equals as in PyTorch."""
        return jnp.take_along_axis(x, x.argmax(1, keepdims=True), 1)[:, 0]


class TorchUpsample(nn.Module):
    """A transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.fc = nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.up(x)).mean((2, 3)))


class FlaxUpsample(nnx.Module):
    """`TorchUpsample`, ported."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.ConvTranspose(2, 3, (3, 3), (2, 2), padding="VALID", rngs=rngs)
        self.fc = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(nnx.relu(self.up(x)).mean((1, 2)))


class TorchGated(nn.Module):
    """A feed-forward layer as LLaMA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FlaxGated(nnx.Module):
    """`TorchGated`, ported."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.gate, self.up, self.down = (nnx.Linear(*sizes, rngs=rngs) for sizes in ((6, 8), (6, 8), (8, 5)))
        self.activation = nnx.silu

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class TorchRecurrent(nn.Module):
    """A classifier of sequences."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class FlaxRecurrent(nnx.Module):
    """`TorchRecurrent`, ported, with PyTorch's weights."""

    def __init__(self, step: Callable[..., Any], gates: int, rngs: nnx.Rngs) -> None:
        self.rnn, self.head, self.step = FusedWeights(gates), nnx.Linear(4, 5, rngs=rngs), step

    def __call__(self, x: jax.Array) -> jax.Array:
        start = jnp.zeros((len(x), 4), x.dtype)
        (last, _), _ = jax.lax.scan(partial(self.step, self.rnn), (start, start), x.swapaxes(0, 1))
        return self.head(last)


class FusedWeights(nnx.Module):
    """Four units' gates, of three inputs."""

    def __init__(self, gates: int) -> None:
        self.weight_ih_l0, self.weight_hh_l0 = (
            nnx.Param(jnp.zeros((4 * gates, 3))),
            nnx.Param(jnp.zeros((4 * gates, 4))),
        )
        self.bias_ih_l0, self.bias_hh_l0 = nnx.Param(jnp.zeros(4 * gates)), nnx.Param(jnp.zeros(4 * gates))

    def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ self.weight_ih_l0.T + self.bias_ih_l0, h @ self.weight_hh_l0.T + self.bias_hh_l0


Carry = tuple[jax.Array, jax.Array]


def lstm(weights: Any, carry: Carry, x: jax.Array, order: str = "ifgo", forget: float = 0.0) -> tuple[Carry, None]:
    h, c = carry
    parts = dict(zip(order, jnp.split(sum(weights(x, h)), 4, -1), strict=True))
    i, f, o = (jax.nn.sigmoid(parts[gate] + forget * (gate == "f")) for gate in "ifo")
    c = f * c + i * jnp.tanh(parts["g"])
    return (o * jnp.tanh(c), c), None


def gru(weights: Any, carry: Carry, x: jax.Array, order: str = "rzn") -> tuple[Carry, None]:
    h, unused = carry
    of_x, of_h = (dict(zip(order, jnp.split(part, 3, -1), strict=True)) for part in weights(x, h))
    r, z = (jax.nn.sigmoid(of_x[gate] + of_h[gate]) for gate in "rz")
    return ((1 - z) * jnp.tanh(of_x["n"] + r * of_h["n"]) + z * h, unused), None


class TorchBetween(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], channels: int) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Conv2d(2, 4, 1), nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x)).mean((2, 3)))


class FlaxBetween(nnx.Module):
    """`TorchBetween`, ported."""

    def __init__(self, function: Callable[[jax.Array], jax.Array], channels: int, rngs: nnx.Rngs) -> None:
        self.function, self.mean = function, lambda x: x.mean((1, 2))
        self.first, self.last = nnx.Conv(2, 4, (1, 1), rngs=rngs), nnx.Linear(channels, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.mean(self.function(self.first(x))))


def attend(x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
    places = x.flatten(2).transpose(1, 2)
    found = F.scaled_dot_product_attention(places[..., :2], places[..., 2:], places, is_causal=causal)
    return found.transpose(1, 2).reshape(x.shape)


def attend_in_jax(x: jax.Array, scale: float = 2**-0.5, *, swapped: bool = False, mask: Any = True) -> jax.Array:
    places = x.reshape(len(x), -1, x.shape[-1])
    query, key = jnp.split(places, 2, -1)[:: -1 if swapped else 1]
    weights = jax.nn.softmax(jnp.where(mask, query @ key.swapaxes(1, 2) * scale, -jnp.inf))
    return (weights @ places).reshape(x.shape)


def from_corner_to_corner(x: jax.Array) -> jax.Array:
    def weights(old: int) -> jax.Array:
        return jnp.maximum(0, 1 - jnp.abs(jnp.linspace(0, old - 1, 7, dtype=x.dtype)[:, None] - jnp.arange(old)))

    return jnp.einsum("ih,jw,nhwc->nijc", weights(x.shape[1]), weights(x.shape[2]), x)


def resized(x: jax.Array, size: int, method: str, *, antialias: bool = False) -> jax.Array:
    return jax.image.resize(x, (len(x), size, size, x.shape[-1]), method, antialias=antialias)


def nearest(x: jax.Array) -> jax.Array:
    return x[:, jnp.arange(7) * x.shape[1] // 7][:, :, jnp.arange(7) * x.shape[2] // 7]


def normalised(x: jax.Array, axes: tuple[int, ...], epsilon: float = 1e-5) -> jax.Array:
    return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + epsilon)


def by_groups(x: jax.Array) -> jax.Array:
    return normalised(x.reshape(*x.shape[:3], 2, 2), (1, 2, 4)).reshape(x.shape)


def by_root_mean_square(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)


RATES = (1.0, 0.3)


def angles_of(x: torch.Tensor, rates: Any = RATES) -> torch.Tensor:
    return torch.outer(torch.arange(x.shape[1]).to(x), torch.as_tensor(rates).to(x))


def turned_halves(x: torch.Tensor, rates: Any = RATES) -> torch.Tensor:
    """Rotary positions as in the original of many a language model."""
    angles = torch.cat([angles_of(x, rates)] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def turned_apart(x: torch.Tensor) -> torch.Tensor:
    """The same, half by half."""
    angles = angles_of(x)
    first, second, cos, sin = x[..., :2], x[..., 2:], angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def turned_neighbours(x: torch.Tensor) -> torch.Tensor:
    """The same, of neighbours as complex numbers."""
    angles = angles_of(x)
    pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], 2, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def turned_every_two(x: torch.Tensor) -> torch.Tensor:
    """The same, with angles for each channel."""
    angles = angles_of(x).repeat_interleave(2, -1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def turned_in_jax(
    pairs: str, way: int = 1, angles: str = "", scale: float = 1.0, rates: Any = RATES
) -> Callable[[jax.Array], jax.Array]:
    """Attention to places with rotary positions, which turn halves or neighbours by angles laid out for either."""

    def both(x: jax.Array, layout: str) -> jax.Array:
        return jnp.concatenate([x, x], -1) if layout == "halves" else jnp.repeat(x, 2, -1)

    def turn(x: jax.Array) -> jax.Array:
        places = way * jnp.arange(x.shape[1], dtype=x.dtype)
        angle = both(jnp.outer(places, jnp.asarray(rates, x.dtype)), angles or pairs)
        if pairs == "halves":
            turned = jnp.concatenate([-x[..., 2:], x[..., :2]], -1)
        else:
            turned = jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * jnp.cos(angle) + turned * jnp.sin(angle)

    def call(x: jax.Array) -> jax.Array:
        places = x.reshape(len(x), -1, x.shape[-1])
        weights = jax.nn.softmax(scale * turn(places) @ turn(jnp.tanh(places)).swapaxes(1, 2))
        return (weights @ places).reshape(x.shape)

    return call


def rotary(turn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Attention to places, without a scale."""

    def call(x: torch.Tensor) -> torch.Tensor:
        places = x.flatten(2).transpose(1, 2)
        weights = F.softmax(turn(places) @ turn(places.tanh()).transpose(1, 2), -1)
        return (weights @ places).transpose(1, 2).reshape(x.shape)

    return call


class TorchTable(TorchBetween):
    """Rotary positions whose frequencies are a buffer."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), 4)
        self.register_buffer("rates", torch.tensor(RATES), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = partial(turned_halves, rates=self.rates)
        return self.last(rotary(turn)(self.first(x)).mean((2, 3)))


# By name: a function in both frameworks, and how many channels it makes of four.
BETWEEN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[jax.Array], jax.Array], int]] = {
    "corners": (lambda x: F.interpolate(x, 7, mode="bilinear", align_corners=True), from_corner_to_corner, 4),
    "shrunk": (lambda x: F.interpolate(x, 3, mode="bilinear"), lambda x: resized(x, 3, "linear"), 4),
    "nearest": (lambda x: F.interpolate(x, 7), nearest, 4),
    "joined": (lambda x: torch.cat((x, x.tanh()), 1), lambda x: jnp.concatenate((x, jnp.tanh(x)), -1), 8),
    "gated": (lambda x: F.glu(x, 1), jax.nn.glu, 2),
    "scaled": (
        lambda x: x * torch.arange(1, 5).to(x)[:, None, None],
        lambda x: x * jnp.arange(1, 5, dtype=x.dtype),
        4,
    ),
    "halved": (lambda x: x * 0.5, lambda x: x * 0.5, 4),
    "difference": (lambda x: x.tanh() - x, lambda x: jnp.tanh(x) - x, 4),
    "negated": (lambda x: (-x).exp(), lambda x: jnp.exp(-x), 4),
    "repeated": (lambda x: x.repeat_interleave(2, 1), lambda x: jnp.repeat(x, 2, -1), 8),
    "attention": (attend, attend_in_jax, 4),
    "causal": (partial(attend, causal=True), partial(attend_in_jax, mask=jnp.tri(25, dtype=bool)), 4),
    "halves": (rotary(turned_halves), turned_in_jax("halves"), 4),
    "apart": (rotary(turned_apart), turned_in_jax("halves"), 4),
    "neighbours": (rotary(turned_neighbours), turned_in_jax("neighbours"), 4),
    "every two": (rotary(turned_every_two), turned_in_jax("neighbours"), 4),
    "groups": (lambda x: F.group_norm(x, 2), by_groups, 4),
    "instances": (lambda x: F.instance_norm(x).relu(), lambda x: nnx.relu(normalised(x, (1, 2))), 4),
    "large": (
        lambda x: F.layer_norm(60 * x.movedim(1, -1), (4,)).movedim(-1, 1),
        lambda x: normalised(60 * x, (3,)),
        4,
    ),
    "celu": (F.celu, jax.nn.celu, 4),
    "bounded": (lambda x: nn.ReLU6()(9 * x), lambda x: jax.nn.relu6(9 * x), 4),
    "root": (lambda x: x * (x.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt(), by_root_mean_square, 4),
    "pooled": (lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: x.mean((1, 2), keepdims=True), 4),
}


@dataclass
class Case:
    """A network in both frameworks, and how it is trained."""

    original: Callable[[], nn.Module]
    port: Callable[[nnx.Rngs], Any]
    batch: Callable[[], Any]
    losses: Any = (F.cross_entropy, jaxloss.cross_entropy)
    flatten: dict[str, tuple[int, ...]] | None = None
    ignore: tuple[str, ...] = ()


def images(channels: int, size: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(6, channels, size, size)


def randomise(module: nn.Module) -> nn.Module:
    """Moves every weight and running statistic away from the values it starts from."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.3 if "var" in name else torch.randn_like(tensor) * 0.1)
    return module


CASES = {
    "cnn": Case(originals.CNN, models.CNN, images(1, 28)),
    "net": Case(originals.Net, models.Net, images(1, 28), (F.nll_loss, jaxloss.nll_loss)),
    "residual": Case(TorchResidual, FlaxResidual, images(3, 12)),
    "flat": Case(TorchFlat, FlaxFlat, lambda: torch.randn(6, 1, 7, 5), flatten={"fc": (4, 5, 3)}),
    "tied": Case(TorchTied, FlaxTied, lambda: torch.randint(7, (6, 5)), ignore=("head.weight",)),
    "upsample": Case(TorchUpsample, FlaxUpsample, images(2, 4)),
    "transformer": Case(TorchTransformer, FlaxTransformer, lambda: torch.randint(11, (6, 7))),
    "table": Case(TorchTable, partial(FlaxBetween, turned_in_jax("halves", rates=np.float32(RATES)), 4), images(2, 5)),
    "swiglu": Case(TorchGated, FlaxGated, lambda: torch.randn(6, 6)),
    "lstm": Case(partial(TorchRecurrent, nn.LSTM), partial(FlaxRecurrent, lstm, 4), lambda: torch.randn(6, 5, 3)),
    "gru": Case(partial(TorchRecurrent, nn.GRU), partial(FlaxRecurrent, gru, 3), lambda: torch.randn(6, 5, 3)),
    **{
        name: Case(partial(TorchBetween, original, channels), partial(FlaxBetween, port, channels), images(2, 5))
        for name, (original, port, channels) in BETWEEN.items()
    },
}


def run(
    case: Case,
    seed: int = 0,
    fault: Callable[[Any, Any], Any] | None = None,
    optimizers: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Report:
    """Checks a port, with a fault in it if there is one."""
    torch.manual_seed(seed)
    original = randomise(case.original())
    port = load_torch(case.port(nnx.Rngs(0)), original.state_dict(), flatten=case.flatten or {}, ignore=case.ignore)
    if fault is not None:
        port = fault(port, original) or port
    pair = optimizers(original) if optimizers else None
    return check(original, port, case.batch(), **{"losses": case.losses, "optimizers": pair} | options)


__all__ = ["CASES", "Case", "run"]
