"""The batch as the port takes it: inputs in its layout, targets, and the scalar that is differentiated."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxloss
from jaxloss.parity._layout import Layout, Shape, same
from jaxloss.parity._recording import Recording

FlaxLoss = Callable[..., jax.Array]


class Batch:
    """Inputs and targets. Without a loss, the scalar is the outputs' product with the numbers that PyTorch took."""

    def __init__(self, torch_inputs: list[np.ndarray], flax_batch: Any, loss: FlaxLoss | None) -> None:
        """Takes PyTorch's inputs, and what `check` was given for the port."""
        self.notes: list[str] = []
        self._loss, self._torch_inputs = loss, torch_inputs
        self._targets: np.ndarray | None = None
        self._multipliers: np.ndarray | None = None
        self.flax_inputs = self._flax_inputs(flax_batch)
        self.keeps_channels_first = flax_batch is None and any(array.ndim in (3, 5) for array in torch_inputs)
        self.layout: Layout | None = None  # of the outputs; known after the first run

    def see(self, recording: Recording) -> None:
        """Takes the targets of a run of the original, or what stands for them."""
        self._targets, self._multipliers = recording.targets, recording.output_gradient

    def _flax_inputs(self, given: Any) -> list[np.ndarray]:
        if given is not None:
            inputs = [np.array(part) for part in parts(given)][: len(self._torch_inputs)]
            if len(inputs) < len(self._torch_inputs):
                raise ValueError(f"parity: {len(self._torch_inputs)} inputs for PyTorch, {len(inputs)} for Flax.")
            return inputs
        images = list(map(self._is_image, self._torch_inputs))
        if any(images):
            self.notes.append("4-D inputs are transposed from PyTorch's NCHW to Flax's NHWC.")
        moved = zip(self._torch_inputs, images, strict=True)
        return [np.array(np.moveaxis(array, 1, -1) if image else array) for array, image in moved]

    def _is_image(self, array: np.ndarray) -> bool:
        """A 4-D input, but a mask (batch, 1, queries, keys) beside tokens."""
        return array.ndim == 4 and (array.shape[1] != 1 or self._torch_inputs[0].ndim == 4)

    def input_layouts(self) -> list[Layout]:
        """How Flax's inputs become PyTorch's."""
        from jaxloss.parity._pairs import activation_layouts, nearest

        def layout(theirs: np.ndarray, ours: np.ndarray) -> Layout:
            layouts = activation_layouts(theirs.shape, ours.shape)
            return nearest(layouts, ours, theirs) if layouts else same(ours.shape)

        return list(map(layout, self._torch_inputs, self.flax_inputs))

    def flax_objective(self, outputs: jax.Array) -> jax.Array:
        """The scalar, in JAX."""
        if self._loss is None:
            assert self.layout is not None
            assert self._multipliers is not None
            return jnp.vdot(jnp.asarray(self.layout.to_flax(self._multipliers), outputs.dtype), outputs)
        targets = self._targets
        assert targets is not None
        loss, layout = self._loss, self.layout
        whole = layout is not None and targets.shape == layout.merged
        if loss in (jaxloss.cross_entropy, jaxloss.nll_loss) and layout is not None and layout.merged:
            last = len(layout.merged) - 1
            axis = last if classes_are_last(layout.merged, targets.shape) else min(last, 1)  # PyTorch's
            loss = partial(self._loss, axis=layout.order[axis])
            if targets.ndim == last:
                targets = targets.transpose(np.argsort(np.delete(layout.order, axis)))
        if jnp.issubdtype(targets.dtype, jnp.floating):
            targets = layout.to_flax(targets) if layout is not None and whole else targets
            return loss(outputs, jnp.array(targets, outputs.dtype))
        # A copy, because JAX remembers the array itself as the int64 constant that it is in float64's runs.
        return loss(outputs, jnp.array(np.array(targets)))


def classes_are_last(outputs: Shape, targets: Shape) -> bool:
    """Whether class indices leave out the outputs' last axis, as language models have it, and not PyTorch's axis 1."""
    return len(outputs) > 2 and tuple(targets) == tuple(outputs[:-1]) != (*outputs[:1], *outputs[2:])


def parts(batch: Any) -> list[Any]:
    """The arrays of a batch."""
    if isinstance(batch, Mapping) or (isinstance(batch, tuple | list) and any(isinstance(b, Mapping) for b in batch)):
        raise TypeError("parity: the batch has a dict: give a tuple of the arrays, in the order of the arguments.")
    return list(batch) if isinstance(batch, tuple | list) else [batch]
