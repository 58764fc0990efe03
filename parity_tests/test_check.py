"""The parity engine on right ports: our models, others, other names and orders, many seeds."""

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import settings
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jaxloss
from jaxloss import parity
from jaxloss.parity import load_torch
from jaxloss.parity._live import Live
from jaxloss.parity._recording import sketch
from parity_tests import larger
from parity_tests.gates import assert_float64_close
from parity_tests.zoo import CASES, TorchFlat, randomise, run
from train import models, originals

CROSS_ENTROPY, NLL = (F.cross_entropy, jaxloss.cross_entropy), (F.nll_loss, jaxloss.nll_loss)


class TorchLogits(originals.ExNN):
    forward = originals.ExNN.forward1


class TorchLogProbs(originals.ExNN):
    forward = originals.ExNN.forward2


class FlaxLogits(models.ExNN):
    __call__ = models.ExNN.forward1


class FlaxLogProbs(models.ExNN):
    __call__ = models.ExNN.forward2


def points() -> torch.Tensor:
    return torch.randn(8, 2)


def images() -> torch.Tensor:
    return torch.randn(8, 1, 28, 28)


MODELS: dict[str, tuple[Any, Any, Callable[[], torch.Tensor], Any]] = {
    "cnn": (originals.CNN, models.CNN, images, CROSS_ENTROPY),
    "net": (originals.Net, models.Net, images, NLL),
    "exnn-logits": (TorchLogits, FlaxLogits, points, CROSS_ENTROPY),
    "exnn-log-probabilities": (TorchLogProbs, FlaxLogProbs, points, NLL),
}
LAYERS = {"cnn": ["layer1.0", "layer2.0", "fc"], "net": ["conv1", "conv2", "fc1", "fc2"]}


def make(name: str) -> tuple[nn.Module, nnx.Module, torch.Tensor, Any]:
    original, port, batch, losses = MODELS[name]
    torch.manual_seed(0)
    module = original()
    return module, parity.load_torch(port(nnx.Rngs(0)), module.state_dict()), batch(), losses


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_our_models_equal_their_originals(name, train, parity):
    module, port, batch, losses = make(name)
    sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), optax.sgd(0.05, momentum=0.9)
    report = parity.check(module, port, batch, losses=losses, train=train, optimizers=sgd if train else None)
    places = ["the input", *LAYERS.get(name, ["fc1", "fc2"]), "the output"]
    expected = {*places[1:-1], *(f"between {a} and {b}" for a, b in itertools.pairwise(places))}
    assert expected | {"loss", "whole network", "step 10"} <= report.places().keys()
    quantities = {(finding.place, finding.quantity) for finding in report.findings}
    for layer in places[1:-1]:
        wanted = ("weight", "bias", "output", "gradient of input", "gradient of weight", "gradient of bias")
        assert {(layer, quantity) for quantity in wanted} <= quantities
    assert 0 < report.minimum_detectable < 1e-9
    assert report.controls[0] == report.controls[1] > 50


def test_both_heads_of_exnn_train_alike():
    """Cross entropy on logits and NLL on log-probabilities: the same losses and weights, ten steps long."""
    results = []
    with jax.enable_x64(True):
        batch = np.random.default_rng(0).normal(size=(8, 2)), np.arange(8) % 3
        for kind, loss in ((FlaxLogits, jaxloss.cross_entropy), (FlaxLogProbs, jaxloss.nll_loss)):
            graph, weights = nnx.split(kind(nnx.Rngs(0)))
            weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), weights)
            adam, losses = optax.adam(1e-3), []
            state = adam.init(weights)
            value_and_grad = jax.jit(
                jax.value_and_grad(lambda w, graph=graph, loss=loss: loss(nnx.merge(graph, w)(batch[0]), batch[1]))
            )
            for _ in range(10):
                value, gradient = value_and_grad(weights)
                updates, state = adam.update(gradient, state)
                weights = optax.apply_updates(weights, updates)
                losses.append(value)
            results.append({"losses": jnp.array(losses), "weights": jax.tree.leaves(weights)})
    assert_float64_close(*results, tolerance=1e-10)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["residual", "transformer", "flat", "tied", "upsample"])
