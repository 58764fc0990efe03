"""Training steps: first all of PyTorch's, then all of the port's, so that memory holds one of them."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxloss.parity._background import StepDistance
from jaxloss.parity._compare import norm, relative
from jaxloss.parity._detail import Detail
from jaxloss.parity._findings import Failure, Findings
from jaxloss.parity._joined import Joined
from jaxloss.parity._layout import Layout
from jaxloss.parity._port import Arrays
from jaxloss.parity._recording import Sketches, Trajectory, sketch
from jaxloss.parity._subject import Subject, View
from jaxloss.parity.weights import Weight, Weights

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


def compare_steps(findings: Findings, subject: Subject, optimizer: optax.GradientTransformation) -> Trajectory | None:
    """Takes the steps in both frameworks, and compares the parameters and the optimizer's state after each."""
    view = subject.exact
    if not subject.source.steps or not view.port.parameters or not view.recording.parameter_gradients:
        return None
    names = {theirs: ours for ours, theirs in subject.parameter_pairs()}
    if frozen := ", ".join(sorted({*view.port.parameters} & {*subject.weight_pairs} - {*names.values()})):
        findings.notes.append(f"PyTorch does not train {frozen}: held fixed in the port's steps too.")
    moved = view.recording.moving
    moving = {theirs: ours for theirs, ours in names.items() if theirs in moved}
    if still := ", ".join(sorted(names.keys() - moving.keys())):
        findings.notes.append(f"The steps of {still} are not judged: their gradients are zero but for rounding.")
    expected = subject.source.trajectory("float64")
    noise = expected.noise()  # before the port's steps, so that memory holds one of them
    mine = list(flax_steps(subject, view, subject.values(), optimizer, expected.masks, set(names.values())))
    failed = len(findings.failures)
    if moving:
        findings.background.steps["float64"] = [
            _step_distance(ours[""], exact[""], noise[step][""], moving)
            for step, (ours, exact) in enumerate(zip(mine, expected.sketches, strict=True))
        ]
    for step, found in enumerate(mine):
        for quantity, sketches in expected.sketches[step].items():
            counterparts = _counterpart(quantity, found, subject.source.optimizer)
            arrays = {theirs: array for theirs, array in sketches.items() if theirs in moving}
            floor = 1e-14 * max((norm(array) for array in arrays.values()), default=0.0)
            for theirs, array in arrays.items():
                name, layout = moving[theirs], view.port.weights[moving[theirs]].layout
                if name in counterparts:
                    far = relative(counterparts[name], array) > TOLERANCE
                    tolerance = NOISE * noise[step][quantity][theirs] if far else 0.0
                    findings.add(
                        f"step {step + 1}",
                        f"{quantity} of {name}" if quantity else name,
                        in_flax(counterparts[name], layout),
                        in_flax(array, layout),
                        tolerance=max(TOLERANCE, tolerance),
                        floor=floor if quantity else 0.0,
                        may_be_zero=bool(quantity),
                    )
    _look_closer(findings.failures[failed:], view)
    return expected


def _look_closer(failures: Sequence[Failure], view: View) -> None:
    """Looks at the elements of what differs after the first step that differs: the later ones follow from it."""
    for failure in (each for each in failures if each.finding.place == failures[0].finding.place):
        layout = view.port.weights[kept_of(failure.finding.quantity, view.port.weights)[1]].layout
        if failure.theirs.shape == layout.shape:  # no image of a larger array
            failure.finding.detail = Detail.of(failure.ours, failure.theirs, layout)


def kept_of(quantity: str, weights: Container[str]) -> tuple[str, str]:
    """What a step's finding is about: what is kept, "" for the parameter, and its name, which may hold " of " too."""
    if quantity in weights:
        return "", quantity
    kind, _, name = quantity.partition(" of ")
    return kind, name


def _step_distance(
    ours: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
    noise: Mapping[str, float],
    names: Mapping[str, str],
) -> StepDistance:
    """Of all parameters together, with what is allowed."""
    own = _together(noise, exact, names)
    return StepDistance(_distance(ours, exact, names), own, max(TOLERANCE, NOISE * own))


def _distance(ours: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray], names: Mapping[str, str]) -> float:
    """How far parameters are from the exact ones, all together; of the port's names by PyTorch's."""
    mine, true = (
        np.concatenate([array.ravel() for array in arrays])
        for arrays in ([ours[name] for name in names.values()], [exact[name] for name in names])
    )
    return relative(mine, true)


def _together(distances: Mapping[str, float], exact: Mapping[str, np.ndarray], names: Iterable[str]) -> float:
    """The relative distance of all arrays together from that of each."""
    norms = np.array([norm(exact[name]) for name in names])
    each = np.array([distances[name] for name in names]) * np.where(norms, norms, 1.0)
    return norm(each) / (norm(norms) or 1.0)


