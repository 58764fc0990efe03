"""A call that a faulty port makes in place of one of PyTorch's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Change:
    """What it means, how to mend it, and the result in PyTorch; some mean nothing unless others are done together."""

    meaning: str
    fix: str
    result: Callable[[], Any]
    together: bool = False


class Choice(NamedTuple):
    """Which change is to be done: of those that mean the same the nth, of one call or of every one that has it."""

    call: int | None
    meaning: str
    nth: int


# For a PyTorch function and its arguments, every such call.
Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Iterator[Change]]
