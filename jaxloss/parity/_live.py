"""An original that can be run, with its batch, its loss and its optimizer."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jaxloss.parity._batch import classes_are_last, parts
from jaxloss.parity._compare import relative
from jaxloss.parity._original import Functions, Original
from jaxloss.parity._recording import ModuleFacts, Noise, Recording, Sketches, Source, State, Trajectory, sketch
from jaxloss.parity._state_dict import to_array, to_numpy, to_tensor

TorchLoss = Callable[..., Tensor]
DTYPES = {"float64", "float32", "bfloat16", "float16"}

_NORM = nn.modules.batchnorm._NormBase
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, _NORM, nn.GroupNorm, nn.PReLU)


class Live:
    """What `check` and `record` run. Without a loss, the scalar is the outputs' product with random numbers."""

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        *,
        loss: TorchLoss | None,
        optimizer: torch.optim.Optimizer | None,
        steps: int,
        train: bool,
        seed: int,
        dtypes: Sequence[str],
    ) -> None:
        """Runs nothing yet."""
        if steps < 0:
            raise ValueError(f"parity: steps must be 0 or more, got {steps}.")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"parity: PyTorch's optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer: it "
                "comes first, then optax's."
            )
        if isinstance(dtypes, str) or not set(dtypes) <= DTYPES:
            raise ValueError(f"parity: dtypes must be a sequence of {', '.join(sorted(DTYPES))}, got {dtypes!r}.")
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"parity: the original is a {type(module).__name__}, expected a torch.nn.Module, which comes first."
            )
        if complex_ := [name for name, t in module.named_parameters() if t.is_complex() and t.requires_grad]:
            raise TypeError(
                f"parity: {', '.join(complex_)} is complex in PyTorch: train the real and imaginary parts, with "
                "torch.view_as_complex."
            )
        given = [t.detach() if isinstance(t, Tensor) else to_tensor(np.array(t)) for t in parts(batch)]
        self.targets = given.pop() if loss is not None and len(given) > 1 else None
        self.module, self.inputs, self.train, self.seed = module, given, train, seed
        self._loss, self._optimizer, self._steps = loss, optimizer, steps
        self._notes: list[str] = []
        averaging = [name for name, m in module.named_modules() if isinstance(m, _NORM) and m.momentum is None]
        if train and averaging:
            names = ", ".join(averaging)
            self._notes.append(f"{names} average over all steps (momentum=None): only the first step's is compared.")
        if not given or any(t.numel() == 0 for t in given):
            raise ValueError("parity: the batch is empty.")

    def source(self) -> Source:
        """What a comparison asks of it."""
        parameters = self.module.parameters()
        tensors = [t for t in self.module.state_dict().values() if isinstance(t, Tensor)]
        return Source(
            name=type(self.module).__name__,
            modules={name: _facts(module) for name, module in self.module.named_modules()},
            state=_state(self.module),
            parameter_dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in parameters if t.is_floating_point()}),
            inputs=[to_numpy(tensor) for tensor in self.inputs],
            loss=_name(self._loss),
            optimizer=_optimizer_name(self._optimizer),
            optimizer_given=self._optimizer is not None,
            steps=self._steps,
            train=self.train,
            seed=self.seed,
            notes=self._notes,
            storages={t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors},
            recording=self.recording,
            trajectory=self.trajectory,
        )

    def original(self) -> Original:
        """A fresh copy of the original, in float64."""
        return Original(self.module, torch.float64, train=self.train)

    def recording(self, dtype: str) -> Recording:
        """Runs a fresh copy forward and backward."""
        original = Original(self.module, getattr(torch, dtype), train=self.train)
        recording = original.run(self.inputs, self.objective, self.seed)
        recording.targets = None if self.targets is None else to_numpy(self.targets)
        return recording

    def trajectory(self, dtype: str) -> Trajectory:
        """Takes the steps with a fresh copy."""
        sketches, masks = self._take_steps(dtype, nudge=False)
        return Trajectory(sketches, masks, cache(lambda: self._noise(dtype, sketches)))

    def objective(self, outputs: Tensor) -> Tensor:
        """The scalar that is differentiated."""
        if self._loss is None:
            numbers = np.random.default_rng(self.seed).normal(size=tuple(outputs.shape))
            return (outputs * torch.from_numpy(numbers).to(outputs.dtype)).sum()
        if self.targets is None:
            axis = self._class_axis(outputs)
            where = f" of axis {axis}" if outputs.ndim > 2 else ""
            self._notes.append(f"No targets were given: classes{where} are drawn, equally likely.")
            shape = outputs.shape[:axis] + outputs.shape[axis + 1 :]
            self.targets = torch.tensor(np.random.default_rng(self.seed).integers(outputs.shape[axis], size=shape))
        targets = self.targets
        if _takes_classes(self._loss) and classes_are_last(outputs.shape, targets.shape):
            outputs = outputs.movedim(-1, 1)
        if targets.is_floating_point():
            targets = targets.to(outputs.dtype)
        elif targets.dtype.is_signed:
            targets = targets.long()  # JAX's integers are int32, of which PyTorch takes no classes
        loss = self._loss
        return (copy.deepcopy(loss).to(outputs.dtype) if isinstance(loss, nn.Module) else loss)(outputs, targets)

    def _class_axis(self, outputs: Tensor) -> int:
        """PyTorch's, or the last of three where the last layer returns that shape and has its channels there."""
        if outputs.ndim == 3:
            original = self.original()
            with torch.no_grad():
                calls, _ = original.forward(original.cast(self.inputs), Functions(self.seed))
            last = calls[-1] if calls else None
            if (
                last
                and last.output.shape == outputs.shape
                and not isinstance(original.layers[last.name], _CHANNELS_FIRST)
            ):
                return 2
        return min(outputs.ndim - 1, 1)

    def trainee(self, dtype: str = "float64") -> tuple[Original, torch.optim.Optimizer]:
        """A fresh copy of the original with its optimizer; with Adam if there is none."""
        original = Original(self.module, getattr(torch, dtype), train=self.train, optimizer=self._optimizer)
        return original, original.optimizer or torch.optim.Adam(original.module.parameters(), lr=1e-3)

    def backward(self, original: Original, step: int) -> list[np.ndarray]:
        """Puts the gradients of a training step into the original, and returns what dropout kept."""
        masks = original.backward(self.inputs, self.objective, self.seed + step)
        if self._optimizer is None:  # Adam takes no sparse gradients
            for parameter in original.module.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.to_dense()
        return masks

    def _take_steps(self, dtype: str, *, nudge: bool) -> tuple[list[Sketches], list[list[np.ndarray]]]:
        """Sketches and masks of every step, before each of which weights are nudged as rounding does."""
        original, optimizer = self.trainee(dtype)
        random = torch.Generator().manual_seed(self.seed)
        tensors = {name: tensor for name, tensor in original.module.named_parameters() if tensor.requires_grad}

        def kept(kind: str) -> dict[str, np.ndarray]:
            found = {name: optimizer.state[tensor].get(kind) if kind else tensor for name, tensor in tensors.items()}
            return {
                name: sketch(to_numpy(array))
                for name, array in found.items()
                if isinstance(array, torch.Tensor) and array.shape == tensors[name].shape
            }

        sketches: list[Sketches] = []
        masks: list[list[np.ndarray]] = []
        for step in range(1, self._steps + 1):
            for parameter in filter(torch.is_floating_point, original.module.parameters() if nudge else ()):
                terms = math.prod(parameter.shape[1:])
                moves = torch.rand(parameter.shape, dtype=parameter.dtype, generator=random).mul_(2).sub_(1)
                parameter.data.mul_(moves.mul_(terms * torch.finfo(parameter.dtype).eps).add_(1))
            masks.append(self.backward(original, step))
            optimizer.step()
            kinds = {kind for tensor in tensors.values() for kind in optimizer.state[tensor]}
            sketches.append({kind: kept(kind) for kind in (*sorted(kinds), "")})
        return sketches, masks

    def _noise(self, dtype: str, exact: list[Sketches]) -> Noise:
        """How far the sketches are from those of a nudged run, step by step."""
        nudged, _ = self._take_steps(dtype, nudge=True)
        return [
            {
                kind: {name: relative(moved[kind][name], array) for name, array in arrays.items()}
                for kind, arrays in step
            }
            for moved, step in zip(nudged, (sketches.items() for sketches in exact), strict=True)
        ]


