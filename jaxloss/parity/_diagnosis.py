"""Why a port differs: PyTorch is run again with one call changed, until it gives what the port gives."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from jaxloss.parity._changes import insertions
from jaxloss.parity._faults import FLOAT32_INSIDE, classify, matches
from jaxloss.parity._findings import Explanation, Failure, Finding
from jaxloss.parity._layout import Layout, channels_last, permuted
from jaxloss.parity._original import Functions, LayerCall
from jaxloss.parity._pairs import CallPair
from jaxloss.parity._state_dict import to_numpy
from jaxloss.parity._step_diagnosis import explain_step
from jaxloss.parity._subject import Subject


def diagnose(subject: Subject, failures: Sequence[Failure], optimizer: torch.optim.Optimizer | None) -> None:
    """Classes every failure, and explains the first, in its finding."""
    for failure in failures:
        fault = classify(failure.ours, failure.theirs, linear_image=_is_sketch(subject, failure))
        failure.finding.kind, failure.finding.diagnosis = fault.kind, fault.seen
    if failures and not matches(failures[0].ours, failures[0].theirs):
        first = failures[0]
        explain = explain_step(subject, failures, optimizer) if _is_step(first) else _explanations(subject, first)
        try:
            explanation = next(explain, None)
        except Exception as error:  # a stranger's module in a state it was not made for; the verdict stands
            explanation = None
            first.finding.fix = f"(the search for the reason ended with {type(error).__name__}: {error})"
        if explanation is not None:
            if first.finding.diagnosis == FLOAT32_INSIDE:
                first.finding.kind = explanation.kind or "semantic"
            first.finding.diagnosis, first.finding.fix = _sentence(explanation.meaning), explanation.fix


def _is_step(failure: Failure) -> bool:
    return failure.finding.place.startswith("step ")


def _is_sketch(subject: Subject, failure: Failure) -> bool:
    name = failure.finding.quantity.rpartition(" of ")[2]
    return _is_step(failure) and failure.ours.shape != subject.exact.port.weights[name].variable.shape


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _explanations(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """Everything that explains a failure; the surest first."""
    finding = failure.finding
    if finding.quantity in WEIGHT_KINDS:
        yield from _of_weight(subject, failure)
    elif finding.place == "loss":
        yield from _of_loss(subject, failure)
    elif finding.quantity.endswith(" after a step"):
        yield from _of_statistic(subject, failure)
    elif finding.kind == "precision" and finding.diagnosis != FLOAT32_INSIDE:
        dtype = finding.diagnosis.split()[-2]
        yield Explanation(f"the port computes in {dtype}", "remove the layer's dtype, or the cast before it")
    elif finding.place in subject.places and "gradient" not in finding.quantity:
        yield from _of_edge(subject, failure)
    elif finding.quantity == "output":
        yield from _of_layer(subject, failure)
    if finding.diagnosis == FLOAT32_INSIDE:
        fix = "look for casts, and for functions that cast, like jax.nn.dot_product_attention"
        yield Explanation("something computes in float32 even when it is given float64", fix, "precision")
    if "gradient" in finding.quantity and not np.any(failure.ours):
        yield Explanation("no gradient flows back", "remove stop_gradient, or the cast to integers, from the port")
    elif "gradient" in finding.quantity:
        yield Explanation(
            "forward the port equals PyTorch, but its derivative is another one",
            "look for stop_gradient, custom derivatives, and functions with ties or kinks",
        )


WEIGHT_KINDS = ("weight", "bias", "running_mean", "running_var")


def _weight_name(subject: Subject, finding: Finding) -> str:
    """The port's name of the weight or statistic that a finding is about."""
    names = {subject.title(pair): pair.ours[0] for pair in subject.pairs}
    return f"{names.get(finding.place, finding.place)}.{finding.quantity.split()[0]}".removeprefix(".")


