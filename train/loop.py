"""The training loop: compiled steps with donated state, and an evaluation that sees every image."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxloss import cross_entropy, nll_loss
from train.config import ModelName, Recipe, RngName, UserError
from train.data import Dataset, Split
from train.randomness import RANDOMNESS
from train.schedules import learning_rate, make_optimizer
from train.steps import (
    Loss,
    Params,
    Part,
    State,
    Sums,
    Totals,
    add_part,
    batched,
    evaluation_step,
    functional,
    training_step,
    zero_sums,
    zero_totals,
)

EVALUATION_BATCH = 250
# One CPU device takes a batch in calls of at most so many images, and these in pieces of so many: the activations of a
# large batch would get fresh pages from the system in every step, which takes longer than to compute them.
CALL, PIECE = 100, 25

# Steps at once on a CPU, if a batch takes one call. In a loop XLA computes the CNN's convolutions on a single thread.
DISPATCH: dict[ModelName, int] = {"cnn": 1, "net": 8}

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


def default_dispatch(model: ModelName, recipe: Recipe) -> int:
    """How many steps are best handed to this platform's devices at once."""
    if jax.default_backend() != "cpu":
        return 20
    return DISPATCH[model] if recipe.batch_size <= CALL else 1


def read(totals: Totals, steps: int, images: int, start: float) -> Phase:
    """Wait for the device and turn sums into means: the one host read of a phase."""
    costs, losses, correct = jax.device_get(totals)
    seconds = time.perf_counter() - start
    return Phase(steps, images, float(costs) / steps, float(losses) / images, int(correct) / images, seconds)


@dataclass(frozen=True)
class Cost:
    """A batch's mean loss among those of a dispatch, which is waited for when it is read: as a float."""

    dispatch: Array
    number: int

    def __float__(self) -> float:
        """Waits."""
        return float(np.ravel(self.dispatch)[self.number])


