"""What crosses devices in a compiled program."""

import math
import re
from typing import Any, NamedTuple

KINDS = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"


class Collective(NamedTuple):
    """One operation of a compiled program."""

    kind: str
    sizes: list[int]
    """Elements of each result on one device."""
    bytes: int
    """Of all results together on one device."""
    in_loop: bool


def collectives(compiled: Any) -> list[Collective]:
    """Every collective operation of a compiled program."""
    pattern = rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\("
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(pattern, line):
            shapes = re.findall(r"([a-z]\w*)\[([\d,]*)\]", match[1])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for _, shape in shapes]
            total = sum(size * itemsize(dtype) for size, (dtype, _) in zip(sizes, shapes, strict=True))
            found.append(Collective(match[2], sizes, total, "while/body" in line))
    return found


def itemsize(dtype: str) -> int:
    """Bytes of an element, by XLA's name of its type: bf16, f32, s32, u8, pred."""
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1
