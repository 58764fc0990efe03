"""One batch for both frameworks: inputs in either layout, targets, and the scalar that is differentiated."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from jaxloss.parity._layout import Layout, same
from jaxloss.parity._state_dict import to_numpy

Losses = tuple[Callable[..., Tensor], Callable[..., jax.Array]]


class Batch:
    """Inputs and targets. Without a loss, the scalar is the outputs' product with random numbers."""

    def __init__(self, torch_batch: Any, flax_batch: Any, losses: Losses | None, seed: int) -> None:
        """Takes what `check` was given."""
        self.notes: list[str] = []
        self._losses, self._seed = losses, seed
        given = [t.detach() if isinstance(t, Tensor) else torch.tensor(np.array(t)) for t in _parts(torch_batch)]
        has_targets = losses is not None and len(given) > 1
        self.targets = given.pop() if has_targets else None
        self.torch_inputs = given
        if not given or any(t.numel() == 0 for t in given):
            raise ValueError("check: the batch is empty.")
        self.flax_inputs = self._flax_inputs(flax_batch)
        self.layout: Layout | None = None  # of the outputs; known after the first run

    def _flax_inputs(self, given: Any) -> list[np.ndarray]:
        if given is not None:
            inputs = [np.array(part) for part in _parts(given)][: len(self.torch_inputs)]
            if len(inputs) < len(self.torch_inputs):
                raise ValueError(f"check: {len(self.torch_inputs)} inputs for PyTorch, {len(inputs)} for Flax.")
            return inputs
        if any(t.ndim == 4 for t in self.torch_inputs):
            self.notes.append("4-D inputs are transposed from PyTorch's NCHW to Flax's NHWC.")
        return [to_numpy(t.movedim(1, -1) if t.ndim == 4 else t) for t in self.torch_inputs]

    def input_layouts(self) -> list[Layout]:
        """How Flax's inputs become PyTorch's."""
        from jaxloss.parity._pairs import activation_layout

        pairs = zip(self.torch_inputs, self.flax_inputs, strict=True)
        return [
            activation_layout(tuple(a.shape), b.shape, channels_first=a.ndim == 4) or same(b.shape) for a, b in pairs
        ]

    def torch_objective(self, outputs: Tensor) -> Tensor:
        """The scalar, in PyTorch."""
        if self._losses is None:
            return (outputs * torch.from_numpy(self._cotangent(tuple(outputs.shape))).to(outputs.dtype)).sum()
        targets = self._targets(outputs)
        return self._losses[0](outputs, targets.to(outputs.dtype) if targets.is_floating_point() else targets)

    def flax_objective(self, outputs: jax.Array) -> jax.Array:
        """The scalar, in JAX."""
        if self._losses is None:
            assert self.layout is not None
            return jnp.vdot(
                jnp.asarray(self.layout.to_flax(self._cotangent(self.layout.merged)), outputs.dtype), outputs
            )
        assert self.targets is not None
        targets = to_numpy(self.targets)
        if np.issubdtype(targets.dtype, np.floating):
            targets = self.layout.to_flax(targets) if self.layout and targets.shape == self.layout.merged else targets
            return self._losses[1](outputs, jnp.array(targets, outputs.dtype))
        return self._losses[1](outputs, jnp.array(targets))

    def _targets(self, outputs: Tensor) -> Tensor:
        if self.targets is None:
            self.notes.append("No targets were given: classes are drawn, equally likely.")
            shape = tuple(outputs.shape[:1] + outputs.shape[2:]) if outputs.ndim > 1 else ()
            classes = outputs.shape[min(outputs.ndim - 1, 1)]
            self.targets = torch.tensor(np.random.default_rng(self._seed).integers(classes, size=shape))
        return self.targets

    def _cotangent(self, shape: Sequence[int]) -> np.ndarray:
        return np.random.default_rng(self._seed).normal(size=tuple(shape))


def _parts(batch: Any) -> list[Any]:
    return list(batch) if isinstance(batch, tuple | list) else [batch]
