"""Matrices that PyTorch keeps as (inputs, outputs), and those of functions, of which nothing tells the order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from jaxloss import parity
from jaxloss.parity import load_torch, to_torch, weight_map
from parity_tests.zoo import randomise

QUICK: dict[str, Any] = {"dtypes": ["float64"], "steps": 1}
KEPT = ["c_*.weight", "square.weight"]


class Conv1D(nn.Module):
    """A linear layer as Hugging Face's GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.c_fc, self.c_proj, self.square = Conv1D(8, 32), Conv1D(32, 8), Conv1D(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.c_proj(torch.tanh(self.c_fc(x)))
        return self.head(x + torch.tanh(self.square(x)))


class Port(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.table, self.head = nnx.Embed(20, 8, rngs=rngs), nnx.Linear(8, 20, use_bias=False, rngs=rngs)
        sizes = (8, 32), (32, 8), (8, 8)
        self.c_fc, self.c_proj, self.square = (nnx.Linear(*each, rngs=rngs) for each in sizes)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.table(tokens)
        x = x + self.c_proj(jnp.tanh(self.c_fc(x)))
        return self.head(x + jnp.tanh(self.square(x)))


@pytest.fixture
def original() -> nn.Module:
    return randomise(Block())


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(20, (3, 5)), torch.randint(20, (3, 5))


def test_they_go_both_ways_bit_for_bit(original):
    state = original.state_dict()
    assert weight_map(Port(), state, transposed=KEPT) == {name: name for name in state}
    back = to_torch(load_torch(Port(), state, transposed=KEPT), transposed=KEPT)
    assert back.keys() == state.keys()
    for name, array in back.items():
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, state[name].numpy())


def test_loading_says_which_are_the_other_way_round(original):
    with pytest.raises(ValueError, match=r"c_fc.weight, c_proj.weight as \(inputs, outputs\)") as caught:
        load_torch(Port(), original.state_dict())
    assert "c_fc.weight is (8, 32), expected (32, 8)" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "says"), [(["c_fc.weigh"], "there is no c_fc.weigh in"), (["c_fc.bias"], "c_fc.bias is no matrix")]
)
def test_names_of_no_matrix_are_refused(names, says, original):
    with pytest.raises(ValueError, match=f"transposed: {says}"):
        load_torch(Port(), original.state_dict(), transposed=names)


def test_ports_of_them_pass(original, parity):
    parity.check(original, load_torch(Port(), original.state_dict(), transposed=KEPT), tokens())
    parity.check(original, Port(), tokens())  # PyTorch's weights are copied


def test_a_square_one_that_was_loaded_the_usual_way_is_named(original):
    report = parity.check(original, load_torch(Port(), original.state_dict(), transposed=KEPT[:1]), tokens(), **QUICK)
    assert (report.first_divergence.place, report.first_divergence.quantity) == ("square", "weight")
    assert "inputs and outputs are swapped" in report.first_divergence.diagnosis


def test_a_square_one_alone_is_known_by_its_numbers(parity):
    port = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    original = randomise(Conv1D(8, 8))
    port.kernel[...], port.bias[...] = (jnp.array(array.detach().numpy()) for array in original.parameters())
    parity.check(original, port, torch.randn(5, 8))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.square, self.head = nn.Embedding(20, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return self.head(x + torch.tanh(self.square(x)))


NAMES = {"tok": "table.weight", "wq": "square.weight", "out": "head.weight", "shift": "head.bias"}


def by_rows(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    x = params["tok"][tokens]
    return (x + jnp.tanh(x @ params["wq"])) @ params["out"] + params["shift"]


def by_columns(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    x = params["tok"][tokens]
    return (x + jnp.tanh(x @ params["wq"].T)) @ params["out"].T + params["shift"]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("function", [by_rows, by_columns])
def test_a_functions_matrices_are_as_its_numbers_say(function, own):
    torch.manual_seed(0)
    original = Language()
    params = {mine: jnp.array(original.state_dict()[theirs].numpy()) for mine, theirs in NAMES.items()}
    if function is by_rows:
        params |= {name: params[name].T for name in ("wq", "out")}
    if not own:
        params = {name: jax.random.normal(jax.random.key(0), array.shape) for name, array in params.items()}
    report = parity.check(original, (function, params), tokens(), names=NAMES, **QUICK)
    # Of square weights that are drawn nothing tells the order: they are taken to be multiplied from the left.
    assert report.ok is (own or function is by_rows)


def test_a_functions_matrix_that_is_the_wrong_way_round_is_found():
    torch.manual_seed(0)
    original = Language()
    params = {mine: jnp.array(original.state_dict()[theirs].numpy()) for mine, theirs in NAMES.items()}
    report = parity.check(original, (by_rows, params | {"out": params["out"].T}), tokens(), names=NAMES, **QUICK)
    assert not report.ok
