"""What a compiled program reads and writes, and what crosses devices in it."""

import math
import re
from typing import Any, NamedTuple

KINDS = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")  # operations that touch no memory
INSTRUCTION = re.compile(r"^ *(ROOT )?(%\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", re.MULTILINE)
NAME = re.compile(r"%[\w.-]+")


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
            arrays = arrays_in(match[1])
            total = sum(size * itemsize(dtype) for dtype, size in arrays)
            found.append(Collective(match[2], [size for _, size in arrays], total, "while/body" in line))
    return found


def arrays_in(shape: str) -> list[tuple[str, int]]:
    """Dtype and elements of each array in a shape as XLA prints it."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)
    return [(dtype, math.prod(int(n) for n in lengths.split(",") if n)) for dtype, lengths in found]


def itemsize(dtype: str) -> int:
    """Bytes of an element, by XLA's name of its type: bf16, f32, s32, u8, pred."""
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1


def traffic(text: str) -> dict[str, int]:
    """Kernels of a GPU's program, and the bytes that they read and write.

    An array that a kernel takes or puts single elements of counts nothing.
    """
    bodies = dict(re.findall(r"^(%\S+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    sizes: dict[str, int] = {}
    kernels = total = 0
    for _, name, shape, operation, operands, rest in INSTRUCTION.findall(text[text.index("\nENTRY") :]):
        sizes[name] = sum(size * itemsize(dtype) for dtype, size in arrays_in(shape))
        if operation in FREE:
            continue
        kernels += 1
        called = re.search(r"calls=(%[\w.-]+)", rest)
        picked, scattered = _single_elements(bodies[called[1]]) if called else (set(), False)
        read = [sizes[each] for each in NAME.findall(operands)]
        total += sum(size for number, size in enumerate(read) if number not in picked)
        total += 0 if scattered else sizes[name]
    return {"kernels": kernels, "bytes": total}


def _single_elements(body: str) -> tuple[set[int], bool]:
    """Which parameters of a kernel only single elements are taken from or put into, and whether it returns one."""
    numbers: dict[str, int] = {}  # of the parameters, and of what is made of one element by element where it is used
    whole, scattered = set(), False
    for root, name, _, operation, operands, _ in INSTRUCTION.findall(body):
        used = NAME.findall(operands)
        if operation == "parameter":
            numbers[name] = int(operands)
        elif operation in ("bitcast", "convert") and not root:
            numbers.update((name, numbers[each]) for each in used if each in numbers)
        else:
            single = operation in ("gather", "scatter", "dynamic-slice", "dynamic-update-slice")
            whole |= {numbers[each] for each in used[single:] if each in numbers}
            scattered |= bool(root) and operation in ("scatter", "dynamic-update-slice")
    return {*numbers.values()} - whole, scattered
