"""Why a port differs: PyTorch is run again with a call changed, until it gives what the port gives.

And with all calls changed alike: a helper of the port's may be wrong wherever it is used.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from jaxloss.parity._change import Change, Choice
from jaxloss.parity._changes import insertions
from jaxloss.parity._diagnosis import edge_of
from jaxloss.parity._faults import matches
from jaxloss.parity._findings import Explanation, Failure
from jaxloss.parity._layout import Layout, permuted
from jaxloss.parity._live import Live
from jaxloss.parity._original import Functions, isolated
from jaxloss.parity._state_dict import to_numpy
from jaxloss.parity._step_diagnosis import explain_step
from jaxloss.parity._subject import Subject

NEAR = 4  # windows before an edge in which something else is looked for


def explain(live: Live, subject: Subject, failures: Sequence[Failure]) -> Iterator[Explanation]:
    """Everything that PyTorch, changed, explains of the first failure."""
    place = failures[0].finding.place
    if place.startswith("step "):
        yield from explain_step(live, subject, failures)
    elif place == "loss":
        yield from _of_loss(live, subject, failures[0])
    elif place in subject.places:
        yield from _of_edge(live, subject, failures[0])
    else:
        yield from _of_layer(live, subject, failures[0])


def _of_layer(live: Live, subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """A changed call inside the layer that gives the port's output from the same inputs."""
    pair = next(pair for pair in subject.pairs if subject.title(pair) == failure.finding.place)
    call = next(call for call in subject.exact.recording.calls if call.key == pair.theirs)

    def run(functions: Functions) -> np.ndarray:
        layer = live.original().layers[call.name]  # anew: a run moves its running statistics
        inputs = [torch.from_numpy(array) for array in call.inputs]
        with torch.no_grad(), isolated(torch.float64), functions:
            return to_numpy(layer(*inputs))

    yield from _changed(run, pair.output, failure.ours, partial(Functions, 0, inside=True))
    yield from _inserted(call.output, pair.output, failure.ours)


def _of_edge(live: Live, subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """A changed call between two layers that gives what arrives after it in the port."""
    pair, call, windows, _ = edge_of(subject, failure)
    theirs = subject.exact.recording.outputs if call is None else call.inputs[0]
    layout = subject.batch.layout if pair is None else pair.inputs[0]
    assert layout is not None

    def run(functions: Functions) -> np.ndarray:
        original = live.original()
        with torch.no_grad():
            calls, outputs = original.forward(original.cast(live.inputs), functions)
        if pair is None:
            return to_numpy(outputs)
        return next(call.inputs[0] for call in calls if call.key == pair.theirs)

    yield from _changed(run, layout, failure.ours, partial(Functions, live.seed, windows=windows))
    yield from _inserted(theirs, layout, failure.ours)
    # What joins this edge, like a gate, may have been computed before it.
    before = range(max(0, windows.start - NEAR), windows.start)
    yield from _changed(run, layout, failure.ours, partial(Functions, live.seed, windows=before))


def _changed(
    run: Callable[[Functions], np.ndarray], layout: Layout, ours: np.ndarray, watch: Callable[..., Functions]
) -> Iterator[Explanation]:
    """Runs with one change after the other, and yields those that give ours."""
    probe = watch()
    run(probe)
    for choice, fix in _choices(probe.alternatives):
        try:
            result = run(watch(choice=choice))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            continue  # it does not fit what follows
        if _equals(result, layout, ours):
            yield Explanation(choice.meaning, fix)


def _choices(alternatives: Sequence[Sequence[Change]]) -> Iterator[tuple[Choice, str]]:
    """Each call's, with the fix, and then those that several calls have."""
    counts: Counter[Choice] = Counter()
    fixes: dict[Choice, str] = {}
    for call, changes in enumerate(alternatives):
        before: Counter[str] = Counter()
        for change in changes:
            each = Choice(None, change.meaning, before[change.meaning])
            before[change.meaning] += 1
            counts[each] += 1
            fixes[each] = change.fix
            if not change.together:
                yield each._replace(call=call), change.fix
    yield from ((each, fixes[each]) for each, count in counts.items() if count > 1)


def _equals(result: np.ndarray, layout: Layout, ours: np.ndarray) -> bool:
    """Whether they are, also in where they are not finite: a softmax over nothing is NaN."""
    if result.shape != layout.merged:
        return False
    theirs = layout.to_flax(result)
    finite = np.isfinite(ours)
    return bool(finite.any()) and np.array_equal(finite, np.isfinite(theirs)) and matches(ours[finite], theirs[finite])


def _inserted(theirs: np.ndarray, layout: Layout, ours: np.ndarray) -> Iterator[Explanation]:
    for change in insertions(torch.from_numpy(theirs)):
        if _equals(to_numpy(change.result()), layout, ours):
            yield Explanation(change.meaning, change.fix)


def _of_loss(live: Live, subject: Subject, failure: Failure) -> Iterator[Explanation]:
    """A changed loss that gives the port's value or gradient."""

    def run(functions: Functions) -> np.ndarray:
        outputs = torch.from_numpy(subject.exact.recording.outputs).requires_grad_()
        with isolated(torch.float64), functions:
            loss = live.objective(outputs)
        gradient = torch.autograd.grad(loss, outputs)[0]
        return to_numpy(gradient if failure.finding.quantity == "gradient" else loss)

    layout = subject.batch.layout if failure.finding.quantity == "gradient" else permuted((), ())
    assert layout is not None
    yield from _changed(run, layout, failure.ours, partial(Functions, 0, inside=True))
