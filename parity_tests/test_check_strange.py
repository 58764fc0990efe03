"""The parity engine on strange modules and wrong ports: an error or a verdict, never a wrong "ok"."""

from collections.abc import Callable
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
from jaxloss.parity import _golden, load_torch
from jaxloss.parity._compare import Rounding
from jaxloss.parity._findings import Finding
from parity_tests.gates import assert_identical
from parity_tests.without_torch import BatchNorm
from parity_tests.zoo import CASES, randomise


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


def test_constant_batch_that_arrives_is_no_fault_of_the_layout():
    report = check_small(torch.ones(5, 4))
    assert "nothing can be told" in report.first_divergence.problem
    assert not report.first_divergence.kind
    assert not report.first_divergence.diagnosis


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


def test_frozen_parameters_are_held_fixed(parity):
    module, port = small()
    module.bias.requires_grad_(False)
    report = parity.check(module, port, torch.randn(5, 4), steps=2, dtypes=["float64"])
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


def test_dropout_that_is_missing_elsewhere_is_no_reason():
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(nn.functional.gelu(self.a(x)))
            return self.c(nn.functional.dropout(x, 0.5, self.training))

    class Port(nnx.Module):
        def __init__(self, *, exact: bool) -> None:
            rngs = nnx.Rngs(0)
            self.a, self.b, self.c = (nnx.Linear(4, size, rngs=rngs) for size in (4, 4, 3))
            self.exact = exact

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.c(self.b(nnx.gelu(self.a(x), approximate=not self.exact)))

    torch.manual_seed(0)
    original = Original()
    for exact, place, says in (
        (False, "between a and b", "gelu with approximate=True"),
        (True, "between b and c", "drops 0 times in a run, PyTorch 1 times"),
    ):
        report = parity.check(original, Port(exact=exact), torch.randn(5, 4), train=True, steps=0, dtypes=["float64"])
        assert report.first_divergence.place == place
        assert says in report.first_divergence.diagnosis


