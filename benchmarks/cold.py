"""`python -m benchmarks.cold PROGRAM`: the seconds that each stage of a program takes from a cold start, as JSON.

Nothing is imported before it is timed.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

ROWS, CLASSES = 128, 10
FRAMEWORK, LIBRARY, FIRST_CALL = "import of jax or torch", "import of the loss, beyond that", "first value and gradient"
IMPORTS, COMPILING, FIRST_STEP = "imports", "weights and compiling", "first step"


def jaxloss() -> Iterator[str]:
    """A loss, as one uses it in JAX."""
    import jax  # noqa: F401

    yield FRAMEWORK
    import jaxloss

    yield LIBRARY
    _differentiate(jaxloss.cross_entropy)
    yield FIRST_CALL


def optax() -> Iterator[str]:
    """The same with Optax."""
    import jax  # noqa: F401

    yield FRAMEWORK
    import optax

    yield LIBRARY
    _differentiate(lambda z, t: optax.softmax_cross_entropy_with_integer_labels(z, t).mean())
    yield FIRST_CALL


def _differentiate(loss: Callable[..., Any]) -> None:
    import jax
    import numpy as np

    step = jax.jit(jax.value_and_grad(loss))
    jax.block_until_ready(step(np.zeros((ROWS, CLASSES), np.float32), np.zeros(ROWS, np.int32)))


def pytorch() -> Iterator[str]:
    """The same in PyTorch."""
    import torch
    from torch.nn import functional

    yield FRAMEWORK
    logits, labels = torch.zeros(ROWS, CLASSES, requires_grad=True), torch.zeros(ROWS, dtype=torch.int64)
    functional.cross_entropy(logits, labels).backward()
    yield FIRST_CALL


def train(model: Any) -> Iterator[str]:
    """A training of the digits in batches of 100 until its first step is done."""
    from threading import Event

    from train.config import Recipe
    from train.data import load
    from train.loop import Learner, default_dispatch

    yield IMPORTS
    recipe = Recipe("adam", lr=1e-3, momentum=0.0, gamma=1.0, epochs=1, batch_size=100)
    learner = Learner(model, recipe, load("digits"), seed=0, dispatch=default_dispatch(model, recipe))
    yield COMPILING
    stop = Event()
    stop.set()  # from the start: it takes one step, or all that are dispatched with it
    learner.train_epoch(stop, lambda step, cost: None)
    yield FIRST_STEP


PROGRAMS = {
    "jaxloss": jaxloss,
    "optax": optax,
    "PyTorch eager": pytorch,
    "cnn": lambda: train("cnn"),
    "net": lambda: train("net"),
}


def main(program: str) -> None:
    """Print them."""
    seconds, start = {}, time.perf_counter()
    for stage in PROGRAMS[program]():
        now = time.perf_counter()
        seconds[stage], start = now - start, now
    print(json.dumps(seconds | {"in all": sum(seconds.values())}))


if __name__ == "__main__":
    main(sys.argv[1])
