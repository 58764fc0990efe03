"""The training loop: what a step, an epoch and an evaluation compute, against NumPy and PyTorch."""

import itertools
from functools import partial
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from scipy.special import log_softmax

from jaxloss import cross_entropy
from train.config import Recipe, UserError
from train.data import Dataset, Split, load
from train.loop import Learner
from train.models import CNN
from train.plots import confusion, worst_mistakes
from train.schedules import make_optimizer
from train.steps import Part, State, add_part, batched, functional, take, training_step, zero_totals

STILL = Recipe("sgd", lr=1e-30, momentum=0.0, gamma=1.0, epochs=3, batch_size=32)  # no weight moves in float32
STOPPED = Event()
STOPPED.set()


def ignore(*_: object) -> None:
    """An `on_step` that looks at nothing."""


@pytest.fixture(scope="module")
def data() -> Dataset:
    """100 training images, so that the last batch of 32 is short, and all 360 test images."""
    digits = load("digits")
    return Dataset(Split(digits.train.images[:100], digits.train.labels[:100]), digits.test, digits.classes, "")


@pytest.fixture(scope="module", params=["cnn", "net"])
def still(request: pytest.FixtureRequest, data: Dataset) -> Learner:
    return Learner(request.param, STILL, data, seed=0)


def scores(learner: Learner, split: Split) -> np.ndarray:
    """Log-probabilities of a whole split at once, in evaluation mode."""
    module = learner.trained()
    module.eval()
    return log_softmax(np.asarray(module(jnp.asarray(split.images)[..., None] / 255), np.float64), axis=-1)


def test_evaluation_covers_every_image_in_order(still: Learner, data: Dataset) -> None:
    phase, outputs = still.evaluate()
    log_probs, labels = scores(still, data.test), np.asarray(data.test.labels)
    assert phase.images == len(outputs) == 360
    np.testing.assert_allclose(log_softmax(outputs.astype(np.float64), axis=-1), log_probs, atol=1e-5)
    np.testing.assert_allclose(phase.loss, -log_probs[np.arange(360), labels].mean(), rtol=1e-5)
    assert phase.accuracy == (log_probs.argmax(-1) == labels).mean()


def test_epoch_covers_every_image_and_averages_its_batches(data: Dataset) -> None:
    costs, learner = [], Learner("cnn", STILL, data, seed=0)
    phase = learner.train_epoch(Event(), lambda step, cost: costs.append(float(cost)))
    log_probs, labels = scores(learner, data.train), np.asarray(data.train.labels)
    assert (phase.steps, phase.images, len(costs)) == (4, 100, 4)
    np.testing.assert_allclose(phase.loss, -log_probs[np.arange(100), labels].mean(), rtol=1e-5)
    np.testing.assert_allclose(phase.cost, np.mean(costs), rtol=1e-6)
    assert phase.accuracy == (log_probs.argmax(-1) == labels).mean()


