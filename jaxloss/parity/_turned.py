"""Which matrices a port has the other way round than its kind of layer usually has PyTorch's."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np
from flax import linen, nnx

from jaxloss.parity._layout import Shape, same
from jaxloss.parity._recording import ModuleFacts, State
from jaxloss.parity.weights import Names, Weight, Weights

Modules = Mapping[str, ModuleFacts]  # PyTorch's, by name


def turned_by_shape(weights: Weights, modules: Modules, names: Names, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """The port's matrices that have PyTorch's shape if they are turned, and only then.

    Args:
        weights: the port's.
        modules: of the original.
        names: PyTorch's names by the port's, where they differ.
        shapes: PyTorch's, by its names.
    """
    for name, weight in weights.items():
        theirs, shape = names.get(name, name), weight.layout.merged
        wanted = [shapes[theirs]] if theirs in shapes else shapes.values() if weight.layer is None else ()
        if _may_be_turned(weight, modules, theirs) and shape not in wanted and shape[::-1] in wanted:
            yield name


def turned_by_value(
    weights: Weights, modules: Modules, pairs: Names, state: State, turned: Collection[str]
) -> Iterator[str]:
    """The square ones that hold PyTorch's numbers if they are turned, or whose like are turned.

    Args:
        weights: the port's.
        modules: of the original.
        pairs: PyTorch's names by the port's.
        state: PyTorch's.
        turned: those that are known to be.
    """
    kinds = {_kind(modules, pairs[name]) for name in turned if name in pairs} - {None}
    for mine, theirs in pairs.items():
        weight, shape = weights[mine], weights[mine].variable.shape
        if not _may_be_turned(weight, modules, theirs) or shape != shape[::-1]:
            continue
        ours, usual = np.asarray(weight.variable.get_value()), weight.layout.to_flax(state[theirs])
        if weight.layer is not None:
            alike = _kind(modules, theirs) in kinds
        else:  # a function that is given PyTorch's weights multiplies by them from the left
            alike = weight.layout == same(shape) and _is_linear(modules, theirs) and not np.array_equal(ours, usual)
        if alike or np.array_equal(ours, weight.turned().layout.to_flax(state[theirs])):
            yield mine


def _may_be_turned(weight: Weight, modules: Modules, theirs: str) -> bool:
    """Whether nothing is known of a matrix in one of the frameworks."""
    if len(weight.variable.shape) != 2 or not isinstance(weight.layer, nnx.Linear | linen.Dense | None):
        return False
    return weight.layer is None or not _is_linear(modules, theirs)


def _is_linear(modules: Modules, theirs: str) -> bool:
    """Whether PyTorch's weight is known to be (outputs, inputs)."""
    module = modules.get(theirs.rpartition(".")[0])
    return module is not None and {"in_features", "out_features"} <= module.attributes.keys()


def _kind(modules: Modules, theirs: str) -> str | None:
    module = modules.get(theirs.rpartition(".")[0])
    return module and module.kind
