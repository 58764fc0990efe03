"""PyTorch's LSTM, GRU and RNN as Flax's recurrent cells: their weights both ways, and their ports compared."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

from jaxloss import parity
from jaxloss.parity import load_torch, to_torch, weight_map
from jaxloss.parity._original import Functions

UNITS = 4
ONE_BIAS = "has one bias where PyTorch trains two"
GRU_FIX = r"nnx\.GRUCell has no such bias: give it one, cell\.dense_h = nnx\.Linear\(units, 3 \* units, rngs=rngs\)"


class TorchNetwork(nn.Module):
    """A classifier of sequences."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(5, 3), kind(3, UNITS, batch_first=True, **options)
        self.head = nn.Linear(UNITS * (1 + self.rnn.bidirectional), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, 2])


class Network(nnx.Module):
    """`TorchNetwork`, ported."""

    def __init__(self, cell: Callable[..., Any], layers: int = 1, *, bidirectional: bool = False) -> None:
        rngs = nnx.Rngs(0)
        width = UNITS * (1 + bidirectional)

        def layer(inputs: int) -> nnx.Module:
            forwards = nnx.RNN(cell(inputs, UNITS, rngs=rngs))
            return nnx.Bidirectional(forwards, nnx.RNN(cell(inputs, UNITS, rngs=rngs))) if bidirectional else forwards

        self.embed, self.head = nnx.Linear(5, 3, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)
        self.rnn = layer(3) if layers == 1 else nnx.List([layer(3), *(layer(width) for _ in range(layers - 1))])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for layer in self.rnn if isinstance(self.rnn, nnx.List) else [self.rnn]:
            x = layer(x)
        return self.head(x[:, 2])


def gru_cell(inputs: int, units: int, *, rngs: nnx.Rngs) -> nnx.GRUCell:
    cell = nnx.GRUCell(inputs, units, rngs=rngs)
    cell.dense_h = nnx.Linear(units, 3 * units, rngs=rngs)  # Flax's own has no bias
    return cell


def lstm_cell(inputs: int, units: int, *, rngs: nnx.Rngs) -> nnx.OptimizedLSTMCell:
    cell = nnx.OptimizedLSTMCell(inputs, units, rngs=rngs)
    cell.dense_i = nnx.Linear(inputs, 4 * units, rngs=rngs)
    return cell


def rnn_cell(inputs: int, units: int, *, rngs: nnx.Rngs) -> nnx.SimpleCell:
    cell = nnx.SimpleCell(inputs, units, rngs=rngs)
    cell.dense_h = nnx.Linear(units, units, rngs=rngs)
    return cell


PORTS = {  # the original, and its port
    "LSTM": ({}, partial(Network, nnx.LSTMCell)),
    "optimized LSTM": ({}, partial(Network, nnx.OptimizedLSTMCell)),
    "LSTM of two layers": ({"num_layers": 2}, partial(Network, nnx.OptimizedLSTMCell, 2)),
    "LSTM both ways": ({"bidirectional": True}, partial(Network, nnx.LSTMCell, bidirectional=True)),
    "two layers both ways": (
        {"bidirectional": True, "num_layers": 2},
        partial(Network, nnx.OptimizedLSTMCell, 2, bidirectional=True),
    ),
    "RNN": ({"kind": nn.RNN}, partial(Network, nnx.SimpleCell)),
}
ports = pytest.mark.parametrize(("options", "port"), PORTS.values(), ids=PORTS)
WITH_BOTH = {
    "LSTM": ({}, partial(Network, lstm_cell)),
    "GRU": ({"kind": nn.GRU}, partial(Network, gru_cell)),
    "GRU of two layers both ways": (
        {"kind": nn.GRU, "num_layers": 2, "bidirectional": True},
        partial(Network, gru_cell, 2, bidirectional=True),
    ),
    "RNN": ({"kind": nn.RNN}, partial(Network, rnn_cell)),
}


def network(**options: Any) -> TorchNetwork:
    torch.manual_seed(0)
    return TorchNetwork(**options)


def batch() -> torch.Tensor:
    return torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(1))


@ports
def test_ports_with_flaxs_cells_pass(options, port, parity):
    original = network(**options)
    parity.check(original, load_torch(port(), original.state_dict()), batch(), steps=0)


def test_pytorchs_weights_are_copied_where_the_port_has_its_own(parity):
    parity.check(network(bidirectional=True), Network(nnx.LSTMCell, bidirectional=True), batch(), steps=0)


