"""linear_cross_entropy, float32: time against the materialised logits and PyTorch, and what each holds in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.progress import track
from rich.table import Table

import jaxloss
from benchmarks.timing import Calls, assert_same_answers, medians, ratio

TIMED = (1024, 256, 65536)
MEASURED = [(2048, 256, classes) for classes in (8192, 32768, 131072)]
SLABS, WHOLE = "linear_cross_entropy", "cross_entropy(x @ W.T)"
CHUNKED, EAGER = "PyTorch chunked", "PyTorch eager"


def whole(x: jax.Array, w: jax.Array, t: jax.Array) -> jax.Array:
    """The loss with all its logits in memory."""
    return jaxloss.cross_entropy(x @ w.T, t)


LOSSES = {SLABS: jaxloss.linear_cross_entropy, WHOLE: whole}


def implementations(shape: tuple[int, int, int]) -> tuple[Calls, Calls]:
    """Calls that return the loss with its gradients to inputs and weight, and calls that return the loss."""
    tokens, features, classes = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, features)).astype(np.float32)
    w = (rng.normal(size=(classes, features)) / features**0.5).astype(np.float32)
    t = rng.integers(0, classes, tokens).astype(np.int32)
    arrays = [jnp.asarray(a) for a in (x, w, t)]
    leaves, long = [torch.tensor(a, requires_grad=True) for a in (x, w)], torch.tensor(t).long()

    def in_torch(options: torch.nn.LinearCrossEntropyOptions | None, backward: bool) -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(backward):
            loss = F.linear_cross_entropy(*leaves, long, options=options)
            return (loss, *torch.autograd.grad(loss, leaves)) if backward else (loss,)

    both, forward = {}, {}
    for name, loss in LOSSES.items():
        step, value = jax.jit(jax.value_and_grad(loss, (0, 1))), jax.jit(loss)
        both[name] = lambda step=step: jax.tree.leaves(jax.block_until_ready(step(*arrays)))
        forward[name] = lambda value=value: [jax.block_until_ready(value(*arrays))]
    for name, options in ((CHUNKED, torch.nn.LinearCrossEntropyOptions()), (EAGER, None)):
        both[name] = lambda options=options: in_torch(options, True)
        forward[name] = lambda options=options: in_torch(options, False)
    return both, forward


def temporaries(shape: tuple[int, int, int]) -> dict[str, int]:
    """Bytes that the compiled value_and_grad holds besides its arguments and results."""
    tokens, features, classes = shape
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, features), (classes, features)))
    t = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    steps = {name: jax.jit(jax.value_and_grad(loss, (0, 1))) for name, loss in LOSSES.items()}
    return {name: step.lower(x, w, t).compile().memory_analysis().temp_size_in_bytes for name, step in steps.items()}


def measure(turns: int) -> list[dict[str, Any]]:
    """Times of one shape (a tenth of the turns), and temporaries of several."""
    rows = []
    for kind, calls in zip(("value and gradients", "value"), implementations(TIMED), strict=True):
        assert_same_answers(calls)
        times = medians(calls, max(turns // 10, 1))
        rows.append({"shape": TIMED, "of": kind, "milliseconds": times})
    for shape in track(MEASURED, description="compiling linear", transient=True):
        rows.append({"shape": shape, "of": "value and gradients", "temporaries": temporaries(shape)})
    return rows


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Ratios of our median to each peer's, and mebibytes."""
    peers = (WHOLE, EAGER, CHUNKED)
    times = Table("tokens x features x classes", "of", f"{SLABS} ms", *(f"/ {peer}" for peer in peers))
    memory = Table("tokens x features x classes", *(f"{name}, MiB" for name in LOSSES))
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        if "temporaries" in row:
            memory.add_row(shape, *(f"{row['temporaries'][name] / 2**20:.0f}" for name in LOSSES))
        else:
            ours = row["milliseconds"][SLABS]["median"]
            times.add_row(shape, row["of"], f"{ours:.0f}", *(ratio(row["milliseconds"], SLABS, peer) for peer in peers))
    return [times, memory]
