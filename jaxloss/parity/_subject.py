"""A module, its port, and what of the one belongs to what of the other."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxloss.parity._batch import Batch, FlaxLoss
from jaxloss.parity._layout import Layout, Shape, channels_last, same
from jaxloss.parity._masks import Drop, PortDrop, broadcasts, port_mask
from jaxloss.parity._pairs import Call, CallPair, activation_layouts, nearest, pair_weights, with_parents
from jaxloss.parity._port import Arrays, Port
from jaxloss.parity._programs import FreeRun, Programs, abstract_run
from jaxloss.parity._recording import LayerCall, Recording, Source, State
from jaxloss.parity._recurrent import second_biases, with_one_bias
from jaxloss.parity._state_dict import ignored
from jaxloss.parity._tree_port import FunctionPort, LinenPort
from jaxloss.parity._turned import turned_by_shape, turned_by_value
from jaxloss.parity.weights import Names, check_names

_LAST_AXIS = ("Embedding", "LayerNorm", "Linear", "RMSNorm")  # PyTorch's classes whose features are there
ENOUGH = 200  # elements from which a spread can be told


class View(NamedTuple):
    """Both frameworks in one dtype."""

    recording: Recording  # its masks as the port drops
    state: State  # the original's, before the run
    port: Port
    programs: Programs


class OutputShapes(NamedTuple):
    """Of what a layer returns, both with the channels where Flax has them."""

    ours: Shape
    theirs: Shape


class Subject:
    """What is checked, and how its parts are paired."""

    def __init__(
        self,
        source: Source,
        flax_module: Any,
        flax_batch: Any,
        loss: FlaxLoss | None,
        feature_maps: Mapping[str, Sequence[int]],
        names: Names | None,
        ignore: Collection[str],
    ) -> None:
        """Runs both once, to see what they call; in float64."""
        self.source, self.flax_module, self.train = source, flax_module, source.train
        self.batch = Batch(source.inputs, flax_batch, loss)
        self.feature_maps: dict[str, Shape] = {name: tuple(shape) for name, shape in feature_maps.items()}
        self._names = names or {}
        self.pairs: list[CallPair] = []
        self.drops: list[PortDrop] = []  # the port's calls of dropout
        self.uncalled: dict[Call, str] = {}  # calls of PyTorch's that are not seen in the port, and its layers
        self.turned: set[str] = set()  # weights that the port has the other way round than is usual
        self.moved: list[str] = []  # layers whose axes the port has in an order that only the numbers tell
        self.misshapen: dict[Call, OutputShapes] = {}  # calls of PyTorch's that return another shape in the port
        self.exact = self.view("float64")
        self.batch.see(self.exact.recording)
        self._pair(self.exact, ignore)
        masks = self.exact.recording.masks
        self._choose_values(self.exact)
        self._choose_layouts(self.exact, masks)

    def view(self, dtype: str) -> View:
        """The original's run in a dtype, and a copy of the port in it."""
        port = self._port(jnp.dtype(dtype), self.source.state.keys())
        if not self.source.state.seconds:
            self.source = with_one_bias(self.source, second_biases(port.weights, self.source.state, self._names))
        recording, state = self.source.recording(dtype), self.source.state
        self._lay_out(port)
        if self.drops:
            recording.masks = self.port_masks(recording.masks, recording)
        return View(recording, state, port, Programs(port, self.batch, self.pairs))

    def _port(self, dtype: np.dtype, theirs: Collection[str]) -> Port:
        told = {jnp.dtype(name) for name in ("float32", *self.source.parameter_dtypes)}
        match self.flax_module:
            case nnx.Module() as module:
                return Port(module, dtype, train=self.train, told=told, theirs=theirs, names=self._names)
            case (linen.Module() as module, variables):
                inputs = self.batch.flax_inputs
                return LinenPort(module, variables, dtype, train=self.train, told=told, inputs=inputs, theirs=theirs)
            case (function, params) if callable(function):
                return FunctionPort(function, params, dtype)
        raise TypeError(
            f"parity: the port is a {type(self.flax_module).__name__}, expected an nnx.Module, a Linen module with its "
            "variables, or a function with its parameters, each as a pair."
        )

    def value(self, name: str) -> jax.Array:
        """A weight that the port is checked with, in float64."""
        port, state, theirs = self.exact.port, self.exact.state, self.weight_pairs.get(name)
        weight = port.weights[name]
        own = weight.variable.get_value()
        if theirs is None or not (self.copied or theirs in state.seconds):
            return port.cast(own)
        exact, given = (weight.layout.to_flax(array) for array in (state[theirs], state.given(theirs)))
        return port.cast(exact if self.copied else np.where(own == given, exact, own))  # the rounding of a sum is none

    def values(self) -> Arrays:
        """All of them, made anew: a large network's are not kept twice."""
        return {name: self.value(name) for name in self.exact.port.weights}

    def rounded(self, view: View) -> Arrays:
        """The same in the dtype of a view."""
        values: Arrays = {}
        for name in view.port.weights:
            with jax.enable_x64(True):
                value = self.value(name)
            with jax.enable_x64(False):
                values[name] = view.port.cast(value)
        return values

    def port_masks(self, masks: Sequence[np.ndarray], recording: Recording) -> list[np.ndarray]:
        """What dropout kept in a run like the recorded one, as the port drops."""
        flattened = {pair.theirs for pair in self.pairs if pair.ours[0] in self.feature_maps}
        fitted = []
        for mask, drop, ours in zip(masks, recording.drops, self.drops, strict=False):
            before, after = recording.calls[: drop.window][-1:], recording.calls[drop.window : drop.window + 1]
            flax_order = any(call.key in flattened for call in after)
            orders = self._orders_around(mask, drop, before, after)
            fitted.append(port_mask(mask, drop, ours, flax_order=flax_order, orders=orders))
        return fitted

    def _orders_around(
        self, mask: np.ndarray, drop: Drop, before: Sequence[LayerCall], after: Sequence[LayerCall]
    ) -> list[Shape]:
        """PyTorch's axes as the port has them in the layers around a dropout, the likeliest order first."""
        axes = tuple(range(mask.ndim))
        channels_first = drop.whole_channels or any(map(self._channels_first, before))
        orders = [(0, *axes[2:], 1)] if channels_first and mask.ndim > 2 else []
        pairs = {pair.theirs: pair for pair in self.pairs}
        around = [pairs[call.key].output for call in before if call.key in pairs]
        around += [layout for call in after if call.key in pairs for layout in pairs[call.key].inputs]
        fitting = (
            layout for layout in around if layout.split == layout.shape and broadcasts(mask.shape, layout.merged)
        )
        return orders + [tuple(map(layout.order.index, axes)) for layout in fitting]

    def lacks_counterpart(self, name: str) -> str:
        """What is wrong with a weight that only the port has."""
        if first := self.exact.state.tied.get(name):
            return f"is trained by itself: PyTorch ties it to {first}"
        if name in self.exact.port.parameters:
            return "has no counterpart in PyTorch"
        return f"is not in PyTorch's state_dict: if it stands for a non-persistent buffer, pass ignore=[{name!r}]"

    def aliased(self) -> Iterator[str]:
        """The port's weights that lie in memory of the original's."""
        for name, weight in self.exact.port.weights.items():
            array = weight.variable.get_value()
            if isinstance(array, jax.Array) and array.is_fully_addressable and len(array.devices()) == 1:
                pointer = array.unsafe_buffer_pointer()
                if any(start <= pointer < start + size for start, size in self.source.storages.items()):
                    yield name

    @property
    def name(self) -> str:
        """What the whole is called in a report."""
        return self.source.name

    def title(self, pair: CallPair) -> str:
        """What a call is called in a report."""
        name, index = pair.theirs
        return (name or self.name) + (f" (call {index + 1})" if index else "")

    def place_of(self, layer: str) -> str:
        """What a layer of the port is called in a report: as in PyTorch, if it is paired."""
        return next((self.title(pair) for pair in self.pairs if pair.ours[0] == layer), layer or self.name)

    @property
    def places(self) -> list[str]:
        """The edges, from the input to the output."""
        names = ["the input", *map(self.title, self.pairs), "the output"]
        return [f"between {a} and {b}" for a, b in itertools.pairwise(names)]

    def output_to_flax(self, array: np.ndarray) -> np.ndarray:
        """The original's outputs, or their gradient, as Flax has them."""
        assert self.batch.layout is not None
        return self.batch.layout.to_flax(array)

    def parameter_pairs(self, layer: str | None = None) -> Iterator[tuple[str, str]]:
        """Names of parameters with gradients in both, of one layer or of all."""
        for ours, theirs in self.weight_pairs.items():
            in_both = ours in self.exact.port.parameters and theirs in self.exact.recording.parameter_gradients
            if in_both and layer in (None, ours.rpartition(".")[0]):
                yield ours, theirs

    def _pair(self, view: View, ignore: Collection[str]) -> None:
        recording, port = view.recording, view.port
        try:
            shapes, result, self.drops = abstract_run(port, self.batch)
        except (TypeError, ValueError) as error:
            if self.batch.keeps_channels_first and recording.calls and self._channels_first(recording.calls[0]):
                raise ValueError(
                    "parity: the port cannot take the batch. Inputs of 3 and 5 dimensions are given to it as PyTorch "
                    f"takes them: pass flax_batch if its channels are last. ({error})"
                ) from error
            raise
        self.our_calls = list(shapes)
        untrained = port.weights.keys() - set(port.parameters)
        where = "PyTorch's state_dict, nor among the port's variables that are no nnx.Param"
        unwanted = ignored(ignore, [*view.state, *view.state.tied, *untrained], where)
        state = {name: shape for name, shape in view.state.shapes.items() if name not in unwanted}
        names = {mine: view.state.tied.get(theirs, theirs) for mine, theirs in self._names.items()}
        self._turn(port, turned_by_shape(port.weights, self.source.modules, names, state))
        ours = {name: weight.layout.merged for name, weight in port.weights.items() if name not in unwanted & untrained}
        check_names(names, ours, state)
        order = with_parents([name for name, _ in shapes], ours), [call.name for call in recording.calls]
        self.weight_pairs = pair_weights(ours, state, *order, given=names)
        self._turn(port, turned_by_value(port.weights, self.source.modules, self.weight_pairs, view.state, self.turned))
        self.mismatched = [
            (mine, f"has shape {ours[mine]}, PyTorch's {state[theirs]}")
            for mine, theirs in self.weight_pairs.items()
            if ours[mine] != state[theirs]
        ]
        self.mismatched += self._trained_otherwise(view)
        wrong = {mine for mine, _ in self.mismatched}
        self.unmatched_ours = sorted(ours.keys() - self.weight_pairs.keys())
        self.unmatched_theirs = sorted(state.keys() - set(self.weight_pairs.values()))
        layers = {theirs.rpartition(".")[0]: mine.rpartition(".")[0] for mine, theirs in self.weight_pairs.items()}
        self.weight_pairs = {mine: theirs for mine, theirs in self.weight_pairs.items() if mine not in wrong}
        unknown = self.feature_maps.keys() - {weight.layer_name for weight in port.weights.values()}
        if unknown:
            raise ValueError(f"parity: layouts names {', '.join(sorted(unknown))}, which the port does not have.")
        self._find_feature_maps(recording, layers, port)
        for call in (call for call in recording.calls if call.name in layers):
            key = layers[call.name], call.index
            if key not in shapes:
                self.uncalled[call.key] = layers[call.name]
                continue
            arrived, left = shapes[key]
            inputs = [self._layouts(call, *both, key) for both in zip(call.inputs, arrived, strict=False)]
            outputs = self._layouts(call, call.output, left, key)
            if len(call.inputs) == len(arrived) and all(inputs):
                if outputs:
                    self.pairs.append(CallPair(call.key, key, [layouts[0] for layouts in inputs], outputs[0]))
                else:
                    theirs = channels_last(call.output.shape).shape if self._channels_first(call) else call.output.shape
                    self.misshapen[call.key] = OutputShapes(left, theirs)
        self.uncompared = sorted({name for name, _ in shapes} - {pair.ours[0] for pair in self.pairs})
        self.batch.layout = self._output_layout(recording, result)

    def _lay_out(self, port: Port) -> None:
        """Says how the port has its weights, as far as it is known."""
        port.set_flatten(self._flat_maps(port))
        for name in self.turned:
            port.weights[name] = port.weights[name].turned()

    def _turn(self, port: Port, names: Iterable[str]) -> None:
        self.turned |= set(names)
        self._lay_out(port)

    def _trained_otherwise(self, view: View) -> Iterator[tuple[str, str]]:
        """Weights that one framework trains and the other does not."""
        for mine, theirs in self.weight_pairs.items():
            trained = mine in view.port.parameters
            if theirs in view.recording.parameter_gradients and not trained:
                yield mine, "is no nnx.Param: PyTorch trains it, the port does not"
            if theirs in view.recording.buffers and trained:
                yield mine, "is an nnx.Param: PyTorch keeps it as a buffer, the port trains it"

    def _find_feature_maps(self, recording: Recording, layers: Mapping[str, str], port: Port) -> None:
        """Where PyTorch flattens a feature map before a linear layer, one by one: some are none for the port."""
        self._lay_out(port)
        for (name, _), feature_map in recording.flattened.items():
            layer = layers.get(name)
            if layer is not None and layer not in self.feature_maps:
                self.feature_maps[layer] = feature_map
                try:
                    self._lay_out(port)
                except ValueError:  # what was flattened is a sequence, or has its channels last
                    del self.feature_maps[layer]
        self._lay_out(port)

    def _output_layout(self, recording: Recording, ours: Shape) -> Layout:
        """The same, or with the channels last; nothing else is the same output."""
        theirs = recording.outputs.shape
        channels_first = bool(recording.calls) and self._channels_first(recording.calls[-1])
        candidates = [channels_last(theirs)] if len(theirs) > (2 if channels_first else 3) else []
        candidates = [*candidates, same(theirs)] if channels_first else [same(theirs), *candidates]
        for layout in candidates:
            if layout.shape == ours:
                if layout != same(theirs):
                    self.batch.notes.append("The port's output has PyTorch's axis 1 last.")
                return layout
        raise ValueError(f"parity: the port's output is {ours}, PyTorch's {theirs}.")

    def _layouts(self, call: LayerCall, theirs: np.ndarray, ours: Shape, key: Call) -> list[Layout]:
        return activation_layouts(
            theirs.shape,
            tuple(ours),
            channels_first=self._channels_first(call),
            feature_map=self.feature_maps.get(key[0]),
        )

    def _channels_first(self, call: LayerCall) -> bool:
        return self.source.modules[call.name].channels_first

    def _flat_maps(self, port: Port) -> dict[str, Shape]:
        """The feature maps that layers with a plain kernel read as one axis; a LinearGeneral's tells its own."""
        kinds = nnx.Linear | linen.Dense | None
        plain = {
            weight.layer_name
            for name, weight in port.weights.items()
            if isinstance(weight.layer, kinds) and name.endswith("weight") and len(weight.variable.shape) == 2
        }
        return {name: shape for name, shape in self.feature_maps.items() if name in plain}

    def _choose_values(self, view: View) -> None:
        """The port's own weights if they come from PyTorch's, in whatever order; else PyTorch's."""
        port, self.copied = view.port, False
        for name in self._flat_maps(port):
            if (theirs := self.weight_pairs.get(f"{name}.weight")) is not None:
                ours = np.asarray(self.value(f"{name}.weight"))
                if np.array_equal(ours, view.state[theirs].T):  # the port flattens in PyTorch's order
                    self._forget_feature_map(name, view)
        # Not of the rest, unless there is nothing else: tables that both compute are equal by themselves.
        names = [name for name in self.weight_pairs if name in port.parameters] or self.weight_pairs
        self.copied = not any(self._comes_from_torch(name, self.value(name), view) for name in names)
        if self.copied:
            for name in self._flat_maps(port):
                if self._arrives_in_torchs_order(name, view):
                    self._forget_feature_map(name, view)

    def _choose_layouts(self, view: View, masks: Sequence[np.ndarray]) -> None:
        """Where the shapes leave open in which order the port has a layer's axes: as the numbers are nearest."""
        calls = {call.key: call for call in view.recording.calls}
        unsettled = [pair for pair in self.pairs if self._is_open(pair, calls[pair.theirs])]
        while True:
            view.recording.masks = self.port_masks(masks, view.recording)  # by the layouts so far
            if not unsettled:
                return
            free = view.programs.free(self.values(), view.recording.masks)
            moved = [pair for pair in unsettled if self._moves(pair, calls[pair.theirs], free)]
            self.moved += map(self.title, moved)
            unsettled = [pair for pair in unsettled if moved and pair not in moved]

    def _choices(self, pair: CallPair, call: LayerCall) -> Iterator[tuple[np.ndarray, list[Layout]]]:
        """PyTorch's array of each input and of the output, and the layouts that it may have in the port.

        Those in which the layer would not compute along PyTorch's axis are none, or its mistake would seem another's.
        """
        for array, layout in zip((*call.inputs, call.output), (*pair.inputs, pair.output), strict=True):
            usual, *others = self._layouts(call, array, layout.shape, pair.ours)
            if self._channels_first(call):
                others = []
            elif self.source.modules[call.name].kind in _LAST_AXIS and array.dtype.kind == "f":
                others = [other for other in others if other.order[-1] == len(other.order) - 1]
            yield array, [usual, *others]

    def _is_open(self, pair: CallPair, call: LayerCall) -> bool:
        return any(len(layouts) > 1 for _, layouts in self._choices(pair, call))

    def _moves(self, pair: CallPair, call: LayerCall, free: FreeRun) -> bool:
        """Gives a call's arrays the layouts in which they are nearest to the port's, and tells whether one is new."""
        before = [*pair.inputs, pair.output]
        ours = map(np.asarray, (*free.arrived[pair.ours], free.outputs[pair.ours]))
        choices = zip(self._choices(pair, call), ours, strict=True)
        *pair.inputs, pair.output = (nearest(layouts, mine, array) for (array, layouts), mine in choices)
        return before != [*pair.inputs, pair.output]

    def _comes_from_torch(self, name: str, value: Any, view: View) -> bool:
        """Whether a weight is the original's, or made from it; what is constant tells nothing."""
        ours = np.asarray(value)
        theirs = view.port.weights[name].layout.to_flax(view.state[self.weight_pairs[name]])
        if not ours.size > 1 or np.ptp(ours) == 0 or np.ptp(theirs) == 0:
            return False
        scaled = (array.ravel() / np.abs(array).max() for array in (ours, theirs))  # squares may under- or overflow
        if np.corrcoef(*scaled)[0, 1] > 0.9 and ours.size > 3:
            return True
        return any(same_values(ours, other) for other in view.state.values())

    def other_initialisation(self) -> Iterator[str]:
        """The parameters that the port draws from another distribution than PyTorch, by their spread."""
        for ours, theirs in self.parameter_pairs():
            own = self.exact.port.weights[ours].variable.get_value()
            mine, others = (float(np.std(np.asarray(array))) for array in (own, self.exact.state[theirs]))
            if own.size >= ENOUGH and not 0.8 * others < mine < 1.25 * others:
                yield f"{ours} (standard deviation {mine:.2g}, PyTorch's {others:.2g})"

    def _arrives_in_torchs_order(self, name: str, view: View) -> bool:
        masks, feature_maps = view.recording.masks, self.feature_maps
        self.feature_maps = {}  # as if it did
        fitted = replace(view.recording, masks=self.port_masks(masks, view.recording))
        self.feature_maps = feature_maps
        cut = view.programs.cut(self.values(), fitted)
        pair = next((pair for pair in self.pairs if pair.ours[0] == name), None)
        if pair is None:
            return False
        call = next(call for call in view.recording.calls if call.key == pair.theirs)
        arrived, (expected,) = np.asarray(cut.arrived[pair.ours][0]), pair.inputs_to_flax(call.inputs)
        return bool(np.allclose(arrived, call.inputs[0], rtol=1e-9) and not np.allclose(arrived, expected, rtol=1e-9))

    def _forget_feature_map(self, name: str, view: View) -> None:
        del self.feature_maps[name]
        self._lay_out(view.port)
        for pair in self.pairs:
            if pair.ours[0] == name:
                pair.inputs = [same(pair.inputs[0].shape)]
        view.programs.reset()


def same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same values, in whatever order."""
    if a.size != b.size or not np.isclose(np.abs(a).sum(), np.abs(b).sum(), rtol=1e-9):
        return False
    return bool((np.sort(a, axis=None) == np.sort(b, axis=None)).all())
