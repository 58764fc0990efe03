"""log_softmax, exact on confident rows."""

from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Num

from jaxloss import _checks
from jaxloss._class_axis import ClassAxis, Peaks, apart
from jaxloss._halves import cast, cast_sum

ROWS = "jaxloss: one number to a row"
# A function whose gradient keeps its arguments and what is so named, and makes the rest again.
from_rows = partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(ROWS))


@no_type_check
def log_softmax(
    logits: Num[ArrayLike, "..."], *, axis: int = -1, dtype: DTypeLike | None = None
) -> Float[Array, "..."]:
    r"""Log-probabilities of the softmax along one axis, in nats.

    .. math:: \log p_c = (z_c - m) - \log(1 + r), \quad m = \max_j z_j, \quad r = \sum_{j \ne \arg\max} e^{z_j - m}

    Because r leaves out the maximum, a confident row keeps all its digits: the largest log-probability of
    [20, 0, 0] is -4.12e-9, where PyTorch and `jax.nn.log_softmax` give 0.

    Args:
        logits: unnormalised scores, any shape, floating. Integers need `dtype`.
        axis: the class axis. -1 is the channels-last convention of JAX, 1 is PyTorch's layout.
        dtype: cast the logits to this dtype *first*, as PyTorch does. None keeps their own.

    Returns:
        An array of the shape of `logits`, in `dtype` or the dtype of `logits`. Half types accumulate in float32.

    Raises:
        TypeError: integer, bool or complex logits without `dtype`, or a `dtype` that is not floating.
        IndexError: `axis` out of range.

    Edge values: a -inf logit has log-probability -inf, whose gradient alone it gets; a slice that is all -inf, or holds
    +inf or NaN, is NaN; a 0-d array gives 0; an empty array gives an empty array.

    Examples:
        >>> import jax.numpy as jnp, jaxloss
        >>> jaxloss.log_softmax(jnp.array([20.0, 0.0, 0.0]))
        Array([-4.1223074e-09, -2.0000000e+01, -2.0000000e+01], dtype=float32)

    References:
        https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.log_softmax.html
    """
    logits = _checks.logits_array("log_softmax", logits, dtype)
    return _log_softmax(logits, axis=_checks.axis("log_softmax", axis, logits.ndim))


