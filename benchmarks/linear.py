"""linear_cross_entropy: time against the materialised logits and PyTorch, and what each holds in memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F  # noqa: N812
from rich.progress import track
from rich.table import Table

import jaxloss
from benchmarks.growth import curves
from benchmarks.processes import answer
from benchmarks.timing import (
    HAS_COMPILER,
    MATMUL,
    PLATFORM,
    Calls,
    assert_same_answers,
    temporaries,
    timings,
    told,
)

Shape = tuple[int, int, int]  # tokens, features, classes
SLABS, WHOLE = "linear_cross_entropy", "cross_entropy(x @ W.T)"
CHUNKED, EAGER, COMPILED = "PyTorch chunked", "PyTorch eager", "torch.compile"
HAS_CHUNKED = hasattr(torch.nn, "LinearCrossEntropyOptions")  # from PyTorch 2.13 on
HAS_PEAKS = PLATFORM == "cpu" and Path("/proc/self/clear_refs").exists()  # see benchmarks.resident
BOTH, VALUE = "value and gradients", "value"


@dataclass(frozen=True)
class Cases:
    """What is measured at which shapes."""

    timed: tuple[tuple[Shape, str], ...]  # and dtypes
    growing: dict[str, tuple[Shape, ...]]  # timed along a size, float32
    compiled: tuple[Shape, ...]  # for the temporaries
    resident: tuple[Shape, ...]
    in_processes: tuple[str, ...]  # the implementations whose resident memory it is


VOCABULARIES = [2**power for power in range(13, 19)]
FULL = Cases(
    timed=(((1024, 256, 65536), "float32"),),
    growing={
        "tokens": tuple((tokens, 256, 16384) for tokens in (128, 256, 512, 1024, 2048)),
        "classes": tuple((512, 256, classes) for classes in VOCABULARIES),
    },
    compiled=tuple((2048, 256, classes) for classes in VOCABULARIES),
    resident=tuple((1024, 256, classes) for classes in VOCABULARIES),
    in_processes=(SLABS, WHOLE, *[CHUNKED] * HAS_CHUNKED, EAGER),
)
if PLATFORM != "cpu":  # as in a language model
    FULL = replace(FULL, timed=(*FULL.timed, ((8192, 4096, 131072), "bfloat16")))
QUICK = Cases(
    timed=(((64, 16, 1024), "float32"),),
    growing={"tokens": ((32, 16, 1024), (64, 16, 1024)), "classes": ((64, 16, 512), (64, 16, 1024))},
    compiled=((256, 32, 8192), (256, 32, 65536)),
    resident=((256, 32, 8192),),
    in_processes=(SLABS,),
)


def whole(x: jax.Array, w: jax.Array, t: jax.Array) -> jax.Array:
    """The loss with all its logits in memory."""
    return jaxloss.cross_entropy(x @ w.T, t)


LOSSES = {SLABS: jaxloss.linear_cross_entropy, WHOLE: whole}


def torch_losses() -> dict[str, Callable[..., torch.Tensor]]:
    """PyTorch's ways, the plain one last."""

    def plain(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, w), t)

    torch.compiler.reset()
    found: dict[str, Callable[..., torch.Tensor]] = {}
    if HAS_CHUNKED:
        found[CHUNKED] = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    if HAS_COMPILER:
        found[COMPILED] = torch.compile(plain, dynamic=False)
    return found | {EAGER: plain}


def implementations(shape: Shape, dtype: str) -> tuple[Calls, Calls]:
    """Calls that return the loss with its gradients to inputs and weight, and calls that return the loss."""
    tokens, features, classes = shape
    first, second, third = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    x = jax.random.normal(first, (tokens, features)).astype(dtype)
    w = (jax.random.normal(second, (classes, features)) / features**0.5).astype(dtype)
    arrays = [x, w, jax.random.randint(third, (tokens,), 0, classes)]
    *leaves, t = (torch.from_dlpack(array).clone() for array in arrays)
    leaves, long = [leaf.requires_grad_() for leaf in leaves], t.long()

    def in_torch(loss_of: Callable[..., torch.Tensor], backward: bool) -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(backward):
            loss = loss_of(*leaves, long)
            found = (loss, *torch.autograd.grad(loss, leaves)) if backward else (loss,)
        return found

    both, forward = {}, {}
    for name, loss in LOSSES.items():
        step, value = jax.jit(jax.value_and_grad(loss, (0, 1))), jax.jit(loss)
        both[name] = lambda step=step: jax.tree.leaves(jax.block_until_ready(step(*arrays)))
        forward[name] = lambda value=value: [jax.block_until_ready(value(*arrays))]
    for name, loss in torch_losses().items():
        both[name], forward[name] = partial(in_torch, loss, True), partial(in_torch, loss, False)
    return both, forward


