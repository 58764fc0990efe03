"""The training loop: compiled steps with donated state, and an evaluation that sees every image."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxloss import cross_entropy, nll_loss
from train.config import ModelName, Recipe, RngName, UserError
from train.data import Dataset, Split
from train.randomness import RANDOMNESS
from train.schedules import learning_rate, make_optimizer
from train.steps import (
    Batch,
    Loss,
    State,
    Totals,
    batched,
    evaluation_step,
    functional,
    training_step,
    zero_totals,
)

EVALUATION_BATCH = 250
# On one CPU device a batch is computed in at most so many parts of so many images, or more: the activations of a large
# batch would get fresh pages from the system in every step, which takes longer than to compute them.
PARTS, PART = 10, 25

LOSSES: dict[ModelName, Loss] = {
    "cnn": cross_entropy,  # of logits
    "net": nll_loss,  # of log-probabilities
}


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


def read(totals: Totals, steps: int, images: int, start: float) -> Phase:
    """Wait for the device and turn sums into means: the one host read of a phase."""
    costs, losses, correct = jax.device_get(totals)
    seconds = time.perf_counter() - start
    return Phase(steps, images, float(costs) / steps, float(losses) / images, int(correct) / images, seconds)


class Learner:
    """A model, its images on every device and its two compiled programs, which divide each batch over the devices.

    Everything but a batch's rows is whole on every device. What is computed does not depend on their number, but for
    rounding: the rows that fill up a batch are ignored, and dropout's masks are those of the images, wherever they are.

    Attributes:
        epoch: the one it is in, from 1.
        step: how many steps of that epoch are done.
        devices: how many there are.
        dispatch: how many steps are dispatched at once.
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
        mesh: Mesh | None = None,
        dispatch: int = 1,
    ) -> None:
        """Draw the weights from ``seed`` and compile; nothing compiles after this.

        The mesh has one axis, and may hold the devices of several processes, each with a learner of its own; without
        one there is one device.
        """
        start = time.perf_counter()
        self.model: ModelName = model
        self.recipe, self.random = recipe, RANDOMNESS[rng](model, seed)
        mesh = mesh or jax.make_mesh((1,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:1])
        self.devices, self.dispatch = mesh.size, dispatch
        self._whole, self._divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), mesh.axis_names))
        self.train, self.test = self.place((data.train, data.test))
        self.batch_size = min(recipe.batch_size, len(data.train.labels))
        self.steps_per_epoch = math.ceil(len(data.train.labels) / self.batch_size)
        self.epoch, self.step, self.order = 1, 0, np.arange(len(data.train.labels))

        self.loss = LOSSES[model]
        self.module = self.random.module()
        self.forward, params = functional(self.module)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        optimizer = make_optimizer(recipe, self.steps_per_epoch)
        self.state = self.place(State(params, optimizer.init(params), zero_totals()))
        self._compile(optimizer)
        self.compile_seconds = time.perf_counter() - start

    def _compile(self, optimizer: optax.GradientTransformation) -> None:
        """The programs, for the shapes that every batch has."""
        empty = batched(np.array([-1]), self.batch_size, self.devices)[0]
        alone = self.devices == 1 and jax.default_backend() == "cpu"
        at_once = -(-len(empty) // min(max(len(empty) // PART, 1), PARTS)) if alone else len(empty)

        def step(state: State, split: Split, batch: Batch) -> tuple[State, Array]:
            batch = jax.lax.with_sharding_constraint(batch, self._divided)
            return training_step(self.forward, self.loss, optimizer, state, split, batch, at_once)

        def steps(state: State, split: Split, batches: Batch) -> tuple[State, Array]:
            return jax.lax.scan(lambda state, batch: step(state, split, batch), state, batches)

        evaluated = nnx.clone(self.module)
        evaluated.eval()
        predict, _ = functional(evaluated)

        def evaluate(params: nnx.State, totals: Totals, split: Split, rows: Array) -> tuple[Totals, Array]:
            rows = jax.lax.with_sharding_constraint(rows, self._divided)
            return evaluation_step(predict, self.loss, params, totals, split, rows)

        def compiled(program: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()) -> Callable[..., Any]:
            jitted = jax.jit(program, in_shardings=self._whole, out_shardings=self._whole, donate_argnums=donated)
            return jitted.lower(*arguments).compile()

        batch = self._with_masks(empty)
        self._step = compiled(step, self.state, self.train, batch, donated=(0,))
        if self.dispatch > 1:
            batches = jax.tree.map(lambda array: np.stack([array] * self.dispatch), batch)
            self._steps = compiled(steps, self.state, self.train, batches, donated=(0,))
        rows = batched(np.arange(1), EVALUATION_BATCH, self.devices)[0]
        self._evaluate = compiled(evaluate, self.state.params, zero_totals(), self.test, rows)

    def trained(self) -> nnx.Module:
        """The model with what it has learned."""
        module = nnx.clone(self.module)
        nnx.update(module, self.state.params)
        return module

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
        """Every training image that is left of the epoch; after at least one dispatch, ``stop`` ends it early."""
        start = time.perf_counter()
        if not self.step:
            self.order = self.random.order(self.epoch, len(self.train.labels))
            self.state = self.state._replace(totals=zero_totals())
        batches, costs = batched(self.order, self.batch_size, self.devices), [jnp.zeros(())]
        while self.step < len(batches):
            costs[-1].block_until_ready()  # at most one dispatch ahead of the device: progress and Ctrl-C are true
            costs = self._advance(batches[self.step :])
            for cost in costs:
                self.step += 1
                on_step(self.step, cost)
            if stop.is_set():
                break
        return read(self.state.totals, self.step, min(self.step * self.batch_size, len(self.order)), start)

    def _advance(self, batches: np.ndarray) -> Sequence[Array]:
        """One dispatch of the next steps, which begins at a multiple of its length or is a single step; their costs."""
        if self.dispatch == 1 or len(batches) < self.dispatch or self.steps_done % self.dispatch:
            self.state, cost = self._step(self.state, self.train, self._with_masks(batches[0]))
            return [cost]
        drawn = [self._with_masks(rows) for rows in batches[: self.dispatch]]
        self.state, costs = self._steps(self.state, self.train, jax.tree.map(lambda *each: np.stack(each), *drawn))
        return list(costs)

    def _with_masks(self, rows: np.ndarray) -> Batch:
        """A batch; dropout's masks are drawn for its images alone."""
        return rows, self.random.masks(int(np.sum(rows >= 0)), len(rows))

    def evaluate(self) -> tuple[Phase, np.ndarray]:
        """Every test image once: the means, and the model's outputs in order."""
        start = time.perf_counter()
        batches = batched(np.arange(len(self.test.labels)), EVALUATION_BATCH, self.devices)
        totals, outputs = zero_totals(), []
        for rows in batches:
            totals, output = self._evaluate(self.state.params, totals, self.test, rows)
            outputs.append(output)
        phase = read(totals, len(batches), len(self.test.labels), start)
        return phase, np.concatenate(outputs)[batches.ravel() >= 0]

    def place(self, tree: Any) -> Any:
        """The same on every device."""
        return jax.jit(lambda tree: tree, out_shardings=self._whole)(tree)
