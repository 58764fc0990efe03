"""What dropout kept in PyTorch, laid out as the port drops."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxloss.parity._layout import Shape


class Drop(NamedTuple):
    """A call of dropout in PyTorch."""

    window: int  # how many layers were called before
    rate: float
    whole_channels: bool
    feature_map: Shape | None  # (channels, *spatial), if one was flattened before


class PortDrop(NamedTuple):
    """A call of dropout in the port."""

    window: int  # how many layers were called before
    rate: float
    broadcast: Shape  # axes
    shape: Shape  # of what is dropped


def port_mask(mask: np.ndarray, drop: Drop, ours: PortDrop, *, flax_order: bool, orders: Sequence[Shape]) -> np.ndarray:
    """PyTorch's mask in the port's layout, as coarse or as fine as the port draws it.

    Args:
        mask: PyTorch's.
        drop: the call there.
        ours: the call in the port.
        flax_order: whether the layer that follows reads a feature map that the port flattens channels last.
        orders: PyTorch's axes in the port's order, as the layers around have them, the likeliest first.
    """
    candidates = _candidates(mask, drop, len(ours.shape), flax_order=flax_order, orders=orders)
    fitting = [each for each in candidates if broadcasts(each.shape, ours.shape)]
    if not fitting and sorted(mask.shape) == sorted(ours.shape):
        turned = (mask.transpose(order) for order in itertools.permutations(range(mask.ndim)))
        fitting = [each for each in turned if each.shape == ours.shape]
    elif not fitting and mask.size == math.prod(ours.shape):  # as of (batch times heads, queries, keys)
        fitting = [mask.reshape(ours.shape)]
    broadcast = {axis % len(ours.shape) for axis in ours.broadcast}
    random = np.random.default_rng(0).random(ours.shape) < 0.5  # differs from any other, as it must where nothing fits
    if not fitting:
        return random
    fitted = fitting[0]
    if any(fitted.shape[axis] < size and axis not in broadcast for axis, size in enumerate(ours.shape)):
        return np.where(random, fitted, np.flip(fitted, 0))  # elements, where PyTorch drops whole channels
    return fitted[tuple(slice(1) if axis in broadcast else slice(None) for axis in range(fitted.ndim))]


def _candidates(
    mask: np.ndarray, drop: Drop, rank: int, *, flax_order: bool, orders: Sequence[Shape]
) -> list[np.ndarray]:
    """The mask in each layout that it may have in the port, the likeliest first."""
    if mask.ndim == 2 and drop.feature_map is not None:
        full = mask.reshape(len(mask), *drop.feature_map)
        moved = np.moveaxis(full, 1, -1)
        return [moved, full] if rank > 2 else [(moved if flax_order else full).reshape(mask.shape)]
    if mask.ndim < 3:
        return [*(mask.transpose(order) for order in orders), mask]
    moved = np.moveaxis(mask, 1, -1)
    if rank == 2:
        return [(moved if flax_order else mask).reshape(len(mask), -1)]
    return [*(mask.transpose(order) for order in orders), mask, moved]


def broadcasts(shape: Shape, full: Shape) -> bool:
    """Whether an array of this shape fits that one, of as many axes."""
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))