def test_other_right_ports_pass(name, train):
    report = run(CASES[name], train=train, steps=3, dtypes=["float64"] if train else ["float64", "float32"])
    assert report.ok, str(report)


def test_no_false_alarm_over_seeds():
    """200 seeds with --hypothesis-profile=thorough."""
    names = ["flat", "transformer", "residual"]
    for seed in range(200 if settings.default.max_examples > 1000 else 6):
        report = run(CASES[names[seed % 3]], seed, train=bool(seed % 2), steps=2)
        assert report.ok, f"seed {seed}: {report}"


def test_gpus_are_not_seeded(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    parity.check(nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0)), points(), steps=0, dtypes=["float64"])
    assert not seeds


def test_random_state_is_left_alone_where_the_loss_draws_numbers():
    def random(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs * torch.rand(())).sum()

    losses = random, lambda outputs, targets: outputs.sum()
    original, port = nn.Linear(4, 3), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    before = torch.get_rng_state()
    parity.check(original, port, np.ones((5, 4)), losses=losses, steps=1, dtypes=["float64"])
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_of_the_callers_changes():
    module, port, batch, losses = make("net")
    optimizer = torch.optim.Adam(module.parameters())
    before = (
        copy.deepcopy(module.state_dict()),
        parity.to_torch(port),
        batch.clone(),
        copy.deepcopy(optimizer.state_dict()),
    )
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    streams = nnx.to_pure_dict(nnx.state(port, nnx.RngState))
    parity.check(module, port, batch, losses=losses, optimizers=(optimizer, optax.adam(1e-3)), train=True, steps=2)
    after = module.state_dict(), parity.to_torch(port), batch, optimizer.state_dict()
    for old, new in zip(before[:3], after[:3], strict=True):
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert before[3] == after[3]
    assert torch.equal(random[0], torch.get_rng_state())
    assert (random[1] == np.random.get_state()[1]).all()
    assert str(streams) == str(nnx.to_pure_dict(nnx.state(port, nnx.RngState)))
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_fresh_port_gets_pytorchs_weights_and_the_report_says_so():
    torch.manual_seed(0)
    report = parity.check(originals.CNN(), models.CNN(nnx.Rngs(1)), images(), steps=0, dtypes=["float64"])
    assert report.ok
    assert any("PyTorch's were copied" in note for note in report.notes)
    assert not any("initialisation" in note for note in report.notes)


def test_flaxs_own_initialisation_is_noticed():
    report = parity.check(
        nn.Linear(30, 20), nnx.Linear(30, 20, rngs=nnx.Rngs(0)), torch.randn(8, 30), steps=0, dtypes=["float64"]
    )
    assert report.ok
    assert any("initialisation differs in weight (standard deviation 0.18" in note for note in report.notes)


def test_weights_that_all_move_alike_are_no_missed_fault(parity):
    torch.manual_seed(7)  # every gradient has the same sign: after a step of Adam the weights are equal but for 1e-13
    original = nn.LayerNorm(4)
    port = load_torch(nnx.LayerNorm(4, epsilon=1e-5, rngs=nnx.Rngs(0)), original.state_dict())
    parity.check(original, port, torch.randn(3, 4), steps=1, dtypes=["float64"])


@pytest.mark.parametrize("order", ["flax", "torch"])
def test_flatten_order_of_a_fresh_port_is_found(order, parity):
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(1, 4, (3, 3), padding=0, rngs=rngs)
            self.fc = nnx.Linear(60, 6, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = nnx.relu(self.conv(x))
            return self.fc((x if order == "flax" else x.transpose(0, 3, 1, 2)).reshape(len(x), -1))

    torch.manual_seed(0)
    parity.check(TorchFlat(), Port(nnx.Rngs(1)), torch.randn(4, 1, 7, 5), steps=0, dtypes=["float64"])


def test_layers_with_other_names_are_paired_in_order(parity):
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.body = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 4, rngs=rngs))
            self.top = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.top(self.body(x))

    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    report = parity.check(original, Port(nnx.Rngs(0)), torch.randn(5, 4), steps=1, dtypes=["float64"])
    assert report.weight_map["body.2.weight"] == "2.weight"
    assert report.weight_map["top.bias"] == "3.bias"


