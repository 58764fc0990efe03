"""`--schedule one-cycle` against PyTorch's OneCycleLR, from the command line's recipe to the recorded rate."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from parity_tests.test_train_data import Capture
from train.__main__ import main
from train.config import Config, Recipe
from train.schedules import learning_rate, make_optimizer

EPOCHS, STEPS = 4, 3  # steps in each
TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adadelta": torch.optim.Adadelta,
}


def recipe_of(name: str) -> Recipe:
    return Config(schedule="one-cycle", lr=0.1, epochs=EPOCHS, optimizer=name).recipe("net")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TORCH)
def test_one_cycle_takes_torchs_steps_and_records_its_rates(name: str) -> None:
    recipe = recipe_of(name)
    theirs = torch.ones(5, dtype=torch.float64, requires_grad=True)
    torch_optimizer = TORCH[name]([theirs], lr=1.0)
    cycle = partial(OneCycleLR, torch_optimizer, 0.1, epochs=EPOCHS, steps_per_epoch=STEPS)
    scheduler = cycle(cycle_momentum=name != "adadelta")  # PyTorch refuses to move a momentum that is not there
    assert torch_optimizer.param_groups[0].get("momentum", 0.0) == recipe.momentum
    optimizer = make_optimizer(recipe, STEPS)
    ours = jnp.ones(5)
    state = optimizer.init(ours)
    for step, gradient in enumerate(np.random.default_rng(0).normal(size=(EPOCHS * STEPS, 5))):
        if step % STEPS == 0:
            rate = learning_rate(recipe, STEPS, 1 + step // STEPS)
            np.testing.assert_allclose(rate, scheduler.get_last_lr()[0], rtol=1e-12)
        theirs.grad = torch.from_numpy(gradient)
        torch_optimizer.step()
        scheduler.step()
        updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12)
    assert np.abs(np.asarray(ours) - 1).max() > 1e-3


def test_recorded_rate_of_the_exponential_schedule_is_the_recipes_to_the_last_bit() -> None:
    recipe = Config().recipe("net")
    assert [learning_rate(recipe, 45, epoch) for epoch in (1, 2, 8)] == [3e-3, 3e-3 * 0.9, 3e-3 * 0.9**7]


@pytest.mark.parametrize("flag", ["--gamma 0.9", "--momentum 0.5 --optimizer sgd"])
def test_flags_of_the_other_schedule_are_refused_in_one_line(capsys: Capture, flag: str) -> None:
    assert main(["--schedule", "one-cycle", *flag.split()]) == 2
    message = "is for --schedule exponential only; one-cycle has its own rates and momenta"
    assert capsys.readouterr().err == f"error: {flag.split()[0]} {message}\n"
