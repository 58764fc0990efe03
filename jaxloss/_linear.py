"""linear_cross_entropy: the projection onto the classes and its loss, slab by slab, never the whole logits matrix."""

import math
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Num

from jaxloss import _checks
from jaxloss._class_axis import ClassAxis
from jaxloss._cross_entropy import losses_of_rows
from jaxloss._explicit_mesh import on_shards
from jaxloss._halves import cast
from jaxloss._log_softmax import accumulator, accumulator_dtype
from jaxloss._nll import Reduction, one_or_nan, weigh_rows
from jaxloss._slabs import (
    SCALARS,
    Arrays,
    Settings,
    add_product,
    dot,
    project,
    scan,
    soft_cap,
    varying_alike,
    zeros,
)


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
    class_axis_name: str | tuple[str, ...] | None = None,
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
        logit_softcap: c > 0 replaces each logit z but -inf by c · tanh(z / c); may be traced. None leaves them.
        class_axis_name: inside `jax.shard_map`, the mesh axis (or axes) that splits the classes; see `cross_entropy`.
        memory_budget: bytes that a slab's logits, exponentials and gradient may take (`logit_softcap` and probability
            targets take more); a slab holds at least one token. None: 128 MiB or what 128 tokens take, if that is more;
            off the CPU 1 GiB or what 2,048 tokens take.
        dtype: of the result; None keeps the dtype of `inputs` (for probabilities, of `inputs` and `targets` promoted).

    Returns:
        A scalar, or with `reduction="none"` the shape of index targets. Half types accumulate in float32.

    Raises:
        ValueError: shapes that do not fit, an option out of range, any `ignore_index` with probability targets.
        TypeError: arrays that are not floating, or targets of the wrong kind.
        IndexError: concrete targets out of range; under jit such a row's loss is NaN.

    Edge values: those of `cross_entropy`. Second derivatives stay within the slabs too, in forward-over-reverse mode
    (`jax.jvp` of `jax.grad`) and in reverse over reverse.

    Sharding: split the tokens, the classes or both over an Auto or Explicit mesh and call it under jit, or use it in
    `jax.shard_map`: with `class_axis_name` where that splits the classes, and with a global sum and count where it
    splits the tokens, as in `cross_entropy`. No logits, tokens or weights are gathered, but for weights split along
    their features or over the tokens' own mesh axis, and tokens of an Auto axis whose devices do not divide a slab
    (the largest size in the budget that divides the tokens, preferring powers of two). Explicit axes and `shard_map`
    add up the weight's gradient once, Auto axes once a slab. A vocabulary that does not divide the mesh is padded with
    `linear_bias=-inf` (and zero `linear_weight`): same loss, gradient 0 there, but no label smoothing. A `vmap` over an
    array axis that an Explicit mesh splits raises: reshape that axis into the tokens, or use `jax.shard_map`. Inside a
    `shard_map` over the classes JAX lowers no gradient while another axis of the mesh is Explicit: make that Auto.

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
    class_axis_name = _checks.mesh_axes(name, class_axis_name)
    axis = inputs.ndim - 1
    targets, ignore_index = _checks.linear_targets(name, targets, logits, axis, ignore_index, class_axis_name)
    arrays = Arrays(
        inputs=inputs,
        targets=targets,
        linear_weight=linear_weight,
        linear_bias=_checks.bias(name, linear_bias, linear_weight.shape[:-1]),
        weight=_checks.weight(name, weight, linear_weight.shape[0]),
        label_smoothing=_checks.fraction(name, "label_smoothing", label_smoothing, upper=1.0),
        z_loss=_checks.fraction(name, "z_loss", z_loss, upper=math.inf),
        logit_softcap=_checks.positive(name, "logit_softcap", logit_softcap),
    )
    return _linear_cross_entropy(
        arrays,
        settings=Settings(ignore_index, _checks.budget(name, memory_budget), class_axis_name),
        reduction=_checks.reduction(name, reduction),
        dtype=_checks.result_dtype(name, dtype, inputs, targets),
    )