@pytest.mark.parametrize(("options", "port"), WITH_BOTH.values(), ids=WITH_BOTH)
def test_cells_with_both_biases_train_alike(options, port, parity):
    original = network(**options)
    parity.check(original, load_torch(port(), original.state_dict()), batch(), steps=3)


@pytest.mark.parametrize("golden", [True, False])
def test_one_bias_for_two_moves_half_as_far(golden, tmp_path):
    original = network()
    port = load_torch(Network(nnx.OptimizedLSTMCell), original.state_dict())
    if golden:
        parity.record(tmp_path / "golden.safetensors", original, batch(), steps=2, dtypes=[])
        report = parity.replay(tmp_path / "golden.safetensors", port)
    else:
        report = parity.check(original, port, batch(), steps=2, dtypes=[])
    assert (report.first_divergence.place, report.first_divergence.quantity) == ("step 1", "rnn.bias_ih_l0")
    assert ONE_BIAS in report.first_divergence.diagnosis
    assert any("one bias for rnn.bias_ih_l0 and rnn.bias_hh_l0" in note for note in report.notes)


def test_twice_the_updates_make_up_for_one_bias(parity):
    original = network()
    port = load_torch(Network(nnx.OptimizedLSTMCell), original.state_dict())
    double = optax.masked(optax.scale(2.0), lambda tree: {name: name == "rnn.bias_ih_l0" for name in tree})
    adam = torch.optim.Adam(original.parameters(), lr=1e-3)
    parity.check(original, port, batch(), optimizers=(adam, optax.chain(optax.adam(1e-3), double)), steps=3)


@pytest.mark.parametrize("frozen", ["bias_ih_l0", "bias_hh_l0"])
def test_a_bias_that_pytorch_does_not_train_moves_nothing(frozen, parity):
    original = network()
    getattr(original.rnn, frozen).requires_grad_(False)
    port = load_torch(Network(nnx.OptimizedLSTMCell), original.state_dict())
    parity.check(original, port, batch(), steps=3)


def test_flaxs_gru_has_no_place_for_the_bias_that_the_reset_gate_multiplies():
    original = network(kind=nn.GRU)
    with pytest.raises(ValueError, match=GRU_FIX):
        load_torch(Network(nnx.GRUCell), original.state_dict())
    report = parity.check(original, Network(nnx.GRUCell), batch(), steps=0, dtypes=[])
    assert report.first_divergence.quantity == "bias_hh_l0"
    assert re.search(GRU_FIX, str(report))


def test_flaxs_gru_is_pytorchs_where_that_bias_is_0(parity):
    original = network(kind=nn.GRU)
    with torch.no_grad():
        original.rnn.bias_hh_l0[2 * UNITS :] = 0
    parity.check(original, load_torch(Network(nnx.GRUCell), original.state_dict()), batch(), steps=0, dtypes=[])


@pytest.mark.parametrize(
    ("options", "cell"),
    [({}, nnx.LSTMCell), ({}, lstm_cell), ({"kind": nn.RNN}, nnx.SimpleCell), ({"kind": nn.GRU}, gru_cell)],
)
def test_weights_come_back(options, cell):
    port = load_torch(Network(cell), network(**options).state_dict())
    weights = to_torch(port)
    original = network(**options)
    original.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    again = load_torch(Network(cell), original.state_dict())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again, nnx.Param), nnx.state(port, nnx.Param))


def test_pytorch_takes_the_weights_of_flaxs_gru(parity):
    port, original = Network(nnx.GRUCell), network(kind=nn.GRU)
    port.rnn.cell.dense_i.bias.set_value(jnp.linspace(-1, 1, 3 * UNITS))
    original.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(port).items()})
    parity.check(original, port, batch(), steps=0, dtypes=[])


