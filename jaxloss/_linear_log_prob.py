"""linear_log_prob: each token's log-probability, entropy and most probable class, without the logits in memory."""

from functools import partial
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Num

from jaxloss import _checks
from jaxloss._cross_entropy import losses_of_rows
from jaxloss._explicit_mesh import on_shards
from jaxloss._log_probs import entropy
from jaxloss._slabs import Arrays, Settings, project, scan, soft_cap, temper, varying_alike


class LinearLogProb(NamedTuple):
    """What `linear_log_prob` returns, each of the shape of the targets."""

    log_prob: Float[Array, "..."]
    """Log-probability of the target in nats, at most 0."""
    entropy: Float[Array, "..."]
    """Entropy of the class distribution in nats, in [0, log classes]."""
    argmax: Integer[Array, "..."]
    """The most probable class, the first of several; int32."""


@no_type_check
def linear_log_prob(
    inputs: Num[ArrayLike, "..."],
    linear_weight: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    linear_bias: Num[ArrayLike, "..."] | None = None,
    ignore_index: int = -100,
    logit_softcap: float | Float[ArrayLike, ""] | None = None,
    temperature: float | Float[ArrayLike, ""] | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    memory_budget: int | None = None,
) -> LinearLogProb:
    r"""Log-probability of each target, entropy and argmax of a linear layer's softmax, in nats, without its logits.

    .. math:: \log p_{n, y_n}, \qquad H_n = -\sum_c p_{nc} \log p_{nc}, \qquad \arg\max_c p_{nc},
              \qquad p_n = \mathrm{softmax}((x_n W^\top + b) / T)

    What policy gradients, distillation and evaluation ask of a language model's head. Computed on slabs of tokens as
    `linear_cross_entropy` is, with the logits recomputed in reverse mode. Under the caller's jit, what is not used of
    the three is not computed.

    Args:
        inputs: (features,), (batch, features) or any more leading axes; floating.
        linear_weight: (classes, features) or (classes, d1, ..., dK, features), as for `linear_cross_entropy`.
        targets: class indices of any integer dtype, in [0, classes) or `ignore_index`, in the shape of the logits
            without the classes: (...), or (batch, d1, ..., dK).
        linear_bias: (classes,) or (classes, d1, ..., dK); None for none. -inf removes a class.
        ignore_index: tokens with this target have log-probability and entropy 0, with gradient 0.
        logit_softcap: c > 0 replaces each logit z but -inf by c · tanh(z / c), before the temperature; may be traced.
        temperature: T > 0, divides the logits; may be a traced scalar. None is 1.
        class_axis_name: inside `jax.shard_map`, the mesh axis (or axes) that splits the classes; see `cross_entropy`.
        memory_budget: bytes that a slab's logits, exponentials and gradient may take; see `linear_cross_entropy`.

    Returns:
        `LinearLogProb(log_prob, entropy, argmax)`. The first two are differentiable in every array, and in float32 (in
        float64 for such inputs) also for half inputs: a ratio of probabilities is the exponential of their difference.

    Raises:
        ValueError: shapes that do not fit, or an option out of range.
        TypeError: arrays that are not floating, or targets that are not integers.
        IndexError: concrete targets out of range; under jit such a token's log-probability is NaN.

    Edge values: confident tokens are exact, as in `cross_entropy`; a logit of -inf adds nothing to the entropy; a token
    whose logits hold NaN or +inf, or are all -inf, has NaN for both, and any class for argmax. No tokens give empty
    arrays. Sharding: as for `linear_cross_entropy`.

    Examples:
        >>> import jax.numpy as jnp, jaxloss
        >>> inputs, linear_weight = jnp.ones((2, 4)), jnp.zeros((3, 4))
        >>> jaxloss.linear_log_prob(inputs, linear_weight, jnp.array([0, 2])).entropy.round(4)
        Array([1.0986, 1.0986], dtype=float32)

    References:
        `log_prob` and `entropy` are those of torch.distributions.Categorical:
        https://docs.pytorch.org/docs/2.13/distributions.html#categorical
    """
    name = "linear_log_prob"
    inputs = _checks.floating_array(name, "inputs", inputs)
    linear_weight = _checks.floating_array(name, "linear_weight", linear_weight)
    logits = _checks.projection(name, inputs, linear_weight)
    class_axis_name = _checks.mesh_axes(name, class_axis_name)
    _checks.some_classes(name, linear_weight)
    bounded = class_axis_name is None
    arrays = Arrays(
        inputs=inputs,
        targets=_checks.index_targets(
            name, targets, logits, "log_prob", inputs.ndim - 1, ignore_index, bounded=bounded
        ),
        linear_weight=linear_weight,
        linear_bias=_checks.bias(name, linear_bias, linear_weight.shape[:-1]),
        logit_softcap=_checks.positive(name, "logit_softcap", logit_softcap),
        temperature=_checks.positive(name, "temperature", temperature),
    )
    budget = _checks.budget(name, memory_budget)
    return _linear_log_prob(arrays, settings=Settings(int(ignore_index), budget, class_axis_name))


@partial(jax.jit, static_argnames="settings")
def _linear_log_prob(arrays: Arrays, *, settings: Settings) -> LinearLogProb:
    def local(settings: Settings, arrays: Arrays) -> LinearLogProb:
        rows = (*arrays.inputs.shape[:-1], *arrays.inner)
        _, found = scan(settings, partial(_slab, settings), None, varying_alike(settings, arrays.flat()))
        return jax.tree.map(lambda x: x.reshape(rows), found)

    return on_shards(local, settings, arrays, by_token=True)


def _slab(settings: Settings, _: None, part: Arrays, real: Bool[Array, " tokens"]) -> tuple[None, LinearLogProb]:
    logits = temper(soft_cap(project(part), part.logit_softcap), part.temperature)
    kept = part.targets != settings.ignore_index
    losses = losses_of_rows(settings.axis, logits, part.targets, None, None, None, settings.ignore_index)
    return None, LinearLogProb(
        jnp.where(kept, -losses, 0), entropy(settings.axis, logits, kept), settings.axis.argmax(logits)
    )
