"""Linen's recurrent cells, compared with PyTorch's LSTM, GRU and RNN."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from flax import linen
from torch import nn

from jaxloss import parity
from jaxloss.parity import _recording
from parity_tests.test_recurrent import ONE_BIAS, UNITS, batch, network


class LinenNetwork(linen.Module):
    """`TorchNetwork`, ported."""

    cell: Callable[..., Any]
    layers: int = 1
    bidirectional: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(3, name="embed")(x)
        for _ in range(self.layers):
            forwards = linen.RNN(self.cell(UNITS))
            x = (linen.Bidirectional(forwards, linen.RNN(self.cell(UNITS))) if self.bidirectional else forwards)(x)
        return linen.Dense(2, name="head")(x[:, 2])


class LinenNamed(linen.Module):
    """One whose layer has PyTorch's name."""

    cell: Callable[..., Any]

    def setup(self) -> None:
        self.embed, self.rnn, self.head = linen.Dense(3), linen.RNN(self.cell(UNITS)), linen.Dense(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(self.embed(x))[:, 2])


LINEN = {
    "LSTM": ({}, LinenNetwork(linen.OptimizedLSTMCell)),
    "LSTM by name": ({}, LinenNamed(linen.LSTMCell)),
    "LSTM of two layers both ways": (
        {"num_layers": 2, "bidirectional": True},
        LinenNetwork(linen.LSTMCell, 2, bidirectional=True),
    ),
    "GRU": ({"kind": nn.GRU}, LinenNetwork(linen.GRUCell)),
    "GRU by name": ({"kind": nn.GRU}, LinenNamed(linen.GRUCell)),
    "GRU of two layers": ({"kind": nn.GRU, "num_layers": 2}, LinenNetwork(linen.GRUCell, 2)),
    "RNN": ({"kind": nn.RNN}, LinenNetwork(linen.SimpleCell)),
}
in_linen = pytest.mark.parametrize(("options", "module"), LINEN.values(), ids=LINEN)


def variables_of(module: linen.Module) -> Any:
    return module.init(jax.random.key(0), jnp.zeros((2, 5, 5)))


@in_linen
def test_linens_cells_pass(options, module, parity):
    parity.check(network(**options), (module, variables_of(module)), batch(), steps=0, dtypes=[])


class LinenScan(linen.Module):
    """One that scans over its cell by itself."""

    cell: Callable[..., Any]

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(3, name="embed")(x)
        scanned = linen.scan(
            self.cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
        )
        cell = scanned(UNITS, name="rnn")
        _, states = cell(cell.initialize_carry(jax.random.key(0), x[:, 0].shape), x)
        return linen.Dense(2, name="head")(states[:, 2])


@pytest.mark.parametrize(("kind", "cell"), [(nn.LSTM, linen.OptimizedLSTMCell), (nn.GRU, linen.GRUCell)])
def test_states_that_linens_cells_begin_with_have_the_dtype_of_the_check(kind, cell, parity):
    parity.check(network(kind=kind), (LinenScan(cell), variables_of(LinenScan(cell))), batch(), steps=0)


@pytest.mark.parametrize("case", ["LSTM", "LSTM of two layers both ways", "RNN"])
def test_linens_cells_train_alike_with_twice_the_updates_of_one_bias(case, parity):
    def double(tree: Any) -> Any:
        return {name: jax.tree.map(lambda _, doubled="bias_ih" in name: doubled, leaf) for name, leaf in tree.items()}

    options, module = LINEN[case]
    original = network(**options)
    adam = torch.optim.Adam(original.parameters(), lr=1e-3)
    optimizer = optax.chain(optax.adam(1e-3), optax.masked(optax.scale(2.0), double))
    parity.check(original, (module, variables_of(module)), batch(), optimizers=(adam, optimizer), steps=2, dtypes=[])


def test_one_bias_of_linens_gru_moves_half_as_far():
    module = LinenNamed(linen.GRUCell)
    report = parity.check(network(kind=nn.GRU), (module, variables_of(module)), batch(), steps=1, dtypes=[])
    assert [finding.quantity for finding in report.failures()] == ["rnn.bias_ih_l0"]
    assert ONE_BIAS in report.first_divergence.diagnosis


def test_linens_gru_may_have_a_second_bias_of_0(parity):
    original = network(kind=nn.GRU)
    nn.init.zeros_(original.rnn.bias_hh_l0)
    module = LinenNamed(linen.GRUCell)
    parity.check(original, (module, variables_of(module)), batch(), steps=0, dtypes=[])


def test_a_large_gru_of_linens_takes_no_steps(monkeypatch):
    monkeypatch.setattr(_recording, "_SMALL", 2 * UNITS)
    module = LinenNetwork(linen.GRUCell)
    report = parity.check(network(kind=nn.GRU), (module, variables_of(module)), batch(), steps=2, dtypes=[])
    assert report.ok
    assert "rnn.bias_hh_l0 is too large for steps of a part of it: none are compared." in report.notes
