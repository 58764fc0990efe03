"""Attention's weights as PyTorch's MultiheadAttention keeps them: query, key and value in one tensor."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxloss.parity._layout import Layout, Shape

OUT = "out_proj"  # PyTorch's name of Flax's `out`
_JOINED = "in_proj_weight", "in_proj_bias"


class Joined:
    """Variables of Flax's one after the other in PyTorch's layout, used like a variable.

    Attributes:
        variables: those.
        shape: PyTorch's.
        dtype: of all.
    """

    def __init__(self, variables: Sequence[nnx.Variable], layouts: Sequence[Layout]) -> None:
        """Reads nothing yet."""
        self.variables, self._layouts = variables, layouts
        first, *_ = shapes = [layout.merged for layout in layouts]
        self.shape: Shape = (sum(shape[0] for shape in shapes), *first[1:])
        self.dtype = jnp.result_type(*(variable.dtype for variable in variables))

    def get_value(self) -> jax.Array:
        """All of them, joined."""
        pairs = zip(self.variables, self._layouts, strict=True)
        return jnp.concatenate([layout.to_torch(variable.get_value()) for variable, layout in pairs])

    def set_value(self, value: jax.Array) -> None:
        """Gives each its part."""
        ends = itertools.accumulate(layout.merged[0] for layout in self._layouts)
        parts = jnp.split(value, list(ends)[:-1])
        for variable, layout, part in zip(self.variables, self._layouts, parts, strict=True):
            variable.set_value(layout.to_flax(part))


def is_fused(names: Iterable[str]) -> bool:
    """Whether PyTorch's names are those of a MultiheadAttention."""
    return any(name.rpartition(".")[2] in _JOINED for name in names)


def fused(layer: nnx.MultiHeadAttention, layout: Any) -> Iterator[tuple[str, Joined]]:
    """What PyTorch has of an attention's query, key and value, by its names; `layout` gives a linear layer's."""
    parts = {"q": layer.query, "k": layer.key, "v": layer.value}

    def joined(attribute: str, *parts: nnx.LinearGeneral) -> Joined:
        variables = [getattr(part, attribute) for part in parts]
        return Joined(
            variables, [layout(part, attribute, v.shape, ()) for part, v in zip(parts, variables, strict=True)]
        )

    if layer.in_features == layer.in_kv_features:
        yield "in_proj_weight", joined("kernel", *parts.values())
    else:
        yield from ((f"{name}_proj_weight", joined("kernel", part)) for name, part in parts.items())
    if layer.use_bias:
        yield "in_proj_bias", joined("bias", *parts.values())


def exact_attention(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    """Flax's own, which without dropout is given to `jax.nn.dot_product_attention`: that rounds to float32."""
    if not options.get("dropout_rate"):
        options |= {"dropout_rate": 0.5, "deterministic": True}  # any rate: nothing is dropped
    return nnx.dot_product_attention(query, key, value, **options)
