"""Dropout of attention's weights in train mode, inside of PyTorch's functions and Flax's layers."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from flax.linen import attention as linen_attention
from flax.nnx.nn import attention as nnx_attention
from torch import nn
from torch.nn import functional as F  # noqa: N812

from jaxloss import parity
from jaxloss.parity import load_torch
from jaxloss.parity._original import Functions
from parity_tests.zoo import randomise

TRAIN: dict[str, Any] = {"train": True, "steps": 1}
SEED = torch.Generator().manual_seed(0)
BATCH = torch.randn(3, 5, 8, generator=SEED)
MASKS = (
    None,
    (torch.rand(5, 5, generator=SEED) > 0.3) | torch.eye(5, dtype=torch.bool),
    torch.randn(5, 5, dtype=torch.float64, generator=SEED),
)


class Encoder(nnx.Module):
    """`nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)`, ported."""

    def __init__(self, *, broadcast_dropout: bool = False) -> None:
        rngs = nnx.Rngs(0)
        norm = partial(nnx.LayerNorm, 8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        attention = partial(nnx.MultiHeadAttention, decode=False, broadcast_dropout=broadcast_dropout, rngs=rngs)
        self.self_attn, self.norm1, self.norm2 = attention(2, 8, dropout_rate=0.2), norm(), norm()
        self.linear1, self.linear2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.dropout, self.dropout1, self.dropout2 = (nnx.Dropout(0.2, rngs=rngs) for _ in range(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm1(x + self.dropout1(self.self_attn(x)))
        return self.norm2(x + self.dropout2(self.linear2(self.dropout(nnx.relu(self.linear1(x))))))


def encoder() -> nn.Module:
    return randomise(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True))


def test_a_right_encoder_layer_passes_in_train_mode(parity):
    original = encoder()
    parity.check(original, load_torch(Encoder(), original.state_dict()), BATCH, **TRAIN)


def test_flaxs_default_drops_the_same_in_the_whole_batch():
    original = encoder()
    wrong = load_torch(Encoder(broadcast_dropout=True), original.state_dict())
    report = parity.check(original, wrong, BATCH, **TRAIN, dtypes=["float64"])
    assert report.first_divergence.place == "between the input and norm1"
    assert "drops the same in all of the batch" in report.first_divergence.diagnosis
    assert "broadcast_dropout=False" in report.first_divergence.fix


def test_a_golden_file_has_the_masks_of_attention(tmp_path: Path):
    original = encoder()
    parity.record(tmp_path / "golden.safetensors", original, BATCH, **TRAIN)
    assert parity.replay(tmp_path / "golden.safetensors", load_torch(Encoder(), original.state_dict())).ok


class Attention(nn.Module):
    """Queries of four heads, keys and values of two."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, size) for size in (8, 4, 4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        rate = 0.3 if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class AttentionPort(nnx.Module):
    """The same by hand."""

    def __init__(self, *, causal: bool = True) -> None:
        rngs, self.causal = nnx.Rngs(0), causal
        self.query, self.key, self.value, self.out = (nnx.Linear(8, size, rngs=rngs) for size in (8, 4, 4, 8))
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            layer(x).reshape(*x.shape[:2], -1, 2).repeat(times, 2)
            for layer, times in ((self.query, 1), (self.key, 2), (self.value, 2))
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2**0.5
        if self.causal:
            scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        weights = self.dropout(jax.nn.softmax(scores))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))


def test_scaled_dot_product_attention_gives_its_mask_to_a_dropout():
    original = randomise(Attention())
    state = original.state_dict()
    assert parity.check(original, load_torch(AttentionPort(), state), BATCH, **TRAIN).ok
    report = parity.check(original, load_torch(AttentionPort(causal=False), state), BATCH, **TRAIN, dtypes=["float64"])
    assert report.first_divergence.place == "between value and out"
    assert "attends to later positions" in report.first_divergence.diagnosis


def test_linens_attention_takes_the_masks():
    class Original(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = (
                layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)
            )
            y = F.scaled_dot_product_attention(query, key, value, None, 0.3 if self.training else 0.0)
            return self.out(y.transpose(1, 2).flatten(2))

    class Port(linen.Module):
        broadcast: bool

        @linen.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            return linen.MultiHeadDotProductAttention(
                4, dropout_rate=0.3, broadcast_dropout=self.broadcast, deterministic=not train, name="self"
            )(x, x)

    original = Original()
    original.key, original.value = nn.Linear(8, 8), nn.Linear(8, 8)
    for broadcast in (False, True):
        port = Port(broadcast)
        variables = port.init(jax.random.key(0), jnp.zeros(BATCH.shape), train=False)
        names = {f"self.{name}.{kind}": f"{name}.{kind}" for name in original._modules for kind in ("weight", "bias")}
        report = parity.check(randomise(original), (port, variables), BATCH, **TRAIN, names=names)
        assert report.ok is not broadcast


