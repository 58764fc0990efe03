"""Layers and what lies between them: with other arguments, with nothing to learn, or on an input that they change."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from jaxloss import parity
from jaxloss.parity import load_torch
from parity_tests.zoo import randomise


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


@pytest.mark.parametrize(
    ("original", "port", "says"),
    [
        (nn.GELU("tanh"), lambda x: jax.nn.gelu(x, approximate=False), ("applies gelu where", "approximate=True")),
        (nn.ELU(2.0), jax.nn.elu, ("elu has alpha=1, PyTorch's alpha=2.", "pass alpha=2 to jax.nn.elu")),
        (nn.LeakyReLU(), lambda x: jax.nn.leaky_relu(x, 0.2), ("=0.2, PyTorch's negative_slope=0.01", "=0.01 to")),
        (nn.Softplus(2.0), jax.nn.softplus, ("beta=1, PyTorch's beta=2", "jax.nn.softplus(2 * x) / 2")),
        (nn.ELU(2.0), lambda x: jax.nn.elu(x, 0.3), ("", "")),
    ],
)
def test_activation_with_another_parameter_is_named_with_both_values(original, port, says):
    class Port(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return port(x)

    first = parity.check(original, Port(), torch.randn(5, 4), steps=0, dtypes=["float64"]).first_divergence
    assert says[0] in first.diagnosis
    assert says[1] in first.fix
    assert says[0] or "where PyTorch" not in first.diagnosis


class Embedded(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.fc = nnx.Embed(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(self.embed(x))


class Unpadded(Embedded):
    """As the fix says."""

    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.embed.embedding[...]
        return self.fc(table.at[2].set(jax.lax.stop_gradient(table[2]))[x])


class TorchEmbedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(x))


@pytest.mark.parametrize("port", [Embedded, Unpadded])
def test_padding_idx_is_named_and_its_fix_passes(port):
    torch.manual_seed(0)
    original = TorchEmbedded()
    nn.init.normal_(original.embed.weight)
    ours, batch = load_torch(port(nnx.Rngs(0)), original.state_dict()), torch.arange(10) % 5
    report = parity.check(original, ours, batch, steps=1, dtypes=["float64"])
    assert report.ok is (port is Unpadded), report
    if port is Embedded:
        assert "padding_idx=2 keeps row 2 from training" in report.first_divergence.diagnosis
        assert "table.at[2]" in report.first_divergence.fix


def _fill(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(~mask, -torch.inf).softmax(-1)


def _choose(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, x, -torch.inf).softmax(-1)


def _choose_method(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.where(mask, -1e9).softmax(-1)


def _lower(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.tril()


def _attend(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("function", [_fill, _choose, _choose_method, _lower, _attend])
def test_inverted_mask_is_named(function):
    mask = torch.arange(4) < 3 if function is _attend else torch.ones(4, 4, dtype=torch.bool).tril()

    class Original(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x, mask)

    class Port(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            if function is _lower:
                return jnp.triu(x, 1)
            scores = x @ x.swapaxes(1, 2) / 2 if function is _attend else x
            hidden = -1e9 if function is _choose_method else -jnp.inf
            weights = jax.nn.softmax(jnp.where(~mask.numpy(), scores, hidden))
            return weights @ x if function is _attend else weights

    report = parity.check(Original(), Port(), torch.randn(2, 4, 4), losses=None, steps=0, dtypes=["float64"])
    assert "is the inverse of PyTorch's" in report.first_divergence.diagnosis


class TorchRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense_i, self.dense_h, self.fc = nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(len(x), 5, dtype=x.dtype)
        for step in x.unbind(1):
            h = torch.tanh(self.dense_i(step) + self.dense_h(h))
        return self.fc(h)


class Recurrent(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.rnn, self.fc = nnx.RNN(nnx.SimpleCell(4, 5, rngs=rngs), rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(self.rnn(x)[:, -1])


def test_recurrent_cell_computes_in_the_dtype_of_the_check():
    original, names = TorchRecurrent(), {f"rnn.cell.dense_{x}.weight": f"dense_{x}.weight" for x in "ih"}
    port = load_torch(Recurrent(), original.state_dict(), names=names)
    report = parity.check(original, port, torch.randn(2, 3, 4), names=names, steps=1, dtypes=["float64"])
    assert report.ok, report


def test_norms_at_their_initial_values_pass(parity):
    original = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    port = nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(6, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)),
        nnx.Linear(6, 3, rngs=nnx.Rngs(0)),
    )
    parity.check(original, load_torch(port, original.state_dict()), torch.randn(8, 4), steps=1)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("epsilon", [float(jnp.finfo(jnp.float32).eps), 1e-6], ids=["right", "Flax's"])
def test_default_epsilon_of_rms_norm_is_that_of_float32(affine, epsilon):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6, elementwise_affine=affine), nn.Linear(6, 3))
    rngs = nnx.Rngs(0)
    norm = nnx.RMSNorm(6, epsilon=epsilon, use_scale=affine, rngs=rngs)
    port = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), norm, nnx.Linear(6, 3, rngs=rngs))
    report = parity.check(original, port, torch.randn(5, 4) / 100, steps=2)
    assert report.ok is (epsilon < 1e-6), str(report)
    assert report.ok or report.first_divergence.diagnosis == "The port's epsilon is 1e-06, PyTorch's 1.19209e-07."
    assert original[1].eps is None


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


class Two(nnx.Module):
    """Two linear layers and what is between them."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last, self.function = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs), function

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.function(self.first(x)))


