"""A report as one page that needs no network and, but to sort and filter, no scripts."""

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jaxloss.parity._background import Errors, Stage, StepDistance
from jaxloss.parity._compare import HALF_UNIT
from jaxloss.parity._detail import Detail, bin_end
from jaxloss.parity._environment import environment
from jaxloss.parity._findings import Finding
from jaxloss.parity._report import Report

_FOLDER = Path(__file__).parent / "templates"
# What a bar shows, from one end to the other, as decimal logarithms of the error over what it is measured by; and
# from where on it is warm, hot and very hot.
_ROUNDED, _EXACT = (-2.0, 6.0), (-5.0, 12.0)
_HEAT, _EXACT_HEAT = (2.0, 8.0, 100.0), (1.0, 1.0, 1e4)
_DIGITS = {"float64": 17, "float32": 9, "float16": 5, "bfloat16": 4}  # that tell any two numbers apart
_BARS = 24  # of a histogram, side by side


@dataclass
class Measure:
    """An error as a bar."""

    dtype: str
    errors: Errors
    ratio: float  # to what it is measured by; infinite of NaN
    share: float  # of the bar, in percent
    tick: float  # where the ratio is 1
    heat: int  # 0 to 3


@dataclass
class Row:
    """A place."""

    place: str
    findings: list[Finding]
    stage: Stage | None
    forced: list[Measure]
    free: list[Measure]
    first: bool  # whether the first divergence is here

    @property
    def failed(self) -> int:
        """How many tensors differ."""
        return sum(not finding.ok for finding in self.findings)


def save_page(report: Report, path: Path) -> None:
    """Writes the page. What UTF-8 cannot hold, lone surrogates, is written as escapes."""
    rows, dtypes = _rows(report), _dtypes(report)
    tabled = {row.place for row in rows}
    _save(
        "report",
        path,
        report=report,
        first=report.first_divergence,
        name=report.background.name or "The port",
        differ=len(list(report.failures())),
        rows=rows,
        steps={place: findings for place, findings in report.places().items() if place not in tabled},
        charts=[_chart(dtype, steps) for dtype, steps in report.background.steps.items() if steps],
        dtypes=dtypes,
        shown=_shown(report, dtypes),
        histogram=_histogram,
        digits=_DIGITS,
    )


def save_index(checks: Sequence[tuple[str, Any]], path: Path) -> None:
    """Writes the list of a test run's checks, each with its test's name, which links to their pages."""
    _save("index", path, checks=checks, failed=sum(not check.ok for _, check in checks), versions=environment())


def _save(template: str, path: Path, **content: Any) -> None:
    loader = FileSystemLoader(_FOLDER)
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"number": _number, "times": _times, "power": _power}
    style, script = ((_FOLDER / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    page = jinja.get_template(f"{template}.html.jinja").render(
        **content,
        style=Markup(style),  # both are files of ours; the policy allows nothing else
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _dtypes(report: Report) -> list[str]:
    """Those in which layers were compared, float64 last."""
    found = dict.fromkeys(dtype for stage in report.background.stages.values() for dtype in stage.forced)
    return sorted(found, key=lambda dtype: dtype == "float64")


def _shown(report: Report, dtypes: Sequence[str]) -> str:
    """The dtype whose bars are shown first: where it differs."""
    first = report.first_divergence
    return first.dtype if first and first.dtype in dtypes else next(iter(dtypes), "")


def _rows(report: Report) -> list[Row]:
    """Layers and edges in the order of the forward pass, then all else but the steps."""
    stages, places = report.background.stages, report.places()
    first = report.first_divergence
    rows = []
    for place in dict.fromkeys([*stages, *places]):
        if place in stages or not place.startswith("step "):
            stage = stages.get(place)
            forced, free = ([_measure(*item) for item in each.items()] for each in _errors_of(stage))
            rows.append(Row(place, places.get(place, []), stage, forced, free, bool(first and first.place == place)))
    return rows


def _errors_of(stage: Stage | None) -> tuple[dict[str, Errors], dict[str, Errors]]:
    return (stage.forced, stage.free) if stage else ({}, {})


def _measure(dtype: str, errors: Errors) -> Measure:
    """In float64 by what is allowed; else by PyTorch's error, which may be 0 and then counts as half a unit."""
    exact = dtype == "float64"
    (low, high), heat = (_EXACT, _EXACT_HEAT) if exact else (_ROUNDED, _HEAT)
    reference = errors.reference if exact else max(errors.reference, HALF_UNIT[dtype])
    ratio = errors.ours / reference if reference else (math.inf if errors.ours else 0.0)
    ratio = math.inf if math.isnan(ratio) else ratio
    place = (math.log10(ratio) - low) / (high - low) if 0 < ratio < math.inf else float(ratio > 0)
    share, hot = 100 * min(max(place, 0.0), 1.0), sum(ratio > limit for limit in heat)
    return Measure(dtype, errors, ratio, round(share, 2), round(100 * -low / (high - low), 2), hot)


def _histogram(detail: Detail) -> dict[str, Any]:
    """Bars of a histogram: first those without error, then bins from the smallest error on, some together."""
    count = max(len(detail.ours), len(detail.theirs))
    ours, theirs = ([*counts, *[0] * (count - len(counts))] for counts in (detail.ours, detail.theirs))
    filled = [i for i in range(1, count) if ours[i] or theirs[i]]
    start = filled[0] if filled else 1
    together = -(-(count - start) // _BARS) or 1
    groups = [range(1), *(range(i, min(i + together, count)) for i in range(start, count, together))]
    bars = [
        {
            "end": bin_end(group[-1]),
            "ours": sum(ours[i] for i in group),
            "theirs": sum(theirs[i] for i in group) if detail.theirs else None,
        }
        for group in groups
    ]
    return {"bars": bars, "most": max((max(bar["ours"], bar["theirs"] or 0) for bar in bars), default=0)}


def _chart(dtype: str, steps: Sequence[StepDistance]) -> dict[str, Any]:
    """The steps of one dtype on a logarithmic axis: places from 0, left or bottom, to 1."""
    lines = {
        "ours": [step.ours for step in steps],
        "noise": [step.noise for step in steps],
        "allowed": [step.allowed for step in steps if step.allowed is not None],
    }
    logs = [math.log10(x) for line in lines.values() for x in line if 0 < x < math.inf] or [0.0]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)

    def height(x: float) -> float:
        return (math.log10(x) - low) / (high - low) if 0 < x < math.inf else float(x != 0)

    across = [i / max(len(steps) - 1, 1) for i in range(len(steps))]
    each = -(-(high - low) // 5)
    return {
        "dtype": dtype,
        "steps": steps,
        "lines": {
            name: list(zip(across, map(height, line), strict=True)) if line else [] for name, line in lines.items()
        },
        "decades": [(power, (power - low) / (high - low)) for power in range(low, high + 1, each)],
    }


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(exponent: int) -> str:
    """Of ten."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _number(x: float | None) -> str:
    """Two digits."""
    if x is None or not math.isfinite(x):
        return "not finite"
    if x == 0 or 0.01 <= abs(x) < 1000:
        return f"{x:.2g}"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _times(ratio: float) -> str:
    """How often."""
    if not math.isfinite(ratio):
        return "not finite"
    if ratio == 0:
        return "exact"
    digits = f"{ratio:.1f}" if 0.05 <= ratio < 10 else f"{ratio:,.0f}" if 10 <= ratio < 1e5 else _number(ratio)
    return f"{digits}\N{MULTIPLICATION SIGN}"
