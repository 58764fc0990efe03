"""Cold starts: importing, the first call of a loss and the first step of a training, each in processes of their own.

With JAX's persistent compilation cache means with one that an untimed start has filled. JAX keeps no program there that
took less than a second to compile, by default; here, as in `python -m train`, it keeps the quicker ones too.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import track
from rich.table import Table

from benchmarks.processes import answer
from benchmarks.timing import Times, told

OURS, OPTAX, EAGER, CNN, NET = "jaxloss", "optax", "PyTorch eager", "cnn", "net"  # programs of benchmarks.cold
CACHED = ", cached"
CASES = {"a loss": (OURS, OURS + CACHED, OPTAX, OPTAX + CACHED, EAGER)}
CASES |= {f"training, {model}": (model, model + CACHED) for model in (CNN, NET)}
QUICK = {"a loss": (OURS, OURS + CACHED, EAGER), f"training, {NET}": (NET,)}


def environment(cache: str | None) -> dict[str, str]:
    """Of a process that keeps its programs in a folder, or nowhere; an accelerator is shared with this process."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if cache is None:
        return shared | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return shared | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def measure(turns: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for every stage of each case; a fifth of the turns, each of one start of everything in random order."""
    for case, names in (QUICK if quick else CASES).items():
        with ExitStack() as stack:
            folders = {name: stack.enter_context(TemporaryDirectory()) for name in names if name.endswith(CACHED)}

            def start(name: str, folders: dict[str, str] = folders) -> dict[str, float]:
                return answer("benchmarks.cold", name.removesuffix(CACHED), **environment(folders.get(name)))

            for name in folders:
                start(name)
            starts: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _ in track(range(max(turns // 5, 1)), description=f"starting: {case}", transient=True):
                for name in random.sample(names, len(names)):
                    starts[name].append(start(name))
        for stage in starts[names[0]][0]:
            having = [name for name in names if stage in starts[name][0]]
            times = {name: [1e3 * each[stage] for each in starts[name]] for name in having}
            yield {"case": case, "of": stage, "milliseconds": times}


def told_alone(times: Times, name: str) -> str:
    """A median with its quartiles, for a table."""
    return "{median:,.0f} ({q1:,.0f}-{q3:,.0f})".format(**times[name]) if name in times else ""


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Medians and quartiles in milliseconds, and ratios of the first column to the others."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        stages = [row for row in rows if row["case"] == case]
        first, *others = stages[0]["milliseconds"]
        table = Table(case, f"{first}, ms", *(f"{other}, ms" for other in others), *(f"/ {other}" for other in others))
        for row in stages:
            times = row["milliseconds"]
            ratios = (told(times, first, other) for other in others)
            table.add_row(row["of"], *(told_alone(times, name) for name in (first, *others)), *ratios)
        found.append(table)
    return found
