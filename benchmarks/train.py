"""A training step of both models (Adam, float32) against PyTorch eager and the step of Flax's MNIST tutorial.

Ours is a whole epoch: the order, dropout's masks and the reading of the totals count too. It has a thousand images on
CPU, and 20 batches on an accelerator, which takes them in one dispatch; everyone takes as many steps.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F  # noqa: N812

from benchmarks.processes import answer
from benchmarks.timing import (
    HAS_COMPILER,
    MATMUL,
    PLATFORM,
    TORCH,
    Calls,
    assert_same_answers,
    quartiles,
    timings,
    told,
)
from jaxloss.parity import load_torch, to_torch
from train import originals
from train.config import ModelName, Recipe
from train.data import Dataset, load
from train.loop import Learner, default_dispatch

CASES: list[tuple[ModelName, int]] = [(model, batch) for model in ("cnn", "net") for batch in (32, 100, 1000)]
QUICK_CASES: list[tuple[ModelName, int]] = [("net", 32)]
EPOCH_OF, QUICK_EPOCH_OF = 6000, 600  # images
DEVICES, QUICK_DEVICES = (1, 2, 4, 8), (2,)
SHARES = "shares in compiled programs"
EPOCH, PROGRAM = "an epoch", "ThunkExecutor::Execute"  # in a profile; what XLA's CPU backend calls a running program
OURS, EAGER, COMPILED_TORCH, TUTORIAL = "python -m train", "PyTorch eager", "torch.compile", "Flax tutorial"
IMAGES, DISPATCH = 1000, 20  # of a call, on CPU; its steps, elsewhere


class TutorialCNN(nnx.Module):
    """The CNN out of Flax's own layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(3136, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
        return self.fc(x.reshape(len(x), -1))


class TutorialNet(nnx.Module):
    """The Net out of Flax's own layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.conv1 = nnx.Conv(1, 10, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(10, 20, (5, 5), padding="VALID", rngs=rngs)
        self.conv2_drop = nnx.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(320, 50, rngs=rngs), nnx.Linear(50, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Log-probabilities."""
        x = nnx.relu(nnx.max_pool(self.conv1(x), (2, 2), (2, 2)))
        x = nnx.relu(nnx.max_pool(self.conv2_drop(self.conv2(x)), (2, 2), (2, 2)))
        return nnx.log_softmax(self.fc2(self.dropout(nnx.relu(self.fc1(x.reshape(len(x), -1))))))


MODULES = {"cnn": (originals.CNN, TutorialCNN, (64, 7, 7)), "net": (originals.Net, TutorialNet, (20, 4, 4))}


