"""Training steps: first all of PyTorch's, then all of the port's, so that memory holds one of them."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxloss.parity._compare import relative
from jaxloss.parity._findings import Findings
from jaxloss.parity._layout import Layout
from jaxloss.parity._port import Arrays
from jaxloss.parity._recording import Sketches, Trajectory, sketch
from jaxloss.parity._subject import Subject, View

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
    if frozen := ", ".join(sorted(set(view.port.parameters) - set(names.values()))):
        findings.notes.append(f"PyTorch does not train {frozen}: held fixed in the port's steps too.")
    moved = view.recording.moving
    moving = {theirs: ours for theirs, ours in names.items() if theirs in moved}
    if still := ", ".join(sorted(names.keys() - moving.keys())):
        findings.notes.append(f"The steps of {still} are not judged: their gradients are zero but for rounding.")
    expected = subject.source.trajectory("float64")
    mine = list(flax_steps(subject, view, subject.values(), optimizer, expected.masks, set(names.values())))
    for step, found in enumerate(mine):
        for quantity, sketches in expected.sketches[step].items():
            counterparts = _counterpart(quantity, found, subject.source.optimizer)
            arrays = {theirs: array for theirs, array in sketches.items() if theirs in moving}
            floor = 1e-14 * max((float(np.linalg.norm(array)) for array in arrays.values()), default=0.0)
            for theirs, array in arrays.items():
                name, layout = moving[theirs], view.port.weights[moving[theirs]].layout
                if name in counterparts:
                    far = relative(counterparts[name], array) > TOLERANCE
                    tolerance = NOISE * expected.noise()[step][quantity][theirs] if far and step else 0.0
                    findings.add(
                        f"step {step + 1}",
                        f"{quantity} of {name}" if quantity else name,
                        in_flax(counterparts[name], layout),
                        in_flax(array, layout),
                        tolerance=max(TOLERANCE, tolerance),
                        floor=floor if quantity else 0.0,
                        may_be_constant=True,
                        may_be_zero=bool(quantity),
                    )
    return expected


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
    """Adds how far both are from float64 after the last step in another dtype: not judged, for errors grow."""
    names = {theirs: ours for ours, theirs in subject.parameter_pairs()}
    moved = subject.exact.recording.moving
    moving = [theirs for theirs in names if theirs in moved]
    if exact is None or not moving:
        return
    dtype = jnp.dtype(view.port.dtype).name
    found = subject.source.trajectory(dtype)
    with jax.enable_x64(False):
        *_, mine = flax_steps(subject, view, subject.rounded(view), optimizer, found.masks, set(names.values()))
    own = np.concatenate([mine[""][names[theirs]].ravel() for theirs in moving])
    true, others = (
        np.concatenate([run.sketches[-1][""][theirs].ravel() for theirs in moving]) for run in (exact, found)
    )
    quantity = f"parameters after {len(exact.masks)} steps ({dtype})"
    findings.noise[quantity] = relative(own, true), relative(others, true)


def flax_steps(
    subject: Subject,
    view: View,
    values: Arrays,
    optimizer: optax.GradientTransformation,
    masks: Iterable[list[np.ndarray]],
    trained: set[str],
) -> Iterator[Sketches]:
    """The port's, in PyTorch's layouts, by the port's names and optax's names of what it keeps."""
    layouts = {name: view.port.weights[name].layout for name in view.port.parameters}

    def advance(parameters: Arrays, state: Any, gradients: Arrays) -> tuple[Arrays, Any]:
        updates, state = optimizer.update(gradients, state, parameters)
        moved: Any = optax.apply_updates(parameters, updates)
        return {name: moved[name] if name in trained else p for name, p in parameters.items()}, state

    parameters, statistics = view.programs.split(values)
    # Copied, because some optimizers keep the parameters themselves, and a buffer is donated once.
    state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, optimizer.init(parameters))
    advance = jax.jit(advance, donate_argnums=(0, 1))
    for kept in masks:
        kept = subject.port_masks(kept, subject.exact.recording)
        run = view.programs.free({**parameters, **statistics}, kept)
        parameters, state = advance(parameters, state, run.parameter_gradients)
        statistics = run.statistics
        buffers = _buffers(state, parameters) | {"": parameters}
        yield {
            kind: {name: _sketch_as_torch(np.asarray(array), layouts[name]) for name, array in arrays.items()}
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
