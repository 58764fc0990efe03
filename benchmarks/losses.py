"""The losses, value alone and with gradient, against optax, plain jax.nn and PyTorch, beside a pass over the logits."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F  # noqa: N812

import jaxloss
from benchmarks.plots import grouped
from benchmarks.processes import in_new_processes
from benchmarks.timing import HAS_COMPILER, PLATFORM, Calls, assert_same_answers, temporaries, timings, told

SHAPES = ((128, 10), (8192, 10), (1024, 1000), (8, 128, 128, 21), (256, 32000), (1024, 32768), (1024, 131072))
VALUE, BOTH, OUTSIDE = "value", "value and gradient", "value, outside of jit"
OURS, OPTAX, PLAIN, EAGER, COMPILED = "jaxloss", "optax", "plain jax.nn", "PyTorch eager", "torch.compile"
BARE = "without options"  # another loss, which is timed to see what they cost
# A pass over the logits, and one with a result of their size; softmax less targets is the gradient, without the loss.
LEAST = SUM, PLUS, SOFTMAX = "sum(x)", "x + 1", "softmax(x)"
PROCESSES = 3 if PLATFORM == "cpu" else 1  # an accelerator is held by the first
Measures = dict[str, Callable[[], int]]
Case = tuple[str, str, str, tuple[int, ...]]  # kind, quantity, dtype and shape
SMOOTHED = {"label_smoothing": 0.1, "ignore_index": 0}


@dataclass(frozen=True)
class Kind:
    """A function of logits (for nll_loss: log-probabilities) and targets."""

    torch: Callable  # with the classes on axis 1
    jax: dict[str, Callable]
    targets: Literal["labels", "probabilities"] = "labels"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    quantities: tuple[str, ...] = (BOTH, VALUE)
    compiled: bool = False
    confident: bool = False  # one row is
    log_probs: bool = False  # not any logits
    scalar: bool = True  # its value is
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    axis: Literal[-1, 1] = -1  # of the classes in `shapes` and in JAX


def picked(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """What one writes by hand."""
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[..., None], axis=-1))


def optax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def weights(classes: int) -> np.ndarray:
    """Of classes."""
    return np.linspace(0.5, 1.5, classes, dtype=np.float32)


def weighted(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """With class weights, an ignored class and label smoothing."""
    return jaxloss.cross_entropy(logits, labels, weight=weights(logits.shape[-1]), **SMOOTHED)


def torch_weighted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same."""
    weight = torch.tensor(weights(logits.shape[1])).to(logits)
    return F.cross_entropy(logits, labels, weight=weight, **SMOOTHED)


LOSSES = {OURS: jaxloss.cross_entropy, OPTAX: optax_loss, PLAIN: lambda z, t: picked(jax.nn.log_softmax(z), t)}
KINDS = {
    "cross_entropy": Kind(F.cross_entropy, LOSSES, compiled=True),
    "cross_entropy, one confident row": Kind(
        F.cross_entropy, LOSSES, dtypes=("float32",), quantities=(BOTH,), confident=True
    ),
    "cross_entropy, axis 1": Kind(
        F.cross_entropy,
        {
            OURS: partial(jaxloss.cross_entropy, axis=1),
            OPTAX: lambda z, t: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, t, axis=1)),
        },
        shapes=((8, 21, 128, 128),),
        axis=1,
    ),
    "cross_entropy, probabilities": Kind(
        F.cross_entropy,
        {OURS: jaxloss.cross_entropy, OPTAX: lambda z, t: jnp.mean(optax.softmax_cross_entropy(z, t))},
        "probabilities",
    ),
    "cross_entropy, three options": Kind(torch_weighted, {OURS: weighted, BARE: jaxloss.cross_entropy}),
    "log_softmax": Kind(
        lambda z, t: F.log_softmax(z, dim=1),
        {OURS: lambda z, t: jaxloss.log_softmax(z), PLAIN: lambda z, t: jax.nn.log_softmax(z)},
        scalar=False,
    ),
    "nll_loss": Kind(F.nll_loss, {OURS: jaxloss.nll_loss, PLAIN: picked}, log_probs=True),
}