def test_layers_of_one_module_may_have_names_of_their_own(parity, capsys):
    class Port(nnx.Module):
        def __init__(self, first: str, second: str) -> None:
            rngs = nnx.Rngs(0)
            self.embed, self.head = nnx.Linear(5, 3, rngs=rngs), nnx.Linear(UNITS, 2, rngs=rngs)
            self.order = first, second
            for name, inputs in ((first, 3), (second, UNITS)):
                setattr(self, name, nnx.RNN(nnx.OptimizedLSTMCell(inputs, UNITS, rngs=rngs)))

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.embed(x)
            for name in self.order:
                x = getattr(self, name)(x)
            return self.head(x[:, 2])

    original = network(num_layers=2)
    port = load_torch(Port("lower", "upper"), original.state_dict())
    assert "upper.weight_ih_l0 (16, 4) <- rnn.weight_ih_l1" in capsys.readouterr().out
    parity.check(original, port, batch(), steps=0, dtypes=[])
    names = weight_map(port, original.state_dict())
    assert names["upper.bias_ih_l0"] == "rnn.bias_ih_l1"
    given = load_torch(Port("lower", "upper"), original.state_dict(), names=names)
    parity.check(original, given, batch(), names=names, steps=0, dtypes=[])
    arrays = to_torch(port, names=names)
    assert arrays.keys() == original.state_dict().keys()


def test_stacked_layers_come_back_under_the_names_they_came_from():
    original = network(num_layers=2, bidirectional=True)
    port = load_torch(Network(lstm_cell, 2, bidirectional=True), original.state_dict())
    assert "rnn.0.bias_hh_l0_reverse" in to_torch(port)  # a list of modules, if nothing else is known
    arrays = to_torch(port, names=weight_map(port, original.state_dict()))
    assert arrays.keys() == original.state_dict().keys()
    for name, array in original.state_dict().items():
        np.testing.assert_array_equal(arrays[name], array)


