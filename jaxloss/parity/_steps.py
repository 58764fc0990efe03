"""Training steps of both frameworks side by side."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
import torch

from jaxloss.parity._findings import Findings
from jaxloss.parity._port import Arrays
from jaxloss.parity._state_dict import to_numpy
from jaxloss.parity._subject import Subject, View

Optimizers = tuple[torch.optim.Optimizer, optax.GradientTransformation]

TOLERANCE = 1e-10
# Where optax keeps what PyTorch calls otherwise.
_BUFFERS = {
    "mu": ("exp_avg", "grad_avg"),
    "nu": ("exp_avg_sq", "square_avg"),
    "nu_max": ("max_exp_avg_sq",),
    "trace": ("momentum_buffer",),
    "sum_of_squares": ("sum",),
    "e_g": ("square_avg",),
    "e_x": ("acc_delta",),
}


def compare_steps(findings: Findings, subject: Subject, view: View, optimizers: Optimizers | None, steps: int) -> None:
    """Takes the steps in both frameworks, and compares the parameters and the optimizer's state after each."""
    if not steps or not view.port.parameters or not view.recording.parameter_gradients:
        return
    theirs, optax_optimizer = optimizers or (None, optax.adam(1e-3))
    original, torch_optimizer = subject.trainee(theirs)
    parameters, statistics = view.programs.split(subject.values)
    state, update = optax_optimizer.init(parameters), jax.jit(optax_optimizer.update)
    names = {theirs: ours for ours, theirs in subject.parameter_pairs()}
    trained = set(names.values())
    if frozen := ", ".join(sorted(parameters.keys() - trained)):
        findings.notes.append(f"PyTorch does not train {frozen}: held fixed in the port's steps too.")
    gradients, floor = view.recording.parameter_gradients, view.recording.gradient_floor
    moving = {name for name in names if np.linalg.norm(gradients[name]) > 100 * floor}
    if len(moving) < len(names):
        still = ", ".join(sorted(names.keys() - moving))
        findings.notes.append(f"The steps of {still} are not judged: their gradients are zero but for rounding.")
    for step in range(1, steps + 1):
        masks = subject.backward(original, step)
        torch_optimizer.step()
        run = view.programs.free({**parameters, **statistics}, masks)
        updates, state = update(run.parameter_gradients, state, parameters)
        parameters = {name: value + updates[name] if name in trained else value for name, value in parameters.items()}
        statistics = run.statistics
        # Adam makes steps of full length from gradients that are rounding alone.
        tensors = {names[name]: t for name, t in original.module.named_parameters() if name in moving}
        for kind, mine, expected in _paired_buffers(_buffers(state, parameters), torch_optimizer, tensors):
            layouts = {ours: view.port.weights[ours].layout for ours in expected}
            floor = 1e-14 * max(float(np.linalg.norm(array)) for array in expected.values())
            for ours, array in expected.items():
                findings.add(
                    f"step {step}",
                    f"{kind} of {ours}",
                    mine[ours],
                    layouts[ours].to_flax(array),
                    tolerance=TOLERANCE,
                    floor=floor,
                    may_be_constant=True,
                    may_be_zero=True,
                )
        for ours, tensor in tensors.items():
            expected = view.port.weights[ours].layout.to_flax(to_numpy(tensor))
            findings.add(f"step {step}", ours, parameters[ours], expected, tolerance=TOLERANCE, may_be_constant=True)


def _paired_buffers(
    buffers: Mapping[str, Arrays], optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, Arrays, dict[str, np.ndarray]]]:
    """PyTorch's name of a buffer, and what both have in it by parameter."""
    kinds = {kind for tensor in tensors.values() for kind in optimizer.state[tensor]}
    for kind in sorted(kinds):
        named = (name for name in buffers if name == kind or kind in _BUFFERS.get(name, ()))
        mine = next((buffers[name] for name in named), None)
        if kind == "momentum_buffer" and kind not in buffers and not isinstance(optimizer, torch.optim.SGD):
            continue  # optax keeps this one after the learning rate
        theirs = {ours: optimizer.state[tensor].get(kind) for ours, tensor in tensors.items()}
        arrays = {
            ours: to_numpy(buffer)
            for ours, buffer in theirs.items()
            if isinstance(buffer, torch.Tensor) and buffer.shape == tensors[ours].shape and ours in (mine or {})
        }
        if mine is not None and arrays:
            yield kind, mine, arrays


def _buffers(state: Any, parameters: Arrays) -> dict[str, Arrays]:
    """The parts of an optax state that hold one array per parameter, by their field's name."""
    found: dict[str, Arrays] = {}

    def visit(node: Any, name: str) -> None:
        if isinstance(node, dict) and node.keys() == parameters.keys():
            arrays = {key: leaf for key, leaf in node.items() if isinstance(leaf, jax.Array)}  # no MaskedNode
            found.setdefault(name, {}).update(arrays)
        elif isinstance(node, dict):
            for key, child in node.items():
                visit(child, str(key))
        elif hasattr(node, "_asdict"):  # a NamedTuple
            visit(node._asdict(), name)
        elif isinstance(node, tuple | list):
            for child in node:
                visit(child, name)

    visit(state, "")
    return found
