"""Why a port differs: what the arrays tell, and what PyTorch says if there is one to ask."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from flax import linen, nnx

from jaxloss.parity._compare import UNKNOWN
from jaxloss.parity._faults import FLOAT32_INSIDE, classify, matches
from jaxloss.parity._findings import Explanation, Failure, Finding
from jaxloss.parity._layout import channels_last
from jaxloss.parity._pairs import CallPair
from jaxloss.parity._recording import LayerCall, Trajectory, sketch
from jaxloss.parity._steps import in_flax, kept_of
from jaxloss.parity._subject import Subject

Ask = Callable[[Subject, Sequence[Failure]], Iterator[Explanation]]  # everything that explains the first failure


def diagnose(subject: Subject, failures: Sequence[Failure], steps: Trajectory | None, ask: Ask) -> None:
    """Classes every failure where something differs, and explains the first, in its finding."""
    failures = [failure for failure in failures if not failure.finding.problem.endswith(UNKNOWN)]
    for failure in failures:
        fault = classify(failure.ours, failure.theirs, linear_image=_is_sketch(subject, failure))
        failure.finding.kind, failure.finding.diagnosis = fault.kind, fault.seen
    of_loss = {failure.finding.quantity: failure.finding for failure in failures if failure.finding.place == "loss"}
    if of_loss.keys() == {"value", "gradient"} and of_loss["gradient"].kind == "scale":
        of_loss["value"].kind = "scale"
        of_loss["value"].diagnosis = of_loss["gradient"].diagnosis.replace("it is", "its gradient is")
    first = failures[0] if failures else None
    if first and (first.finding.diagnosis == FLOAT32_INSIDE or not matches(first.ours, first.theirs)):
        try:
            explanation = next(_explanations(subject, failures, steps, ask), None)
        except Exception as error:  # a stranger's module in a state it was not made for; the verdict stands
            explanation = None
            first.finding.fix = f"(the search for the reason ended with {type(error).__name__}: {error})"
        if explanation is not None:
            if first.finding.diagnosis == FLOAT32_INSIDE:
                first.finding.kind = explanation.kind or "semantic"
            first.finding.diagnosis, first.finding.fix = _sentence(explanation.meaning), explanation.fix


def explain_rounding(subject: Subject, findings: Sequence[Finding]) -> None:
    """Names Flax's norms that lose digits, where their rounding is judged to be too much."""
    layers = {weight.layer_name: weight.layer for weight in subject.exact.port.weights.values()}
    without = (nnx.RMSNorm, linen.RMSNorm, *(() if subject.train else (nnx.BatchNorm, linen.BatchNorm)))
    fast = {
        name
        for name, layer in layers.items()
        if getattr(layer, "use_fast_variance", False) and not isinstance(layer, without)
    }
    titles = {subject.title(pair) for pair in subject.pairs if pair.ours[0] in fast}
    for finding in (each for each in findings if not each.ok and each.dtype != "float64" and not each.diagnosis):
        if finding.place in titles:
            finding.kind, finding.fix = "precision", "pass use_fast_variance=False"
            finding.diagnosis = f"{finding.place} takes the variance as E[x²] - E[x]², Flax's default: it loses digits."


def _is_step(failure: Failure) -> bool:
    return failure.finding.place.startswith("step ")


def _is_sketch(subject: Subject, failure: Failure) -> bool:
    weights = subject.exact.port.weights
    weight = weights.get(kept_of(failure.finding.quantity, weights)[1])
    return _is_step(failure) and weight is not None and failure.ours.shape != weight.variable.shape


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _explanations(
    subject: Subject, failures: Sequence[Failure], steps: Trajectory | None, ask: Ask
) -> Iterator[Explanation]:
    """Everything that explains the first failure; the surest first."""
    failure, finding = failures[0], failures[0].finding
    if _is_step(failure):
        assert steps is not None
        yield from ask(subject, failures)
        yield from _of_step(subject, failures, steps)
        return
    if finding.diagnosis == FLOAT32_INSIDE and failure.theirs.dtype == np.float32:
        yield _float32_inside(subject)
        return
    if " " not in finding.quantity and _weight_name(subject, finding) in subject.weight_pairs:
        yield from _of_weight(subject, failure)
    elif finding.place == "loss":
        yield from ask(subject, failures)
    elif finding.quantity.endswith(" after a step"):
        yield from _of_statistic(subject, failure)
    elif finding.kind == "precision" and finding.diagnosis != FLOAT32_INSIDE:
        dtype = finding.diagnosis.split()[-2]
        yield Explanation(f"the port computes in {dtype}", "remove the layer's dtype, or the cast before it")
    elif finding.place in subject.places and "gradient" not in finding.quantity:
        yield from _of_edge(subject, failures, ask)
    elif finding.quantity == "output":
        yield from ask(subject, failures)
    if finding.diagnosis == FLOAT32_INSIDE:
        yield _float32_inside(subject)
    if finding.quantity == "gradient of weight":
        yield from _of_padding(subject, failure)
    if "gradient" in finding.quantity and not np.any(failure.ours):
        yield Explanation("no gradient flows back", "remove stop_gradient, or the cast to integers, from the port")
    elif "gradient" in finding.quantity:
        yield Explanation(
            "forward the port equals PyTorch, but its derivative is another one",
            "look for stop_gradient, custom derivatives, and functions with ties or kinks",
        )


