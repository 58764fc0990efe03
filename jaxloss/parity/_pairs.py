"""Which weight and which call of a port is which of its original, and how their arrays are laid out."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxloss.parity._compare import compare
from jaxloss.parity._layout import Layout, Shape, channels_last, permuted, same

Call = tuple[str, int]  # a layer's name, and how often it was called before
Shapes = Mapping[str, Shape]  # PyTorch's shapes by "layer.weight"

MOST_AXES = 4  # of an activation, in whatever order a port may have them
SAME = 1e-6  # the relative distance of arrays that need no other order
NEARER = 0.1  # what another order leaves of the distance in the usual one, if the port has that other


@dataclass
class CallPair:
    """A call of a layer that both frameworks make, and the layouts of what it reads and returns."""

    theirs: Call
    ours: Call
    inputs: list[Layout]
    output: Layout

    def inputs_to_flax(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """PyTorch's inputs, or their gradients, as Flax has them."""
        return [layout.to_flax(array) for layout, array in zip(self.inputs, arrays, strict=True)]


def pair_weights(
    ours: Shapes,
    theirs: Shapes,
    our_order: Iterable[str] = (),
    their_order: Iterable[str] = (),
    given: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Our names → theirs: as given; layers by name; and the rest by shape, in the order of calls or of definition.

    A weight that is given takes the rest of its layer along, if all that are given of it come from one layer.
    """
    known = dict(given or {})
    our_layers = _by_layer({name: shape for name, shape in ours.items() if name not in known}, our_order)
    their_layers = _by_layer({name: shape for name, shape in theirs.items() if name not in known.values()}, their_order)
    pairs = {
        mine: other for mine, other in _layers_given(known).items() if mine in our_layers and other in their_layers
    }
    pairs |= {
        layer: layer
        for layer in _namesakes(our_layers, their_layers)
        if layer not in pairs and layer not in pairs.values()
    }
    for signature in (_all_shapes, _weight_shape):
        rest = [layer for layer in their_layers if layer not in pairs.values()]
        for layer in [layer for layer in our_layers if layer not in pairs]:
            wanted = signature(our_layers[layer])
            found = next((other for other in rest if wanted and signature(their_layers[other]) == wanted), None)
            if found is not None:
                pairs[layer] = found
                rest.remove(found)
    return known | {
        _join(layer, kind): _join(other, kind)
        for layer, other in pairs.items()
        for kind in our_layers[layer]
        if kind in their_layers.get(other, {})
    }


def _layers_given(names: Mapping[str, str]) -> dict[str, str]:
    layers: dict[str, set[str]] = defaultdict(set)
    for mine, theirs in names.items():
        layers[_split(mine)[0]].add(_split(theirs)[0])
    return {mine: others.pop() for mine, others in layers.items() if len(others) == 1}


def with_parents(calls: Iterable[str], weights: Iterable[str]) -> list[str]:
    """The layers in the order of their calls, each after those around it that have weights of their own."""
    layers = {name.rpartition(".")[0] for name in weights}
    order: dict[str, None] = {}
    for call in calls:
        parts = call.split(".")
        around = (".".join(parts[:count]) for count in range(len(parts)))
        order |= dict.fromkeys([*filter(layers.__contains__, around), call])
    return list(order)


def guesses(pairs: Mapping[str, str], shapes: Shapes) -> list[str]:
    """Of the pairs of other names: the layers that only their order tells from each other, and nothing proves it.

    Flax sorts the attributes of a module that it has copied or made without arrays. So names in sorted order say
    nothing of the order of definition, unless others in the module are not sorted, or it is numbers that differ.
    """
    layers = list(dict.fromkeys(_split(name)[0] for name in shapes))
    alike: dict[object, list[str]] = defaultdict(list)
    for mine, kinds in _by_layer(shapes, layers).items():
        if any(pairs.get(_join(mine, kind), _join(mine, kind)) != _join(mine, kind) for kind in kinds):
            alike[_all_shapes(kinds)].append(mine)
    steps = [_step(a, b) for a, b in itertools.pairwise(layers)]
    if any(not a.isdigit() and a > b for a, b in steps):
        return []
    return [
        layer
        for group in alike.values()
        if any(not a.isdigit() for a, _ in itertools.starmap(_step, itertools.pairwise(group)))
        for layer in group
    ]


def _step(a: str, b: str) -> tuple[str, str]:
    """The first parts in which two names differ."""
    both = zip(a.split("."), b.split("."), strict=False)
    return next(((x, y) for x, y in both if x != y), ("0", "0"))


def _namesakes(ours: Iterable[str], theirs: Iterable[str]) -> list[str]:
    """Layers whose names mean the same in both: a number in a name does where both count alike there."""
    mine, others = _numbers(ours), _numbers(theirs)

    def counts_alike(layer: str) -> bool:
        return all(mine[parent] == others[parent] for parent, _ in _numbered(layer))

    return [layer for layer in ours if layer in theirs and counts_alike(layer)]


def _numbers(layers: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for layer in layers:
        for parent, number in _numbered(layer):
            found[parent].add(number)
    return found


def _numbered(layer: str) -> Iterator[tuple[str, str]]:
    """Each number in a layer's name, after what it counts in."""
    parts = layer.split(".")
    return ((".".join(parts[:i]), part) for i, part in enumerate(parts) if part.isdigit())


def _by_layer(shapes: Shapes, order: Iterable[str]) -> dict[str, dict[str, Shape]]:
    layers: dict[str, dict[str, Shape]] = {name: {} for name in order}
    for name, shape in shapes.items():
        layer, kind = _split(name)
        layers.setdefault(layer, {})[kind] = shape
    return {layer: kinds for layer, kinds in layers.items() if kinds}


def _all_shapes(kinds: Mapping[str, Shape]) -> object:
    return frozenset(kinds.items())


def _weight_shape(kinds: Mapping[str, Shape]) -> object:
    gates = kinds.get("weight_ih"), kinds.get("weight_hh")
    return gates if all(gates) else kinds.get("weight")


def kept_otherwise(name: str) -> str:
    """What is to be said of a weight of PyTorch's that holds several of Flax's, or makes one; nothing of others."""
    if ".parametrizations." in f".{name}":
        return (
            "PyTorch computes a weight from it (spectral_norm, weight_norm, …): give the port the weight itself, after "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
        )
    kind = name.rpartition(".")[2]
    if kind.startswith("bias_hh"):
        return (
            f"PyTorch's {kind} is added to what the gates make of the state. nnx.GRUCell has no such bias: give it "
            "one, cell.dense_h = nnx.Linear(units, 3 * units, rngs=rngs). A cell of your own needs an nnx.Param of "
            "this name and shape, or linear layers with biases (docs/porting/pitfalls)"
        )
    what = next((what for start, what in _TOGETHER.items() if kind.startswith(start)), "")
    return what and (
        f"PyTorch's {kind} holds {what} together: give the port an nnx.Param of this name and shape, and split what it "
        "gives (docs/porting/pitfalls)"
    )


_TOGETHER = {
    "in_proj_": "query, key and value (nnx.MultiHeadAttention gets them out of it)",
    **dict.fromkeys(("weight_ih", "weight_hh", "bias_ih"), "the gates (Flax's recurrent cells get them out of it)"),
}


_GATES = r"((?:weight|bias)_[ih]h)(_l\d+\w*)"  # what PyTorch calls the weights of each layer in an LSTM


def _split(name: str) -> tuple[str, str]:
    """A layer and its kind of weight; those in one module of PyTorch's are "rnn._l0", "rnn._l0_reverse", "rnn._l1"."""
    layer, _, kind = name.rpartition(".")
    found = re.fullmatch(_GATES, kind)
    return (".".join(filter(None, (layer, found[2]))), found[1]) if found else (layer, kind)


def _join(layer: str, kind: str) -> str:
    """The inverse."""
    outer, _, end = layer.rpartition(".")
    return ".".join(filter(None, (outer, kind + end) if re.fullmatch(_GATES, kind + end) else (layer, kind)))


def activation_layouts(
    theirs: Shape, ours: Shape, *, channels_first: bool = False, feature_map: Shape | None = None
) -> list[Layout]:
    """How an activation of the port may become the original's, as far as the shapes tell, the likeliest first."""
    as_large = math.prod(ours) == math.prod(theirs)
    if theirs and feature_map and theirs[-1] == math.prod(feature_map) and as_large:
        batch, (channels, *spatial) = theirs[:-1], feature_map
        axes = range(len(batch), len(batch) + len(spatial))
        order = (*range(len(batch)), len(batch) + len(spatial), *axes)
        return [Layout(ours, (*batch, *spatial, channels), order, theirs)]
    usual = [same(theirs)]
    if len(theirs) > 2:
        usual.insert(0 if channels_first else 1, channels_last(theirs))
    orders = itertools.permutations(range(len(theirs))) if 1 < len(theirs) <= MOST_AXES else ()
    others = (
        permuted(tuple(theirs[axis] for axis in order), tuple(map(order.index, sorted(order)))) for order in orders
    )
    fitting = [layout for layout in dict.fromkeys((*usual, *others)) if layout.shape == ours]
    if not fitting and as_large:  # an axis split into heads
        return [Layout(ours, theirs, tuple(range(len(theirs))), theirs)]
    return fitting


def nearest(layouts: Sequence[Layout], ours: np.ndarray, theirs: np.ndarray) -> Layout:
    """The layout in which both arrays agree best: the first, unless another is far nearer."""

    def distance(layout: Layout) -> float:
        return compare(ours, layout.to_flax(theirs), tolerance=0.0).error

    first, *others = layouts
    least = min(others, key=distance, default=first) if distance(first) > SAME else first
    return least if distance(least) < NEARER * distance(first) else first
