"""linear_cross_entropy: time against the materialised logits and PyTorch, and what each holds in memory."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.progress import track
from rich.table import Table

import jaxloss
from benchmarks.timing import MATMUL, PLATFORM, TORCH, Calls, assert_same_answers, medians, told, wait

Shape = tuple[int, int, int]  # tokens, features, classes
TIMED: list[tuple[Shape, str]] = [((1024, 256, 65536), "float32")]
if PLATFORM != "cpu":  # as in a language model
    TIMED += [((8192, 4096, 131072), "bfloat16")]
MEASURED = [(2048, 256, classes) for classes in (8192, 32768, 131072)]
SLABS, WHOLE = "linear_cross_entropy", "cross_entropy(x @ W.T)"
CHUNKED, EAGER, COMPILED = "PyTorch chunked", "PyTorch eager", "torch.compile"
HAS_CHUNKED = hasattr(torch.nn, "LinearCrossEntropyOptions")  # from PyTorch 2.13 on


def whole(x: jax.Array, w: jax.Array, t: jax.Array) -> jax.Array:
    """The loss with all its logits in memory."""
    return jaxloss.cross_entropy(x @ w.T, t)


LOSSES = {SLABS: jaxloss.linear_cross_entropy, WHOLE: whole}


def torch_losses() -> dict[str, Callable[..., torch.Tensor]]:
    """PyTorch's ways, the plain one last."""

    def plain(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, w), t)

    torch.compiler.reset()
    found = {COMPILED: torch.compile(plain, dynamic=False), EAGER: plain}
    if HAS_CHUNKED:
        chunked = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
        found = {CHUNKED: chunked} | found
    return found


def implementations(shape: Shape, dtype: str) -> tuple[Calls, Calls]:
    """Calls that return the loss with its gradients to inputs and weight, and calls that return the loss."""
    tokens, features, classes = shape
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((rows, features), np.float32) for rows in (tokens, classes))
    w /= features**0.5
    t = rng.integers(0, classes, tokens).astype(np.int32)
    arrays = [jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(t)]
    leaves = [torch.tensor(a, device=TORCH).to(getattr(torch, dtype)).requires_grad_() for a in (x, w)]
    long = torch.tensor(t, device=TORCH).long()

    def in_torch(loss_of: Callable[..., torch.Tensor], backward: bool) -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(backward):
            loss = loss_of(*leaves, long)
            found = (loss, *torch.autograd.grad(loss, leaves)) if backward else (loss,)
        wait()
        return found

    both, forward = {}, {}
    for name, loss in LOSSES.items():
        step, value = jax.jit(jax.value_and_grad(loss, (0, 1))), jax.jit(loss)
        both[name] = lambda step=step: jax.tree.leaves(jax.block_until_ready(step(*arrays)))
        forward[name] = lambda value=value: [jax.block_until_ready(value(*arrays))]
    for name, loss in torch_losses().items():
        both[name], forward[name] = partial(in_torch, loss, True), partial(in_torch, loss, False)
    return both, forward


def temporaries(shape: Shape) -> dict[str, int]:
    """Bytes that the compiled value_and_grad holds besides its arguments and results."""
    tokens, features, classes = shape
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, features), (classes, features)))
    t = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    steps = {name: jax.jit(jax.value_and_grad(loss, (0, 1))) for name, loss in LOSSES.items()}
    return {name: step.lower(x, w, t).compile().memory_analysis().temp_size_in_bytes for name, step in steps.items()}


def measure(turns: int) -> Iterator[dict[str, Any]]:
    """Times of some shapes (a tenth of the turns), and temporaries of several."""
    for shape, dtype in TIMED:
        for kind, calls in zip(("value and gradients", "value"), implementations(shape, dtype), strict=True):
            first = assert_same_answers(calls, MATMUL if dtype == "float32" else dtype)
            times = medians(calls, max(turns // 10, 2))
            row = {"shape": shape, "dtype": dtype, "of": kind}
            yield row | {"first call, seconds": first, "milliseconds": times}
    for shape in track(MEASURED, description="compiling linear", transient=True):
        yield {"shape": shape, "of": "value and gradients", "temporaries": temporaries(shape)}


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Ratios of our median to each peer's, and mebibytes."""
    peers = (WHOLE, EAGER, CHUNKED, COMPILED)
    times = Table("tokens x features x classes", "dtype", "of", f"{SLABS} ms", *(f"/ {peer}" for peer in peers))
    memory = Table("tokens x features x classes, float32", *(f"{name}, MiB" for name in LOSSES))
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        if "temporaries" in row:
            memory.add_row(shape, *(f"{row['temporaries'][name] / 2**20:.0f}" for name in LOSSES))
        else:
            ours = f"{row['milliseconds'][SLABS]['median']:.3g}"
            ratios = (told(row["milliseconds"], SLABS, peer) for peer in peers)
            times.add_row(shape, row["dtype"], row["of"], ours, *ratios)
    return [times, memory]