def test_each_epoch_has_its_own_order(data: Dataset) -> None:
    costs: dict[int, list[float]] = {1: [], 2: []}
    learner = Learner("cnn", STILL, data, seed=0)
    epochs = learner.epochs(Event(), lambda _, cost: costs[learner.epoch].append(float(cost)))
    losses = [epoch.training.loss for epoch in itertools.islice(epochs, 2)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert not np.allclose(costs[1], costs[2], rtol=1e-3)


def test_dropout_draws_new_masks_and_evaluation_none(data: Dataset) -> None:
    learner = Learner("net", STILL, data, seed=0)
    first, second = (epoch.training.loss for epoch in itertools.islice(learner.epochs(Event(), ignore), 2))
    assert abs(first - second) > 1e-6
    assert learner.evaluate()[0].loss == learner.evaluate()[0].loss


@pytest.mark.parametrize(("count", "size"), [(100, 32), (96, 32), (1, 4), (3, 1)])
def test_batched_pads_the_last_batch_only(count: int, size: int) -> None:
    batches = batched(np.arange(count), size)
    assert batches.shape == (-(-count // size), size)
    assert batches.ravel()[:count].tolist() == list(range(count))
    assert set(batches.ravel()[count:].tolist()) <= {-1}


def test_take_ignores_padding_and_scales_pixels() -> None:
    split = Split(np.full((2, 28, 28), 255, np.uint8), np.array([3, 9], np.uint8), mean=0.5, deviation=0.25)
    images, labels = take(split, jnp.array([1, -1, 0]))
    assert labels.tolist() == [9, -100, 3]
    assert images.shape == (3, 28, 28, 1)
    assert images.dtype == jnp.float32
    assert set(images.ravel().tolist()) == {2.0}


@pytest.mark.parametrize(("piece", "calls"), [(8, 1), (3, 1), (4, 2)])
def test_neither_padding_nor_parts_change_a_step(data: Dataset, piece: int, calls: int) -> None:
    forward, params = functional(CNN(nnx.Rngs(0)))
    optimizer = make_optimizer(Recipe("sgd", 0.1, 0.9, 1.0, 1, 4), steps_per_epoch=1)
    state = State(params, optimizer.init(params), zero_totals())

    @partial(jax.jit, static_argnums=(1, 2))
    def step(rows: jax.Array, piece: int, calls: int = 1) -> tuple[State, jax.Array]:
        sums = None
        for part in jnp.split(rows, calls):
            sums = add_part(forward, cross_entropy, params, sums, data.train, Part(part, (), 5), piece)
        return training_step(optimizer, state, sums, 5)

    short, short_cost = step(jnp.arange(5), 5)
    parts, parts_cost = step(jnp.array([0, 1, 2, 3, 4, -1, -1, -1]), piece, calls)
    np.testing.assert_allclose(short_cost, parts_cost, rtol=1e-6)
    np.testing.assert_allclose(short.totals, parts.totals, rtol=1e-6)
    for left, right in zip(jax.tree.leaves(short.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    assert not np.array_equal(jax.tree.leaves(short.params)[0], jax.tree.leaves(params)[0])


def test_step_reuses_the_buffers_of_the_last_state(still: Learner) -> None:
    still.step = 0
    before = jax.tree.leaves((still.state.params, still.state.optimizer, still.state.totals))
    still.train_epoch(STOPPED, ignore)
    assert all(leaf.is_deleted() for leaf in before[:-3])  # the totals start anew in each epoch


def test_stop_ends_after_the_current_step(still: Learner) -> None:
    still.step = 0
    (epoch,) = still.epochs(STOPPED, ignore)
    assert (epoch.training.steps, epoch.training.images) == (1, 32)
    assert 0 < epoch.training.loss < 5
    assert epoch.validation.images == 360


def test_batch_size_beyond_the_data_is_one_batch(data: Dataset) -> None:
    learner = Learner("net", Recipe("sgd", 0.1, 0.0, 1.0, 1, 10**9), data, seed=0)
    (epoch,) = learner.epochs(Event(), ignore)
    assert (learner.steps_per_epoch, epoch.training.steps, epoch.training.images) == (1, 1, 100)


def test_divergence_is_an_error(data: Dataset) -> None:
    with pytest.raises(UserError, match="cnn: the loss is not finite after epoch 1") as caught:
        list(Learner("cnn", Recipe("sgd", 1e30, 0.0, 1.0, 5, 32), data, seed=0).epochs(Event(), ignore))
    assert caught.value.exit_code == 1


def test_gamma_multiplies_the_rate_once_per_epoch() -> None:
    optimizer = make_optimizer(Recipe("sgd", 1.0, 0.0, 0.5, 3, 1), steps_per_epoch=2)
    state, rates = optimizer.init(jnp.ones(())), []
    for _ in range(6):
        update, state = optimizer.update(jnp.ones(()), state)
        rates.append(-float(update))
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


TORCH = {
    "sgd": partial(torch.optim.SGD, momentum=0.5),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@pytest.mark.parametrize("name", TORCH)
def test_optimizer_follows_torch_with_its_exponential_schedule(name: str) -> None:
    gradients = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    theirs = torch.ones(5, requires_grad=True)
    torch_optimizer = TORCH[name]([theirs], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(torch_optimizer, gamma=0.9)
    optimizer = make_optimizer(Recipe(name, 0.1, 0.5 * (name == "sgd"), 0.9, 4, 1), steps_per_epoch=3)
    ours = jnp.ones(5)
    state = optimizer.init(ours)
    for step, gradient in enumerate(gradients, start=1):
        theirs.grad = torch.from_numpy(gradient)
        torch_optimizer.step()
        if step % 3 == 0:
            scheduler.step()
        updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-6)
    assert abs(float(ours[0]) - 1) > 0.1


def test_confusion_counts_and_worst_mistakes_are_ordered() -> None:
    outputs = np.log([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.99, 0.01]])
    labels = np.array([0, 1, 0, 1], np.uint8)
    assert confusion(labels, outputs.argmax(-1), 2).tolist() == [[1, 1], [2, 0]]
    assert worst_mistakes(outputs, labels).tolist() == [3, 1, 2]
    assert worst_mistakes(outputs + 7, labels).tolist() == [3, 1, 2]
