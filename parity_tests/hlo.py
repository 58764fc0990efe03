"""What a compiled program is made of: passes over large arrays, what it holds, what moves between devices."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.hlo import FREE, INSTRUCTION, NAME, arrays_in, collectives

GATHERS = ("all-gather", "all-to-all", "collective-permute")


class Costs(NamedTuple):
    """Of a program, beside the size of its first argument."""

    passes: int
    """Operations, fused ones as one, that take or give an array of that size; one that takes few elements counts."""
    written: int
    """Those that give one."""
    exponentials: int
    """Of an array of that size."""
    products: int
    """Matrix products of any size; not a vector's, which are sums."""
    temporaries: float
    """Bytes held besides arguments and results, over those of the first argument."""


def costs(function: Callable[..., Any], *arguments: Any) -> Costs:
    """Those of the function compiled for these arguments, which may be shapes."""
    compiled = jax.jit(function).lower(*arguments).compile()
    text, elements = compiled.as_text(), arguments[0].size
    sizes: dict[str, int] = {}
    passes = written = 0
    for _, name, shape, operation, operands, _ in INSTRUCTION.findall(text[text.index("\nENTRY") :]):
        sizes[name] = largest(shape)
        if operation in FREE:
            continue
        written += sizes[name] >= elements
        passes += max(sizes[name], *(sizes.get(each, 0) for each in ["", *NAME.findall(operands)])) >= elements
    temporaries = compiled.memory_analysis().temp_size_in_bytes / (elements * arguments[0].dtype.itemsize)
    products = len(re.findall(r"= \w+\[\d+,[\d,]+\]\S* dot\(", text))
    exponentials = [largest(shape) for shape in re.findall(r"= (\S+) exponential\(", text)]
    return Costs(passes, written, sum(n >= elements for n in exponentials), products, temporaries)


def largest(shape: str) -> int:
    """Elements of the largest array in a shape as XLA prints it."""
    return max((size for _, size in arrays_in(shape)), default=0)


def kept_bytes(function: Callable[..., Any], *arguments: jax.Array) -> int:
    """Bytes that reverse mode with respect to these arguments keeps between the passes, the arguments included."""
    kept = jax.jit(lambda *args: jax.vjp(function, *args)[1]).eval_shape(*arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def gathered_sizes(compiled: Any) -> list[int]:
    """Elements of every result of an operation that moves arrays whole."""
    return [size for found in collectives(compiled) if found.kind in GATHERS for size in found.sizes]
