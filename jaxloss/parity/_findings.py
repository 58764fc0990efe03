"""The comparisons of a check, one by one."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxloss.parity._background import Background
from jaxloss.parity._compare import Outcome, Rounding, compare, mutants, norm
from jaxloss.parity._detail import Detail
from jaxloss.parity._layout import Layout

FLOAT64_TOLERANCE = 1e-12
SAMPLE = 2**18  # elements of a large array that are compared again, wrong


@dataclass
class Finding:
    """One comparison of one array: where, what, and how it came out.

    Attributes:
        place: a layer's name, or an edge: "between layer2 and fc".
        quantity: "output", "gradient of input", …
        dtype: in which it was computed.
        error: the relative L2 distance.
        bound: the largest error that passes.
        problem: why nothing can be said of the error, in words; empty if something can.
        negligible: whether it is next to nothing, and only held to be that.
        kind: if it failed: semantic, precision, layout, scale or localised; empty where nothing could be compared.
        diagnosis: the reason in one sentence, as far as it was found.
        fix: the remedy.
        detail: element by element; None of what has no elements in both, or only an image of them.
    """

    place: str
    quantity: str
    dtype: str
    error: float
    bound: float
    problem: str = ""
    negligible: bool = False
    kind: str = ""
    diagnosis: str = ""
    fix: str = ""
    detail: Detail | None = None

    @property
    def ok(self) -> bool:
        """Whether the arrays agree."""
        return not self.problem and self.error <= self.bound

    @property
    def ratio(self) -> float:
        """The error as a multiple of what is allowed; infinite where nothing is, or nothing can be compared."""
        if self.problem or np.isnan(self.error):
            return np.inf
        return self.error / self.bound if self.bound else np.inf if self.error else 0.0

    def __str__(self) -> str:
        """One line, or three where there is a diagnosis."""
        what = f"{self.place}: {self.quantity}"
        how = self.problem or f"differs by {self.error:.2g} of its norm ({self.bound:.1g} allowed, {self.dtype})"
        lines = [f"{what} {how}" + (f" [{self.kind}]" if self.kind else "")]
        lines += [line for line in (self.diagnosis, self.fix and f"Fix: {self.fix}") if line]
        return "\n  ".join(lines)


@dataclass
class Failure:
    """A finding that failed, and its arrays, in Flax's layout."""

    finding: Finding
    ours: np.ndarray
    theirs: np.ndarray


class Explanation(NamedTuple):
    """Why an array differs, and the remedy."""

    meaning: str
    fix: str = ""
    kind: str = ""  # if the class seen from the numbers alone was a guess


class Findings:
    """Collects findings in the order in which a difference would arise."""

    def __init__(self) -> None:
        """Starts empty."""
        self.all: list[Finding] = []
        self.failures: list[Failure] = []
        self.notes: list[str] = []
        self.noise: dict[str, tuple[float, float]] = {}
        self.controls = (0, 0)  # wrong arrays refused, of how many
        self.background = Background()

    def add(
        self,
        place: str,
        quantity: str,
        ours: Any,
        theirs: np.ndarray,
        layout: Layout | None = None,
        *,
        tolerance: float = FLOAT64_TOLERANCE,
        floor: float = 0.0,
        may_be_zero: bool = False,
    ) -> Finding:
        """Compares two float64 arrays, and if they agree, wrong versions of ours as well.

        With a layout, which leads from them to PyTorch's, their elements are looked at.

        Where zero is a possible result, what is zero but for rounding is only held to be that, and says nothing.
        """
        if np.iscomplexobj(theirs):
            ours, theirs, layout = _parts(ours), _parts(theirs), None
        ours = np.asarray(ours)

        def outcome(array: np.ndarray, expected: np.ndarray) -> Outcome:
            return compare(array, expected, tolerance=tolerance, floor=floor)

        result = outcome(ours, theirs)
        negligible = may_be_zero and norm(theirs) <= 100 * floor
        dtype = str(ours.dtype)
        finding = Finding(place, quantity, dtype, result.error, result.bound, result.problem, negligible)
        finding.detail = Detail.of(ours, theirs, layout) if layout else None
        self.all.append(finding)
        if not finding.ok:
            self.failures.append(Failure(finding, ours, theirs))
        elif not negligible:
            sample = slice(None, None, -(-ours.size // SAMPLE))
            some, their_some = ours.ravel()[sample], theirs.ravel()[sample]
            wrong = mutants(some, outcome(some, their_some).bound)
            caught = sum(not outcome(array, their_some).ok for array in wrong.values())
            self.controls = self.controls[0] + caught, self.controls[1] + len(wrong)
        return finding

    def add_rounding(
        self, place: str, quantity: str, dtype: str, rounding: Rounding, detail: Detail | None = None
    ) -> None:
        """Judges an error against float64."""
        finding = Finding(place, quantity, dtype, rounding.ours, rounding.bound, rounding.problem, detail=detail)
        self.all.append(finding)

    def fail(self, place: str, quantity: str, problem: str) -> None:
        """Notes what cannot be compared."""
        self.all.append(Finding(place, quantity, "", np.inf, 0.0, problem=problem))


def _parts(array: Any) -> np.ndarray:
    """Real and imaginary parts, along a new last axis."""
    return np.stack([np.real(array), np.imag(array)], -1)
