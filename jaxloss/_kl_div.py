"""kl_div: the sibling of cross entropy between distributions."""

from functools import partial
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, ArrayLike, Float, Num

from jaxloss import _checks
from jaxloss._log_softmax import accumulator
from jaxloss._nll import split_as

KLReduction = Literal["none", "mean", "sum", "batchmean"]


@no_type_check
def kl_div(
    log_probs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    log_target: bool = False,
    reduction: KLReduction = "mean",
) -> Float[Array, "..."]:
    r"""Kullback-Leibler divergence of the model from the target distribution, in nats, elementwise.

    .. math:: \ell = t\,(\log t - \log p), \qquad 0 \log 0 = 0

    Cross entropy with soft targets less the targets' own entropy, so its gradient to `log_probs` is the same.

    Args:
        log_probs: log-probabilities of the model, floating, any shape.
        targets: probabilities, or with `log_target` log-probabilities, in a shape that broadcasts against `log_probs`.
        log_target: whether `targets` are log-probabilities.
        reduction: "batchmean" divides the sum by the size of the first axis and is the divergence per row;
            "mean" divides by the number of *elements*, which PyTorch keeps for compatibility; "sum"; or "none".

    Returns:
        A scalar, or with `reduction="none"` the broadcast shape; the dtypes of the arguments promoted together.

    Raises:
        TypeError: arguments that are not floating.
        ValueError: shapes that do not broadcast, or an unknown reduction.

    Edge values: a target of 0 costs 0 if `log_probs` is finite there and NaN if it is -inf (0 · inf), as in PyTorch;
    a negative target is NaN; no elements give NaN, or 0 under "sum".

    Examples:
        >>> import jax.numpy as jnp, jaxloss
        >>> log_probs = jaxloss.log_softmax(jnp.array([[1.0, 2.0, 3.0]]))
        >>> jaxloss.kl_div(log_probs, jnp.array([[0.0, 0.0, 1.0]]), reduction="batchmean")
        Array(0.40760595, dtype=float32)

    References:
        https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.kl_div.html
    """
    name = "kl_div"
    log_probs = _checks.floating_array(name, "log_probs", log_probs)
    targets = _checks.floating_array(name, "targets", targets)
    _checks.broadcastable(name, log_probs.shape, targets.shape)
    reduction = _checks.reduction(name, reduction, ("none", "mean", "sum", "batchmean"))
    return _kl_div(log_probs, targets, log_target=_checks.flag(name, "log_target", log_target), reduction=reduction)


@partial(jax.jit, static_argnames=("log_target", "reduction"))
def _kl_div(
    log_probs: Float[Array, "..."], targets: Float[Array, "..."], *, log_target: bool, reduction: KLReduction
) -> Float[Array, "..."]:
    dtype = _checks.promote(log_probs.dtype, targets.dtype)
    log_p, t = (accumulator(x.astype(dtype)) for x in (log_probs, targets))
    shape = jnp.broadcast_shapes(log_p.shape, t.shape)
    log_p, t = jnp.broadcast_to(log_p, shape), jnp.broadcast_to(t, shape)
    spec = jax.typeof(log_p).sharding.spec
    t = split_as(t, spec) if any(spec) else t
    losses = jnp.exp(t) * (t - log_p) if log_target else xlogy(t, t) - t * log_p
    if reduction == "none":
        return losses.astype(dtype)
    batch = log_probs.shape[0] if log_probs.ndim else 1
    divisor = {"sum": 1, "mean": losses.size, "batchmean": batch}[reduction]
    return (jnp.sum(losses) / jnp.asarray(divisor, losses.dtype)).astype(dtype)
