"""A call that a faulty port makes in place of one of PyTorch's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What it means, how to mend it, and the result in PyTorch."""

    meaning: str
    fix: str
    result: Callable[[], Tensor]


# For a PyTorch function and its arguments, every such call.
Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Iterator[Change]]
