"""A batch, a module or an option that nothing can be told from is refused, or said so."""

import inspect
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
from jaxloss.parity._live import Live
from parity_tests.small import check_small, small


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


class TorchAdapted(nn.Module):
    """BERT's token types, LoRA's second factor of zeros, and a head, which may be zeros too."""

    def __init__(self, *, zero_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.types = nn.Embedding(9, 6), nn.Embedding(2, 6)
        self.down, self.up, self.head = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False), nn.Linear(6, 3)
        for weight in (self.up.weight, *(self.head.parameters() if zero_head else ())):
            nn.init.zeros_(weight)

    def forward(self, words: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        x = self.words(words) + self.types(types)
        return self.head(torch.tanh(x + self.up(self.down(x))))


class Adapted(nnx.Module):
    def __init__(self, factor: float = 1.0) -> None:
        rngs, self.factor = nnx.Rngs(0), factor
        self.words, self.types = nnx.Embed(9, 6, rngs=rngs), nnx.Embed(2, 6, rngs=rngs)
        self.down, self.up = (nnx.Linear(*sizes, use_bias=False, rngs=rngs) for sizes in ((6, 2), (2, 6)))
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, words: jax.Array, types: jax.Array) -> jax.Array:
        x = self.words(words) + self.types(types)
        return self.head(jax.numpy.tanh(x + self.factor * self.up(self.down(x))))


def check_adapted(factor: float = 1.0, *, zero_head: bool = False) -> parity.Report:
    original = TorchAdapted(zero_head=zero_head)
    port = parity.load_torch(Adapted(factor), original.state_dict())
    batch = torch.arange(5), torch.zeros(5, dtype=torch.int64), torch.arange(5) % 3
    return parity.check(original, port, batch, steps=1, dtypes=["float64"])


def test_constants_equal_in_both_are_noted():
    report = check_adapted()
    assert report.ok, report
    note = next(note for note in report.notes if note.startswith("Nothing can be told from"))
    for tensor in ("input of types", "up: output", "down: gradient of weight"):
        assert tensor in note
    assert "head" not in note
    assert check_adapted(2.0).first_divergence.quantity.startswith("gradient")


def test_head_of_zeros_is_noted_with_every_gradient_that_it_hides():
    report = check_adapted(zero_head=True)
    assert report.ok, report
    note = next(note for note in report.notes if note.startswith("Nothing can be told from"))
    for tensor in ("head: output", "words: gradient of weight", "up: gradient of weight"):
        assert tensor in note
    assert "head: gradient of weight" not in note


def test_complex_outputs_are_refused():
    class Original(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1j

    with pytest.raises(TypeError, match="returned complex numbers"):
        parity.check(Original(4, 3), small()[1], torch.randn(5, 4))


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"weight, bias is complex in PyTorch: train the real and imaginary parts"):
        parity.check(nn.Linear(4, 3, dtype=torch.complex64), small()[1], torch.randn(5, 4))


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


def test_original_that_cannot_run_in_float64_says_where_it_leaves_it():
    class Original(nn.Linear):
        def forward(self, times: torch.Tensor) -> torch.Tensor:
            angles = times[:, None].float() * torch.arange(2, dtype=torch.float32)
            return super().forward(torch.cat([angles.sin(), angles.cos()], -1))

    class Port(nnx.Linear):
        def __call__(self, times: jax.Array) -> jax.Array:
            angles = times[:, None] * jnp.arange(2)
            return super().__call__(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))

    with pytest.raises(TypeError, match=r"fewer digits by itself in float, arange\. Take the dtype") as caught:
        parity.check(Original(4, 3), Port(4, 3, rngs=nnx.Rngs(0)), torch.arange(5), losses=None)
    assert "same dtype" in str(caught.value)


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


def test_arguments_in_another_order_are_refused():
    options = {"loss": None, "optimizer": None, "steps": 0, "train": False, "seed": 0, "dtypes": ()}
    with pytest.raises(TypeError, match=r"the original is a Linear, expected a torch\.nn\.Module, which comes first"):
        inspect.unwrap(Live.__init__)(None, small()[1], torch.ones(5, 4), **options)  # without pytest's checks of types


@pytest.mark.parametrize("batch", [{"x": torch.ones(5, 4)}, ({"x": torch.ones(5, 4)}, torch.ones(5))])
def test_batch_of_dicts_is_refused(batch):
    with pytest.raises(TypeError, match="the batch has a dict: give a tuple of the arrays"):
        check_small(batch)


@pytest.mark.parametrize("dtypes", ["float32", ["float99"]])
def test_unknown_dtypes_are_refused_at_once(dtypes):
    original, port = nn.Linear(4, 3), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    stages = []
    with pytest.raises(ValueError, match="dtypes must be a sequence of bfloat16, float16, float32, float64, got"):
        parity.check(original, port, torch.randn(5, 4), dtypes=dtypes, progress=stages.append)
    assert not stages


def test_steps_below_0_are_refused():
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        check_small(torch.randn(5, 4), steps=-1)


@pytest.mark.parametrize("pair", [nn.functional.cross_entropy, (nn.functional.cross_entropy,)], ids=["alone", "one"])
def test_losses_and_optimizers_are_pairs(pair):
    for name in ("losses", "optimizers"):
        with pytest.raises(TypeError, match=f"{name} must be a pair, PyTorch's and JAX's"):
            inspect.unwrap(parity.check)(*small(), torch.randn(5, 4), **{name: pair})


def test_optimizers_in_another_order_are_refused():
    options = {"loss": None, "optimizer": optax.adam(1e-3), "steps": 0, "train": False, "seed": 0, "dtypes": ()}
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer: it comes first, then optax's"):
        inspect.unwrap(Live.__init__)(None, small()[0], torch.ones(5, 4), **options)


@pytest.mark.parametrize("axes", [1, 3])
def test_channels_first_inputs_of_3_and_5_dimensions_are_explained(axes):
    original = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](3, 2, 1)
    port = parity.load_torch(nnx.Conv(3, 2, (1,) * axes, rngs=nnx.Rngs(0)), original.state_dict())
    batch = torch.randn(2, 3, *(4, 5, 6)[:axes])
    with pytest.raises(ValueError, match="pass flax_batch if its channels are last"):
        parity.check(original, port, batch)
    assert parity.check(original, port, batch, np.moveaxis(batch.numpy(), 1, -1), steps=0).ok


def test_errors_of_a_port_of_sequences_are_its_own():
    class Port(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x).reshape(7, 7)

    port = parity.load_torch(Port(4, 3, rngs=nnx.Rngs(0)), small()[0].state_dict())
    with pytest.raises(TypeError, match="reshape"):
        parity.check(small()[0], port, torch.randn(2, 5, 4))
