"""Whether a Flax port computes what its PyTorch original does, and the first place where it does not."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxloss.parity._background import Errors
from jaxloss.parity._batch import FlaxLoss
from jaxloss.parity._compare import SMALL, SMALL_GRADIENT, Rounding, is_constant, norm, relative
from jaxloss.parity._detail import Detail
from jaxloss.parity._diagnosis import Ask, diagnose, explain_rounding
from jaxloss.parity._environment import environment
from jaxloss.parity._findings import FLOAT64_TOLERANCE, Findings
from jaxloss.parity._layout import Layout, same
from jaxloss.parity._pairs import kept_otherwise
from jaxloss.parity._programs import CutRun, FreeRun
from jaxloss.parity._recording import Recording, Source
from jaxloss.parity._report import Report
from jaxloss.parity._stages import stages, weight_pairs
from jaxloss.parity._steps import compare_steps, tell_steps
from jaxloss.parity._subject import Subject, View


def judge(
    source: Source,
    flax_module: Any,
    flax_batch: Any,
    *,
    loss: FlaxLoss | None,
    optimizer: optax.GradientTransformation,
    layouts: Mapping[str, Sequence[int]] | None,
    names: Mapping[str, str] | None,
    ignore: Collection[str],
    dtypes: Sequence[str],
    ask: Ask,
    progress: Callable[[str], None],
) -> Report:
    """Compares a port with what is known of its original; `check` and `replay` say how.

    Args:
        source: the original.
        flax_module: the port.
        flax_batch: the port's inputs, if they are not PyTorch's in the usual layout.
        loss: the port's; None if the original has none.
        optimizer: the port's.
        layouts: see `check`, also for the other arguments.
        names: PyTorch's names of weights by the port's.
        ignore: what the port does not need.
        dtypes: those to judge by rounding besides float64.
        ask: gives what PyTorch says to the failures, if there is one to ask.
        progress: called with the name of each stage.
    """
    started, findings = time.perf_counter(), Findings()
    with jax.enable_x64(True):
        progress("pairing layers")
        subject = Subject(source, flax_module, flax_batch, loss, layouts or {}, names, ignore)
        exact = subject.exact
        findings.notes += [*subject.source.notes, *subject.batch.notes]
        findings.background.name, findings.background.stages = subject.name, stages(subject)
        findings.background.weights = list(weight_pairs(subject))
        _unmatched(findings, subject)
        progress("layers and edges in float64")
        cut = exact.programs.cut(subject.values(), exact.recording)
        _compare_pieces(findings, subject, exact, cut)
        _compare_statistics(findings, subject, exact, cut)
        del cut  # of a large network, nothing is kept that is not needed
        progress("the whole network in float64")
        _compare_whole(findings, subject, exact, exact.programs.free(subject.values(), exact.recording.masks))
        progress("optimizer steps")
        exact_steps = compare_steps(findings, subject, optimizer)
        progress("looking for the reason")
        diagnose(subject, findings.failures, exact_steps, ask)
    for dtype in dtypes:
        if dtype != "float64":
            progress(f"layers and edges in {dtype}")
            with jax.enable_x64(False):
                rough = subject.view(dtype)
            _compare_rounding(findings, subject, rough, dtype)
            progress(f"optimizer steps in {dtype}")
            tell_steps(findings, subject, rough, optimizer, exact_steps)
    explain_rounding(subject, findings.all)
    findings.background.environment = environment()
    findings.background.seconds = time.perf_counter() - started
    return Report(
        findings.all,
        findings.notes,
        subject.weight_pairs,
        findings.noise,
        findings.controls,
        not subject.copied,
        findings.background,
    )


def _unmatched(findings: Findings, subject: Subject) -> None:
    if subject.copied:
        findings.notes.append("The port has weights of its own: PyTorch's were copied for this check.")
        if other := ", ".join(subject.other_initialisation()):
            findings.notes.append(f"Training starts elsewhere: the port's initialisation differs in {other}.")
    if not subject.exact.port.layers:
        findings.notes.append("The port's layers are unknown: only outputs, gradients and steps are compared.")
    if moved := ", ".join(dict.fromkeys(subject.moved)):
        findings.notes.append(f"By its numbers, the port has the axes of {moved} in another order than PyTorch.")
    if both := ", ".join(f"{first} and {second.name}" for first, second in subject.exact.state.seconds.items()):
        findings.notes.append(
            f"The port has one bias for {both}: their sum is compared. Where PyTorch trains both, it moves half as far."
        )
    if subject.uncompared:
        names = ", ".join(subject.uncompared)
        findings.notes.append(f"No call of PyTorch's fits {names}: compared only within the edges around.")
    problems: list[tuple[str, str]] = []
    for name in sorted(subject.unmatched_theirs, key=lambda name: not kept_otherwise(name)):
        remark = kept_otherwise(name)
        problems.append((name, "has no counterpart in the port" + (remark and f". {remark}")))
    problems += [(name, subject.lacks_counterpart(name)) for name in subject.unmatched_ours]
    problems += subject.mismatched
    aliased = "shares PyTorch's memory: an in-place optimizer changes it; copy with load_torch or jnp.array"
    problems += [(name, aliased) for name in subject.aliased()]
    for name, problem in problems:
        layer, _, kind = name.rpartition(".")
        findings.fail(subject.place_of(layer), kind, problem)
    if not subject.exact.recording.parameter_gradients:
        findings.notes.append("PyTorch's module trains nothing: no gradients of weights and no steps are compared.")
    if random := ", ".join(subject.exact.recording.random):
        findings.notes.append(f"PyTorch draws random numbers in {random}: only those of dropout are given to the port.")
    if rounded := ", ".join(subject.exact.recording.rounded):
        findings.notes.append(
            f"PyTorch's module itself leaves float64 in {rounded}: a right port may differ by float32's rounding."
        )
    for i in subject.exact.recording.mutated:
        findings.notes.append(f"PyTorch's module changes its input {i} in place; the port gets it as it was.")


def _compare_weights(findings: Findings, subject: Subject, layer: str) -> None:
    """The weights that a layer of the port came with."""
    for ours, theirs in subject.weight_pairs.items():
        name, _, kind = ours.rpartition(".")
        if name == layer and not subject.copied:
            layout = subject.exact.port.weights[ours].layout
            expected, place = layout.to_flax(subject.exact.state[theirs]), subject.place_of(layer)
            findings.add(place, kind, subject.value(ours), expected, layout, tolerance=0.0)


class Piece(NamedTuple):
    """One array of one layer or edge, as the port computes it from the original's numbers, and as PyTorch does."""

    place: str
    quantity: str
    ours: jax.Array
    theirs: np.ndarray  # in Flax's layout
    layout: Layout


