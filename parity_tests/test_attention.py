"""PyTorch's MultiheadAttention, with query, key and value in one tensor, and its ports."""

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
from parity_tests.without_torch import SelfAttention
from parity_tests.zoo import randomise

attention = partial(nnx.MultiHeadAttention, decode=False)


class TorchSelfAttention(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


class TorchCrossAttention(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x, y, y, key_padding_mask=mask, need_weights=False)[0]


class CrossAttention(nnx.MultiHeadAttention):
    def __call__(self, x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
        return super().__call__(x, y, mask=~mask[:, None, None])


class Encoder(nnx.Module):
    """`nn.TransformerEncoderLayer(8, 2, 16)`, ported."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        norm = partial(nnx.LayerNorm, 8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.self_attn, self.norm1, self.norm2 = attention(2, 8, rngs=rngs), norm(), norm()
        self.linear1, self.linear2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm1(x + self.self_attn(x))
        return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))


def self_attention(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(TorchSelfAttention(8, 2, batch_first=True, **options))


@pytest.mark.parametrize(
    ("original", "port"),
    [
        (self_attention(), attention(2, 8, rngs=nnx.Rngs(0))),
        (self_attention(bias=False), attention(2, 8, use_bias=False, rngs=nnx.Rngs(0))),
        (self_attention(kdim=6, vdim=6), attention(2, 8, in_kv_features=6, rngs=nnx.Rngs(0))),
        (
            self_attention(kdim=6, vdim=6, bias=False),
            attention(2, 8, in_kv_features=6, use_bias=False, rngs=nnx.Rngs(0)),
        ),
        (self_attention().bfloat16(), attention(2, 8, rngs=nnx.Rngs(0))),
        (nn.TransformerEncoderLayer(8, 2, 16), Encoder(nnx.Rngs(0))),
        (self_attention(), nnx.eval_shape(lambda: attention(2, 8, rngs=nnx.Rngs(0)))),
    ],
    ids=["plain", "no bias", "other keys", "other keys, no bias", "bfloat16", "inside", "abstract"],
)
def test_weights_go_both_ways_bit_for_bit(original, port):
    state = original.state_dict()
    back = to_torch(load_torch(port, state))
    assert weight_map(port, state) == {name: name for name in state}
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name].astype("float32"), tensor.float().numpy())


def test_query_key_and_value_are_where_flax_has_them():
    original = self_attention()
    port = load_torch(attention(2, 8, rngs=nnx.Rngs(0)), original.state_dict())
    x = torch.randn(3, 5, 8)
    np.testing.assert_allclose(port(jnp.array(x)), original(x).detach(), rtol=1e-5, atol=1e-6)


def test_query_key_and_value_may_be_apart_in_pytorch_too():
    port = attention(2, 8, rngs=nnx.Rngs(0))
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in parts.items() for kind in ("weight", "bias")}
    state = nn.ModuleDict({theirs: nn.Linear(8, 8) for theirs in parts.values()}).state_dict()
    back = to_torch(load_torch(port, state, names=names), names=names)
    assert back.keys() == state.keys()
    np.testing.assert_array_equal(port.query.kernel[...].reshape(8, 8).T, state["q_proj.weight"])
    with pytest.raises(ValueError, match="there is no nothing in the module"):
        to_torch(port, names={"nothing": "here"})


def test_attention_of_two_names_is_one():
    class Twice(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a = self.b = attention(2, 8, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.b(self.a(x))

    class TorchTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = self_attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    original = TorchTwice()
    port = load_torch(Twice(nnx.Rngs(0)), original.state_dict())
    assert parity.check(original, port, torch.randn(2, 3, 8), losses=None, steps=1, dtypes=["float64"]).ok
    state = original.state_dict()
    with pytest.raises(ValueError, match="one variable in the module but different in the state_dict"):
        load_torch(port, state | {"b.in_proj_weight": state["a.in_proj_weight"] + 1})


class Parts(nnx.Module):
    """An attention by hand, and one of Flax's."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a, self.b = SelfAttention(8, 2, rngs=rngs), attention(2, 8, rngs=rngs)


class Two(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a, self.b = attention(2, 8, rngs=rngs), attention(2, 8, rngs=rngs)


@pytest.mark.parametrize("port", [Parts, Two])
def test_each_attention_may_be_kept_otherwise(port):
    apart = {name: nn.Linear(8, 8) for name in ("query", "key", "value", "out")}
    state = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.ModuleDict(apart)}).state_dict()
    loaded = load_torch(port(nnx.Rngs(0)), state)
    np.testing.assert_array_equal(loaded.b.key.kernel[...].reshape(8, 8).T, state["b.key.weight"])
    names = {name: name for name in weight_map(loaded, state) if name.startswith("b.")}
    assert to_torch(loaded, names=names).keys() == state.keys()


@pytest.mark.parametrize("part", ["query", "key"])
def test_attentions_that_share_a_part_are_refused(part):
    port = Two(nnx.Rngs(0))
    setattr(port.b, part, getattr(port.a, part))
    state = nn.ModuleDict({name: nn.MultiheadAttention(8, 2) for name in "ab"}).state_dict()
    with pytest.raises(ValueError, match="share a part, which they cannot in PyTorch"):
        load_torch(port, state)


def test_another_layer_of_pytorchs_name_is_refused():
    port = attention(2, 8, rngs=nnx.Rngs(0))
    port.out_proj = nnx.data(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"would both be out_proj\.(weight|bias) in PyTorch"):
        load_torch(port, self_attention().state_dict())


class TorchChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = self_attention(), randomise(TorchSelfAttention(8, 2, batch_first=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cross_attn(x + self.self_attn(x))


class Chain(nnx.Module):
    """With names that are not in their order."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.this, self.encoder = attention(2, 8, rngs=rngs), attention(2, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.encoder(x + self.this(x))


def test_attentions_of_other_names_are_paired_in_the_order_of_their_calls(parity):
    original = TorchChain()
    port = load_torch(Chain(nnx.Rngs(0)), original.state_dict())
    report = parity.check(original, port, torch.randn(2, 3, 8), losses=None, steps=1, dtypes=["float64"])
    assert report.weight_map["this.in_proj_weight"] == "self_attn.in_proj_weight"
    assert report.weight_map["encoder.out_proj.bias"] == "cross_attn.out_proj.bias"


class NormalisedDescent(torch.optim.Optimizer):
    """Steps of one length for each tensor."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.1 * parameter.grad / parameter.grad.norm())


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_see_flaxs_parts(fused):
    """Three tensors get three steps of that length, where PyTorch's one gets one."""
    descent = optax.stateless(lambda gradients, _: jax.tree.map(lambda g: -0.1 * g / jnp.linalg.norm(g), gradients))
    original = self_attention()
    module = SelfAttention(8, 2, rngs=nnx.Rngs(0)) if fused else attention(2, 8, rngs=nnx.Rngs(0))
    port = load_torch(module, original.state_dict())
    pair = NormalisedDescent(original.parameters()), descent
    options = {"losses": None, "steps": 1, "dtypes": ["float64"]}
    report = parity.check(original, port, torch.randn(2, 3, 8), optimizers=pair, **options)
    assert report.ok is fused, str(report)
    assert fused or report.first_divergence.place == "step 1"


@pytest.mark.parametrize(
    ("original", "port"),
    [
        (self_attention(), attention(2, 8, rngs=nnx.Rngs(0))),
        (self_attention(), SelfAttention(8, 2, rngs=nnx.Rngs(0))),
        (randomise(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), Encoder(nnx.Rngs(0))),
    ],
    ids=["Flax's", "by hand", "encoder"],
)
def test_right_ports_pass(original, port, parity):
    torch.manual_seed(0)
    parity.check(original, load_torch(port, original.state_dict()), torch.randn(2, 3, 8), losses=None, steps=2)


def test_cross_attention_with_a_mask_passes(parity):
    torch.manual_seed(0)
    original = randomise(TorchCrossAttention(8, 2, kdim=6, vdim=6, batch_first=True))
    port = load_torch(CrossAttention(2, 8, in_kv_features=6, decode=False, rngs=nnx.Rngs(0)), original.state_dict())
    mask = torch.arange(5).expand(2, 5) > torch.tensor([[2], [4]])
    parity.check(original, port, (torch.randn(2, 3, 8), torch.randn(2, 5, 6), mask), losses=None, steps=1)


def test_faults_of_flaxs_attention_are_found():
    original = self_attention()
    heads = load_torch(attention(4, 8, rngs=nnx.Rngs(0)), original.state_dict())
    options = {"losses": None, "steps": 0, "dtypes": ["float64"]}
    report = parity.check(original, heads, torch.randn(2, 3, 8), **options)
    assert report.first_divergence.quantity == "output"
    port = load_torch(attention(2, 8, rngs=nnx.Rngs(0)), original.state_dict())
    port.key.kernel.set_value(port.query.kernel[...])
    report = parity.check(original, port, torch.randn(2, 3, 8), **options)
    assert report.first_divergence.quantity == "in_proj_weight"
    assert report.first_divergence.detail.worst[0].torch_index[0] in range(8, 16)


def test_fused_weights_without_a_counterpart_say_what_they_hold():
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.query, self.key, self.value, self.out_proj = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out_proj(self.query(x) + self.key(x) + self.value(x))

    report = parity.check(self_attention(), Port(nnx.Rngs(0)), torch.randn(2, 3, 8), losses=None, steps=0)
    problems = [finding.problem for finding in report.failures()]
    assert any("in_proj_weight holds query, key and value (nnx.MultiHeadAttention gets" in each for each in problems)
    with pytest.raises(ValueError, match=r"weight_ih_l0 holds the gates \(.*\) together: give the port an nnx\.Param"):
        load_torch(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nn.LSTM(4, 5).state_dict())
