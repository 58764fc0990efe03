"""The parity engine: right ports pass, in every mode; strange ones get an error or a verdict, never a wrong "ok"."""

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from hypothesis import settings
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jaxloss
from jaxloss import parity
from parity_tests import larger, torch_models
from parity_tests.gates import assert_float64_close
from parity_tests.zoo import CASES, TorchFlat, randomise, run
from train import models

CROSS_ENTROPY, NLL = (F.cross_entropy, jaxloss.cross_entropy), (F.nll_loss, jaxloss.nll_loss)


class TorchLogits(torch_models.ExNN):
    forward = torch_models.ExNN.forward1


class TorchLogProbs(torch_models.ExNN):
    forward = torch_models.ExNN.forward2


class FlaxLogits(models.ExNN):
    __call__ = models.ExNN.forward1


class FlaxLogProbs(models.ExNN):
    __call__ = models.ExNN.forward2


def points() -> torch.Tensor:
    return torch.randn(8, 2)


def images() -> torch.Tensor:
    return torch.randn(8, 1, 28, 28)


MODELS: dict[str, tuple[Any, Any, Callable[[], torch.Tensor], Any]] = {
    "cnn": (torch_models.CNN, models.CNN, images, CROSS_ENTROPY),
    "net": (torch_models.Net, models.Net, images, NLL),
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
def test_our_models_equal_their_originals(name, train):
    module, port, batch, losses = make(name)
    sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), optax.sgd(0.05, momentum=0.9)
    report = parity.check(module, port, batch, losses=losses, train=train, optimizers=sgd if train else None)
    assert report.ok, str(report)
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
@pytest.mark.parametrize("name", ["residual", "transformer", "flat"])
def test_other_right_ports_pass(name, train):
    report = run(CASES[name], train=train, steps=3)
    assert report.ok, str(report)


def test_no_false_alarm_over_seeds():
    """200 seeds with --hypothesis-profile=thorough."""
    names = ["flat", "transformer", "residual"]
    for seed in range(200 if settings.default.max_examples > 1000 else 10):
        report = run(CASES[names[seed % 3]], seed, train=bool(seed % 2), steps=2)
        assert report.ok, f"seed {seed}: {report}"


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
    report = parity.check(torch_models.CNN(), models.CNN(nnx.Rngs(1)), images(), steps=0, dtypes=["float64"])
    assert report.ok
    assert any("PyTorch's were copied" in note for note in report.notes)
    assert not any("initialisation" in note for note in report.notes)


def test_flaxs_own_initialisation_is_noticed():
    report = parity.check(
        nn.Linear(30, 20), nnx.Linear(30, 20, rngs=nnx.Rngs(0)), torch.randn(8, 30), steps=0, dtypes=["float64"]
    )
    assert report.ok
    assert any("initialisation differs in weight (standard deviation 0.18" in note for note in report.notes)


@pytest.mark.parametrize("order", ["flax", "torch"])
def test_flatten_order_of_a_fresh_port_is_found(order):
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(1, 4, (3, 3), padding=0, rngs=rngs)
            self.fc = nnx.Linear(60, 6, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = nnx.relu(self.conv(x))
            return self.fc((x if order == "flax" else x.transpose(0, 3, 1, 2)).reshape(len(x), -1))

    torch.manual_seed(0)
    report = parity.check(TorchFlat(), Port(nnx.Rngs(1)), torch.randn(4, 1, 7, 5), steps=0, dtypes=["float64"])
    assert report.ok, str(report)


def test_layers_with_other_names_are_paired_in_order():
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.body = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 4, rngs=rngs))
            self.top = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.top(self.body(x))

    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    report = parity.check(original, Port(nnx.Rngs(0)), torch.randn(5, 4), steps=1, dtypes=["float64"])
    assert report.ok, str(report)
    assert report.weight_map["body.2.weight"] == "2.weight"
    assert report.weight_map["top.bias"] == "3.bias"


def test_larger_network_is_paired_by_order_and_passes():
    torch.manual_seed(0)
    original = randomise(larger.TorchLarger())
    report = parity.check(
        original, larger.FlaxLarger(nnx.Rngs(0)), torch.randn(4, 3, 16, 16), steps=1, dtypes=["float64"]
    )
    assert report.ok, str(report)
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


