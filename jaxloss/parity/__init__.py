"""The porting toolkit: checks, weights and optimizers from PyTorch to Flax NNX. Importing it loads neither."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxloss.parity._assert_close import assert_close
    from jaxloss.parity._findings import Finding
    from jaxloss.parity._replay import replay
    from jaxloss.parity._report import Report
    from jaxloss.parity._with_torch import check, record
    from jaxloss.parity.optimizers import clip_grad_norm, one_cycle, optimizer, optimizer_by_name
    from jaxloss.parity.weights import load_torch, to_torch, weight_map

__all__ = [
    "Finding",
    "Report",
    "assert_close",
    "check",
    "clip_grad_norm",
    "load_torch",
    "one_cycle",
    "optimizer",
    "optimizer_by_name",
    "record",
    "replay",
    "to_torch",
    "weight_map",
]

_HOMES = {
    "Finding": "_findings",
    "Report": "_report",
    "assert_close": "_assert_close",
    "check": "_with_torch",
    "clip_grad_norm": "optimizers",
    "load_torch": "weights",
    "one_cycle": "optimizers",
    "optimizer": "optimizers",
    "optimizer_by_name": "optimizers",
    "record": "_with_torch",
    "replay": "_replay",
    "to_torch": "weights",
    "weight_map": "weights",
}


def __getattr__(name: str) -> object:
    """Imports a public name's module when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
