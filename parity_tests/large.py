"""Checks a stack of linear layers with 100 million parameters, and prints the time and the memory that it took.

`python -m parity_tests.large`; a test holds the memory to 6 GiB.
"""

import resource
import sys
import time

import jax
import torch
from flax import nnx
from torch import nn

from jaxloss import parity

WIDTH, DEPTH = 4096, 6


class TorchStack(nn.Module):
    """Linear layers with relu between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class FlaxStack(nnx.Module):
    """`TorchStack`, ported."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def main() -> int:
    torch.manual_seed(0)
    original = TorchStack()
    port = parity.load_torch(FlaxStack(nnx.Rngs(0)), original.state_dict())
    started = time.perf_counter()
    report = parity.check(original, port, torch.randn(8, WIDTH))
    seconds = time.perf_counter() - started
    print(str(report).splitlines()[0])
    count = sum(parameter.numel() for parameter in original.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count:,} parameters: {seconds:.0f} s, at most {peak:.2f} GiB")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