class LinenResidual(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = linen.Conv(8, (3, 3), padding=1, dtype=jnp.float32)(x)
        y = linen.relu(linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False)(y))
        y = linen.Dropout(0.5, broadcast_dims=(1, 2), deterministic=not train)(y)
        y = linen.max_pool(y, (2, 2), (2, 2)).reshape(len(y), -1)
        return linen.Dense(5)(y)


class TorchSmall(nn.Sequential):
    def __init__(self) -> None:
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5), nn.MaxPool2d(2)
        super().__init__(*layers, nn.Flatten(), nn.Linear(8 * 16, 5))


def linen_port(original: nn.Module) -> tuple[linen.Module, Any]:
    """The port with the original's weights."""
    state = {name: jnp.array(tensor.numpy()) for name, tensor in original.state_dict().items()}
    kernel = state["6.weight"].reshape(5, 8, 4, 4).transpose(2, 3, 1, 0).reshape(-1, 5)
    params = {
        "Conv_0": {"kernel": state["0.weight"].transpose(2, 3, 1, 0), "bias": state["0.bias"]},
        "BatchNorm_0": {"scale": state["1.weight"], "bias": state["1.bias"]},
        "Dense_0": {"kernel": kernel, "bias": state["6.bias"]},
    }
    statistics = {"BatchNorm_0": {"mean": state["1.running_mean"], "var": state["1.running_var"]}}
    return LinenResidual(), {"params": params, "batch_stats": statistics}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_linen_module_is_compared_layer_by_layer(train):
    torch.manual_seed(0)
    original = randomise(TorchSmall())
    report = parity.check(original, linen_port(original), torch.randn(6, 3, 8, 8), train=train, steps=2)
    assert {"0", "1", "6", "between 1 and 6", "between 6 and the output"} <= report.places().keys()
    failures = [(finding.place, finding.quantity) for finding in report.failures()]
    assert failures == ([("1", "running_var after a step")] if train else []), str(report)
    if train:  # Flax's own batch norm is the one that differs
        assert "by n, PyTorch by n - 1" in report.first_divergence.diagnosis


def test_fault_in_a_linen_module_is_found():
    torch.manual_seed(0)
    original = randomise(TorchSmall())
    module, variables = linen_port(original)
    kernel = variables["params"]["Conv_0"]["kernel"]
    variables["params"]["Conv_0"]["kernel"] = kernel.swapaxes(0, 1)
    report = parity.check(original, (module, variables), torch.randn(6, 3, 8, 8), steps=0, dtypes=["float64"])
    assert (report.first_divergence.place, report.first_divergence.kind) == ("0", "layout")


def test_function_with_params_is_compared_as_a_whole():
    def forward(params: Any, x: jax.Array) -> jax.Array:
        return (
            jax.nn.relu(x @ params["0"]["kernel"] + params["0"]["bias"]) @ params["2"]["kernel"] + params["2"]["bias"]
        )

    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    state = {name: jnp.array(tensor.numpy()) for name, tensor in original.state_dict().items()}
    params = {i: {"kernel": state[f"{i}.weight"].T, "bias": state[f"{i}.bias"]} for i in ("0", "2")}
    report = parity.check(original, (forward, params), torch.randn(5, 4), steps=2)
    assert report.ok, str(report)
    assert any("layers are unknown" in note for note in report.notes)
    assert ("whole network", "gradient of 2.weight") in {(f.place, f.quantity) for f in report.findings}
    params["2"]["bias"] = params["2"]["bias"] + 1
    report = parity.check(original, (forward, params), torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert not report.ok
    with pytest.raises(TypeError, match="the port is a function, expected"):
        parity.check(original, forward, torch.randn(5, 4))


def test_report_is_printed_and_written(tmp_path):
    report = run(CASES["flat"], steps=0)
    written = report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(written))
    assert written["ok"] is True
    assert str(report).startswith("ok: ")
    assert "between conv and fc" in str(report)


def small() -> tuple[nn.Module, nnx.Module]:
    torch.manual_seed(0)
    module = randomise(nn.Linear(4, 3))
    return module, parity.load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), module.state_dict())


def check_small(batch: Any, **options: Any) -> parity.Report:
    module, port = small()
    return parity.check(module, port, batch, **({"steps": 1, "dtypes": ["float64"]} | options))


