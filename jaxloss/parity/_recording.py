"""What is known of a PyTorch original: all that a port is compared with. Nothing here needs PyTorch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxloss.parity._compare import norm, widen
from jaxloss.parity._layout import Shape
from jaxloss.parity._masks import Drop
from jaxloss.parity._pairs import Call

Sketches = dict[str, dict[str, np.ndarray]]  # after a step: what is kept ("": parameters) → PyTorch's name → sketch
Noise = list[dict[str, dict[str, float]]]  # the relative distance of each sketch, step by step

_SUMS, _SMALL = 8, 4096
_ZERO = 1e-14  # of the largest gradient: what rounding may leave of none


@dataclass
class LayerCall:
    """What one call of a layer read and returned, and the loss's gradients with respect to both."""

    name: str
    index: int
    inputs: list[np.ndarray]
    output: np.ndarray
    input_gradients: list[np.ndarray | None] = field(default_factory=list)
    output_gradient: np.ndarray | None = None

    @property
    def key(self) -> Call:
        """The layer's name, and how often it was called before."""
        return self.name, self.index


@dataclass
class Recording:
    """One run of an original, in PyTorch's layouts."""

    calls: list[LayerCall]
    outputs: np.ndarray
    loss: np.ndarray
    output_gradient: np.ndarray
    input_gradients: list[np.ndarray | None]
    parameter_gradients: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]  # after the run; real ones
    masks: list[np.ndarray]  # what dropout kept, call by call
    drops: list[Drop]
    random: list[str]  # functions that draw random numbers, other than dropout
    flattened: dict[Call, tuple[int, ...]]  # (channels, *spatial) of the feature map that a layer's input was
    mutated: list[int]  # inputs that the module changed in place
    targets: np.ndarray | None = None  # of the loss, if there is one
    rounded: list[str] = field(default_factory=list)  # functions that return less than float64, if that is run

    @property
    def gradient_floor(self) -> float:
        """What rounding may leave of a parameter's gradient that is zero, like that of a bias before batch norm."""
        return _ZERO * self.largest_gradient

    @property
    def largest_gradient(self) -> float:
        """The norm of the largest of all parameters' gradients."""
        return _largest(self.parameter_gradients.values())

    @property
    def activation_floor(self) -> float:
        """The same for the gradients of activations."""
        return _ZERO * self.largest_activation_gradient

    @property
    def largest_activation_gradient(self) -> float:
        """The norm of the largest of all activations' gradients."""
        gradients = [gradient for call in self.calls for gradient in (*call.input_gradients, call.output_gradient)]
        return _largest(gradient for gradient in (*gradients, self.output_gradient) if gradient is not None)

    @property
    def moving(self) -> set[str]:
        """The parameters that training moves: Adam makes steps of full length from gradients of rounding alone."""
        floor = self.gradient_floor
        return {name for name, array in self.parameter_gradients.items() if norm(array) > 100 * floor}


def _largest(gradients: Iterable[np.ndarray]) -> float:
    return max((norm(gradient) for gradient in gradients), default=0.0)


class Trajectory(NamedTuple):
    """Steps of an optimizer, in PyTorch's layouts."""

    sketches: list[Sketches]
    masks: list[list[np.ndarray]]  # what dropout kept in each step
    noise: Callable[[], Noise]  # how far PyTorch is from itself when its weights are moved by rounding


def sketch(array: np.ndarray) -> np.ndarray:
    """A small linear image of a large array, a small array itself: what is kept of an array to compare it later.

    Eight sums, with normal factors, along its longest axis. The norm of a difference of images is that of the arrays
    but for a factor near 1, whatever the arrays; that both are equal where the arrays differ has probability 0.
    """
    longest = int(np.argmax(array.shape)) if array.ndim else 0
    if array.size <= _SMALL or array.shape[longest] <= _SUMS:
        return np.array(array)
    # Golden files hold sketches, so the factors are of the generator that NumPy will never change.
    factors = np.random.RandomState(0).normal(size=(_SUMS, array.shape[longest]))
    return np.tensordot(factors, array.astype(np.float64, copy=False), axes=(1, longest)) / np.sqrt(_SUMS)


