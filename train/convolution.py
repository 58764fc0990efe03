"""A convolution that XLA computes faster on CPU, with the arguments and the results of JAX's own."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def conv_in_cells(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "size size channels features"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "batch rows columns features"]:
    """`lax.conv_general_dilated` for `nnx.Conv`, made for few channels.

    It has a way of its own on CPU if the kernel is square and odd, the images' sides are even, and nothing is padded,
    left out, dilated or grouped.

    Four neighbouring pixels make a cell with four times the channels, and four neighbouring outputs one with four times
    the features: a matrix product of the size that a processor likes, with a quarter of the positions, and what a
    2x2 maximum needs lies side by side. A third of the factors are zeros. Other platforms get JAX's own.
    """

    def own(images: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(images, kernel, strides, padding, **options)

    height, width, *_ = kernel.shape
    sides = images.shape[1:3]
    plain = tuple(strides) == (1, 1) and tuple(map(tuple, padding)) == ((0, 0), (0, 0))
    plain = plain and options.get("feature_group_count", 1) == 1
    plain = plain and all(options.get(name) in (None, (1, 1)) for name in ("lhs_dilation", "rhs_dilation"))
    if not plain or height != width or not height % 2 or any(side % 2 or side <= height for side in sides):
        return own(images, kernel)
    return lax.platform_dependent(images, kernel, cpu=_in_cells, default=own)


def to_cells(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns 2 2 channels"]:
    """The pixels of each 2x2 cell; an odd last row or column is dropped."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)


def _in_cells(images: Array, kernel: Array) -> Array:
    cells = to_cells(images)
    cells = cells.reshape(*cells.shape[:3], -1)
    size, _, channels, features = kernel.shape
    reach = (size + 1) // 2  # in cells
    moved = [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)]
    kernel = jnp.stack(moved, axis=3).reshape(reach, 2, reach, 2, channels, 4 * features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(-1, 4 * features)
    rows, columns = cells.shape[1] - reach + 1, cells.shape[2] - reach + 1
    seen = [cells[:, i : i + rows, j : j + columns] for i in range(reach) for j in range(reach)]
    outputs = (jnp.concatenate(seen, axis=-1) @ kernel).reshape(-1, rows, columns, 2, 2, features)
    return outputs.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2 * rows, 2 * columns, features)
