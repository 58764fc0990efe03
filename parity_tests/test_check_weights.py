"""Pairs of weights and buffers: tied, ignored, complex, fresh, aliased, or trained in one framework alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from jaxloss import parity
from jaxloss.parity import _golden, load_torch
from parity_tests.gates import assert_identical
from parity_tests.small import small
from parity_tests.zoo import CASES


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


def weight_normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    return nn.Sequential(norm(nn.Linear(4, 8)), nn.Linear(8, 3))


class WeightNormed(nnx.Linear):
    """Linear, its kernel as length and direction."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(inputs, outputs, rngs=rngs)
        del self.kernel
        self.g, self.v = nnx.Param(jnp.ones((outputs, 1))), nnx.Param(jnp.ones((outputs, inputs)))


def test_names_of_a_parametrised_layers_weights_leave_its_bias_with_it():
    state = weight_normed(nn.utils.parametrizations.weight_norm).state_dict()
    names = {"0.g": "0.parametrizations.weight.original0", "0.v": "0.parametrizations.weight.original1"}
    rngs = nnx.Rngs(0)
    port = nnx.Sequential(WeightNormed(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs))
    found = parity.weight_map(port, state, names=names)
    assert found == names | {name: name for name in ("0.bias", "1.weight", "1.bias")}


def test_module_that_cannot_be_copied_says_which_weight_is_computed_and_the_remedy():
    with pytest.warns(FutureWarning, match="weight_norm"):
        original = weight_normed(nn.utils.weight_norm)
    with pytest.raises(ValueError, match=r"computes 0\.weight from other .* torch\.nn\.utils\.remove_weight_norm"):
        parity.check(original, small()[1], torch.randn(5, 4))


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


def test_aliased_weights_are_found():
    module, port = small()
    weight = module.bias.detach()
    report = parity.check(module, port, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert report.ok
    port.bias.set_value(jnp.from_dlpack(weight))
    report = parity.check(module, port, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert "shares PyTorch's memory" in report.first_divergence.problem


def test_bias_never_copied_is_not_taken_for_a_norms_initial_one():
    original = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    norm = nnx.LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0))
    port = parity.load_torch(nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), norm), original.state_dict())
    port.layers[0].bias.set_value(jnp.zeros(8))
    report = parity.check(original, port, torch.randn(5, 6), steps=0, dtypes=["float64"])
    assert report.first_divergence.diagnosis == "The port's bias is still the initial 0: it was never copied."


def test_parametrised_weight_says_what_pytorch_makes_it_of():
    original = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)))
    port = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="remove_parametrizations") as error:
        parity.load_torch(port, original.state_dict())
    assert str(error.value).count("remove_parametrizations") == 1
    report = parity.check(original, port, torch.randn(5, 4), steps=0, dtypes=["float64"])
    assert "PyTorch computes a weight from it" in report.first_divergence.problem
    nn.utils.parametrize.remove_parametrizations(original[0], "weight")
    assert parity.check(original, port, torch.randn(5, 4), steps=0, dtypes=["float64"]).ok