@partial(jax.jit, static_argnames="axis")
def _log_softmax(logits: Float[Array, "..."], *, axis: int) -> Float[Array, "..."]:
    if logits.size == 0 or logits.ndim == 0:
        return jnp.zeros_like(logits) * logits
    if logits.dtype == accumulator_dtype(logits):
        return log_softmax_core(ClassAxis(axis), logits, logits, logits.dtype)[0]

    def of_half(logits: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = accumulator(logits)
        class_axis = ClassAxis(axis).of_cast(logits, wide.dtype)
        return log_softmax_core(class_axis, wide, logits, logits.dtype)[0]

    return from_rows(of_half)(logits)


def accumulator_dtype(x: Array) -> jnp.dtype:
    """The dtype that sums are kept in: float32 for half types, else the array's own."""
    return _checks.promote(x.dtype, jnp.float32)


def accumulator(x: Array) -> Float[Array, "..."]:
    """Cast to that dtype."""
    return cast(x, accumulator_dtype(x))


def peaks_of_rows(axis: ClassAxis, x: Float[Array, "..."], dtype: jnp.dtype) -> Peaks:
    """The peaks, of which a gradient keeps the maximum."""
    peaks = axis.peaks(x, dtype)
    return peaks._replace(top=checkpoint_name(peaks.top, ROWS))


def excess(
    axis: ClassAxis, logits: Float[Array, "..."], peaks: Peaks, *tops: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Each row's Σ exp(logits - max) - 1, exact also where one class has almost all the probability.

    The maximum and all that ties with it are left out of the sum, and counted. Of few classes, along another axis than
    the last and off the CPU the sum of e - ⌊e⌋ leaves them out, and the plain sum tells how many they were.
    If `axis` is lean the logits are those before the cast. `tops` is the maximum twice: the same array if
    exp(logits - max) is wanted in memory anyway, else two `apart`.
    """
    if peaks.below_and_ties is not None:
        below, ties = peaks.below_and_ties
        return below + (ties - 1)
    if axis.sums_in_one_pass(logits):
        exponentials = jnp.exp(logits.astype(tops[0].dtype) - axis.expand(tops[0]))
        others, total = axis.both_sums(exponentials - jnp.floor(exponentials), exponentials)
        return others + (jnp.round(total - others) - 1)
    first, second = zip(axis.copies(logits, 2), map(axis.expand, tops), strict=True)
    if axis.has_whole_rows_on_cpu(logits):
        others, maxima = axis.sum_of(_below_top, *first), axis.sum_of(_is_top, *second)
    else:
        exponentials, again = (jnp.exp(x.astype(top.dtype) - top) for x, top in (first, second))
        others = axis.sum(again - jnp.floor(again))
        maxima = jnp.round(axis.sum(exponentials) - others)
    return others + (maxima - 1)


# Both tell the maximum by comparison, not by a difference of 0: where x is a product, of which each sum makes its own,
# a CPU takes the product and the difference in one operation or in two, and rounds them otherwise.
def _below_top(x: Array, top: Array) -> Array:
    x = x.astype(top.dtype)
    exponentials = jnp.exp(x - top)
    # Not 0 at the maximum, which has a derivative too: a scan in reverse mode takes this one and no custom rule.
    return jnp.where(x == top, exponentials - lax.stop_gradient(exponentials), exponentials)


def _is_top(x: Array, top: Array) -> Array:
    return (x.astype(top.dtype) == top).astype(top.dtype)


def is_likely(probs: Float[Array, "..."]) -> Bool[Array, "..."]:
    """True at a class whose 1 - p would lose digits: p > 2/3, so one to a row at most."""
    return lax.stop_gradient(probs) > 2 / 3


def log_softmax_core(
    axis: ClassAxis, logits: Float[Array, "..."], narrow: Float[Array, "..."], dtype: jnp.dtype
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Log-probabilities in `dtype`, and each row's log Σ exp(logits - max), of logits that were cast from `narrow`."""
    source = axis.read(logits, narrow)  # not stopped: `linear_log_prob` would lose a second derivative
    peaks = peaks_of_rows(axis, narrow, logits.dtype)
    normalizer = checkpoint_name(jnp.log1p(excess(axis, source, peaks, *apart(peaks.top, 2))), ROWS)
    return _log_probs(axis, dtype, logits, peaks.top, normalizer)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _log_probs(
    axis: ClassAxis,
    dtype: jnp.dtype,
    logits: Float[Array, "..."],
    top: Float[Array, "..."],
    normalizer: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both results, whose derivatives are those of functions of the logits alone.

    The second has no reader but the rule below: taken from the arguments there, it would be kept once more.
    """
    return cast((logits - axis.expand(top)) - axis.expand(normalizer), dtype), normalizer


@_log_probs.defjvp
def _log_probs_jvp(axis: ClassAxis, dtype: jnp.dtype, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    log_probs, normalizer = _log_probs(axis, primals[0].dtype, *primals)

    @partial(jax.checkpoint, prevent_cse=False)  # the residual is log_probs, not a second array of that size
    def tangent(
        log_probs: Float[Array, "..."], normalizer: Float[Array, "..."], dlogits: Float[Array, "..."]
    ) -> tuple[Array, Array]:
        # Where 1 - p would lose digits it is written -expm1(log p), and the 1 is taken out first. The inner jit keeps
        # the transpose in that order: g - Σg vanishes exactly before p joins it.
        probs = axis.exp(log_probs)
        likely = is_likely(probs)
        first, ones = jax.jit(lambda d: (d, axis.sum(jnp.where(likely, d, 0))))(dlogits)
        at_likely = axis.sum(jnp.where(likely, dlogits, 0))
        rest = axis.sum(jnp.where(likely, probs - lax.stop_gradient(probs), probs) * dlogits)
        mean = jnp.expm1(-lax.stop_gradient(normalizer)) * at_likely + rest
        return cast_sum(dtype, first, -axis.expand(ones), -axis.expand(mean)), axis.sum(probs * dlogits)

    return (cast(log_probs, dtype), normalizer), tangent(log_probs, normalizer, tangents[0])