def examples(kind: Kind, shape: tuple[int, ...], dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, labels or probabilities, and what multiplies the gradient, an array where the value is one."""
    first, second, third = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    logits = jax.random.normal(first, shape)
    if kind.targets == "probabilities":
        targets = jax.nn.softmax(jax.random.normal(second, shape)).astype(dtype)
    else:
        targets = jax.random.randint(second, tuple(np.delete(shape, kind.axis)), 0, shape[kind.axis])
    if kind.confident:
        logits = logits.at[(*(0,) * (len(shape) - 1), targets.ravel()[0])].set(40)
    if kind.log_probs:
        logits = jax.nn.log_softmax(logits)
    factors = jnp.ones(()) if kind.scalar else jax.random.normal(third, shape)
    return logits.astype(dtype), targets, factors.astype(dtype)


def jitted(loss: Callable, quantity: str) -> Any:
    """A loss's value, or with its gradient, of logits, targets and what multiplies the gradient of one not scalar."""

    def both(z: jax.Array, t: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda z: loss(z, t), z)
        return value, *pull(g if value.ndim else jnp.ones_like(value))

    return jax.jit(both if quantity == BOTH else lambda z, t, g: loss(z, t))


def implementations(kind: Kind, quantity: str, dtype: str, shape: tuple[int, ...]) -> tuple[Calls, Calls, Measures]:
    """Calls without arguments that return the value, or the value and its gradient, finished; PyTorch eager last.

    And calls of what is the least, and for each in JAX what gives the bytes of temporaries of its compiled program.
    """
    z, t, g = examples(kind, shape, dtype)
    moved = len(shape) > 2 and kind.axis == -1
    least = {SUM: jax.jit(jnp.sum)} if quantity == VALUE else {PLUS: jax.jit(lambda x: x + 1)}
    if quantity == BOTH and kind.scalar and not kind.log_probs:
        least[SOFTMAX] = jax.jit(partial(jax.nn.softmax, axis=kind.axis))

    def in_torch(array: jax.Array) -> torch.Tensor:
        tensor = torch.from_dlpack(array)
        tensor = tensor.clone() if tensor.is_floating_point() else tensor.long()
        return tensor.movedim(-1, 1).contiguous() if moved and array.ndim == len(shape) else tensor

    leaf, aims, cotangent = map(in_torch, (z, t, g))
    leaf.requires_grad_(quantity == BOTH)

    def in_pytorch(loss: Callable) -> Callable[[], list[torch.Tensor]]:
        def call() -> list[torch.Tensor]:
            found = [loss(leaf, aims)]
            if quantity == BOTH:
                found += torch.autograd.grad(found[0], leaf, cotangent if found[0].ndim else None)
            return [x.movedim(1, -1) if moved and x.ndim > 2 else x for x in found]

        return call

    steps = {name: jitted(loss, quantity) for name, loss in kind.jax.items()}
    held = {name: partial(temporaries, step, z, t, g) for name, step in steps.items()}
    calls: Calls = {
        name: lambda step=step: jax.tree.leaves(jax.block_until_ready(step(z, t, g))) for name, step in steps.items()
    }
    if HAS_COMPILER and kind.compiled and quantity == BOTH:
        torch.compiler.reset()
        calls[COMPILED] = in_pytorch(torch.compile(kind.torch, dynamic=False))
    bare: Calls = {name: lambda step=step: jax.block_until_ready(step(z)) for name, step in least.items()}
    return calls | {EAGER: in_pytorch(kind.torch)}, bare, held


def cases(*, quick: bool) -> Iterator[Case]:
    """Every kind, quantity, dtype and shape; quick: every kind once, and some of the rest."""
    if quick:
        yield from ((name, BOTH, "float32", (128, 10)) for name in KINDS)
        yield "cross_entropy, axis 1", BOTH, "float32", (2, 21, 8, 8)
        yield "cross_entropy", VALUE, "bfloat16", (2, 8, 8, 21)
    else:
        for name, kind in KINDS.items():
            for quantity in kind.quantities:
                for dtype in kind.dtypes:
                    yield from ((name, quantity, dtype, shape) for shape in kind.shapes)
    yield "cross_entropy", OUTSIDE, "float32", (128, 10)


def outside_jit() -> Calls:
    """Calls on 128 x 10 as written, outside of jit: what each call costs."""
    z, t, _ = examples(KINDS["cross_entropy"], (128, 10))
    leaf, long = torch.from_dlpack(z).cpu(), torch.from_dlpack(t).cpu().long()
    calls = {name: lambda loss=loss: [jax.block_until_ready(loss(z, t))] for name, loss in LOSSES.items()}
    return calls | {EAGER: lambda: [F.cross_entropy(leaf, long)]}


def measure(turns: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of the table. On CPU new processes measure the cases of one dtype and shape, and share the turns."""
    every = list(cases(quick=quick))
    if quick or PROCESSES == 1:
        yield from measured(track(every, description="measuring losses", transient=True), turns)
        return
    alike = [[case for case in every if case[2:] == kind] for kind in dict.fromkeys(case[2:] for case in every)]
    for some in track(alike, description="measuring losses", transient=True):
        yield from in_new_processes(PROCESSES, measured, some, max(turns // PROCESSES, 1))


def measured(some: Iterable[Case], turns: int) -> Iterator[dict[str, Any]]:
    """A row for each case: on CPU fewer turns from 10 million logits on."""
    for name, quantity, dtype, shape in some:
        row = {"loss": name, "of": quantity, "dtype": dtype, "shape": shape}
        large = PLATFORM == "cpu" and math.prod(shape) >= 1e7
        few = max(turns // (5 if math.prod(shape) < 1e8 else 10), 2) if large else turns
        if quantity == OUTSIDE:
            calls = outside_jit()
            assert_same_answers(calls)
        else:
            calls, least, held = implementations(KINDS[name], quantity, dtype, shape)
            comparable = {name: call for name, call in calls.items() if name != BARE}
            row["first call, seconds"] = assert_same_answers(comparable, dtype)
            row["temporaries"] = {each: held_bytes() for each, held_bytes in held.items()}
            calls |= least
        yield row | {"milliseconds": timings(calls, few)}


def order(row: dict[str, Any]) -> tuple[int, int]:
    """Where a row of the table belongs: with those of its loss and quantity."""
    return list(KINDS).index(row["loss"]), (BOTH, VALUE, OUTSIDE).index(row["of"])


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """For each loss, ratios of our median to its peers' and to what is the least, with quartiles of ours for the noise.

    And in a last table the temporaries of JAX's programs, in MiB and in arrays of the logits' shape.
    """
    found = []
    held = Table("loss", "logits", *(f"{name}, MiB (logits)" for name in (OURS, OPTAX, PLAIN)), title="temporaries")
    for group, some in grouped(rows, lambda row: f"{row['loss']}, {row['of']}").items():
        timed = {name for row in some for name in row["milliseconds"]}
        others = [name for name in (OPTAX, PLAIN, EAGER, COMPILED, BARE, *LEAST) if name in timed]
        table = Table("logits", "ms (quartiles)", *(f"/ {name}" for name in others), "first call, s", title=group)
        for row in some:
            case = " x ".join(map(str, row["shape"])) + f", {row['dtype']}"
            times = row["milliseconds"]
            ours = "{median:.3g} ({q1:.3g}-{q3:.3g})".format(**times[OURS])
            first = f"{row['first call, seconds'][OURS]:.1f}" if "first call, seconds" in row else ""
            table.add_row(case, ours, *(told(times, OURS, name) for name in others), first)
            if "temporaries" in row:
                held.add_row(group, case, *(amount(row, name) for name in (OURS, OPTAX, PLAIN)))
        found.append(table)
    return [*found, held]


def amount(row: dict[str, Any], name: str) -> str:
    """Temporaries, for a table."""
    if name not in row["temporaries"]:
        return ""
    held = row["temporaries"][name]
    return f"{held / 2**20:.2f} ({held / math.prod(row['shape']) / jnp.dtype(row['dtype']).itemsize:.2f})"