class TorchTwo(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x)))


def reason(original: nn.Module, port: nnx.Module, batch: Any = None, **options: Any) -> str:
    """The diagnosis of the first difference."""
    torch.manual_seed(0)
    port = parity.load_torch(port, original.state_dict())
    options = {"losses": None, "steps": 0, "dtypes": ["float64"]} | options
    report = parity.check(original, port, torch.randn(5, 4) if batch is None else batch, **options)
    return report.first_divergence.diagnosis


def in_place(x: torch.Tensor) -> torch.Tensor:
    mean = x.pow(2).mean(-1, keepdim=True)
    mean.add_(1e-5)
    return x * mean.rsqrt()


@pytest.mark.parametrize("original", [in_place, lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()])
@pytest.mark.parametrize(
    ("epsilon", "says"),
    [
        (0.0, "The port adds no epsilon, PyTorch one of 1e-05."),
        (1e-3, "The port adds an epsilon of 0.001, PyTorch one"),
    ],
)
def test_an_epsilon_by_hand_is_named_in_place_too(original, epsilon, says):
    port = Two(lambda x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon))
    assert says in reason(TorchTwo(original), port)


def test_calls_in_a_form_that_a_rule_does_not_know_leave_the_reason_of_others():
    original = TorchTwo(lambda x: torch.where(condition=x > 0, input=torch.relu(x), other=0.0) + 1)
    port = Two(lambda x: jnp.where(x > 0, jax.nn.gelu(x, approximate=False), 0) + 1)
    assert "applies gelu where PyTorch applies relu" in reason(original, port)


@pytest.mark.parametrize("hidden", ["remat", "by hand"])
def test_layers_whose_calls_are_not_seen_are_not_said_to_be_left_out(hidden):
    class TorchBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TorchTwo(torch.sin)
            self.out = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.inner(x))

    class Block(nnx.Module):
        def __init__(self) -> None:
            self.inner, self.out = Two(jnp.cos), nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            if hidden == "remat":
                return self.out(nnx.remat(lambda inner, x: inner(x))(self.inner, x))
            first, last = self.inner.first, self.inner.last
            x = jnp.cos(x @ first.kernel[...] + first.bias[...])
            return self.out(x @ last.kernel[...] + last.bias[...])

    assert "does not" not in reason(TorchBlock(), Block())


def test_the_states_projection_of_an_lstm_has_no_gates():
    class Port(nnx.Module):
        def __init__(self, order: str) -> None:
            shapes = {"ih": (24, 4), "hh": (24, 4), "hr": (4, 6)}
            for name, shape in shapes.items():
                setattr(self, f"weight_{name}_l0", nnx.Param(jnp.zeros(shape)))
            self.bias_ih_l0, self.bias_hh_l0 = nnx.Param(jnp.zeros(24)), nnx.Param(jnp.zeros(24))
            self.order = order

        def __call__(self, x: jax.Array) -> jax.Array:
            h, c = jnp.zeros((len(x), 4), x.dtype), jnp.zeros((len(x), 6), x.dtype)
            for step in x.swapaxes(0, 1):
                of_x = step @ self.weight_ih_l0[...].T + self.bias_ih_l0[...]
                gates = jnp.split(of_x + h @ self.weight_hh_l0[...].T + self.bias_hh_l0[...], 4, -1)
                parts = dict(zip(self.order, gates, strict=True))
                i, f, o = (jax.nn.sigmoid(parts[gate]) for gate in "ifo")
                c = f * c + i * jnp.tanh(parts["g"])
                h = (o * jnp.tanh(c)) @ self.weight_hr_l0[...].T
            return h

    class Whole(nnx.Module):
        def __init__(self, order: str) -> None:
            self.rnn, self.head = Port(order), nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.rnn(x))

    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 6, proj_size=4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    says = reason(Original(), Whole("figo"), torch.randn(2, 5, 4))
    assert "the input gate for the forget gate" in says
