"""The recipe's optimizer, and its learning rate over the training."""

from typing import Any

import jax
import optax

from jaxloss.parity import one_cycle, optimizer_by_name
from train.config import Recipe


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """The recipe's optimizer with PyTorch's defaults, its rate as the recipe's schedule moves it."""
    name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "adadelta": "Adadelta"}[recipe.optimizer]
    return optimizer_by_name(name, **optimizer_options(recipe, steps_per_epoch))


def optimizer_options(recipe: Recipe, steps_per_epoch: int) -> dict[str, Any]:
    """PyTorch's arguments for the recipe's optimizer: numbers, or functions of the number of updates made.

    The notes' loop multiplied by gamma after each validation batch, which makes the rate depend on the batch size.
    """
    if recipe.schedule == "exponential":
        momentum = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
        return {"lr": lambda count: recipe.lr * recipe.gamma ** (count // steps_per_epoch), **momentum}
    cycle = one_cycle(recipe.lr, recipe.epochs * steps_per_epoch)
    moving = {
        "sgd": {"momentum": cycle.momentum},
        "adam": {"betas": (cycle.momentum, 0.999)},
        "adamw": {"betas": (cycle.momentum, 0.999)},
        "adadelta": {},  # has no momentum to move
    }
    return {"lr": cycle.lr, **moving[recipe.optimizer]}


def learning_rate(recipe: Recipe, steps_per_epoch: int, epoch: int) -> float:
    """The rate of an epoch's first step, in float64; within the epoch only one-cycle moves it."""
    with jax.enable_x64(True):
        return float(optimizer_options(recipe, steps_per_epoch)["lr"]((epoch - 1) * steps_per_epoch))
