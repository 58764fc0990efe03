"""What a check found: printed, as JSON, as a page and for CI systems."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text
from rich.tree import Tree

from jaxloss.parity._background import Background
from jaxloss.parity._findings import Finding

NAMED = 6  # tensors of a place that a line names


@dataclass
class Report:
    """The result of `check` and `replay`.

    Attributes:
        findings: every comparison, in the order in which a difference would arise.
        notes: what was not compared, and why.
        weight_map: from the port's names of weights to PyTorch's.
        noise: of each result in a rounded dtype, its relative distance from float64: the port's, PyTorch's.
        controls: how many wrong arrays were refused, of how many.
        weights_compared: whether the port came with weights; otherwise PyTorch's were copied.
        background: what the page tells beside the comparisons.
    """

    findings: list[Finding]
    notes: list[str] = field(default_factory=list)
    weight_map: dict[str, str] = field(default_factory=dict)
    noise: dict[str, tuple[float, float]] = field(default_factory=dict)
    controls: tuple[int, int] = (0, 0)
    weights_compared: bool = True
    background: Background = field(default_factory=Background)

    @property
    def ok(self) -> bool:
        """Whether everything agrees, something was compared, and every planted fault was caught."""
        return bool(self.findings) and self.first_divergence is None and self._controls_hold

    @property
    def first_divergence(self) -> Finding | None:
        """The first finding that failed, in the order of the forward pass, then of the backward pass."""
        return next(self.failures(), None)

    @property
    def _controls_hold(self) -> bool:
        return self.controls[0] == self.controls[1] > 0

    @property
    def minimum_detectable(self) -> float:
        """The smallest change of any compared tensor, relative to its norm, that would have failed."""
        exact = (f for f in self.findings if f.dtype == "float64" and not f.negligible)
        bounds = [f.bound for f in exact if np.isfinite(f.bound)]
        return max(bounds, default=np.inf)

    @property
    def worst(self) -> tuple[float, str]:
        """The largest error as a multiple of what is allowed, at most 1 in a right port, and where it is."""
        if not self.findings:
            return 0.0, "nothing was compared"
        worst = max(self.findings, key=lambda finding: finding.ratio)
        return worst.ratio, f"{worst.place}: {worst.quantity}" + (f", {worst.dtype}" if worst.dtype else "")

    @property
    def verdict(self) -> str:
        """Whether it is ok, and if not the first divergence with its fix, as the printed report begins."""
        return "\n".join(self._head())

    def failures(self) -> Iterator[Finding]:
        """Every finding that failed."""
        return (finding for finding in self.findings if not finding.ok)

    def __str__(self) -> str:
        """The verdict, the first divergence, and a line per place."""
        return "\n".join(self._lines())

    def __rich__(self) -> Tree:
        """A tree of places, the failed ones open."""
        tree = Tree(Text(self.verdict, style="bold green" if self.ok else "bold red"))
        for place, findings in self.places().items():
            failed = [finding for finding in findings if not finding.ok]
            style = "red" if failed else "green"
            branch = tree.add(Text(f"{place}: {_summary(findings)}", style=style))
            for finding in failed:
                branch.add(Text(str(finding), style="red"))
        return tree

    def _lines(self) -> Iterator[str]:
        yield from self._head()
        for place, findings in self.places().items():
            yield f"{_mark(findings)} {place}: {_summary(findings)}"
        for quantity, (ours, theirs) in self.noise.items():
            yield f"not judged: {quantity} {ours:.1e} from float64, PyTorch's {theirs:.1e}"

    def _head(self) -> Iterator[str]:
        if self.ok:
            weights = "" if self.weights_compared else " The port's own weights were not compared."
            yield f"ok: {len(self.findings)} tensors agree with PyTorch.{weights}"
            yield (
                f"A tensor off by {self.minimum_detectable:.1g} of its norm would have been caught; "
                f"{self.controls[0]} of {self.controls[1]} planted faults were."
            )
        elif (first := self.first_divergence) is not None:
            yield f"differs: {len(list(self.failures()))} of {len(self.findings)} tensors. The first:"
            yield f"  {first}".replace("\n", "\n  ")
        else:
            yield "nothing can be said: no tensor was compared, or a planted fault was not caught."
        yield from (f"note: {note}" for note in self.notes)

    def places(self) -> dict[str, list[Finding]]:
        """Findings by place, in order."""
        grouped: dict[str, list[Finding]] = {}
        for finding in self.findings:
            grouped.setdefault(finding.place, []).append(finding)
        return grouped

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Returns the report as a dict of plain values, and writes it to a file if there is a path.

        Numbers that JSON does not have (NaN and infinities) become null.
        """
        first = self.first_divergence
        content = {
            "ok": self.ok,
            "first_divergence": first and _with_verdict(first),
            "findings": [_with_verdict(finding) for finding in self.findings],
            "notes": self.notes,
            "weight_map": self.weight_map,
            "noise": self.noise,
            "weights_compared": self.weights_compared,
            "controls": {"caught": self.controls[0], "planted": self.controls[1]},
            "minimum_detectable": self.minimum_detectable,
            **asdict(self.background),
        }
        content = _plain(content)
        if path is not None:
            Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return content

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one page, complete without a network or scripts.

        It holds the verdict, the first divergence and its fix; every layer and edge with its error alone and in the
        network; of every tensor the worst elements and a histogram of errors in units of rounding (one unit in the
        last place of a number as large as the tensor's root mean square, in the dtype of the comparison); the
        optimizer's steps; the weights; and the versions.
        """
        from jaxloss.parity._html import save_page  # here, because only this needs Jinja

        save_page(self, Path(path))

    def to_junit(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JUnit XML, one test case per place, as GitHub, GitLab and Jenkins read it."""
        from jaxloss.parity._junit import save_junit

        save_junit(self, Path(path))


def _with_verdict(finding: Finding) -> dict[str, Any]:
    return asdict(finding) | {"ok": finding.ok}


def _plain(value: Any) -> Any:
    """The same in what JSON has."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return value


def _mark(findings: Sequence[Finding]) -> str:
    return "FAIL" if not all(f.ok for f in findings) else "  ok"


def _summary(findings: Sequence[Finding]) -> str:
    worst = max(findings, key=lambda finding: (not finding.ok, finding.ratio))
    failed = [f.quantity for f in findings if not f.ok]
    names = list(dict.fromkeys(failed))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    what = ", ".join(names[:NAMED]) + more if failed else f"{len(findings)} tensors"
    return f"{what}; worst {worst.error:.1e} of {worst.bound:.1e} allowed ({worst.quantity}, {worst.dtype})"
