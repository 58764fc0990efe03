"""linear_cross_entropy: the projection onto the classes and its loss, slab by slab, never the whole logits matrix."""

import math
from functools import partial
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Integer, Num

from jaxloss import _checks
from jaxloss._class_axis import ClassAxis
from jaxloss._cross_entropy import losses_of_rows
from jaxloss._log_softmax import accumulator
from jaxloss._nll import Reduction, weigh_rows

DEFAULT_BUDGET = 96 * 2**20
BUFFERS = 3  # of (tokens, classes) alive at once in XLA's schedule: logits, exponentials and gradient


class _Arrays(NamedTuple):
    """Everything that has a gradient. Token axes come first and are split into slabs; the rest is shared by them."""

    inputs: Float[Array, "tokens features"]
    targets: Float[Array, "..."] | Integer[Array, "..."]
    linear_weight: Float[Array, "classes *inner features"]
    linear_bias: Float[Array, "..."] | None
    weight: Num[Array, " classes"] | None
    label_smoothing: Float[Array, ""] | float | None
    z_loss: Float[Array, ""] | float | None
    logit_softcap: Float[Array, ""] | float | None


_SCALARS = ("label_smoothing", "z_loss", "logit_softcap")


class _Settings(NamedTuple):
    """What the compiled program depends on."""

    ignore_index: int
    tokens_per_slab: int
    class_axis_name: str | None