def test_random_numbers_that_the_port_cannot_be_given_are_named():
    class Original(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.alpha_dropout(super().forward(x), 0.5, self.training)

    report = parity.check(Original(4, 3), small()[1], torch.randn(5, 4), train=True, steps=0, dtypes=["float64"])
    assert not report.ok
    assert any("draws random numbers in alpha_dropout" in note for note in report.notes)


def test_attention_dropout_is_named_and_alpha_dropout_in_eval_mode_is_not():
    class Original(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.alpha_dropout(x, 0.5, False)
            return nn.functional.scaled_dot_product_attention(x, x, x, None, 0.3 * self.training)

    class Port(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return jax.nn.softmax(x @ x.swapaxes(-1, -2) / 2) @ x

    for train in (False, True):
        report = parity.check(Original(), Port(), torch.randn(2, 5, 4), losses=None, train=train, dtypes=["float64"])
        assert report.ok is not train
        named = [note for note in report.notes if "draws random numbers" in note]
        assert len(named) == train
        assert all("scaled_dot_product_attention" in note for note in named)


def test_gradients_that_are_nan_or_zero_everywhere_end_in_a_report():
    def constant(outputs: Any, targets: Any) -> Any:
        return (outputs * 0).sum()

    def nan(outputs: Any, targets: Any) -> Any:
        return ((outputs * 0) ** 0.5).sum()

    module, port = small()
    for loss in (constant, nan):
        report = parity.check(module, port, torch.randn(5, 4), losses=(loss, loss), steps=2)
        assert not report.ok
        assert report.first_divergence is not None


def test_integer_parameters_and_an_unknown_step_difference_end_in_a_report():
    module, port = small()
    module.count = nn.Parameter(torch.arange(3), requires_grad=False)
    pair = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.8), optax.sgd(0.0, momentum=0.7)
    report = parity.check(
        module, port, torch.randn(5, 4), optimizers=pair, steps=3, dtypes=["float64"], ignore=["count"]
    )
    first = report.first_divergence
    assert (first.place, first.quantity) == ("step 2", "momentum_buffer of weight")
    assert "KeyError" not in first.fix


def test_difference_below_what_can_be_told_apart_gets_no_reason():
    module, port = small()
    pair = torch.optim.SGD(module.parameters(), lr=0.1), optax.sgd(0.1 * (1 + 4e-9))
    first = parity.check(module, port, torch.randn(5, 4), optimizers=pair, dtypes=["float64"]).first_divergence
    assert first.place.startswith("step ")
    assert "nesterov" not in first.diagnosis


def test_parameter_may_be_called_like_what_a_step_keeps_and_another_be_empty():
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.add_module("mean of x", nn.Linear(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule("mean of x")(x)

    class Port(nnx.Module):
        def __init__(self) -> None:
            setattr(self, "mean of x", nnx.Linear(4, 3, rngs=nnx.Rngs(0)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return getattr(self, "mean of x")(x)

    torch.manual_seed(0)
    module = Original()
    port = parity.load_torch(Port(), module.state_dict(), ignore=["empty"])
    pair = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), optax.sgd(0.01, momentum=0.9)
    first = parity.check(
        module, port, torch.randn(5, 4), optimizers=pair, steps=2, dtypes=["float64"], ignore=["empty"]
    ).first_divergence
    assert (first.place, first.quantity) == ("step 1", "mean of x.weight")
    assert first.diagnosis == "The port's lr is 0.01, PyTorch's 0.1."


def test_tied_weight_may_be_called_by_its_other_name(parity):
    case = CASES["tied"]
    torch.manual_seed(0)
    original, port = case.original(), case.port(nnx.Rngs(0))
    for options in ({"names": {"embed.weight": "head.weight"}}, {"ignore": ["head.weight"]}):
        parity.check(original, port, case.batch(), steps=1, dtypes=["float64"], **options)


def test_buffers_that_the_port_does_not_need_are_ignored_by_name():
    module, port = small()
    module.register_buffer("mask", torch.ones(3, 3))
    assert "no counterpart in the port" in parity.check(module, port, torch.randn(5, 4)).first_divergence.problem
    assert parity.check(module, port, torch.randn(5, 4), ignore=["mask"], steps=1, dtypes=["float64"]).ok


class TorchShift(nn.Module):
    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("shift", torch.tensor([0.5, 1.0, 2.0]), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.shift


class Shift(nnx.Module):
    def __init__(self) -> None:
        self.fc, self.shift = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Variable(jnp.array([0.5, 1.0, 2.0]))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x) + self.shift[...]


def test_counterpart_of_a_non_persistent_buffer_is_ignored_by_name():
    torch.manual_seed(0)
    original, port, options = TorchShift(persistent=False), Shift(), {"steps": 1, "dtypes": ["float64"]}
    report = parity.check(original, port, torch.randn(5, 4), **options)
    assert "pass ignore=['shift']" in report.first_divergence.problem
    report = parity.check(original, port, torch.randn(5, 4), ignore=["shift"], **options)
    assert report.ok, str(report)
    port.shift.set_value(port.shift[...] + 1)
    report = parity.check(original, port, torch.randn(5, 4), ignore=["shift"], **options)
    assert report.first_divergence.place == "between fc and the output"


def test_name_to_ignore_that_is_nowhere_is_refused_with_the_closest_ones():
    where = r"PyTorch's state_dict, nor among the port's variables that are no nnx\.Param"
    for name, closest in (("shfit", r"shift, fc\."), ("fc.kernel", r"fc\.weight, ")):
        with pytest.raises(
            ValueError, match=rf"^ignore: there is no {name} in {where}\. The closest names are {closest}"
        ):
            parity.check(TorchShift(persistent=False), Shift(), torch.randn(5, 4), ignore=[name])


def test_buffer_of_the_whole_module_has_its_reason_too():
    class Original(TorchShift):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.shift.mul_(2)
            return super().forward(x)

    class Port(Shift):
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc(x) + 2 * self.shift[...]

    torch.manual_seed(0)
    original = Original(persistent=True)
    port = parity.load_torch(Port(), original.state_dict())
    report = parity.check(original, port, torch.randn(5, 4), train=True, steps=0, dtypes=["float64"])
    assert (report.first_divergence.place, report.first_divergence.quantity) == ("Original", "shift after a step")
    assert report.first_divergence.diagnosis == "The port does not update its running statistics."


class TorchRotation(nn.Module):
    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.tensor([0.3, 0.7, 1.1])), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_complex(self.fc(x).reshape(len(x), 3, 2)) * self.turn
        return torch.view_as_real(turned).reshape(len(x), 6)


class Rotation(nnx.Module):
    def __init__(self, turn: np.ndarray) -> None:
        self.fc, self.turn = nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Variable(jnp.asarray(turn))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.fc(x).reshape(len(x), 3, 2)
        turned = jax.lax.complex(x[..., 0], x[..., 1]) * self.turn[...]
        return jnp.stack([turned.real, turned.imag], -1).reshape(len(x), 6)


@pytest.mark.parametrize("persistent", [False, True], ids=["not persistent", "persistent"])
def test_complex_buffers_keep_their_imaginary_part(persistent, tmp_path):
    torch.manual_seed(0)
    original, batch, path = TorchRotation(persistent=persistent), torch.randn(5, 4), tmp_path / "golden.safetensors"
    ignore, dtypes = [] if persistent else ["turn"], ["float64"] if persistent else ["float64", "float32"]
    turn = original.turn.numpy()
    parity.record(path, original, batch, loss=None, steps=1, dtypes=["float64"])
    for factor, right in ((turn, True), (turn.real.astype(turn.dtype), False), (turn.conj(), False)):
        port = Rotation(factor)
        load_torch(port.fc, original.fc.state_dict())
        report = parity.check(original, port, batch, losses=None, steps=1, dtypes=dtypes, ignore=ignore)
        assert report.ok is right, str(report)
        assert parity.replay(path, port, ignore=ignore).ok is right


def test_complex_buffers_of_twice_the_precision_are_recorded_too(tmp_path, x64):
    torch.manual_seed(0)
    original, batch, path = TorchRotation(persistent=True), torch.randn(5, 4), tmp_path / "golden.safetensors"
    original.turn = torch.exp(1j * torch.arange(3, dtype=torch.float64))
    original.register_buffer("scalar", torch.tensor(1j, dtype=torch.complex128))
    parity.record(path, original, batch, loss=None, steps=1, dtypes=["float64"])
    state = _golden.read(path)[0].state
    assert state.shapes["turn"] == (3,)
    assert_identical({name: state.given(name) for name in state}, original.state_dict())
    for turn, right in ((original.turn.numpy(), True), (original.turn.numpy().conj(), False)):
        port = Rotation(turn)
        load_torch(port.fc, original.fc.state_dict())
        report = parity.replay(path, port, ignore=["scalar"])
        assert report.ok is right, str(report)


def test_complex_outputs_are_refused():
    class Original(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1j

    with pytest.raises(TypeError, match="returned complex numbers"):
        parity.check(Original(4, 3), small()[1], torch.randn(5, 4))


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"weight, bias is complex in PyTorch: train the real and imaginary parts"):
        parity.check(nn.Linear(4, 3, dtype=torch.complex64), small()[1], torch.randn(5, 4))


def test_pairs_can_be_given():
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.b = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.b(x) + 2 * self.a(x)

    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.one(x) + self.two(x)

    torch.manual_seed(0)
    names = {"a.weight": "one.weight", "a.bias": "one.bias", "b.weight": "two.weight", "b.bias": "two.bias"}
    options = {"steps": 1, "dtypes": ["float64"]}
    original, batch = Original(), torch.randn(5, 4)
    assert not parity.check(original, Port(nnx.Rngs(0)), batch, **options).ok  # paired in the order of their calls
    report = parity.check(original, Port(nnx.Rngs(0)), batch, names=names, **options)
    assert report.ok, str(report)
    assert report.weight_map == names
    with pytest.raises(ValueError, match=r"there is no c\.weight in the module"):
        parity.check(original, Port(nnx.Rngs(0)), batch, names={"c.weight": "one.weight"})


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


@pytest.mark.parametrize("scale", [1e-170, 1e160])
def test_fault_of_weights_whose_squares_underflow_or_overflow_has_its_reason(scale):
    torch.manual_seed(0)
    original, batch = nn.Linear(4, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    original.weight.data *= scale
    with jax.enable_x64(True):
        port = parity.load_torch(nnx.Linear(4, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), original.state_dict())
        port.kernel.set_value(port.kernel[...].T)
    report = parity.check(original, port, batch, losses=None, steps=0, dtypes=["float64"])
    assert (report.first_divergence.quantity, report.first_divergence.kind) == ("weight", "layout")
    assert report.first_divergence.diagnosis == "The kernel's inputs and outputs are swapped."


def test_norms_at_their_initial_values_pass(parity):
    original = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    port = nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(6, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)),
        nnx.Linear(6, 3, rngs=nnx.Rngs(0)),
    )
    parity.check(original, load_torch(port, original.state_dict()), torch.randn(8, 4), steps=1)


def test_layer_that_nothing_uses_passes(parity):
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

    parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(5, 4), steps=1, dtypes=["float64"])


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


def test_half_precision_that_only_float32_meets_fails_there():
    class Port(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x.astype(jnp.bfloat16).astype(x.dtype) if x.dtype == jnp.float32 else x)

    torch.manual_seed(0)
    module = nn.Linear(40, 30)
    port = parity.load_torch(Port(40, 30, rngs=nnx.Rngs(0)), module.state_dict())
    report = parity.check(module, port, torch.randn(50, 40), steps=0)
    assert {finding.dtype for finding in report.failures()} == {"float32"}
    assert report.first_divergence.quantity == "output"


class TorchNoisy(nn.Module):
    """Group norm before batch norm: its gradients are what rounding leaves of zero, and a little more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.batch, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.batch(self.group(self.conv(x)))).mean((2, 3)))


class Noisy(nnx.Module):
    def __init__(self, *, rounds: bool) -> None:
        rngs, self.rounds = nnx.Rngs(0), rounds
        self.conv = nnx.Conv(2, 4, (3, 3), padding=1, rngs=rngs)
        self.group = nnx.GroupNorm(4, num_groups=2, epsilon=1e-5, rngs=rngs)
        self.batch, self.fc = BatchNorm(4, momentum=0.9, epsilon=1e-5, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.batch(self.group(self.conv(x)))).mean((1, 2))
        if self.rounds and x.dtype == jnp.float32:  # as a TF32 product does its input
            x = jax.lax.reduce_precision(x, 8, 10)
        return self.fc(x)


@pytest.mark.rounding
def test_gradients_of_noise_do_not_hide_the_rounding_of_others():
    for seed in range(3):
        torch.manual_seed(seed)
        original, batch = TorchNoisy(), torch.randn(4, 2, 6, 6)
        for rounds in (False, True):
            port = parity.load_torch(Noisy(rounds=rounds), original.state_dict(), flatten={})
            report = parity.check(original, port, batch, train=True, steps=0)
            assert report.ok is not rounds, f"seed {seed}: {report}"
            assert {finding.dtype for finding in report.failures()} <= {"float32"}


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (3.0, True), (20.0, False)])
def test_rounding_of_layers_is_judged_beside_torchs(factor, passes):
    random = np.random.default_rng(0)
    exact, error = random.normal(size=2000), 1e-6 * random.normal(size=2000)
    ours, theirs = ((exact + scale * error).astype(np.float32) for scale in (factor, 1.0))
    rounding = Rounding.of(ours, theirs, exact)
    assert (rounding.ours <= rounding.bound) is passes
    pooled = Rounding.pooled([rounding] * 3)
    assert (pooled.ours <= pooled.bound) is passes


def test_report_without_findings_or_with_a_fault_not_caught_is_not_ok():
    finding = Finding("fc", "output", "float64", 0.0, 1e-12)
    assert parity.Report([finding], controls=(3, 3)).ok
    assert not parity.Report([finding], controls=(2, 3)).ok
    assert not parity.Report([finding]).ok
    assert not parity.Report([], controls=(3, 3)).ok


def test_a_line_names_six_of_the_tensors_that_failed_at_a_place():
    findings = [Finding("step 1", f"{layer}.bias", "float64", 1.0, 1e-12) for layer in range(9)]
    line = "FAIL step 1: 0.bias, 1.bias, 2.bias, 3.bias, 4.bias, 5.bias and 3 more; worst"
    assert line in str(parity.Report(findings))
    assert "5.bias; worst" in str(parity.Report(findings[:6]))


@pytest.mark.parametrize("dtypes", ["float32", ["float99"]])
def test_unknown_dtypes_are_refused_at_once(dtypes):
    original, port = nn.Linear(4, 3), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    stages = []
    with pytest.raises(ValueError, match="dtypes must be a sequence of bfloat16, float16, float32, float64, got"):
        parity.check(original, port, torch.randn(5, 4), dtypes=dtypes, progress=stages.append)
    assert not stages


def test_gradients_that_are_the_same_everywhere_may_be_right(parity):
    class Original(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).sum()

    class Port(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.fc(x).sum()

    original = Original()
    port = load_torch(Port(nnx.Rngs(0)), original.state_dict())
    parity.check(original, port, torch.randn(5, 4), losses=None, steps=1, dtypes=["float64"])


def frozen_embedding() -> tuple[nn.Module, nnx.Module]:
    original = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).requires_grad_(False)
    rngs = nnx.Rngs(0)
    port = nnx.Sequential(nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs))
    return original, load_torch(port, original.state_dict())


def test_frozen_network_of_integers_is_compared_forward(parity):
    original, port = frozen_embedding()
    report = parity.check(original, port, torch.tensor([0, 6, 3, 3]), dtypes=["float64"])
    assert {"0", "1", "loss"} <= report.places().keys()
    assert not any("gradient of" in finding.quantity for finding in report.findings)
    assert "PyTorch's module trains nothing: no gradients of weights and no steps are compared." in report.notes


def test_fault_of_a_frozen_network_of_integers_is_found():
    original, port = frozen_embedding()
    port.layers[1].bias.set_value(port.layers[1].bias[...] + 1e-6)
    report = parity.check(original, port, torch.tensor([0, 6, 3, 3]), dtypes=["float64"])
    assert (report.first_divergence.place, report.first_divergence.quantity) == ("1", "bias")


def test_a_pool_of_one_image_without_a_batch_has_its_reason_too():
    class TorchUnbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(nn.functional.max_pool2d(x[0], 3, 2, 1).flatten(1))

    class FlaxUnbatched(nnx.Module):
        def __init__(self) -> None:
            self.fc = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            pooled = nnx.max_pool(jnp.moveaxis(x[0], -1, 0)[..., None], (3, 3), (2, 2), "SAME")
            return self.fc(pooled.reshape(pooled.shape[0], -1))

    original = TorchUnbatched()
    port = parity.load_torch(FlaxUnbatched(), original.state_dict())
    report = parity.check(original, port, torch.randn(1, 2, 4, 4), losses=None, steps=0, dtypes=["float64"])
    assert "pads SAME" in report.first_divergence.diagnosis


@pytest.mark.parametrize(
    ("original", "layer", "says"),
    [
        (
            lambda: nn.GroupNorm(2, 8),
            lambda rngs: nnx.GroupNorm(8, num_groups=None, group_size=2, epsilon=1e-5, rngs=rngs),
            "has 4 groups of channels, PyTorch 2.",
        ),
        (
            lambda: nn.GroupNorm(2, 8),
            lambda rngs: nnx.GroupNorm(8, num_groups=8, rngs=rngs),
            "has 8 groups of channels, PyTorch 2, and another epsilon",
        ),
        (
            lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
            lambda rngs: nnx.Conv(8, 8, (3, 3), rngs=rngs),
            "pads SAME and does not dilate, PyTorch by (2, 2)",
        ),
    ],
    ids=["groups", "groups and epsilon", "dilation"],
)
def test_other_arguments_of_a_layer_are_named(original, layer, says):
    torch.manual_seed(0)
    module = nn.Sequential(randomise(original()), nn.Flatten(), nn.Linear(8 * 25, 3))
    rngs = nnx.Rngs(0)
    port = nnx.Sequential(
        layer(rngs), lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1), nnx.Linear(200, 3, rngs=rngs)
    )
    port = parity.load_torch(port, module.state_dict(), flatten={})
    report = parity.check(module, port, torch.randn(4, 8, 5, 5), losses=None, steps=0, dtypes=["float64"])
    assert report.first_divergence.place == "0"
    assert says in report.first_divergence.diagnosis
