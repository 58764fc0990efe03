"""Why the port's optimizer steps differ: PyTorch takes them with another option, until it arrives where the port is."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from jaxloss.parity._diagnosis import step_failure
from jaxloss.parity._faults import matches
from jaxloss.parity._findings import Explanation, Failure
from jaxloss.parity._live import Live
from jaxloss.parity._recording import added, sketch
from jaxloss.parity._state_dict import to_numpy
from jaxloss.parity._steps import in_flax
from jaxloss.parity._subject import Subject

Step = Callable[[torch.optim.Optimizer], object]

_OPTIONS = {
    "decoupled_weight_decay": (True, False),
    "weight_decay": (0.0, 1e-4, 1e-2),
    "eps": (1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3),
    "nesterov": (False, True),
    "dampening": (0.0,),
    "momentum": (0.0, 0.9),
    "amsgrad": (False, True),
    "maximize": (False, True),
    "centered": (False, True),
    "alpha": (0.9, 0.99),
    "rho": (0.9, 0.95),
    "lr_decay": (0.0,),
    "lr": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "betas": ((0.9, 0.999), (0.9, 0.99), (0.9, 0.95)),
}


def explain_step(live: Live, subject: Subject, failures: Sequence[Failure]) -> Iterator[Explanation]:
    """Everything that explains the first step that differs."""
    count, _, failure, kind, ours = step_failure(subject, failures)
    theirs, layout = subject.weight_pairs[ours], subject.exact.port.weights[ours].layout
    seconds = {first: second for first, second in subject.exact.state.seconds.items() if first == theirs and not kind}

    def train(step: Step = lambda optimizer: optimizer.step(), **options: Any) -> np.ndarray:
        original, optimizer = live.trainee()
        for group in optimizer.param_groups:
            group.update(options)
        for i in range(1, count + 1):
            live.backward(original, i)
            step(optimizer)
        tensors = dict(original.module.named_parameters())
        kept = optimizer.state[tensors[theirs]].get(kind) if kind else tensors[theirs]
        if kept is None:
            return np.empty(0)
        arrays = {theirs: to_numpy(kept)} | {second.name: to_numpy(tensors[second.name]) for second in seconds.values()}
        return in_flax(sketch(added(arrays, seconds)[theirs]), layout)

    optimizer = live.trainee()[1]
    group = optimizer.param_groups[0]
    for name, values in _OPTIONS.items():
        for value in values:
            if name in group and group[name] != value and matches(failure.ours, train(**{name: value})):
                fix = f"pass {group[name]}, or use parity.optimizer"
                yield Explanation(f"the port's {name} is {value}, PyTorch's {group[name]}", fix)
    fix = "use parity.optimizer"
    if isinstance(optimizer, torch.optim.Adagrad):
        for value in (0.0, 0.1):
            if matches(failure.ours, train(_start_from(value))):
                started = group["initial_accumulator_value"]
                yield Explanation(f"the port's initial_accumulator_value is {value}, PyTorch's {started}", fix)
    if isinstance(optimizer, torch.optim.RMSprop):
        inside = _inside_the_root(group["eps"])
        if matches(failure.ours, train(inside, eps=0.0)):
            yield Explanation("the port adds epsilon inside the root, PyTorch outside", "pass eps_in_sqrt=False")


def _start_from(value: float) -> Step:
    """A step of Adagrad that has started from another sum of squares."""

    def step(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state["step"] == 0:
                    state["sum"].fill_(value)
        optimizer.step()

    return step


class _Roots(TorchFunctionMode):
    """Adds to what a root is taken of."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self._added = added

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.sqrt:
            args = (args[0] + self._added,)
        return func(*args, **(kwargs or {}))


def _inside_the_root(epsilon: float) -> Step:
    """A step that adds epsilon to the mean square."""

    def step(optimizer: torch.optim.Optimizer) -> None:
        with _Roots(epsilon):
            optimizer.step()

    return step