def tutorial_loss(module: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Optax's loss of logits; log-probabilities are logits too."""
    outputs = module(images)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean(), outputs


@nnx.jit
def tutorial_step(module: Any, optimizer: Any, metrics: Any, images: jax.Array, labels: jax.Array) -> None:
    """As the tutorial has it."""
    (loss, outputs), gradients = nnx.value_and_grad(tutorial_loss, has_aux=True)(module, images, labels)
    metrics.update(loss=loss, logits=outputs, labels=labels)
    optimizer.update(module, gradients)


def digits_of(count: int) -> Dataset:
    """So many training images, repeated if there are not enough, and as many test images."""
    digits = load("digits")
    images, labels = (np.resize(part, (count, *part.shape[1:])) for part in digits.train[:2])
    split = digits.train._replace(images=images, labels=labels)
    return replace(digits, train=split, test=split)


def recipe_of(batch: int) -> Recipe:
    """Adam's."""
    return Recipe("adam", lr=1e-3, momentum=0.0, gamma=1.0, epochs=1, batch_size=batch)


def steps_of(batch: int) -> int:
    """How many steps a call takes."""
    return max(IMAGES // batch, 1) if PLATFORM == "cpu" else DISPATCH


def implementations(model: ModelName, batch: int) -> tuple[Calls, Calls]:
    """Calls that take `steps_of(batch)` steps, and calls that return the loss without dropout."""
    original, stock, feature_map = MODULES[model]
    count = steps_of(batch)
    data = digits_of(count * batch)
    recipe = recipe_of(batch)
    dispatch = default_dispatch(model, recipe) if PLATFORM == "cpu" else count
    learner = Learner(model, recipe, data, seed=0, dispatch=dispatch)
    weights = to_torch(learner.trained())
    pixels = np.asarray(data.train.images, np.float32) / 255
    loss_of = {"cnn": F.cross_entropy, "net": F.nll_loss}[model]

    inputs = torch.tensor(pixels, device=TORCH)[:, None].split(batch)
    targets = torch.tensor(data.train.labels, device=TORCH).long().split(batch)
    flatten = {"fc" if model == "cnn" else "fc1": feature_map}
    named = {"conv1": "layer1.0", "conv2": "layer2.0"} if model == "cnn" else {}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in named.items() for kind in ("weight", "bias")}
    port: Any = load_torch(stock(nnx.Rngs(0)), weights, flatten=flatten, names=names)
    optimizer = nnx.Optimizer(port, optax.adam(1e-3), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    images = jnp.split(jnp.asarray(pixels)[..., None], count)
    labels = jnp.split(jnp.asarray(data.train.labels, jnp.int32), count)

    def ours() -> None:
        learner.step = 0
        learner.train_epoch(Event(), lambda step, cost: None)

    def tutorial() -> None:
        port.train()
        for batch_images, batch_labels in zip(images, labels, strict=True):
            tutorial_step(port, optimizer, metrics, batch_images, batch_labels)
        jax.block_until_ready(nnx.state(port, nnx.Param))

    def stock_loss() -> list[Any]:
        port.eval()
        return [np.mean([tutorial_loss(port, *each)[0] for each in zip(images, labels, strict=True)])]

    def in_pytorch(compiled: bool) -> tuple[Callable[[], None], Callable[[], list[float]]]:
        module = original().to(TORCH)
        module.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        adam = torch.optim.Adam(module.parameters(), lr=1e-3)
        run = torch.compile(module) if compiled else module

        def steps() -> None:
            module.train()
            for batch_inputs, batch_targets in zip(inputs, targets, strict=True):
                adam.zero_grad()
                loss_of(run(batch_inputs), batch_targets).backward()
                adam.step()

        @torch.no_grad()
        def loss() -> list[float]:
            module.eval()
            return [np.mean([float(loss_of(run(x), y)) for x, y in zip(inputs, targets, strict=True)])]

        return steps, loss

    torch.compiler.reset()
    steps: Calls = {OURS: ours, TUTORIAL: tutorial}
    losses: Calls = {OURS: lambda: [learner.evaluate()[0].loss], TUTORIAL: stock_loss}
    for name, compiled in (*[(COMPILED_TORCH, True)] * HAS_COMPILER, (EAGER, False)):
        steps[name], losses[name] = in_pytorch(compiled)
    return steps, losses


def shares_in_programs(model: ModelName, images: int, epochs: int) -> list[float]:
    """On CPU, of epochs in batches of 100: the share of its time during which a compiled program runs, by a profile."""
    recipe = recipe_of(100)
    learner = Learner(model, recipe, digits_of(images), seed=0, dispatch=default_dispatch(model, recipe))

    def epoch() -> None:
        learner.step = 0
        learner.train_epoch(Event(), lambda step, cost: None)

    epoch()
    return [profiled(epoch) for _ in range(epochs)]


def profiled(call: Callable[[], None]) -> float:
    """The share of the call's time during which at least one thread is in a compiled program."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options), jax.profiler.TraceAnnotation(EPOCH):
            call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
    (whole,) = (event for event in events if event.name == EPOCH)
    programs = sorted((event.start_ns, event.end_ns) for event in events if event.name.startswith(PROGRAM))
    busy, until = 0.0, whole.start_ns
    for start, end in programs:
        busy += max(min(end, whole.end_ns) - max(start, until), 0)
        until = max(until, end)
    return busy / (whole.end_ns - whole.start_ns)


def communication(model: ModelName, counts: Sequence[int]) -> list[dict[str, Any]]:
    """What a step sends on so many fake devices, by `benchmarks.communication`."""
    fake = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={max(counts)}"}
    return answer("benchmarks.communication", model, *counts, **fake)


def measure(turns: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Times of every case, the larger ones of fewer turns; then shares of compiled programs, and what devices send."""
    cases, least = (QUICK_CASES, 1) if quick else (CASES, 3)
    models = tuple(dict.fromkeys(model for model, _ in cases))
    for model, batch in track(cases, description="train", transient=True):
        steps, losses = implementations(model, batch)
        assert_same_answers(losses, MATMUL)
        times = timings(steps, max(turns * 32 // max(batch, 128), least))
        yield {"model": model, "batch": batch, "steps": steps_of(batch), "milliseconds": times}
    for model in models if PLATFORM == "cpu" else ():
        shares = shares_in_programs(model, QUICK_EPOCH_OF if quick else EPOCH_OF, max(turns // 8, least))
        yield {"model": model, "of": "whole epochs", SHARES: shares}
    for model in models:
        for found in communication(model, QUICK_DEVICES if quick else DEVICES):
            yield {"model": model} | found


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Ratios of our median to each peer's, of what is compiled to the whole, and of what is sent to the parameters."""
    peers = (EAGER, COMPILED_TORCH, TUTORIAL)
    times = Table("model", "batch", f"{OURS} ms a step", "images/s", *(f"/ {peer}" for peer in peers))
    epochs = Table("model", "share of an epoch's time in compiled programs (quartiles)")
    volumes = Table("model", "devices", "sent in a step on each: operations and KiB", "/ all parameters")
    for row in rows:
        if "sent" in row:
            each = (f"{row['operations'][kind]} {kind}: {count / 2**10:.0f}" for kind, count in row["sent"].items())
            share = f"{sum(row['sent'].values()) / row['parameters']:.2f}"
            volumes.add_row(row["model"], str(row["devices"]), ", ".join(each), share)
        elif "batch" in row:
            ours = row["milliseconds"][OURS]["median"] / row["steps"]
            ratios = (told(row["milliseconds"], OURS, peer) for peer in peers)
            rate = f"{1e3 * row['batch'] / ours:,.0f}"
            times.add_row(row["model"], str(row["batch"]), f"{ours:.3g}", rate, *ratios)
        else:
            epochs.add_row(row["model"], "{median:.3f} ({q1:.3f}-{q3:.3f})".format(**quartiles(row[SHARES])))
    return [times, epochs, volumes]
