"""An identity on class indices that `checkify` turns into an error for a wrong one, and nothing else pays for.

`checkify.debug_check` alone would do, but its effect stays in the program when nobody checkifies it, and takes every
jitted caller off JAX's fast dispatch path: a step with 100 parameters went from 0.15 to 0.88 ms a call (jax 0.10.2).
So the check sits in the jaxpr of a call primitive, which checkify looks into and lowering does not.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.interpreters import batching, mlir
from jaxtyping import Array, Integer

from jaxloss._checks import Size
from jaxloss._primitives import Primitive


class _CheckedTargets(Primitive):
    multiple_results = True

    def bind(self, *args: Any, subfuns: tuple = (), **params: Any) -> Any:
        if subfuns:  # checkify's interpreter hands over `call_jaxpr` with the error threaded through it
            return subfuns[0].call_wrapped(*args)
        return super().bind(*args, **params)


_checked_targets = _CheckedTargets("checked_targets")
_checked_targets.def_impl(lambda targets, **_: [targets])
_checked_targets.def_abstract_eval(lambda targets, **_: [targets])
mlir.register_lowering(_checked_targets, lambda _, targets, **__: [targets])


def checked_targets(targets: Integer[Array, "..."], classes: Size, ignore_index: int) -> Integer[Array, "..."]:
    """The targets; under `checkify`, an error naming one that is neither a class nor `ignore_index`."""
    check = partial(_check, classes=classes, ignore_index=ignore_index)
    jaxpr = jax.make_jaxpr(check)(targets)
    (checked,) = _checked_targets.bind(targets, call_jaxpr=jaxpr, classes=classes, ignore_index=ignore_index)
    return checked


def _check(targets: Integer[Array, "..."], *, classes: Size, ignore_index: int) -> Integer[Array, "..."]:
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    lowest = jnp.iinfo(targets.dtype).min
    a_wrong_target = jnp.max(jnp.where(wrong, targets, lowest), initial=lowest)
    checkify.debug_check(~jnp.any(wrong), "Target {target} is out of bounds.", target=a_wrong_target)
    return targets


def _batch(arguments: tuple, dimensions: tuple, *, classes: Size, ignore_index: int, **_: Any) -> tuple[list, tuple]:
    return [checked_targets(arguments[0], classes, ignore_index)], dimensions


batching.primitive_batchers[_checked_targets] = _batch
