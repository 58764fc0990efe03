"""The losses as objects that hold their options, after torch.nn's modules."""

from dataclasses import dataclass, field
from functools import partial
from typing import no_type_check

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxloss._cross_entropy import cross_entropy
from jaxloss._log_softmax import log_softmax
from jaxloss._nll import Reduction, nll_loss

_criterion = partial(dataclass, frozen=True, eq=False)
_static = partial(field, metadata={"static": True})


@no_type_check
@jax.tree_util.register_dataclass
@_criterion()
class LogSoftmax:
    """`log_softmax` along a fixed axis: `LogSoftmax(axis=1)(logits)`.

    Args:
        axis: the class axis.
        dtype: cast the logits to this dtype first. None keeps their own.
    """

    axis: int = _static(default=-1)
    dtype: DTypeLike | None = _static(default=None)

    def __call__(self, logits: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Log-probabilities, in the shape of `logits`; see `jaxloss.log_softmax`."""
        return log_softmax(logits, axis=self.axis, dtype=self.dtype)


@no_type_check
@jax.tree_util.register_dataclass
@_criterion(kw_only=True)
class NLLLoss:
    """`nll_loss` with fixed options: `NLLLoss(reduction="sum")(log_probs, targets)`.

    A frozen pytree: `weight` is a leaf, so the criterion passes through `jit` and `grad`; the options are static.

    Args:
        weight: (classes,) class weights, or None.
        ignore_index: rows with this target contribute nothing.
        reduction: "mean", "sum" or "none".
        axis: the class axis.
    """

    weight: Num[ArrayLike, " classes"] | None = None
    ignore_index: int = _static(default=-100)
    reduction: Reduction = _static(default="mean")
    axis: int = _static(default=-1)

    def __call__(self, log_probs: Num[ArrayLike, "..."], targets: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """The loss, as `jaxloss.nll_loss` returns it."""
        return nll_loss(
            log_probs,
            targets,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            axis=self.axis,
        )


@no_type_check
@jax.tree_util.register_dataclass
@_criterion(kw_only=True)
class CrossEntropyLoss:
    """`cross_entropy` with fixed options: `CrossEntropyLoss(label_smoothing=0.1)(logits, targets)`.

    A frozen pytree: `weight` is a leaf, so the criterion passes through `jit` and `grad`; the options are static.

    Args:
        weight: (classes,) class weights, or None.
        ignore_index: rows with this target contribute nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: ε in [0, 1].
        z_loss: weight k ≥ 0 of the squared log-normaliser.
        axis: the class axis.
        class_axis_name: inside `jax.shard_map`, the mesh axis (or axes) that splits the classes.
        dtype: of the result. None keeps the dtype of the logits.
    """

    weight: Num[ArrayLike, " classes"] | None = None
    ignore_index: int = _static(default=-100)
    reduction: Reduction = _static(default="mean")
    label_smoothing: float = _static(default=0.0)
    z_loss: float = _static(default=0.0)
    axis: int = _static(default=-1)
    class_axis_name: str | tuple[str, ...] | None = _static(default=None)
    dtype: DTypeLike | None = _static(default=None)

    def __call__(self, logits: Num[ArrayLike, "..."], targets: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """The loss, as `jaxloss.cross_entropy` returns it."""
        return cross_entropy(
            logits,
            targets,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            axis=self.axis,
            class_axis_name=self.class_axis_name,
            dtype=self.dtype,
        )
