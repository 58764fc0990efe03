"""Rounding is judged beside PyTorch's, and a report is never ok without findings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import jaxloss
from jaxloss import parity
from jaxloss.parity._compare import Rounding, compare
from jaxloss.parity._findings import Finding
from parity_tests.small import check_small
from parity_tests.without_torch import BatchNorm


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


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        (lambda loss, x: 1.3 * loss, "scale", "its gradient is PyTorch's times 1.3"),
        (lambda loss, x: loss + 0.01 * (x**2).sum(), "semantic", ""),
    ],
)
def test_loss_is_another_scale_only_if_its_gradient_is(wrong, kind, says):
    losses = nn.functional.cross_entropy, lambda x, y: wrong(jaxloss.cross_entropy(x, y), x)
    first = check_small((torch.randn(5, 4), torch.arange(5) % 3), losses=losses).first_divergence
    assert (first.place, first.quantity) == ("loss", "value")
    assert (first.kind, first.diagnosis) == (kind, says)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (0.5, False), (-1.0, False)])
def test_arrays_whose_norm_no_float64_holds_are_compared(factor, passes):
    theirs = np.full(100, 1e308)
    ours = theirs * np.where(np.arange(100) == 3, factor, 1.0)
    with np.errstate(over="ignore"):
        assert compare(ours, theirs, tolerance=1e-12).ok is passes


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


@pytest.mark.parametrize("fast", [True, False])
def test_flaxs_fast_variance_is_named_where_float32_shows_it(fast):
    original = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 5))
    rngs = nnx.Rngs(0)
    norm = nnx.LayerNorm(64, epsilon=1e-5, use_fast_variance=fast, rngs=rngs)
    torch.manual_seed(0)
    report = parity.check(
        original, nnx.Sequential(norm, nnx.Linear(64, 5, rngs=rngs)), torch.randn(32, 64) + 10, steps=0
    )
    assert report.ok is not fast, str(report)
    if fast:
        first = report.first_divergence
        assert (first.place, first.kind, first.fix) == ("0", "precision", "pass use_fast_variance=False")


def test_a_norm_whose_rounding_is_right_is_not_blamed():
    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.norm = nnx.Linear(40, 40, rngs=rngs), nnx.BatchNorm(40, epsilon=1e-5, rngs=rngs)
            self.b = nnx.Linear(40, 30, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.b(jax.lax.optimization_barrier(self.norm(self.a(x)) + 1e4) - 1e4)

    original = nn.Sequential()
    for name, layer in {"a": nn.Linear(40, 40), "norm": nn.BatchNorm1d(40), "b": nn.Linear(40, 30)}.items():
        original.add_module(name, layer)
    report = parity.check(original.eval(), Port(nnx.Rngs(0)), torch.randn(50, 40), losses=None, steps=0)
    assert {finding.dtype for finding in report.failures()} == {"float32"}
    assert not any("variance" in finding.diagnosis for finding in report.failures())


@pytest.mark.parametrize("seed", range(4))
def test_gradient_of_a_maximum_behind_a_norm_is_no_fault(seed, parity):
    """XLA may round a norm twice, otherwise: then no element equals the maximum."""

    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.fc = nn.Linear(3, 16), nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.norm(self.a(x))).amax(1))

    class Port(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.fc = nnx.Linear(3, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(16, epsilon=1e-5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc(nnx.relu(self.norm(self.a(x))).max(1))

    torch.manual_seed(seed)
    batch = torch.randn(4, 20, 3), torch.randint(4, (4,))
    parity.check(Original(), Port(nnx.Rngs(0)), batch, steps=3, dtypes=["float64"])
