"""Training steps: first all of PyTorch's, then all of the port's, so that memory holds one of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from jaxloss.parity._background import StepDistance
from jaxloss.parity._compare import relative
from jaxloss.parity._detail import Detail
from jaxloss.parity._findings import Failure, Findings
from jaxloss.parity._port import Arrays
from jaxloss.parity._state_dict import to_numpy
from jaxloss.parity._subject import Subject, View

Optimizers = tuple[torch.optim.Optimizer, optax.GradientTransformation]
Sketches = dict[str, dict[str, np.ndarray]]  # after a step: what is kept ("": parameters) → the port's name → sketch

# How far a right port may be after a step. Where rounding grows beyond that, as it does in a steep network: how many
# times as far as PyTorch is from itself when, before each step, every weight is moved by as many rounding units as its
# layer adds up terms, which is what adding them one after the other may do.
TOLERANCE, NOISE = 1e-10, 10.0
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
_SUMS, _SMALL = 8, 4096


class Trajectory(NamedTuple):
    """Steps of an optimizer."""

    sketches: list[Sketches]
    masks: list[list[np.ndarray]]  # what dropout kept in each step


def sketch(array: np.ndarray) -> np.ndarray:
    """A small linear image of a large array, a small array itself: what is kept of an array to compare it later.

    Eight sums, with normal factors, along its longest axis. The norm of a difference of images is that of the arrays
    but for a factor near 1, whatever the arrays; that both are equal where the arrays differ has probability 0.
    """
    longest = int(np.argmax(array.shape)) if array.ndim else 0
    if array.size <= _SMALL or array.shape[longest] <= _SUMS:
        return np.array(array)
    factors = np.random.default_rng(0).normal(size=(_SUMS, array.shape[longest]))
    return np.tensordot(factors, array.astype(np.float64, copy=False), axes=(1, longest)) / np.sqrt(_SUMS)


def compare_steps(findings: Findings, subject: Subject, optimizers: Optimizers | None, steps: int) -> Trajectory | None:
    """Takes the steps in both frameworks, and compares the parameters and the optimizer's state after each."""
    view = subject.exact
    if not steps or not view.port.parameters or not view.recording.parameter_gradients:
        return None
    names = {theirs: ours for ours, theirs in subject.parameter_pairs()}
    if frozen := ", ".join(sorted(set(view.port.parameters) - set(names.values()))):
        findings.notes.append(f"PyTorch does not train {frozen}: held fixed in the port's steps too.")
    gradients, floor = view.recording.parameter_gradients, view.recording.gradient_floor
    # Adam makes steps of full length from gradients that are rounding alone.
    moving = {theirs: ours for theirs, ours in names.items() if np.linalg.norm(gradients[theirs]) > 100 * floor}
    if still := ", ".join(sorted(names.keys() - moving.keys())):
        findings.notes.append(f"The steps of {still} are not judged: their gradients are zero but for rounding.")
    theirs, ours = optimizers or (None, optax.adam(1e-3))
    expected = torch_steps(subject, "float64", theirs, steps, moving)
    kind = type(theirs) if theirs is not None else torch.optim.Adam
    noise = torch_steps(subject, "float64", theirs, steps, moving, nudge=True).sketches
    mine = list(flax_steps(view, subject.values(), ours, expected.masks, set(names.values())))
    failed = len(findings.failures)
    findings.background.steps["float64"] = [
        StepDistance(*distances, allowed=max(TOLERANCE, NOISE * distances[1] if step else 0.0))
        for step, distances in enumerate(_distances(mine, noise, expected.sketches))
    ]
    for step, found in enumerate(mine):
        for quantity, arrays in expected.sketches[step].items():
            counterparts = _counterpart(quantity, found, kind)
            floor = 1e-14 * max((float(np.linalg.norm(array)) for array in arrays.values()), default=0.0)
            for name, array in arrays.items():
                if name in counterparts:
                    far = relative(counterparts[name], array) > TOLERANCE
                    tolerance = NOISE * relative(noise[step][quantity][name], array) if far and step else 0.0
                    findings.add(
                        f"step {step + 1}",
                        f"{quantity} of {name}" if quantity else name,
                        counterparts[name],
                        array,
                        tolerance=max(TOLERANCE, tolerance),
                        floor=floor if quantity else 0.0,
                        may_be_constant=True,
                        may_be_zero=bool(quantity),
                    )
    _look_closer(findings.failures[failed:], view)
    return expected


def _look_closer(failures: Sequence[Failure], view: View) -> None:
    """Looks at the elements of what differs after the first step that differs: the later ones follow from it."""
    for failure in (each for each in failures if each.finding.place == failures[0].finding.place):
        layout = view.port.weights[failure.finding.quantity.rpartition(" of ")[2]].layout
        if failure.theirs.shape == layout.shape:  # no image of a larger array
            failure.finding.detail = Detail.of(failure.ours, failure.theirs, layout)


