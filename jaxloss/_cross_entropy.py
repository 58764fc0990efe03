"""cross_entropy, with class indices or class probabilities as targets."""

from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Num

from jaxloss import _checks
from jaxloss._class_axis import ClassAxis, apart
from jaxloss._halves import cast
from jaxloss._log_probs import expected_log_prob, target_log_prob
from jaxloss._log_softmax import ROWS, accumulator_dtype, from_rows, peaks_of_rows
from jaxloss._nll import Reduction, as_split, reduce_rows, weigh_rows

# Elements from which on exponentials in float32, for the gradient of bfloat16, are not stored: these would take fresh
# pages from the operating system at every call, and computing them twice takes half as long.
LARGE = 2**22


@no_type_check
def cross_entropy(
    logits: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    weight: Num[ArrayLike, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float | Float[ArrayLike, ""] = 0.0,
    z_loss: float | Float[ArrayLike, ""] = 0.0,
    axis: int = -1,
    class_axis_name: str | tuple[str, ...] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    r"""Softmax cross entropy of logits against class indices or class probabilities, in nats.

    With t the one-hot or given probabilities, smoothed to t' = (1 - ε) t + ε / classes:

    .. math:: \ell_n = -\sum_c w_c\, t'_{nc} \log \mathrm{softmax}(z_n)_c + k\, a_n\, \mathrm{lse}(z_n)^2

    where lse is log Σ exp z, ε is `label_smoothing`, k is `z_loss` and a_n = Σ_c w_c t_c is the row's weight. The
    targets are probabilities if their shape is that of `logits`, else class indices: PyTorch's rule. The mean over
    index targets divides by the sum of the weights of the targets that are not ignored; over probabilities, by the
    number of rows.

    Args:
        logits: unnormalised scores, floating, the classes on `axis`: (batch, classes), (classes,) or any more axes.
        targets: class indices of any integer dtype, in [0, classes) or `ignore_index`, in the shape of `logits` without
            `axis`; or class probabilities, floating, in the shape of `logits` (not checked to be normalised). One row
            (classes,) also takes an index of shape (1,).
        weight: (classes,), any real numbers; None weighs all classes 1.
        ignore_index: rows with this target contribute nothing: loss 0 and gradient 0. Index targets only.
        reduction: "mean", "sum" or "none".
        label_smoothing: ε in [0, 1]; may be a traced scalar.
        z_loss: k ≥ 0, keeps the softmax normaliser near 1; may be a traced scalar.
        axis: the class axis of `logits`. -1 is the channels-last convention of JAX, 1 is PyTorch's layout.
        class_axis_name: inside `jax.shard_map`, the mesh axis that splits the classes, or a tuple of several.
            `logits`, probability targets and `weight` are then this device's shards, class indices count over all
            classes, and the result is replicated over that mesh axis.
        dtype: of the result. `jnp.float32` keeps the precision in which half types are accumulated. None keeps the
            dtype of `logits` (for probabilities, of `logits` and `targets` promoted together).

    Returns:
        A scalar, or with `reduction="none"` (and more than one row) the shape of `logits` without `axis`.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, `label_smoothing` or `z_loss` out of range,
            an `ignore_index` ≥ 0 with probability targets.
        TypeError: `logits` not floating; targets that are floating in an index shape, integers in the shape of
            `logits`, or bool.
        IndexError: `axis` out of range, or concrete targets out of range (reading them waits for the device: jit the
            caller to avoid it). Under jit, where values are unknown, such a row's loss is NaN and so is its gradient;
            under `checkify` it is an error that names the target.

    Edge values: no rows give NaN ("mean"), 0 ("sum") or an empty array; when every row is ignored the mean is NaN with
    gradient 0 to logits and weight; a logit of -inf has probability 0 and gradient 0, makes the loss +inf at the target
    or under label smoothing, and NaN against a probability target of 0 (mask both: replace the logit by a finite one
    where the probability is 0); a row that is all -inf, or holds +inf or NaN, is NaN in itself only; NaN in an ignored
    row has no effect.

    Sharding: logits whose classes are split over a mesh need nothing special under jit; inside `shard_map` give
    `class_axis_name`. If the classes do not divide the mesh, pad the logits with -inf (and the weights with 1): same
    loss, gradient 0 there. Under label smoothing -inf means +inf, so choose a mesh that divides them.
    Where `shard_map` splits the rows, sum and count globally::

        loss = cross_entropy(logits, targets, reduction="sum")
        count = jnp.sum(targets != -100)
        mean = lax.psum(loss, "data") / lax.psum(count, "data")

    With `shard_map(check_vma=False)` take gradients outside of it: inside, JAX multiplies them by the shards' number.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxloss
        >>> logits = jnp.array([[10.0, 3.0, 1.0], [-1.0, 0.0, -4.0]])
        >>> jaxloss.cross_entropy(logits, jnp.array([1, 2]))
        Array(5.6637983, dtype=float32)
        >>> jaxloss.cross_entropy(logits, jax.nn.one_hot(jnp.array([1, 2]), 3), label_smoothing=0.1).round(4)
        Array(5.4638, dtype=float32)

    References:
        https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.cross_entropy.html; label smoothing: Szegedy
        et al., https://arxiv.org/abs/1512.00567; z-loss: Chowdhery et al., https://arxiv.org/abs/2204.02311 section 5.
    """
    name = "cross_entropy"
    logits = _checks.floating_array(name, "logits", logits)
    axis = _checks.axis(name, axis, logits.ndim)
    class_axis_name = _checks.mesh_axes(name, class_axis_name)
    targets = _checks.targets(name, targets, logits, axis, ignore_index, class_axis_name)
    return _cross_entropy(
        logits,
        targets,
        _checks.weight(name, weight, logits.shape[axis]),
        _checks.fraction(name, "label_smoothing", label_smoothing, upper=1.0),
        _checks.fraction(name, "z_loss", z_loss, upper=float("inf")),
        ignore_index=int(ignore_index),
        reduction=_checks.reduction(name, reduction),
        axis=ClassAxis(axis, class_axis_name),
        dtype=_checks.result_dtype(name, dtype, logits, targets),
    )


@partial(jax.jit, static_argnames=("ignore_index", "reduction", "axis", "dtype"))
def _cross_entropy(
    logits: Float[Array, "..."],
    targets: Float[Array, "..."] | Integer[Array, "..."],
    weight: Num[Array, " classes"] | None,
    label_smoothing: Float[Array, ""] | float | None,
    z_loss: Float[Array, ""] | float | None,
    *,
    ignore_index: int,
    reduction: Reduction,
    axis: ClassAxis,
    dtype: jnp.dtype,
) -> Float[Array, "..."]:
    targets, weight = as_split(axis, logits, targets, weight)
    wide = _checks.promote(accumulator_dtype(logits), dtype)
    label_smoothing, z_loss = (None if x is None else jnp.asarray(x, wide) for x in (label_smoothing, z_loss))
    options = (weight, label_smoothing, z_loss)
    # What is kept for the gradient besides rows: logits and targets as they came, not what is made of them.
    if jnp.issubdtype(targets.dtype, jnp.floating):
        losses = from_rows(_probability_losses, static_argnums=(0, 3))(axis, logits, targets, wide, *options)
        # PyTorch counts the rows as elements / classes, so that the mean over no classes is NaN.
        row_weights = jnp.full_like(losses, logits.shape[axis.position] != 0)
        (loss,) = reduce_rows([losses], row_weights, reduction, weighted=False)
        return loss.astype(dtype)
    index_loss = from_rows(_index_loss, static_argnums=(0, 2, 7, 8))
    return index_loss(axis, logits, wide, targets, *options, ignore_index, reduction).astype(dtype)


def losses_of_rows(
    axis: ClassAxis,
    logits: Float[Array, "..."],
    targets: Float[Array, "..."] | Integer[Array, "..."],
    weight: Num[Array, " classes"] | None,
    label_smoothing: Float[Array, ""] | float | None,
    z_loss: Float[Array, ""] | float | None,
    ignore_index: int,
) -> Float[Array, "..."]:
    """Each row's loss in the dtype of the logits, for either kind of targets."""
    options = (weight, label_smoothing, z_loss)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        return _probability_losses(axis, logits, targets, logits.dtype, *options)
    return _index_loss(axis, logits, logits.dtype, targets, *options, ignore_index, "none")


def _index_loss(
    axis: ClassAxis,
    narrow: Float[Array, "..."],
    dtype: jnp.dtype,
    targets: Integer[Array, "..."],
    weight: Num[Array, " classes"] | None,
    label_smoothing: Float[Array, ""] | float | None,
    z_loss: Float[Array, ""] | float | None,
    ignore_index: int,
    reduction: Reduction,
) -> Float[Array, "..."]:
    """The loss, or each row's, of logits that are cast to `dtype` first."""
    kept, row_weights = weigh_rows(axis, axis.size(narrow), targets, weight, ignore_index, dtype)
    logits = cast(narrow, dtype)  # first: with a select in bfloat16 XLA would not use the CPU's vectors
    # The same values, whose derivative is 0 in ignored rows, also where NaN multiplies it.
    logits = jnp.where(axis.expand(kept), logits, lax.stop_gradient(logits))
    axis = axis.of_cast(narrow, dtype, least=LARGE)
    peaks = peaks_of_rows(axis, narrow, dtype)
    log_prob, normalizer = target_log_prob(axis, logits, peaks, targets, kept, narrow)

    terms: list[tuple[Array | float, Array]]  # a factor and the rows' losses
    terms = [(1 if label_smoothing is None else 1 - label_smoothing, -row_weights * log_prob)]
    if label_smoothing is not None:
        smoothing = _smoothing_losses(axis, logits, peaks.top, normalizer, kept, weight, narrow)
        terms.append((label_smoothing / axis.size(logits), smoothing))
    if z_loss is not None:
        terms.append((z_loss, row_weights * (peaks.top + normalizer) ** 2))
    # Reduced one by one, so that weights of 0 throughout are NaN as in PyTorch.
    rows = [jnp.where(kept, losses, 0) for _, losses in terms]
    reduced = reduce_rows(rows, row_weights, reduction, weighted=weight is not None)
    factors = [factor for factor, _ in terms]
    return factors[0] * reduced[0] + sum(map(_option, factors[1:], reduced[1:]), start=jnp.zeros((), dtype))


def _option(factor: Float[Array, ""] | float, loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """Factor times loss; 0 if the factor is 0, also where the loss is infinite: a traced 0 switches the option off."""
    return factor * jnp.where((factor == 0) & jnp.isinf(loss), 0, loss)


def _smoothing_losses(
    axis: ClassAxis,
    logits: Float[Array, "..."],
    top: Float[Array, "..."],
    normalizer: Float[Array, "..."],
    kept: Bool[Array, "..."],
    weight: Num[Array, " classes"] | None,
    narrow: Float[Array, "..."],
) -> Float[Array, "..."]:
    """-Σ_c w_c log p_c of each row, as W · normalizer - Σ_c w_c (z_c - max)."""
    if weight is None:
        class_weights, total = jnp.ones((1,) * logits.ndim, logits.dtype), axis.size(logits)
    else:
        class_weights = along_classes(axis, weight, logits)
        total = axis.sum(class_weights)
    weighted_sum = checkpoint_name(_weighted_sum(axis, class_weights, logits, top, kept, narrow), ROWS)
    return total * normalizer - weighted_sum


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted_sum(
    axis: ClassAxis,
    class_weights: Float[Array, "..."],
    logits: Float[Array, "..."],
    top: Float[Array, "..."],
    kept: Bool[Array, "..."],
    narrow: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Σ_c w_c (z_c - max) of each row: its value that of `narrow`, its derivative that of `logits`, which are equal."""
    (top,) = apart(top, 1)
    if class_weights.size > 1:  # of weights that the gradient shares XLA would write the broadcast to memory
        (class_weights,) = apart(class_weights, 1)
    (narrow,) = apart(narrow, 1)  # and of logits in a half type, their cast

    def terms(x: Array, top: Array, class_weights: Array, kept: Array) -> Array:
        differences = x.astype(top.dtype) - top
        spread = jnp.zeros_like(differences) + class_weights
        # The same weights, whose derivative is 0 in ignored rows: a scan in reverse mode drops the rule below.
        return differences * jnp.where(kept, spread, lax.stop_gradient(spread))

    return axis.sum_of(terms, narrow, axis.expand(top), class_weights, axis.expand(kept))


@partial(_weighted_sum.defjvp, symbolic_zeros=True)
def _weighted_sum_jvp(axis: ClassAxis, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    class_weights, logits, top, kept, _ = primals
    dweights, dlogits, *_ = tangents
    total = _weighted_sum(axis, *primals)
    tangent = jnp.zeros_like(total)
    if not isinstance(dlogits, SymbolicZero):
        along = axis.sum(class_weights * dlogits)
        if axis.is_whole_on_cpu(logits):  # or the loop over the gradient makes the row's factor for every class
            (along,) = apart(along, 1)
        tangent += along
    if not isinstance(dweights, SymbolicZero):
        # Only the weights' gradient reads the logits: NaN in an ignored row stops here, at no cost to anyone else.
        tangent += axis.sum(dweights * jnp.where(axis.expand(kept), logits - axis.expand(top), 0))
    return total, tangent


def along_classes(axis: ClassAxis, weight: Num[Array, " classes"], logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Class weights shaped to broadcast against the logits."""
    shape = [1] * logits.ndim
    shape[axis.position] = weight.size
    return weight.astype(logits.dtype).reshape(shape)


def _probability_losses(
    axis: ClassAxis,
    narrow: Float[Array, "..."],
    narrow_targets: Float[Array, "..."],
    dtype: jnp.dtype,
    weight: Num[Array, " classes"] | None,
    label_smoothing: Float[Array, ""] | float | None,
    z_loss: Float[Array, ""] | float | None,
) -> Float[Array, "..."]:
    """Each row's loss, of logits and targets that are cast to `dtype` first."""
    logits, targets = cast(narrow, dtype), cast(narrow_targets, dtype)
    axis = axis.of_cast(narrow, dtype)
    class_weights = 1 if weight is None else along_classes(axis, weight, logits)

    def masses(targets: Float[Array, "..."]) -> Float[Array, "..."]:
        targets = cast(targets, dtype)
        if label_smoothing is not None:
            targets = (1 - label_smoothing) * targets + label_smoothing / axis.size(logits)
        return class_weights * targets

    peaks = peaks_of_rows(axis, narrow, dtype)
    masses_again = tuple(map(masses, axis.copies(axis.read(targets, narrow_targets), 2)))
    log_prob, extra = expected_log_prob(axis, logits, peaks, masses(targets), narrow, masses_again)
    if z_loss is None:
        return -log_prob
    row_weights = checkpoint_name(axis.sum(class_weights * targets), ROWS)
    return _option(z_loss, row_weights * (peaks.top + jnp.log1p(extra)) ** 2) - log_prob
