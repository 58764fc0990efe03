"""`python -m benchmarks`: cross entropy's value and gradient against optax and PyTorch, in one interleaved run.

Only ratios of medians from one run mean anything: the implementations take turns in random order, every result is
waited for and freed before the next call, and the answers are compared before anything is timed. Two things would carry
from one turn into the next, and are kept from it for everyone alike. Whether a large result gets fresh pages is pinned:
glibc decides it by the history of calls, and at 32 MB that doubles any figure. And OpenMP's threads spin on after
PyTorch's call and take a core from whoever comes next, so a turn starts with untimed calls. Needs the extra `test`.
"""

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxloss

SHAPES = [(128, 10), (8192, 10), (1024, 1000), (256, 32000), (1024, 32768)]
OURS = "jaxloss"
WARM_UP, CALLS = 0.02, 5  # a turn: seconds of untimed calls, then so many timed ones
# Fresh pages for every array from 16 MiB on, as glibc has it by default from 32 MiB on, and for none below.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(16 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


@dataclass(frozen=True)
class Options:
    """Time value_and_grad of the mean cross entropy of float32 logits with integer labels."""

    turns: int = 40
    """Turns of each implementation and shape (a fifth of that from 8 million logits on), of five timed calls each."""
    json: Path | None = None
    """Also write the medians here."""


def implementations(logits: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Calls without arguments that return the loss and its gradient, finished."""
    z, t = jnp.asarray(logits), jnp.asarray(labels)

    def optax_loss(z: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, t))

    def jitted(loss: Callable) -> Callable[[], tuple[jax.Array, jax.Array]]:
        step = jax.jit(jax.value_and_grad(loss))
        return lambda: jax.block_until_ready(step(z, t))

    leaf, long = torch.tensor(logits, requires_grad=True), torch.tensor(labels).long()

    def torch_step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(leaf, long)
        return loss, *torch.autograd.grad(loss, leaf)

    return {OURS: jitted(jaxloss.cross_entropy), "optax": jitted(optax_loss), "PyTorch eager": torch_step}


def medians(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of each call, all interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(turns):
        random.shuffle(order)
        for name in order:
            until = time.perf_counter() + WARM_UP
            while time.perf_counter() < until:
                calls[name]()
            for _ in range(CALLS):
                start = time.perf_counter()
                result = calls[name]()
                elapsed = time.perf_counter() - start
                del result
                seconds[name].append(1e3 * elapsed)
    return {
        name: dict(zip(("q1", "median", "q3"), statistics.quantiles(times, n=4), strict=True))
        for name, times in seconds.items()
    }


def measure(shape: tuple[int, int], confident: bool, turns: int) -> dict[str, Any]:
    """One row of the table: the same random case for every implementation, checked before it is timed."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=shape).astype(np.float32), rng.integers(0, shape[1], shape[0]).astype(np.int32)
    if confident:
        logits[0, labels[0]] = 40
    calls = implementations(logits, labels)
    expected = [np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in calls["PyTorch eager"]()]
    for name in (OURS, "optax"):
        for ours, theirs in zip(calls[name](), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7, err_msg=name)
    few = turns if np.prod(shape) < 8_000_000 else max(turns // 5, 1)
    return {"shape": list(shape), "one confident row": confident, "milliseconds": medians(calls, few)}


def table(rows: list[dict[str, Any]]) -> Table:
    """Ratios of our median to each peer's, with both quartiles of ours for the noise."""
    result = Table("logits", "one confident row", f"{OURS} ms (quartiles)", "/ optax", "/ PyTorch eager")
    for row in rows:
        times = row["milliseconds"]
        ours = times[OURS]
        ratios = (f"{ours['median'] / times[peer]['median']:.2f}" for peer in ("optax", "PyTorch eager"))
        spread = f"{ours['median']:.3g} ({ours['q1']:.3g}-{ours['q3']:.3g})"
        result.add_row(" x ".join(map(str, row["shape"])), "yes" if row["one confident row"] else "no", spread, *ratios)
    return result


def main() -> None:
    """Measure, print, and write the results if asked."""
    options = tyro.cli(Options, prog="python -m benchmarks")
    if not MALLOC.items() <= os.environ.items():  # glibc reads them when the process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], os.environ | MALLOC)
    cases = [(shape, confident) for shape in SHAPES for confident in (False, True)]
    rows = [measure(*case, options.turns) for case in track(cases, description="measuring", transient=True)]
    about = {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "malloc": MALLOC,
        "versions": {name: version(name) for name in ("jax", "optax", "torch", "numpy")},
    }
    console = Console()
    console.print(about)
    console.print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
