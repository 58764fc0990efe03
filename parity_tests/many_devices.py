"""Trains on one device and on more; `python -m parity_tests.many_devices` prints how far the weights are apart."""

import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from threading import Event

import jax
import numpy as np
from jax.sharding import AxisType
from rich.console import Console
from rich.table import Table

from jaxloss.parity import to_torch
from train.config import ModelName, Recipe, RngName
from train.data import Dataset, Split, load
from train.loop import Epoch, Learner


def digits() -> Dataset:
    """100 of them, and 40 for the test."""
    data = load("digits")
    train, test = (Split(split.images[:n], split.labels[:n]) for split, n in ((data.train, 100), (data.test, 40)))
    return Dataset(train, test, data.classes, data.note)


def trained(
    model: ModelName,
    rng: RngName,
    devices: int,
    dtype: str = "float64",
    *,
    seed: int = 0,
    dispatch: int = 1,
) -> tuple[np.ndarray, list[Epoch]]:
    """All weights after two epochs on so many devices, and the epochs.

    Neither 4 nor 8 devices divide the batches of 30, nor the last one of 10.
    """
    recipe = Recipe("adam", lr=1e-3, momentum=0.0, gamma=1.0, epochs=2, batch_size=30)
    mesh = jax.make_mesh((devices,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:devices])
    with jax.enable_x64(dtype == "float64"):
        learner = Learner(model, recipe, digits(), seed, rng, dtype, mesh, dispatch)
        epochs = list(learner.epochs(Event(), lambda step, cost: None))
        weights = to_torch(learner.trained())
        return np.concatenate([weights[name].ravel() for name in sorted(weights)]), epochs


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of the weights, by their norm."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def main() -> None:
    """Both models, both kinds of random numbers, both precisions."""
    counts = (2, 4, 8)
    table = Table("model", "random numbers", "dtype", *(f"{count} devices" for count in counts))
    for model, rng in (("cnn", "torch"), ("net", "torch"), ("net", "jax")):
        for dtype in ("float64", "float32"):
            alone, _ = trained(model, rng, 1, dtype)
            far = [distance(trained(model, rng, count, dtype)[0], alone) for count in counts]
            table.add_row(model, rng, dtype, *(f"{each:.1e}" for each in far))
    Console().print("Distance of the weights from those of one device, after 2 epochs of 100 digits:", table)


if __name__ == "__main__":
    main()