def _of_weight(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """Where else a weight's values are, and what else they may be."""
    finding, ours, state = failure.finding, failure.ours, subject.exact.state
    name = _weight_name(subject, finding)
    fix = "convert with jaxloss.parity.load_torch"
    layout = subject.exact.port.weights[name].layout
    for other, theirs in state.items():
        if (
            other != subject.weight_pairs[name]
            and theirs.shape == layout.merged
            and np.array_equal(layout.to_torch(ours), theirs)
        ):
            yield Explanation(f"it holds PyTorch's {other}", f"copy {subject.weight_pairs[name]} here")
    initial = {"running_mean": 0.0, "running_var": 1.0, "bias": 0.0}
    if (value := initial.get(finding.quantity)) is not None and (ours == value).all():
        yield Explanation(f"the port's {finding.quantity} is still the initial {value:g}: it was never copied", fix)
    if finding.diagnosis.endswith("order (1, 0)"):
        yield Explanation("the kernel's inputs and outputs are swapped", fix)
    if finding.diagnosis.endswith("order (2, 0, 1, 3)") and len(layout.merged) == 2:
        yield Explanation(
            "the kernel's rows are in the order (channels, height, width), the port's inputs are not", fix
        )
    if finding.kind in ("layout", "scale") and finding.diagnosis:
        yield Explanation(f"the weight is another than PyTorch's: {finding.diagnosis}", fix)


def _of_layer(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """A changed call inside the layer that gives the port's output from the same inputs."""
    pair = next(pair for pair in subject.pairs if subject.title(pair) == failure.finding.place)
    call = next(call for call in subject.exact.recording.calls if call.key == pair.theirs)
    original = subject.original()
    layer = original.layers[call.name]

    def run(functions: Functions) -> np.ndarray:
        inputs = [torch.from_numpy(array) for array in call.inputs]
        with torch.no_grad(), functions:
            return to_numpy(layer(*inputs))

    yield from _changed(run, pair.output, failure.ours, partial(Functions, 0, inside=True))
    yield from _inserted(call.output, pair.output, failure.ours)


def _of_edge(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """A changed call between two layers that gives what arrives after it in the port."""
    edge = subject.places.index(failure.finding.place)
    keys = [call.key for call in subject.exact.recording.calls]
    positions = [-1, *(keys.index(pair.theirs) for pair in subject.pairs), len(keys)]
    windows = range(positions[edge] + 1, positions[edge + 1] + 1)
    if edge < len(subject.pairs):
        pair = subject.pairs[edge]
        call = subject.exact.recording.calls[positions[edge + 1]]
        theirs, layout = call.inputs[0], pair.inputs[0]
        yield from _other_order(subject, pair, call, failure)
    else:
        pair, theirs, layout = None, subject.exact.recording.outputs, subject.batch.layout
    assert layout is not None

    def run(functions: Functions) -> np.ndarray:
        original = subject.original()
        with torch.no_grad():
            calls, outputs = original.forward(original.cast(subject.batch.torch_inputs), functions)
        if pair is None:
            return to_numpy(outputs)
        return next(call.inputs[0] for call in calls if call.key == pair.theirs)

    yield from _other_dropout(subject, windows)
    yield from _changed(run, layout, failure.ours, partial(Functions, subject.seed, windows=windows))
    yield from _inserted(theirs, layout, failure.ours)
    if len(subject.exact.recording.inputs[0].shape) == 4 and edge == 0:
        yield from _other_input(failure)


def _changed(
    run: Callable[[Functions], np.ndarray], layout: Layout, ours: np.ndarray, watch: Callable[..., Functions]
) -> Iterator[Explanation]:
    """Runs with one call changed after the other, and yields those that give ours."""
    probe = watch()
    run(probe)
    for call, count in enumerate(probe.alternatives):
        for alternative in range(count):
            functions = watch(change=(call, alternative))
            try:
                result = run(functions)
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue  # this alternative does not fit what follows
            if _equals(result, layout, ours):
                yield Explanation(functions.changed.meaning, functions.changed.fix)


def _equals(result: np.ndarray, layout: Layout, ours: np.ndarray) -> bool:
    return result.shape == layout.merged and matches(ours, layout.to_flax(result))


def _inserted(theirs: np.ndarray, layout: Layout, ours: np.ndarray) -> Iterator[Explanation]:
    for change in insertions(torch.from_numpy(theirs)):
        if _equals(to_numpy(change.result()), layout, ours):
            yield Explanation(change.meaning, change.fix)


def _other_order(subject: Subject, pair: CallPair, call: LayerCall, failure: Failure) -> Iterator[Explanation]:
    """A flattened feature map in Flax's order where the weights expect PyTorch's, or the reverse."""
    feature_map = subject.exact.recording.flattened.get(call.key)
    if feature_map is None:
        return
    batch = call.inputs[0].shape[0]
    flax = channels_last((batch, *feature_map)).to_flax(call.inputs[0].reshape(batch, *feature_map))
    flax_order, torch_order = "(height, width, channels)", "(channels, height, width)"
    fix = f"load_torch(..., flatten={{'{pair.ours[0]}': {tuple(feature_map)}}}), or transpose before the reshape"
    for array, arrives, expected in ((flax, flax_order, torch_order), (call.inputs[0], torch_order, flax_order)):
        if matches(failure.ours, array.reshape(failure.ours.shape)):
            yield Explanation(f"the port flattens {arrives}, the kernel's rows are in the order {expected}", fix)


def _other_dropout(subject: Subject, windows: range) -> Iterator[Explanation]:
    counts = len(subject.drops), len(subject.exact.recording.drops)
    if counts[0] != counts[1]:
        fix = "drop as often: in eval mode, or at rate 0, a port does not"
        yield Explanation(f"the port drops {counts[0]} times in a run, PyTorch {counts[1]} times", fix)
    for drop, ours in zip(subject.exact.recording.drops, subject.drops, strict=False):
        if drop.window in windows and ours.rate != drop.rate:
            yield Explanation(
                f"the port drops at rate {ours.rate:g}, PyTorch at {drop.rate:g}", f"pass rate={drop.rate:g}"
            )
        if drop.window in windows and drop.whole_channels != bool(ours.broadcast):
            words = ("elements", "whole channels")[:: 1 if drop.whole_channels else -1]
            fix = f"pass broadcast_dims={(1, 2) if drop.whole_channels else ()} to nnx.Dropout"
            yield Explanation(f"the port drops {words[0]}, PyTorch {words[1]}", fix)


def _other_input(failure: Failure) -> Iterator[Explanation]:
    if failure.finding.kind == "layout":
        yield Explanation(
            f"the input is laid out otherwise: {failure.finding.diagnosis}", "pass flax_batch in the port's layout"
        )


def _of_loss(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """A changed loss that gives the port's value or gradient."""

    def run(functions: Functions) -> np.ndarray:
        outputs = torch.from_numpy(subject.exact.recording.outputs).requires_grad_()
        with functions:
            loss = subject.batch.torch_objective(outputs)
        gradient = torch.autograd.grad(loss, outputs)[0]
        return to_numpy(gradient if failure.finding.quantity == "gradient" else loss)

    layout = subject.batch.layout if failure.finding.quantity == "gradient" else permuted((), ())
    assert layout is not None
    yield from _changed(run, layout, failure.ours, partial(Functions, 0, inside=True))


def _of_statistic(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """Batch norm's running statistics with another momentum or variance."""
    finding = failure.finding
    name = _weight_name(subject, finding)
    theirs = subject.weight_pairs[name]
    layer = subject.original().layers[theirs.rpartition(".")[0]]
    old, new, momentum = (
        subject.exact.state[theirs],
        subject.exact.recording.buffers[theirs],
        getattr(layer, "momentum", None),
    )
    if matches(failure.ours, old):
        yield Explanation(
            "the port does not update its running statistics", "call train() on the port, and keep its mutated state"
        )
    if not isinstance(momentum, float):
        return
    batch = (new - (1 - momentum) * old) / momentum
    call = next(call for call in subject.exact.recording.calls if call.name == theirs.rpartition(".")[0])
    n = call.inputs[0].size // call.inputs[0].shape[1]
    variances = {"": batch}
    if "var" in name:
        variances["divides the variance by n, PyTorch by n - 1"] = batch * (n - 1) / n
    rates = {
        "": momentum,
        f"takes PyTorch's momentum {momentum:g} for its own, which is 1 - that": 1 - momentum,
        "keeps Flax's default momentum 0.99": 0.01,
    }
    for first, variance in variances.items():
        for second, rate in rates.items():
            if (first or second) and matches(failure.ours, (1 - rate) * old + rate * variance):
                fixes = [f"multiply the running variance's update by n / (n - 1) = {n / (n - 1):.6g}"] if first else []
                fixes += [f"pass momentum={1 - momentum:g} to nnx.BatchNorm"] if second else []
                yield Explanation("batch norm " + " and ".join(filter(None, (first, second))), "; ".join(fixes))
