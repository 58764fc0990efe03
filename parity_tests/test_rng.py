"""PyTorch's random numbers in NumPy, bit for bit, for 60 seeds."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from jaxloss.parity import rng

SEEDS = [*range(50), 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 1234567, 99991, 31337, 424242]


@pytest.fixture(autouse=True)
def global_generator_stays() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def assert_same_bits(ours: np.ndarray, theirs: torch.Tensor) -> None:
    expected = theirs.detach().numpy()
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    message = f"torch {torch.__version__} draws other numbers than 2.13, with which jaxloss.parity.rng was verified"
    assert ours.tobytes() == expected.tobytes(), message


def test_uniform():
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        ours = rng.Generator(seed)
        for shape, low, high in (((3, 5), 0.0, 1.0), ((700,), -0.3, 0.1), ((1,), -1e-3, 5.0)):
            theirs = torch.empty(shape).uniform_(low, high, generator=generator)
            assert_same_bits(ours.uniform(shape, low, high), theirs)


def test_randperm():
    for seed in SEEDS:
        generator, ours = torch.Generator().manual_seed(seed), rng.Generator(seed)
        for n in (0, 1, 2, 3, 1000):
            assert_same_bits(ours.randperm(n), torch.randperm(n, generator=generator))
    assert_same_bits(
        rng.Generator(0).randperm(60000), torch.randperm(60000, generator=torch.Generator().manual_seed(0))
    )


def test_orders_of_a_loader_with_evaluation_between():
    for seed in SEEDS:
        torch.manual_seed(seed)
        ours = rng.Generator(seed)
        train, test = DataLoader(range(101), batch_size=10, shuffle=True), DataLoader(range(7), batch_size=4)
        for _ in range(3):
            assert_same_bits(ours.epoch(101, shuffle=True), torch.cat(list(train)))
            assert_same_bits(ours.epoch(7, shuffle=False), torch.cat(list(test)))


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_dropout(p):
    for seed in SEEDS:
        torch.manual_seed(seed)
        ours = rng.Generator(seed)
        assert_same_bits(ours.kept((40, 30), p), F.dropout(torch.ones(40, 30), p) != 0)
        assert_same_bits(ours.kept((4, 5, 1, 1), p), F.dropout2d(torch.ones(4, 5, 3, 3), p)[:, :, :1, :1] != 0)
        assert_same_bits(ours.kept((2, 3, 4, 5), p), F.dropout(torch.ones(2, 3, 4, 5), p) != 0)
        assert_same_bits(ours.uniform((1,)), torch.rand(1))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_of_no_probability_is_an_error(p):
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        rng.Generator(0).kept((1,), p)


def test_initialisation_of_layers():
    for seed in SEEDS:
        torch.manual_seed(seed)
        ours = rng.Generator(seed)
        layers = nn.Linear(7, 5), nn.Conv2d(4, 6, (3, 5), groups=2)
        for layer, arrays in zip(layers, (ours.linear(7, 5), ours.conv2d(4, 6, (3, 5), groups=2)), strict=True):
            for name, tensor in layer.state_dict().items():
                assert_same_bits(arrays[name], tensor)
        for layer, gain in zip(layers, (1.0, 2**0.5), strict=True):
            expected = nn.init.xavier_uniform_(layer.weight, gain)
            assert_same_bits(ours.xavier_uniform(expected.shape, gain=gain), expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_initialisation_of_layers_without_inputs():
    torch.manual_seed(0)
    ours = rng.Generator(0)
    layers = nn.Linear(0, 3), nn.Conv2d(0, 3, (2, 2))
    for layer, arrays in zip(layers, (ours.linear(0, 3), ours.conv2d(0, 3, (2, 2))), strict=True):
        for name, tensor in layer.state_dict().items():
            assert_same_bits(arrays[name], tensor)
    assert_same_bits(ours.uniform((1,)), torch.rand(1))


def test_stream_goes_on_from_its_state():
    generator = rng.Generator(5)
    generator.uint32(1000)
    other = rng.Generator(0)
    other.state = generator.state
    assert_same = generator.kept((50,), 0.5), other.kept((50,), 0.5)
    assert (assert_same[0] == assert_same[1]).all()


def test_another_draw_between_is_noticed():
    ours = rng.Generator(3)
    ours.uint32(1)
    with pytest.raises(AssertionError, match="draws other numbers"):
        assert_same_bits(ours.randperm(50), torch.randperm(50, generator=torch.Generator().manual_seed(3)))