def _float32_inside(subject: Subject) -> Explanation:
    meaning = "something computes in float32 even when it is given float64"
    fix = "look for casts, and for functions that cast, like jax.nn.dot_product_attention"
    if rounded := ", ".join(subject.exact.recording.rounded):
        meaning = f"PyTorch itself computes in float32 even when it is given float64: see {rounded}"
        fix = f"have PyTorch keep the dtype there, with x.to(y.dtype) for x.float(); if they still differ, {fix}"
    elif tables := ", ".join(_float32_tables(subject)):
        meaning = f"PyTorch's {tables} has float32's digits, also in float64: the port may compute it with more"
        fix = f"give the port PyTorch's numbers; if they still differ, {fix}"
    elif not subject.exact.programs.leaves_float64(subject.values(), subject.exact.recording.masks):
        meaning = "the error has float32's size, but neither computes in float32"
        fix = "look for an epsilon in another place (inside of a root, or outside), and for constants of few digits"
        return Explanation(meaning, fix, "semantic")
    return Explanation(meaning, fix, "precision")


def _float32_tables(subject: Subject) -> Iterator[str]:
    """Buffers of PyTorch's, like those of frequencies, that the port has not, and that float32 holds."""
    for name, buffer in subject.exact.recording.buffers.items():
        known = name in subject.weight_pairs.values() or buffer.dtype != np.float64
        if not known and (buffer != np.rint(buffer)).any() and (buffer == buffer.astype(np.float32)).all():
            yield name


def _weight_name(subject: Subject, finding: Finding) -> str:
    """The port's name of the weight or statistic that a finding is about."""
    names = {subject.name: ""} | {subject.title(pair): pair.ours[0] for pair in subject.pairs}
    return f"{names.get(finding.place, finding.place)}.{finding.quantity.split()[0]}".removeprefix(".")


