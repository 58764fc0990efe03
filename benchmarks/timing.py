"""How calls are timed against each other.

Only ratios of medians from one run mean anything: the implementations take turns in random order, and every result is
waited for and freed before the next call. Two things would carry from one turn into the next, and are kept from it for
everyone alike. Whether a large result gets fresh pages is pinned: glibc decides it by the history of calls, and at
32 MB that doubles any figure. And OpenMP's threads spin on after PyTorch's call and take a core from whoever comes
next, so a turn starts with untimed calls.
"""

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import torch

Calls = dict[str, Callable[[], Any]]
WARM_UP, TIMED = 0.02, 5  # a turn: seconds of untimed calls, then so many timed ones
# Fresh pages for every array from 16 MiB on, as glibc has it by default from 32 MiB on, and for none below.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(16 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


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
    }


def assert_same_answers(calls: Calls) -> None:
    """Every implementation gives what the last one gives."""
    *others, reference = (_as_numpy(call()) for call in calls.values())
    for name, found in zip(calls, others, strict=False):
        for ours, expected in zip(found, reference, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max(), err_msg=name)


def _as_numpy(results: Iterable[Any]) -> list[np.ndarray]:
    return [np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in results]


def medians(calls: Calls, turns: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of each call, all interleaved."""
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(turns):
        random.shuffle(order)
        for name in order:
            until = time.perf_counter() + WARM_UP
            while time.perf_counter() < until:
                calls[name]()
            for _ in range(TIMED):
                start = time.perf_counter()
                result = calls[name]()
                elapsed = time.perf_counter() - start
                del result
                milliseconds[name].append(1e3 * elapsed)
    return {
        name: dict(zip(("q1", "median", "q3"), statistics.quantiles(times, n=4), strict=True))
        for name, times in milliseconds.items()
    }


def ratio(times: dict[str, dict[str, float]], ours: str, peer: str) -> str:
    """Our median over a peer's."""
    return f"{times[ours]['median'] / times[peer]['median']:.2f}"
