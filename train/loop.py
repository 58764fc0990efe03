"""The training loop: one compiled step with donated state, and an evaluation that sees every image."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxloss import cross_entropy, nll_loss
from jaxloss.parity import optimizer_by_name
from train.config import ModelName, Recipe, RngName, UserError
from train.data import Dataset, Split
from train.models import DropoutMasks
from train.randomness import RANDOMNESS
from train.schedules import learning_rate, optimizer_options

IGNORED = -100  # the losses' default ignore_index, as the label of the rows that only fill up a batch
EVALUATION_BATCH = 250

Loss = Callable[..., Array]
LOSSES: dict[ModelName, Loss] = {
    "cnn": cross_entropy,  # of logits
    "net": nll_loss,  # of log-probabilities
}


class Totals(NamedTuple):
    """Sums that stay on the device until a phase ends."""

    costs: Array  # of every batch's mean loss
    losses: Array  # of every image's loss
    correct: Array


class State(NamedTuple):
    """What a step changes. It is donated: each step writes into the last one's buffers."""

    params: nnx.State
    streams: nnx.State  # dropout's random numbers
    optimizer: optax.OptState
    totals: Totals


@dataclass(frozen=True)
class Phase:
    """Means over one pass through a split."""

    steps: int
    images: int
    cost: float  # mean over batches of the batch's mean loss
    loss: float  # mean over images
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Epoch:
    """One epoch's results; the last one is short if it was interrupted."""

    number: int
    lr: float  # at its first step
    training: Phase
    validation: Phase


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """The recipe's optimizer with PyTorch's defaults, its rate as the recipe's schedule moves it."""
    name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "adadelta": "Adadelta"}[recipe.optimizer]
    return optimizer_by_name(name, **optimizer_options(recipe, steps_per_epoch))


def batched(order: np.ndarray, size: int) -> np.ndarray:
    """Cut ``order`` into rows of ``size``, the last one filled up with -1: every batch has one shape."""
    return np.pad(order.astype(np.int32), (0, -len(order) % size), constant_values=-1).reshape(-1, size)


def take(split: Split, rows: Array, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Array, Array]:
    """Pixels as a model sees them, with a channel axis, and labels; row -1 is some image with the ignored label."""
    images = jnp.asarray(split.images)[rows, :, :, None].astype(dtype) / 255
    labels = jnp.where(rows < 0, IGNORED, jnp.asarray(split.labels)[rows].astype(jnp.int32))
    return (images - split.mean) / split.deviation, labels


def zero_totals() -> Totals:
    """Three separate buffers, because a step donates each of them."""
    return Totals(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))


def read(totals: Totals, steps: int, images: int, start: float) -> Phase:
    """Wait for the device and turn sums into means: the one host read of a phase."""
    costs, losses, correct = jax.device_get(totals)
    seconds = time.perf_counter() - start
    return Phase(steps, images, float(costs) / steps, float(losses) / images, int(correct) / images, seconds)


def count_correct(outputs: Array, labels: Array) -> Array:
    """How many rows have their largest output at the label; ignored rows never do."""
    return jnp.sum(outputs.argmax(axis=-1) == labels, dtype=jnp.int32)


def dtype_of(params: nnx.State) -> np.dtype:
    """The one in which a model computes."""
    return jax.tree.leaves(params)[0].dtype


