"""PyTorch's CPU random numbers, bit for bit, in NumPy: the same seed gives the same weights, batches and masks.

Verified against torch 2.13 on Linux. Not reproduced: normal draws, CUDA, loaders with worker processes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


class Generator:
    """Draws what PyTorch's CPU generator of the same seed draws: `torch.Generator().manual_seed(seed)`.

    Args:
        seed: an integer; its low 32 bits count, as in PyTorch.

    Examples:
        >>> from jaxloss.parity import rng
        >>> rng.Generator(0).randperm(5)
        array([4, 0, 1, 3, 2])
    """

    def __init__(self, seed: int) -> None:
        """Seeds the Mersenne Twister as PyTorch does."""
        self._twister = np.random.RandomState(seed % 2**32)

    @property
    def state(self) -> dict[str, Any]:
        """Where the stream is, as NumPy has it; can be set."""
        return self._twister.get_state(legacy=False)

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._twister.set_state(state)

    def uint32(self, size: int) -> np.ndarray:
        """The next draws of 32 bits, uint32 (size,)."""
        return self._twister.randint(0, 2**32, size, np.uint32)

    def uint64(self, size: int) -> np.ndarray:
        """The next draws of 64 bits, uint64 (size,), each made of two, the high word first."""
        high, low = self.uint32(2 * size).astype(np.uint64).reshape(size, 2).T
        return high << np.uint64(32) | low

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """`torch.empty(shape).uniform_(low, high)`, filled in C order.

        Args:
            shape: of the result.
            low: smallest value, rounded to float32.
            high: bound that is reached by rounding alone, rounded to float32.

        Returns:
            A float32 array of that shape.

        References:
            `PyTorch's page <https://docs.pytorch.org/docs/stable/generated/torch.Tensor.uniform_.html>`__
        """
        units = (self.uint32(math.prod(shape)) & np.uint32(2**24 - 1)) * 2.0**-24
        width = float(np.float32(high) - np.float32(low))
        return (units * width + float(np.float32(low))).astype(np.float32).reshape(shape)

    def randperm(self, n: int) -> np.ndarray:
        """`torch.randperm(n)`: a permutation of 0 … n - 1, int64 (n,).

        References:
            https://docs.pytorch.org/docs/stable/generated/torch.randperm.html
        """
        steps = (self.uint32(max(n - 1, 0)) % np.arange(n, 1, -1, dtype=np.uint32)).tolist()
        order = list(range(n))
        for i, step in enumerate(steps):
            order[i], order[i + step] = order[i + step], order[i]
        return np.array(order, np.int64)

    def kept(self, shape: Sequence[int], p: float) -> np.ndarray:
        """What `torch.nn.functional.dropout(x, p)` keeps of a contiguous x of this shape.

        Args:
            shape: PyTorch's, so (N, C, H, W) for images; (N, C, 1, 1) for `dropout2d`, which draws once a channel.
            p: probability of an element to be dropped, in [0, 1]; for 0 and 1 nothing is drawn.

        Returns:
            Booleans of this shape. PyTorch multiplies what is kept by float32(1 / (1 - p)).

        Raises:
            ValueError: p is not in [0, 1].

        References:
            https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.dropout.html
        """
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        if p in (0, 1):
            return np.full(shape, p == 0)
        words = self.uint32(2 * math.prod(shape)).reshape(-1, 2)
        high, low = words[:, 0] & np.uint32(2**21 - 1), words[:, 1]  # 53 random bits, compared as integers
        least_high, least_low = divmod(math.ceil((1 - float(p)) * 2**53), 2**32)
        return ((high < least_high) | ((high == least_high) & (low < least_low))).reshape(shape)

    def epoch(self, n: int, *, shuffle: bool) -> np.ndarray:
        """The order in which the next pass over a `torch.utils.data.DataLoader` takes n examples, int64 (n,).

        This is the global generator, and every pass draws from it, an unshuffled evaluation too.

        References:
            https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.DataLoader
        """
        self.uint64(1)  # the seed of worker processes
        return Generator(int(self.uint64(1)[0])).randperm(n) if shuffle else np.arange(n)

    def linear(self, in_features: int, out_features: int) -> Arrays:
        """Weight (out, in) and bias (out,) of a new `torch.nn.Linear`.

        References:
            https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
        """
        return self._layer((out_features, in_features))

    def conv2d(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        *,
        groups: int = 1,
    ) -> Arrays:
        """Weight (out, in / groups, height, width) and bias (out,) of a new `torch.nn.Conv2d`.

        References:
            https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
        """
        return self._layer((out_channels, in_channels // groups, *kernel_size))

    def xavier_uniform(self, shape: Sequence[int], *, gain: float = 1.0) -> np.ndarray:
        """A weight of this shape as `torch.nn.init.xavier_uniform_` draws it.

        References:
            `PyTorch's page <https://docs.pytorch.org/docs/stable/nn.init.html#torch.nn.init.xavier_uniform_>`__
        """
        outputs, inputs, *kernel = shape
        fans = (inputs + outputs) * math.prod(kernel)
        bound = math.sqrt(3.0) * (gain * math.sqrt(2.0 / fans))
        return self.uniform(shape, -bound, bound)

    def _layer(self, shape: Sequence[int]) -> Arrays:
        """The default initialisation: `kaiming_uniform_` with a = √5, then the bias."""
        fan_in = math.prod(shape[1:])
        gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
        root = math.sqrt(fan_in) or math.inf  # without inputs PyTorch's bounds are 0
        bound = math.sqrt(3.0) * (gain / root)
        weight = self.uniform(shape, -bound, bound)
        return {"weight": weight, "bias": self.uniform(shape[:1], -1 / root, 1 / root)}