@partial(jax.jit, static_argnames=("settings", "reduction", "dtype"))
def _linear_cross_entropy(
    arrays: Arrays, *, settings: Settings, reduction: Reduction, dtype: jnp.dtype
) -> Float[Array, "..."]:
    if _checks.promote(accumulator_dtype(arrays.inputs), dtype) != accumulator_dtype(arrays.inputs):  # float64
        arrays = arrays._replace(inputs=cast(arrays.inputs, dtype), linear_weight=cast(arrays.linear_weight, dtype))

    def local(settings: Settings, arrays: Arrays) -> Float[Array, "..."]:
        flat = varying_alike(settings, arrays.flat())
        if reduction == "none":
            return _rows(settings, flat).reshape(*arrays.inputs.shape[:-1], *arrays.inner)
        if reduction == "sum":
            return settings.over_tokens(_total(settings, flat))
        divisor, missing = _mean_of(settings, flat)
        flat = varying_alike(settings, flat._replace(divisor=divisor))
        return settings.over_tokens(_total(settings, flat)) + missing

    return on_shards(local, settings, arrays, by_token=reduction == "none").astype(dtype)


def _mean_of(settings: Settings, arrays: Arrays) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What the sum of losses is divided by for their mean, and what is then added to it: NaN if there are none.

    The sum of the kept targets' class weights, or the number of rows.
    """
    dtype = accumulator_dtype(arrays.inputs)
    if arrays.soft:
        shards = math.prod(lax.axis_size(name) for name in settings.token_axis_names)
        rows = math.prod((shards, arrays.inputs.shape[0], *arrays.inner)) if arrays.linear_weight.shape[0] else 0
        return jnp.asarray(max(rows, 1), dtype), jnp.asarray(0 if rows else jnp.nan, dtype)
    axis = ClassAxis(0, settings.class_axis_name)
    classes = axis.size(arrays.linear_weight)
    kept, weights = weigh_rows(axis, classes, arrays.targets, arrays.weight, settings.ignore_index, dtype)
    # Where no row is kept the mean is NaN and its gradient 0; where all weights are 0, both are NaN.
    some, weighty = (settings.over_tokens(jnp.sum(mask)) > 0 for mask in (kept, weights != 0))
    divisor = settings.over_tokens(jnp.sum(weights)) * one_or_nan(~weighty, dtype)
    return jnp.where(some, divisor, 1), one_or_nan(~some, dtype) - 1


def _slab_losses(
    settings: Settings, arrays: Arrays, logits: Float[Array, "..."], real: Bool[Array, " tokens"]
) -> Array:
    """The losses (tokens, d1, ..., dK) of a slab, 0 for padding."""
    logits = soft_cap(logits, arrays.logit_softcap)
    smoothing, z_loss = (
        None if x is None else jnp.asarray(x, logits.dtype) for x in (arrays.label_smoothing, arrays.z_loss)
    )
    options = arrays.weight, smoothing, z_loss
    losses = losses_of_rows(settings.axis, logits, arrays.targets, *options, settings.ignore_index)
    return jnp.where(real.reshape(real.size, *[1] * (losses.ndim - 1)), losses, 0)


def _rows(settings: Settings, arrays: Arrays) -> Float[Array, "..."]:
    def slab(_: None, part: Arrays, real: Bool[Array, " tokens"]) -> tuple[None, Float[Array, "..."]]:
        return None, _slab_losses(settings, part, project(part), real)

    return scan(settings, slab, None, arrays)[1]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(settings: Settings, arrays: Arrays) -> Float[Array, ""]:
    """The sum of all rows' losses, over `arrays.divisor`."""

    def slab(total: Array, part: Arrays, real: Bool[Array, " tokens"]) -> tuple[Array, None]:
        return total + jnp.sum(_slab_losses(settings, part, project(part), real)), None

    total = scan(settings, slab, zeros((), arrays.inputs), arrays)[0]
    return total if arrays.divisor is None else total / arrays.divisor