class Second(NamedTuple):
    """An array of which some is added to another."""

    name: str
    rows: int  # how much, from the first element on


Seconds = Mapping[str, Second]  # by the names of what they are added to


def added(arrays: Mapping[str, np.ndarray], seconds: Seconds) -> dict[str, np.ndarray]:
    """The arrays with these sums, and what is left of the second ones, if anything is."""
    found = dict(arrays)
    for first, (name, rows) in seconds.items():
        some = np.array(found[name])
        some[rows:] = 0
        found[first] = found[first] + some
    return without(found, seconds)


def without(arrays: Mapping[str, np.ndarray], seconds: Seconds) -> dict[str, np.ndarray]:
    """The arrays, without what is added to others; where there is nothing that it is added to, in its place."""
    found = dict(arrays)
    for first, (name, rows) in seconds.items():
        if name not in found:
            continue
        rest = np.array(found.pop(name))
        if rows < len(rest):
            rest[:rows] = 0
            found[name] = rest
        else:
            found.setdefault(first, rest)
    return found


class State(Mapping[str, np.ndarray]):
    """Parameters and buffers of a state_dict, shared ones by their first name alone; copied when asked for.

    Attributes:
        shapes: of all of them.
        tied: the first names of shared ones by their other names.
        seconds: what is added to some, by their names.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        read: Callable[[str], np.ndarray],
        tied: Mapping[str, str],
        seconds: Seconds | None = None,
    ) -> None:
        """Reads nothing."""
        self.seconds = dict(seconds or {})
        gone = {second.name for second in self.seconds.values() if second.rows == shapes[second.name][0]}
        self.shapes = {name: shape for name, shape in shapes.items() if name not in gone}
        self.tied, self._read = dict(tied), read

    def adding(self, seconds: Seconds) -> "State":
        """The same, with sums."""
        return State(self.shapes, self._read, self.tied, seconds)

    def __getitem__(self, name: str) -> np.ndarray:
        """In float64, if it is floating."""
        return self._sum(name, lambda each: widen(self._read(each)))

    def given(self, name: str) -> np.ndarray:
        """In its own dtype, and maybe not a copy."""
        return self._sum(name, self._read)

    def terms(self, name: str) -> dict[str, np.ndarray]:
        """What a sum is made of, by name, in float64; nothing of an array that is no sum."""
        names = (name, self.seconds[name].name) if name in self.seconds else ()
        return {each: widen(self._read(each)) for each in names}

    def _sum(self, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        for first, second in self.seconds.items():
            if name in (first, second.name):
                return added({each: read(each) for each in (first, second.name)}, {first: second})[name]
        return read(name)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """How many."""
        return len(self.shapes)


class ModuleFacts(NamedTuple):
    """What a module of the original is."""

    kind: str  # its class
    channels_first: bool  # whether PyTorch has the channels of what it reads at axis 1
    attributes: dict[str, Any]  # numbers and words, like eps and momentum, and tuples of them


@dataclass
class Source:
    """An original as a comparison sees it: one that can be run now, or one that was recorded in a file."""

    name: str
    modules: dict[str, ModuleFacts]  # by their names, the whole first
    state: State  # before any run
    parameter_dtypes: list[str]
    inputs: list[np.ndarray]  # in their own dtypes
    loss: str | None  # its name; with None, outputs are multiplied by random numbers and summed
    optimizer: str  # the name of its class in torch.optim
    optimizer_given: bool  # otherwise it is Adam with rate 1e-3
    steps: int
    train: bool
    seed: int
    notes: list[str]
    storages: dict[int, int]  # where PyTorch's weights are in memory now: sizes by addresses, in bytes
    recording: Callable[[str], Recording]  # made anew in the dtype of this name: a large one is not kept twice
    trajectory: Callable[[str], Trajectory]