def test_larger_network_is_paired_by_order_and_passes(parity):
    torch.manual_seed(0)
    original = randomise(larger.TorchLarger())
    report = parity.check(
        original, larger.FlaxLarger(nnx.Rngs(0)), torch.randn(4, 3, 16, 16), steps=1, dtypes=["float64"]
    )
    layers = {finding.place for finding in report.findings if finding.quantity == "output"} - {"whole network"}
    assert len([place for place in layers if not place.startswith("between")]) == 32
    assert report.weight_map["attentions.1.narrow.weight"] == "encoders.1.mlp.2.weight"
    assert report.weight_map["residuals.2.scale_second.running_var"] == "blocks.2.bn2.running_var"


def test_float32_inside_a_function_is_named():
    class Original(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    class Port(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            x = x[:, :, None]
            return jax.nn.dot_product_attention(x, x, x)[:, :, 0]

    first = parity.check(Original(), Port(), torch.randn(2, 5, 4), losses=None).first_divergence
    assert first is not None
    assert first.kind == "precision"
    assert "float32" in first.diagnosis


class TorchPositions(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.sin(torch.arange(3).float() / 7)


class TorchCast(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).float()


class FlaxPositions(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + jnp.sin(jnp.arange(3) / 7)


class FlaxCast(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(jnp.float32)


@pytest.mark.parametrize(("original", "port"), [(TorchPositions, FlaxPositions), (TorchCast, FlaxCast)])
def test_float32_inside_the_original_is_named(original, port):
    torch.manual_seed(0)
    module = original(4, 3)
    right = load_torch(port(4, 3, rngs=nnx.Rngs(0)), module.state_dict())
    report = parity.check(module, right, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert report.first_divergence.kind == "precision", str(report)
    assert "PyTorch itself computes in float32" in report.first_divergence.diagnosis
    assert "see float." in report.first_divergence.diagnosis
    assert any("leaves float64 in float:" in note for note in report.notes)


class EpsilonOutside(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y / (y.norm(dim=-1, keepdim=True) + 1e-6)


class EpsilonInside(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        return y / jnp.sqrt((y**2).sum(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("narrow", [False, True])
def test_an_error_of_float32s_size_is_float32s_only_if_something_computes_in_it(narrow: bool):
    class Port(EpsilonInside):
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x.astype(jnp.float32).astype(x.dtype) if narrow else x)

    torch.manual_seed(0)
    original = EpsilonOutside(8, 16)
    port = load_torch(Port(8, 16, rngs=nnx.Rngs(0)), original.state_dict())
    report = parity.check(original, port, torch.randn(5, 8), losses=None, steps=0, dtypes=["float64"])
    assert report.first_divergence.kind == ("precision" if narrow else "semantic")
    says = "something computes in float32" if narrow else "neither computes in float32"
    assert says in report.first_divergence.diagnosis.lower()


class HardSigmoidByName(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.hardsigmoid(input=x)


@pytest.mark.parametrize("activation", [nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), HardSigmoidByName()])
def test_pytorchs_rounded_derivative_of_hardsigmoid_is_no_fault_of_the_port(activation: nn.Module, parity):
    class Port(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1))])

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layers[1](jax.nn.hard_sigmoid(self.layers[0](x)))

    original = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 3))
    parity.check(original, Port(), 3 * torch.randn(5, 4))


def test_square_inputs_have_the_layout_of_their_values(parity):
    class Port(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.Conv(8, 3, (3,), padding=1, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.conv(x).mean(1)

    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean(2)

    torch.manual_seed(0)
    original, batch = Original(), torch.randn(5, 8, 8)
    port = load_torch(Port(), original.state_dict())
    parity.check(original, port, batch, batch.numpy().transpose(0, 2, 1), steps=0, dtypes=["float64"])


def linear() -> tuple[nn.Module, nnx.Module]:
    torch.manual_seed(0)
    original = nn.Linear(4, 3)
    return original, load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), original.state_dict())


@pytest.mark.parametrize(
    ("inputs", "targets"), [(jnp.bfloat16, np.int64), (jnp.float32, np.int32), (jnp.float32, np.uint8)]
)
def test_batch_may_be_of_jaxs_dtypes(inputs, targets, parity):
    batch = jax.random.normal(jax.random.key(0), (5, 4), inputs), np.arange(5, dtype=targets) % 3
    parity.check(*linear(), batch, steps=1, dtypes=["float64"])


def test_original_may_keep_extra_state(parity):
    class Original(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    parity.check(Original(4, 3), linear()[1], torch.randn(5, 4), steps=1, dtypes=["float64"])


def test_port_may_compute_its_dtype(parity):
    class Port(nnx.Module):
        def __init__(self) -> None:
            self.fc = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        @property
        def dtype(self) -> Any:
            return jnp.dtype(jnp.float32)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc(x)

    parity.check(nn.Linear(4, 3), Port(), torch.randn(5, 4), steps=1, dtypes=["float64"])


def test_embedding_may_have_sparse_gradients(parity):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))
    rngs = nnx.Rngs(0)
    port = nnx.Sequential(nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs))
    load_torch(port, original.state_dict())
    sgd = torch.optim.SGD(original.parameters(), lr=0.1), optax.sgd(0.1)
    for optimizers in (None, sgd):
        report = parity.check(
            original, port, torch.tensor([0, 6, 3, 3]), optimizers=optimizers, steps=2, dtypes=["float64"]
        )
        assert ("0", "gradient of weight") in {(finding.place, finding.quantity) for finding in report.findings}


def test_layers_may_be_called_with_keywords(parity):
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(input=torch.relu(self.a(input=x)))

    class Port(nnx.Module):
        def __init__(self, factor: float) -> None:
            self.a, self.b = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.factor = factor

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.b(inputs=nnx.relu(self.a(inputs=self.factor * x)) / self.factor)

    torch.manual_seed(0)
    original = Original()
    right, wrong = (load_torch(Port(factor), original.state_dict()) for factor in (1.0, 2.0))
    report = parity.check(original, right, torch.randn(5, 4), steps=1, dtypes=["float64"])
    assert {"a", "between a and b", "b"} <= report.places().keys()
    report = jaxloss.parity.check(original, wrong, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert report.first_divergence.quantity == "input of a"
    assert "search" not in report.first_divergence.fix


def test_report_is_printed_and_written(tmp_path):
    report = run(CASES["flat"], steps=0)
    written = report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(written))
    assert written["ok"] is True
    assert str(report).startswith("ok: ")
    assert "between conv and fc" in str(report)


class TorchDropsFlat(TorchFlat):
    """Drops before or after it flattens."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        x = F.dropout(x, 0.5, self.training) if self.before else x
        return self.fc(x.flatten(1) if self.before else F.dropout(x.flatten(1), 0.5, self.training))


class FlaxDropsFlat(nnx.Module):
    """Drops before or after it flattens, in Flax's order or in PyTorch's."""

    def __init__(self, before: bool, transpose: bool) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 4, (3, 3), padding=0, rngs=rngs)
        self.fc, self.dropout = nnx.Linear(60, 6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.before, self.transpose = before, transpose

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(x))
        x = self.dropout(x) if self.before else x
        x = (x.transpose(0, 3, 1, 2) if self.transpose else x).reshape(len(x), -1)
        return self.fc(x if self.before else self.dropout(x))


@pytest.mark.parametrize(
    ("torch_before", "before", "transpose", "copied"),
    [
        *((*order, True) for order in itertools.product([False, True], repeat=3)),
        (False, False, False, False),
        (False, False, True, False),
    ],
)
def test_dropout_of_a_flattened_map_gets_the_same_mask(torch_before, before, transpose, copied, parity):
    torch.manual_seed(0)
    original, port = TorchDropsFlat(torch_before), FlaxDropsFlat(before, transpose)
    if not copied:
        load_torch(port, original.state_dict(), flatten={} if transpose else {"fc": (4, 5, 3)})
    parity.check(original, port, torch.randn(4, 1, 7, 5), train=True, steps=2, dtypes=["float64"])


def test_jit_inside_a_port_with_dropout_passes(parity):
    @nnx.jit
    def forward(port: Any, x: jax.Array) -> jax.Array:
        return port.second(port.dropout(nnx.relu(port.first(x))))

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return forward(self, x)

    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    parity.check(original, Port(nnx.Rngs(0)), torch.randn(5, 4), train=True, steps=1, dtypes=["float64"])


@pytest.mark.parametrize("of_batch_dtype", [False, True], ids=["default dtype", "dtype of the batch"])
def test_recurrent_layer_may_start_from_a_constant_state(of_batch_dtype, parity):
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.zeros(len(x), 4, dtype=x.dtype if of_batch_dtype else None)
            for i in range(3):
                h = torch.tanh(self.cell(h) + x[:, i])
            return self.head(h)

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.cell, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            h = jnp.zeros((len(x), 4), x.dtype)
            for i in range(3):
                h = jnp.tanh(self.cell(h) + x[:, i])
            return self.head(h)

    torch.manual_seed(0)
    report = parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(5, 3, 4), steps=1)
    assert "cell (call 3)" in report.places()
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("transform", ["checkpoint", "cond", "scan"])
def test_layers_inside_other_transforms_are_left_whole(transform, parity):
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            if transform == "checkpoint":
                x = jax.checkpoint(self.first)(x)
            elif transform == "cond":
                x = jax.lax.cond(x.sum() > 1e9, lambda x: x, self.first, x)
            else:
                x, _ = jax.lax.scan(lambda x, _: (self.first(x), None), x, None, length=1)
            return self.second(nnx.relu(x))

    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    report = parity.check(original, Port(nnx.Rngs(0)), torch.randn(5, 4), steps=1, dtypes=["float64"])
    assert {"2", "whole network"} <= report.places().keys()


def test_port_in_the_originals_half_precision_passes(parity):
    torch.manual_seed(0)
    original = nn.Linear(40, 30, dtype=torch.bfloat16)
    port = nnx.Linear(40, 30, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    load_torch(port, original.state_dict())
    parity.check(original, port, torch.randn(8, 40), steps=1, dtypes=["float64", "bfloat16"])


@pytest.mark.parametrize("shape", [(3, 5), (4096,), (4097,), (300, 700)])
def test_sketch_keeps_the_size_of_differences(shape):
    random = np.random.default_rng(1)
    a = random.normal(size=shape)
    single = np.zeros(shape)
    single.flat[-1] = 1.0
    for difference in (random.normal(size=shape), np.ones(shape), single):
        found = np.linalg.norm(sketch(a + difference) - sketch(a))
        assert 0.4 < found / np.linalg.norm(difference) < 2.5


def test_steps_are_told_in_float32_beside_torchs():
    report = run(CASES["flat"], steps=3)
    ours, theirs = report.noise["parameters after 3 steps (float32)"]
    assert 0 < ours < 1e-5
    assert 0 < theirs < 1e-5


def test_steps_may_differ_by_torchs_own_noise_and_no_more(monkeypatch):
    def optimizers(original: nn.Module) -> Any:
        return torch.optim.SGD(original.parameters(), lr=0.1), optax.sgd(lambda count: 0.1 + 1e-8 * (count > 0))

    take_steps = Live._take_steps

    def check(noise: float) -> parity.Report:
        def noisy(live: Live, dtype: str, *, nudge: bool) -> Any:
            found, masks = take_steps(live, dtype, nudge=nudge)
            scale = 1 + noise * nudge
            return [{k: {n: a * scale for n, a in each.items()} for k, each in s.items()} for s in found], masks

        monkeypatch.setattr(Live, "_take_steps", noisy)
        return run(CASES["flat"], optimizers=optimizers, steps=2, dtypes=["float64"])

    assert check(0.0).first_divergence.place == "step 2"
    assert check(1e-8).ok


def test_hundred_million_parameters_within_six_gibibytes():
    """Some minutes long: with --hypothesis-profile=thorough."""
    if settings.default.max_examples <= 1000:
        pytest.skip("takes minutes: run with --hypothesis-profile=thorough")
    run = subprocess.run([sys.executable, "-m", "parity_tests.large"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert float(run.stdout.split()[-2]) < 6, run.stdout
