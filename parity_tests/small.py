"""A linear layer and its right port, to check with other batches and options."""

from typing import Any

import torch
from flax import nnx
from torch import nn

from jaxloss import parity
from parity_tests.zoo import randomise


def small() -> tuple[nn.Module, nnx.Module]:
    torch.manual_seed(0)
    module = randomise(nn.Linear(4, 3))
    return module, parity.load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), module.state_dict())


def check_small(batch: Any, **options: Any) -> parity.Report:
    module, port = small()
    return parity.check(module, port, batch, **({"steps": 1, "dtypes": ["float64"]} | options))