class Learner:
    """A model, its images on every device and its compiled programs, which divide each batch over the devices.

    Everything but a batch's rows is whole on every device. What is computed does not depend on their number, but for
    rounding: the rows that fill up a batch are ignored, and dropout's masks are those of the images, wherever they are.

    Attributes:
        epoch: the one it is in, from 1.
        step: how many steps of that epoch are done.
        devices: how many there are.
        dispatch: how many steps are dispatched at once.
        order: in which that epoch takes the training images.
        began: when its training did, on time.perf_counter's clock; after a pause at a checkpoint, so much later.
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
        checkpoint_every: int = 0,
    ) -> None:
        """Draw the weights from ``seed`` and compile.

        The mesh has one axis, and may hold the devices of several processes, each with a learner of its own; without
        one there is one device. No dispatch goes beyond a multiple of ``checkpoint_every`` steps, unless that is 0.
        """
        start = time.perf_counter()
        self.model: ModelName = model
        self.loss = LOSSES[model]
        self.rng: RngName = rng
        self.recipe, self.dtype = recipe, dtype
        mesh = mesh or jax.make_mesh((1,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:1])
        self.devices = mesh.size
        self._whole, self._divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), mesh.axis_names))
        self.train, self.test = self.place((data.train, data.test))
        self.batch_size = min(recipe.batch_size, len(data.train.labels))
        self.steps_per_epoch = math.ceil(len(data.train.labels) / self.batch_size)
        self.dispatch = math.gcd(min(dispatch, self.steps_per_epoch), checkpoint_every)
        self._optimizer = make_optimizer(recipe, self.steps_per_epoch)
        self.start(seed)
        self._compile()
        self.compile_seconds = time.perf_counter() - start

    def start(self, seed: int) -> None:
        """Draw the first weights, and be at the beginning."""
        self.random = RANDOMNESS[self.rng](self.model, seed)
        self.epoch, self.step, self.order = 1, 0, np.arange(len(self.train.labels))
        self.began = time.perf_counter()
        self.module = self.random.module()
        self.forward, params = functional(self.module)
        params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.state = self.place(State(params, self._optimizer.init(params), zero_totals()))

    def _compile(self) -> None:
        """The programs, for the shapes that every batch has."""
        alone = self.devices == 1 and jax.default_backend() == "cpu"
        self._calls = -(-self.batch_size // CALL) if alone and self.dispatch == 1 else 1
        piece = PIECE if alone else None

        def divided(part: Part) -> Part:
            rows, masks = jax.lax.with_sharding_constraint(part[:2], self._divided)
            return part._replace(rows=rows, masks=masks)

        def add(params: Params, sums: Sums | None, split: Split, part: Part) -> Sums:
            return add_part(self.forward, self.loss, params, sums, split, divided(part), piece)

        def step(state: State, sums: Sums | None, split: Split, part: Part) -> tuple[State, Array]:
            return training_step(self._optimizer, state, add(state.params, sums, split, part), part.count)

        def steps(state: State, split: Split, parts: Part) -> tuple[State, Array]:
            return jax.lax.scan(lambda state, part: step(state, None, split, part), state, parts)

        evaluated = nnx.clone(self.module)
        evaluated.eval()
        predict, _ = functional(evaluated)

        def evaluate(params: Params, totals: Totals, split: Split, rows: Array) -> tuple[Totals, Array]:
            rows = jax.lax.with_sharding_constraint(rows, self._divided)
            return evaluation_step(predict, self.loss, params, totals, split, rows)

        def compiled(program: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()) -> Callable[..., Any]:
            jitted = jax.jit(program, in_shardings=self._whole, out_shardings=self._whole, donate_argnums=donated)
            return jitted.lower(*arguments).compile()

        empty, *_ = self._parts(self._batches(np.array([-1]))[0])
        self._no_sums = None if self._calls == 1 else self.place(zero_sums(self.state.params))
        self._step = compiled(step, self.state, self._no_sums, self.train, empty, donated=(0,))
        if self._calls > 1:
            self._add = compiled(add, self.state.params, self._no_sums, self.train, empty)
        if self.dispatch > 1:
            parts = jax.tree.map(lambda array: np.stack([array] * self.dispatch), empty)
            self._steps = compiled(steps, self.state, self.train, parts, donated=(0,))
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

    def epochs(self, stop: Event, on_step: Callable[[int, Cost], None]) -> Iterator[Epoch]:
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

    def train_epoch(self, stop: Event, on_step: Callable[[int, Cost], None]) -> Phase:
        """Every training image that is left of the epoch; after at least one dispatch, ``stop`` ends it early."""
        if not self.step:
            self.began = time.perf_counter()
            self.order = self.random.order(self.epoch, len(self.train.labels))
            self.state = self.state._replace(totals=zero_totals())
        batches, costs = self._batches(self.order), jnp.zeros(())
        while self.step < len(batches):
            costs = self._advance(batches[self.step :], costs)
            for number in range(costs.size):
                self.step += 1
                on_step(self.step, Cost(costs, number))
            if stop.is_set():
                break
        return read(self.state.totals, self.step, min(self.step * self.batch_size, len(self.order)), self.began)

    def _batches(self, order: np.ndarray) -> np.ndarray:
        return batched(order, self.batch_size, self.devices * self._calls)

    def _advance(self, batches: np.ndarray, last: Array) -> Array:
        """One dispatch of the next steps, which begins at a multiple of its length, or a single step; their costs.

        It waits for the last one's, so that progress and Ctrl-C are true; what the next takes is drawn in the meantime.
        """
        if self.dispatch > 1 and len(batches) >= self.dispatch and self.steps_done % self.dispatch == 0:
            parts = [part for rows in batches[: self.dispatch] for part in self._parts(rows)]
            last.block_until_ready()
            self.state, costs = self._steps(self.state, self.train, jax.tree.map(lambda *each: np.stack(each), *parts))
            return costs
        *parts, final = self._parts(batches[0])
        last.block_until_ready()
        sums = self._no_sums
        for part in parts:
            sums = self._add(self.state.params, sums, self.train, part)
        self.state, cost = self._step(self.state, sums, self.train, final)
        return cost

    def _parts(self, rows: np.ndarray) -> list[Part]:
        """A batch in as many parts as it takes calls; dropout's masks are drawn for its images alone."""
        count, size = np.sum(rows >= 0, dtype=np.int32), len(rows) // self._calls
        masks = self.random.masks(int(count), len(rows))
        some = [slice(i, i + size) for i in range(0, len(rows), size)]
        return [Part(rows[each], jax.tree.map(itemgetter(each), masks), count) for each in some]

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
