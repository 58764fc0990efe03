"""Where a training's random numbers come from: what PyTorch draws for a seed, or jax.random."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxloss.parity import load_torch
from jaxloss.parity.rng import Generator
from train.config import ModelName, RngName
from train.models import CNN, DropoutMasks, Net

StateDict = dict[str, np.ndarray]


class TorchRandomness:
    """One stream, drawn from in PyTorch's order: weights, then for each epoch its order, its masks, its evaluation."""

    def __init__(self, model: ModelName, seed: int) -> None:
        """What `torch.manual_seed(seed)` does."""
        self.model: ModelName = model
        self.generator = Generator(seed)

    def module(self) -> nnx.Module:
        """The model with its first weights."""
        build, weights = {"cnn": (CNN, _cnn), "net": (Net, _net)}[self.model]
        return load_torch(build(nnx.Rngs(0)), weights(self.generator))

    def order(self, epoch: int, count: int) -> np.ndarray:
        """The training images in the order of an epoch."""
        return self.generator.epoch(count, shuffle=True)

    def masks(self, images: int, size: int) -> tuple[DropoutMasks, ...]:
        """What dropout keeps of a batch of images, filled up to a size; nothing for a model without dropout."""
        if self.model == "cnn":
            return ()
        channels, features = (np.zeros((size, *shape), bool) for shape in ((1, 1, 20), (50,)))
        channels[:images] = self.generator.kept((images, 1, 1, 20), Net.RATE)
        features[:images] = self.generator.kept((images, 50), Net.RATE)
        return (DropoutMasks(channels, features),)

    def evaluated(self) -> None:
        """PyTorch's loaders draw even where nothing is shuffled."""
        self.generator.epoch(0, shuffle=False)

    def state(self) -> dict[str, np.ndarray]:
        """Where the stream is."""
        return {name: np.asarray(value) for name, value in self.generator.state["state"].items()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Goes on from there."""
        twister = {"key": np.asarray(state["key"], np.uint32), "pos": int(state["pos"])}
        self.generator.state = self.generator.state | {"state": twister}


class JaxRandomness:
    """Weights and masks from jax.random, orders from NumPy."""

    def __init__(self, model: ModelName, seed: int) -> None:
        """Draws nothing yet."""
        self.model: ModelName = model
        self.seed, self.steps = seed, 0

    def module(self) -> nnx.Module:
        """The model with its first weights."""
        return {"cnn": CNN, "net": Net}[self.model](nnx.Rngs(self.seed))

    def order(self, epoch: int, count: int) -> np.ndarray:
        """The training images in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(count)

    def masks(self, images: int, size: int) -> tuple[DropoutMasks, ...]:
        """What dropout keeps of a batch, whatever size it is filled up to; nothing for a model without dropout."""
        if self.model == "cnn":
            return ()
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # an accelerator is busy with the last step
            masks = _kept(self.seed, self.steps, size)
        self.steps += images > 0
        return (jax.tree.map(np.asarray, masks),)

    def evaluated(self) -> None:
        """Draws nothing."""

    def state(self) -> dict[str, np.ndarray]:
        """The seed, and how many batches' masks were drawn."""
        return {"seed": np.asarray(self.seed), "steps": np.asarray(self.steps)}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Goes on from there."""
        self.seed, self.steps = int(state["seed"]), int(state["steps"])


@partial(jax.jit, static_argnums=(0, 2))
def _kept(seed: int, step: int, size: int) -> DropoutMasks:
    key = jax.random.fold_in(jax.random.key(seed), 2**31)  # the weights have those of 0, 1, 2, ...
    channels, features = jax.random.split(jax.random.fold_in(key, step))
    return DropoutMasks(
        jax.random.bernoulli(channels, 1 - Net.RATE, (size, 1, 1, 20)),
        jax.random.bernoulli(features, 1 - Net.RATE, (size, 50)),
    )


RANDOMNESS: dict[RngName, Callable[[ModelName, int], Any]] = {"torch": TorchRandomness, "jax": JaxRandomness}


def _cnn(generator: Generator) -> StateDict:
    layers = {
        "layer1.0": generator.conv2d(1, 32, (3, 3)),
        "layer2.0": generator.conv2d(32, 64, (3, 3)),
        "fc": generator.linear(7 * 7 * 64, 10),
    }
    layers["fc"]["weight"] = generator.xavier_uniform(layers["fc"]["weight"].shape)
    return _flat(layers)


def _net(generator: Generator) -> StateDict:
    return _flat(
        {
            "conv1": generator.conv2d(1, 10, (5, 5)),
            "conv2": generator.conv2d(10, 20, (5, 5)),
            "fc1": generator.linear(320, 50),
            "fc2": generator.linear(50, 10),
        }
    )


def _flat(layers: dict[str, StateDict]) -> StateDict:
    return {f"{layer}.{name}": array for layer, arrays in layers.items() for name, array in arrays.items()}
