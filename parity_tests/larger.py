"""A network of 32 layers in both frameworks, with convolutions, batch norm, residuals and attention.

The two share no name: the toolkit has to pair them by order and shape.
"""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F  # noqa: N812

WIDTH, HEADS, BLOCKS, ENCODERS, CLASSES = 8, 2, 3, 2, 5


class TorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


class TorchLarger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, stride=2, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.blocks = nn.Sequential(*(TorchBlock() for _ in range(BLOCKS)))
        self.encoders = nn.Sequential(*(TorchEncoder() for _ in range(ENCODERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.blocks(self.stem(x)), 2)
        x = self.encoders(x.flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class FlaxResidual(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = (conv(WIDTH, rngs) for _ in range(2))
        self.scale_first, self.scale_second = batch_norm(rngs), batch_norm(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.scale_first(self.first(x)))
        return nnx.relu(x + self.scale_second(self.second(y)))


class FlaxAttention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.before, self.between = layer_norm(rngs), layer_norm(rngs)
        self.queries, self.keys, self.values, self.mix = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.widen, self.narrow = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.before(x)
        q, k, v = (f(y).reshape(*y.shape[:2], HEADS, -1) for f in (self.queries, self.keys, self.values))
        # jax.nn.dot_product_attention takes its softmax in float32, whatever it is given; the check finds that.
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5)
        x = x + self.mix(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(y.shape))
        return x + self.narrow(jax.nn.gelu(self.widen(self.between(x)), approximate=False))


class FlaxLarger(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.entry = nnx.Conv(3, WIDTH, (3, 3), strides=(2, 2), padding=1, rngs=rngs)
        self.entry_scale = batch_norm(rngs)
        self.residuals = nnx.List([FlaxResidual(rngs) for _ in range(BLOCKS)])
        self.attentions = nnx.List([FlaxAttention(rngs) for _ in range(ENCODERS)])
        self.exit_norm, self.classifier = layer_norm(rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.entry_scale(self.entry(x)))
        for block in self.residuals:
            x = block(x)
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = jnp.reshape(x, (len(x), -1, WIDTH))
        for block in self.attentions:
            x = block(x)
        return self.classifier(self.exit_norm(x).mean(1))


def conv(features: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(features, features, (3, 3), padding=1, use_bias=False, rngs=rngs)


def batch_norm(rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(WIDTH, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


def layer_norm(rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(WIDTH, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
