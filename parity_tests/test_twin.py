"""The same seed gives the same training in PyTorch and in JAX: weights, batches, masks, losses and what is learned."""

import sys
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from hypothesis import settings
from rich.console import Console

from jaxloss.parity import to_torch
from parity_tests.noise_floor import SEEDS, distances, median_ratio
from train import twin
from train.config import RECIPES
from train.data import load
from train.randomness import TorchRandomness
from train.twins import distance, draw, table, train_twins


@pytest.fixture(scope="module", params=["cnn", "net"])
def twins(request):
    recipe = replace(RECIPES["digits"][request.param], epochs=1)
    return train_twins(request.param, recipe, load("digits"), seed=0)


def test_batches_and_masks_are_pytorchs(twins):
    runs = twins.torch32, twins.torch64, twins.jax32, twins.jax64
    assert [len(run.rows) for run in runs] == [45] * 4
    for run in runs[1:]:
        assert all(map(np.array_equal, run.rows, twins.torch32.rows))
        for ours, theirs in zip(run.masks, twins.torch32.masks, strict=True):
            assert len(ours) == len(theirs) == (2 if twins.model == "net" else 0)
            assert all(map(np.array_equal, ours, theirs))


def test_float64_weights_are_the_same_after_an_epoch(twins):
    assert distance(twins.jax64.gradient, twins.torch64.gradient) < 1e-12
    assert distance(twins.jax64.weights[-1], twins.torch64.weights[-1]) < 1e-9
    assert np.allclose(twins.jax64.losses, twins.torch64.losses, rtol=1e-10)
    assert distance(twins.jax64.weights[-1], twins.torch32.weights[-1]) > 1e-9, "float32 must differ"


def test_first_float32_gradient_is_as_near_to_float64_as_pytorchs(twins):
    exact = twins.torch64.gradient
    assert distance(twins.jax32.gradient, exact) < 3 * distance(twins.torch32.gradient, exact)


@pytest.mark.skipif(settings.default.max_examples < 1000, reason="takes minutes: --hypothesis-profile=thorough")
@pytest.mark.parametrize("model", RECIPES["digits"])
def test_float32_weights_are_within_three_times_the_noise_floor(model):
    found = np.array([distances(model, seed) for seed in SEEDS])
    assert median_ratio(found) <= 3


def test_the_noise_floor_tells_other_weights():
    assert median_ratio(np.array([(4.0, 1.0, 4.0), (5.0, 1.0, 5.0), (0.1, 1.0, 1.0)])) == 4.0


def test_another_seed_gives_other_weights(twins):
    other = to_torch(TorchRandomness(twins.model, 1).module())
    assert distance(other, twins.torch32.weights[0]) > 0.5


def test_table_and_picture(twins, tmp_path):
    console = Console(record=True, width=100)
    console.print(table([twins], load("digits")))
    text = console.export_text()
    assert "45 of 45" in text
    assert "weights, float64, epoch 1" in text
    draw([twins], tmp_path / "twin.png")
    assert matplotlib.image.imread(tmp_path / "twin.png").std() > 0.05


MISTAKES = {
    "no epochs": ("--epochs 0", "--epochs must be at least 1, got 0"),
    "no such data": ("--data mnist --data-dir nowhere", "mnist: nowhere: No such file or directory"),
    "folder for digits": ("--data-dir .", "--data-dir and --download need --data mnist or fashion-mnist"),
    "seed too large": ("--seed 4294967296", "--seed must lie in [0, 2**32), got 4294967296"),
    "no kind of picture": ("--out x.xyz", "--out x.xyz must end in .eps, "),
    "no suffix": ("--out x", "--out x must end in .eps, "),
    "no folder": ("--out nowhere/x.png", "--out nowhere/x.png: there is no folder nowhere"),
}


@pytest.mark.parametrize(("command", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_line_before_training(command, message, monkeypatch, capsys):
    monkeypatch.setattr("train.twins.train_twins", None)
    assert twin.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_without_torch_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    assert twin.main([]) == 2
    assert capsys.readouterr().err == "error: the originals need PyTorch: pip install torch\n"