def held(shape: Shape) -> dict[str, int]:
    """Bytes that each compiled value_and_grad holds besides its arguments and results."""
    tokens, features, classes = shape
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, features), (classes, features)))
    t = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    return {name: temporaries(jax.jit(jax.value_and_grad(loss, (0, 1))), x, w, t) for name, loss in LOSSES.items()}


def timed(shape: Shape, dtype: str, kind: str, calls: Calls, turns: int) -> dict[str, Any]:
    """A row, once the answers agree."""
    first = assert_same_answers(calls, MATMUL if dtype == "float32" else dtype)
    row = {"shape": shape, "dtype": dtype, "of": kind, "first call, seconds": first}
    return row | {"milliseconds": timings(calls, turns)}


def measure(turns: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Times of some shapes (a tenth of the turns), temporaries, resident memory, and times over sizes (a twentieth)."""
    cases, least = (QUICK, 1) if quick else (FULL, 2)
    for shape, dtype in cases.timed:
        for kind, calls in zip((BOTH, VALUE), implementations(shape, dtype), strict=True):
            yield timed(shape, dtype, kind, calls, max(turns // 10, least))
    for shape in track(cases.compiled, description="compiling linear", transient=True):
        yield {"shape": shape, "of": BOTH, "along": "classes", "temporaries": held(shape)}
    for shape in track(cases.resident if HAS_PEAKS else (), description="memory of linear", transient=True):
        resident = {name: answer("benchmarks.resident", name, *shape) for name in cases.in_processes}
        yield {"shape": shape, "of": BOTH, "along": "classes", "resident": resident}
    for along, shapes in cases.growing.items():
        for shape in track(shapes, description=f"linear over {along}", transient=True):
            calls, _ = implementations(shape, "float32")
            calls.pop(COMPILED, None)  # compiles anew for every shape
            yield timed(shape, "float32", BOTH, calls, max(turns // 20, least)) | {"along": along}


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Ratios of our median to each peer's, mebibytes, and how both grow."""
    peers = (WHOLE, EAGER, CHUNKED, COMPILED)
    times = Table("tokens x features x classes", "dtype", "of", f"{SLABS} ms", *(f"/ {peer}" for peer in peers))
    for row in rows:
        if "milliseconds" in row:
            ours = f"{row['milliseconds'][SLABS]['median']:.3g}"
            ratios = (told(row["milliseconds"], SLABS, peer) for peer in peers)
            times.add_row(" x ".join(map(str, row["shape"])), row["dtype"], row["of"], ours, *ratios)
    kinds = {"temporaries": tuple(LOSSES), "resident": (SLABS, WHOLE, EAGER, CHUNKED)}
    growth = Table("measure", "along", "at", "implementation", "grows with the power")
    for curve in curves(rows):
        growth.add_row(curve.measure, curve.along, curve.fixed, curve.name, f"{curve.slope:.2f}")
    return [times, *(memory(rows, kind, names) for kind, names in kinds.items()), growth]


def memory(rows: list[dict[str, Any]], kind: str, names: tuple[str, ...]) -> Table:
    """One kind's mebibytes beside those of the logits with their gradient, and of the gradient to the weight."""
    by_formula = ("logits and gradient", "weight's gradient")
    table = Table(f"{kind}: tokens x features x classes, float32", *(f"{name}, MiB" for name in (*names, *by_formula)))
    for row in rows:
        if kind in row:
            tokens, features, classes = row["shape"]
            counts = [row[kind].get(name, math.nan) for name in names]
            counts += [2 * 4 * tokens * classes, 4 * features * classes]
            table.add_row(" x ".join(map(str, row["shape"])), *(f"{count / 2**20:.0f}" for count in counts))
    return table
