"""Flax's recurrent cells as PyTorch has them: the gates of a layer in one tensor, and a bias of inputs and of state."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxloss.parity._joined import Joined, join
from jaxloss.parity._layout import Layout, Shape
from jaxloss.parity._pairs import pair_weights
from jaxloss.parity._recording import Noise, Recording, Second, Seconds, Source, Trajectory, added, sketch, without

_LINEN_GATES = {  # in PyTorch's order: of inputs, and of the state
    linen.GRUCell: (("ir", "iz", "in"), ("hr", "hz", "hn")),
    **dict.fromkeys((linen.LSTMCell, linen.OptimizedLSTMCell), (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho"))),
    linen.SimpleCell: (("i",), ("h",)),
}
LINEN_CELLS = tuple(_LINEN_GATES)
CELLS = (nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell)
_WEIGHTS, _FIRST, _SECOND = ("weight_ih", "weight_hh"), "bias_ih", "bias_hh"


def cells(node: object) -> list[tuple[Any, str]]:
    """The cells of a recurrent layer, or a cell alone, each with what PyTorch adds to the names of its weights."""
    match node:
        case nnx.RNN() if isinstance(node.cell, CELLS):
            return [(node.cell, "_l0")]
        case nnx.Bidirectional():
            both = [cell for rnn in (node.forward_rnn, node.backward_rnn) for cell, _ in cells(rnn)]
            return list(zip(both, ("_l0", "_l0_reverse"), strict=True)) if len(both) == 2 else []
        case nnx.Module() if isinstance(node, CELLS):
            return [(node, "")]
    return []


def gates(cell: Any) -> list[list[nnx.Linear]]:
    """What multiplies the inputs, and what multiplies the state, each in the order of PyTorch's gates."""
    if isinstance(cell, nnx.LSTMCell):
        return [[cell.ii, cell.if_, cell.ig, cell.io], [cell.hi, cell.hf, cell.hg, cell.ho]]
    return [[cell.dense_i], [cell.dense_h]]


def fused_gates(cell: Any, layout: Callable[[Any, str, Shape, Shape], Layout]) -> Iterator[tuple[str, Joined]]:
    """A cell's weights by PyTorch's names; a single bias has the first's. `layout` gives a linear layer's."""
    yield from zip(_WEIGHTS, (join("kernel", side, layout) for side in gates(cell)), strict=True)
    biases = (join("bias", side, layout) for side in _biased(cell))
    yield from zip((_FIRST, _SECOND), biases, strict=False)


def _biased(cell: Any) -> list[list[nnx.Linear]]:
    """Of what `gates` gives, what adds a bias to every gate."""
    return [side for side in gates(cell) if all(linear.bias is not None for linear in side)]


def are_together(path: str, theirs: Collection[str] | None, names: Collection[str]) -> bool:
    """Whether PyTorch has the gates of a cell at this path together, as far as its names, or those given, tell."""
    given = [name for name in names if name.startswith(f"{path}." if path else "")]
    known = given or (_WEIGHTS if theirs is None else theirs)
    return any(_kind(name).startswith((*_WEIGHTS, _FIRST, _SECOND)) for name in known)


def linen_gates(
    layer: str, cell: object, weights: Mapping[str, Any], theirs: Collection[str]
) -> Iterator[tuple[str, Joined, list[str]]]:
    """The same of a module of Linen's, with the names of the parts of each: zeros where only some gates have a bias."""
    sides = next((sides for kind, sides in _LINEN_GATES.items() if isinstance(cell, kind)), ())
    prefix = f"{layer}." if layer else ""
    path = layer.removesuffix("cell").rstrip(".").split(".")  # what `linen.RNN` calls it
    kernels, biases = ([[f"{prefix}{gate}.{kind}" for gate in side] for side in sides] for kind in ("weight", "bias"))
    biases = [side for side in biases if any(name in weights for name in side)]
    for kind, names in zip((*_WEIGHTS, _FIRST, _SECOND), (*kernels, *biases), strict=False):
        like = next(weights[name] for name in names if name in weights)
        zeros = like._replace(variable=nnx.Param(jnp.zeros(like.variable.shape, like.variable.dtype)))
        parts = [weights.get(name, zeros) for name in names]
        joined = Joined([part.variable for part in parts], [part.layout for part in parts])
        yield torch_name(list(filter(None, path)), f"{kind}_l0", theirs), joined, names


