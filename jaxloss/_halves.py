"""Casts between floating dtypes, and a select in half types, that CPUs compute with vectors.

Beside an exponential XLA's own cast from float32 to bfloat16 takes as long on CPU as the exponential itself: 0.33 ms
instead of 0.17 for 1024 x 1000 (jax 0.10.2); and a select in a half type is such a cast too. The derivative of a cast
is the cast back, and that of a select a select, so that each has to be a primitive.
"""

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxloss._primitives import make_elementwise


def cast(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """`x` in another floating dtype, as `astype` gives it, with its derivatives."""
    return x if x.dtype == dtype else _cast.bind(x, dtype=jnp.dtype(dtype))


def cast_sum(dtype: DTypeLike, x: Float[Array, "..."], *others: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sum, from the first on, in another floating dtype; the others broadcast against `x`.

    `x` is given a cotangent cast for it alone: one that is shared XLA's CPU backend would write to memory.
    """
    if x.dtype == dtype:
        return reduce(operator.add, others, x)
    spread = (jnp.zeros_like(x) + each for each in others)  # which `broadcast_to` would not split as `x` is
    return _cast.bind(x, *spread, dtype=jnp.dtype(dtype))


def zero_unless(mask: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` where the mask holds, else 0; both of one shape."""
    # A primitive does not have operands that `shard_map` or a mesh splits differently split alike, as `where` does.
    alike = jax.typeof(mask).update(dtype=x.dtype, weak_type=False) == jax.typeof(x).update(weak_type=False)
    return _zero_unless.bind(mask, x) if x.dtype.itemsize == 2 and alike else jnp.where(mask, x, 0)


def _convert(*terms: Array, dtype: jnp.dtype) -> Array:
    return lax.convert_element_type(reduce(operator.add, terms), dtype)


def _convert_on_cpu(*terms: Array, dtype: jnp.dtype) -> Array:
    x = reduce(operator.add, terms)
    if (x.dtype, dtype) != (jnp.float32, jnp.bfloat16):
        return _convert(x, dtype=dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    upper = bits >> 16
    to_nearest_even = (bits + 0x7FFF + (upper & 1)) >> 16
    return lax.bitcast_convert_type(jnp.where(x == x, to_nearest_even, upper | 0x40).astype(jnp.uint16), dtype)


def _transpose(cotangent: Any, *terms: Any, dtype: jnp.dtype) -> list[Any]:
    first, rest = lax.optimization_barrier((cotangent,) * 2) if len(terms) > 1 else (cotangent, None)
    copies = [first, *(rest for _ in terms[1:])]
    return [cast(copy, term.aval.dtype) for copy, term in zip(copies, terms, strict=True)]


def _select(mask: Array, x: Array) -> Array:
    return jnp.where(mask, x, jnp.zeros_like(x))


def _select_on_cpu(mask: Array, x: Array) -> Array:
    return lax.bitcast_convert_type(_select(mask, lax.bitcast_convert_type(x, jnp.uint16)), x.dtype)


def _transpose_select(cotangent: Any, mask: Array, x: Any) -> list[Any]:
    return [None, cotangent if isinstance(cotangent, ad.Zero) else zero_unless(mask, cotangent)]


_cast = make_elementwise("cast", _convert, _convert_on_cpu)
_cast.def_abstract_eval(lambda x, *_, dtype: x.update(dtype=dtype, weak_type=False))
ad.deflinear2(_cast, _transpose)

_zero_unless = make_elementwise("zero_unless", _select, _select_on_cpu)
_zero_unless.def_abstract_eval(lambda mask, x: x.update(weak_type=False))
ad.defjvp(_zero_unless, None, lambda tangent, mask, x: zero_unless(mask, tangent))
ad.primitive_transposes[_zero_unless] = _transpose_select
