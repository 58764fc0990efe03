"""How calls are timed against each other.

Only ratios of medians from one run mean anything: the implementations take turns in random order, and every result is
waited for and freed before the next call. Three things would carry from one turn into the next, and are kept from it
for everyone alike. A large result gets fresh pages of memory, which take longer than a loss, unless what was freed
before has room for it: glibc's threshold is fixed, and losses of arrays of other sizes are measured in other processes.
OpenMP's threads spin on after PyTorch's call and take a core from whoever comes next, so a turn starts with untimed
calls. And which pages an array lies on and how threads wake stay as they are for as long as a process lives, and are up
to half of a short call: losses are timed in several processes, one after another.
"""

import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

Calls = dict[str, Callable[[], Any]]
Times = Mapping[str, Mapping[str, float]]  # by implementation: q1, median, q3
# A turn: seconds of untimed calls, then so many timed ones; more of short calls, to fill so many seconds, and fewer of
# long ones, begun within so many.
WARM_UP, TIMED, FILLED, LONG = 0.02, 5, 0.01, 0.1
# Fresh pages for every array from 32 MiB on, as glibc has it after a while, and for none below, whichever thread asks.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_ARENA_MAX": "1",
}
PLATFORM = jax.default_backend()
SEEN = 1_000_000  # elements of an answer that are compared
TORCH = torch.device("cuda" if PLATFORM == "gpu" else "cpu")
# How far answers may differ, of their norm: what PyTorch rounds in between in bfloat16 is 2 %.
TOLERANCES = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 3e-2}
MATMUL = "float32"  # what products of float32 matrices compute in
if TORCH.type == "cuda":  # as XLA does by default
    torch.set_float32_matmul_precision("high")
    MATMUL = "tf32"
CXX = os.environ.get("CXX", "g++")
HAS_COMPILER = shutil.which(CXX) is not None
LEFT_OUT = {} if HAS_COMPILER else {"torch.compile": f"needs a C++ compiler: install {CXX}, or name another in $CXX"}


def pin_malloc() -> None:
    """Start the command again with glibc's thresholds fixed: it reads them when the process starts."""
    if not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], os.environ | MALLOC)


def about() -> dict[str, Any]:
    """Device and versions."""
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "malloc": {name: os.environ[name] for name in MALLOC if name in os.environ},
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "torch", "numpy")},
        "left out": LEFT_OUT,
    }


def wait() -> None:
    """For PyTorch what block_until_ready is for JAX."""
    if TORCH.type == "cuda":
        torch.cuda.synchronize()


def assert_same_answers(calls: Calls, dtype: str = "float32") -> dict[str, float]:
    """Every implementation gives what the last one gives; the seconds of each first call, which compiles."""
    answers, seconds = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        answers[name] = call()
        wait()
        seconds[name] = time.perf_counter() - start
    *others, reference = map(_as_numpy, answers.values())
    for name, found in zip(calls, others, strict=False):
        for ours, expected in zip(found, reference, strict=True):
            assert ours.shape == expected.shape, name
            distance, norm = (float(np.linalg.norm(x)) for x in (ours - expected, expected))
            assert distance <= TOLERANCES[dtype] * norm, f"{name}: another answer, by {distance:.2g} of {norm:.2g}"
    return seconds


def _as_numpy(results: Iterable[Any]) -> list[np.ndarray]:
    """In float32; of a large array a million of its elements."""
    found = []
    for array in results:
        tensor = isinstance(array, torch.Tensor)
        flat = (array if tensor else jnp.asarray(array)).reshape(-1)
        few = flat[:: max(1, len(flat) // SEEN)]
        found.append(few.detach().float().cpu().numpy() if tensor else np.asarray(few, np.float32))
    return found


def timings(calls: Calls, turns: int) -> dict[str, list[float]]:
    """Milliseconds of a call in each turn, the median of those timed; the implementations' turns are interleaved."""
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(turns):
        random.shuffle(order)
        for name in order:
            milliseconds[name].append(1e3 * statistics.median(_turn(calls[name])))
    return milliseconds


def _turn(call: Callable[[], Any]) -> list[float]:
    """Seconds of each call."""
    until = time.perf_counter() + WARM_UP
    while time.perf_counter() < until:
        call()
        wait()
    seconds: list[float] = []
    began = start = time.perf_counter()
    while not seconds or start < began + (LONG if len(seconds) < TIMED else FILLED):
        result = call()
        wait()
        seconds.append(time.perf_counter() - start)
        del result
        start = time.perf_counter()
    return seconds


def quartiles(times: list[float]) -> dict[str, float]:
    """And the median; of a single time, that time."""
    found = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * times
    return dict(zip(("q1", "median", "q3"), found, strict=True))


def temporaries(jitted: Any, *arguments: Any) -> int:
    """Bytes that a compiled program holds besides its arguments and results."""
    return jitted.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def ratio(times: Times, ours: str, peer: str) -> str:
    """Our median over a peer's."""
    return f"{times[ours]['median'] / times[peer]['median']:.2f}"


def spread(times: Times, ours: str, peer: str) -> tuple[float, float]:
    """Between which the ratio is, with both implementations anywhere in their middle halves."""
    a, b = times[ours], times[peer]
    return a["q1"] / b["q3"], a["q3"] / b["q1"]


def told(times: Times, ours: str, peer: str) -> str:
    """The ratio for a table: empty without the peer, marked ~ where the middle halves of both overlap."""
    if peer not in times:
        return ""
    low, high = spread(times, ours, peer)
    return "~" * (low <= 1 <= high) + ratio(times, ours, peer)
