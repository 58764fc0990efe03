"""`python -m benchmarks`: every speed and memory figure of the README, side by side with what one would use instead.

Answers are compared before anything is timed. Needs the extra `test`.
"""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from benchmarks import accuracy, linear, losses, train
from benchmarks.timing import PLATFORM, about, pin_malloc

SUITES = {"losses": losses, "linear": linear, "train": train, "accuracy": accuracy}
PINNED = ("losses", "linear")  # a whole program is timed as it runs for users


@dataclass(frozen=True)
class Options:
    """Time jaxloss against its peers, interleaved in one run."""

    suite: Literal["losses", "linear", "train", "accuracy", "all"] = "all"
    """What to measure. All is the first three: accuracy needs MNIST, and hours without a GPU."""
    turns: int = 40
    """Turns of each implementation and case, of five timed calls each (fewer where a call takes long)."""
    json_dir: Path | None = None
    """Also write SUITE-PLATFORM.json here, such as losses-cpu.json."""


def main() -> None:
    """Measure, print, and write the results if asked."""
    options = tyro.cli(Options, prog="python -m benchmarks")
    if options.suite == "all":
        for name in ("losses", "linear", "train"):
            subprocess.run([sys.executable, "-m", "benchmarks", *sys.argv[1:], "--suite", name], check=True)
        return
    if options.suite in PINNED:
        pin_malloc()
    console = Console()
    console.print(about())
    file = options.json_dir and options.json_dir / f"{options.suite}-{PLATFORM}.json"
    rows: list[dict[str, Any]] = []
    with suppress(KeyboardInterrupt):  # what was measured until then is shown
        for row in SUITES[options.suite].measure(options.turns):
            rows.append(row)
            if file:
                file.write_text(json.dumps(about() | {"rows": rows}, indent=1) + "\n")
    console.print(*SUITES[options.suite].tables(rows))


if __name__ == "__main__":
    main()
