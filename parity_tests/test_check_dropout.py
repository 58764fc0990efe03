"""Dropout that only one framework has, and random numbers that the port cannot be given."""

import jax
import pytest
import torch
from flax import nnx
from torch import nn

from jaxloss import parity
from parity_tests.small import small


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
    assert "Here the port drops once, PyTorch never" in report.first_divergence.diagnosis


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
        (True, "between b and c", "Here the port drops never, PyTorch once"),
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


def test_random_numbers_in_train_mode_alone_are_not_named_in_eval_mode():
    class Original(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.alpha_dropout(x, 0.5, self.training)

    class Port(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    for train in (False, True):
        report = parity.check(Original(), Port(), torch.randn(2, 5, 4), losses=None, train=train, dtypes=["float64"])
        assert report.ok is not train
        assert any("draws random numbers in alpha_dropout" in note for note in report.notes) is train


def test_dropout_in_another_place_is_counted_where_it_is():
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(nn.functional.dropout(self.a(x), 0.5, self.training)))

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.b, self.c = (nnx.Linear(4, size, rngs=rngs) for size in (4, 4, 3))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.c(self.b(self.a(self.dropout(x))))

    report = parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(5, 4), train=True, steps=0, dtypes=["float64"])
    assert report.first_divergence.place == "between the input and a"
    assert "Here the port drops once, PyTorch never" in report.first_divergence.diagnosis


def test_dropout_inside_of_a_function_is_no_reason_to_accuse_the_port():
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.alpha_dropout(self.fc(x), 0.5, self.training)

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.fc(x))

    report = parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(2, 5, 4), train=True, steps=0, dtypes=["float64"])
    assert any("only those of dropout are given to the port" in note for note in report.notes)
    assert "drops" not in report.first_divergence.diagnosis


def test_dropout_a_call_later_is_no_reason_for_what_has_another():
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = nn.functional.dropout(self.gate(x), 0.5, self.training)
            return self.down(nn.functional.silu(gate) * self.up(x))

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.gate, self.up, self.down = (nnx.Linear(*sizes, rngs=rngs) for sizes in ((4, 6), (4, 6), (6, 3)))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            gate, up = self.gate(x), self.up(x)
            return self.down(nnx.gelu(self.dropout(gate)) * up)

    report = parity.check(Original(), Port(nnx.Rngs(0)), torch.randn(5, 4), train=True, steps=0, dtypes=["float64"])
    assert "gelu with approximate=True where PyTorch applies silu" in report.first_divergence.diagnosis


@pytest.mark.parametrize("flat", [False, True])
def test_a_mask_of_rows_fits_tokens_and_the_reverse(flat: bool, parity):
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            shape = (-1, 6) if flat else y.shape
            return self.b(nn.functional.dropout(y.reshape(shape), 0.5, self.training).reshape(y.shape))

    class Port(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            y = nnx.relu(self.a(x))
            return self.b(self.dropout(y if flat else y.reshape(-1, 6)).reshape(y.shape))

    parity.check(Original(), Port(), torch.randn(3, 5, 4), losses=None, train=True)
