"""What is one tensor in PyTorch and several variables in Flax."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxloss.parity._layout import Layout, Shape


class Joined:
    """Variables of Flax's one after the other in PyTorch's layout, used like a variable.

    Attributes:
        variables: those.
        shape: PyTorch's.
        dtype: of all.
    """

    def __init__(self, variables: Sequence[Any], layouts: Sequence[Layout]) -> None:
        """Reads nothing yet."""
        self.variables, self._layouts = variables, layouts
        first, *_ = shapes = [layout.merged for layout in layouts]
        self.shape: Shape = (sum(shape[0] for shape in shapes), *first[1:])
        self.dtype = jnp.result_type(*(variable.dtype for variable in variables))

    def join(self, parts: Iterable[jax.Array]) -> jax.Array:
        """PyTorch's array of Flax's."""
        return jnp.concatenate([layout.to_torch(part) for layout, part in zip(self._layouts, parts, strict=True)])

    def split(self, array: jax.Array) -> list[jax.Array]:
        """Flax's arrays of PyTorch's."""
        ends = list(itertools.accumulate(layout.merged[0] for layout in self._layouts))
        parts = jnp.split(array, ends[:-1])
        return [layout.to_flax(part) for layout, part in zip(self._layouts, parts, strict=True)]

    def get_value(self) -> jax.Array:
        """All of them, joined."""
        return self.join(variable.get_value() for variable in self.variables)

    def set_value(self, value: jax.Array) -> None:
        """Gives each its part."""
        for variable, part in zip(self.variables, self.split(value), strict=True):
            variable.set_value(part)


def join(attribute: str, linears: Sequence[Any], layout: Callable[[Any, str, Shape, Shape], Layout]) -> Joined:
    """The kernels or biases of linear layers; `layout` gives one's."""
    variables = [getattr(linear, attribute) for linear in linears]
    layouts = [layout(linear, attribute, v.shape, ()) for linear, v in zip(linears, variables, strict=True)]
    return Joined(variables, layouts)