class TorchSteps(nn.Module):
    """A cell that is called step by step."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(5, UNITS), nn.Linear(UNITS, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = x.new_zeros(len(x), UNITS)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for i in range(x.shape[1]):
            state = self.cell(x[:, i], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Steps(nnx.Module):
    """`TorchSteps`, ported."""

    def __init__(self, cell: Callable[..., Any], *, scan: bool) -> None:
        rngs = nnx.Rngs(0)
        self.cell, self.head, self.scan = cell(5, UNITS, rngs=rngs), nnx.Linear(UNITS, 2, rngs=rngs), scan

    def __call__(self, x: jax.Array) -> jax.Array:
        carry: Any = jnp.zeros((len(x), UNITS), x.dtype)
        carry = (carry, carry) if isinstance(self.cell, nnx.LSTMCell | nnx.OptimizedLSTMCell) else carry
        if self.scan:
            _, states = jax.lax.scan(self.cell, carry, x.swapaxes(0, 1))
            return self.head(states[-1])
        for i in range(x.shape[1]):
            carry, state = self.cell(carry, x[:, i])
        return self.head(state)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("kind", "cell"),
    [(nn.LSTMCell, lstm_cell), (nn.GRUCell, gru_cell), (nn.RNNCell, rnn_cell)],
    ids=["LSTM", "GRU", "RNN"],
)
def test_cells_called_step_by_step_pass(kind, cell, scan, parity):
    torch.manual_seed(0)
    original = TorchSteps(kind)
    parity.check(original, load_torch(Steps(cell, scan=scan), original.state_dict()), batch(), steps=2, dtypes=[])


def wrong_bias(cell: Any) -> None:
    cell.dense_h.bias.set_value(cell.dense_h.bias[...] * (1 + 1e-6))


def gates_in_another_order(cell: Any) -> None:
    first, second, *others = jnp.split(cell.dense_h.kernel[...], 4, 1)
    cell.dense_h.kernel.set_value(jnp.concatenate([second, first, *others], 1))


@pytest.mark.parametrize(("fault", "quantity"), [(wrong_bias, "bias_ih_l0"), (gates_in_another_order, "weight_hh_l0")])
def test_wrong_weights_are_found(fault, quantity):
    original = network()
    port = load_torch(Network(nnx.OptimizedLSTMCell), original.state_dict())
    fault(port.rnn.cell)
    report = parity.check(original, port, batch(), steps=0, dtypes=[])
    assert (report.first_divergence.place, report.first_divergence.quantity) == ("rnn", quantity)


@pytest.mark.parametrize("term", ["bias_ih_l0", "bias_hh_l0"])
def test_one_of_the_two_biases_is_not_their_sum(term):
    original = network()
    port = load_torch(Network(nnx.OptimizedLSTMCell), original.state_dict())
    port.rnn.cell.dense_h.bias.set_value(jnp.array(getattr(original.rnn, term).detach().numpy()))
    report = parity.check(original, port, batch(), steps=0, dtypes=[])
    assert f"holds PyTorch's rnn.{term} alone" in report.first_divergence.diagnosis
    assert "copy the sum of rnn.bias_ih_l0 and rnn.bias_hh_l0" in report.first_divergence.fix


def test_a_bias_that_was_not_copied_is_named():
    original = network()
    port = load_torch(Network(nnx.OptimizedLSTMCell), original.state_dict())
    port.rnn.cell.dense_h.bias.set_value(jnp.zeros(4 * UNITS))
    report = parity.check(original, port, batch(), steps=0, dtypes=[])
    assert "bias_ih_l0 is still the initial 0: it was never copied" in report.first_divergence.diagnosis


def test_another_activation_of_a_cell_is_found_where_it_computes():
    original = network()
    port = load_torch(Network(partial(nnx.OptimizedLSTMCell, gate_fn=jax.nn.hard_sigmoid)), original.state_dict())
    report = parity.check(original, port, batch(), steps=0, dtypes=[])
    assert (report.first_divergence.place, report.first_divergence.quantity) == (
        "between embed and head",
        "input of head",
    )


def test_a_raised_forget_gate_is_named():
    class Raised(nnx.OptimizedLSTMCell):
        def __call__(self, carry: Any, inputs: jax.Array) -> Any:
            cell, state = carry
            i, f, g, o = jnp.split(self.dense_i(inputs) + self.dense_h(state), 4, -1)
            cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            state = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (cell, state), state

    original = network()
    report = parity.check(original, load_torch(Network(Raised), original.state_dict()), batch(), steps=0, dtypes=[])
    assert "adds 1 to the forget gate" in report.first_divergence.diagnosis


def test_what_a_cell_of_ones_own_adds_is_a_weight_too():
    class Scaled(nnx.OptimizedLSTMCell):
        def __init__(self, inputs: int, units: int, *, rngs: nnx.Rngs) -> None:
            super().__init__(inputs, units, rngs=rngs)
            self.factor = nnx.Param(jnp.ones(units))

    with pytest.raises(ValueError, match=r"missing: rnn\.cell\.factor"):
        load_torch(Network(Scaled), network().state_dict())


@pytest.mark.parametrize(
    ("options", "port", "problem"),
    [
        ({"kind": nn.GRU}, Network(nnx.LSTMCell), r"rnn\.weight_hh_l0 is \(12, 4\), expected \(16, 4\)"),
        ({"proj_size": 2}, Network(nnx.LSTMCell), r"unexpected: rnn\.weight_hr_l0"),
        ({"bias": False}, Network(nnx.LSTMCell), r"missing: rnn\.bias_ih_l0"),
        ({}, Network(nnx.LSTMCell, 2), r"missing: rnn\.1\.bias_ih_l0"),
        ({"num_layers": 2}, Network(nnx.LSTMCell), r"unexpected: rnn\.bias_ih_l1"),
    ],
)
def test_other_layers_are_refused(options, port, problem):
    before = to_torch(port)
    with pytest.raises(ValueError, match=problem):
        load_torch(port, network(**options).state_dict())
    jax.tree.map(np.testing.assert_array_equal, to_torch(port), before)


class Stack(nnx.Module):
    """`TorchNetwork` with layers of its own, one after the other."""

    def __init__(self, width: int, **layers: Callable[..., Any]) -> None:
        rngs = nnx.Rngs(0)
        self.embed, self.head = nnx.Linear(5, 3, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)
        self.order = tuple(layers)
        for name, layer in layers.items():
            setattr(self, name, layer(rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for name in self.order:
            x = getattr(self, name)(x)
        return self.head(x[:, 2])


def layer(cell: Callable[..., Any], inputs: int = UNITS, units: int = UNITS) -> Callable[..., nnx.RNN]:
    return lambda rngs: nnx.RNN(cell(inputs, units, rngs=rngs))


@pytest.mark.parametrize("loaded", [True, False])
def test_layers_are_paired_as_they_are_defined_whatever_their_names(loaded, parity):
    original = network(num_layers=3)
    port = Stack(UNITS, rnn=layer(lstm_cell, 3), upper=layer(lstm_cell), last=layer(lstm_cell))
    port = load_torch(port, original.state_dict()) if loaded else port
    parity.check(original, port, batch(), steps=0, dtypes=[])


def with_dropouts(rngs: nnx.Rngs) -> nnx.Module:
    cells = [nnx.RNN(lstm_cell(inputs, UNITS, rngs=rngs)) for inputs in (3, UNITS, UNITS)]
    dropouts = [nnx.Dropout(0.3, rngs=rngs) for _ in range(2)]
    return nnx.Sequential(cells[0], dropouts[0], cells[1], dropouts[1], cells[2])


@pytest.mark.parametrize("train", [True, False])
def test_dropout_between_the_layers_is_given_to_the_port(train, parity):
    original = network(num_layers=3, dropout=0.3)
    port = load_torch(Stack(UNITS, rnn=with_dropouts), original.state_dict())
    parity.check(original, port, batch(), train=train, steps=1)


@pytest.mark.parametrize("options", [{"kind": nn.GRU, "bidirectional": True}, {"kind": nn.RNN}, {}])
def test_dropout_between_the_layers_of_every_kind_leaves_what_the_masks_say(options):
    original = network(num_layers=2, dropout=1e-12, **options).double().rnn.train()
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    with Functions(0) as functions:
        found, states = original(x)
    expected, expected_states = original(x)
    assert [mask.shape for mask in functions.masks] == [found.shape]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(states, expected_states, rtol=1e-12, atol=1e-14)


def test_a_port_that_drops_at_another_rate_between_the_layers_is_told():
    original = network(num_layers=3, dropout=0.5)
    port = load_torch(Stack(UNITS, rnn=with_dropouts), original.state_dict())
    report = parity.check(original, port, batch(), train=True, steps=0, dtypes=[])
    assert "drops at rate 0.3, PyTorch at 0.5" in report.first_divergence.diagnosis


def test_both_kinds_of_cells_may_be_in_one_port_by_any_names(parity):
    original = network(num_layers=2)
    port = Stack(UNITS, lower=layer(lstm_cell, 3), upper=layer(nnx.OptimizedLSTMCell))
    port = load_torch(port, original.state_dict())
    np.testing.assert_array_equal(port.lower.cell.dense_h.bias[...], original.rnn.bias_hh_l0.detach())
    parity.check(original, port, batch(), steps=0, dtypes=[])


class Projected(nnx.RNN):
    """A recurrent layer with a linear one."""

    def __init__(self, cell: Any, *, rngs: nnx.Rngs) -> None:
        super().__init__(cell)
        self.projection = nnx.Linear(UNITS, UNITS, rngs=rngs)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        return self.projection(super().__call__(x, **options))


def test_what_a_recurrent_layer_of_ones_own_adds_is_a_weight_too():
    port = Stack(UNITS, rnn=lambda rngs: Projected(lstm_cell(3, UNITS, rngs=rngs), rngs=rngs))
    assert "rnn.projection.weight" in to_torch(port)
    with pytest.raises(ValueError, match=r"missing: rnn\.projection\.bias, rnn\.projection\.weight"):
        load_torch(port, network().state_dict())


@pytest.mark.parametrize("gate", ["ii", "if_"])
def test_a_bias_of_one_gate_alone_is_not_lost(gate):
    port = Network(nnx.LSTMCell)
    setattr(port.rnn.cell, gate, nnx.Linear(3, UNITS, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0)))
    assert to_torch(port)[f"rnn.cell.{gate}.bias"].all()
    with pytest.raises(ValueError, match=rf"missing: rnn\.cell\.{gate}\.bias$"):
        load_torch(port, network().state_dict())


def test_one_bias_of_both_frameworks_comes_back():
    port = Network(nnx.OptimizedLSTMCell)
    port.rnn.cell.dense_h.bias.set_value(jnp.arange(16.0))
    names = {"rnn.bias_ih_l0": "rnn.bias"}
    np.testing.assert_array_equal(to_torch(port, names=names)["rnn.bias"], np.arange(16.0))


def test_a_cell_may_be_kept_beside_its_layer(parity):
    class Port(Network):
        def __init__(self) -> None:
            super().__init__(nnx.OptimizedLSTMCell)
            self.cell = self.rnn.cell

    original = network()
    parity.check(original, load_torch(Port(), original.state_dict()), batch(), steps=0, dtypes=[])


def test_a_wrong_rate_is_told_beside_one_bias():
    original = network()
    port = load_torch(Network(nnx.OptimizedLSTMCell), original.state_dict())
    adam = torch.optim.Adam(original.parameters(), lr=1e-3)
    report = parity.check(original, port, batch(), optimizers=(adam, optax.adam(1e-2)), steps=1, dtypes=[])
    assert "lr is 0.01, PyTorch's 0.001" in report.first_divergence.diagnosis
