"""Replays the golden files of `test_golden.py` without PyTorch: `python -m parity_tests.without_torch FOLDER NAME`."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxloss import parity


class BatchNorm(nnx.BatchNorm):
    """Keeps the unbiased variance, as PyTorch does."""

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        old = self.var[...]
        y = super().__call__(x, **kwargs)
        if not self.use_running_average:
            n = x.size // x.shape[-1]
            biased = (self.var[...] - self.momentum * old) / (1 - self.momentum)
            self.var[...] = self.momentum * old + (1 - self.momentum) * biased * n / (n - 1)
        return y


class SelfAttention(nnx.Module):
    """`torch.nn.MultiheadAttention` of one sequence: query, key and value are one product, as there."""

    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.in_proj_weight = nnx.Param(jnp.zeros((3 * features, features)))
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * features))
        self.out_proj = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        fused = x @ self.in_proj_weight[...].T + self.in_proj_bias[...]
        query, key, value = (part.reshape(*x.shape[:-1], self.heads, -1) for part in jnp.split(fused, 3, -1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        return self.out_proj(jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(scores), value).reshape(x.shape))


class FlaxImages(nnx.Module):
    """`test_golden.TorchImages`, ported; the faulty one keeps Flax's variance."""

    def __init__(self, rngs: nnx.Rngs, *, faulty: bool) -> None:
        norm = nnx.BatchNorm if faulty else BatchNorm
        self.conv = nnx.Conv(1, 4, (3, 3), padding=0, rngs=rngs)
        self.bn = norm(4, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.drop, self.drop2d = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.3, broadcast_dims=(1, 2), rngs=rngs)
        self.fc = nnx.Linear(4 * 4 * 3, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.drop2d(nnx.relu(self.bn(self.conv(x))))
        return self.fc(self.drop(x.reshape(len(x), -1)))


class FlaxAttention(nnx.Module):
    """`test_golden.TorchAttention`, ported; the faulty one forgets to scale."""

    def __init__(self, rngs: nnx.Rngs, *, faulty: bool) -> None:
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.query, self.key, self.value = (nnx.Linear(8, 8, rngs=rngs) for _ in range(3))
        self.head = nnx.Linear(8, 11, rngs=rngs)
        self.scale = 1.0 if faulty else 8**-0.5

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        y = self.norm(x)
        scores = jnp.einsum("bqd,bkd->bqk", self.query(y), self.key(y)) * self.scale
        return self.head((x + nnx.softmax(scores) @ self.value(y))[:, -1])


PORTS = {"images": FlaxImages, "attention": FlaxAttention}


def port(name: str, folder: Path, *, faulty: bool = False) -> Any:
    """One of them, with the original's weights."""
    flatten = {"fc": (4, 4, 3)} if name == "images" else {}
    module = PORTS[name](nnx.Rngs(0), faulty=faulty)
    return parity.load_torch(module, folder / f"{name}-weights.safetensors", flatten=flatten)


def main(folder: Path, name: str) -> None:
    """Replays a file with a right and with a faulty port."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # importing it raises
    for faulty in (False, True):
        report = parity.replay(folder / f"{name}.safetensors", port(name, folder, faulty=faulty))
        report.to_json(folder / f"{name}-{faulty}.json")
    assert not [name for name in sys.modules if name.startswith("torch.")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
