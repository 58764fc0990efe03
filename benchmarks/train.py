"""A training step of both models (Adam, float32) against PyTorch eager and the step of Flax's MNIST tutorial.

Ours is a whole epoch of one batch: the order, dropout's masks and the reading of the totals count too.
"""

from dataclasses import replace
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

from benchmarks.timing import Calls, assert_same_answers, medians, ratio
from jaxloss.parity import load_torch, to_torch
from train import originals
from train.config import ModelName, Recipe
from train.data import load
from train.loop import Learner

CASES: list[tuple[ModelName, int]] = [(model, batch) for model in ("cnn", "net") for batch in (32, 100, 1000)]
EPOCH, COMPILED = "epoch", "its compiled programs"
OURS, EAGER, TUTORIAL = "python -m train", "PyTorch eager", "Flax tutorial"


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


def implementations(model: ModelName, batch: int) -> tuple[Calls, Calls]:
    """Calls that take a step, and calls that return the loss without dropout."""
    original, stock, feature_map = MODULES[model]
    digits = load("digits")
    split = digits.train._replace(images=digits.train.images[:batch], labels=digits.train.labels[:batch])
    recipe = Recipe("adam", lr=1e-3, momentum=0.0, gamma=1.0, epochs=1, batch_size=batch)
    learner = Learner(model, recipe, replace(digits, train=split, test=split), seed=0)
    weights = to_torch(learner.trained())
    pixels = np.asarray(split.images, np.float32) / 255
    loss_of = {"cnn": F.cross_entropy, "net": F.nll_loss}[model]

    module = original()
    module.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    adam = torch.optim.Adam(module.parameters(), lr=1e-3)
    inputs, targets = torch.tensor(pixels)[:, None], torch.tensor(np.asarray(split.labels)).long()

    flatten = {"fc" if model == "cnn" else "fc1": feature_map}
    named = {"conv1": "layer1.0", "conv2": "layer2.0"} if model == "cnn" else {}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in named.items() for kind in ("weight", "bias")}
    port: Any = load_torch(stock(nnx.Rngs(0)), weights, flatten=flatten, names=names)
    optimizer = nnx.Optimizer(port, optax.adam(1e-3), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    images, labels = jnp.asarray(pixels)[..., None], jnp.asarray(split.labels, jnp.int32)

    def ours() -> None:
        learner.step = 0
        learner.train_epoch(Event(), lambda step, cost: None)

    def eager() -> None:
        module.train()
        adam.zero_grad()
        loss_of(module(inputs), targets).backward()
        adam.step()

    def tutorial() -> None:
        port.train()
        tutorial_step(port, optimizer, metrics, images, labels)
        jax.block_until_ready(nnx.state(port, nnx.Param))

    def stock_loss() -> list[Any]:
        port.eval()
        return [tutorial_loss(port, images, labels)[0]]

    losses = {
        OURS: lambda: [learner.evaluate()[0].loss],
        TUTORIAL: stock_loss,
        EAGER: lambda: [loss_of(module.eval()(inputs), targets)],
    }
    return {OURS: ours, TUTORIAL: tutorial, EAGER: eager}, losses


def whole_and_compiled(model: ModelName) -> Calls:
    """An epoch of 6,000 images in batches of 100, and its compiled programs alone, with all inputs drawn before."""
    digits = load("digits")
    images, labels = (np.resize(part, (6000, *part.shape[1:])) for part in digits.train[:2])
    split = digits.train._replace(images=images, labels=labels)
    recipe = Recipe("adam", lr=1e-3, momentum=0.0, gamma=1.0, epochs=1, batch_size=100)
    learner = Learner(model, recipe, replace(digits, train=split), seed=0)
    parts = [learner._parts(rows)[0] for rows in learner._batches(np.arange(6000))]

    def whole() -> None:
        learner.step = 0
        learner.train_epoch(Event(), lambda step, cost: None)

    def compiled() -> None:
        for part in parts:
            learner.state, cost = learner._step(learner.state, None, learner.train, part)
            cost.block_until_ready()

    return {EPOCH: whole, COMPILED: compiled}


def measure(turns: int) -> list[dict[str, Any]]:
    """Times of every case, the larger ones of fewer turns."""
    rows = []
    for model, batch in track(CASES, description="train", transient=True):
        steps, losses = implementations(model, batch)
        assert_same_answers(losses)
        times = medians(steps, max(turns * 32 // max(batch, 128), 3))
        rows.append({"model": model, "batch": batch, "milliseconds": times})
    for model in ("cnn", "net"):
        rows.append({"model": model, "milliseconds": medians(whole_and_compiled(model), max(turns // 8, 3))})
    return rows


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Ratios of our median to each peer's, and of what is compiled to the whole."""
    table = Table("model", "batch", f"{OURS} ms", "images/s", f"/ {EAGER}", f"/ {TUTORIAL}")
    epochs = Table("model", "share of an epoch's time in compiled programs")
    for row in rows:
        times = row["milliseconds"]
        if "batch" not in row:
            epochs.add_row(row["model"], ratio(times, COMPILED, EPOCH))
            continue
        ours = times[OURS]["median"]
        ratios = (ratio(times, OURS, peer) for peer in (EAGER, TUTORIAL))
        table.add_row(row["model"], str(row["batch"]), f"{ours:.1f}", f"{1e3 * row['batch'] / ours:,.0f}", *ratios)
    return [table, epochs]
