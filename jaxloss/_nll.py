"""nll_loss, and how rows become a loss: class weights, ignored and wrong targets, reductions."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Num

from jaxloss import _checks
from jaxloss._checked_targets import checked_targets
from jaxloss._checks import Size
from jaxloss._class_axis import ClassAxis, has_at_least, on_explicit_mesh
from jaxloss._log_softmax import accumulator

Reduction = Literal["none", "mean", "sum"]


@no_type_check
def nll_loss(
    log_probs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    weight: Num[ArrayLike, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    axis: int = -1,
) -> Float[Array, "..."]:
    r"""Negative log-likelihood of the target classes, in nats, from log-probabilities.

    .. math:: \ell_n = -w_{y_n} \log p_{n, y_n}, \qquad \text{mean} = \sum_n \ell_n / \sum_n w_{y_n}

    Both sums leave out the rows whose target is `ignore_index`. `jaxloss.nll` is the same function. Feed it the output
    of `log_softmax`; for logits use `cross_entropy`.

    Args:
        log_probs: log-probabilities, floating; the classes on `axis`. (batch, classes), (classes,) or any more axes.
        targets: class indices of any integer dtype, in [0, classes) or `ignore_index`; the shape of `log_probs` without
            `axis`. One row (classes,) also takes a target of shape (1,).
        weight: (classes,), any real numbers; None weighs all classes 1.
        ignore_index: rows with this target contribute nothing: loss 0 and gradient 0.
        reduction: "mean" (weighted mean over the rows that are not ignored), "sum", or "none".
        axis: the class axis of `log_probs`. 1 is PyTorch's layout.

    Returns:
        A scalar, or with `reduction="none"` (and more than one row) the shape of `targets`; the dtype of `log_probs`.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
        TypeError: `log_probs` not floating, `targets` not integers.
        IndexError: `axis` out of range, or concrete targets out of range. Under jit, where values are unknown, such a
            row's loss is NaN and so is its gradient; under `checkify` it is an error that names the target.

    Edge values: no rows give NaN ("mean"), 0 ("sum") or an empty array; when every row is ignored the mean is NaN with
    gradient 0; a log-probability of -inf at the target gives +inf; NaN in an ignored row has no effect.

    Examples:
        >>> import jax.numpy as jnp, jaxloss
        >>> log_probs = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]))
        >>> jaxloss.nll_loss(log_probs, jnp.array([0, 2]))
        Array(0.35667497, dtype=float32)

    References:
        https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.nll_loss.html
    """
    name = "nll_loss"
    log_probs = _checks.floating_array(name, "log_probs", log_probs)
    axis = _checks.axis(name, axis, log_probs.ndim)
    targets = _checks.index_targets(name, targets, log_probs, "log_probs", axis, ignore_index)
    weight = _checks.weight(name, weight, log_probs.shape[axis])
    return _nll_loss(
        log_probs,
        targets,
        weight,
        ignore_index=int(ignore_index),
        reduction=_checks.reduction(name, reduction),
        axis=axis,
    )


@partial(jax.jit, static_argnames=("ignore_index", "reduction", "axis"))
def _nll_loss(
    log_probs: Float[Array, "..."],
    targets: Integer[Array, "..."],
    weight: Num[Array, " classes"] | None,
    *,
    ignore_index: int,
    reduction: Reduction,
    axis: int,
) -> Float[Array, "..."]:
    class_axis = ClassAxis(axis)
    targets, weight = as_split(class_axis, log_probs, targets, weight)
    values = accumulator(class_axis.pick(log_probs, targets, spread=True))
    kept, row_weights = weigh_rows(class_axis, class_axis.size(log_probs), targets, weight, ignore_index, values.dtype)
    losses = jnp.where(kept, -row_weights * values, 0)
    (loss,) = reduce_rows([losses], row_weights, reduction, weighted=weight is not None)
    return loss.astype(log_probs.dtype)


def as_split(axis: ClassAxis, x: Array, targets: Array, weight: Array | None) -> tuple[Array, Array | None]:
    """Targets and weight on the explicit mesh axes of `x`, without which elementwise arithmetic is ambiguous."""
    spec = list(jax.typeof(x).sharding.spec)
    by_class = spec[axis.position : axis.position + 1]
    rows = spec if targets.ndim == x.ndim else spec[: axis.position] + spec[axis.position + 1 :]
    return split_as(targets, rows), None if weight is None else split_as(weight, by_class)


def split_as(x: Array, spec: Iterable[Any]) -> Array:
    """The array, split over these explicit mesh axes."""
    same = tuple(jax.typeof(x).sharding.spec) == tuple(spec)
    return x if same else jax.sharding.reshard(x, jax.sharding.PartitionSpec(*spec))


def weigh_rows(
    axis: ClassAxis,
    classes: Size,
    targets: Integer[Array, "..."],
    weight: Num[Array, " classes"] | None,
    ignore_index: int,
    dtype: jnp.dtype,
) -> tuple[Bool[Array, "..."], Float[Array, "..."]]:
    """Which rows are kept, and each row's weight: 0 if ignored, NaN if its target is no class, else the class weight.

    The NaN is what carries a wrong label into the loss and every gradient it touches.
    """
    targets = checked_targets(targets, classes, ignore_index)
    kept = targets != ignore_index
    valid = (targets >= 0) & (targets < classes)
    weights = jnp.ones_like(targets, dtype) if weight is None else _weight_at(axis, weight, targets, dtype)
    return kept, jnp.where(kept, weights * one_or_nan(kept & ~valid, dtype), 0)


def one_or_nan(bad: Bool[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """1, and NaN where `bad`: computed, since `jax.debug_nans` takes a literal NaN outside of jit for a fault."""
    infinite = jnp.where(bad, jnp.inf, jnp.zeros((), dtype))
    return 1 + (infinite - infinite)


def _weight_at(
    axis: ClassAxis, weight: Num[Array, " classes"], targets: Integer[Array, "..."], dtype: jnp.dtype
) -> Float[Array, "..."]:
    weight = weight.astype(dtype)
    if weight.size == 0:
        return jnp.full(targets.shape, jnp.nan, dtype)
    local = axis.local(targets, weight.size)
    if on_explicit_mesh(weight) or on_explicit_mesh(targets):  # a gather is ambiguous there, more so under vmap
        chosen = lax.broadcasted_iota(local.dtype, (*local.shape, weight.size), local.ndim) == local[..., None]
        values = jnp.sum(jnp.where(chosen, jnp.expand_dims(weight, range(local.ndim)), 0), -1)
    else:
        values = weight.at[jnp.clip(local, 0, weight.size - 1)].get(mode="promise_in_bounds")
    return axis.from_owner(values, local, weight.size)


def reduce_rows(
    losses: list[Float[Array, "..."]], row_weights: Float[Array, "..."], reduction: Reduction, *, weighted: bool
) -> list[Float[Array, "..."]]:
    """Each of several losses of the rows as it is, its sum, or its sum over the sum of the rows' weights.

    Only if `weighted` may these have a derivative. Otherwise they have none, not even one of 0, which would be NaN
    times an infinite loss.
    """
    if reduction == "none":
        return losses
    if reduction == "sum":
        return [jnp.sum(each) for each in losses]
    if weighted or has_at_least(1025, row_weights) or on_explicit_mesh(losses[0]):  # whose rows may be split otherwise
        divisor = jnp.sum(row_weights)
        return [jnp.sum(each) / divisor for each in losses]
    # With few rows every operation of the compiled program counts: one less is 4 % at 128 x 10.
    *totals, divisor = jnp.sum(jnp.stack([*losses, row_weights]), range(1, row_weights.ndim + 1))
    return [total / lax.stop_gradient(divisor) for total in totals]
