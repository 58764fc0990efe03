"""Measurements in processes of their own: cold starts, peak memory, fake devices, what differs between processes."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

Row = dict[str, Any]
Measure = Callable[..., Iterator[Row]]


def answer(module: str, *arguments: object, **environment: str) -> Any:
    """What `python -m module arguments...` prints last, read as JSON; a failure raises `CalledProcessError`."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(measure: Measure, turns: int, *, quick: bool, processes: int) -> Iterator[list[Row]]:
    """All rows so far, whenever something was measured.

    One process is this one. Several are new ones, one after another: each measures all rows, and the times of a row
    are put together. A process that fails ends the command.
    """
    rows: list[Row] = []
    for _ in range(processes):
        found = measure(turns, quick=quick) if processes == 1 else _in_new_process(measure, turns, quick)
        for number, row in enumerate(found):
            if number == len(rows):
                rows.append(row)
            else:
                for name, times in row["milliseconds"].items():
                    rows[number]["milliseconds"][name] += times
            yield rows


def _in_new_process(measure: Measure, turns: int, quick: bool) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, measure, turns, quick))
    process.start()
    sender.close()
    with suppress(EOFError):
        while True:
            yield receiver.recv()
    process.join()
    if process.exitcode:
        sys.exit(1)


def _send(sender: Connection, measure: Measure, turns: int, quick: bool) -> None:
    with suppress(KeyboardInterrupt):
        for row in measure(turns, quick=quick):
            sender.send(row)
