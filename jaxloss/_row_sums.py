"""Sums over the last axis, on CPU as products with ones.

XLA's CPU backend gives a sum to a library, with what is summed where the library has that. The product of a short
vector with a matrix it computes in its own loop, with what the matrix is made of, and that is faster (jax 0.10.2).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching
from jaxtyping import Array, Float

from jaxloss._primitives import make_primitive

SHORT = 2**11 - 1  # numbers, of up to 8 bytes: XLA fuses what multiplies a vector of fewer than 16 KiB


def row_sum(x: Float[Array, "*rows short"]) -> Float[Array, "*rows"]:
    """Sum over the last axis, which is not longer than SHORT."""
    return _row_sum.bind(x)


def _sum(x: Float[Array, "*rows short"]) -> Float[Array, "*rows"]:
    return jnp.sum(x, -1)


def _product(x: Float[Array, "*rows short"]) -> Float[Array, "*rows"]:
    # Halves are summed in float32; and devices may split several axes of rows, which a reshape would join.
    if x.dtype.itemsize == 2 or (x.ndim > 2 and jax.device_count() > 1):
        return _sum(x)
    length = x.shape[-1]
    ones = lax.optimization_barrier(jnp.ones(length, x.dtype))
    sums = jnp.matmul(ones, x.reshape(-1, length).T, precision="highest")
    limits = jnp.finfo(x.dtype)
    # As it is, but not next to an addition: XLA would fuse that instead of what is summed.
    return lax.reduce_precision(sums, limits.nexp, limits.nmant).reshape(x.shape[:-1])


_row_sum = make_primitive("row_sum", _sum, _product)
_row_sum.def_abstract_eval(
    lambda x: x.update(shape=x.shape[:-1], sharding=x.sharding.update(spec=x.sharding.spec[:-1]), weak_type=False)
)
ad.deflinear2(_row_sum, lambda cotangent, x: [jnp.broadcast_to(cotangent[..., None], x.aval.shape)])
batching.primitive_batchers[_row_sum] = lambda arrays, dims: (row_sum(jnp.moveaxis(arrays[0], dims[0], 0)), 0)