def test_probability_targets_and_no_loss():
    batch = torch.randn(5, 4)
    assert check_small((batch, torch.softmax(torch.randn(5, 3), 1))).ok
    assert check_small(batch, losses=None).ok
    assert check_small((batch.numpy(), np.arange(5) % 3), flax_batch=batch.numpy()).ok


@pytest.mark.parametrize("batch", [torch.zeros(0, 4), ()], ids=["no rows", "nothing"])
def test_empty_batch_is_refused(batch):
    with pytest.raises(ValueError, match="the batch is empty"):
        check_small(batch)


def test_batch_of_nan_says_nothing():
    report = check_small(torch.full((5, 4), torch.nan))
    assert not report.ok
    assert "nothing was compared" in report.first_divergence.problem


def test_constant_batch_says_nothing():
    report = check_small(torch.zeros(5, 4))
    assert not report.ok
    assert "nothing can be told" in report.first_divergence.problem


def test_module_without_parameters():
    class Port(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(x)

    for batch in (torch.randn(5, 4), torch.rand(5, 4)):
        assert parity.check(nn.ReLU(), Port(), batch).ok
    report = parity.check(nn.GELU(), Port(), torch.randn(5, 4))
    assert report.first_divergence.place == "between the input and the output"
    assert "applies relu where PyTorch applies gelu" in report.first_divergence.diagnosis


def test_module_that_changes_its_input_is_compared_with_what_it_was_given():
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.mul_(2))

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc(x)

    batch = torch.randn(5, 4)
    kept = batch.clone()
    report = parity.check(Original(), Port(nnx.Rngs(0)), batch, steps=0, dtypes=["float64"])
    assert torch.equal(batch, kept)
    assert report.first_divergence.place == "between the input and fc"
    assert any("changes its input 0 in place" in note for note in report.notes)


class TorchTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens).mean(1))


class FlaxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(self.embed(tokens).mean(1))


def test_tied_weights_pass_and_lost_ties_do_not():
    class Untied(FlaxTied):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.head = nnx.Linear(4, 7, use_bias=False, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.head(self.embed(tokens).mean(1))

    torch.manual_seed(0)
    original, tokens = TorchTied(), torch.randint(7, (6, 3))
    report = parity.check(original, FlaxTied(nnx.Rngs(0)), tokens, steps=2)
    assert report.ok, str(report)
    report = parity.check(original, Untied(nnx.Rngs(0)), tokens, steps=2)
    assert report.first_divergence.place == "head"
    assert "no counterpart in PyTorch" in report.first_divergence.problem


def test_frozen_parameters_are_held_fixed():
    module, port = small()
    module.bias.requires_grad_(False)
    report = parity.check(module, port, torch.randn(5, 4), steps=2, dtypes=["float64"])
    assert report.ok, str(report)
    assert any("does not train bias" in note for note in report.notes)


def test_dropout_that_the_original_has_not_is_found():
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.fc(x))

    original = nn.Sequential()
    original.add_module("fc", nn.Linear(4, 3))
    options = {"steps": 0, "dtypes": ["float64"]}
    assert parity.check(original, Port(nnx.Rngs(0)), torch.randn(5, 4), **options).ok
    report = parity.check(original, Port(nnx.Rngs(0)), torch.randn(5, 4), train=True, **options)
    assert report.first_divergence.place == "between fc and the output"
    assert "drops 1 times in a run, PyTorch 0 times" in report.first_divergence.diagnosis


