"""What a report shows beside its verdict, and does not judge."""

import math
from dataclasses import dataclass, field

from jaxloss.parity._layout import Shape


@dataclass(frozen=True)
class Errors:
    """The port's error and what it is measured by, both relative L2."""

    ours: float
    reference: float  # PyTorch's own in this dtype; in float64, where PyTorch is the reference, what is allowed


@dataclass
class Stage:
    """A layer, or the edge between two of them, in the order of the forward pass."""

    place: str  # as in findings: a layer by PyTorch's name
    flax_name: str = ""  # of a layer
    torch_kind: str = ""
    flax_kind: str = ""
    forced: dict[str, Errors] = field(default_factory=dict)  # by dtype: fed what PyTorch's was fed
    free: dict[str, Errors] = field(default_factory=dict)  # by dtype: as it runs in the network

    @property
    def is_layer(self) -> bool:
        """Whether it is one, or an edge."""
        return bool(self.flax_kind)


@dataclass(frozen=True)
class StepDistance:
    """How far all the parameters that move are from PyTorch's in float64 after a step, relative L2."""

    ours: float
    noise: float  # PyTorch's own: moved by rounding before each step in float64; as it computes in another dtype
    allowed: float | None  # what a tensor as noisy as all of them together would be allowed; None: not judged


@dataclass(frozen=True)
class WeightPair:
    """A weight's name and shape in both; empty where it has no counterpart."""

    ours: str = ""
    theirs: str = ""
    shape: Shape = ()
    torch_shape: Shape = ()


@dataclass
class Background:
    """What was compared, where, and by how much it is off in whatever is not judged."""

    name: str = ""  # of PyTorch's class
    stages: dict[str, Stage] = field(default_factory=dict)  # by place
    steps: dict[str, list[StepDistance]] = field(default_factory=dict)  # by dtype
    weights: list[WeightPair] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # that the check took

    def tell_forced(self, place: str, dtype: str, errors: Errors) -> None:
        """Notes an error of a layer or edge fed what PyTorch's was fed; of several in one place the largest stays."""
        _keep_largest(self.stages[place].forced, dtype, errors)

    def tell_free(self, place: str, dtype: str, errors: Errors) -> None:
        """Notes one of a layer or edge as it runs in the network; of several in one place the largest stays."""
        _keep_largest(self.stages[place].free, dtype, errors)


def _keep_largest(known: dict[str, Errors], dtype: str, errors: Errors) -> None:
    if dtype not in known or _size(errors) > _size(known[dtype]):
        known[dtype] = errors


def _size(errors: Errors) -> float:
    return math.inf if math.isnan(errors.ours) else errors.ours
