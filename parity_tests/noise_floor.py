"""How far JAX's float32 trainings end from PyTorch's, seed by seed: `python -m parity_tests.noise_floor`.

A relu or a maximum that rounding makes fall the other way moves the weights by orders of magnitude, in either of them.
So one seed says little, and the noise floor is a distribution: PyTorch's float32 from its own float64.
"""

from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from train.config import RECIPES, ModelName
from train.data import load
from train.twins import distance, train_jax, train_torch

SEEDS = range(10)


def distances(model: ModelName, seed: int) -> tuple[float, float, float]:
    """After an epoch of digits: JAX from PyTorch, PyTorch from its float64, and JAX from PyTorch's float64."""
    data, recipe = load("digits"), replace(RECIPES["digits"][model], epochs=1)
    single, double = (train_torch(model, recipe, data, seed, dtype) for dtype in (torch.float32, torch.float64))
    ours = train_jax(model, recipe, data, seed, "float32")
    theirs, exact, mine = (run.weights[-1] for run in (single, double, ours))
    return distance(mine, theirs), distance(theirs, exact), distance(mine, exact)


def median_ratio(found: np.ndarray) -> float:
    """Of JAX's distance from PyTorch to the noise floor."""
    return float(np.median(found[:, 0] / found[:, 1]))


def main() -> None:
    """Both models."""
    for model in RECIPES["digits"]:
        found = np.array([distances(model, seed) for seed in track(SEEDS, description=model, transient=True)])
        table = Table("seed", "JAX from PyTorch", "PyTorch from its float64", "JAX from that", title=model)
        for seed, row in zip(SEEDS, found, strict=True):
            table.add_row(str(seed), *(f"{each:.1e}" for each in row))
        Console().print(table, f"median of the first over the second: {median_ratio(found):.2f}")


if __name__ == "__main__":
    main()