@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_pytorch_drops_is_what_the_masks_say(mask: torch.Tensor | None, need_weights: bool):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    layer = randomise(nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)).double()
    given = None if mask is None else ~mask if mask.dtype is torch.bool else mask  # True is what a layer leaves out
    functions, before = Functions(0), (F.dropout, F.scaled_dot_product_attention)
    with functions:
        found = layer(x, x, x, attn_mask=given, need_weights=need_weights)[0]
    assert (F.dropout, F.scaled_dot_product_attention) == before
    (kept,) = functions.masks
    assert not functions.random
    assert 0.45 < kept.mean() < 0.75
    parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
    scores = query @ key.transpose(-1, -2) / 2
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    weights = scores.softmax(-1) * torch.tensor(kept.reshape(scores.shape)) / 0.6
    expected = layer.out_proj((weights @ value).transpose(1, 2).flatten(2))
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_attention_without_a_batch_or_heads_drops_too(parity):
    class Original(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * self.training)

    class Port(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            x = super().__call__(x)
            return self.dropout(jax.nn.softmax(x @ x.T / 2)) @ x

    port = Port(4, 4, rngs=nnx.Rngs(0))
    port.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    parity.check(randomise(Original(4, 4)), port, BATCH[0, :, :4], losses=None, **TRAIN)


class Heads(nn.Module):
    """Attention of two heads, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(*parts, dropout_p=0.3 * self.training)
        return self.out(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attribute", [False, True])
def test_linens_attention_alone_takes_the_masks(attribute: bool, parity):
    options = {"dropout_rate": 0.3, "broadcast_dropout": False}
    variables = linen.MultiHeadDotProductAttention(2, deterministic=True).init(
        jax.random.key(0), jnp.zeros(BATCH.shape)
    )
    port = linen.MultiHeadDotProductAttention(2, **options, deterministic=False if attribute else None)
    parity.check(randomise(Heads()), (port, variables), BATCH, losses=None, **TRAIN)


class HeadsPort(nnx.Module):
    """The same by one of Flax's."""

    def __init__(self, function: Any, *, broadcast: bool) -> None:
        self.rngs = rngs = nnx.Rngs(0)
        self.query, self.key, self.value, self.out = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))
        self.function, self.broadcast, self.deterministic = function, broadcast, False

    def __call__(self, x: jax.Array) -> jax.Array:
        parts = (layer(x).reshape(*x.shape[:2], 2, 4) for layer in (self.query, self.key, self.value))
        y = self.function(
            *parts,
            dropout_rng=self.rngs.dropout(),
            dropout_rate=0.3,
            broadcast_dropout=self.broadcast,
            deterministic=self.deterministic,
        )
        return self.out(y.reshape(x.shape))


@pytest.mark.parametrize("function", [nnx.dot_product_attention, linen.dot_product_attention])
def test_flaxs_functions_take_the_masks_where_they_are_called(function: Any, parity):
    before = nnx_attention.dot_product_attention_weights, linen_attention.dot_product_attention_weights
    original = randomise(Heads())
    port = load_torch(HeadsPort(function, broadcast=False), original.state_dict())
    parity.check(original, port, BATCH, **TRAIN)
    assert before == (nnx_attention.dot_product_attention_weights, linen_attention.dot_product_attention_weights)


def test_a_function_that_drops_the_same_in_all_of_the_batch_is_named():
    original = randomise(Heads())
    port = load_torch(HeadsPort(nnx.dot_product_attention, broadcast=True), original.state_dict())
    report = parity.check(original, port, BATCH, **TRAIN, dtypes=["float64"])
    assert "drops the same in all of the batch" in report.first_divergence.diagnosis


def test_an_attention_with_a_function_of_its_own_takes_the_masks(parity):
    original = randomise(nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True))

    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = original

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    class Port(nnx.Module):
        def __init__(self) -> None:
            function = partial(nnx.dot_product_attention, is_causal=False)
            self.attention = nnx.MultiHeadAttention(
                2,
                8,
                dropout_rate=0.3,
                broadcast_dropout=False,
                decode=False,
                attention_fn=function,
                rngs=nnx.Rngs(0),
            )

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.attention(x)

    torch_module = Original()
    parity.check(torch_module, load_torch(Port(), torch_module.state_dict()), BATCH, losses=None, **TRAIN)