def numbers_of(paths: Collection[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    """The cells of each list, counted: there may be other layers between them."""
    listed: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for *parent, last in filter(None, paths):
        if last.isdigit():
            listed[tuple(parent)].add(int(last))
    return {(*parent, str(i)): n for parent, found in listed.items() for n, i in enumerate(sorted(found))}


def torch_name(path: Sequence[str], attribute: str, known: Collection[str], number: int = 0) -> str:
    """What PyTorch calls a cell's weight: the layers of one module are numbered there, those of a list in Flax."""
    kind, _, rest = attribute.partition("_l0")
    names = [(*path, attribute), (*path, f"{kind}_l0{rest}"), (*path, kind), (*path[:-1], f"{kind}_l{number}{rest}")]
    return next((name for name in map(".".join, names) if name in known), ".".join(names[0]))


def second_biases(
    weights: Mapping[str, Any], theirs: Mapping[str, np.ndarray], names: Mapping[str, str]
) -> dict[str, Second]:
    """What a port has added up of PyTorch's biases, by the first one: of those that are not the port's own.

    The reset gate of a GRU multiplies a third of the second one, for which `nnx.GRUCell` has no place.
    """
    layers = [weight.layer for weight in weights.values()]
    in_linen = any(isinstance(layer, linen.GRUCell) for layer in layers)
    if not (in_linen or any(map(has_one_bias, layers))):
        return {}
    own = _own_seconds(weights, theirs, names)
    found: dict[str, Second] = {}
    for name in (name for name in theirs if _kind(name).startswith(_SECOND) and name not in own):
        first, weight = _beside(name, _SECOND, _FIRST), _beside(name, _SECOND, _WEIGHTS[1])
        if first in theirs and weight in theirs:
            bias, (rows, units) = theirs[name], theirs[weight].shape
            is_gru = rows == 3 * units
            if is_gru and in_linen:
                found[first] = Second(name, 2 * units)
            elif not is_gru or not bias[-units:].any():
                found[first] = Second(name, len(bias))
    return found


def _own_seconds(weights: Mapping[str, Any], theirs: Mapping[str, np.ndarray], names: Mapping[str, str]) -> set[str]:
    """PyTorch's second biases that the port has by themselves."""
    ours = [name for name, weight in weights.items() if not isinstance(weight.layer, linen.GRUCell)]
    seconds = [name for name in ours if _kind(name).startswith(_SECOND)]
    if not seconds:
        return set()
    mine = {name: weights[name].layout.merged for name in weights if _kind(name).startswith(_WEIGHTS)}
    others = {name: theirs[name].shape for name in theirs if _kind(name).startswith(_WEIGHTS)}
    pairs = pair_weights(mine, others, given={name: given for name, given in names.items() if name in mine})
    layers = (pairs.get(_beside(name, _SECOND, _WEIGHTS[1])) for name in seconds)
    return {_beside(layer, _WEIGHTS[1], _SECOND) for layer in layers if layer} | {
        names[n] for n in seconds if n in names
    }


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def has_one_bias(cell: object) -> bool:
    """Whether a cell adds a bias to what comes of the inputs, or to what comes of the state, and not to both."""
    if isinstance(cell, CELLS):
        return len(_biased(cell)) == 1
    return isinstance(cell, LINEN_CELLS) and not isinstance(cell, linen.GRUCell)


def second_of(first: str) -> str:
    """What PyTorch calls the bias that is added to this one."""
    return _beside(first, _FIRST, _SECOND)


def _beside(name: str, kind: str, other: str) -> str:
    """The name of another weight of the same layer."""
    layer, dot, last = name.rpartition(".")
    return layer + dot + last.replace(kind, other)


def with_one_bias(source: Source, seconds: Seconds) -> Source:
    """The original as if it had added up the biases itself, and the sum moved as both together."""
    if not seconds:
        return source
    sizes = {second: source.state.shapes[second.name][0] for second in seconds.values()}
    untold = [second.name for second, size in sizes.items() if second.rows < size > sketch(np.empty(size)).size]
    notes = [f"{name} is too large for steps of a part of it: none are compared." for name in untold]

    def recording(dtype: str) -> Recording:
        found = source.recording(dtype)
        return replace(found, parameter_gradients=without(found.parameter_gradients, seconds))

    def trajectory(dtype: str) -> Trajectory:
        found = source.trajectory(dtype)
        sketches = [
            {
                kind: without(arrays, seconds) if kind else added(_with_fixed(arrays), seconds)
                for kind, arrays in step.items()
            }
            for step in found.sketches
        ]

        def noise() -> Noise:  # where PyTorch trains the second alone, its own
            return [{kind: _second_ones(named) | named for kind, named in step.items()} for step in found.noise()]

        return found._replace(sketches=sketches, noise=noise)

    def _with_fixed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:  # what PyTorch does not train
        names = [*seconds, *(second.name for second in seconds.values())]
        return {**arrays, **{name: sketch(source.state[name]) for name in names if name not in arrays}}

    def _second_ones(named: Mapping[str, float]) -> dict[str, float]:
        return {first: named[second.name] for first, second in seconds.items() if second.name in named}

    return replace(
        source,
        state=source.state.adding(seconds),
        notes=[*source.notes, *notes],
        steps=0 if untold else source.steps,
        recording=recording,
        trajectory=trajectory,
    )
