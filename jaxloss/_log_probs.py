"""The differentiable core: each row's log-probability of its target, its mean over given masses, and its entropy.

The first two do not keep an array of the size of the logits between the passes, and all stay exact on confident rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Integer

from jaxloss._class_axis import ClassAxis, Peaks, apart
from jaxloss._log_softmax import ROWS, excess, is_likely, log_softmax_core


def target_log_prob(
    axis: ClassAxis,
    logits: Float[Array, "..."],
    peaks: Peaks,
    targets: Integer[Array, "..."],
    kept: Bool[Array, "..."],
    narrow: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Each row's log-probability of its target, and log Σ exp(logits - top); of no meaning in rows that are not kept.

    The logits were cast from `narrow`.
    Leaving the target out of the sum keeps a confident row exact: 1 - p is a sum of small terms, not a difference.
    """
    at_target, others = _target_and_others(axis, logits, peaks, targets, kept, narrow)
    margin = jnp.where(kept, at_target - peaks.top, 0)
    return _join(*(checkpoint_name(rows, ROWS) for rows in (margin, others)))


@jax.custom_jvp
def _join(margin: Float[Array, "..."], others: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """log(e / s) and log s with e = exp(margin), s = e + others."""
    normalizer = jnp.log1p(others + (jnp.exp(margin) - 1))
    return margin - normalizer, normalizer


@_join.defjvp
def _join_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    (margin, others), (dmargin, dothers) = primals, tangents
    target = jnp.exp(margin)
    total = others + target
    return _join(margin, others), ((others * dmargin - dothers) / total, (target * dmargin + dothers) / total)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _target_and_others(
    axis: ClassAxis,
    logits: Float[Array, "..."],
    peaks: Peaks,
    targets: Integer[Array, "..."],
    kept: Bool[Array, "..."],
    narrow: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Each row's target's logit, and Σ exp(logits - top) over its other classes.

    Rows that are not kept have a logit of no meaning, and a sum of 0.
    """
    top, below_and_ties = peaks
    if below_and_ties is not None:
        below, ties = below_and_ties
        at_target = axis.pick(narrow, targets).astype(top.dtype)  # a TPU would widen all logits for a gather
        target = jnp.exp(at_target - top)
        # In the first case the target's derivative is taken off alone, if a scan has dropped the rule below.
        nothing = lax.stop_gradient(target) - target
        others = jnp.where(at_target == top, below + (ties - 1) + nothing, (below - target) + ties)
        at_target, others = lax.optimization_barrier((at_target, others))  # or the mean's few threads compute all rows
    elif axis.sums_in_one_pass(narrow):
        if axis.lean:  # a cast that the gradient does not share
            narrow, top = lax.optimization_barrier((narrow, top))
            logits = narrow.astype(top.dtype)
        exponentials = jnp.exp(logits - axis.expand(top))
        others, at_target = axis.both_sums(
            axis.without_target(exponentials, targets), jnp.where(axis.is_target(logits, targets), logits, 0)
        )
    else:
        others, at_target = _sum_others(axis, logits, top, targets, narrow), axis.pick(logits, targets)
    return at_target, jnp.where(kept, others, 0)


def _sum_others(
    axis: ClassAxis,
    logits: Float[Array, "..."],
    top: Float[Array, "..."],
    targets: Integer[Array, "..."],
    narrow: Float[Array, "..."],
) -> Float[Array, "..."]:
    """That sum, in rows that are kept."""
    source = logits
    if narrow.dtype == jnp.bfloat16:  # whose cast XLA's CPU backend fuses into this sum, if no other sum shares it
        source, top = lax.optimization_barrier((narrow, top))
    shape = [1] * logits.ndim
    shape[axis.position] = classes = logits.shape[axis.position]
    # Class indices in this dtype; a symbolic number of `jax.export` may be any.
    inexact = not isinstance(classes, int) or classes * jnp.finfo(top.dtype).eps >= 1
    selects = inexact or axis.has_whole_rows_on_cpu(logits)
    local = axis.local(targets, classes).astype(targets.dtype if selects else top.dtype)
    index = lax.broadcasted_iota(local.dtype, shape, axis.position)

    def terms(x: Array, top: Array, index: Array, target: Array) -> Array:
        exponentials = jnp.exp(x.astype(top.dtype) - top)
        if selects:
            return jnp.where(index == target, 0, exponentials)
        # XLA's CPU backend would write a select to memory, but not this; no exponential exceeds 1.
        return jnp.minimum(exponentials, jnp.abs(index - target))

    return axis.sum_of(terms, source, axis.expand(top), index, axis.expand(local))


@_target_and_others.defjvp
def _target_and_others_jvp(axis: ClassAxis, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    logits, (top, below_and_ties), targets, kept, _ = primals
    # A pick from logits that were not cast adds its one element to a row to the rest of the gradient in place.
    source = 0 if axis.widened else -1
    pick = partial(axis.pick, targets=targets)
    at_target, dat_target = jax.jvp(pick, (primals[source],), (tangents[source],))
    if axis.lean or below_and_ties is not None:
        at_target, others = _target_and_others(axis, *primals)
    else:  # the gradient's own exponentials
        others = jnp.where(kept, axis.sum(_others(axis, logits, top, targets)), 0)
    (top,) = axis.copies(top, 1)

    @partial(jax.checkpoint, prevent_cse=False)  # the residual is the logits, not a second array of that size
    def tangent(logits: Float[Array, "..."], dlogits: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(kept, axis.sum(_others(axis, logits, top, targets) * dlogits), 0)

    return (at_target, others), (dat_target, tangent(logits, tangents[0]))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _others(
    axis: ClassAxis, logits: Float[Array, "..."], top: Float[Array, "..."], targets: Integer[Array, "..."]
) -> Float[Array, "..."]:
    """exp(logits - top), 0 at the target."""
    return axis.without_target(axis.exp(logits - axis.expand(top)), targets)


@_others.defjvp
def _others_jvp(axis: ClassAxis, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    others = _others(axis, *primals)
    return others, others * tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def expected_log_prob(
    axis: ClassAxis,
    logits: Float[Array, "..."],
    peaks: Peaks,
    masses: Float[Array, "..."],
    narrow: Float[Array, "..."],
    masses_again: tuple[Float[Array, "..."], Float[Array, "..."]],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Σ_c masses · log p of each row, and Σ exp(logits - top) - 1, of logits that were cast from `narrow`.

    `masses_again` are copies of the masses: the value reads the first, the gradient's sum of them the second, and the
    derivative is with respect to `masses`.
    """
    source = axis.read(logits, narrow)
    extra = excess(axis, source, peaks, *axis.copies(peaks.top, 2))
    return _weigh_log_probs(axis, source, peaks.top, masses_again[0], jnp.log1p(extra)), extra


def _weigh_log_probs(
    axis: ClassAxis,
    logits: Float[Array, "..."],
    top: Float[Array, "..."],
    masses: Float[Array, "..."],
    normalizer: Float[Array, "..."],
) -> Float[Array, "..."]:
    if axis.lean:  # if this sum shared the rows' cast with another, XLA would write their broadcast to memory
        top = lax.reduce_precision(top, 8, 23)
    (top,) = apart(top, 1)
    (logits,) = axis.copies(logits, 1)

    def terms(x: Array, masses: Array, top: Array, normalizer: Array) -> Array:
        return masses * ((x.astype(masses.dtype) - top) - normalizer)

    # Apart, or XLA merges this sum with the one over the rows: a single long sum rounds worse.
    (sums,) = apart(axis.sum_of(terms, logits, masses, axis.expand(top), axis.expand(normalizer)), 1)
    return sums


@partial(expected_log_prob.defjvp, symbolic_zeros=True)
def _expected_log_prob_jvp(axis: ClassAxis, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    logits, (top, _), masses, _, masses_again = primals
    dlogits, dmasses = (None if isinstance(d, SymbolicZero) else d for d in (tangents[0], tangents[2]))
    log_prob, extra = expected_log_prob(axis, *primals)
    extra = checkpoint_name(extra, ROWS)
    (again,) = axis.copies(top, 1)

    @partial(jax.checkpoint, prevent_cse=False)  # the residuals are the logits and the masses
    def tangent(
        logits: Float[Array, "..."],
        masses: Float[Array, "..."],
        extra: Float[Array, "..."],
        dlogits: Float[Array, "..."] | None,
        dmasses: Float[Array, "..."] | None,
    ) -> tuple[Array, Array]:
        dlog_prob = dextra = jnp.zeros_like(extra)
        if dmasses is not None:
            dlog_prob += _weigh_log_probs(axis, logits, top, dmasses, jnp.log1p(extra))
        if dlogits is None:
            return dlog_prob, dextra
        at_top = 1 / (1 + extra)
        probs = axis.exp(logits - axis.expand(again)) * axis.expand(at_top)
        total = axis.sum(masses_again[1])
        ones, rest = axis.expand(total), axis.expand(-total * lax.stop_gradient(extra * at_top))
        # At a likely class p is written 1 + (p - 1), and the 1 is taken out first.
        likely = is_likely(probs)
        others = jnp.where(likely, probs - lax.stop_gradient(probs), probs)
        coefficient = jnp.where(likely, (masses - ones) - rest, masses) - ones * others
        return dlog_prob + axis.sum(coefficient * dlogits), (1 + extra) * axis.sum(probs * dlogits)

    return (log_prob, extra), tangent(logits, masses, extra, dlogits, dmasses)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def entropy(axis: ClassAxis, logits: Float[Array, "..."], kept: Bool[Array, "..."]) -> Float[Array, "..."]:
    """-Σ p log p of each row's softmax; 0 with derivative 0 in rows that are not kept."""
    log_probs, _ = log_softmax_core(axis, logits, logits, logits.dtype)
    probs = jnp.exp(log_probs)
    return jnp.where(kept, -axis.sum(probs * jnp.where(probs == 0, 0, log_probs)), 0)


@entropy.defjvp
def _entropy_jvp(axis: ClassAxis, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    logits, kept = primals
    value = entropy(axis, logits, kept)
    log_probs, _ = log_softmax_core(axis, logits, logits, logits.dtype)
    probs = jnp.exp(log_probs)
    # d(-Σ p log p) = -Σ p (log p + H) dz: no 1 to add and take away, so that confident rows keep their digits.
    slope = probs * (jnp.where(probs == 0, 0, log_probs) + axis.expand(value))
    rows = axis.expand(kept)
    return value, -axis.sum(jnp.where(rows, slope, 0) * jnp.where(rows, tangents[0], 0))
