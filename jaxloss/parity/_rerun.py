"""Why a port differs: PyTorch is run again with a call changed, until it gives what the port gives.

And with all calls changed alike: a helper of the port's may be wrong wherever it is used.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from jaxloss.parity._change import Change, Choice
from jaxloss.parity._changes import insertions
from jaxloss.parity._compare import norm
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
NEARLY = 1e-4  # of a difference may remain unexplained


class Candidate(NamedTuple):
    """An explanation, and the share of the difference that it leaves."""

    rest: float
    explanation: Explanation


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

    changed = _changed(run, pair.output, failure.ours, partial(Functions, 0, inside=True))
    yield from _surest(changed, _inserted(call.output, pair.output, failure.ours))


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

    def before() -> Iterator[Candidate]:
        """What joins this edge, like a gate, may have been computed before it: in one window more, time after time."""
        for start in reversed(range(max(0, windows.start - NEAR), windows.start)):
            watch = partial(Functions, live.seed, windows=range(start, windows.stop))
            run(seen := Functions(live.seed, windows=range(start + 1, windows.stop)))
            yield from _changed(run, layout, failure.ours, watch, tried=len(seen.alternatives))

    changed = _changed(run, layout, failure.ours, partial(Functions, live.seed, windows=windows))
    yield from _surest(changed, _inserted(theirs, layout, failure.ours), before())


def _surest(*found: Iterator[Candidate]) -> Iterator[Explanation]:
    """What gives ours, and then what nearly does: a constant may have other digits besides, as a float32 table has."""
    near: list[Candidate] = []
    for candidate in itertools.chain(*found):
        if candidate.rest == 0:
            yield candidate.explanation
        else:
            near.append(candidate)
    for rest, explanation in sorted(near, key=attrgetter("rest")):
        yield explanation._replace(meaning=f"{explanation.meaning}; {rest:.0e} of the difference remains")


def _changed(
    run: Callable[[Functions], np.ndarray],
    layout: Layout,
    ours: np.ndarray,
    watch: Callable[..., Functions],
    tried: int = 0,
) -> Iterator[Candidate]:
    """Runs with one change after the other, and yields those that give ours, or nearly.

    So many of the last calls were tried one by one.
    """
    theirs = run(probe := watch())
    for choice, fix in _choices(probe.alternatives, tried):
        try:
            result = run(watch(choice=choice))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            continue  # it does not fit what follows
        if (rest := _rest(result, theirs, layout, ours)) is not None:
            yield Candidate(rest, Explanation(choice.meaning, fix))


def _choices(alternatives: Sequence[Sequence[Change]], tried: int) -> Iterator[tuple[Choice, str]]:
    """Each call's, with the fix, but not of so many last ones; and then those that several calls have."""
    counts: Counter[Choice] = Counter()
    fixes: dict[Choice, str] = {}
    for call, changes in enumerate(alternatives):
        before: Counter[str] = Counter()
        for change in changes:
            each = Choice(None, change.meaning, before[change.meaning])
            before[change.meaning] += 1
            counts[each] += 1
            fixes[each] = change.fix
            if call < len(alternatives) - tried and not change.together:
                yield each._replace(call=call), change.fix
    yield from ((each, fixes[each]) for each, count in counts.items() if count > 1)


def _rest(result: np.ndarray, theirs: np.ndarray, layout: Layout, ours: np.ndarray) -> float | None:
    """Which share of the difference remains: 0 for rounding's, None for more than a small one.

    What is not finite must be so in both: a softmax over nothing is NaN.
    """
    if result.shape != layout.merged:
        return None
    changed = layout.to_flax(result)
    finite = np.isfinite(ours)
    if not finite.any() or not np.array_equal(finite, np.isfinite(changed)):
        return None
    if matches(ours[finite], changed[finite]):
        return 0.0
    if theirs.shape != layout.merged:
        return None
    difference = norm((ours - layout.to_flax(theirs))[finite])
    rest = norm((ours - changed)[finite])
    return float(rest / difference) if rest < NEARLY * difference else None


def _inserted(theirs: np.ndarray, layout: Layout, ours: np.ndarray) -> Iterator[Candidate]:
    for change in insertions(torch.from_numpy(theirs)) if np.issubdtype(theirs.dtype, np.floating) else ():
        if (rest := _rest(to_numpy(change.result()), theirs, layout, ours)) is not None:
            yield Candidate(rest, Explanation(change.meaning, change.fix))


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
    yield from _surest(_changed(run, layout, failure.ours, partial(Functions, 0, inside=True)))