@pytest.mark.parametrize("side", ["torch", "flax"])
def test_module_that_raises_passes_its_error_on(side):
    class Original(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("from the original")

    class Port(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            raise RuntimeError("from the port")

    module, port = small()
    module, port = (Original(4, 3), port) if side == "torch" else (module, Port(4, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(RuntimeError, match=f"from the {'original' if side == 'torch' else 'port'}"):
        parity.check(module, port, torch.randn(5, 4))


def test_other_shapes_are_an_error():
    module, _ = small()
    with pytest.raises(ValueError, match=r"output is \(5, 2\), PyTorch's \(5, 3\)"):
        parity.check(module, nnx.Linear(4, 2, rngs=nnx.Rngs(0)), torch.randn(5, 4))


def test_outputs_that_are_no_array_are_refused():
    class Original(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return x, x

    with pytest.raises(TypeError, match="returned a tuple, expected one tensor"):
        parity.check(Original(4, 3), small()[1], torch.randn(5, 4))


class Scale(nnx.Module):
    """Multiplies by a weight, which may be of any kind of variable."""

    def __init__(self, kind: Callable[..., nnx.Variable]) -> None:
        self.fc, self.factor = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), kind(jnp.ones(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x) * self.factor[...]


class TorchScale(nn.Module):
    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        factor = torch.rand(3)
        self.factor = nn.Parameter(factor) if trained else None
        if not trained:
            del self.factor
            self.register_buffer("factor", factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.factor


@pytest.mark.parametrize(
    ("trained", "kind", "says"), [(True, nnx.Variable, "is no nnx.Param"), (False, nnx.Param, "buffer")]
)
def test_weights_that_only_one_framework_trains_are_found(trained, kind, says):
    torch.manual_seed(0)
    original = TorchScale(trained=trained)
    port = parity.load_torch(Scale(kind), original.state_dict())
    for train in (False, True):
        report = parity.check(original, port, torch.randn(5, 4), steps=1, dtypes=["float64"], train=train)
        assert says in report.first_divergence.problem


@pytest.mark.parametrize("change", [lambda k: 2 * k, lambda k: k.astype(jnp.bfloat16).astype(k.dtype)])
def test_weights_near_the_originals_are_not_taken_for_fresh_ones(change):
    module, port = small()
    port.kernel.set_value(change(port.kernel[...]))
    report = parity.check(module, port, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert not report.ok
    assert report.first_divergence.quantity == "weight"


def test_norms_at_their_initial_values_pass():
    original = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    port = nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(6, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)),
        nnx.Linear(6, 3, rngs=nnx.Rngs(0)),
    )
    report = parity.check(original, parity.load_torch(port, original.state_dict()), torch.randn(8, 4), steps=1)
    assert report.ok, str(report)


def test_layer_that_nothing_uses_passes():
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            return self.used(x)

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.used, self.unused = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            self.unused(x)
            return self.used(x)

    report = parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(5, 4), steps=1, dtypes=["float64"])
    assert report.ok, str(report)


@pytest.mark.parametrize("where", ["original", "port"])
def test_gradient_that_only_one_framework_stops_is_found(where):
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x.detach() if where == "original" else x)

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.b = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.a(x) + self.b(jax.lax.stop_gradient(x) if where == "port" else x)

    report = parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert "gradient of the input" in [finding.quantity for finding in report.failures()]


def test_output_of_another_shape_is_refused():
    class Port(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x)[:, 0]

    losses = (lambda x, y: ((x - y) ** 2).mean(), lambda x, y: ((x - y) ** 2).mean())
    batch = torch.randn(5, 4), torch.randn(5, 1)
    with pytest.raises(ValueError, match=r"output is \(5,\), PyTorch's \(5, 1\)"):
        parity.check(nn.Linear(4, 1), Port(4, 1, rngs=nnx.Rngs(0)), batch, losses=losses)


def test_namesakes_of_other_shapes_are_named():
    class Original(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 8), nn.Linear(8, 3))

    port = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    report = parity.check(Original(), port, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert "has shape (6, 4), PyTorch's (8, 4)" in [finding.problem for finding in report.failures()]
    with pytest.raises(ValueError, match="layouts names nowhere"):
        parity.check(*small(), torch.randn(5, 4), layouts={"nowhere": (1, 2, 2)})


def test_our_own_translation_with_param_groups_passes():
    module, port = small()
    groups = [{"params": [module.weight], "lr": 0.1}, {"params": [module.bias], "lr": 0.01}]
    adam = torch.optim.Adam(groups)
    pair = adam, parity.optimizer(adam, groups={"weight": 0, "bias": 1})
    report = parity.check(module, port, torch.randn(5, 4), optimizers=pair, steps=3, dtypes=["float64"])
    assert report.ok, str(report)


def test_aliased_weights_are_found():
    module, port = small()
    weight = module.bias.detach()
    report = parity.check(module, port, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert report.ok
    port.bias.set_value(jnp.from_dlpack(weight))
    report = parity.check(module, port, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert "shares PyTorch's memory" in report.first_divergence.problem
