"""`python -m benchmarks`: every speed and memory figure of the README, side by side with what one would use instead.

Answers are compared before anything is timed. Needs the extra `test`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from benchmarks import linear, losses
from benchmarks.timing import about, pin_malloc

SUITES = {"losses": losses, "linear": linear}


@dataclass(frozen=True)
class Options:
    """Time jaxloss against its peers, interleaved in one run."""

    suite: Literal["losses", "linear", "all"] = "all"
    """What to measure."""
    turns: int = 40
    """Turns of each implementation and case, of five timed calls each (fewer where a call takes long)."""
    json_dir: Path | None = None
    """Also write SUITE-DEVICE.json here."""


def main() -> None:
    """Measure, print, and write the results if asked."""
    options = tyro.cli(Options, prog="python -m benchmarks")
    pin_malloc()
    console = Console()
    console.print(about())
    for name in SUITES if options.suite == "all" else [options.suite]:
        rows = SUITES[name].measure(options.turns)
        console.print(*SUITES[name].tables(rows))
        if options.json_dir:
            file = options.json_dir / f"{name}-{about()['device']}.json"
            file.write_text(json.dumps(about() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
