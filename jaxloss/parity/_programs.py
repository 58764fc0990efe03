"""The compiled runs of a port: free, and cut, where every layer is fed the inputs of the original."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxloss.parity._batch import Batch
from jaxloss.parity._masks import PortDrop
from jaxloss.parity._pairs import CallPair
from jaxloss.parity._port import Arrays, Call, Cut, Free, Port
from jaxloss.parity._recording import Recording


@dataclass
class CutRun:
    """What the layers and edges of a port make of the original's numbers, all in Flax's layout."""

    result: jax.Array
    arrived: dict[Call, list[jax.Array]]  # at the layers, over the edges
    outputs: dict[Call, jax.Array]
    statistics: Arrays
    parameter_gradients: Arrays
    input_gradients: list[Any]  # of the network
    layer_gradients: dict[Call, list[Any]]  # with respect to the layers' inputs
    output_gradients: dict[Call, jax.Array]  # with respect to the layers' outputs, over the edges


@dataclass
class FreeRun:
    """What a port computes by itself."""

    loss: jax.Array
    result: jax.Array
    statistics: Arrays
    arrived: dict[Call, list[jax.Array]]
    outputs: dict[Call, jax.Array]
    parameter_gradients: Arrays
    input_gradients: list[Any]


class Programs:
    """Runs of one port, compiled once each."""

    def __init__(self, port: Port, batch: Batch, pairs: Sequence[CallPair]) -> None:
        """Compiles nothing yet."""
        self.port, self.batch, self.pairs = port, batch, pairs
        self.reset()

    def reset(self) -> None:
        """Forgets what was compiled, because a layout has changed."""
        cut = jax.value_and_grad(self._cut_total, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)
        free = jax.value_and_grad(self._free_loss, argnums=(0, 1), has_aux=True, allow_int=True)
        self._cut, self._free = (jax.jit(run, compiler_options=_options(self.port.dtype)) for run in (cut, free))

    def split(self, values: Arrays) -> tuple[Arrays, Arrays]:
        """Parameters and statistics."""
        parameters = {name: values[name] for name in self.port.parameters}
        return parameters, {name: value for name, value in values.items() if name not in parameters}

    def free(self, values: Arrays, masks: Sequence[np.ndarray]) -> FreeRun:
        """Forward and backward from the batch's inputs."""
        inputs = [self.port.cast(array) for array in self.batch.flax_inputs]
        parameters, statistics = self.split(values)
        (loss, aux), gradients = self._free(parameters, inputs, statistics, _arrays(masks))
        return FreeRun(loss, *aux, *gradients)

    def leaves_float64(self, values: Arrays, masks: Sequence[np.ndarray]) -> bool:
        """Whether a float64 port computes something in fewer digits, forward or backward."""
        inputs = [self.port.cast(array) for array in self.batch.flax_inputs]
        parameters, statistics = self.split(values)
        program = str(self._free.trace(parameters, inputs, statistics, _arrays(masks)).jaxpr)
        return re.search(r":(f8_\w+|f16|bf16|f32|c64)\[", program) is not None

    def _free_loss(self, parameters: Arrays, inputs: Any, statistics: Arrays, masks: Any) -> Any:
        result, after, tape = self.port.run({**parameters, **statistics}, inputs, lambda: Free(self.port.layers, masks))
        arrived, outputs = (
            {pair.ours: seen[pair.ours] for pair in self.pairs} for seen in (tape.arrived, tape.outputs)
        )
        return self.batch.flax_objective(result), (result, after, arrived, outputs)

    def cut(self, values: Arrays, recording: Recording) -> CutRun:
        """Forward and backward of every layer and edge from the original's inputs, outputs and gradients."""
        cast, calls = self.port.cast, {call.key: call for call in recording.calls}
        inputs: dict[Call, list[jax.Array]] = {}
        outputs: dict[Call, jax.Array] = {}
        at_inputs: dict[Call, list[jax.Array]] = {}
        at_outputs: dict[Call, jax.Array] = {}
        for pair in self.pairs:
            call = calls[pair.theirs]
            gradients = [
                np.zeros_like(array) if gradient is None else gradient
                for array, gradient in zip(call.inputs, call.input_gradients, strict=True)
            ]
            inputs[pair.ours] = [cast(x) for x in pair.inputs_to_flax(call.inputs)]
            at_inputs[pair.ours] = [cast(x) for x in pair.inputs_to_flax(gradients)]
            outputs[pair.ours] = cast(pair.output.to_flax(call.output))
            gradient = np.zeros_like(call.output) if call.output_gradient is None else call.output_gradient
            at_outputs[pair.ours] = cast(pair.output.to_flax(gradient))
        assert self.batch.layout is not None
        at_result = cast(self.batch.layout.to_flax(recording.output_gradient))
        parameters, statistics = self.split(values)
        (_, aux), gradients = self._cut(
            parameters,
            [cast(array) for array in self.batch.flax_inputs],
            inputs,
            outputs,
            (statistics, _arrays(recording.masks), at_inputs, at_outputs, at_result),
        )
        return CutRun(*aux, *gradients)

    def _cut_total(self, parameters: Arrays, inputs: Any, layer_inputs: Any, outputs: Any, rest: Any) -> Any:
        """A scalar whose gradients are those of all the pieces at once: each piece times its cotangent."""
        statistics, masks, at_inputs, at_outputs, at_result = rest
        result, after, tape = self.port.run(
            {**parameters, **statistics}, inputs, lambda: Cut(self.port.layers, masks, layer_inputs, outputs)
        )
        total = jnp.vdot(result, at_result)
        for call, cotangent in at_outputs.items():
            total += jnp.vdot(tape.outputs[call], cotangent)
            for arrived, at_input in zip(tape.arrived[call], at_inputs[call], strict=True):
                if jnp.issubdtype(arrived.dtype, jnp.floating):
                    total += jnp.vdot(arrived, at_input)
        return total, (result, tape.arrived, tape.outputs, after)


class Shapes(NamedTuple):
    """What a port would do: shapes only."""

    calls: dict[Call, tuple[list[tuple[int, ...]], tuple[int, ...]]]  # into and out of every layer, in order
    result: tuple[int, ...]
    drops: list[PortDrop]


def abstract_run(port: Port, batch: Batch) -> Shapes:
    """Runs a port without computing anything."""
    shapes = Shapes({}, (), [])

    def run(values: Arrays, inputs: Any) -> Any:
        result, _, tape = port.run(values, inputs, lambda: Free(port.layers, []))
        for call, arrived in tape.arrived.items():
            output = tape.outputs[call]
            if isinstance(output, jax.Array):
                shapes.calls[call] = [array.shape for array in arrived], output.shape
        shapes.drops.extend(tape.drops)
        return result

    result = jax.eval_shape(run, port.values(), [port.cast(array) for array in batch.flax_inputs])
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise TypeError(f"parity: the port returned a {type(result).__name__}, expected one array.")
    return shapes._replace(result=result.shape)


def _options(dtype: jax.typing.DTypeLike) -> dict[str, Any] | None:
    """In float64 a program runs a few times and its rounding is not judged: compiling it is what takes time.

    Not level 0: there XLA may round the same sum in two ways, and a maximum's gradient finds no element equal to it.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" and dtype == jnp.float64 else None


def _arrays(masks: Sequence[np.ndarray]) -> list[jax.Array]:
    return [jnp.array(mask) for mask in masks]