def _distances(mine: list[Sketches], theirs: list[Sketches], exact: list[Sketches]) -> Iterator[tuple[float, float]]:
    """How far both are from the exact parameters after each step, all that move together."""
    for runs in zip(mine, theirs, exact, strict=True):
        names = runs[-1][""]
        if names:
            ours, others, true = (np.concatenate([run[""][name].ravel() for name in names]) for run in runs)
            yield relative(ours, true), relative(others, true)


def tell_steps(
    findings: Findings, subject: Subject, view: View, optimizers: Optimizers | None, exact: Trajectory | None
) -> None:
    """Adds how far both are from float64 after each step in another dtype: not judged, for errors grow."""
    if exact is None or not exact.sketches[-1][""]:
        return
    torch_optimizer, optax_optimizer = optimizers or (None, optax.adam(1e-3))
    names = {theirs: ours for ours, theirs in subject.parameter_pairs()}
    moving = {theirs: ours for theirs, ours in names.items() if ours in exact.sketches[-1][""]}
    dtype = jnp.dtype(view.port.dtype).name
    found = torch_steps(subject, dtype, torch_optimizer, len(exact.masks), moving)
    with jax.enable_x64(False):
        mine = list(flax_steps(view, subject.rounded(view), optax_optimizer, found.masks, set(names.values())))
    distances = list(_distances(mine, found.sketches, exact.sketches))
    findings.background.steps[dtype] = [StepDistance(*pair, allowed=None) for pair in distances]
    findings.noise[f"parameters after {len(exact.masks)} steps ({dtype})"] = distances[-1]


def torch_steps(
    subject: Subject,
    dtype: str,
    given: torch.optim.Optimizer | None,
    steps: int,
    moving: Mapping[str, str],
    *,
    nudge: bool = False,
) -> Trajectory:
    """PyTorch's, of the parameters that move (the port's names by PyTorch's), nudged before each as rounding does."""
    original, optimizer = subject.trainee(given, dtype)
    random = torch.Generator().manual_seed(subject.seed)
    layouts = {name: subject.exact.port.weights[name].layout for name in moving.values()}
    tensors = {moving[name]: tensor for name, tensor in original.module.named_parameters() if name in moving}

    def kept(kind: str) -> dict[str, np.ndarray]:
        found = {name: optimizer.state[tensor].get(kind) if kind else tensor for name, tensor in tensors.items()}
        return {
            name: sketch(layouts[name].to_flax(to_numpy(array)))
            for name, array in found.items()
            if isinstance(array, torch.Tensor) and array.shape == tensors[name].shape
        }

    trajectory = Trajectory([], [])
    for step in range(1, steps + 1):
        for parameter in filter(torch.is_floating_point, original.module.parameters() if nudge else ()):
            terms = parameter[0].numel() if parameter.ndim else 1
            moves = torch.rand(parameter.shape, dtype=parameter.dtype, generator=random).mul_(2).sub_(1)
            parameter.data.mul_(moves.mul_(terms * torch.finfo(parameter.dtype).eps).add_(1))
        trajectory.masks.append(subject.backward(original, step))
        optimizer.step()
        kinds = {kind for tensor in tensors.values() for kind in optimizer.state[tensor]}
        trajectory.sketches.append({kind: kept(kind) for kind in (*sorted(kinds), "")})
    return trajectory


def flax_steps(
    view: View,
    values: Arrays,
    optimizer: optax.GradientTransformation,
    masks: list[list[np.ndarray]],
    trained: set[str],
) -> Iterator[Sketches]:
    """The port's, by optax's names of what it keeps."""

    def advance(parameters: Arrays, state: Any, gradients: Arrays) -> tuple[Arrays, Any]:
        updates, state = optimizer.update(gradients, state, parameters)
        moved: Any = optax.apply_updates(parameters, updates)
        return {name: moved[name] if name in trained else p for name, p in parameters.items()}, state

    parameters, statistics = view.programs.split(values)
    # Copied, because some optimizers keep the parameters themselves, and a buffer is donated once.
    state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, optimizer.init(parameters))
    advance = jax.jit(advance, donate_argnums=(0, 1))
    for kept in masks:
        run = view.programs.free({**parameters, **statistics}, kept)
        parameters, state = advance(parameters, state, run.parameter_gradients)
        statistics = run.statistics
        buffers = _buffers(state, parameters) | {"": parameters}
        yield {kind: {n: sketch(np.asarray(a)) for n, a in arrays.items()} for kind, arrays in buffers.items()}


def _counterpart(kind: str, mine: Sketches, optimizer: type[torch.optim.Optimizer]) -> dict[str, np.ndarray]:
    """What the port keeps for PyTorch's buffer of this name."""
    if kind == "momentum_buffer" and kind not in mine and not issubclass(optimizer, torch.optim.SGD):
        return {}  # optax keeps this one after the learning rate
    return next((arrays for name, arrays in mine.items() if name == kind or kind in _BUFFERS.get(name, ())), {})


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
