"""How an array in Flax's layout becomes the same array in PyTorch's, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a Flax array, of NumPy or JAX, becomes PyTorch's: split its axes, flip some, permute them, merge them."""

    shape: Shape  # Flax's
    split: Shape
    order: Shape
    merged: Shape  # PyTorch's
    flip: Shape = ()

    def to_torch(self, array: Any) -> Any:
        """Flax's array as PyTorch has it."""
        return self._flipped(array.reshape(self.split)).transpose(self.order).reshape(self.merged)

    def to_flax(self, array: Any) -> Any:
        """PyTorch's array as Flax has it."""
        permuted = array.reshape([self.split[axis] for axis in self.order])
        return self._flipped(permuted.transpose(np.argsort(self.order))).reshape(self.shape)

    def torch_index(self, index: Shape) -> Shape:
        """Where in PyTorch's array an element of Flax's is."""
        split = np.unravel_index(np.ravel_multi_index(index, self.shape), self.split) if self.shape else ()
        split = [self.split[axis] - 1 - int(i) if axis in self.flip else int(i) for axis, i in enumerate(split)]
        moved, sizes = ([values[axis] for axis in self.order] for values in (split, self.split))
        flat = np.ravel_multi_index(moved, sizes) if sizes else 0
        return tuple(int(i) for i in np.unravel_index(flat, self.merged))

    def _flipped(self, array: Any) -> Any:
        return np.flip(array, self.flip) if self.flip else array  # np.flip makes a 0-D array a scalar


def permuted(shape: Shape, order: Shape, flip: Shape = ()) -> Layout:
    """PyTorch has Flax's axes in another order."""
    return Layout(shape, shape, order, tuple(shape[axis] for axis in order), flip)


def same(shape: Shape) -> Layout:
    """Both have the same array."""
    return permuted(shape, tuple(range(len(shape))))


def channels_last(shape: Shape) -> Layout:
    """PyTorch's axis 1 is Flax's last; `shape` is PyTorch's."""
    batch, channels, *spatial = shape
    return permuted((batch, *spatial, channels), (0, len(shape) - 1, *range(1, len(shape) - 1)))
