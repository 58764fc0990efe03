"""What a training computes of a batch: an optimizer step, or the outputs and how good they are."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from train.data import Split
from train.models import DropoutMasks

IGNORED = -100  # the losses' default ignore_index, as the label of the rows that only fill up a batch

Loss = Callable[..., Array]
Forward = Callable[..., Array]  # of a model's parameters and its inputs
Params = dict[str, Any]  # nested, of arrays: nnx.State has to be taken apart and built in Python at every call
Masks = tuple[DropoutMasks, ...]  # none for a model without dropout


class Part(NamedTuple):
    """A batch, or a part of one that is computed in several calls."""

    rows: Any  # of a split, -1 for none
    masks: Masks
    count: Any  # how many images the whole batch has


class Sums(NamedTuple):
    """What the parts of a batch add up to."""

    cost_and_correct: tuple[Array, Array]  # the batch's mean loss, and a count
    gradients: Params


class Totals(NamedTuple):
    """Sums that stay on the device until a phase ends."""

    costs: ArrayLike  # of every batch's mean loss
    losses: ArrayLike  # of every image's loss
    correct: ArrayLike


class State(NamedTuple):
    """What a step changes. It is donated: each step writes into the last one's buffers."""

    params: Params
    optimizer: optax.OptState
    totals: Totals


def batched(order: np.ndarray, size: int, divisor: int = 1) -> np.ndarray:
    """Cut ``order`` into rows of ``size``, filled up with -1: every batch has one shape, which ``divisor`` divides."""
    rows = np.pad(order.astype(np.int32), (0, -len(order) % size), constant_values=-1).reshape(-1, size)
    return np.pad(rows, ((0, 0), (0, -size % divisor)), constant_values=-1)


def take(split: Split, rows: Array, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Array, Array]:
    """Pixels as a model sees them, with a channel axis, and labels; row -1 is some image with the ignored label."""
    images = jnp.asarray(split.images)[rows, :, :, None].astype(dtype) / 255
    labels = jnp.where(rows < 0, IGNORED, jnp.asarray(split.labels)[rows].astype(jnp.int32))
    return (images - split.mean) / split.deviation, labels


def zero_totals() -> Totals:
    """On the host: a step writes into its last totals' buffers."""
    return Totals(*(np.zeros((), jax.dtypes.canonicalize_dtype(dtype)) for dtype in (float, float, np.int32)))


def zero_sums(params: Params) -> Sums:
    """Of no part."""
    return Sums((jnp.zeros((), dtype_of(params)), jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, params))


def finite(tree: Any) -> bool:
    """Whether all numbers in it are; waits for them."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def count_correct(outputs: Array, labels: Array) -> Array:
    """How many rows have their largest output at the label; ignored rows never do."""
    return jnp.sum(outputs.argmax(axis=-1) == labels, dtype=jnp.int32)


def dtype_of(params: Params) -> np.dtype:
    """The one in which a model computes."""
    return jax.tree.leaves(params)[0].dtype


def add_part(
    forward: Forward, loss: Loss, params: Params, sums: Sums | None, split: Split, part: Part, at_once: int | None
) -> Sums:
    """Add a part of a batch, all at once or so many images after the other, to the sums over the parts before it."""
    rows, masks, count = part
    at_once = at_once or len(rows)

    def objective(params: Params, images: Array, labels: Array, masks: Masks) -> tuple[Array, Array]:
        outputs = forward(params, images, *masks)
        return loss(outputs, labels, reduction="sum") / count, count_correct(outputs, labels)

    examples = *take(split, rows, dtype_of(params)), masks
    pieces = [jax.tree.map(itemgetter(slice(i, i + at_once)), examples) for i in range(0, len(rows), at_once)]
    found = [Sums(*jax.value_and_grad(objective, has_aux=True)(params, *piece)) for piece in pieces]
    return jax.tree.map(lambda *terms: sum(terms), *found, *([] if sums is None else [sums]))


def training_step(
    optimizer: optax.GradientTransformation, state: State, sums: Sums, count: Array
) -> tuple[State, Array]:
    """One optimizer step with what a batch of ``count`` images adds up to; also the batch's mean loss."""
    (cost, correct), gradients = sums
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    totals = Totals(state.totals.costs + cost, state.totals.losses + cost * count, state.totals.correct + correct)
    params = cast(Params, optax.apply_updates(state.params, updates))
    return State(params, optimizer_state, totals), cost


def evaluation_step(
    forward: Forward, loss: Loss, params: Params, totals: Totals, split: Split, rows: Array
) -> tuple[Totals, Array]:
    """Add the images at ``rows`` to ``totals``; also returns the model's outputs for them."""
    images, labels = take(split, rows, dtype_of(params))
    outputs = forward(params, images)
    total = loss(outputs, labels, reduction="sum")
    mean = total / jnp.sum(rows >= 0)
    totals = Totals(totals.costs + mean, totals.losses + total, totals.correct + count_correct(outputs, labels))
    return totals, outputs


def functional(module: nnx.Module) -> tuple[Forward, Params]:
    """A module as a function of its parameters, which are returned too, and its inputs."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def forward(params: Params, *inputs: Any) -> Array:
        return cast(Any, nnx.merge(graph, params, rest, copy=True))(*inputs)

    return forward, nnx.to_pure_dict(params)