def _state(module: nn.Module) -> State:
    first = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    tensors = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    own = {name: tensor for name, tensor in tensors.items() if name in first}
    starts = {tensor.data_ptr(): name for name, tensor in own.items()}
    tied = {name: starts.get(tensor.data_ptr(), "") for name, tensor in tensors.items() if name not in first}

    def read(name: str) -> np.ndarray:
        array = to_array(own[name])
        assert array is not None
        return array

    return State({name: tuple(tensor.shape) for name, tensor in own.items()}, read, tied)


def _facts(module: nn.Module) -> ModuleFacts:
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_") and _is_plain(value)}
    return ModuleFacts(type(module).__name__, isinstance(module, _CHANNELS_FIRST), attributes)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _name(loss: TorchLoss | None) -> str | None:
    """As PyTorch has it, if it is one of its functions; else without an address, which is another in every run."""
    if loss is None:
        return None
    name = getattr(loss, "__name__", type(loss).__name__)
    return name if getattr(F, name, None) is loss else re.sub(" at 0x[0-9a-f]+", "", f"{loss!r}")


def _takes_classes(loss: TorchLoss) -> bool:
    function = loss.func if isinstance(loss, partial) else loss
    return function in (F.cross_entropy, F.nll_loss) or type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss)


def _optimizer_name(optimizer: torch.optim.Optimizer | None) -> str:
    kinds = type(optimizer).__mro__ if optimizer is not None else (torch.optim.Adam,)
    return next(kind.__name__ for kind in kinds if kind.__module__.startswith("torch.optim"))