def in_flax(array: np.ndarray, layout: Layout) -> np.ndarray:
    """What is kept of one of PyTorch's arrays, in Flax's layout if it is the array itself."""
    return layout.to_flax(array) if array.shape == layout.merged else array


def tell_steps(
    findings: Findings,
    subject: Subject,
    view: View,
    optimizer: optax.GradientTransformation,
    exact: Trajectory | None,
) -> None:
    """Adds how far both are from float64 after each step in another dtype: not judged, for errors grow."""
    names = {theirs: ours for ours, theirs in subject.parameter_pairs()}
    moved = subject.exact.recording.moving
    moving = {theirs: ours for theirs, ours in names.items() if theirs in moved}
    if exact is None or not moving:
        return
    dtype = jnp.dtype(view.port.dtype).name
    found = subject.source.trajectory(dtype)
    with jax.enable_x64(False):
        steps = list(flax_steps(subject, view, subject.rounded(view), optimizer, found.masks, set(names.values())))
    themselves = {name: name for name in moving}
    distances = [
        (_distance(mine[""], true[""], moving), _distance(theirs[""], true[""], themselves))
        for mine, theirs, true in zip(steps, found.sketches, exact.sketches, strict=True)
    ]
    findings.background.steps[dtype] = [StepDistance(*pair, allowed=None) for pair in distances]
    findings.noise[f"parameters after {len(exact.masks)} steps ({dtype})"] = distances[-1]


def flax_steps(
    subject: Subject,
    view: View,
    values: Arrays,
    optimizer: optax.GradientTransformation,
    masks: Iterable[list[np.ndarray]],
    trained: set[str],
) -> Iterator[Sketches]:
    """The port's, in PyTorch's layouts, by the port's names and optax's names of what it keeps."""
    weights = {name: view.port.weights[name] for name in view.port.parameters}

    def apart(arrays: Arrays) -> dict[str, Any]:  # as the port has them, and its optimizer sees them
        return {name: weights[name].split(array) for name, array in arrays.items()}

    def advance(parameters: Arrays, state: Any, gradients: Arrays) -> tuple[Arrays, Any]:
        updates, state = optimizer.update(apart(gradients), state, apart(parameters))
        tree: Any = optax.apply_updates(apart(parameters), updates)
        moved = {name: weights[name].join(parts) for name, parts in tree.items()}
        return {name: moved[name] if name in trained else p for name, p in parameters.items()}, state

    parameters, statistics = view.programs.split(values)
    # Copied, because some optimizers keep the parameters themselves, and a buffer is donated once.
    state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, optimizer.init(apart(parameters)))
    advance = jax.jit(advance, donate_argnums=(0, 1))
    for kept in masks:
        kept = subject.port_masks(kept, subject.exact.recording)
        run = view.programs.free({**parameters, **statistics}, kept)
        parameters, state = advance(parameters, state, run.parameter_gradients)
        statistics = run.statistics
        buffers = _buffers(state, weights) | {"": parameters}
        yield {
            kind: {name: _sketch_as_torch(np.asarray(array), weights[name].layout) for name, array in arrays.items()}
            for kind, arrays in buffers.items()
        }


def _sketch_as_torch(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Some optimizers keep arrays of another shape than the parameter's."""
    return sketch(layout.to_torch(array) if array.shape == layout.shape else array)


def _counterpart(kind: str, mine: Sketches, optimizer: str) -> dict[str, np.ndarray]:
    """What the port keeps for the buffer of this name of an optimizer of PyTorch's."""
    if kind == "momentum_buffer" and kind not in mine and optimizer != "SGD":
        return {}  # optax keeps this one after the learning rate
    return next((arrays for name, arrays in mine.items() if name == kind or kind in _BUFFERS.get(name, ())), {})


def _is_kept(leaf: Any, weight: Weight) -> bool:
    """Whether it is an array, or one for each part of a weight: no MaskedNode."""
    if not isinstance(weight.variable, Joined):
        return isinstance(leaf, jax.Array)
    return isinstance(leaf, list) and [np.shape(part) for part in leaf] == [part.shape for part in weight.parts]


def _buffers(state: Any, weights: Weights) -> dict[str, Arrays]:
    """The parts of an optax state that hold one array per parameter, by their field's name."""
    found: dict[str, Arrays] = {}

    def visit(node: Any, name: str) -> None:
        if isinstance(node, dict) and node.keys() == weights.keys():
            found.setdefault(name, {}).update(
                {key: weights[key].join(leaf) for key, leaf in node.items() if _is_kept(leaf, weights[key])}
            )
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
