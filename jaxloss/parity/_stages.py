"""The layers and edges of a check in order, and its weights, as a report shows them."""

from collections.abc import Iterator

from jaxloss.parity._background import Stage, WeightPair
from jaxloss.parity._subject import Subject


def stages(subject: Subject) -> dict[str, Stage]:
    """Edges and layers in turn, from the input to the output."""
    modules = subject.source.modules
    layers = {weight.layer_name: type(weight.layer).__name__ for weight in subject.exact.port.weights.values()}
    *edges, last = subject.places
    found: list[Stage] = []
    for edge, pair in zip(edges, subject.pairs, strict=True):
        name, index = pair.ours
        flax_name = (name or layers[name]) + (f" (call {index + 1})" if index else "")
        found += [Stage(edge), Stage(subject.title(pair), flax_name, modules[pair.theirs[0]].kind, layers[name])]
    return {stage.place: stage for stage in (*found, Stage(last))}


def weight_pairs(subject: Subject) -> Iterator[WeightPair]:
    """All weights of both, in the port's order; then what only PyTorch has."""
    theirs = subject.exact.state.shapes
    for ours, weight in subject.exact.port.weights.items():
        name = subject.weight_pairs.get(ours, "")
        yield WeightPair(weight.flax_name, name, weight.layout.shape, theirs.get(name, ()))
    for name in subject.unmatched_theirs:
        yield WeightPair("", name, (), theirs[name])