def _forward(subject: Subject, run: CutRun | FreeRun, recording: Recording) -> Iterator[Piece]:
    """What arrives at every layer over an edge, what it returns, and what the network returns."""
    places, calls = subject.places, {call.key: call for call in recording.calls}
    for place, pair in zip(places, subject.pairs, strict=False):
        call, name = calls[pair.theirs], subject.title(pair)
        inputs = zip(run.arrived[pair.ours], pair.inputs_to_flax(call.inputs), pair.inputs, strict=True)
        for ours, theirs, layout in inputs:
            yield Piece(place, f"input of {name}", ours, theirs, layout)
        yield Piece(name, "output", run.outputs[pair.ours], pair.output.to_flax(call.output), pair.output)
    assert subject.batch.layout is not None
    result = subject.output_to_flax(recording.outputs)
    yield Piece(places[-1], "output", run.result, result, subject.batch.layout)


def _pieces(subject: Subject, view: View, cut: CutRun, recording: Recording) -> Iterator[Piece]:
    """Every layer and every edge by itself: forward in order, then backward."""
    places, calls = subject.places, {call.key: call for call in recording.calls}
    yield from _forward(subject, cut, recording)
    for i, pair in reversed(list(enumerate(subject.pairs))):
        call, name = calls[pair.theirs], subject.title(pair)
        if call.output_gradient is not None:
            expected = pair.output.to_flax(call.output_gradient)
            what, ours = f"gradient of output of {name}", cut.output_gradients[pair.ours]
            yield Piece(places[i + 1], what, ours, expected, pair.output)
        gradients = zip(cut.layer_gradients[pair.ours], call.input_gradients, pair.inputs, strict=True)
        for ours, theirs, layout in gradients:
            if theirs is not None:
                yield Piece(name, "gradient of input", ours, layout.to_flax(theirs), layout)
        if pair.ours[1] == 0:
            yield from _parameter_gradients(subject, view, cut, recording, pair.ours[0], name)
    layouts = subject.batch.input_layouts()
    for ours, theirs, layout in zip(cut.input_gradients, recording.input_gradients, layouts, strict=True):
        if theirs is not None:
            yield Piece(places[0], "gradient of the input", ours, layout.to_flax(theirs), layout)


