"""What ports do otherwise in LSTMs and GRUs, whose gates PyTorch keeps together in one tensor."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jaxloss.parity._change import Change, Rule


def _recurrent(gates: Sequence[str]) -> Rule:
    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
        place = max(i for i, arg in enumerate(args) if isinstance(arg, list))  # behind the state, which may be one too
        weights: list[Tensor] = args[place]
        biases = [i for i, each in enumerate(weights) if each.ndim == 1]  # of inputs and of the state in turn

        def again(change: Callable[[Tensor], Tensor], indices: Collection[int]) -> Callable[[], Any]:
            def result() -> Any:
                changed = [change(each) if i in indices else each for i, each in enumerate(weights)]
                return function(*args[:place], changed, *args[place + 1 :], **kwargs)

            return result

        gated = [i for i, each in enumerate(weights) if len(each) == len(weights[0])]  # no projection of the state
        names = ", ".join(gates)
        for first, second in itertools.combinations(range(len(gates)), 2):
            order = list(range(len(gates)))
            order[first], order[second] = second, first
            meaning = f"the port takes the {gates[first]} gate for the {gates[second]} gate, and the reverse"

            def swapped(each: Tensor, order: list[int] = order) -> Tensor:
                return torch.cat([each.chunk(len(gates))[gate] for gate in order])

            yield Change(meaning, f"split the weights as ({names})", again(swapped, gated))
        for name, some in {"bias_ih": biases[::2], "bias_hh": biases[1::2]}.items():
            yield Change(f"the port leaves out {name}", "add both, bias_ih and bias_hh", again(torch.zeros_like, some))
        if "forget" in gates:

            def raised(each: Tensor) -> Tensor:
                return torch.cat([part + (gate == "forget") for gate, part in zip(gates, each.chunk(4), strict=True)])

            fix = "add what PyTorch's biases hold, no more"
            yield Change("the port adds 1 to the forget gate", fix, again(raised, biases[::2]))

    return rule


RECURRENT: dict[str, Rule] = {
    "lstm": _recurrent(("input", "forget", "cell", "output")),
    "gru": _recurrent(("reset", "update", "new")),
}