def _of_weight(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """Where else a weight's values are, and what else they may be."""
    finding, ours, state = failure.finding, failure.ours, subject.exact.state
    name = _weight_name(subject, finding)
    fix = "convert with jaxloss.parity.load_torch"
    initial = {"running_mean": 0.0, "running_var": 1.0, "bias": 0.0}
    kind = "bias" if finding.quantity.startswith("bias_") else finding.quantity
    if (value := initial.get(kind)) is not None and (ours == value).all():
        yield Explanation(f"the port's {finding.quantity} is still the initial {value:g}: it was never copied", fix)
    if finding.quantity == "weight" and ours.ndim == 1 and (ours == 1).all():
        yield Explanation("the port's scale is still the initial 1: it was never copied", fix)
    layout = subject.exact.port.weights[name].layout
    terms = state.terms(subject.weight_pairs[name])
    for term, array in terms.items():
        if np.array_equal(ours, layout.to_flax(array)):
            yield Explanation(f"it holds PyTorch's {term} alone", f"copy the sum of {' and '.join(terms)}")
    for other, theirs in state.items():
        if (
            other != subject.weight_pairs[name]
            and theirs.shape == layout.merged
            and np.array_equal(layout.to_torch(ours), theirs)
            and (ours.size == 1 or np.ptp(ours) > 0)
        ):
            yield Explanation(f"it holds PyTorch's {other}", f"copy {subject.weight_pairs[name]} here")
    if finding.diagnosis.endswith("order (1, 0)"):
        yield Explanation("the kernel's inputs and outputs are swapped", fix)
    if finding.diagnosis.endswith("order (2, 0, 1, 3)") and len(layout.merged) == 2:
        yield Explanation(
            "the kernel's rows are in the order (channels, height, width), the port's inputs are not", fix
        )
    if finding.kind in ("layout", "scale") and finding.diagnosis:
        yield Explanation(f"the weight is another than PyTorch's: {finding.diagnosis}", fix)


def _of_padding(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """The row of an embedding that PyTorch does not train."""
    layer = {subject.title(pair): pair.theirs[0] for pair in subject.pairs}.get(failure.finding.place)
    row = None if layer is None else subject.source.modules[layer].attributes.get("padding_idx")
    if isinstance(row, int):
        ours = failure.ours.copy()
        ours[row] = 0
        if matches(ours, failure.theirs):
            fix = f"look up in table.at[{row}].set(jax.lax.stop_gradient(table[{row}]))"
            yield Explanation(f"PyTorch's padding_idx={row} keeps row {row} from training, the port trains it", fix)


class Edge(NamedTuple):
    """What lies between two layers of the original."""

    pair: CallPair | None  # the layer after it, if it is not the last
    call: LayerCall | None  # of that layer
    windows: range  # in which its functions are called
    our_windows: range  # of the port


def edge_of(subject: Subject, failure: Failure) -> Edge:
    """Where a failure is."""
    edge = subject.places.index(failure.finding.place)
    calls = subject.exact.recording.calls
    keys = [call.key for call in calls]
    positions = [-1, *(keys.index(pair.theirs) for pair in subject.pairs), len(keys)]
    windows = range(positions[edge] + 1, positions[edge + 1] + 1)
    ours = [-1, *(subject.our_calls.index(pair.ours) for pair in subject.pairs), len(subject.our_calls)]
    our_windows = range(ours[edge] + 1, ours[edge + 1] + 1)
    if edge == len(subject.pairs):
        return Edge(None, None, windows, our_windows)
    return Edge(subject.pairs[edge], calls[positions[edge + 1]], windows, our_windows)


def _of_edge(subject: Subject, failures: Sequence[Failure], ask: Ask) -> Iterator[Explanation]:
    """What arrives after it in the port."""
    failure, edge = failures[0], edge_of(subject, failures[0])
    if edge.pair is not None and edge.call is not None:
        yield from _other_order(subject, edge.pair, edge.call, failure)
    drops_as_often = len(subject.drops) == len(subject.exact.recording.drops)
    if not drops_as_often:
        yield from _other_dropout(subject, edge)
    yield from ask(subject, failures)
    yield from _other_layers(subject, edge)
    if drops_as_often:  # a drop a call later may be right
        yield from _other_dropout(subject, edge)
    if subject.source.inputs[0].ndim == 4 and failure.finding.place == subject.places[0]:
        yield from _other_input(failure)


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


def _other_dropout(subject: Subject, edge: Edge) -> Iterator[Explanation]:
    our_drops, their_drops = subject.drops, subject.exact.recording.drops
    if subject.exact.recording.random:
        return  # PyTorch may drop unseen, inside of a function
    here = sum(drop.window in edge.our_windows for drop in our_drops)
    there = sum(drop.window in edge.windows for drop in their_drops)
    if here != there:
        fix = "drop as often: in eval mode, or at rate 0, a port does not"
        if len(our_drops) == len(their_drops):
            fix = "drop where PyTorch does, and in its order, in which the masks are given"
        yield Explanation(f"here the port drops {_times(here)}, PyTorch {_times(there)}", fix)
    for drop, ours in zip(their_drops, our_drops, strict=False):
        if drop.window in edge.windows and ours.rate != drop.rate:
            yield Explanation(
                f"the port drops at rate {ours.rate:g}, PyTorch at {drop.rate:g}", f"pass rate={drop.rate:g}"
            )
        if drop.window in edge.windows and 0 in ours.broadcast:
            meaning = "the port drops the same in all of the batch, PyTorch in each by itself (Flax's attention?)"
            yield Explanation(meaning, "pass broadcast_dropout=False to Flax's attention")
        elif drop.window in edge.windows and drop.whole_channels != bool(ours.broadcast):
            words = ("elements", "whole channels")[:: 1 if drop.whole_channels else -1]
            fix = f"pass broadcast_dims={(1, 2) if drop.whole_channels else ()} to nnx.Dropout"
            yield Explanation(f"the port drops {words[0]}, PyTorch {words[1]}", fix)


def _times(count: int) -> str:
    return ("never", "once", "twice")[count] if count < 3 else f"{count} times"


def _other_layers(subject: Subject, edge: Edge) -> Iterator[Explanation]:
    """Layers inside an edge that the port does not call, or that return another shape there."""
    calls = subject.exact.recording.calls
    for call in (calls[window] for window in edge.windows[:-1]):
        if (layer := subject.uncalled.get(call.key)) is not None and _is_unused(subject, layer):
            yield Explanation(f"PyTorch calls {call.name} here, the port does not", f"call {call.name}")
        if shapes := subject.misshapen.get(call.key):
            fix = (
                "unless something crops it, look at padding (nnx.Conv's is SAME, PyTorch's 0), strides, kernel_dilation"
            )
            yield Explanation(f"the port's {call.name} returns {shapes.ours}, PyTorch's {shapes.theirs}", fix)


def _is_unused(subject: Subject, layer: str) -> bool:
    """Whether nothing that the port returns depends on a layer: its calls may be hidden, as inside of `nnx.remat`."""
    run = subject.exact.programs.free(subject.values(), subject.exact.recording.masks)
    gradients = [gradient for name, gradient in run.parameter_gradients.items() if name.rpartition(".")[0] == layer]
    return bool(gradients) and not any(map(np.any, gradients))


def _other_input(failure: Failure) -> Iterator[Explanation]:
    if failure.finding.kind == "layout":
        yield Explanation(
            f"the input is laid out otherwise: {failure.finding.diagnosis}", "pass flax_batch in the port's layout"
        )


def _of_statistic(subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """Batch norm's running statistics with another momentum or variance."""
    finding = failure.finding
    name = _weight_name(subject, finding)
    theirs = subject.weight_pairs[name]
    old, new = subject.exact.state[theirs], subject.exact.recording.buffers[theirs]
    momentum = subject.source.modules[theirs.rpartition(".")[0]].attributes.get("momentum")
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


_FIRST_MOMENTS = ("exp_avg of ", "momentum_buffer of ")


class StepFailure(NamedTuple):
    """The first step that differs."""

    number: int  # from 1
    here: list[Failure]  # all that differs after it
    failure: Failure  # a parameter, if one does
    kind: str  # what is kept of the parameter; "" for itself
    ours: str  # the parameter, in the port


def step_failure(subject: Subject, failures: Sequence[Failure]) -> StepFailure:
    """Where the steps begin to differ."""
    place, weights = failures[0].finding.place, subject.exact.port.weights
    here = [failure for failure in failures if failure.finding.place == place]
    parameters = [failure for failure in here if failure.finding.quantity in weights]
    # One bias where PyTorch has two differs anyhow, and tells of nothing else.
    parameters.sort(key=lambda failure: subject.weight_pairs[failure.finding.quantity] in subject.exact.state.seconds)
    failure = next(iter(parameters), here[0])
    return StepFailure(int(place.split()[1]), here, failure, *kept_of(failure.finding.quantity, weights))


def _of_step(subject: Subject, failures: Sequence[Failure], steps: Trajectory) -> Iterator[Explanation]:
    """Other gradients or another rate, as far as the arrays tell."""
    step, here, failure, kind, ours = step_failure(subject, failures)
    names = {kept_of(each.finding.quantity, subject.exact.port.weights)[1] for each in here}
    if {subject.weight_pairs[name] for name in names} <= subject.exact.state.seconds.keys():
        meaning = "the port has one bias where PyTorch trains two, which it adds up: it moves half as far, decay apart"
        fix = (
            "give both linear layers of the cell a bias, or double its updates (docs/porting/pitfalls); or pass steps=0"
        )
        yield Explanation(meaning, fix)
        return
    for each in here:
        if each.finding.quantity.startswith(_FIRST_MOMENTS) and each.finding.kind == "scale":
            factor = each.finding.diagnosis.removeprefix("it is ")
            meaning = f"the port's optimizer gets other gradients: their first moment is {factor}"
            yield Explanation(meaning, "clip and average them as PyTorch does")
    if not kind:
        theirs = subject.weight_pairs[ours]
        before = steps.sketches[step - 2][""][theirs] if step > 1 else sketch(subject.exact.state[theirs])
        before = in_flax(before, subject.exact.port.weights[ours].layout)
        seen = classify(failure.ours - before, failure.theirs - before)
        if seen.kind == "scale":
            fix = "compare learning rates and schedules; optax counts steps from 0, a scheduler's step comes last"
            yield Explanation(f"the port's step is {seen.seen.removeprefix('it is ')}", fix)