def _parameter_gradients(
    subject: Subject, view: View, run: CutRun | FreeRun, recording: Recording, layer: str | None, place: str
) -> Iterator[Piece]:
    for ours, theirs in subject.parameter_pairs(layer):
        kind = ours if layer is None else ours.rpartition(".")[2]
        layout = view.port.weights[ours].layout
        expected = layout.to_flax(recording.parameter_gradients[theirs])
        yield Piece(place, f"gradient of {kind}", run.parameter_gradients[ours], expected, layout)


def _compare_pieces(findings: Findings, subject: Subject, view: View, cut: CutRun) -> None:
    pieces = list(_pieces(subject, view, cut, view.recording))
    last = next(i for i, piece in enumerate(pieces) if piece.place == subject.places[-1])
    # A layer that is called again may first be given a constant: a recurrent one its initial state.
    names = [call.name for call in view.recording.calls]
    again = {subject.title(pair) for pair in subject.pairs if names.count(pair.theirs[0]) > 1}
    seen: set[str] = set()
    untold: list[str] = []
    several = [i for i, array in enumerate(subject.source.inputs) if array.size > 1]
    constant = [i for i in several if is_constant(subject.source.inputs[i])]
    if several and constant == several:
        findings.fail(subject.places[0], "input", "is one number everywhere: nothing can be told from it")
    elif constant:
        which = " and input ".join(map(str, constant))
        findings.notes.append(
            f"One number everywhere in input {which} (a mask that leaves nothing out?): give several, or it is untold."
        )
    titles = {subject.title(pair): pair.ours[0] for pair in subject.pairs}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in subject.weight_pairs)
    for layer in [layer for layer in layers if layer not in titles.values()]:
        _compare_weights(findings, subject, layer)
    for piece in pieces[: last + 1]:
        layer = titles.get(piece.place)
        if layer is not None and layer not in seen:
            seen.add(layer)
            _compare_weights(findings, subject, layer)
        found = findings.add(*piece)
        if (
            found.ok
            and is_constant(piece.theirs)
            and again.isdisjoint((found.place, found.quantity.removeprefix("input of ")))
        ):
            untold.append(f"{found.place}: {found.quantity}")
        findings.background.tell_forced(piece.place, "float64", Errors(found.error, found.bound))
    _compare_loss(findings, subject, view)
    recording = view.recording
    for piece in pieces[last + 1 :]:
        floor = recording.activation_floor if _of_activation(piece) else recording.gradient_floor
        found = findings.add(*piece, floor=floor, may_be_zero=True)
        if found.ok and not piece.theirs.any():
            untold.append(f"{found.place}: {found.quantity}")
    if untold:
        findings.notes.append(
            f"Nothing can be told from {'; '.join(untold)}: each is one number everywhere in both, or a gradient of 0. "
            "Perturb the weights or give another batch."
        )
    gradients = [finding for finding in findings.all if "gradient of" in finding.quantity]
    if gradients and all(finding.negligible for finding in gradients):
        findings.fail("whole network", "gradients", "are 0 everywhere in PyTorch: nothing can be told from them")


def _of_activation(piece: Piece) -> bool:
    """Whether a gradient is an activation's, and not a parameter's."""
    return piece.quantity.startswith(("gradient of input", "gradient of output", "gradient of the input"))


def _compare_loss(findings: Findings, subject: Subject, view: View) -> None:
    """The loss alone, on the original's outputs."""
    outputs = view.port.cast(subject.output_to_flax(view.recording.outputs))
    value, gradient = jax.value_and_grad(subject.batch.flax_objective)(outputs)
    findings.add("loss", "value", value, view.recording.loss, same(()))
    expected = subject.output_to_flax(view.recording.output_gradient)
    findings.add("loss", "gradient", gradient, expected, subject.batch.layout)


def _compare_statistics(findings: Findings, subject: Subject, view: View, cut: CutRun) -> None:
    """Running statistics after one step in train mode."""
    for ours, value in cut.statistics.items():
        theirs = subject.weight_pairs.get(ours)
        if subject.train and theirs in view.recording.buffers:
            layer, _, kind = ours.rpartition(".")
            layout = view.port.weights[ours].layout
            expected, place = layout.to_flax(view.recording.buffers[theirs]), subject.place_of(layer)
            findings.add(place, f"{kind} after a step", value, expected, layout)


