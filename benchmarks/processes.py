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


def answer(module: str, *arguments: object, **environment: str) -> Any:
    """What `python -m module arguments...` prints last, read as JSON; a failure raises `CalledProcessError`."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    return json.loads(done.stdout.splitlines()[-1])


def in_new_processes(count: int, measure: Callable[..., Iterator[Row]], *arguments: Any) -> list[Row]:
    """The rows that `measure` yields, in so many processes one after another: a row's times are put together.

    A process that fails ends the command.
    """
    rows, *again = [_in_new_process(measure, arguments) for _ in range(count)]
    for others in again:
        for row, other in zip(rows, others, strict=True):
            for name, times in other["milliseconds"].items():
                row["milliseconds"][name] += times
    return rows


def _in_new_process(measure: Callable[..., Iterator[Row]], arguments: tuple) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, measure, arguments))
    process.start()
    sender.close()
    rows = []
    with suppress(EOFError):
        while True:
            rows.append(receiver.recv())
    process.join()
    if process.exitcode:
        sys.exit(1)
    return rows


def _send(sender: Connection, measure: Callable[..., Iterator[Row]], arguments: tuple) -> None:
    with suppress(KeyboardInterrupt):
        for row in measure(*arguments):
            sender.send(row)