@partial(_total.defjvp, symbolic_zeros=True)
def _total_jvp(settings: Settings, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (arrays,), (darrays,) = primals, tangents
    if not arrays.soft and not isinstance(darrays.inputs, SymbolicZero):  # NaN of ignored tokens meets zeros here
        ignored = jnp.all(arrays.targets == settings.ignore_index, range(1, arrays.targets.ndim))[:, None]
        darrays = darrays._replace(inputs=jnp.where(ignored, 0, darrays.inputs))
    total, gradients = _total_and_gradients(settings, arrays)

    def along(names: tuple[str, ...]) -> Float[Array, ""]:
        pairs = ((getattr(gradients, name), getattr(darrays, name)) for name in names)
        known = ((g, d) for g, d in pairs if g is not None and not isinstance(d, SymbolicZero))
        return sum((jnp.sum(g * jnp.asarray(d, g.dtype)) for g, d in known), jnp.zeros_like(total))

    # Each shard of the classes knows its part of these gradients; those of the scalars are whole.
    parts = along(("inputs", "targets", "linear_weight", "linear_bias", "weight"))
    if settings.class_axis_name is not None:
        parts = lax.psum(parts, settings.class_axis_name)
    return total, parts + along((*SCALARS, "divisor"))


def _total_and_gradients(settings: Settings, arrays: Arrays) -> tuple[Array, Arrays]:
    """The sum of all losses over the divisor and its gradients, three matrix products to a slab.

    None for what has no gradient. They are divided in the slabs, since XLA would keep them twice to do it afterwards;
    but not with float16 inputs: as an operand of the products a small divided gradient falls out of that range.
    """
    dtype = accumulator_dtype(arrays.inputs)
    named = ((name, getattr(arrays, name)) for name in ("weight", *SCALARS))
    shared = {name: jnp.asarray(value).astype(dtype) for name, value in named if value is not None}
    matrix = arrays.matrix()
    factor = 1 if arrays.divisor is None else 1 / arrays.divisor
    late = arrays.inputs.dtype == jnp.float16

    def slab(carry: tuple, part: Arrays, real: Bool[Array, " tokens"]) -> tuple[tuple, tuple]:
        total, dmatrix, dbias, dshared = carry

        def loss(logits: Array, soft_targets: Array | None, shared: dict[str, Array]) -> tuple[Array, Array]:
            known = {} if soft_targets is None else {"targets": soft_targets}
            value = jnp.sum(_slab_losses(settings, part._replace(**known, **shared), logits, real))
            return value if late else value * factor, value

        (_, value), (dlogits, dtargets, more) = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
            project(part), accumulator(part.targets) if arrays.soft else None, shared
        )
        flat = dlogits.reshape(real.size, matrix.shape[0])
        half = cast(flat, part.inputs.dtype)  # the products take operands of the inputs' dtype
        carry = (
            total + value,
            add_product(dmatrix, half, part.inputs, total_is_zero=real.size >= arrays.inputs.shape[0]),
            dbias + jnp.sum(flat, 0),
            jax.tree.map(jnp.add, dshared, more),
        )
        return carry, (dot(half, matrix, ((1,), (0,))), dtargets)

    start = (
        zeros((), arrays.inputs),
        zeros(matrix.shape, arrays.inputs, matrix),
        zeros(matrix.shape[:1], arrays.inputs, matrix),
        {name: zeros(value.shape, arrays.inputs, value) for name, value in shared.items()},
    )
    (total, dmatrix, dbias, dshared), (dinputs, dtargets) = scan(settings, slab, start, arrays)
    bias, divisor = arrays.linear_bias, arrays.divisor
    if divisor is not None:
        total = total / divisor
    gradients = Arrays(
        inputs=dinputs,
        targets=dtargets,
        linear_weight=dmatrix.reshape(arrays.linear_weight.shape),
        linear_bias=None if bias is None else dbias.reshape(bias.shape),
        **dshared,
    )
    if late:
        gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
    if (shards := settings.axis.untracked_shards()) > 1:
        of_shards = ("inputs", "targets", "linear_weight", "linear_bias", "weight")
        parts = {name: getattr(gradients, name) for name in of_shards}
        gradients = gradients._replace(**jax.tree.map(lambda gradient: gradient / shards, parts))
    return total, gradients._replace(divisor=None if divisor is None else -total / divisor)
