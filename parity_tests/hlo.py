"""What crosses devices in a compiled program."""

import re
from typing import Any, NamedTuple

import numpy as np

GATHERS = ("all-gather", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    kind: str
    sizes: list[int]
    """Elements of each result on one device."""
    in_loop: bool


def collectives(compiled: Any) -> list[Collective]:
    """Every collective operation of a compiled program."""
    pattern = r"= (\(.*?\)|\S+) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\("
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(pattern, line):
            shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
            found.append(Collective(match[2], sizes, "while/body" in line))
    return found


def gathered_sizes(compiled: Any) -> list[int]:
    """Elements of every result of an operation that moves arrays whole."""
    return [size for found in collectives(compiled) if found.kind in GATHERS for size in found.sizes]