@no_type_check
def linear_cross_entropy(
    inputs: Num[ArrayLike, "..."],
    linear_weight: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    linear_bias: Num[ArrayLike, "..."] | None = None,
    weight: Num[ArrayLike, " classes"] | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float | Float[ArrayLike, ""] = 0.0,
    z_loss: float | Float[ArrayLike, ""] = 0.0,
    logit_softcap: float | Float[ArrayLike, ""] | None = None,
    class_axis_name: str | None = None,
    memory_budget: int | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    r"""Cross entropy of a linear layer's logits, in nats, without the logits in memory.

    .. math:: \text{cross\_entropy}(x W^\top + b,\; y)

    computed on slabs of tokens. For "mean" and "sum" each slab's gradient is taken while its logits are there, so that
    reverse mode costs three matrix products and recomputes nothing; "none" recomputes the logits.

    Args:
        inputs: (features,), (batch, features) or any more leading axes; floating.
        linear_weight: (classes, features) as in `torch.nn.Linear`, or (classes, d1, ..., dK, features), which gives
            logits (batch, classes, d1, ..., dK) for inputs (batch, features). Pass a Flax kernel as `kernel.T`.
        targets: class indices in the shape of the logits without the classes, or class probabilities in the shape of
            the logits: (..., classes), or (batch, classes, d1, ..., dK).
        linear_bias: (classes,) or (classes, d1, ..., dK); None for none. -inf removes a class.
        weight: (classes,), any real numbers; None weighs all classes 1.
        ignore_index: rows with this target contribute nothing. None means -100 for index targets; probability targets
            accept None alone.
        reduction: "mean", "sum" or "none".
        label_smoothing: ε in [0, 1]; may be a traced scalar.
        z_loss: k ≥ 0; may be a traced scalar.
        logit_softcap: c > 0 replaces each logit z by c · tanh(z / c); may be a traced scalar. None leaves them.
        class_axis_name: inside `jax.shard_map`, the mesh axis that splits the classes; see `cross_entropy`.
        memory_budget: bytes that the (tokens, classes) buffers alive at once may take; a slab holds at least one token.
            None: 96 MiB.
        dtype: of the result; None keeps the dtype of `inputs` (for probabilities, of `inputs` and `targets` promoted).

    Returns:
        A scalar, or with `reduction="none"` the shape of index targets. Half types accumulate in float32.

    Raises:
        ValueError: shapes that do not fit, an option out of range, any `ignore_index` with probability targets.
        TypeError: arrays that are not floating, or targets of the wrong kind.
        IndexError: concrete targets out of range; under jit such a row's loss is NaN.

    Edge values: those of `cross_entropy`. Reverse mode of reverse mode may store (tokens, classes) arrays; second
    derivatives in forward-over-reverse mode (`jax.jvp` of `jax.grad`) stay within the slabs.

    Sharding: classes may be split by an Auto mesh axis, or inside `shard_map` with `class_axis_name`; tokens inside
    `shard_map`, as in `cross_entropy`. Explicit mesh axes raise; use `shard_map` there.

    Examples:
        >>> import jax.numpy as jnp, jaxloss
        >>> inputs, linear_weight = jnp.ones((2, 4)), jnp.zeros((3, 4))
        >>> jaxloss.linear_cross_entropy(inputs, linear_weight, jnp.array([0, 2]))
        Array(1.0986123, dtype=float32)

    References:
        https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.linear_cross_entropy.html; a loss without its
        logits: Wijmans et al., https://arxiv.org/abs/2411.09009; soft cap: https://arxiv.org/abs/2408.00118 section 2.
    """
    name = "linear_cross_entropy"
    inputs = _checks.floating_array(name, "inputs", inputs)
    linear_weight = _checks.floating_array(name, "linear_weight", linear_weight)
    logits = _checks.projection(name, inputs, linear_weight)
    axis = inputs.ndim - 1
    targets, ignore_index = _checks.linear_targets(name, targets, logits, axis, ignore_index, class_axis_name)
    arrays = _Arrays(
        inputs=inputs.reshape(-1, inputs.shape[-1]),
        targets=targets.reshape(-1, *targets.shape[axis:]),
        linear_weight=linear_weight,
        linear_bias=_checks.bias(name, linear_bias, linear_weight.shape[:-1]),
        weight=_checks.weight(name, weight, linear_weight.shape[0]),
        label_smoothing=_checks.fraction(name, "label_smoothing", label_smoothing, upper=1.0),
        z_loss=_checks.fraction(name, "z_loss", z_loss, upper=math.inf),
        logit_softcap=_checks.positive(name, "logit_softcap", logit_softcap),
    )
    budget = DEFAULT_BUDGET if memory_budget is None else _checks.budget(name, memory_budget)
    losses = _linear_cross_entropy(
        arrays,
        settings=_Settings(ignore_index, _slab_size(arrays, budget), class_axis_name),
        reduction=_checks.reduction(name, reduction),
        dtype=_checks.result_dtype(name, dtype, inputs, targets),
    )
    rows = logits.shape[:axis] + logits.shape[axis + 1 :]
    return losses.reshape(rows) if reduction == "none" else losses


def _slab_size(arrays: _Arrays, budget: int) -> int:
    """Tokens whose (tokens, classes) buffers fit in the budget; at least one, at most all."""
    itemsize = _checks.promote(arrays.inputs.dtype, jnp.float32).itemsize
    bytes_per_token = BUFFERS * itemsize * math.prod(arrays.linear_weight.shape[:-1])
    return max(1, min(budget // max(bytes_per_token, 1), arrays.inputs.shape[0]))


@partial(jax.jit, static_argnames=("settings", "reduction", "dtype"))
def _linear_cross_entropy(
    arrays: _Arrays, *, settings: _Settings, reduction: Reduction, dtype: jnp.dtype
) -> Float[Array, "..."]:
    if reduction == "none":
        return _rows(settings, arrays).astype(dtype)
    total = _total(settings, arrays)
    return (total if reduction == "sum" else _mean(settings, arrays, total)).astype(dtype)


def _mean(settings: _Settings, arrays: _Arrays, total: Float[Array, ""]) -> Float[Array, ""]:
    """The sum of losses over the sum of the kept targets' class weights, or over the number of rows."""
    if jnp.issubdtype(arrays.targets.dtype, jnp.floating):
        return total / math.prod((arrays.inputs.shape[0], *arrays.linear_weight.shape[1:-1]))
    axis = ClassAxis(0, settings.class_axis_name)
    classes = axis.size(arrays.linear_weight)
    kept, weights = weigh_rows(axis, classes, arrays.targets, arrays.weight, settings.ignore_index, total.dtype)
    # Where no row is kept the mean is NaN and its gradient 0; where all weights are 0, both are NaN.
    some = jnp.any(kept)
    divisor = jnp.where(jnp.any(weights != 0), jnp.sum(weights), jnp.nan)
    return jnp.where(some, total / jnp.where(some, divisor, 1), jnp.nan)


def _split(settings: _Settings, arrays: _Arrays) -> tuple[Array, Array, Array]:
    """Inputs, targets and which tokens are real, as (slabs, tokens, ...); the last slab is padded."""
    tokens, size = arrays.inputs.shape[0], settings.tokens_per_slab
    slabs = -(-tokens // size)

    def cut(x: Array, filler: int = 0) -> Array:
        padding = [(0, slabs * size - tokens), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x, padding, constant_values=filler).reshape(slabs, size, *x.shape[1:])

    soft = jnp.issubdtype(arrays.targets.dtype, jnp.floating)
    targets = cut(arrays.targets, 0 if soft else settings.ignore_index)
    return cut(arrays.inputs), targets, cut(jnp.ones(tokens, bool))


def _zeros(shape: tuple[int, ...], inputs: Array, *others: Array) -> Float[Array, "..."]:
    """Zeros to add to that, inside `shard_map`, vary over every mesh axis that one of the arrays varies over."""
    dtype = accumulator(inputs[:0]).dtype
    never = (jnp.where(False, jnp.sum(x).astype(dtype), 0) for x in (inputs, *others))
    return jnp.broadcast_to(sum(never, jnp.zeros((), dtype)), shape)


def _project(arrays: _Arrays) -> Float[Array, "..."]:
    """(tokens, classes, d1, ..., dK) logits in the accumulator's dtype: one matrix product and the bias."""
    *out, features = arrays.linear_weight.shape
    matrix = arrays.linear_weight.reshape(-1, features)
    logits = _dot(arrays.inputs, matrix, ((1,), (1,))).reshape(-1, *out)
    return logits if arrays.linear_bias is None else logits + arrays.linear_bias.astype(logits.dtype)[None]


def _dot(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Float[Array, "..."]:
    """A matrix product of the operands as they are, accumulated in float32 or better."""
    return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=accumulator(a[:0, :0]).dtype)


def _slab_losses(settings: _Settings, arrays: _Arrays, logits: Float[Array, "..."], real: Array) -> Float[Array, "..."]:
    """The losses (tokens, d1, ..., dK) of a slab, 0 for padding."""
    if arrays.logit_softcap is not None:
        logits = arrays.logit_softcap * jnp.tanh(logits / arrays.logit_softcap)
    smoothing, z_loss = (
        None if x is None else jnp.asarray(x, logits.dtype) for x in (arrays.label_smoothing, arrays.z_loss)
    )
    options = arrays.weight, smoothing, z_loss
    axis = ClassAxis(1, settings.class_axis_name)
    losses = losses_of_rows(axis, logits, arrays.targets, *options, settings.ignore_index)
    return jnp.where(real.reshape(-1, *[1] * (losses.ndim - 1)), losses, 0)


def _rows(settings: _Settings, arrays: _Arrays) -> Float[Array, "..."]:
    @jax.checkpoint
    def slab(_: None, xs: tuple) -> tuple[None, Float[Array, "..."]]:
        inputs, targets, real = xs
        part = arrays._replace(inputs=inputs, targets=targets)
        return None, _slab_losses(settings, part, _project(part), real)

    _, losses = lax.scan(slab, None, _split(settings, arrays))
    return losses.reshape(-1, *losses.shape[2:])[: arrays.inputs.shape[0]]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(settings: _Settings, arrays: _Arrays) -> Float[Array, ""]:
    """The sum of all rows' losses."""

    def slab(total: Array, xs: tuple) -> tuple[Array, None]:
        inputs, targets, real = xs
        part = arrays._replace(inputs=inputs, targets=targets)
        return total + jnp.sum(_slab_losses(settings, part, _project(part), real)), None

    return lax.scan(slab, _zeros((), arrays.inputs), _split(settings, arrays))[0]


@_total.defjvp
def _total_jvp(settings: _Settings, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (arrays,), (darrays,) = primals, tangents
    total, gradients = _total_and_gradients(settings, arrays)

    def along(names: tuple[str, ...]) -> Float[Array, ""]:
        pairs = ((getattr(gradients, name), getattr(darrays, name)) for name in names)
        return sum((jnp.sum(g * jnp.asarray(d, g.dtype)) for g, d in pairs if g is not None), jnp.zeros_like(total))

    # Each shard of the classes knows its part of these gradients; those of the scalars are whole.
    parts = along(("inputs", "targets", "linear_weight", "linear_bias", "weight"))
    if settings.class_axis_name is not None:
        parts = lax.psum(parts, settings.class_axis_name)
    return total, parts + along(_SCALARS)


def _total_and_gradients(settings: _Settings, arrays: _Arrays) -> tuple[Array, _Arrays]:
    """The sum of all losses and its gradients, three matrix products to a slab; None for what has no gradient."""
    soft = jnp.issubdtype(arrays.targets.dtype, jnp.floating)
    shared = {
        name: value for name, value in arrays._asdict().items() if name in ("weight", *_SCALARS) and value is not None
    }
    shared = {name: jnp.asarray(value).astype(accumulator(arrays.inputs[:0]).dtype) for name, value in shared.items()}
    *out, features = arrays.linear_weight.shape
    matrix = arrays.linear_weight.reshape(-1, features)

    def slab(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
        total, dmatrix, dbias, dshared = carry
        inputs, targets, real = xs

        def loss(logits: Array, soft_targets: Array | None, shared: dict[str, Array]) -> Array:
            known = {"targets": targets if soft_targets is None else soft_targets, "inputs": inputs}
            return jnp.sum(_slab_losses(settings, arrays._replace(**known, **shared), logits, real))

        part = arrays._replace(inputs=inputs, targets=targets)
        value, (dlogits, dtargets, more) = jax.value_and_grad(loss, argnums=(0, 1, 2))(
            _project(part), accumulator(targets) if soft else None, shared
        )
        flat = dlogits.reshape(inputs.shape[0], -1)
        half = flat.astype(inputs.dtype)  # the products take operands of the inputs' dtype
        carry = (
            total + value,
            dmatrix + _dot(half, inputs, ((0,), (0,))),
            dbias + jnp.sum(flat, 0),
            jax.tree.map(jnp.add, dshared, more),
        )
        return carry, (_dot(half, matrix, ((1,), (0,))), dtargets)

    start = (
        _zeros((), arrays.inputs),
        _zeros(matrix.shape, arrays.inputs, matrix),
        _zeros(matrix.shape[:1], arrays.inputs, matrix),
        {name: _zeros(value.shape, arrays.inputs, value) for name, value in shared.items()},
    )
    (total, dmatrix, dbias, dshared), (dinputs, dtargets) = lax.scan(slab, start, _split(settings, arrays))

    def join(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[: arrays.inputs.shape[0]]

    gradients: dict[str, Any] = dict.fromkeys(_Arrays._fields) | dshared
    gradients |= {"inputs": join(dinputs), "targets": join(dtargets) if soft else None}
    gradients |= {"linear_weight": dmatrix.reshape(arrays.linear_weight.shape)}
    gradients |= {"linear_bias": None if arrays.linear_bias is None else dbias.reshape(out)}
    return total, _Arrays(**gradients)