def training_step(
    graph: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: State,
    split: Split,
    rows: Array,
    masks: tuple[DropoutMasks, ...] = (),
) -> tuple[State, Array]:
    """One optimizer step on the images at ``rows``, with dropout's masks if it gets any; also their mean loss."""
    images, labels = take(split, rows, dtype_of(state.params))

    def objective(params: nnx.State) -> tuple[Array, tuple[Array, nnx.State]]:
        module = nnx.merge(graph, params, state.streams, copy=True)  # a stream may only advance in its own trace
        outputs = module(images, *masks)
        return loss(outputs, labels), (outputs, nnx.state(module, nnx.RngState))

    (cost, (outputs, streams)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    totals = Totals(
        state.totals.costs + cost,
        state.totals.losses + cost * jnp.sum(rows >= 0),
        state.totals.correct + count_correct(outputs, labels),
    )
    params = cast(nnx.State, optax.apply_updates(state.params, updates))
    return State(params, streams, optimizer_state, totals), cost


def evaluation_step(
    graph: nnx.GraphDef, loss: Loss, params: nnx.State, streams: nnx.State, totals: Totals, split: Split, rows: Array
) -> tuple[Totals, Array]:
    """Add the images at ``rows`` to ``totals``; also returns the model's outputs for them."""
    images, labels = take(split, rows, dtype_of(params))
    outputs = nnx.merge(graph, params, streams)(images)
    total = loss(outputs, labels, reduction="sum")
    mean = total / jnp.sum(rows >= 0)
    totals = Totals(totals.costs + mean, totals.losses + total, totals.correct + count_correct(outputs, labels))
    return totals, outputs


class Learner:
    """A model, its images on the device and its two compiled steps.

    Attributes:
        epoch: the one it is in, from 1.
        step: how many steps of that epoch are done.
        order: in which that epoch takes the training images.
    """

    def __init__(
        self,
        model: ModelName,
        recipe: Recipe,
        data: Dataset,
        seed: int,
        rng: RngName = "torch",
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        """Draw the weights from ``seed`` and compile; nothing compiles after this."""
        start = time.perf_counter()
        self.model: ModelName = model
        self.recipe, self.random = recipe, RANDOMNESS[rng](model, seed)
        self.train, self.test = jax.device_put(data.train), jax.device_put(data.test)
        self.batch_size = min(recipe.batch_size, len(data.train.labels))
        self.steps_per_epoch = math.ceil(len(data.train.labels) / self.batch_size)
        self.epoch, self.step, self.order = 1, 0, np.arange(len(data.train.labels))

        self.loss = LOSSES[model]
        module = self.random.module()
        self.graph, params, streams = nnx.split(module, nnx.Param, nnx.RngState)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        module.eval()
        evaluating = nnx.graphdef(module)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        optimizer = make_optimizer(recipe, self.steps_per_epoch)
        self.state = State(params, streams, optimizer.init(params), zero_totals())

        train = jax.jit(partial(training_step, self.graph, self.loss, optimizer), donate_argnums=0)
        rows = np.zeros(self.batch_size, np.int32)
        masks = self.random.masks(0, self.batch_size)
        self._step = train.lower(self.state, self.train, rows, masks).compile()
        evaluate = jax.jit(partial(evaluation_step, evaluating, self.loss))
        rows = np.zeros(EVALUATION_BATCH, np.int32)
        self._evaluate = evaluate.lower(params, streams, zero_totals(), self.test, rows).compile()
        self.compile_seconds = time.perf_counter() - start

    def trained(self) -> nnx.Module:
        """The model with what it has learned."""
        return nnx.merge(self.graph, self.state.params, self.state.streams)

    @property
    def steps_done(self) -> int:
        """In all epochs."""
        return (self.epoch - 1) * self.steps_per_epoch + self.step

    def epochs(self, stop: Event, on_step: Callable[[int, Array], None]) -> Iterator[Epoch]:
        """Train and evaluate, epoch by epoch, until all are done or ``stop`` is set."""
        while self.epoch <= self.recipe.epochs:  # the notes' range(epochs + 1) trained one too many
            number = self.epoch
            training = self.train_epoch(stop, on_step)
            validation, _ = self.evaluate()
            self.random.evaluated()
            if not math.isfinite(training.loss + validation.loss):
                raise UserError(f"{self.model}: the loss is not finite after epoch {number}: lower --lr", exit_code=1)
            self.epoch, self.step = number + 1, 0
            yield Epoch(number, learning_rate(self.recipe, self.steps_per_epoch, number), training, validation)
            if stop.is_set():
                return

    def train_epoch(self, stop: Event, on_step: Callable[[int, Array], None]) -> Phase:
        """Every training image that is left of the epoch; after at least one step, ``stop`` ends it early."""
        start = time.perf_counter()
        if not self.step:
            self.order = self.random.order(self.epoch, len(self.train.labels))
            self.state = self.state._replace(totals=zero_totals())
        cost = jnp.zeros(())
        for rows in batched(self.order, self.batch_size)[self.step :]:
            cost.block_until_ready()  # at most one step ahead of the device, so that progress and Ctrl-C are true
            masks = self.random.masks(int(np.sum(rows >= 0)), self.batch_size)
            self.state, cost = self._step(self.state, self.train, rows, masks)
            self.step += 1
            on_step(self.step, cost)
            if stop.is_set():
                break
        return read(self.state.totals, self.step, min(self.step * self.batch_size, len(self.order)), start)

    def evaluate(self) -> tuple[Phase, np.ndarray]:
        """Every test image once: the means, and the model's outputs in order."""
        start = time.perf_counter()
        batches = batched(np.arange(len(self.test.labels)), EVALUATION_BATCH)
        totals, outputs = zero_totals(), []
        for rows in batches:
            totals, output = self._evaluate(self.state.params, self.state.streams, totals, self.test, rows)
            outputs.append(output)
        phase = read(totals, len(batches), len(self.test.labels), start)
        return phase, np.concatenate(outputs)[: phase.images]