def _compare_whole(findings: Findings, subject: Subject, view: View, free: FreeRun) -> None:
    """The network from end to end, where errors accumulate."""
    recording, place = view.recording, "whole network"
    findings.add(place, "output", free.result, subject.output_to_flax(recording.outputs), subject.batch.layout)
    findings.add(place, "loss", free.loss, recording.loss, same(()))
    _tell_free(findings, subject, view, free)
    for piece in _parameter_gradients(subject, view, free, recording, None, place):
        findings.add(*piece, floor=recording.gradient_floor, may_be_zero=True)
    inputs = zip(free.input_gradients, recording.input_gradients, subject.batch.input_layouts(), strict=True)
    for ours, theirs, layout in inputs:
        if theirs is not None:
            what, floor = "gradient of the input", recording.activation_floor
            expected = layout.to_flax(theirs)
            findings.add(place, what, ours, expected, layout, floor=floor, may_be_zero=True)


def _tell_free(findings: Findings, subject: Subject, view: View, free: FreeRun) -> None:
    """How the errors of layers and edges add up from the input on; in other dtypes than float64 beside PyTorch's."""
    dtype = jnp.dtype(view.port.dtype).name
    true = _forward(subject, free, subject.exact.recording)
    for piece, exact in zip(_forward(subject, free, view.recording), true, strict=True):
        if jnp.issubdtype(piece.theirs.dtype, jnp.floating):
            own = FLOAT64_TOLERANCE if view is subject.exact else relative(piece.theirs, exact.theirs)
            findings.background.tell_free(piece.place, dtype, Errors(relative(piece.ours, exact.theirs), own))


def _least_norm(piece: Piece, recording: Recording) -> float:
    """The norm that a small piece's error is judged relative to, if its own is less."""
    if not piece.quantity.startswith("gradient of"):
        return 0.0
    largest = recording.largest_activation_gradient if _of_activation(piece) else recording.largest_gradient
    return SMALL_GRADIENT * largest


def _compare_rounding(findings: Findings, subject: Subject, rough: View, dtype: str) -> None:
    """Layers and edges in another dtype, judged by their error against float64 on the same rounded inputs.

    The network's error from end to end is only told, beside PyTorch's: one relu that rounding switches makes it
    unbounded for a right port.
    """
    exact = subject.exact
    values = subject.rounded(rough)
    with jax.enable_x64(False):
        cut = rough.programs.cut(values, rough.recording)
    with jax.enable_x64(True):
        oracle = exact.programs.cut({n: exact.port.cast(value) for n, value in values.items()}, rough.recording)
    negligible = {(finding.place, finding.quantity) for finding in findings.all if finding.negligible}
    small: list[Rounding] = []
    for piece, truth in zip(
        _pieces(subject, rough, cut, rough.recording),
        _pieces(subject, exact, oracle, rough.recording),
        strict=True,
    ):
        if (piece.place, piece.quantity) in negligible or not jnp.issubdtype(piece.theirs.dtype, jnp.floating):
            continue
        true = np.asarray(truth.ours)
        least = _least_norm(piece, rough.recording) if piece.theirs.size < SMALL else 0.0
        rounding = Rounding.of(piece.ours, piece.theirs, true, least)
        if piece.quantity == "output" or piece.quantity.startswith("input of "):
            findings.background.tell_forced(piece.place, dtype, Errors(rounding.ours, rounding.theirs))
        if piece.theirs.size < SMALL and not rounding.problem:
            small.append(rounding)
        else:
            detail = Detail.of(np.asarray(piece.ours), piece.theirs, piece.layout, true)
            findings.add_rounding(piece.place, piece.quantity, dtype, rounding, detail)
    if small:
        findings.add_rounding("tensors of fewer than 1000 elements", "all together", dtype, Rounding.pooled(small))
    del cut, oracle
    with jax.enable_x64(False):
        free = rough.programs.free(values, rough.recording.masks)
    _tell_free(findings, subject, rough, free)
    theirs, true = subject.output_to_flax(rough.recording.outputs), subject.output_to_flax(exact.recording.outputs)
    findings.noise[f"output ({dtype})"] = relative(free.result, true), relative(theirs, true)
    for ours, name in subject.parameter_pairs():
        if norm(exact.recording.parameter_gradients[name]) <= 100 * exact.recording.gradient_floor:
            continue
        layout, true = exact.port.weights[ours].layout, exact.recording.parameter_gradients[name]
        theirs = rough.recording.parameter_gradients[name]
        mine = layout.to_torch(np.asarray(free.parameter_gradients[ours]))
        findings.noise[f"gradient of {ours} ({dtype})"] = relative(mine, true), relative(theirs, true)
