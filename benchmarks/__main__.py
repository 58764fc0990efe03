"""`python -m benchmarks`: every speed and memory figure of the README, side by side with what one would use instead.

Answers are compared before anything is timed. Needs the extra `test`; torch.compile needs a C++ compiler.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, arg

from benchmarks import plots
from benchmarks.timing import LEFT_OUT, PLATFORM, about, pin_malloc, quartiles

ALL = ("losses", "linear", "train", "start")
PINNED = ("losses", "linear")  # a whole program is timed as it runs for users
TURNS, QUICK_TURNS = 40, 2
WIDE = 132  # columns of what is not a terminal
ROUGH = "--quick: few turns, small shapes. These figures are rough, and say nothing."


@dataclass(frozen=True)
class Options:
    """Time jaxloss against its peers, interleaved in one run."""

    suite: Literal["losses", "linear", "train", "start", "compiled", "accuracy", "all"] = "all"
    """What to measure. All is all but compiled, which needs XLA's compilers for GPU and TPU, and accuracy, which needs
    MNIST, and hours without a GPU."""
    quick: bool = False
    """Everything once, in seconds, to see that it runs: a few small shapes. Its figures are rough."""
    turns: int | None = None
    """Turns of each implementation and case. A turn's figure is the median of five timed calls, of more short ones and
    of fewer long ones. By default 40, quick 2. Three processes share those of the losses on CPU."""
    json: Annotated[Path | None, arg(metavar="DIR")] = None
    """Also write SUITE-PLATFORM.json into this folder, such as losses-cpu.json."""
    plot: Annotated[Path | None, arg(metavar="DIR")] = None
    """Also draw SUITE-PLATFORM-*.svg into this folder. `python -m benchmarks.plots` draws what was measured earlier."""


def main() -> None:
    """Measure, print, write and draw."""
    options = tyro.cli(Options, prog="python -m benchmarks", config=(FlagCreatePairsOff,))
    if options.suite == "all":
        for name in ALL:
            subprocess.run([sys.executable, "-m", "benchmarks", *sys.argv[1:], "--suite", name], check=True)
        return
    if options.suite in PINNED:
        pin_malloc()
    run(options)


def run(options: Options) -> None:
    """One suite, until it ends or is interrupted."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    console, suite = Console(width=wide), import_module(f"benchmarks.{options.suite}")
    name = f"{options.suite}-{PLATFORM}"
    results: dict[str, Any] = about() | {"quick": options.quick, "rows": []}
    console.print({key: value for key, value in results.items() if key != "rows"})
    for what, why in LEFT_OUT.items():
        console.print(f"{what} is left out: it {why}", markup=False)
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
    turns = options.turns or (QUICK_TURNS if options.quick else TURNS)
    order = getattr(suite, "order", lambda row: 0)
    with suppress(KeyboardInterrupt):  # what was measured until then is shown
        for row in suite.measure(turns, quick=options.quick):
            results["rows"] = sorted((*results["rows"], summary(row)), key=order)
            if options.json:
                (options.json / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(*suite.tables(results["rows"]))
    if options.plot:
        console.print(*plots.draw(results["rows"], options.plot, name), sep="\n")
    if options.quick:
        console.print(ROUGH)


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """A row with medians and quartiles for its times."""
    times = row.get("milliseconds")
    return row if times is None else row | {"milliseconds": {name: quartiles(each) for name, each in times.items()}}


if __name__ == "__main__":
    main()
