"""Seconds until a training reaches 99 % of MNIST's test images, beside PyTorch eager and torch.compile; ten seeds.

What counts: every training step (Adam, batches of 100), and the evaluation after each epoch. What does not: loading,
and compiling. PyTorch has every image on its device too, and its fused Adam. Needs $JAXLOSS_DATA_DIR.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F  # noqa: N812

from benchmarks.timing import HAS_COMPILER, PLATFORM, TORCH, wait
from train import originals
from train.config import ModelName, Recipe, RngName
from train.data import Dataset, Split, load
from train.loop import LOSSES, Learner

GOAL, SEEDS = 0.99, range(10)
RECIPES: dict[ModelName, Recipe] = {
    "cnn": Recipe("adam", lr=1e-3, momentum=0.0, gamma=1.0, epochs=10, batch_size=100),
    "net": Recipe("adam", lr=1e-3, momentum=0.0, gamma=1.0, epochs=30, batch_size=100),
}
DISPATCH = 1 if PLATFORM == "cpu" else 20
EVALUATION_BATCH = 1000
OURS, OURS_JAX, EAGER, COMPILED = "python -m train", "python -m train --rng jax", "PyTorch eager", "torch.compile"


class Reached(NamedTuple):
    """How a training went."""

    seconds: float
    epochs: int
    accuracy: float  # after the last epoch
    compiling: float  # seconds, before


def reached(accuracies: Iterator[float], compiling: float) -> Reached:
    """Takes accuracies, one an epoch, until one is good enough or there are no more."""
    start, epochs, accuracy = time.perf_counter(), 0, 0.0
    for accuracy in accuracies:
        epochs += 1
        if accuracy >= GOAL:
            break
    return Reached(time.perf_counter() - start, epochs, accuracy, compiling)


def ours(model: ModelName, recipe: Recipe, data: Dataset, rng: RngName) -> Callable[[int], Reached]:
    """Trains from a seed as the command does."""
    learner = Learner(model, recipe, data, 0, rng, dispatch=DISPATCH)

    def train(seed: int) -> Reached:
        learner.start(seed)
        epochs = learner.epochs(Event(), lambda step, cost: None)
        return reached((epoch.validation.accuracy for epoch in epochs), learner.compile_seconds)

    return train


class TorchTraining:
    """The same training in PyTorch, as one would write it for one device."""

    def __init__(self, model: ModelName, recipe: Recipe, data: Dataset, *, compiled: bool) -> None:
        """Compiles once for all seeds, by training a little."""
        self.model: ModelName = model
        self.recipe = recipe
        self.module = self.fresh(0)
        self.loss = getattr(F, LOSSES[model].__name__)
        self.train, self.test = (self.placed(split) for split in (data.train, data.test))
        self.run = torch.compile(self.module, mode="reduce-overhead") if compiled else self.module
        start = time.perf_counter()
        few = tuple(part[: 20 * recipe.batch_size] for part in self.train)
        for _ in range(2):
            self.train_epoch(few, self.optimizer())
            self.accuracy()
        self.compiling = time.perf_counter() - start

    def fresh(self, seed: int) -> torch.nn.Module:
        """The original with its first weights."""
        torch.manual_seed(seed)
        return {"cnn": originals.CNN, "net": originals.Net}[self.model]().to(TORCH)

    def optimizer(self) -> torch.optim.Optimizer:
        """A new one."""
        return torch.optim.Adam(self.module.parameters(), lr=self.recipe.lr, fused=True)

    def placed(self, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels as the model sees them, and labels."""
        images = torch.tensor(split.images, device=TORCH)[:, None].float() / 255
        return (images - split.mean) / split.deviation, torch.tensor(split.labels, device=TORCH).long()

    def train_epoch(self, split: tuple[torch.Tensor, ...], optimizer: torch.optim.Optimizer) -> None:
        """In a new order."""
        self.module.train()
        images, labels = split
        for rows in torch.randperm(len(labels)).to(TORCH).split(self.recipe.batch_size):
            optimizer.zero_grad()
            self.loss(self.run(images[rows]), labels[rows]).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Of all test images."""
        self.module.eval()
        batches = zip(*(part.split(EVALUATION_BATCH) for part in self.test), strict=True)
        correct = [(self.run(images).argmax(1) == labels).sum() for images, labels in batches]
        return float(torch.stack(correct).sum()) / len(self.test[1])

    def __call__(self, seed: int) -> Reached:
        """Trains from the seed."""
        self.module.load_state_dict(self.fresh(seed).state_dict())
        optimizer = self.optimizer()
        wait()

        def accuracies() -> Iterator[float]:
            for _ in range(self.recipe.epochs):
                self.train_epoch(self.train, optimizer)
                yield self.accuracy()

        return reached(accuracies(), self.compiling)


def measure(turns: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each model, seed and implementation; as many seeds as turns, at most ten.

    Quick is an epoch of scikit-learn's digits.
    """
    data = load("digits" if quick else "mnist")
    recipes: dict[ModelName, Recipe] = {"net": replace(RECIPES["net"], epochs=1)} if quick else RECIPES
    for model, recipe in recipes.items():
        trainings = {
            OURS: ours(model, recipe, data, "torch"),
            OURS_JAX: ours(model, recipe, data, "jax"),
            EAGER: TorchTraining(model, recipe, data, compiled=False),
        }
        if HAS_COMPILER:
            trainings[COMPILED] = TorchTraining(model, recipe, data, compiled=True)
        for seed in track(SEEDS[:turns], description=model, transient=True):
            for name in random.sample(list(trainings), len(trainings)):
                yield {"model": model, "implementation": name, "seed": seed} | trainings[name](seed)._asdict()


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Mean and standard deviation over the seeds."""
    head = ("model", "implementation", f"seeds at {GOAL:.0%}", "seconds", "epochs", "seconds / epoch", "compiling, s")
    table = Table(*head)
    for key in dict.fromkeys((row["model"], row["implementation"]) for row in rows):
        some = [row for row in rows if (row["model"], row["implementation"]) == key]
        seconds, epochs = ([row[of] for row in some] for of in ("seconds", "epochs"))
        table.add_row(
            *key,
            f"{sum(row['accuracy'] >= GOAL for row in some)}/{len(some)}",
            f"{np.mean(seconds):.2f} ± {np.std(seconds, ddof=min(1, len(some) - 1)):.2f}",
            f"{np.mean(epochs):.1f}",
            f"{sum(seconds) / sum(epochs):.3f}",
            f"{some[0]['compiling']:.1f}",
        )
    return [table]
