"""The pytest plugin: a fixture that checks ports, a line that sums the checks up, and a folder with their reports.

It stands beside the package, not in it, because pytest loads it before any conftest.py: importing jaxloss here would
import JAX before a conftest can set the variables that JAX reads.
"""

import math
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from jaxloss.parity import Report


class Checked(NamedTuple):
    """What one check of a test came to."""

    name: str  # of PyTorch's module
    ok: bool
    verdict: str
    tensors: int
    ratio: float  # the largest error over what is allowed
    worst: str  # where that is
    caught: int  # planted faults
    planted: int
    page: str | None  # a file in the folder of reports


CHECKED = pytest.StashKey[list[Checked]]()
FOLDER = pytest.StashKey[Path | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.getgroup("jaxloss", "jaxloss.parity").addoption(
        "--parity-report",
        metavar="DIR",
        help="write a page for every check of the parity fixture into this folder, and index.html, which lists them",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder, and has the process that prints sum up."""
    option = config.getoption("--parity-report")
    folder = config.stash[FOLDER] = Path(option).absolute() if option else None  # now: a test may go elsewhere
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"--parity-report: {error}") from error
    if not hasattr(config, "workerinput"):  # not one of xdist's
        config.pluginmanager.register(Summary(folder), "jaxloss-summary")


class Parity:
    """`jaxloss.parity` for a test: a check that finds a difference fails it, with the reason."""

    def __init__(self, node: pytest.Item) -> None:
        """Of one test; one that is run again starts anew."""
        self._node = node
        self._checked = node.stash[CHECKED] = []

    def check(self, *args: Any, **options: Any) -> "Report":
        """`jaxloss.parity.check`, with its arguments.

        Returns:
            The report, which is ok.

        Raises:
            AssertionError: the port differs; with the first divergence, its reason and its fix.
        """
        __tracebackhide__ = True
        from jaxloss import parity

        return self.judge(parity.check(*args, **options))

    def replay(self, *args: Any, **options: Any) -> "Report":
        """`jaxloss.parity.replay`, which needs no PyTorch, with its arguments; otherwise like `check`."""
        __tracebackhide__ = True
        from jaxloss import parity

        return self.judge(parity.replay(*args, **options))

    def judge(self, report: "Report") -> "Report":
        """Takes a report that was made elsewhere, as by a fixture of a module; otherwise like `check`."""
        __tracebackhide__ = True
        page = None
        if folder := self._node.config.stash[FOLDER]:
            page = _page_name(self._node.nodeid, len(self._checked))
            report.to_html(folder / page)
        ratio, worst = report.worst
        name, (caught, planted) = report.background.name, report.controls
        checked = Checked(name, report.ok, report.verdict, len(report.findings), ratio, worst, caught, planted, page)
        self._checked.append(checked)
        if not report.ok:
            raise AssertionError(report.verdict)
        return report


def _page_name(test: str, number: int) -> str:
    """A file name that tells the test, and is of this check alone."""
    file, colons, rest = test.partition("::")  # of a nodeid's slashes, those before are folders
    readable = re.sub(r"[^\w.-]+", "-", file.rpartition("/")[2] + colons + rest, flags=re.ASCII)[:80]
    return f"{readable}-{sha256(test.encode()).hexdigest()[:8]}-{number}.html"


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """Checks Flax ports against PyTorch: parity.check(original, port, batch) fails the test where they differ."""
    return Parity(request.node)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Sends what was checked with the report of the test: the checks may be those of another process."""
    report = yield
    report.parity = [tuple(checked) for checked in item.stash.get(CHECKED, [])] if report.when == "teardown" else []
    return report


class Summary:
    """What all checks of a run come to."""

    def __init__(self, folder: Path | None) -> None:
        """Nothing was checked yet."""
        self.folder = folder
        self.checked: list[tuple[str, Checked]] = []  # by test

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes the checks of a test."""
        self.checked += [(report.nodeid, Checked(*each)) for each in getattr(report, "parity", [])]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Prints the line, and writes the list of pages."""
        if not self.checked:
            return
        good = all(each.ok for _, each in self.checked)
        terminalreporter.write_line(self.line(), green=good, red=not good)
        if self.folder:
            from jaxloss.parity._html import save_index

            save_index(self.checked, self.folder / "index.html")
            terminalreporter.write_line(f"parity reports: {self.folder / 'index.html'}")

    def line(self) -> str:
        """In one."""
        checked = [each for _, each in self.checked]
        failed = sum(not each.ok for each in checked)
        worst = max(checked, key=lambda each: each.ratio)
        ratio = (
            f"{worst.ratio:.2f}" if worst.ratio < 1000 else "over 1000" if math.isfinite(worst.ratio) else "infinite"
        )
        caught, planted = (sum(counts) for counts in zip(*((c.caught, c.planted) for c in checked), strict=True))
        return (
            f"parity: {f'{failed} of {len(checked)} checks failed, ' if failed else ''}"
            f"{sum(each.tensors for each in checked)} tensors, worst ratio {ratio} ({worst.worst}), "
            f"{caught}/{planted} mutants killed"
        )
